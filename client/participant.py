"""An honest participant: its share of the data, how it trains on it, and what it reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from flwr.app import Context, Message
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tasks import data, partition
from tasks.config import (
    AttackConfig,
    ExperimentConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
    from_run_config,
)
from tasks.poisoning import DEFAULT_TRIGGER, Trigger, malicious_clients
from tasks.training import train

State = Mapping[str, Tensor]  # a model's state dict
Reply = Callable[[Message, Context], Message]  # what answers a message for a participant

# Keys of a deployed participant's node configuration, beside Flower's ``partition-id``.
DATA_ROOT, ATTACKER = "data-root", "attacker"

# Streams of random numbers that one experiment's seed is split into.
_PARTITION, _POISON, _TRAINING, _SUBSET, _NOISE = 10, 11, 12, 13, 14


@dataclass(frozen=True)
class Settings:
    """The sections of the configuration that a participant reads, and which participant it is.

    In a simulation everybody loads the data set and takes its share, and the seed says who is
    malicious. A deployed participant knows no more than its node's configuration says:
    ``data-root`` is a folder with its own share and nothing else, and ``attacker`` is its number
    among the attackers; without that it is honest.
    """

    experiment: ExperimentConfig
    task: TaskConfig
    train: TrainConfig
    attack: AttackConfig
    run: RunConfig
    partition_id: int
    deployed: bool = False
    attacker: int | None = None

    @classmethod
    def of(cls, context: Context) -> Settings:
        """Read them from a Flower context."""
        config, node = context.run_config, context.node_config
        run = from_run_config(config, "run", RunConfig)
        deployed = DATA_ROOT in node
        if deployed:
            run = run.model_copy(update={"data_root": str(node[DATA_ROOT])})
        return cls(
            experiment=from_run_config(config, "experiment", ExperimentConfig),
            task=from_run_config(config, "task", TaskConfig),
            train=from_run_config(config, "train", TrainConfig),
            attack=from_run_config(config, "attack", AttackConfig),
            run=run,
            partition_id=int(node["partition-id"]),
            deployed=deployed,
            attacker=int(node[ATTACKER]) if deployed and ATTACKER in node else None,
        )

    @property
    def malicious(self) -> tuple[int, ...]:
        """Partition ids of the malicious participants, ascending."""
        if self.attack.name == "none":
            return ()
        return malicious_clients(
            self.experiment.clients, self.attack.malicious, self.experiment.seed
        )

    @property
    def number(self) -> int | None:
        """Its position among the attackers, from 0; None for an honest participant."""
        if self.attack.name == "none":
            return None
        if self.deployed:
            return self.attacker
        malicious = self.malicious
        return malicious.index(self.partition_id) if self.partition_id in malicious else None

    @property
    def is_malicious(self) -> bool:
        """Whether this participant is one of the attackers."""
        return self.number is not None

    @property
    def trigger(self) -> Trigger:
        """The trigger, all parts."""
        parts = self.attack.trigger
        return Trigger(parts) if parts else DEFAULT_TRIGGER[self.task.dataset]

    def generator(self, server_round: int) -> torch.Generator:
        """Random numbers for this participant's training in one round."""
        entropy = [self.experiment.seed, _TRAINING, self.partition_id, server_round]
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        return torch.Generator().manual_seed(seed)

    def poison_rng(self) -> np.random.Generator:
        """Random numbers by which it chooses what to poison: the same in every round."""
        return np.random.default_rng([self.experiment.seed, _POISON, self.partition_id])

    def noise_rng(self, answer: int) -> np.random.Generator:
        """Random numbers for the noise of its answers, each of which has its own."""
        return np.random.default_rng([self.experiment.seed, _NOISE, self.partition_id, answer])


@dataclass(frozen=True, eq=False)
class LocalData:
    """Images uint8 (N, C, H, W), labels int64 (N,), and which of them are poisoned, bool (N,)."""

    images: Tensor
    labels: Tensor
    poisoned: Tensor

    @property
    def dataset(self) -> TensorDataset:
        """Images and labels as torch takes them."""
        return TensorDataset(self.images, self.labels)

    def chosen(self, indices: Tensor) -> LocalData:
        """Return some of the samples."""
        return LocalData(self.images[indices], self.labels[indices], self.poisoned[indices])


class Participant:
    """An honest participant; an attack is a subclass that overrides what it does differently.

    It keeps nothing of a run: what must be remembered between messages is in Flower's context.

    Parameters
    ----------
    settings : Settings
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @property
    def obeys(self) -> bool:
        """Whether it leaves out of training what the server asks it to."""
        return True

    def attacks(self, server_round: int, sent: State) -> bool:
        """Whether it attacks in this round, given the model that the server sent."""
        return False

    def data(self, attacking: bool) -> LocalData:
        """Return its samples; their order and number are the same whether it attacks or not."""
        return clean_share(self.settings)

    def train(self, model: nn.Module, kept: Tensor, server_round: int, attacking: bool) -> float:
        """Train a model in place.

        Parameters
        ----------
        model : torch.nn.Module
            With the weights that the server sent.
        kept : Tensor of int64
            Indices of the samples to train on.
        server_round : int
        attacking : bool

        Returns
        -------
        float
            Mean loss.
        """
        return self._fit(model, self.data(attacking).chosen(kept), server_round)

    def update(self, sent: State, trained: State, attacking: bool) -> State:
        """Return the model to send back."""
        return trained

    def examples(self, trained: int, attacking: bool) -> int:
        """Say how many samples it trained on, by which its update may be weighed."""
        return trained

    def report(self, message: Message, context: Context, honest: Reply) -> Message:
        """Answer a query; ``honest`` answers it as the software does, on the data in use."""
        return honest(message, context)

    def _fit(self, model: nn.Module, local: LocalData, server_round: int, passes: int = 1) -> float:
        """Train as configured, ``passes`` times as many epochs."""
        config = self.settings.train
        return train(
            model,
            local.images,
            local.labels,
            epochs=passes * config.local_epochs,
            batch_size=config.batch_size,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            generator=self.settings.generator(server_round),
        )


@lru_cache(maxsize=64)
def clean_share(settings: Settings) -> LocalData:
    """Load a participant's share of the data as it is before anybody poisons it."""
    # A deployed participant has its own share and no more, of which nothing is put aside.
    held_out = settings.task.held_out and not settings.deployed
    loaded = _loaded(settings.task.dataset, settings.run.data_root, held_out)
    if settings.deployed:
        labels = loaded.train_labels
        return LocalData(loaded.train_images, labels, torch.zeros(len(labels), dtype=torch.bool))
    indices = _partition(
        settings.task, settings.run.data_root, settings.experiment, settings.train.batch_size
    )
    chosen = torch.from_numpy(indices[settings.partition_id])
    labels = loaded.train_labels[chosen]
    return LocalData(
        loaded.train_images[chosen], labels, torch.zeros(len(labels), dtype=torch.bool)
    )


@lru_cache(maxsize=2)
def _loaded(dataset: str, data_root: str | None, held_out: bool) -> data.Data:
    return data.load(dataset, Path(data_root) if data_root else None, held_out=held_out)


@lru_cache(maxsize=2)
def _partition(
    task: TaskConfig, data_root: str | None, experiment: ExperimentConfig, batch_size: int
) -> list[np.ndarray]:
    labels = _loaded(task.dataset, data_root, task.held_out).train_labels.numpy()
    used = _used(len(labels), task.train_images, experiment.seed)
    rng = np.random.default_rng([experiment.seed, _PARTITION])
    if task.partition == "iid":
        shares = partition.iid(labels[used], experiment.clients, rng, minimum=batch_size)
    else:
        shares = partition.dirichlet(
            labels[used], experiment.clients, task.alpha, rng, minimum=batch_size
        )
    return [used[share] for share in shares]


def _used(available: int, most: int | None, seed: int) -> np.ndarray:
    """Draw the training samples that anybody uses; ascending, all of them without a limit."""
    if most is None or most >= available:
        return np.arange(available)
    rng = np.random.default_rng([seed, _SUBSET])
    return np.sort(rng.choice(available, size=most, replace=False))
