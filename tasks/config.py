"""The configuration of what is learned, by whom and under which attack, as typed sections.

Each section is a TOML table and a frozen, validated object. Flower's run configuration takes flat
scalars only, so a section also has a flat form (``section.key``) that both apps read back.
"""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from tasks import data, models

RunConfigValue = str | int | float | bool


class ConfigError(ValueError):
    """A configuration that cannot be run: one sentence with key, value and legal range."""


@dataclass(frozen=True)
class Legal:
    """What a field accepts, in words, where its type and bounds do not say it."""

    text: str


class Section(BaseModel):
    """A table of the configuration: unknown keys are errors, and so is text for a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _as_parts(value: Any) -> Any:
    """Accept TOML's lists and the JSON text of a flat run configuration as tuples."""
    if isinstance(value, str):
        value = json.loads(value)
    return tuple(map(_as_parts, value)) if isinstance(value, list) else value


Dataset = Literal[data.NAMES]
Model = Literal[models.NAMES]
Activation = Literal[models.ACTIVATIONS]


class ExperimentConfig(Section):
    """``[experiment]``: how long, how many, and where it runs."""

    name: Annotated[
        str,
        Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the results folder."),
        Legal("letters, digits, '.', '_' and '-', starting with a letter or digit"),
    ]
    seed: int = Field(0, ge=0, description="The same seed gives the same results.")
    rounds: int = Field(40, ge=1, description="Rounds of federated averaging.")
    clients: int = Field(10, ge=2, description="Participants, all of which train in each round.")
    engine: Literal["in-process", "flower"] = Field(
        "in-process", description="Call the apps directly, or through `flwr run`."
    )
    resume: bool = Field(
        False, description="Go on with the run in the results folder, if it was stopped."
    )


class TaskConfig(Section):
    """``[task]``: the data, how they are shared out, and the network."""

    dataset: Dataset = Field("mnist5k", description="Data set.")
    model: Model | None = Field(None, description="Network; left out, the data set's default.")
    activation: Activation = Field(
        "relu", description="Function in the place of the network's rectifiers."
    )
    train_images: int | None = Field(
        None, ge=1, description="Use at most so many training images, drawn at random; or all."
    )
    held_out: bool = Field(
        False,
        description="Score on a fifth of the training images, put aside, instead of the test "
        "images: for choosing settings.",
    )
    partition: Literal["iid", "dirichlet"] = Field("iid", description="How clients get their data.")
    alpha: float = Field(0.5, gt=0, description="Dirichlet concentration; smaller is less even.")

    @property
    def model_name(self) -> str:
        """The network that is trained."""
        return self.model or models.DEFAULT_MODEL[self.dataset]


class TrainConfig(Section):
    """``[train]``: local training (stochastic gradient descent)."""

    lr: float = Field(0.05, gt=0, description="Learning rate.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay.")
    batch_size: int = Field(64, ge=1, description="Images per step.")
    local_epochs: int = Field(2, ge=1, description="Passes over the local data in a round.")


class AttackConfig(Section):
    """``[attack]``: who attacks and how. ``name = "none"`` still says what ASR is measured for."""

    name: Literal[
        "none", "dba", "badnets", "replacement", "single-shot", "slow", "stop", "adaptive"
    ] = Field("none", description="Attack.")
    reporter: Literal["honest", "omit", "hide", "frame", "dilute", "collude", "malformed"] = Field(
        "honest", description="What malicious clients say when the server asks."
    )
    malicious: int = Field(4, ge=0, description="Number of malicious clients.")
    target: int = Field(2, ge=0, description="Class that triggered images are to be taken for.")
    poison_rate: float = Field(
        0.3125, ge=0, le=1, description="Share of a malicious client's images that it poisons."
    )
    trigger: Annotated[
        tuple[tuple[tuple[int, int], ...], ...] | None,
        BeforeValidator(_as_parts),
        Field(description="Parts of the trigger; left out, the data set's default."),
        Legal("a list of parts, each a list of [row, column] pixels"),
    ] = None
    start_round: int = Field(1, ge=1, description="First round in which they attack.")
    scale: float | None = Field(
        None, ge=1, description="Factor on a malicious client's update; left out, the attack's own."
    )
    claim: float = Field(
        1.0, ge=1, description="Factor on the number of examples that malicious clients claim."
    )
    penalty: float = Field(
        1.0, ge=0, description='How near "adaptive" stays to honest clients; at 0 it is "dba".'
    )
    obeys_filter: bool = Field(
        True, description="Whether malicious clients drop the samples that the server names."
    )


class PrivacyConfig(Section):
    """``[privacy]``: what every client is willing to report; a node's own limits hold beside it."""

    reports: bool = Field(True, description="Whether clients answer the server's queries.")
    min_count: int = Field(
        1, ge=1, description="Clients leave out labels with fewer samples, whatever is asked."
    )
    noise: float = Field(
        0.0, ge=0, description="Noise multiplier of every answer (differential privacy); 0: none."
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="Delta of the differential privacy.")
    max_epsilon: float | None = Field(
        None, gt=0, description="Epsilon at which a client stops to answer; left out, never."
    )
    patterns: bool = Field(
        False, description="Whether clients show what the trigger to an attacked class looks like."
    )


class RunConfig(Section):
    """``[run]``: where things lie on this machine; no part of what an experiment is."""

    data_root: str | None = Field(None, description="Folder with the data sets.")
    output: Annotated[
        str,
        Field(min_length=1, description="Folder that the results are written to."),
        Legal("the path of a folder"),
    ]
    workers: int = Field(
        0, ge=0, description="Clients that work at the same time; 0: one for each core."
    )
    checkpoints: bool = Field(True, description="Whether the model of every round is kept.")
    audit_key: str | None = Field(
        None, description="Private key that signs the audit trail; left out, the run's own."
    )
    node_timeout: float = Field(
        600.0, gt=0, description="Seconds to wait for participants that are not connected."
    )


M = TypeVar("M", bound=BaseModel)


def parse(model: type[M], section: str, values: Any) -> M:
    """Validate the table of a section.

    Parameters
    ----------
    model : type
        The section's model.
    section : str
        Its name, for the message.
    values : mapping
        Keys and values as TOML gives them.

    Raises
    ------
    ConfigError
        One sentence naming the key, its value and the legal range.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{section} = {_show(values)} is not legal: expected a table [{section}]")
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(_sentence(model, section, values, error)) from None


def to_run_config(sections: Mapping[str, BaseModel]) -> dict[str, RunConfigValue]:
    """Flatten sections into what Flower's run configuration takes.

    Parameters
    ----------
    sections : mapping of str to BaseModel
        By section name.

    Returns
    -------
    dict
        ``"section.key"`` to a scalar; lists as JSON text; what is None is left out.
    """
    return {
        f"{name}.{key}": json.dumps(value) if isinstance(value, list) else value
        for name, section in sections.items()
        for key, value in section.model_dump(mode="json").items()
        if value is not None
    }


def from_run_config(run_config: Mapping[str, Any], section: str, model: type[M]) -> M:
    """Read a section back from a flat run configuration.

    Parameters
    ----------
    run_config : mapping
        As made by `to_run_config`; keys of other sections are ignored. Flower has no null, so an
        empty text stands for one where None is the default.
    section : str
        The section's name.
    model : type
        The section's model.

    Raises
    ------
    ConfigError
        As `parse` does.
    """
    prefix = f"{section}."
    values = {k.removeprefix(prefix): v for k, v in run_config.items() if k.startswith(prefix)}
    optional = {name for name, field in model.model_fields.items() if field.default is None}
    return parse(
        model, section, {k: v for k, v in values.items() if not (v == "" and k in optional)}
    )


def _sentence(
    model: type[BaseModel], section: str, values: Mapping[str, Any], error: ValidationError
) -> str:
    """Say the first thing that is wrong in one sentence."""
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0])
    key = f"{section}.{name}"
    if first["type"] == "extra_forbidden":
        return f"{key} is not a known key: [{section}] takes {', '.join(model.model_fields)}"
    legal = _legal(model.model_fields[name])
    if first["type"] == "missing":
        return f"{key} is missing: expected {legal}"
    return f"{key} = {_show(values[name])} is not legal: expected {legal}"


def _legal(field: FieldInfo) -> str:
    """Describe what a field accepts from its type and bounds."""
    for extra in field.metadata:
        if isinstance(extra, Legal):
            return extra.text
    annotation = field.annotation
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(a for a in get_args(annotation) if a is not type(None))
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(_show(choice) for choice in get_args(annotation))}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return " ".join([words[annotation], *_bounds(field)])


def _bounds(field: FieldInfo) -> list[str]:
    """Describe the bounds of a number, ["> 0", "and < 1"]."""
    found = []
    for extra in field.metadata:
        match extra:
            case annotated_types.Gt(gt=bound):
                found.append(f"> {bound}")
            case annotated_types.Ge(ge=bound):
                found.append(f">= {bound}")
            case annotated_types.Lt(lt=bound):
                found.append(f"< {bound}")
            case annotated_types.Le(le=bound):
                found.append(f"<= {bound}")
    return [found[0], *(f"and {bound}" for bound in found[1:])] if found else []


def _show(value: Any) -> str:
    """Write a value as TOML and JSON do."""
    return json.dumps(value, default=str)
