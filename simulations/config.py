"""An experiment: all sections of the configuration together, and what must hold between them."""

from __future__ import annotations

import tomllib
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from server.config import DefenseConfig, ThresholdsConfig
from simulations import durations, identity
from tasks import models
from tasks.config import (
    AttackConfig,
    ConfigError,
    ExperimentConfig,
    PrivacyConfig,
    RunConfig,
    RunConfigValue,
    TaskConfig,
    TrainConfig,
    parse,
    to_run_config,
)
from tasks.data import CLASSES, SHAPES
from tasks.poisoning import DEFAULT_TRIGGER, Trigger

__all__ = ["SECTIONS", "ConfigError", "Experiment", "build", "load", "read"]

SECTIONS: dict[str, type[BaseModel]] = {
    "experiment": ExperimentConfig,
    "task": TaskConfig,
    "train": TrainConfig,
    "attack": AttackConfig,
    "defense": DefenseConfig,
    "thresholds": ThresholdsConfig,
    "privacy": PrivacyConfig,
    "run": RunConfig,
}


class Experiment(BaseModel):
    """All sections of one experiment, valid together."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    experiment: ExperimentConfig
    task: TaskConfig
    train: TrainConfig
    attack: AttackConfig
    defense: DefenseConfig
    thresholds: ThresholdsConfig
    privacy: PrivacyConfig
    run: RunConfig

    @property
    def trigger(self) -> Trigger:
        """The trigger that is stamped, and that ASR is measured with."""
        parts = self.attack.trigger
        return DEFAULT_TRIGGER[self.task.dataset] if parts is None else Trigger(parts)

    def identity(self) -> dict[str, Any]:
        """Return what makes this experiment this experiment, without what nothing in it reads."""
        return identity.of(self.model_dump(mode="json"))

    @property
    def name(self) -> str:
        """What people call it."""
        return self.experiment.name

    @property
    def folder(self) -> Path:
        """Where its results go."""
        return Path(self.run.output)

    def at(self, folder: Path) -> Experiment:
        """Return the same experiment with another folder for its results."""
        where = self.run.model_copy(update={"output": str(folder.absolute())})
        return self.model_copy(update={"run": where})

    @property
    def rounds(self) -> int:
        """Rounds of federated training."""
        return self.experiment.rounds

    @property
    def effort(self) -> float:
        """How much there is to train; see `durations.effort`."""
        task, passes = self.task, self.experiment.rounds * self.train.local_epochs
        return durations.effort(task.dataset, task.model_name, task.train_images, passes)

    @property
    def likenesses(self) -> tuple[Hashable, ...]:
        """What it has in common with others that take about as long, the most telling first."""
        task = self.task.dataset, self.task.model_name, self.train.local_epochs
        return (*task, self.defense.name), task

    def run_config(self) -> dict[str, RunConfigValue]:
        """Return the flat form that both Flower apps read."""
        return to_run_config({name: getattr(self, name) for name in SECTIONS})


def load(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment from a TOML file.

    Parameters
    ----------
    path : str or Path
        The file. Without ``run.output`` the results go to ``results/NAME``; relative paths start
        at the current folder.
    overrides : sequence of str
        ``"section.key=VALUE"``, the value as in TOML; they win over the file.

    Raises
    ------
    ConfigError
        One sentence naming the key, its value and the legal range.
    """
    document = read(path)
    for override in overrides:
        _apply(document, override)
    return build(document)


def build(document: dict[str, Any]) -> Experiment:
    """Make an experiment of its sections, as TOML gives them.

    Raises
    ------
    ConfigError
        One sentence naming the key, its value and the legal range.
    """
    if unknown := [name for name in document if name not in SECTIONS]:
        raise ConfigError(f"[{unknown[0]}] is not a known section: there are {_sections()}")
    first = parse(ExperimentConfig, "experiment", document.get("experiment", {}))
    run = document.get("run", {})
    if isinstance(run, dict):
        document = document | {"run": {"output": f"results/{first.name}"} | run}
    sections = {
        name: parse(model, name, document.get(name, {})) for name, model in SECTIONS.items()
    }
    sections["run"] = _absolute(sections["run"])
    experiment = Experiment(**sections)
    _check_together(experiment)
    return experiment


def _absolute(run: RunConfig) -> RunConfig:
    """Make paths absolute: the apps may run in another folder."""
    paths = {name: getattr(run, name) for name in ("output", "data_root", "audit_key")}
    absolute = {n: str(Path(p).expanduser().absolute()) for n, p in paths.items() if p is not None}
    return run.model_copy(update=absolute)


def read(path: str | Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises
    ------
    ConfigError
        When it cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def _apply(document: dict[str, Any], override: str) -> None:
    """Set one key of a section, ``section.key=VALUE``."""
    key, equals, text = override.partition("=")
    section, dot, name = key.strip().partition(".")
    if not (equals and dot and name):
        raise ConfigError(f"--set {override} is not legal: expected section.key=VALUE")
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        parsed = {}
    if list(parsed) != ["value"]:
        raise ConfigError(
            f"{key} = {text} is not legal: expected a TOML value (text in double quotes)"
        )
    table = document.setdefault(section, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{section} = {table} is not legal: expected a table [{section}]")
    table[name] = parsed["value"]


def _check_together(experiment: Experiment) -> None:
    """Check what no section can see alone."""
    clients, attack, task = experiment.experiment.clients, experiment.attack, experiment.task
    shape, classes = SHAPES[task.dataset], CLASSES[task.dataset]
    if attack.name != "none" and attack.malicious >= clients:
        raise ConfigError(
            f"attack.malicious = {attack.malicious} is not legal: expected a whole number >= 0 "
            f"and < {clients} (experiment.clients)"
        )
    if attack.target >= classes:
        raise ConfigError(
            f"attack.target = {attack.target} is not legal: expected a whole number >= 0 "
            f"and < {classes} (the classes of {task.dataset})"
        )
    experiment.defense.check(clients)
    limit = experiment.privacy.max_epsilon
    if limit is not None and not experiment.privacy.noise:
        raise ConfigError(
            f"privacy.max_epsilon = {limit} is not legal: expected none while privacy.noise = 0, "
            f"where epsilon is infinite"
        )
    try:
        experiment.trigger.check(shape)
    except ValueError as error:
        raise ConfigError(f"attack.trigger is not legal for {task.dataset}: {error}") from None
    if task.model is not None:
        try:
            models.build(task.model, shape, classes, seed=0)
        except ValueError as error:
            raise ConfigError(f"task.model is not legal for {task.dataset}: {error}") from None


def _sections() -> str:
    return ", ".join(f"[{name}]" for name in SECTIONS)
