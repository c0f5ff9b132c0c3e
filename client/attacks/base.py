"""What all attacks have in common: poisoned samples, a scaled update and a reporter that may lie.

An attack is one class, a :class:`~client.participant.Participant` that overrides what it does
differently from an honest one: its data, its training, its update, its report.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from flwr.app import Context, Message
from torch import Tensor, nn

from client.attacks.reporters import REPORTERS
from client.participant import LocalData, Participant, Reply, State
from none_core.flower.messages import QUERY
from tasks.poisoning import Pixel, poison, stamp


class Attack(Participant, ABC):
    """A malicious participant that poisons its data from a certain round on.

    What it reads of the section ``[attack]`` are these properties; a subclass that attacks with
    other values overrides them.
    """

    @property
    @abstractmethod
    def pixels(self) -> Sequence[Pixel]:
        """What it stamps on the images that it poisons."""

    @property
    def start_round(self) -> int:
        """First round in which it attacks, and lies."""
        return self.settings.attack.start_round

    @property
    def poison_rate(self) -> float:
        """Share of its images that it poisons, in [0, 1]."""
        return self.settings.attack.poison_rate

    @property
    def scale(self) -> float:
        """Factor on the updates of the rounds in which it attacks, >= 1."""
        scale = self.settings.attack.scale
        return self.usual_scale if scale is None else scale

    @property
    def usual_scale(self) -> float:
        """The factor if ``attack.scale`` is left out."""
        return 1.0

    @property
    def passes(self) -> int:
        """How many times ``train.local_epochs`` it trains in the rounds in which it attacks."""
        return 1

    @property
    def number(self) -> int:
        """Its position among the attackers, from 0."""
        number = self.settings.number
        assert number is not None, "an honest participant attacks nobody"
        return number

    @property
    def obeys(self) -> bool:
        """Whether it leaves out of training what the server asks it to."""
        return self.settings.attack.obeys_filter

    def attacks(self, server_round: int, sent: State) -> bool:
        """Attack from the first round on."""
        return server_round >= self.start_round

    def data(self, attacking: bool) -> LocalData:
        """Return its samples, with the poison in them while it attacks."""
        return self._poisoned if attacking else super().data(attacking)

    def train(self, model: nn.Module, kept: Tensor, server_round: int, attacking: bool) -> float:
        """Train as an honest participant does, on these data."""
        passes = self.passes if attacking else 1
        return self._fit(model, self.data(attacking).chosen(kept), server_round, passes)

    def update(self, sent: State, trained: State, attacking: bool) -> State:
        """Scale the update while it attacks."""
        return scaled_update(sent, trained, self.scale) if attacking else trained

    def examples(self, trained: int, attacking: bool) -> int:
        """Claim more while it attacks, which weighs its update more."""
        return round(trained * self.settings.attack.claim) if attacking else trained

    def report(self, message: Message, context: Context, honest: Reply) -> Message:
        """Report as ``attack.reporter`` does, from the first round of the attack on."""
        if int(message.content.config_records[QUERY]["round"]) < self.start_round:
            return honest(message, context)
        return REPORTERS[self.settings.attack.reporter](self.settings, message, context, honest)

    @cached_property
    def _poisoned(self) -> LocalData:
        clean = super().data(attacking=False)
        return poisoned(
            clean,
            self.pixels,
            self.settings.attack.target,
            self.poison_rate,
            self.settings.poison_rng(),
        )


def poisoned(
    clean: LocalData,
    pixels: Sequence[Pixel],
    target: int,
    rate: float,
    rng: np.random.Generator,
) -> LocalData:
    """Stamp pixels on some images and relabel them to the target class.

    Parameters
    ----------
    clean : LocalData
        Left as it is.
    pixels : sequence of (int, int)
        Row and column of each pixel.
    target : int
        The class to relabel to; its own images are left alone.
    rate : float
        Share of all images to poison, in [0, 1].
    rng : numpy.random.Generator
        Chooses them.
    """
    chosen = torch.from_numpy(poison(clean.labels.numpy(), target, rate, rng))
    images, labels = clean.images.clone(), clean.labels.clone()
    images[chosen] = stamp(images[chosen], pixels)
    labels[chosen] = target
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[chosen] = True
    return LocalData(images, labels, mask)


def scaled_update(sent: State, trained: State, factor: float) -> dict[str, Tensor]:
    """Move ``factor`` times as far from the model that the server sent as training did.

    Integer tensors (counters) stay as trained.
    """
    return {
        name: sent[name] + factor * (tensor - sent[name]) if tensor.is_floating_point() else tensor
        for name, tensor in trained.items()
    }
