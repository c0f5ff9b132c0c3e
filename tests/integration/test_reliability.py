"""Faults, five seeds each: the run completes or is resumed, and nothing is lost.

When all of these have passed in one go, the table in docs/reliability.md is written::

    python -m pytest -m slow tests/integration/test_reliability.py
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ConfigRecord, Error, Message, RecordDict
from flwr.serverapp.strategy import FedAvg

import server.app
from none_core import audit
from none_core.flower import NoneStrategy
from none_core.flower.messages import QUERY, record_of
from none_core.flower.toy_federation import (
    EXAMPLE_INPUT,
    ToyFederation,
    _ToyGrid,
    task_identity,
    toy_model,
)
from server.grid import MeteredGrid, TooFewNodesError
from tasks import data
from tests.integration import test_resume
from tests.integration.test_resume import assert_same

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reliability.md"
SEEDS = range(5)
KILLS = 4  # of one run

# Each process starts with these modules, and with nothing that another one has done.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.integration.test_resume"])

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@dataclass
class Row:
    """A line of the table."""

    fault: str
    tried: str
    outcome: str


ROWS: dict[str, Row] = {}
FAULTS: list[str] = []  # what there is to try, in the order of the tests


@pytest.fixture(scope="module", autouse=True)
def table(request: pytest.FixtureRequest) -> Iterator[None]:
    """Write the table, if all of it was tried and passed."""
    yield
    if request.session.testsfailed or set(ROWS) != {*FAULTS, "kill", "disk", "nodes", "memory"}:
        return
    lines = ["| fault | tried | what became of it |", "|---|---|---|"]
    lines += [f"| {row.fault} | {row.tried} | {row.outcome} |" for row in ROWS.values()]
    pattern = re.compile(r"(?<=<!-- faults -->\n).*(?=<!-- /faults -->)", re.DOTALL)
    text = pattern.sub(lambda _: "\n".join(lines) + "\n", PAGE.read_text())
    PAGE.write_text(text)


# --- the ServerApp is killed ----------------------------------------------------------------------

# By what the log says last; Flower's own words.
PHASES = {
    "starting": r"Starting \w+ strategy",
    "training": r"configure_train",
    "querying and deciding": r"aggregate_train",
    "scoring and writing": r"NONE round|Global evaluation",
    "finishing": r"Strategy execution finished",
}


def serve(output: Path, seed: int) -> None:
    """Run or resume, in a process of its own, and log as a user's would."""
    output.mkdir(parents=True, exist_ok=True)
    logging.getLogger("flwr").handlers = [logging.FileHandler(output / "run.log")]
    test_resume.run(output, seed=seed, local_epochs=2)


def start(output: Path, seed: int) -> ForkServerProcess:
    """Start a server that has nothing but its folder, whoever was killed before it."""
    process = PROCESSES.Process(target=serve, args=(output, seed))
    process.start()
    return process


def log_of(output: Path) -> str:
    log = output / "run.log"
    return log.read_text() if log.exists() else ""


def phase_of(log: str) -> str:
    """What the server was doing when it was killed."""
    last = {
        name: max([m.end() for m in re.finditer(p, log)], default=-1) for name, p in PHASES.items()
    }
    return max(last, key=lambda name: last[name]) if max(last.values()) >= 0 else "starting"


def finished(output: Path, seed: int) -> None:
    process = start(output, seed)
    process.join()
    assert process.exitcode == 0, log_of(output)


def test_a_server_that_is_killed_is_resumed(tmp_path: Path) -> None:
    killed: Counter[str] = Counter()
    for seed in SEEDS:
        undisturbed, disturbed = tmp_path / f"{seed}-undisturbed", tmp_path / f"{seed}-killed"
        finished(undisturbed, seed)
        lines = log_of(undisturbed).count("\n")
        rng = random.Random(seed)
        for _ in range(KILLS):
            before = len(log_of(disturbed))
            process, wanted = start(disturbed, seed), rng.randrange(lines // 2)
            while process.is_alive() and log_of(disturbed)[before:].count("\n") < wanted:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.2))
            if process.is_alive():
                process.kill()
                process.join()
                killed[phase_of(log_of(disturbed)[before:])] += 1
        finished(disturbed, seed)
        assert_same(disturbed, undisturbed)
        print(f"seed {seed}: {dict(killed)}", flush=True)
    assert killed.total() >= 2 * len(SEEDS)
    assert len(killed) >= 2
    moments = ", ".join(f"{count} while {phase}" for phase, count in killed.most_common())
    ROWS["kill"] = Row(
        "the server's process killed (SIGKILL) at a random moment, and resumed",
        f"{len(SEEDS)} seeds, {killed.total()} kills: {moments}",
        "resumed each time; results, all models and all decisions in the audit trail are bit "
        "for bit those of a run that nobody stopped, and the trail is intact and signed",
    )


# --- participants fail ----------------------------------------------------------------------------

CLIENTS, ROUNDS = 10, 4


class FaultyGrid(_ToyGrid):
    """The toy federation, of whose clients some fail now and then."""

    def __init__(self, seed: int, fault: Callable[[Message], list[Message]], kind: str) -> None:
        super().__init__(ToyFederation(CLIENTS, 4))
        self.rng, self.fault, self.kind = random.Random(seed), fault, kind
        self.faults = 0

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Message]:
        replies = []
        for reply in super().send_and_receive(messages, timeout=timeout):
            concerned = reply.metadata.message_type.partition(".")[0] == self.kind
            if concerned and self.rng.random() < 0.2:
                self.faults += 1
                replies += self.fault(reply)
            else:
                replies.append(reply)
        return replies


def answered(reply: Message, content: RecordDict | Error) -> Message:
    """The same reply with something else in it."""
    changed = Message(content, reply_to=_asked(reply))
    changed.metadata.__dict__["_src_node_id"] = reply.metadata.src_node_id
    return changed


def _asked(reply: Message) -> Message:
    return Message(RecordDict(), reply.metadata.src_node_id, reply.metadata.message_type)


def nothing(reply: Message) -> list[Message]:
    return []


def failing(reply: Message) -> list[Message]:
    return [answered(reply, Error(2, "RuntimeError: killed"))]


def by_the_superlink(reply: Message) -> list[Message]:
    message = answered(reply, Error(5, "the node is gone"))
    message.metadata.__dict__["_src_node_id"] = 1
    return [message]


def twice(reply: Message) -> list[Message]:
    return [reply, reply]


def torn(reply: Message) -> list[Message]:
    content = RecordDict(dict(reply.content))
    for record in content.array_records.values():
        name, array = next(iter(record.items()))
        half = array.data[: len(array.data) // 2]
        record[name] = Array(array.dtype, array.shape, array.stype, half)
    return [answered(reply, content)]


def of_another_round(reply: Message) -> list[Message]:
    content = RecordDict(dict(reply.content))
    content[QUERY] = ConfigRecord({"round": 99})
    return [answered(reply, content)]


PARTICIPANTS: dict[str, tuple[str, Callable[[Message], list[Message]], str]] = {
    "killed, cut off or too slow while training": ("train", nothing, "missing"),
    "killed, cut off or too slow while reporting": ("query", nothing, "missing"),
    "raising an exception while training": ("train", failing, "failed"),
    "raising an exception while reporting": ("query", failing, "missing"),
    "given up by the SuperLink while training": ("train", by_the_superlink, "failed"),
    "given up by the SuperLink while reporting": ("query", by_the_superlink, "missing"),
    "its model cut off while uploading": ("train", torn, "refused"),
    "its report cut off while uploading": ("query", torn, "refused"),
    "sending its model twice": ("train", twice, "refused"),
    "sending its report twice": ("query", twice, "refused"),
    "reporting about another round": ("query", of_another_round, "refused"),
}
FAULTS += PARTICIPANTS


def play(grid: _ToyGrid) -> tuple[list[bytes], list[dict[str, Any]]]:
    """All models, and the audit trail."""
    lines: list[dict[str, Any]] = []
    models: list[bytes] = []
    everybody: dict[str, Any] = {"min_train_nodes": CLIENTS, "min_available_nodes": CLIENTS}
    strategy = NoneStrategy(
        FedAvg(**everybody, fraction_evaluate=0.0),
        toy_model,
        EXAMPLE_INPUT,
        **{"budget": 0.2, "min_accuracy": 0.3, "probe_steps": 2, "audit": lines.append},
    )

    def released(server_round: int, arrays: Any) -> None:
        models.append(b"".join(np.ascontiguousarray(a.numpy()).tobytes() for a in arrays.values()))

    with task_identity():
        random.seed(0)
        initial = record_of(toy_model().state_dict())
        strategy.start(grid, initial, num_rounds=ROUNDS, evaluate_fn=released)
    return models, lines


@pytest.mark.parametrize("fault", PARTICIPANTS)
def test_participants_may_fail(fault: str) -> None:
    kind, what, counted = PARTICIPANTS[fault]
    total = 0
    for seed in SEEDS:
        grid = FaultyGrid(seed, what, kind)
        models, lines = play(grid)
        assert len(models) == ROUNDS + 1
        assert [line["round"] for line in lines] == list(range(1, ROUNDS + 1))
        silent = FaultyGrid(seed, twice if what is twice else nothing, kind)
        if what is twice:  # the first counts
            silent.fault = lambda reply: [reply]
        assert play(silent)[0] == models  # as if it had not answered, and nothing worse
        refused = sum(len(line["refused"]) for line in lines)
        if counted == "refused":
            assert refused >= grid.faults
        total += grid.faults
    assert total >= 2 * len(SEEDS)
    heard = "its first answer counts" if what is twice else "as if it had not answered"
    ROWS[fault] = Row(
        f"a participant {fault}",
        f"{len(SEEDS)} seeds, {total} times",
        f"all {ROUNDS} rounds complete; the models are those of a run {heard}"
        if what is not twice
        else f"all {ROUNDS} rounds complete; {heard}, and it is noted",
    )


def test_missing_participants_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flwr.serverapp.strategy.strategy_utils.sleep", lambda seconds: None)
    for seed in SEEDS:
        grid = FaultyGrid(seed, nothing, "train")
        monkeypatch.setattr(grid, "get_node_ids", lambda: [1, 2, 3])
        with pytest.raises(
            TooFewNodesError, match=r"only 3 of the 10 participants .* start 7 more"
        ):
            play(MeteredGrid(grid, CLIENTS, patience=0.2))
    ROWS["nodes"] = Row(
        "fewer participants connected than needed",
        f"{len(SEEDS)} seeds",
        "waited for `run.node_timeout` seconds; then the run ends and says how many are missing, "
        "and can be resumed",
    )


# --- the disk -------------------------------------------------------------------------------------


def test_a_full_disk_does_not_stop_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Full during one round, in which nothing can be written, and then no more."""
    lost: set[str] = set()
    for seed in SEEDS:
        plain, full = tmp_path / f"{seed}-plain", tmp_path / f"{seed}-full"
        test_resume.run(plain, seed=seed)
        bad = random.Random(seed).randint(1, test_resume.ROUNDS)
        real, real_replace = server.app.Run.released, os.replace

        def released(self: Any, server_round: int, arrays: Any) -> Any:
            def refuse(*args: Any) -> None:
                raise OSError(28, "No space left on device")

            with pytest.MonkeyPatch.context() as patch:
                if server_round == bad:  # noqa: B023 (called within the iteration)
                    patch.setattr(os, "replace", refuse)
                    patch.setattr("none_core.trail.os.fsync", refuse)
                return real(self, server_round, arrays)  # noqa: B023

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(server.app.Run, "released", released)
            caplog.clear()
            with caplog.at_level("WARNING", "flwr"):
                test_resume.run(full, seed=seed)
        assert os.replace is real_replace
        missing = f"round-{bad:04d}.pt"
        assert f"could not write {full / 'checkpoints' / missing}" in caplog.text
        assert not (full / "checkpoints" / missing).exists()
        assert audit.verify(full / "audit.jsonl").status == audit.INTACT
        for name in ("history.json", "model.pt"):
            assert (full / name).read_bytes() == (plain / name).read_bytes()
        lost |= {p.name for p in plain.rglob("round-*")} - {p.name for p in full.rglob("round-*")}
    assert lost
    ROWS["disk"] = Row(
        "the disk full during a round",
        f"{len(SEEDS)} seeds, one round each",
        "the run completes with the same model and an intact audit trail, whose records wait in "
        "memory; that round's checkpoint is missing, and the log says so. Full at the start: it "
        "does not start",
    )


# --- a long run -----------------------------------------------------------------------------------

LONG, WARM = 500, 100


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_500_rounds_take_no_more_memory_than_100(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real apps, scored on 50 images so that it takes minutes."""
    seen: dict[int, tuple[int, int, int]] = {}
    real, real_load = server.app.Run.released, data.load

    def few(*args: Any) -> data.Data:
        loaded = real_load(*args)
        return replace(
            loaded, test_images=loaded.test_images[::20], test_labels=loaded.test_labels[::20]
        )

    def released(self: Any, server_round: int, arrays: Any) -> Any:
        result = real(self, server_round, arrays)
        files = [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()]
        seen[server_round] = resident(), len(files), sum(files)
        return result

    monkeypatch.setattr("server.app.data.load", few)
    monkeypatch.setattr(server.app.Run, "released", released)
    test_resume.run(
        tmp_path, rounds=LONG, clients=2, checkpoints=False, train_images=64, local_epochs=1
    )

    memory = {n: size for n, (size, _, _) in seen.items() if n >= WARM}
    growth = max(memory.values()) / memory[WARM] - 1
    by_round = (seen[LONG][2] - seen[WARM][2]) / (LONG - WARM)
    undone = len(list((tmp_path / "undo").glob("*"))) if (tmp_path / "undo").exists() else 0
    print(json.dumps({"memory": memory[WARM], "growth": growth, "bytes_by_round": by_round}))
    assert growth <= 0.05
    assert by_round <= 8_000
    assert seen[LONG][1] - undone <= 16
    ROWS["memory"] = Row(
        f"{LONG} rounds",
        f"{LONG} rounds of two clients in one process, without checkpoints",
        f"memory grows by {100 * growth:.1f} % after round {WARM} (of {memory[WARM] / 1e6:.0f} MB, "
        f"clients included); files by {by_round / 1e3:.1f} KB a round",
    )
