"""Local training: it follows its generator, learns, and does exactly the steps of plain SGD."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from tasks import models
from tasks.training import batches, train

SETTINGS = {"batch_size": 16, "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bright_or_dark(count: int) -> tuple[Tensor, Tensor]:
    """Images whose class is whether their left or their right half is bright."""
    labels = torch.arange(count) % 2
    images = torch.randint(0, 60, (count, 1, 16, 16), generator=generator(1), dtype=torch.uint8)
    for number, label in enumerate(labels.tolist()):
        images[number, :, :, 8 * label : 8 * label + 8] += 190
    return images, labels


def test_learns_and_reports_the_mean_loss():
    images, labels = bright_or_dark(96)
    model = models.build("mnist-cnn", (1, 16, 16), 2, seed=0)
    model.eval()

    first = train(model, images, labels, epochs=1, generator=generator(), **SETTINGS)
    last = train(model, images, labels, epochs=3, generator=generator(), **SETTINGS)

    assert model.training
    assert 0 < last < 0.3 * first
    assert (model(models.as_input(model, images)).argmax(1) == labels).all()


def test_same_generator_same_weights_whatever_the_global_state():
    images, labels = bright_or_dark(48)
    start = models.build("mnist-cnn", (1, 16, 16), 2, seed=0)

    def weights(global_seed: int, seed: int) -> Tensor:
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        model = deepcopy(start)
        train(model, images, labels, epochs=2, generator=generator(seed), **SETTINGS)
        assert torch.equal(torch.get_rng_state(), before)
        return torch.cat([value.detach().flatten() for value in model.parameters()])

    assert torch.equal(weights(1, seed=3), weights(2, seed=3))
    assert not torch.equal(weights(1, seed=3), weights(1, seed=4))


def test_one_full_batch_is_one_step_of_sgd():
    images = torch.tensor([[0], [51], [255]], dtype=torch.uint8)
    labels = torch.tensor([0, 1, 1])
    model = nn.Linear(1, 2)
    weight, bias = (parameter.detach().clone() for parameter in model.parameters())
    # By hand: with p = softmax(logits), d loss / d logits = (p - one_hot) / n.
    inputs = images.float() / 255
    logits = inputs @ weight.T + bias
    delta = (logits.softmax(1) - nn.functional.one_hot(labels, 2)) / 3
    loss_by_hand = -logits.log_softmax(1)[torch.arange(3), labels].mean()

    loss = train(
        model, images, labels,
        epochs=1, batch_size=3, lr=0.5, momentum=0.9, weight_decay=0.1, generator=generator(),
    )  # fmt: skip

    assert loss == pytest.approx(float(loss_by_hand), rel=1e-5)
    assert torch.allclose(model.weight, weight - 0.5 * (delta.T @ inputs + 0.1 * weight), atol=1e-6)
    assert torch.allclose(model.bias, bias - 0.5 * (delta.sum(0) + 0.1 * bias), atol=1e-6)


def test_batch_normalisation_survives_a_single_left_over_sample():
    images = torch.randint(0, 256, (17, 4), generator=generator(), dtype=torch.uint8)
    labels = torch.arange(17) % 2
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

    train(model, images, labels, epochs=2, generator=generator(), **SETTINGS)

    assert int(model[1].num_batches_tracked) == 2


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [(8, 4, [4, 4]), (10, 4, [4, 4, 2]), (9, 4, [4, 4]), (3, 1, [1, 1, 1]), (2, 64, [2])],
)
def test_batches_cover_the_samples_once(count, batch_size, sizes):
    got = list(batches(count, batch_size, generator()))

    assert [len(batch) for batch in got] == sizes
    indices = torch.cat(got).tolist()
    assert len(set(indices)) == len(indices)
    assert set(indices) <= set(range(count))


def test_batches_are_in_another_order_on_each_pass():
    source = generator()

    first, second = (torch.cat(list(batches(50, 10, source))).tolist() for _ in range(2))

    assert first != second
    assert sorted(first) == sorted(second) == list(range(50))


@pytest.mark.parametrize(("count", "batch_size"), [(0, 1), (0, 4), (1, 4), (5, 0)])
def test_nothing_to_train_on_is_an_error(count, batch_size):
    with pytest.raises(ValueError, match=r"too few|batch_size"):
        list(batches(count, batch_size, generator()))


def test_no_epoch_is_an_error():
    images, labels = bright_or_dark(4)

    with pytest.raises(ValueError, match="epochs"):
        train(nn.Linear(1, 1), images, labels, epochs=0, generator=generator(), **SETTINGS)
