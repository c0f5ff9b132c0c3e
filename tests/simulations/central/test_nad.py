"""Neural Attention Distillation: where attention is read, and what the student is taught."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from simulations.central.baselines.nad import (
    NeuralAttentionDistillation,
    attended_layers,
    attention_map,
)
from tests.simulations.central.toys import network, toy


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_the_attention_map_is_what_a_loop_makes(power: float) -> None:
    values = torch.randn(3, 5, 4, 6, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(3, 4, 6)
    for image in range(3):
        for row in range(4):
            for column in range(6):
                for channel in range(5):
                    expected[image, row, column] += (
                        abs(values[image, channel, row, column]) ** power
                    )
        expected[image] /= expected[image].square().sum().sqrt()

    torch.testing.assert_close(attention_map(values, power), expected)


def test_a_silent_layer_attends_to_nothing() -> None:
    assert torch.equal(attention_map(torch.zeros(2, 3, 4, 4)), torch.zeros(2, 4, 4))


def test_the_last_convolution_of_each_resolution_is_attended_to() -> None:
    def convolution(inputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, 2, 3, padding=1), nn.ReLU()]

    model = nn.Sequential(
        *(*convolution(1), *convolution(2), nn.MaxPool2d(2)),
        *(*convolution(2), *convolution(2), nn.BatchNorm2d(2), nn.AvgPool2d(4)),
        *(*convolution(2), nn.Flatten(), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)),
    )
    # 8x8: modules 0 and 2; 4x4: 5 and 7; the last convolution, 11, sees a single position.
    assert attended_layers(model, torch.zeros(1, 1, 8, 8)) == ("2", "7")


def test_a_network_without_maps_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.ReLU(), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="has no convolution with a map to attend to"):
        attended_layers(model, torch.zeros(1, 1, 8, 8))


def maps_by_hooks(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in ("relu1", "relu2"):
        module = model.get_submodule(name)
        module.register_forward_pre_hook(
            lambda _, args, name=name: found.update({name: args[0].detach().clone()})
        )
    model(inputs)
    return {
        name: (value**2).sum(1) / (value**2).sum(1).flatten(1).norm(dim=1)[:, None, None]
        for name, value in found.items()
    }


def test_the_loss_is_cross_entropy_and_weighted_differences_of_attention() -> None:
    setting = toy(count=80).setting
    student, teacher = network().train(), network().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    inputs, labels = setting.images[:20].float() / 255, setting.labels[:20]
    method = NeuralAttentionDistillation(beta=70.0, first_beta=30.0)
    ours, theirs = (
        maps_by_hooks(deepcopy(student), inputs),
        maps_by_hooks(deepcopy(teacher), inputs),
    )
    apart = {name: float((ours[name] - theirs[name]).square().mean()) for name in ours}
    entropy = nn.functional.cross_entropy(student(inputs), labels)

    loss = method._loss(student, teacher, setting)(inputs, labels)
    alike = method._loss(student, deepcopy(student).eval(), setting)(inputs, labels)

    assert min(apart.values()) > 1e-4
    expected = float(entropy) + 30 * apart["relu1"] + 70 * apart["relu2"]
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    assert float(alike) == pytest.approx(float(entropy), rel=1e-6)


def test_named_layers_alone_are_attended_to() -> None:
    setting = toy(count=80).setting
    inputs, labels = setting.images[:20].float() / 255, setting.labels[:20]
    student, teacher = network(), network()
    with torch.no_grad():
        teacher.get_parameter("conv2.weight").mul_(-2)
    method = NeuralAttentionDistillation(beta=5.0, first_beta=5.0, layers=("conv1",))
    loss = method._loss(student, teacher, setting)(inputs, labels)
    entropy = nn.functional.cross_entropy(student(inputs), labels)
    assert float(loss) == pytest.approx(float(entropy), rel=1e-6)  # conv1 is the same in both

    wrong = NeuralAttentionDistillation(layers=("conv9",))
    with pytest.raises(ValueError, match="layers names 'conv9'"):
        wrong._loss(student, teacher, setting)


def test_it_takes_a_planted_backdoor_out() -> None:
    scene = toy()
    outcome = NeuralAttentionDistillation()(scene.setting)
    assert scene.success(outcome.model) < 0.2  # 1.00 undefended
    assert scene.accuracy(outcome.model) > 0.95
    assert outcome.dropped is None
