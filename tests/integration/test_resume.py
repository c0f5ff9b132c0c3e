"""The real apps, stopped in the middle and resumed: all that a run leaves is as if nobody had."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from flwr.serverapp import ServerApp

from client.app import app as client_app
from none_core import audit
from server.app import Run
from server.config import DefenseConfig
from simulations.engines import in_process
from tasks.config import (
    AttackConfig,
    ConfigError,
    ExperimentConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
    to_run_config,
)

CLIENTS, ROUNDS, SEED = 4, 3, 1


class StoppedError(Exception):
    """The process is killed."""


def run(output: Path, stop: tuple[str, int] | None = None, **sections: Any) -> None:
    """Run or resume; raise in this phase of this round, as if the process was killed."""
    resume = (output / "resume.npz").exists()
    defense = {"probe_steps": 2, "probe_every": 2, "min_count": 1} | sections.pop("defense", {})
    checkpoints, images = sections.pop("checkpoints", True), sections.pop("train_images", 400)
    epochs = sections.pop("local_epochs", 4)
    experiment = {"name": "t", "clients": CLIENTS, "rounds": ROUNDS, "seed": SEED} | sections
    run_config = to_run_config(
        {
            "experiment": ExperimentConfig(**experiment, resume=resume),
            "task": TaskConfig(train_images=images),
            "train": TrainConfig(local_epochs=epochs, batch_size=16),
            "attack": AttackConfig(name="dba", malicious=1),
            "defense": DefenseConfig(**defense),
            "run": RunConfig(output=str(output), checkpoints=checkpoints),
        }
    )
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Any, context: Any) -> None:
        Run(Stopping(grid, stop), context).start()

    in_process.run_in_process(
        server_app,
        client_app,
        run_config,
        clients=experiment["clients"],
        seed=experiment["seed"],
        workers=1,
        nodes=output / "nodes",
    )


class Stopping:
    """Hands all on to a grid, and raises in a phase of a round."""

    def __init__(self, grid: Any, stop: tuple[str, int] | None) -> None:
        self._grid, self._stop, self._round = grid, stop, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def send_and_receive(self, messages: Iterable[Message], **options: Any) -> list[Message]:
        messages = list(messages)
        replies = list(self._grid.send_and_receive(messages, **options))
        for message in messages[:1]:
            kind = message.metadata.message_type
            if kind == "train":
                self._round = int(message.content["config"]["server-round"])
            if (kind.partition(".")[0], self._round) == self._stop:
                raise StoppedError
        return replies


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folders: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("undisturbed")
            run(folders[name], defense={"name": name})
        return folders[name]

    return of


def decisions(output: Path) -> list[dict[str, Any]]:
    """What the trail says of the rounds that count, without what differs between processes."""
    rounds = audit.verify(output / "audit.jsonl").rounds
    own = ("time", "number", "previous", "digest")
    return [
        {name: value for name, value in record.items() if name not in own}
        for found in rounds.values()
        for record in found.values()
    ]


def assert_same(one: Path, other: Path, rounds: int = ROUNDS) -> None:
    assert (one / "history.json").read_bytes() == (other / "history.json").read_bytes()
    names = ["model.pt", *(f"checkpoints/round-{r:04d}.pt" for r in range(rounds + 1))]
    for name in names:
        first, second = (torch.load(p / name, weights_only=True) for p in (one, other))
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert decisions(one) == decisions(other)
    verdict = audit.verify(one / "audit.jsonl")
    assert (verdict.status, verdict.notes) == (audit.INTACT, [])


@pytest.mark.parametrize("name", ["none-strategy", "foolsgold", "flame"])
def test_a_run_that_was_stopped_ends_as_if_it_was_not(
    tmp_path: Path, undisturbed: Callable[[str], Path], name: str
) -> None:
    output = tmp_path / "run"
    stops = (
        [("train", 1), ("query", 2), ("query", 3)] if name == "none-strategy" else [("train", 3)]
    )
    for stop in stops:
        with pytest.raises(StoppedError):
            run(output, stop, defense={"name": name})
        random.seed(3)  # whatever another process starts with
    run(output, defense={"name": name})
    assert_same(output, undisturbed(name))


def test_what_participants_keep_makes_a_difference(
    tmp_path: Path, undisturbed: Callable[[str], Path]
) -> None:
    """Without it, the models differ: so the test above can fail."""
    output = tmp_path / "run"
    with pytest.raises(StoppedError):
        run(output, ("query", 3))
    kept = [path.read_bytes() for path in (output / "nodes").iterdir()]
    assert all(b"none.triggers" in state for state in kept)
    assert any(b"none.kept" in state for state in kept)
    shutil.rmtree(output / "nodes")
    run(output)
    with pytest.raises(AssertionError):
        assert_same(output, undisturbed("none-strategy"))


def test_a_finished_run_that_is_resumed_stays_as_it_is(
    tmp_path: Path, undisturbed: Callable[[str], Path]
) -> None:
    output = tmp_path / "run"
    run(output)
    run(output)
    assert_same(output, undisturbed("none-strategy"))


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"seed": 2}, "experiment.seed = 2 is not legal: expected 1, as in the run"),
        ({"defense": {"budget": 0.5}}, "defense.budget = 0.5 is not legal: expected 0.04"),
    ],
)
def test_another_experiment_cannot_resume_it(
    tmp_path: Path, sections: dict[str, Any], says: str
) -> None:
    output = tmp_path / "run"
    with pytest.raises(StoppedError):
        run(output, ("train", 1))
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=says):
        run(output, **sections)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_a_run_whose_trail_was_altered_is_not_resumed(tmp_path: Path) -> None:
    output = tmp_path / "run"
    with pytest.raises(StoppedError):
        run(output, ("train", 2))
    trail = output / "audit.jsonl"
    lines = [json.loads(line) for line in trail.read_text().splitlines()]
    trail.write_text("\n".join(json.dumps(line) for line in lines))
    with pytest.raises(RuntimeError, match="cannot be continued: line 1"):
        run(output)
