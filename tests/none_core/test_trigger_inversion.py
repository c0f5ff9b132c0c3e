"""Trigger inversion on networks whose backdoor was put in by hand, and against a slow reference."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from none_core.neurons import NeuronMap
from none_core.trigger_inversion import Finding, Probe, Triggers, _Search, invert, probe_model

CLASSES, TARGET = 4, 2
HEIGHT, WIDTH = 7, 5  # odd on purpose
POSITIONS = HEIGHT * WIDTH
REGION = 7  # positions that are bright in images of one class
PLANTED_POSITIONS = [33, 34]  # always dark in clean images
PLANTED_NEURONS = [2 * CLASSES, 2 * CLASSES + 1]
KINDS = ("grey", "colour", "flat", "leaky", "batch norm")


def shape_of(kind: str) -> tuple[int, ...]:
    return {"colour": (3, HEIGHT, WIDTH), "flat": (POSITIONS,)}.get(kind, (1, HEIGHT, WIDTH))


def planted_net(kind: str = "grey") -> nn.Module:
    """Two neurons for each class, which add up its region, and one for each trigger position.

    An ordinary class needs most of its region lit, the target class both trigger positions.
    """
    channels = 3 if kind == "colour" else 1
    first = nn.Linear(channels * POSITIONS, 2 * CLASSES + 2)
    last = nn.Linear(2 * CLASSES + 2, CLASSES)
    with torch.no_grad():
        for parameter in (*first.parameters(), *last.parameters()):
            parameter.zero_()
        weight = first.weight.view(-1, channels, POSITIONS)
        for c in range(CLASSES):
            weight[2 * c : 2 * c + 2, :, REGION * c : REGION * (c + 1)] = 1 / channels
            last.weight[c, 2 * c : 2 * c + 2] = 1
        for neuron, position in zip(PLANTED_NEURONS, PLANTED_POSITIONS, strict=True):
            weight[neuron, :, position] = 4 / channels
            first.bias[neuron] = -0.2
            last.weight[TARGET, neuron] = 2
    layers: list[nn.Module] = [nn.Flatten(), first]
    if kind == "batch norm":  # does nothing, but only in evaluation mode
        norm = nn.BatchNorm1d(2 * CLASSES + 2, eps=0.5)
        with torch.no_grad():
            norm.running_mean.fill_(1.0)
            norm.running_var.fill_(3.5)
            norm.weight.fill_(2.0)
            norm.bias.fill_(1.0)
        layers.append(norm)
    layers += [nn.LeakyReLU(0.1) if kind == "leaky" else nn.ReLU(), last]
    return nn.Sequential(*layers).eval().requires_grad_(False)


def clean_images(kind: str = "grey", number: int = 60) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(5)
    labels = np.arange(number) % CLASSES
    channels = 3 if kind == "colour" else 1
    images = rng.uniform(0, 0.1, size=(number, channels, POSITIONS))
    images[..., PLANTED_POSITIONS] = 0
    for i, c in enumerate(labels):
        own = slice(REGION * c, REGION * (c + 1))
        images[i, :, own] = rng.uniform(0.7, 1, size=(channels, REGION))
    shaped = images.reshape(number, *shape_of(kind))
    return torch.from_numpy(shaped).float(), torch.from_numpy(labels)


def reader_of(model: nn.Module, inputs: Tensor) -> Any:
    return NeuronMap.trace(model, inputs[:2]).reader(model)


def find(
    kind: str = "grey",
    *,
    model: nn.Module | None = None,
    start: Triggers | None = None,
    seed: int = 0,
    keep: Any = slice(None),
    **options: Any,
) -> Finding:
    """Probe the planted network."""
    inputs, labels = (tensor[keep] for tensor in clean_images(kind))
    model = planted_net(kind) if model is None else model
    probe = Probe(**{"labels": tuple(range(CLASSES)), "steps": 40, "images": 8, **options})
    start = Triggers.unknown(CLASSES, inputs[0]) if start is None else start
    generator = torch.Generator().manual_seed(seed)
    return probe_model(model, reader_of(model, inputs), inputs, labels, probe, start, generator)


def counting(model: nn.Module) -> list[int]:
    """List that grows by the number of samples whenever the network is run."""
    seen: list[int] = []
    model[1].register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    return seen


# --- a planted backdoor ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_planted_trigger_is_found(kind: str) -> None:
    model = planted_net(kind)
    inputs, labels = clean_images(kind)
    assert (model(inputs).argmax(1) == labels).all()

    finding = find(kind)

    assert finding.probed.tolist() == [True] * CLASSES
    others = np.delete(finding.size, TARGET)
    assert finding.size[TARGET] < 0.5 * others.min()
    assert (finding.success >= 0.8).all()
    mask = finding.triggers.mask[TARGET].flatten()
    assert sorted(mask.argsort(descending=True)[:2].tolist()) == PLANTED_POSITIONS
    ranked = np.argsort(-finding.shift[TARGET])
    assert sorted(ranked[:2]) == PLANTED_NEURONS
    third = abs(finding.shift[TARGET][ranked[2]])
    assert finding.shift[TARGET][ranked[1]] > 3 * third


@pytest.mark.parametrize("kind", ["grey", "colour", "flat"])
def test_the_shapes_are_those_of_the_inputs(kind: str) -> None:
    shape = shape_of(kind)
    unknown = Triggers.unknown(CLASSES, torch.zeros(shape))
    assert unknown.pattern.shape == (CLASSES, *shape)
    positions = (POSITIONS,) if kind == "flat" else (1, HEIGHT, WIDTH)
    assert unknown.mask.shape == (CLASSES, *positions)
    assert not unknown.known.any()

    finding = find(kind, steps=2)

    assert finding.triggers.mask.shape == unknown.mask.shape
    assert finding.triggers.pattern.shape == unknown.pattern.shape
    assert finding.triggers.known.all()
    assert finding.size.shape == finding.success.shape == finding.probed.shape == (CLASSES,)
    assert finding.shift.shape == (CLASSES, 2 * CLASSES + 2)


def test_without_the_backdoor_no_class_stands_out() -> None:
    model = planted_net()
    model[3].weight[TARGET, PLANTED_NEURONS] = 0

    finding = find(model=model)

    assert finding.size.min() > 0.6 * np.median(finding.size)


def test_a_seed_repeats() -> None:
    one, again, other = find(steps=12, seed=1), find(steps=12, seed=1), find(steps=12, seed=2)
    for name in ("size", "success", "shift"):
        assert getattr(one, name).tobytes() == getattr(again, name).tobytes()
    for name in ("mask", "pattern", "penalty"):
        assert torch.equal(getattr(one.triggers, name), getattr(again.triggers, name))
    assert not torch.equal(one.triggers.mask, other.triggers.mask)


def test_what_it_starts_from_and_the_data_are_left_alone() -> None:
    inputs, labels = clean_images()
    start = Triggers.unknown(CLASSES, inputs[0])
    model = planted_net()
    before = [t.clone() for t in (start.mask, start.pattern, start.penalty, start.known, inputs)]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    probe = Probe(tuple(range(CLASSES)), steps=3)
    probe_model(model, reader_of(model, inputs), inputs, labels, probe, start, torch.Generator())
    after = [start.mask, start.pattern, start.penalty, start.known, inputs]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)


def test_a_warm_start_needs_fewer_steps() -> None:
    cold = find(steps=40)
    known, unknown = planted_net(), planted_net()
    cost_of_warm, cost_of_fresh = counting(known), counting(unknown)

    warm = find(model=known, start=cold.triggers, steps=10, seed=1)
    fresh = find(model=unknown, steps=10, seed=1)

    assert warm.size[TARGET] <= cold.size[TARGET]
    assert warm.size[TARGET] < fresh.size[TARGET]
    assert sum(cost_of_warm) < sum(cost_of_fresh)


# --- what is not found ----------------------------------------------------------------------------


def constant_net(answer: int) -> nn.Module:
    model = planted_net()
    model[3].weight.zero_()
    model[3].bias[answer] = 1
    return model


def test_a_class_that_no_trigger_reaches_has_the_size_of_the_whole_input() -> None:
    finding = find(model=constant_net(0), steps=5)
    assert finding.size.tolist()[1:] == [1.0] * (CLASSES - 1)
    assert finding.success.tolist() == [1.0, 0.0, 0.0, 0.0]
    assert finding.size[0] < 0.2
    assert finding.probed.all()


def test_a_class_is_only_probed_with_samples_of_others() -> None:
    only_ones = torch.arange(1, 60, CLASSES)
    finding = find(keep=only_ones, steps=3)
    assert finding.probed.tolist() == [True, False, True, True]
    assert (finding.size[1], finding.success[1]) == (0, 0)
    assert not finding.shift[1].any()
    assert finding.triggers.known.tolist() == [True, False, True, True]
    start = Triggers.unknown(CLASSES, clean_images()[0][0])
    assert torch.equal(finding.triggers.mask[1], start.mask[1])

    nothing = find(keep=only_ones, steps=3, labels=(1,))
    assert not nothing.probed.any()
    assert not nothing.shift.size
    assert not nothing.size.any()


def test_only_the_classes_that_are_asked_for_are_probed() -> None:
    cold = find(steps=3)
    finding = find(steps=3, labels=(3, 0), start=cold.triggers)
    assert finding.probed.tolist() == [True, False, False, True]
    assert not finding.size[[1, 2]].any()
    assert not finding.shift[[1, 2]].any()
    assert torch.equal(finding.triggers.mask[[1, 2]], cold.triggers.mask[[1, 2]])


# --- what it costs --------------------------------------------------------------------------------


class FirstOnly(nn.Module):
    """Says 2 of every image, but 0 and 3 of some of the very first ones it sees."""

    def __init__(self, images: int) -> None:
        super().__init__()
        self.images = images
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        answers = torch.full((len(x),), 2)
        if not self.seen:
            answers[: self.images], answers[3 * self.images :] = 0, 3
        self.seen.append(len(x))
        logits = nn.functional.one_hot(answers, 4).float()
        return logits + 0 * x.flatten(1).sum(1, keepdim=True)


def test_a_class_that_no_longer_shrinks_drops_out() -> None:
    """Classes 0 and 3 are reached in the first step only, class 1 never, class 2 always."""
    images, steps = 3, 15
    inputs = torch.rand(6, 1, 4, 4)
    others = {k: torch.arange(6) for k in range(4)}
    model = FirstOnly(images)
    _, reached = invert(
        model,
        inputs,
        others,
        [0, 1, 2, 3],
        Probe((0, 1, 2, 3), steps=steps, images=images),
        Triggers.unknown(4, inputs[0]),
        (torch.zeros(1, 1, 1), torch.ones(1, 1, 1)),
        torch.Generator().manual_seed(0),
    )
    assert reached.tolist() == [True, False, True, True]
    # Nothing is known, so twice the steps. In the first half all have shrunk, in the second two
    # stand still when that is looked at, after 10 steps.
    assert model.seen[:30] == [4 * images] * 25 + [2 * images] * 5
    # Then class 2, whose mask is smaller than the others', once more with twice the images.
    harder = model.seen[30:]
    assert 0 < len(harder) <= 3 * steps
    assert set(harder) == {2 * images}


@pytest.mark.parametrize(("classes", "most"), [(5, 2), (10, 2), (20, 4), (43, 8)])
def test_of_many_classes_more_are_looked_at_harder(classes: int, most: int) -> None:
    triggers = Triggers.unknown(2 * classes, torch.zeros(3))
    nothing = torch.zeros(1), torch.ones(1)
    search = _Search(
        nn.Identity(), torch.zeros(1, 3), {}, 0.9, triggers, nothing, torch.Generator()
    )
    asked = torch.arange(0, 2 * classes, 2)  # a client may be asked for a share of all classes
    search.smallest[:] = 0.0  # of what it is not asked for
    search.smallest[asked] = 5.0
    small = (classes - 1) // 2
    search.smallest[asked[:small]] = 2.0 - torch.arange(small) / small
    assert search.few(asked).tolist() == asked[:small].flip(0)[:most].tolist()


@pytest.mark.parametrize("cold", [True, False])
def test_the_cost_is_bounded(cold: bool) -> None:
    steps, images = 6, 4
    start = None if cold else find(steps=steps, images=images).triggers
    model = planted_net()
    seen = counting(model)
    find(model=model, steps=steps, images=images, start=start)
    search = CLASSES * steps * images * (2 if cold else 1)
    harder = (
        2 * 3 * steps * 2 * images
    )  # two of four classes, three times the steps, twice the images
    shown = 2 * 45 * CLASSES  # with and without trigger; 45 of the 60 images are of other classes
    looks = 10  # what tracing the model needs
    assert search + shown <= sum(seen) <= search + harder + shown + looks


def test_the_success_is_measured_on_a_limited_number_of_images() -> None:
    inputs, labels = clean_images(number=1200)
    model = planted_net()
    reader = reader_of(model, inputs)
    seen = counting(model)
    start = Triggers.unknown(CLASSES, inputs[0])
    probe_model(model, reader, inputs, labels, Probe((0,), 1, 1), start, torch.Generator())
    assert max(seen) == 128


# --- against slow references ----------------------------------------------------------------------


def slow_inversion(
    model: nn.Module,
    inputs: Tensor,
    others: dict[int, Tensor],
    probe: Probe,
    start: Triggers,
    low: Tensor,
    high: Tensor,
    generator: torch.Generator,
) -> dict[int, tuple[Tensor, Tensor, float, bool]]:
    """Descend for every class by itself, image by image, with Adam written out."""
    mask = {k: start.mask[k].clone() for k in probe.labels}
    pattern = {k: start.pattern[k].clone() for k in probe.labels}
    penalty = {k: float(start.penalty[k]) for k in probe.labels}
    first = {k: [torch.zeros_like(mask[k]), torch.zeros_like(pattern[k])] for k in probe.labels}
    second = {k: [torch.zeros_like(mask[k]), torch.zeros_like(pattern[k])] for k in probe.labels}
    best: dict[int, tuple[float, Tensor, Tensor]] = {}
    for step in [*range(1, probe.steps + 1)] * 2:  # nothing is known, so a second time
        for k in probe.labels:
            if step == 1:
                first[k] = [torch.zeros_like(mask[k]), torch.zeros_like(pattern[k])]
                second[k] = [torch.zeros_like(mask[k]), torch.zeros_like(pattern[k])]
            drawn = torch.randint(len(others[k]), (probe.images,), generator=generator)
            m, p = mask[k].clone().requires_grad_(), pattern[k].clone().requires_grad_()
            losses, hits = [], 0
            for i in others[k][drawn]:
                value = low + (high - low) * torch.sigmoid(p)
                stamped = (1 - torch.sigmoid(m)) * inputs[i] + torch.sigmoid(m) * value
                logits = model(stamped[None])[0]
                losses.append(torch.logsumexp(logits, 0) - logits[k])
                hits += int(logits.argmax()) == k
            size = torch.sigmoid(m).sum()
            (sum(losses) / probe.images + penalty[k] * size).backward()
            hit = hits / probe.images >= probe.success
            if hit and (k not in best or float(size.detach()) < best[k][0]):
                best[k] = float(size.detach()), mask[k].clone(), pattern[k].clone()
            for n, (tensor, grad) in enumerate(((mask[k], m.grad), (pattern[k], p.grad))):
                assert grad is not None
                first[k][n] = 0.5 * first[k][n] + 0.5 * grad
                second[k][n] = 0.9 * second[k][n] + 0.1 * grad**2
                mean, square = first[k][n] / (1 - 0.5**step), second[k][n] / (1 - 0.9**step)
                tensor -= 0.3 * mean / (square.sqrt() + 1e-8)
            penalty[k] = min(max(penalty[k] * (1.15 if hit else 1 / 1.15), 1e-5), 1.0)
    last = {k: (math.inf, mask[k], pattern[k]) for k in probe.labels}
    return {k: (*(last | best)[k][1:], penalty[k], k in best) for k in probe.labels}


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("shape", [(2, 3, 3), (6,)])
def test_a_few_steps_equal_a_slow_reference(shape: tuple[int, ...], steps: int) -> None:
    torch.manual_seed(3)
    features = math.prod(shape)
    model = nn.Sequential(nn.Flatten(), nn.Linear(features, 5), nn.Tanh(), nn.Linear(5, 4))
    inputs = torch.randn(20, *shape)
    labels = torch.arange(20) % 4
    dims = (0,) if len(shape) == 1 else (0, 2, 3)
    low, high = (f(inputs, dim=dims, keepdim=True)[0] for f in (torch.amin, torch.amax))
    others = {k: (labels != k).nonzero().flatten() for k in range(4)}
    unknown = Triggers.unknown(4, inputs[0])
    start = replace(
        unknown,
        mask=unknown.mask + torch.randn(unknown.mask.shape) / 10,
        pattern=torch.randn(unknown.pattern.shape),
    )
    probe = Probe((0, 1, 3), steps=steps, images=3, success=0.3)

    one, other = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)

    found, reached = invert(model, inputs, others, [0, 1, 3], probe, start, (low, high), one)

    slow = slow_inversion(model, inputs, others, probe, start, low, high, other)
    for k, (mask, pattern, penalty, hit) in slow.items():
        torch.testing.assert_close(found.mask[k], mask, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.pattern[k], pattern, rtol=1e-4, atol=1e-5)
        assert float(found.penalty[k]) == pytest.approx(penalty, rel=1e-5)
        assert bool(reached[k]) == hit
    if steps > 1:
        assert {hit for *_, hit in slow.values()} == {True, False}  # both ends were looked at
    assert torch.equal(found.mask[2], start.mask[2])
    assert not reached[2]


def test_size_success_and_shift_describe_the_triggers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 6, 5), nn.ReLU()),
        nn.Linear(5, 3),
    ).eval()
    inputs, labels = torch.randn(30, 2, 5, 4), torch.arange(30) % 3
    probe = Probe((0, 1, 2), steps=4, images=4, success=0.5)
    start = Triggers.unknown(3, inputs[0])
    found = probe_model(
        model, reader_of(model, inputs), inputs, labels, probe, start, torch.Generator()
    )

    low, high = inputs.amin((0, 2, 3)), inputs.amax((0, 2, 3))
    for k in range(3):
        clean, stamped, hits = [], [], 0
        for x in inputs[labels != k]:
            mask = torch.sigmoid(found.triggers.mask[k, 0])
            y = x.clone()
            for channel in range(2):
                share = torch.sigmoid(found.triggers.pattern[k, channel])
                value = low[channel] + (high - low)[channel] * share
                y[channel] = (1 - mask) * x[channel] + mask * value
            with torch.no_grad():
                for image, values in ((x, clean), (y, stamped)):
                    conv = model[0](image[None])[0]
                    hidden = model[3](conv.relu().flatten())
                    values.append([*(plane.max().item() for plane in conv), *hidden.tolist()])
                hits += int(model(y[None]).argmax()) == k
        deviation = np.std(clean, axis=0)
        faint = np.repeat([deviation[:3].mean(), deviation[3:].mean()], [3, 5]) / 10
        expected = (np.mean(stamped, axis=0) - np.mean(clean, axis=0)) / (deviation + faint)
        np.testing.assert_allclose(found.shift[k], expected, rtol=1e-3, atol=1e-4)
        assert found.success[k] == pytest.approx(hits / 20)
        if found.size[k] < 1:
            share = torch.sigmoid(found.triggers.mask[k]).mean().item()
            assert found.size[k] == pytest.approx(share)
    assert found.size.min() < 1


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": ()}, "a probe needs at least one label"),
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"images": -1}, "images must be >= 1, got -1"),
        ({"success": 0}, r"success must be in \(0, 1\], got 0"),
        ({"success": 1.1}, r"success must be in \(0, 1\], got 1.1"),
        ({"success": math.nan}, r"success must be in \(0, 1\], got nan"),
    ],
)
def test_a_probe_out_of_range_is_an_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Probe(**{"labels": (0, 1), **settings})
    Probe((0,), steps=1, images=1, success=1.0)
