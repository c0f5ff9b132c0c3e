"""Faults of participants, of the network and of the SuperLink, in a real deployment on loopback.

    python -m pytest -m slow tests/deployment/test_faults.py

Each is tried once for each seed and writes a line of ``results/faults.md``.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from deployment import folder
from deployment.local import Local
from deployment.processes import Processes
from simulations import config, results
from simulations.config import Experiment

pytestmark = [pytest.mark.flower, pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parents[2]
VICTIM = "participant-0"
CUT_SECONDS = 25
SEEDS = range(int(os.environ.get("FAULT_SEEDS", "1")))


@dataclass
class Running:
    """A deployment in which a run goes on."""

    processes: Processes
    victim: Callable[[], str]
    """The victim's log so far."""

    def when(self, line: str, times: int = 1) -> None:
        """Wait until the victim has logged something so many times."""
        while self.victim().count(line) < times:
            time.sleep(0.1)

    def kill(self, name: str) -> None:
        """End a process and all that belongs to it, without warning."""
        os.killpg(self.processes.process_id(name), signal.SIGKILL)

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
    """SuperNode killed while it trains."""
    running.when("Receiving: train")
    running.kill(VICTIM)


def killed_in_query(running: Running) -> None:
    """SuperNode killed while it makes its report."""
    running.when("Receiving: query")
    running.kill(VICTIM)


def killed_in_upload(running: Running) -> None:
    """SuperNode killed while it uploads its model."""
    running.when("Sending: train")
    running.kill(VICTIM)


def cut_off(running: Running) -> None:
    """Gateway out of reach for 25 s while participants train."""
    running.when("Receiving: train")
    with running.frozen("gateway"):
        time.sleep(CUT_SECONDS)


def superlink_restarted_in_train(running: Running) -> None:
    """SuperLink killed and started again while participants train."""
    running.when("Receiving: train")
    running.kill("superlink")


def superlink_restarted_in_query(running: Running) -> None:
    """SuperLink killed and started again while participants make their reports."""
    running.when("Receiving: query")
    running.kill("superlink")


FAULTS = (
    *(killed_in_train, killed_in_query, killed_in_upload, cut_off),
    *(superlink_restarted_in_train, superlink_restarted_in_query),
)


def experiment(seed: int, output: Path) -> Experiment:
    return config.build(
        {
            "experiment": {"name": "faults", "rounds": 3, "clients": 3, "seed": seed},
            "train": {"local_epochs": 1},
            "attack": {"name": "dba", "malicious": 1},
            "defense": {"timeout": 300.0},
            "run": {"output": str(output)},
        }
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_run_survives(tmp_path: Path, fault: Callable[[Running], None], seed: int) -> None:
    output = tmp_path / "out"
    (tmp_path / "logs").mkdir()
    output.mkdir()
    tried = experiment(seed, output)
    site = folder.prepare(tmp_path / "site", tried)
    with (
        Processes(tmp_path / "logs") as processes,
        (tmp_path / "run.log").open("ab") as log,
    ):
        local = Local(site, tmp_path / "homes", processes)
        local.start_servers()
        operator = local.operator(log)
        nodes = operator.enrol(site.participants)
        for each in site.participants:
            local.start_participant(each)
        operator.wait_for(nodes, local.revive, 600)
        running = Running(processes, processes.log(VICTIM).read_text)
        began = time.monotonic()
        thread = threading.Thread(target=fault, args=[running], daemon=True)
        thread.start()
        operator.run(tried, site.test_data, local.revive)
        seconds = time.monotonic() - began
        thread.join(1)

    assert not thread.is_alive(), "the fault never happened"
    rounds = results.read(output, results.HISTORY)["rounds"]
    assert [entry["round"] for entry in rounds] == [0, 1, 2, 3]
    assert rounds[-1]["ba"] > 0.5
    _note(f"| {fault.__doc__.rstrip('.')} | {seed} | completed | {seconds:.0f} s |")


def _note(line: str) -> None:
    table = ROOT / "results" / "faults.md"
    table.parent.mkdir(exist_ok=True)
    if not table.exists():
        table.write_text("| fault | seed | run | time |\n|---|---|---|---|\n")
    with table.open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")
