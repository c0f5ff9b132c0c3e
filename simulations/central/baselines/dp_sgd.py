"""DP-SGD: each image's gradient is clipped, and noise is added to their sum.

Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, https://arxiv.org/abs/1607.00133,
Algorithm 1, through Opacus. Against poisoning it was proposed by Du, Jia, Song, "Robust Anomaly
Detection and Backdoor Attack Detection via Differential Privacy", ICLR 2020,
https://arxiv.org/abs/1911.07116, and Hong et al., "On the Effectiveness of Mitigating Data
Poisoning Attacks with Gradient Shaping", 2020, https://arxiv.org/abs/2002.11497: few images cannot
move the weights far. Wang et al. (NONE, NeurIPS 2022) compare with the two settings below.

What differs: batches are the shuffled ones that all methods here take their steps on, not Poisson
samples, so no epsilon is claimed. Batch normalisation mixes images, whose gradients can then not be
told apart; Opacus' validator puts group normalisation in its place, in the returned model too. A
smaller last batch counts by its size.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx, nn

from simulations.central.baselines.base import NOISE, TRAINING, Baseline, require, sgd
from simulations.central.setting import Outcome, Setting
from tasks.models import as_input
from tasks.training import batches


@dataclass(frozen=True)
class DpSgd(Baseline):
    """SGD on clipped, noisy gradients, for networks that torch.fx can trace. Needs Opacus.

    Attributes
    ----------
    clip : float
        Largest Euclidean norm of one image's gradient, > 0.
    noise : float
        Noise multiplier, >= 0: the standard deviation of the noise on the sum of a batch's
        gradients, in units of `clip`.
    """

    clip: float
    noise: float

    def validate(self) -> None:
        """Check the fields."""
        require(self.clip > 0, "clip", self.clip, "> 0")
        require(self.noise >= 0, "noise", self.noise, ">= 0")

    def train(self, setting: Setting) -> Outcome:
        """Follow the schedule.

        Raises
        ------
        ImportError
            If Opacus is not installed.
        """
        try:
            from opacus import GradSampleModule
            from opacus.optimizers import DPOptimizer
            from opacus.validators import ModuleValidator
        except ImportError as error:
            raise ImportError("DP-SGD needs Opacus: pip install none-defense[privacy]") from error
        schedule = setting.schedule
        model = ModuleValidator.fix(setting.model_fn()).train()
        watched = GradSampleModule(out_of_place(model))
        optimizer = DPOptimizer(
            sgd(model.parameters(), schedule),
            noise_multiplier=self.noise,
            max_grad_norm=self.clip,
            expected_batch_size=schedule.batch_size,
            generator=_on_device(setting.generator(NOISE), model),
        )
        order = setting.generator(TRAINING)
        for _ in range(schedule.epochs):
            for chosen in batches(len(setting.images), schedule.batch_size, order):
                logits = watched(as_input(model, setting.images[chosen]))
                optimizer.zero_grad()
                labels = setting.labels[chosen].to(logits.device)
                nn.functional.cross_entropy(logits, labels).backward()
                optimizer.step()
        watched.to_standard_module()
        return Outcome(model)


# The two settings of NONE's paper.
WIDE = DpSgd(clip=4.0, noise=0.1)
NARROW = DpSgd(clip=1.0, noise=0.5)


def out_of_place(model: nn.Module) -> nn.Module:
    """Give a model's graph without activations and additions in place, such as a ResNet's.

    Opacus watches modules by backward hooks, which do not allow what they return to be changed.

    Parameters
    ----------
    model : torch.nn.Module
        In the mode that the graph is to be of. The graph shares its modules; their activation
        functions are no longer in place afterwards.
    """
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    graph = fx.symbolic_trace(model)
    for node in graph.graph.nodes:
        if node.target is operator.iadd:
            node.target = operator.add
    graph.recompile()
    return graph


def _on_device(generator: torch.Generator, model: nn.Module) -> torch.Generator:
    """Make a generator with the same seed where the model is, since noise is drawn there."""
    device = next(model.parameters()).device
    return torch.Generator(device).manual_seed(generator.initial_seed())
