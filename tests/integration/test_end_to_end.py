"""Two rounds of the real apps on 5,000 real digits: all that a run leaves is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client.app import app as client_app
from none_core import audit
from server.app import app as server_app
from server.config import DefenseConfig
from simulations.engines import run_in_process
from tasks.config import (
    AttackConfig,
    ExperimentConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
    to_run_config,
)
from tasks.poisoning import malicious_clients

CLIENTS, ROUNDS, SEED = 4, 2, 0


def run(
    output: Path,
    defense: str = "none-strategy",
    workers: int = 2,
    rounds: int = ROUNDS,
    **task: Any,
) -> dict[str, Any]:
    run_config = to_run_config(
        {
            "experiment": ExperimentConfig(name="t", clients=CLIENTS, rounds=rounds, seed=SEED),
            "task": TaskConfig(**task),
            "train": TrainConfig(local_epochs=1),
            "attack": AttackConfig(name="dba", malicious=1, scale=1.0),
            "defense": DefenseConfig(name=defense, start_round=1),
            "run": RunConfig(output=str(output)),
        }
    )
    run_in_process(server_app, client_app, run_config, clients=CLIENTS, seed=SEED, workers=workers)
    return json.loads((output / "history.json").read_text())


@pytest.fixture(scope="module")
def defended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("defended")
    return output, run(output)


def test_the_history_is_complete(defended: tuple[Path, dict[str, Any]]) -> None:
    _, history = defended
    assert [entry["round"] for entry in history["rounds"]] == [0, 1, 2]
    assert history["truth"]["malicious"] == list(malicious_clients(CLIENTS, 1, SEED))
    assert history["truth"]["poisoned"] == round(0.3125 * 1000)
    for entry in history["rounds"]:
        assert 0 <= entry["ba"] <= 1
        assert 0 <= entry["asr"] <= 1
        assert entry["refused"] == 0
        assert set(entry["suspected"]) <= set(range(CLIENTS))
        asked = entry["round"] > 0
        assert bool(entry["decision"]) == asked
        assert all((size > 0) == asked for size in entry["bytes"].values())
    assert history["rounds"][-1]["ba"] > 0.5 > history["rounds"][0]["ba"]


def test_the_seconds_of_each_phase_are_in_a_file_of_their_own(
    defended: tuple[Path, dict[str, Any]],
) -> None:
    output, history = defended
    timing = json.loads((output / "timing.json").read_text())["rounds"]
    assert [entry["round"] for entry in timing] == [0, 1, 2]
    assert all(timing[-1][phase] > 0 for phase in ("train", "query", "decide", "evaluate"))
    assert "seconds" not in json.dumps(history)


def test_the_released_models_are_there(defended: tuple[Path, dict[str, Any]]) -> None:
    output, _ = defended
    states = [
        torch.load(output / "checkpoints" / f"round-{r:04d}.pt", weights_only=True)
        for r in range(ROUNDS + 1)
    ]
    last = torch.load(output / "model.pt", weights_only=True)
    assert all(torch.equal(last[name], states[-1][name]) for name in last)
    assert any(not torch.equal(states[0][name], states[1][name]) for name in last)


def test_server_and_clients_train_the_activation_that_is_configured(tmp_path: Path) -> None:
    history = run(tmp_path, rounds=1, train_images=400, activation="prelu")

    assert history["rounds"][-1]["refused"] == 0  # whose slopes are weights like any others
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    slopes = [state[f"relu{number}.weight"] for number in (1, 2, 3)]
    assert all(0 < abs(float(slope) - 0.25) < 0.25 for slope in slopes)


def test_the_audit_trail_has_a_line_for_each_round(defended: tuple[Path, dict[str, Any]]) -> None:
    output, history = defended
    every = [json.loads(line) for line in (output / "audit.jsonl").read_text().splitlines()]
    kinds = ["opened", "released", *["round", "released"] * ROUNDS, "closed"]
    assert [line["kind"] for line in every] == kinds
    lines = [line for line in every if line["kind"] == "round"]
    assert [line["round"] for line in lines] == [1, 2]
    assert [line["decision"] for line in lines] == [e["decision"] for e in history["rounds"][1:]]
    assert all(len(line["reports"]) == CLIENTS for line in lines)
    assert [len(line["reset"]) for line in lines] == [
        entry["neurons_reset"] for entry in history["rounds"][1:]
    ]
    if any(line["reset"] for line in lines):
        with np.load(output / "evidence.npz", allow_pickle=False) as evidence:
            assert evidence["clients"].tolist() == list(range(CLIENTS))


def test_the_audit_trail_is_intact(defended: tuple[Path, dict[str, Any]]) -> None:
    output, _ = defended
    verdict = audit.verify(output / "audit.jsonl")
    assert (verdict.status, verdict.notes) == (audit.INTACT, [])
    assert f"{ROUNDS + 1} checkpoints are the models that were released" in verdict.reason


def test_a_run_repeats_whatever_the_number_of_workers(
    defended: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    output, history = defended
    again = run(tmp_path, workers=1)

    assert again == history
    assert (tmp_path / "history.json").read_bytes() == (output / "history.json").read_bytes()
    first = torch.load(output / "model.pt", weights_only=True)
    second = torch.load(tmp_path / "model.pt", weights_only=True)
    assert all(torch.equal(first[name], second[name]) for name in first)
