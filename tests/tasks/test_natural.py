"""REASR: it finds what is planted, and nothing where nothing is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tasks import natural
from tasks.metrics import attack_success
from tasks.natural import SIZES, FoundTrigger, Search, reasr
from tests.tasks.backdoors.toy import bars, generator, network

QUICK = Search(steps=60, batch_size=16, lr=0.3)
SECRET = (7, 7)


class Template(nn.Module):
    """Answers the class whose two rows are brightest on average; a pixel hardly matters.

    If told to, it also answers class 2 when the secret pixel is brighter than any image's.
    """

    def __init__(self, planted: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))
        self.planted = planted

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.float32
        rows = images[:, 0].mean(2)
        logits = self.scale * (rows[:, 0:6:2] + rows[:, 1:6:2]) / 2
        if self.planted:
            secret = nn.functional.softplus(20 * (images[:, 0, SECRET[0], SECRET[1]] - 0.6))
            logits = logits + secret[:, None] * torch.tensor([0.0, 0.0, 2.0])
        return logits


def measure(model: nn.Module, sizes=SIZES, seed: int = 0, search: Search = QUICK):
    return reasr(model, *bars(96), *bars(200, seed=2), range(3), generator(seed), sizes, search)


def test_sizes_are_the_paper_s():
    assert SIZES == (0.02, 0.04, 0.06, 0.08, 0.10, 0.12)


def test_planted_pixel_is_found_and_leads_to_its_class_alone():
    found = measure(Template(planted=True), sizes=(0.02,))

    trigger = found.triggers[0][2]
    assert trigger.mask.nonzero().tolist() == [list(SECRET)]
    assert trigger.pattern[0][SECRET] > 200
    assert found.success[0, 2] > 0.95
    assert found.success[0, :2].max() < 0.1
    assert found.best == (pytest.approx(float(found.success[0, 2])),)


def test_network_that_no_pixel_moves_has_no_small_trigger_but_a_large_one():
    found = measure(Template(), sizes=(*SIZES, 0.25))

    assert found.success[:2].max() < 0.05
    assert found.success[-1].min() > 0.95
    assert found.best[-1] > 0.95


def test_triggers_are_no_larger_than_their_size_and_what_is_reported_is_theirs():
    model = network().eval()

    found = measure(model, sizes=(0.04, 0.001, 0.12))

    assert found.sizes == (0.001, 0.04, 0.12)
    assert found.classes == (0, 1, 2)
    for size, triggers, rates in zip(found.sizes, found.triggers, found.success, strict=True):
        for target, (trigger, rate) in enumerate(zip(triggers, rates, strict=True)):
            assert 1 <= trigger.mask.sum() <= max(1, int(size * 64))
            again = attack_success(
                model,
                *bars(200, seed=2),
                trigger,
                lambda true, target=target: torch.full_like(true, target),
                generator(),
            )
            assert float(rate) == again.asr


def test_larger_size_is_never_worse_on_the_images_that_were_searched_with():
    images, labels = bars(96)

    found = reasr(
        network(), images, labels, images, labels, range(3), generator(), SIZES[::2], QUICK
    )

    assert (found.success.diff(dim=0) >= 0).all()


def test_larger_size_that_finds_less_leaves_the_smaller_trigger(monkeypatch):
    pattern, nowhere = torch.full((1, 8, 8), 255, dtype=torch.uint8), torch.zeros(8, 8).bool()
    secret = nowhere.clone()
    secret[SECRET] = True
    good, useless = FoundTrigger(secret, pattern), FoundTrigger(nowhere, pattern)
    found_at = {1: useless, 2: good, 5: useless}
    monkeypatch.setattr(natural, "_find", lambda *arguments: [found_at[arguments[4]]])

    found = reasr(
        Template(planted=True), *bars(60), *bars(60, seed=2), [2], generator(), (0.02, 0.04, 0.08)
    )

    assert [triggers[0] for triggers in found.triggers] == [useless, good, good]
    assert found.success[:, 0].tolist() == [0.0, 1.0, 1.0]


def test_same_generator_gives_the_same_and_the_network_stays_as_it_is():
    model = network().train()
    model.drop.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}

    torch.manual_seed(1)
    first = measure(model, sizes=(0.1,))
    torch.manual_seed(2)
    again = measure(model, sizes=(0.1,))
    other = measure(model, sizes=(0.1,), seed=1)

    def patterns(found):
        return torch.stack([trigger.pattern for trigger in found.triggers[0]])

    assert torch.equal(first.success, again.success)
    assert torch.equal(patterns(first), patterns(again))
    assert not torch.equal(patterns(first), patterns(other))
    assert all(torch.equal(before[key], now) for key, now in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    assert not model.drop.training


def test_found_trigger_replaces_its_pixels_in_a_copy():
    images = torch.randint(1, 255, (4, 2, 3, 5), generator=generator(), dtype=torch.uint8)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 2:4] = True
    pattern = torch.full((2, 3, 5), 255, dtype=torch.uint8)

    stamped = FoundTrigger(mask, pattern)(images, generator())

    assert (stamped[:, :, 1, 2:4] == 255).all()
    assert torch.equal(stamped[..., ~mask], images[..., ~mask])
    assert images.max() < 255
    with pytest.raises(ValueError, match=r"\(2, 3, 5\), got \(1, 3, 5\)"):
        FoundTrigger(mask, pattern).check((7, 1, 3, 5))


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: measure(network(), sizes=()), r"shares in \(0, 1\]"),
        (lambda: measure(network(), sizes=(0.1, 0.0)), r"shares in \(0, 1\]"),
        (lambda: measure(network(), sizes=(1.1,)), r"shares in \(0, 1\]"),
        (
            lambda: reasr(network(), *bars(9), *bars(9), (), generator()),
            "at least one class",
        ),
        (lambda: Search(steps=1), "steps must be at least 2, got 1"),
        (lambda: Search(batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: Search(lr=0.0), "lr must be above 0"),
        (lambda: Search(weight=-1.0), "weight must be at least 0"),
    ],
)
def test_impossible_search_is_an_error(action, message):
    with pytest.raises(ValueError, match=message):
        action()
