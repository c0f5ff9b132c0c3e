"""Trains one network on poisoned images, with or without a defence, and says what came of it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from simulations import results, sources
from simulations.central.baselines.base import repeatable, undefended
from simulations.central.config import Run
from simulations.central.setting import Setting
from tasks import data, models
from tasks.backdoors import (
    Attack,
    BadNets,
    HiddenTrigger,
    LabelConsistent,
    LabelSpecific,
    Poisoned,
)
from tasks.backdoors.perturbation import Bound
from tasks.data import Data
from tasks.metrics import attack_success, benign_accuracy
from tasks.natural import Search, reasr
from tasks.triggers import NoisyWarp, Warp

if TYPE_CHECKING:
    from simulations.central.plan import Cell

# Streams of the seed, beside those of the methods.
SUBSET, TRUSTED, POISON, STAMP, SEARCH = range(100, 105)

sources.digest(sources.CENTRAL)  # now, and not when a run ends: by then the files may be others


def execute(cell: Cell) -> None:
    """Do one run of a table, and leave its result in the cell's folder."""
    began = time.perf_counter()
    result, training = measure(cell.run, cell.data_root, cell.device)
    seconds = {"seconds": time.perf_counter() - began, "training": training}
    results.write(cell.folder, {k: round(v, 4) for k, v in seconds.items()}, results.TIMING)
    results.write(cell.folder, result)


def measure(
    run: Run, data_root: Path | None = None, device: str = "cpu"
) -> tuple[dict[str, Any], float]:
    """Train and score.

    Parameters
    ----------
    run : Run
    data_root : Path, optional
        Folder that holds the data sets.
    device : str
        "cpu" or "cuda".

    Returns
    -------
    result : dict
        What ``result.json`` says of the run: it repeats on the same machine. ``final`` holds BA,
        and ASR and recovered accuracy unless nobody attacks; ``filter`` how many samples were
        poisoned, how many the method dropped, and how many of these were poisoned (None if it drops
        none by design); ``looks`` what it found; ``reasr`` the rate of the best class by size.
    seconds : float
        That training took, with the defence and without the attacker's preparations.
    """
    loaded = _loaded(run, data_root)
    setting = _clean(run, loaded, device)
    with repeatable(setting):
        return _measured(run, loaded, setting, device)


def _measured(
    run: Run, loaded: Data, setting: Setting, device: str
) -> tuple[dict[str, Any], float]:
    base = undefended(setting).eval() if run.attack.name in _KNOWING else None
    attack = _attack(run, base, loaded)
    poisoned = _poisoned(attack, setting)
    setting = replace(setting, images=poisoned.images, labels=poisoned.labels)
    if run.attack.name == "hidden-trigger":
        assert base is not None
        assert run.model.features is not None
        features = run.model.features
        setting = replace(
            setting, model_fn=lambda: OnFixedFeatures(base, features, run.seed).to(device)
        )
    began = time.perf_counter()
    outcome = run.method.method()(setting)
    seconds = time.perf_counter() - began
    scores = {"ba": benign_accuracy(outcome.model, loaded.test_images, loaded.test_labels)}
    if attack is not None:
        success = attack_success(
            outcome.model,
            loaded.test_images,
            loaded.test_labels,
            attack.stamp,
            attack.wanted,
            setting.generator(STAMP),
        )
        scores |= {"asr": success.asr, "recovered": success.recovered}
    result = {
        "configuration": run.identity(),
        "data": _fingerprint(loaded),
        "final": scores,
        "filter": filtered(poisoned.indices, outcome.dropped),
        "looks": list(outcome.looks),
        **_natural(run, outcome.model, setting, loaded),
        "device": device,
        "versions": results.versions(sources.CENTRAL),
    }
    return result, seconds


def filtered(poisoned: NDArray[np.int64], dropped: NDArray[np.int64] | None) -> dict[str, Any]:
    """Judge which samples were dropped; precision and recall are None where nothing counts."""
    if dropped is None:
        return {"poisoned": len(poisoned), "dropped": None, "precision": None, "recall": None}
    hits = len(np.intersect1d(poisoned, dropped))
    return {
        "poisoned": len(poisoned),
        "dropped": len(dropped),
        "precision": hits / len(dropped) if len(dropped) else None,
        "recall": hits / len(poisoned) if len(poisoned) else None,
    }


# Attackers that have a network of their own.
_KNOWING = ("label-consistent", "hidden-trigger")


def _loaded(run: Run, data_root: Path | None) -> Data:
    """Load the data set, or as much of it as the run takes."""
    task = run.task
    loaded = data.load(task.dataset, data_root, held_out=task.held_out)
    rng = np.random.default_rng([run.seed, SUBSET])

    def some(images: Tensor, labels: Tensor, most: int | None) -> tuple[Tensor, Tensor]:
        if most is None or most >= len(images):
            return images, labels
        chosen = torch.from_numpy(np.sort(rng.permutation(len(images))[:most]))
        return images[chosen], labels[chosen]

    train = some(loaded.train_images, loaded.train_labels, task.train_images)
    test = some(loaded.test_images, loaded.test_labels, task.test_images)
    return replace(
        loaded,
        train_images=train[0],
        train_labels=train[1],
        test_images=test[0],
        test_labels=test[1],
        train_groups=None,  # of all images; they have done their part
    )


def _fingerprint(loaded: Data) -> dict[str, Any]:
    """Say which images they were: a data set's files may hold more or fewer."""
    digest = hashlib.sha256()
    for tensor in (loaded.train_images, loaded.train_labels, loaded.test_images):
        digest.update(tensor.numpy().tobytes())
    return {
        "train": len(loaded.train_images),
        "test": len(loaded.test_images),
        "digest": digest.hexdigest()[:16],
    }


def _clean(run: Run, loaded: Data, device: str) -> Setting:
    """Return the setting before anything is poisoned; the trusted images are put aside."""
    number = len(loaded.train_images)
    aside = np.zeros(number, dtype=bool)
    order = np.random.default_rng([run.seed, TRUSTED]).permutation(number)
    aside[order[: max(2, round(run.task.trusted * number))]] = True
    trusted = torch.from_numpy(aside)

    def model_fn() -> nn.Module:
        built = models.build(
            run.model.name,
            loaded.shape,
            len(loaded.classes),
            seed=run.seed,
            activation=run.model.activation,
        )
        return built.to(device)

    return Setting(
        model_fn=model_fn,
        images=loaded.train_images[~trusted],
        labels=loaded.train_labels[~trusted],
        trusted_images=loaded.train_images[trusted],
        trusted_labels=loaded.train_labels[trusted],
        schedule=run.schedule,
        seed=run.seed,
    )


def _attack(run: Run, base: nn.Module | None, loaded: Data) -> Attack | None:
    """Make the attack; `base` is the network that the attacker knows, if one is needed."""
    config, stamp = run.attack, run.attack.stamp
    bound = Bound(eps=config.eps, steps=config.steps)
    match config.name:
        case "badnets":
            warp = stamp if isinstance(stamp, Warp) and config.cover_rate else None
            cover = None if warp is None else NoisyWarp(warp)
            return BadNets(stamp, config.target, config.rate, cover, config.cover_rate)
        case "label-specific":
            return LabelSpecific(stamp, len(loaded.classes), config.rate)
        case "label-consistent":
            assert base is not None
            return LabelConsistent(stamp, config.target, config.rate, base, bound)
        case "hidden-trigger":
            assert base is not None
            assert run.model.features is not None
            return HiddenTrigger(
                stamp,
                config.source,
                config.target,
                config.rate,
                base,
                run.model.features,
                bound,
            )
    return None


def _poisoned(attack: Attack | None, setting: Setting) -> Poisoned:
    if attack is None:
        none = np.empty(0, dtype=np.int64)
        return Poisoned(setting.images, setting.labels, none, none)
    return attack.poison(setting.images, setting.labels, setting.generator(POISON))


class OnFixedFeatures(nn.Module):
    """A copy of a trained network whose last layers begin anew, and whose others stay as they are.

    Parameters
    ----------
    base : nn.Module
    features : str
        Name of the module behind which layers learn.
    seed : int
        Of their fresh weights.
    """

    def __init__(self, base: nn.Module, features: str, seed: int) -> None:
        super().__init__()
        self.model = deepcopy(base)
        named = [(name, module) for name, module in self.model.named_modules() if name]
        place = [name for name, _ in named].index(features) + 1
        self._fixed = [module for _, module in named[:place]]
        for module in self._fixed:
            module.requires_grad_(False)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for _, module in named[place:]:
                if isinstance(module, nn.Linear | nn.Conv2d):
                    module.reset_parameters()

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.model(inputs)
        return logits

    def train(self, mode: bool = True) -> OnFixedFeatures:
        """Set the mode of what learns; what is fixed stays in evaluation mode."""
        super().train(mode)
        for module in self._fixed:
            module.eval()
        return self


def _natural(run: Run, model: nn.Module, setting: Setting, loaded: Data) -> Mapping[str, Any]:
    if not run.measure.reasr:
        return {}
    generator = setting.generator(SEARCH)
    # At random: the images may come class by class.
    search, score = torch.randperm(len(loaded.test_images), generator=generator).chunk(2)
    found = reasr(
        model,
        loaded.test_images[search],
        loaded.test_labels[search],
        loaded.test_images[score],
        loaded.test_labels[score],
        range(len(loaded.classes)),
        generator,
        run.measure.sizes,
        Search(steps=run.measure.steps, batch_size=run.measure.batch_size),
    )
    return {
        "reasr": {f"{size:g}": best for size, best in zip(found.sizes, found.best, strict=True)}
    }
