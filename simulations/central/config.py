"""One row of one of the paper's tables: what is learned, who attacks, and what is done about it."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from simulations.central.baselines.base import Baseline
from simulations.central.methods import METHODS
from simulations.central.setting import Schedule
from tasks import models, triggers
from tasks.config import Activation, ConfigError, Dataset, Legal, Model, Section, parse
from tasks.data import CLASSES, SHAPES
from tasks.triggers import Stamp


class TaskConfig(Section):
    """``[task]``: the images."""

    dataset: Dataset = Field("mnist5k", description="Data set.")
    train_images: int | None = Field(None, ge=10, description="Of the training images, so many.")
    test_images: int | None = Field(None, ge=10, description="Of the test images, so many.")
    held_out: bool = Field(
        False, description="Test on held-out training images, for choosing what is to be chosen."
    )
    trusted: float = Field(
        0.05, gt=0, lt=1, description="Share of them that is known to be clean, and not trained on."
    )


class ModelConfig(Section):
    """``[model]``: the network."""

    name: Model = Field("nin", description="Network.")
    activation: Activation = Field("relu", description="Activation function.")
    features: str | None = Field(
        None,
        description="Module whose output the hidden trigger moves; the layers behind it learn.",
    )


class TrainConfig(Section):
    """``[train]``: stochastic gradient descent."""

    epochs: int = Field(20, ge=1, description="Passes over the training images.")
    batch_size: int = Field(64, ge=2, description="Images per step.")
    lr: float = Field(0.05, gt=0, description="Learning rate.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay.")


class AttackConfig(Section):
    """``[attack]``: the poisoning. `eps` and `steps` bound what the clean-label attacks change."""

    name: Literal["none", "badnets", "label-specific", "label-consistent", "hidden-trigger"] = (
        Field("none", description="Attack.")
    )
    target: int = Field(0, ge=0, description="Class that stamped images are to be taken for.")
    source: int = Field(1, ge=0, description="Class that the hidden trigger is for.")
    rate: float = Field(0.05, ge=0, le=1, description="Share of the training images.")
    trigger: Literal[
        *("single-pixel", "static-patch", "dynamic-patch", "watermark", "blended", "warp"),
    ] = Field("static-patch", description="Trigger.")
    side: int = Field(3, ge=1, description="Rows and columns of a patch.")
    pattern: Literal["solid", "checkerboard", "noise"] = Field("checkerboard", description="Patch.")
    inset: int = Field(
        1, ge=1, description="Distance of a fixed patch from the last pixel, plus 1."
    )
    opacity: float = Field(0.2, ge=0, le=1, description="Of a watermark or a blended image.")
    strength: float = Field(0.5, gt=0, description="Of a warp.")
    cover_rate: float = Field(0.0, ge=0, le=1, description="Share that covers a warp.")
    eps: float = Field(
        16.0, gt=0, le=255, description="Levels that a clean-label attack may change."
    )
    steps: int = Field(100, ge=1, description="Its steps.")

    @property
    def stamp(self) -> Stamp:
        """The trigger."""
        patterns: dict[str, triggers.Pattern] = {
            "solid": triggers.Solid(),
            "checkerboard": triggers.Checkerboard(),
            "noise": triggers.Noise(),
        }
        pattern, place = patterns[self.pattern], -self.inset
        made: dict[str, Stamp] = {
            "single-pixel": triggers.single_pixel(place, place),
            "static-patch": triggers.StaticPatch(self.side, place, place, pattern),
            "dynamic-patch": triggers.DynamicPatch(self.side, pattern=pattern),
            "watermark": triggers.Watermark(self.opacity),
            "blended": triggers.Blended(self.opacity),
            "warp": triggers.Warp(strength=self.strength),
        }
        return made[self.trigger]


class MethodConfig(BaseModel):
    """``[method]``: the defence by its name, and those of its settings that are to be others."""

    model_config = {"extra": "allow", "frozen": True}

    name: str = "undefended"

    def method(self) -> Baseline:
        """Return the defence.

        Raises
        ------
        ConfigError
            For a name or a setting that there is not.
        """
        if self.name not in METHODS:
            raise ConfigError(
                f"method.name = {self.name} is not legal: expected one of {', '.join(METHODS)}"
            )
        found = METHODS[self.name]
        known = {field.name for field in fields(found)}
        for key in self.model_extra or {}:
            if key not in known:
                raise ConfigError(
                    f"method.{key} is not a known key of {self.name}: expected one of "
                    f"{', '.join(sorted(known)) or 'none'}"
                )
        types = get_type_hints(type(found))
        given: dict[str, Any] = {}
        for key, value in (self.model_extra or {}).items():
            try:  # as JSON, whose lists may become tuples
                given[key] = TypeAdapter(types[key]).validate_json(json.dumps(value), strict=True)
            except ValidationError as error:
                message = error.errors(include_url=False)[0]["msg"]
                raise ConfigError(f"method.{key} = {value!r} is not legal: {message}") from None
        made = replace(found, **given)
        try:
            made.validate()
        except ValueError as error:
            raise ConfigError(f"method.{error}") from None
        return made


class MeasureConfig(Section):
    """``[measure]``: whether triggers are looked for in the trained network, and how hard."""

    reasr: bool = Field(False, description="Measure REASR, by the size of the trigger.")
    sizes: Annotated[
        list[Annotated[float, Field(gt=0, le=1)]],
        Legal("a list of numbers > 0 and <= 1"),
    ] = Field([0.02, 0.04, 0.06, 0.08, 0.1, 0.12], min_length=1, description="Shares of an image.")
    steps: int = Field(400, ge=2, description="Steps of the search.")
    batch_size: int = Field(32, ge=1, description="Images in each of them.")


SECTIONS: dict[str, type[BaseModel]] = {
    "task": TaskConfig,
    "model": ModelConfig,
    "train": TrainConfig,
    "attack": AttackConfig,
    "method": MethodConfig,
    "measure": MeasureConfig,
}


class Run(BaseModel):
    """All sections of one training run, valid together."""

    model_config = {"extra": "forbid", "frozen": True}

    task: TaskConfig
    model: ModelConfig
    train: TrainConfig
    attack: AttackConfig
    method: MethodConfig
    measure: MeasureConfig
    seed: int

    @property
    def schedule(self) -> Schedule:
        """How it is trained."""
        return Schedule(**self.train.model_dump())

    def identity(self) -> dict[str, Any]:
        """Return all that makes the run what it is, with every setting of the method."""
        settings = {"name": self.method.name, **asdict(self.method.method())}
        return self.model_dump(mode="json") | {"method": settings}


def build(document: dict[str, Any], seed: int) -> Run:
    """Make a run of its sections, as TOML gives them.

    Raises
    ------
    ConfigError
        One sentence naming the key, its value and the legal range.
    """
    if unknown := [name for name in document if name not in SECTIONS]:
        raise ConfigError(
            f"[{unknown[0]}] is not a known section: there are "
            f"{', '.join(f'[{name}]' for name in SECTIONS)}"
        )
    sections: dict[str, Any] = {
        name: parse(model, name, document.get(name, {})) for name, model in SECTIONS.items()
    }
    run = Run(**sections, seed=seed)
    classes = CLASSES[run.task.dataset]
    for key in ("target", "source"):
        if getattr(run.attack, key) >= classes:
            raise ConfigError(
                f"attack.{key} = {getattr(run.attack, key)} is not legal: expected a whole number "
                f">= 0 and < {classes} (the classes of {run.task.dataset})"
            )
    if run.attack.name == "hidden-trigger":
        _check_hidden_trigger(run)
    if run.attack.cover_rate and run.attack.trigger != "warp":
        raise ConfigError(
            f"attack.cover_rate = {run.attack.cover_rate} is not legal: expected 0 "
            f"(only a warp is covered, attack.trigger = {run.attack.trigger})"
        )
    run.method.method()
    try:
        run.attack.stamp.check(SHAPES[run.task.dataset])
    except ValueError as error:
        raise ConfigError(f"attack.trigger is not legal for {run.task.dataset}: {error}") from None
    return run


def _check_hidden_trigger(run: Run) -> None:
    """Refuse what the attack on transfer learning cannot do."""
    if run.attack.source == run.attack.target:
        raise ConfigError(
            f"attack.source = {run.attack.source} is not legal: expected another than attack.target"
        )
    name = run.task.dataset
    model = models.build(run.model.name, SHAPES[name], CLASSES[name], seed=0)
    names = [each for each, _ in model.named_modules() if each]
    if run.model.features not in names:
        raise ConfigError(
            f"model.features = {run.model.features} is not legal for the attack hidden-trigger: "
            f"expected one of {', '.join(names)}"
        )
