"""Triggers, stamping, and the choice of the samples to poison."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import data, poisoning
from tasks.poisoning import Trigger, bar, stamp

pixel_sets = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), max_size=12)


def random_images(dtype: torch.dtype) -> torch.Tensor:
    """Three images of 2 channels and 5x7 pixels, none of them at the maximum value."""
    values = torch.randint(0, 255, (3, 2, 5, 7), generator=torch.Generator().manual_seed(0))
    return values.to(dtype) if dtype == torch.uint8 else (values / 255).to(dtype)


@settings(deadline=None)
@given(pixels=pixel_sets, dtype=st.sampled_from([torch.uint8, torch.float32, torch.float64]))
def test_stamp_sets_these_pixels_and_no_other(pixels, dtype):
    images = random_images(dtype)
    before = images.clone()
    highest = 255 if dtype == torch.uint8 else 1.0

    stamped = poisoning.stamp(images, pixels)

    assert torch.equal(images, before)
    assert stamped.dtype == dtype
    for row in range(5):
        for column in range(7):
            expected = highest if (row, column) in pixels else before[:, :, row, column]
            assert (stamped[:, :, row, column] == expected).all()


def test_stamp_takes_a_single_image():
    stamped = poisoning.stamp(torch.zeros(3, 5, 7), [(4, 6)])

    assert stamped.sum() == 3


@pytest.mark.parametrize("pixel", [(5, 0), (0, 7), (-1, 0), (0, -1)])
def test_pixel_outside_the_image_is_an_error(pixel):
    with pytest.raises(ValueError, match="5x7 image"):
        poisoning.stamp(random_images(torch.uint8), [(0, 0), pixel])
    with pytest.raises(ValueError, match="5x7 image"):
        Trigger((((0, 0),), (pixel,))).check((2, 5, 7))


def test_integer_images_other_than_uint8_are_an_error():
    with pytest.raises(TypeError, match="int64"):
        poisoning.stamp(torch.zeros(1, 1, 5, 7, dtype=torch.int64), [(0, 0)])


def test_parts_start_again_and_make_up_the_whole():
    trigger = Trigger((bar(3, 0, 2), bar(0, 5, 1), ((3, 1), (3, 2))))

    assert trigger.part(1) == ((0, 5),)
    assert trigger.part(5) == trigger.part(2) == ((3, 1), (3, 2))
    assert trigger.whole() == ((0, 5), (3, 0), (3, 1), (3, 2))


@pytest.mark.parametrize("parts", [(), ((),), (bar(0, 0, 2), ())])
def test_empty_part_is_an_error(parts):
    with pytest.raises(ValueError, match="at least one pixel"):
        Trigger(parts)


@pytest.mark.parametrize(
    ("name", "shape", "rows", "columns", "length"),
    [
        ("mnist", (1, 28, 28), (0, 3), (0, 6), 4),
        ("cifar10", (3, 32, 32), (0, 4), (0, 9), 6),
        ("gtsrb", (3, 32, 32), (0, 4), (0, 9), 6),
    ],
)
def test_default_triggers_are_the_published_ones(name, shape, rows, columns, length):
    corners = [(row, column) for row in rows for column in columns]
    bars = tuple(tuple((r, c + i) for i in range(length)) for r, c in corners)

    trigger = poisoning.DEFAULT_TRIGGER[name]

    trigger.check(shape)
    assert trigger.parts == bars
    assert len(trigger.whole()) == 4 * length


@pytest.mark.parametrize(("name", "factor"), [("imagenet10", 7), ("imagenet10-64", 2)])
def test_larger_images_carry_cifar10s_trigger_as_many_times_as_large(name, factor):
    large, shape = poisoning.DEFAULT_TRIGGER[name], data.SHAPES[name]
    usual = poisoning.DEFAULT_TRIGGER["cifar10"]

    for ours, theirs in zip(large.parts, usual.parts, strict=True):
        stamped = stamp(torch.zeros(shape), ours)
        small = stamp(torch.zeros(3, 32, 32), theirs)
        assert torch.equal(stamped, small.repeat_interleave(factor, 1).repeat_interleave(factor, 2))


def test_every_data_set_has_a_trigger_and_a_rate():
    assert set(poisoning.DEFAULT_TRIGGER) == set(data.NAMES)
    assert set(poisoning.DEFAULT_RATE) == set(data.NAMES)
    assert poisoning.DEFAULT_RATE["mnist"] == 20 / 64
    assert poisoning.DEFAULT_RATE["cifar10"] == 5 / 64


@settings(deadline=None)
@given(
    labels=st.lists(st.integers(0, 3), max_size=60),
    target=st.integers(0, 3),
    rate=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_poison_draws_that_share_outside_the_target_class(labels, target, rate, seed):
    values = np.array(labels, dtype=np.int64)

    chosen = poisoning.poison(values, target, rate, np.random.default_rng(seed))

    assert len(chosen) == min(round(rate * len(values)), (values != target).sum())
    assert (np.diff(chosen) > 0).all()
    assert (values[chosen] != target).all()
    again = poisoning.poison(torch.from_numpy(values), target, rate, np.random.default_rng(seed))
    assert np.array_equal(chosen, again)


def test_poison_follows_the_generator():
    labels = np.arange(1000) % 10

    first, other = (poisoning.poison(labels, 2, 0.3, np.random.default_rng(s)) for s in (0, 1))

    assert not np.array_equal(first, other)


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_rate_out_of_range_is_an_error(rate):
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\]"):
        poisoning.poison(np.zeros(4), 2, rate, np.random.default_rng(0))
