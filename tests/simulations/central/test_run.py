"""A run of a table: what is trained on, what is scored, and that it repeats."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch

from simulations.central import run as runs
from simulations.central.baselines.base import fit, undefended
from simulations.central.config import Run, build
from tasks import data
from tasks.config import ConfigError
from tasks.models import as_input

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
    consistent = {"name": "label-consistent", "steps": 2, "rate": 0.02}
    assert runs.measure(few(consistent))[0] == runs.measure(few(consistent))[0]
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
    parts = runs._loaded(held, None)
    assert len(parts.test_images) == len(data.hold_out(whole).test_images)
    trained, aside = parts.train_images.numpy(), parts.test_images.numpy()
    every = {image.tobytes() for image in whole.train_images.numpy()}
    assert {image.tobytes() for image in aside} <= every
    assert {image.tobytes() for image in trained} <= every
    assert not {image.tobytes() for image in aside} & {image.tobytes() for image in trained}


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


def test_who_learns_on_fixed_features_learns_a_new_head_and_nothing_else() -> None:
    run = few({"name": "hidden-trigger"}, model={"name": "nin-small-bn", "features": "relu3_2"})
    setting = runs._clean(run, runs._loaded(run, None), "cpu")
    base = undefended(setting).eval()
    model = runs.OnFixedFeatures(base, "relu3_2", seed=5)
    before = deepcopy(model.state_dict())
    assert not torch.equal(before["model.conv3_3.weight"], base.state_dict()["conv3_3.weight"])

    fit(model, setting.images, setting.labels, setting.schedule, torch.Generator())

    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"model.conv3_3.weight", "model.conv3_3.bias"}
    inputs = as_input(model, setting.images[:4])
    model.train()
    read = {"fixed": model.model.relu3_2, "base": base.relu3_2}
    seen: dict[str, torch.Tensor] = {}
    for name, module in read.items():
        module.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out}))
    model(inputs), base(inputs)
    assert torch.equal(seen["fixed"], seen["base"])


def test_natural_triggers_are_looked_for_and_scored_on_images_of_all_classes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts: list[torch.Tensor] = []
    real = runs.reasr

    def watched(model: Any, *images: Any) -> Any:
        parts.extend((images[1], images[3]))
        return real(model, *images)

    monkeypatch.setattr(runs, "reasr", watched)
    measured = {"reasr": True, "sizes": [0.02, 0.1], "steps": 2, "batch_size": 4}
    task = {"dataset": "mnist5k", "train_images": 100}
    result, _ = runs.measure(few(task=task, model={"name": "mnist-cnn"}, measure=measured))
    assert list(result["reasr"]) == ["0.02", "0.1"]
    assert [len(labels.unique()) for labels in parts] == [10, 10]
    assert sum(map(len, parts)) == 1000


def test_none_finds_a_backdoor_and_says_what_it_saw_and_dropped() -> None:
    task = {"dataset": "mnist5k", "test_images": 300}
    document = {
        "task": task,
        "model": {"name": "mnist-cnn"},
        "train": {"epochs": 3},
        "attack": {"name": "badnets", "rate": 0.1, "inset": 3},
    }
    plain, _ = runs.measure(build(document, 0))
    result, _ = runs.measure(build({**document, "method": {"name": "none", "rounds": 1}}, 0))

    assert plain["final"]["asr"] > 0.9
    assert result["final"]["asr"] < 0.1
    assert result["final"]["ba"] > plain["final"]["ba"] - 0.03
    (look,) = result["looks"]
    assert look["reset"] > 0
    assert result["filter"]["dropped"] == look["dropped"] > 300
    assert result["filter"]["recall"] > 0.9
    assert result["filter"]["precision"] > 0.9
    assert not look["anew"], "there was no need to"


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
        ({"method": {"name": "none", "rounds": 2.5}}, r"^method.rounds = 2.5 is not legal"),
        ({"method": {"name": "none", "rounds": "3"}}, r"^method.rounds = '3' is not legal"),
        ({"measure": {"sizes": [2.0]}}, r"^measure.sizes = \[2.0\] is not legal: expected a list"),
        ({"attack": {"cover_rate": 0.1}}, r"^attack.cover_rate = 0.1 is not legal: expected 0"),
        ({"method": {"name": "none", "detector": "luck"}}, r"^method.detector must be one of"),
        (
            {"attack": {"name": "hidden-trigger"}, "model": {"name": "nin"}},
            r"^model.features = None is not legal for the attack hidden-trigger: expected one of",
        ),
        (
            {"attack": {"name": "hidden-trigger", "source": 0}},
            r"^attack.source = 0 is not legal: expected another than attack.target",
        ),
    ],
)
def test_what_cannot_be_run_is_said_in_one_sentence(
    sections: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        build({"task": FEW, **sections}, 0)
