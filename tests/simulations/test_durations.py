"""Estimates come from the most similar runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from simulations import config, durations
from tasks import data, models
from tests.simulations import pooled


def experiment(rounds: int = 10, **sections: dict[str, Any]) -> config.Experiment:
    return config.build({"experiment": {"name": "toy", "rounds": rounds}} | sections)


def test_a_guess_grows_with_the_data_the_rounds_and_the_network() -> None:
    known = durations.Durations()
    small = known.expected(experiment())

    assert known.expected(experiment(20)) > small > durations.START_SECONDS
    assert known.expected(experiment(task={"dataset": "mnist"})) > small
    resnet = {"dataset": "cifar10", "model": "resnet18"}
    assert known.expected(experiment(task=resnet)) > known.expected(
        experiment(task={"dataset": "cifar10"})
    )


def test_every_data_set_and_network_has_a_guess() -> None:
    assert set(data.NAMES) - {"cifar10"} == set(durations._IMAGES)
    assert set(models.NAMES) == set(durations._DEARER)


def test_larger_images_take_longer() -> None:
    """At 224x224 there are 49 times as many pixels as at 32x32."""
    few = {"train_images": 100, "model": "resnet18"}
    small, large = (experiment(task={"dataset": d, **few}) for d in ("signs", "signs224"))
    assert large.effort == pytest.approx(49 * small.effort)


def test_what_is_most_alike_counts(tmp_path: Path) -> None:
    known = durations.Durations()
    for name, seconds in (("none-strategy", 50.0), ("fedmedian", 30.0)):
        (tmp_path / name).mkdir()
        pooled.finish(tmp_path / name, seconds=seconds)
        known.add(experiment(defense={"name": name}), tmp_path / name)

    def expected(rounds: int, name: str) -> float:
        return known.expected(experiment(rounds, defense={"name": name})) - durations.START_SECONDS

    assert expected(10, "none-strategy") == pytest.approx(50)
    assert expected(20, "fedmedian") == pytest.approx(60)
    assert expected(10, "undefended") == pytest.approx(40)


def test_a_run_without_timing_teaches_nothing(tmp_path: Path) -> None:
    known = durations.Durations()
    before = known.expected(experiment())

    known.add(experiment(), tmp_path)

    assert known.expected(experiment()) == before


def test_together_is_no_less_than_the_longest() -> None:
    assert durations.together([10, 10, 10], 2) == 15
    assert durations.together([10, 1], 4) == 10
    assert durations.together([], 2) == 0


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (89, "89 s"), (90, "2 min"), (3599, "1 h 00 min")]
)
def test_durations_are_spelled(seconds: float, text: str) -> None:
    assert durations.spell(seconds) == text
