"""Two rounds of the real apps whose clients limit what they report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from client.app import app as client_app
from none_core.accounting import epsilon
from none_core.activations import TRIGGER_SHIFT
from server.app import app as server_app
from server.config import DefenseConfig
from simulations import results
from simulations.engines import run_in_process
from tasks.config import (
    AttackConfig,
    ExperimentConfig,
    PrivacyConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
    to_run_config,
)

CLIENTS, ROUNDS, SEED = 3, 2, 0


def run(output: Path, privacy: PrivacyConfig, detector: str = "mixture") -> dict[str, Any]:
    run_config = to_run_config(
        {
            "experiment": ExperimentConfig(name="t", clients=CLIENTS, rounds=ROUNDS, seed=SEED),
            "task": TaskConfig(train_images=600),
            "train": TrainConfig(local_epochs=1),
            "attack": AttackConfig(name="dba", malicious=1),
            "defense": DefenseConfig(detector=detector),
            "privacy": privacy,
            "run": RunConfig(output=str(output), checkpoints=False),
        }
    )
    run_in_process(server_app, client_app, run_config, clients=CLIENTS, seed=SEED, workers=1)
    history = json.loads((output / "history.json").read_text())
    return results.assemble({}, history)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("exact"), PrivacyConfig())


def test_noise_and_what_it_costs_each_client_are_in_the_result(
    exact: dict[str, Any], tmp_path: Path
) -> None:
    private = run(tmp_path / "a", PrivacyConfig(noise=1.0, delta=1e-6))
    assert set(private["privacy"]) == {str(client) for client in range(CLIENTS)}
    for said in private["privacy"].values():
        assert said["answers"] >= ROUNDS
        assert said["epsilon"] == epsilon(1.0, said["answers"], 1e-6)
        assert (said["noise"], said["delta"], said["withheld"]) == (1.0, 1e-6, [])
    assert [entry["refused"] for entry in private["rounds"]] == [0] * (ROUNDS + 1)
    # The sample filter reads reports, so the models may differ from the first round's end on.
    assert private["rounds"][0] == exact["rounds"][0]
    assert run(tmp_path / "b", PrivacyConfig(noise=1.0, delta=1e-6)) == private


def test_triggers_are_withheld_from_the_detector_that_asks_for_them(tmp_path: Path) -> None:
    private = run(tmp_path, PrivacyConfig(noise=0.5), "inversion")
    assert all(said["withheld"] == [TRIGGER_SHIFT] for said in private["privacy"].values())
    assert [entry["neurons_reset"] for entry in private["rounds"]] == [0] * (ROUNDS + 1)


def test_when_all_decline_the_run_goes_on_without_resets(tmp_path: Path) -> None:
    declined = run(tmp_path, PrivacyConfig(reports=False))
    assert declined["privacy"] == {str(c): {"declined": ROUNDS} for c in range(CLIENTS)}
    for entry in declined["rounds"][1:]:
        assert entry["decision"].startswith("kept the aggregated model: 0 valid reports of 3")
        assert entry["refused"] == 0
        assert entry["suspected"] == []
        assert entry["bytes"]["train_up"] > 0 == entry["bytes"]["query_up"]


def test_without_limits_nothing_about_privacy_is_in_the_result(exact: dict[str, Any]) -> None:
    assert "privacy" not in exact
