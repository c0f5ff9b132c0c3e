"""Neural Attention Distillation: a fine-tuned copy teaches the network where to look.

Li et al., "Neural Attention Distillation: Erasing Backdoor Triggers from Deep Neural Networks",
ICLR 2021, https://arxiv.org/abs/2101.05930, section 3. The network that was trained on all images
is copied; the copy, the teacher, is fine-tuned on the trusted images, and then the network itself
is, with a penalty for attending to other places than the teacher.

The network's 20 epochs, the weights of the penalty, and the rate, which is that of the training
before and falls to a tenth after two epochs, are those of the published code
(https://github.com/bboylyg/NAD, ``config.py`` and ``utils/util.py``). That comes with a trained
teacher; ours takes the same rates for the paper's ten epochs. What differs:

- Its three layers are the ends of a wide ResNet's groups, which is the last layer of each
  resolution. Here that is found in any network, whatever their number; values are read where they
  enter the activation function, as there.
- No augmentation: trusted images are used as they are. Momentum is not Nesterov's, and starts anew
  when the rate falls.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from none_core.neurons import NeuronMap
from simulations.central.baselines.base import (
    REPAIR,
    Baseline,
    Loss,
    descend,
    require,
    require_trusted,
    undefended,
)
from simulations.central.setting import Outcome, Setting
from tasks.models import as_input


def attention_map(values: Tensor, power: float = 2.0) -> Tensor:
    """Say how strongly a layer responds at each position, relative to all positions.

    The sum over channels of the absolute values' powers, divided by its norm over positions.

    Parameters
    ----------
    values : Tensor
        Of a convolution, (n, C, H, W).
    power : float
        p, >= 1.

    Returns
    -------
    Tensor
        (n, H, W), >= 0, each of Euclidean norm 1 unless all values are (nearly) 0.
    """
    maps = values.abs().pow(power).sum(1)
    return maps / (torch.linalg.vector_norm(maps, dim=(1, 2), keepdim=True) + 1e-6)


def attended_layers(model: nn.Module, example: Tensor) -> tuple[str, ...]:
    """Name the last convolution of each resolution, in forward order.

    Layers with a single position are left out: they have nowhere else to look.

    Parameters
    ----------
    model : torch.nn.Module
        In evaluation mode.
    example : Tensor
        A batch as the model takes it, (n, C, H, W).

    Raises
    ------
    ValueError
        If there is no such layer.
    """
    neurons = NeuronMap.trace(model, example)
    with torch.no_grad():
        _, reads = neurons.reader(model)(example)
    last: dict[torch.Size, str] = {}
    for layer, read in zip(neurons.layers, reads, strict=True):
        if read.ndim == 4 and read.shape[2:].numel() > 1:
            last.pop(read.shape[2:], None)
            last[read.shape[2:]] = layer.name
    if not last:
        raise ValueError(f"{type(model).__name__} has no convolution with a map to attend to")
    return tuple(last.values())


@dataclass(frozen=True)
class NeuralAttentionDistillation(Baseline):
    """Distil the attention of a fine-tuned teacher.

    Attributes
    ----------
    beta : float
        Weight of the mean squared difference of the attention maps, >= 0.
    first_beta : float
        The same for the first of several layers, which counts less, >= 0.
    power : float
        p of the attention map, >= 1.
    teacher_epochs, epochs : int
        Passes over the trusted images that the teacher and the network learn from, >= 1.
    fast_epochs : int
        Passes of either before the rate falls to a tenth of the schedule's, >= 0.
    layers : tuple of str or None
        Whose attention counts, by the names of `NeuronMap.trace`; None: `attended_layers`.
    """

    beta: float = 1000.0
    first_beta: float = 500.0
    power: float = 2.0
    teacher_epochs: int = 10
    epochs: int = 20
    fast_epochs: int = 2
    layers: tuple[str, ...] | None = None

    def validate(self) -> None:
        """Check the fields."""
        require(self.beta >= 0, "beta", self.beta, ">= 0")
        require(self.first_beta >= 0, "first_beta", self.first_beta, ">= 0")
        require(self.power >= 1, "power", self.power, ">= 1")
        require(self.teacher_epochs >= 1, "teacher_epochs", self.teacher_epochs, ">= 1")
        require(self.epochs >= 1, "epochs", self.epochs, ">= 1")
        require(self.fast_epochs >= 0, "fast_epochs", self.fast_epochs, ">= 0")
        require(self.layers != (), "layers", self.layers, "None or at least one name")

    def train(self, setting: Setting) -> Outcome:
        """Train, fine-tune a copy, and distil."""
        require_trusted(setting)
        student = undefended(setting)
        teacher = deepcopy(student)
        order = setting.generator(REPAIR)

        def classify(inputs: Tensor, labels: Tensor) -> Tensor:
            return nn.functional.cross_entropy(teacher(inputs), labels)

        self._tune(teacher, classify, self.teacher_epochs, setting, order)
        teacher.eval().requires_grad_(False)
        self._tune(student, self._loss(student, teacher, setting), self.epochs, setting, order)
        return Outcome(student)

    def _loss(self, student: nn.Module, teacher: nn.Module, setting: Setting) -> Loss:
        """Cross-entropy, and what the attention differs from the teacher's."""
        example = as_input(teacher, setting.trusted_images[:1])
        names = self.layers or attended_layers(teacher, example)
        neurons = NeuronMap.trace(teacher, example, names)
        read_student, read_teacher = neurons.reader(student), neurons.reader(teacher)
        betas = [self.beta] * len(neurons.layers)
        if len(betas) > 1:
            betas[0] = self.first_beta

        def loss(inputs: Tensor, labels: Tensor) -> Tensor:
            logits, seen = read_student(inputs)
            _, shown = read_teacher(inputs)
            total = nn.functional.cross_entropy(logits, labels)
            for beta, ours, theirs in zip(betas, seen, shown, strict=True):
                total = total + beta * nn.functional.mse_loss(
                    attention_map(ours, self.power), attention_map(theirs, self.power)
                )
            return total

        return loss

    def _tune(
        self,
        model: nn.Module,
        loss: Loss,
        epochs: int,
        setting: Setting,
        order: torch.Generator,
    ) -> None:
        """Train on the trusted images, first at the schedule's rate, then at a tenth of it."""
        fast = min(self.fast_epochs, epochs)
        for passes, share in ((fast, 1.0), (epochs - fast, 0.1)):
            schedule = replace(setting.schedule, epochs=passes, lr=share * setting.schedule.lr)
            images, labels = setting.trusted_images, setting.trusted_labels
            descend(model, images, labels, loss, schedule, order)
