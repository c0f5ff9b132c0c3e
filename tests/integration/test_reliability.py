"""Faults, five seeds each: the run completes or is resumed, and nothing is lost.

Each writes its row of the table in docs/reliability.md::

    python -m pytest -m slow tests/integration/test_reliability.py
"""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg, FedAvgM

import server.app
from none_core import audit, trail
from none_core.files import replace
from none_core.flower import NoneStrategy
from none_core.flower.messages import QUERY, record_of, state_of
from none_core.flower.resume import Continued, keep, recall
from none_core.flower.standalone import task_identity
from none_core.flower.toy_federation import (
    EXAMPLE_INPUT,
    ToyFederation,
    _ToyGrid,
    toy_model,
)
from none_core.trail import Trail
from server.grid import MeteredGrid, TooFewNodesError
from simulations.engines import in_process
from tasks import data
from tests.faults import SEEDS, tried
from tests.integration import test_resume
from tests.integration.test_resume import decisions

KILLS = 4  # of one run
CLIENTS, ROUNDS = 10, 4  # of the toy federation

# Each process starts with these modules, and with nothing that another one has done.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.integration.test_reliability"])

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


# --- the ServerApp is killed ----------------------------------------------------------------------

# By what the log says last; Flower's own words.
PHASES = {
    "starting": r"Starting \w+ strategy",
    "training": r"configure_train",
    "querying and deciding": r"aggregate_train",
    "scoring and writing": r"NONE round|Global evaluation",
    "finishing": r"Strategy execution finished",
}


def real_apps(output: Path, seed: int) -> None:
    """Run or resume the apps of this repository, and log as a user's would."""
    output.mkdir(parents=True, exist_ok=True)
    logging.getLogger("flwr").handlers = [logging.FileHandler(output / "run.log")]
    test_resume.run(output, seed=seed, local_epochs=2)


def own_server(output: Path, seed: int) -> None:
    """Run or resume a server such as docs and docstrings show, in the toy federation."""
    output.mkdir(parents=True, exist_ok=True)
    logging.getLogger("flwr").handlers = [logging.FileHandler(output / "run.log")]
    log, file = Trail(output / "audit.jsonl"), output / "resume.npz"
    everybody: dict[str, Any] = {"min_available_nodes": CLIENTS, "fraction_evaluate": 0.0}
    strategy = NoneStrategy(
        FedAvgM(fraction_train=0.7, server_momentum=0.5, **everybody),
        toy_model,
        EXAMPLE_INPUT,
        **{"budget": 0.2, "min_accuracy": 0.3, "probe_every": 2, "probe_steps": 5, "audit": log},
    )
    server_app = ServerApp()

    def evaluated(server_round: int, arrays: ArrayRecord) -> None:
        state = state_of(arrays)
        log.append(trail.RELEASED, round=server_round, model=trail.digest_of_model(state))
        target = trail.checkpoint_of(log.file, server_round)
        target.parent.mkdir(exist_ok=True)
        replace(target, lambda stream: torch.save(state, stream))
        keep(file, strategy, server_round, arrays)

    @server_app.main()
    def main(grid: Any, context: Any) -> None:
        done, arrays = None, record_of(toy_model().state_dict())
        if file.exists():
            done, arrays, _ = recall(file, strategy)
            log.resume(after=done)
        else:
            log.open()
        continued = Continued(strategy, done)
        continued.start(grid, arrays, num_rounds=test_resume.ROUNDS, evaluate_fn=evaluated)
        log.close()

    in_process.run_in_process(
        server_app,
        ToyFederation(CLIENTS, 4).client_app(),
        {},
        clients=CLIENTS,
        seed=seed,
        workers=1,
        nodes=output / "nodes",
    )


SERVERS: dict[str, Callable[[Path, int], None]] = {
    "one's own, with `none_core.flower.resume`": own_server,
    "`python -m simulations run`": real_apps,
}


def start(server: Callable[[Path, int], None], output: Path, seed: int) -> ForkServerProcess:
    """Start a server that has nothing but its folder, whoever was killed before it."""
    process = PROCESSES.Process(target=server, args=(output, seed))
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


def finished(server: Callable[[Path, int], None], output: Path, seed: int) -> None:
    process = start(server, output, seed)
    process.join()
    assert process.exitcode == 0, log_of(output)


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_that_is_killed_is_resumed(tmp_path: Path, name: str) -> None:
    server, killed = SERVERS[name], Counter[str]()
    with tried(
        f"the server's process killed (SIGKILL) at random moments; the server: {name}"
    ) as row:
        for seed in SEEDS:
            undisturbed, disturbed = tmp_path / f"{seed}-undisturbed", tmp_path / f"{seed}-killed"
            finished(server, undisturbed, seed)
            lines = log_of(undisturbed).count("\n")
            rng = random.Random(seed)
            for _ in range(KILLS):
                before = len(log_of(disturbed))
                process, wanted = start(server, disturbed, seed), rng.randrange(lines // 2)
                while process.is_alive() and log_of(disturbed)[before:].count("\n") < wanted:
                    time.sleep(0.002)
                time.sleep(rng.uniform(0, 0.1))
                if process.is_alive():
                    process.kill()
                    process.join()
                    killed[phase_of(log_of(disturbed)[before:])] += 1
            finished(server, disturbed, seed)
            assert_same_models_and_decisions(disturbed, undisturbed)
            print(f"seed {seed}: {dict(killed)}", flush=True)
        assert killed.total() >= 2 * len(SEEDS)
        assert len(killed) >= 2
        moments = ", ".join(f"{count} while {phase}" for phase, count in killed.most_common())
        row += [
            f"{len(SEEDS)} seeds, {killed.total()} kills: {moments}",
            "resumed each time; all models and all decisions are bit for bit those of a run that "
            "nobody stopped, and the audit trail is intact and signed",
        ]


def assert_same_models_and_decisions(one: Path, other: Path) -> None:
    if (other / "history.json").exists():
        assert (one / "history.json").read_bytes() == (other / "history.json").read_bytes()
    names = sorted(path.relative_to(other) for path in other.rglob("*.pt"))
    assert len(names) > test_resume.ROUNDS
    for name in names:
        first, second = (torch.load(p / name, weights_only=True) for p in (one, other))
        assert all(torch.equal(first[key], second[key]) for key in first), name
    assert decisions(one) == decisions(other)
    assert audit.verify(one / "audit.jsonl").status == audit.INTACT


# --- participants fail ----------------------------------------------------------------------------


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
    "that does not answer in time (killed, cut off, too slow) while training": (
        "train",
        nothing,
        "missing",
    ),
    "that does not answer in time (killed, cut off, too slow) while reporting": (
        "query",
        nothing,
        "missing",
    ),
    "that raises an exception while training": ("train", failing, "failed"),
    "that raises an exception while reporting": ("query", failing, "missing"),
    "that the SuperLink gives up while training": ("train", by_the_superlink, "failed"),
    "that the SuperLink gives up while reporting": ("query", by_the_superlink, "missing"),
    "whose model is cut off while uploading": ("train", torn, "refused"),
    "whose report is cut off while uploading": ("query", torn, "refused"),
    "that sends its model twice": ("train", twice, "refused"),
    "that sends its report twice": ("query", twice, "refused"),
    "that reports about another round": ("query", of_another_round, "refused"),
}


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
    with tried(f"a participant {fault}") as row:
        for seed in SEEDS:
            grid = FaultyGrid(seed, what, kind)
            models, lines = play(grid)
            assert len(models) == ROUNDS + 1
            assert [line["round"] for line in lines] == list(range(1, ROUNDS + 1))
            instead = (lambda reply: [reply]) if what is twice else nothing  # the first one counts
            assert play(FaultyGrid(seed, instead, kind))[0] == models
            refused = sum(len(line["refused"]) for line in lines)
            if counted == "refused":
                assert refused >= grid.faults
            total += grid.faults
        assert total >= 2 * len(SEEDS)
        as_if = "its first answer alone" if what is twice else "none of these answers"
        row += [
            f"{len(SEEDS)} seeds, {total} times",
            f"all {ROUNDS} rounds complete; the models are those of a run with {as_if}",
        ]


def test_missing_participants_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flwr.serverapp.strategy.strategy_utils.sleep", lambda seconds: None)
    with tried("fewer participants connected than needed") as row:
        for seed in SEEDS:
            grid = FaultyGrid(seed, nothing, "train")
            monkeypatch.setattr(grid, "get_node_ids", lambda: [1, 2, 3])
            with pytest.raises(TooFewNodesError, match=r"only 3 of the 10 .* start 7 more"):
                play(MeteredGrid(grid, CLIENTS, patience=0.2))
        row += [
            f"{len(SEEDS)} seeds",
            "waited for `run.node_timeout` seconds; then the run ends and says how many are "
            "missing, and can be resumed",
        ]


# --- the disk -------------------------------------------------------------------------------------


def test_a_full_disk_does_not_stop_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Full during one round, in which nothing can be written, and then no more."""
    lost: set[str] = set()
    with tried("the disk full during a round") as row:
        for seed in SEEDS:
            lost |= disk_full_in_one_round(tmp_path, seed, caplog)
        assert lost
        row += [
            f"{len(SEEDS)} seeds, one round each",
            "the run completes with the same model and an intact audit trail, whose records wait "
            "in memory; that round's checkpoint is missing, and the log says so. Full at the "
            "start: it does not start",
        ]


def disk_full_in_one_round(tmp_path: Path, seed: int, caplog: Any) -> set[str]:
    """Names of the files that are missing after such a run."""
    plain, full = tmp_path / f"{seed}-plain", tmp_path / f"{seed}-full"
    test_resume.run(plain, seed=seed, local_epochs=1)
    bad = random.Random(seed).randint(1, test_resume.ROUNDS)
    real = server.app.Run.released

    def refuse(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    def released(self: Any, server_round: int, arrays: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            if server_round == bad:
                patch.setattr(os, "replace", refuse)
                patch.setattr("none_core.trail.os.fsync", refuse)
            return real(self, server_round, arrays)

    with pytest.MonkeyPatch.context() as patch, caplog.at_level("WARNING", "flwr"):
        patch.setattr(server.app.Run, "released", released)
        caplog.clear()
        test_resume.run(full, seed=seed, local_epochs=1)
    missing = full / "checkpoints" / f"round-{bad:04d}.pt"
    assert f"could not write {missing}" in caplog.text
    assert not missing.exists()
    assert audit.verify(full / "audit.jsonl").status == audit.INTACT
    for name in ("history.json", "model.pt"):
        assert (full / name).read_bytes() == (plain / name).read_bytes()
    return {p.name for p in plain.rglob("round-*")} - {p.name for p in full.rglob("round-*")}


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

    def few(*args: Any, **options: Any) -> data.Data:
        loaded = real_load(*args, **options)
        return dataclasses.replace(
            loaded, test_images=loaded.test_images[::20], test_labels=loaded.test_labels[::20]
        )

    def released(self: Any, server_round: int, arrays: Any) -> Any:
        result = real(self, server_round, arrays)
        files = [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()]
        seen[server_round] = resident(), len(files), sum(files)
        return result

    monkeypatch.setattr("server.app.data.load", few)
    monkeypatch.setattr(server.app.Run, "released", released)
    with tried(f"{LONG} rounds") as row:
        test_resume.run(
            tmp_path, rounds=LONG, clients=2, checkpoints=False, train_images=64, local_epochs=1
        )
        memory = {n: size for n, (size, _, _) in seen.items() if n >= WARM}
        growth = max(memory.values()) / memory[WARM] - 1
        by_round = (seen[LONG][2] - seen[WARM][2]) / (LONG - WARM)
        undone = len(list(tmp_path.glob("undo/*")))
        assert growth <= 0.05
        assert by_round <= 8_000
        assert seen[LONG][1] - undone <= 20
        row += [
            "two clients in the server's process, without checkpoints",
            f"memory grows by {100 * growth:.1f} % after round {WARM} (of "
            f"{memory[WARM] / 1e6:.0f} MB), files by {by_round / 1e3:.1f} KB a round",
        ]
