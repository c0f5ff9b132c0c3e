"""Faults of participants, of the network and of the SuperLink, in a real deployment on loopback.

    python -m pytest -m slow tests/deployment/test_faults.py

Each is tried with five seeds and writes its row of the table in docs/reliability.md. Two minutes a
try: an hour in all.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from deployment import folder
from deployment.local import Local
from deployment.processes import Processes
from none_core import audit
from simulations import config, results
from simulations.config import Experiment
from tests.faults import SEEDS, tried

pytestmark = [pytest.mark.flower, pytest.mark.slow, pytest.mark.timeout(3600)]

VICTIM = "participant-0"
CUT_SECONDS = 25
CLIENTS, ROUNDS = 3, 3
# What each logs when it begins.
STARTED = {VICTIM: "Starting Flower SuperNode", "superlink": "Starting Flower SuperLink"}


@dataclass
class Running:
    """A deployment in which a run goes on."""

    processes: Processes
    victim: Callable[[], str]
    """The victim's log so far."""
    killed: list[str] = field(default_factory=list)

    def when(self, line: str, times: int = 1) -> None:
        """Wait until the victim has logged something so many times."""
        while self.victim().count(line) < times:
            time.sleep(0.1)

    def kill(self, name: str) -> None:
        """End a process and all that belongs to it, without warning."""
        os.killpg(self.processes.process_id(name), signal.SIGKILL)
        self.killed.append(name)

    @contextmanager
    def frozen(self, name: str) -> Iterator[None]:
        """Hold a process up."""
        group = self.processes.process_id(name)
        os.killpg(group, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(group, signal.SIGCONT)


def killed_in_train(running: Running) -> None:
    running.when("Receiving: train")
    running.kill(VICTIM)


def killed_in_query(running: Running) -> None:
    running.when("Receiving: query")
    running.kill(VICTIM)


def killed_in_upload(running: Running) -> None:
    running.when("Sending: train")
    running.kill(VICTIM)


def cut_off(running: Running) -> None:
    running.when("Receiving: train")
    with running.frozen("gateway"):
        time.sleep(CUT_SECONDS)


def superlink_restarted_in_train(running: Running) -> None:
    running.when("Receiving: train")
    running.kill("superlink")


def superlink_restarted_in_query(running: Running) -> None:
    running.when("Receiving: query")
    running.kill("superlink")


FAULTS: dict[str, Callable[[Running], None]] = {
    "a SuperNode killed (SIGKILL) while it trains": killed_in_train,
    "a SuperNode killed (SIGKILL) while it makes its report": killed_in_query,
    "a SuperNode killed (SIGKILL) while it uploads its model": killed_in_upload,
    f"the gateway out of reach for {CUT_SECONDS} s while participants train": cut_off,
    "the SuperLink killed and started again while participants train": superlink_restarted_in_train,
    "the SuperLink killed and started again while they report": superlink_restarted_in_query,
}


def experiment(seed: int, output: Path) -> Experiment:
    return config.build(
        {
            "experiment": {
                "name": "faults",
                "rounds": ROUNDS,
                "clients": CLIENTS,
                "seed": seed,
            },
            "train": {"local_epochs": 1},
            "attack": {"name": "dba", "malicious": 1},
            "defense": {"timeout": 300.0},
            "run": {"output": str(output)},
        }
    )


@pytest.mark.parametrize("fault", FAULTS)
def test_the_run_survives(tmp_path: Path, fault: str) -> None:
    with tried(fault) as row:
        ended = [run_with(FAULTS[fault], tmp_path / str(seed), seed) for seed in SEEDS]
        seconds = [seconds for seconds, _ in ended]
        missing = sum(CLIENTS - replies for _, each in ended for replies in each)
        row += [
            f"{len(SEEDS)} seeds, once each, in a deployment of {CLIENTS} processes",
            f"all {ROUNDS} rounds complete, with an intact audit trail; "
            f"{missing} of {len(SEEDS) * ROUNDS * CLIENTS} models are missing in them; "
            f"the run takes {min(seconds):.0f} to {max(seconds):.0f} s",
        ]


def run_with(fault: Callable[[Running], None], place: Path, seed: int) -> tuple[float, list[int]]:
    """Seconds that a run took in which the fault happened, and the models that each round had."""
    output = place / "out"
    (place / "logs").mkdir(parents=True)
    output.mkdir()
    planned = experiment(seed, output)
    site = folder.prepare(place / "site", planned)
    with (
        Processes(place / "logs") as processes,
        (place / "run.log").open("ab") as log,
    ):
        local = Local(site, place / "homes", processes)
        local.start_servers()
        operator = local.operator(log)
        nodes = operator.enrol(site.participants)
        for each in site.participants:
            local.start_participant(each)
        operator.wait_for(nodes, processes.revive, 600)
        running = Running(processes, processes.log(VICTIM).read_text)
        began = time.monotonic()
        thread = threading.Thread(target=fault, args=[running], daemon=True)
        thread.start()
        operator.run(planned, site.test_data, processes.revive)
        seconds = time.monotonic() - began
        thread.join(1)

    assert not thread.is_alive(), "the fault never happened"
    rounds = results.read(output, results.HISTORY)["rounds"]
    assert [entry["round"] for entry in rounds] == list(range(ROUNDS + 1))
    assert rounds[-1]["ba"] > 0.5
    assert audit.verify(output / "audit.jsonl").status == audit.INTACT
    model = torch.load(output / "model.pt", weights_only=True)
    size = sum(tensor.nbytes for tensor in model.values())
    replies = [round(entry["bytes"]["train_up"] / size) for entry in rounds[1:]]
    assert min(replies) >= CLIENTS - 1, "somebody else's model was lost as well"
    for name in running.killed:
        assert processes.log(name).read_text().count(STARTED[name]) > 1, f"{name} did not come back"
    return seconds, replies
