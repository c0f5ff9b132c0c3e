"""A run of a table: what is trained on, what is scored, and that it repeats."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from simulations.central import run as runs
from simulations.central.config import Run, build
from tasks import data
from tasks.config import ConfigError

FEW = {"dataset": "signs", "train_images": 240, "test_images": 120, "trusted": 0.1}


def few(attack: dict[str, Any] | None = None, seed: int = 0, **sections: Any) -> Run:
    document = {
        "task": FEW,
        "model": {"name": "cifar-cnn-bn", "features": "relu4"},
        "train": {"epochs": 1},
        "attack": attack or {},
        **sections,
    }
    return build(document, seed)


def test_a_run_repeats_bit_for_bit_and_another_seed_is_another_run() -> None:
    attack = {"name": "badnets", "rate": 0.1}
    one, seconds = runs.measure(few(attack))
    assert seconds > 0
    assert runs.measure(few(attack))[0] == one
    other, _ = runs.measure(few(attack, seed=1))
    assert other["final"] != one["final"]
    assert one["filter"] == {"poisoned": 22, "dropped": None, "precision": None, "recall": None}
    assert set(one["final"]) == {"ba", "asr", "recovered"}


def test_without_an_attack_there_is_no_success_rate() -> None:
    result, _ = runs.measure(few())
    assert set(result["final"]) == {"ba"}
    assert result["filter"]["poisoned"] == 0
    assert "reasr" not in result


def test_trusted_images_are_not_trained_on_and_held_out_ones_are_no_test_images() -> None:
    loaded = runs._loaded(few(), None)
    setting = runs._clean(few(), loaded, "cpu")
    assert (len(setting.images), len(setting.trusted_images)) == (216, 24)
    assert len(loaded.test_images) == 120
    both = np.concatenate([setting.images.numpy(), setting.trusted_images.numpy()])
    assert len(np.unique(both.reshape(240, -1), axis=0)) == 240

    whole, held = data.load("signs"), few(task={**FEW, "held_out": True, "test_images": None})
    aside = runs._loaded(held, None).test_images
    assert len(aside) == len(data.hold_out(whole).test_images)
    assert (aside[0] == whole.train_images).flatten(1).all(1).any()


@pytest.mark.parametrize(
    ("attack", "poisoned"),
    [
        ({"name": "badnets", "trigger": "warp", "rate": 0.1, "cover_rate": 0.2}, 22),
        ({"name": "badnets", "trigger": "blended"}, 11),
        ({"name": "badnets", "trigger": "watermark"}, 11),
        ({"name": "badnets", "trigger": "single-pixel", "inset": 2}, 11),
        ({"name": "badnets", "trigger": "dynamic-patch", "pattern": "noise"}, 11),
        ({"name": "label-specific", "pattern": "solid"}, 11),
        ({"name": "label-consistent", "steps": 2, "rate": 0.02}, 4),
        ({"name": "hidden-trigger", "steps": 2, "rate": 0.02}, 4),
    ],
    ids=lambda value: value["name"] + value.get("trigger", "") if isinstance(value, dict) else "",
)
def test_every_attack_of_the_tables_can_be_run(attack: dict[str, Any], poisoned: int) -> None:
    result, _ = runs.measure(few(attack))
    assert result["filter"]["poisoned"] == poisoned
    assert 0 <= result["final"]["asr"] <= 1


def test_who_learns_on_fixed_features_learns_a_new_head_alone() -> None:
    run = few({"name": "hidden-trigger"}, model={"name": "nin-small", "features": "relu3_2"})
    base = runs._clean(run, runs._loaded(run, None), "cpu").model_fn()
    model = runs._new_head(base, run)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {"conv3_3.weight", "conv3_3.bias"}
    same = {n: bool((p == q).all()) for (n, p), q in zip(*_named(model, base), strict=True)}
    assert not same["conv3_3.weight"]
    assert all(value for name, value in same.items() if not name.startswith("conv3_3"))


def _named(model: Any, base: Any) -> tuple[Any, Any]:
    return model.named_parameters(), base.parameters()


def test_natural_triggers_are_looked_for_in_half_of_the_test_images() -> None:
    measured = {"reasr": True, "sizes": [0.02, 0.1], "steps": 2, "batch_size": 4}
    result, _ = runs.measure(few(measure=measured))
    assert list(result["reasr"]) == ["0.02", "0.1"]
    assert all(0 <= rate <= 1 for rate in result["reasr"].values())


def test_none_says_what_it_saw_and_dropped() -> None:
    result, _ = runs.measure(
        few({"name": "badnets", "rate": 0.1}, method={"name": "none", "rounds": 1})
    )
    (look,) = result["looks"]
    assert set(look) == {"reason", "reset", "dropped", "strengths"}
    assert result["filter"]["dropped"] == look["dropped"]


def test_a_filter_is_judged_by_what_it_dropped() -> None:
    poisoned, dropped = np.array([1, 2, 3, 4]), np.array([2, 3, 9])
    judged = {"poisoned": 4, "dropped": 3, "precision": 2 / 3, "recall": 0.5}
    assert runs.filtered(poisoned, dropped) == judged
    assert runs.filtered(poisoned, dropped[:0])["precision"] is None
    assert runs.filtered(poisoned[:0], dropped)["recall"] is None


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"trian": {}}, r"^\[trian\] is not a known section: there are \[task\], "),
        ({"attack": {"target": 99}}, r"^attack.target = 99 is not legal: .* >= 0 and < \d+ "),
        ({"attack": {"side": 40}}, r"^attack.trigger is not legal for signs: a patch of 40x40"),
        ({"attack": {"rate": 1.5}}, r"^attack.rate = 1.5 is not legal"),
        ({"method": {"name": "hope"}}, r"^method.name = hope is not legal: expected one of und"),
        ({"method": {"name": "nad", "alpha": 1}}, r"^method.alpha is not a known key of nad"),
        ({"method": {"name": "abl", "gamma": -1.0}}, r"^method.gamma must be >= 0, got -1.0"),
        ({"method": {"name": "none", "detector": "luck"}}, r"^method.detector must be one of"),
        (
            {"attack": {"name": "hidden-trigger"}, "model": {"name": "nin"}},
            r"^model.features is needed by the attack hidden-trigger",
        ),
    ],
)
def test_what_cannot_be_run_is_said_in_one_sentence(
    sections: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        build({"task": FEW, **sections}, 0)
