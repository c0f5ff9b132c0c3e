"""Triggers: what they change, what they leave, and that a seed fixes them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tasks import poisoning, triggers
from tasks.poisoning import Trigger
from tasks.triggers import (
    Blended,
    Checkerboard,
    DynamicPatch,
    Noise,
    NoisyWarp,
    Pixels,
    Solid,
    Stamp,
    StaticPatch,
    Together,
    Warp,
    Watermark,
    single_pixel,
)

ALL = [
    Pixels(Trigger((((0, 0),), ((2, 3),)))),
    single_pixel(),
    StaticPatch(3),
    StaticPatch(3, 1, -2, Noise(5)),
    DynamicPatch(3),
    DynamicPatch(3, ((0, 0), (-1, -1)), Checkerboard()),
    Together((StaticPatch(3, 0, 0), StaticPatch(2))),
    Watermark(),
    Blended(),
    Warp(strength=2.0),
    NoisyWarp(Warp(strength=2.0)),
]
DRAWN = [trigger for trigger in ALL if isinstance(trigger, DynamicPatch | NoisyWarp)]
FIXED = [trigger for trigger in ALL if trigger not in DRAWN]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(number: int = 6, channels: int = 3, height: int = 9, width: int = 11) -> Tensor:
    """Images without black or white, so that whatever is stamped in these colours shows."""
    shape = (number, channels, height, width)
    return torch.randint(1, 255, shape, generator=generator(99), dtype=torch.uint8)


def changed(before: Tensor, after: Tensor) -> Tensor:
    """Pixels (N, H, W) of which any channel differs."""
    return (before != after).any(1)


# --- what holds for all of them ------------------------------------------------------------------


@pytest.mark.parametrize("trigger", ALL, ids=repr)
@pytest.mark.parametrize("shape", [(6, 3, 9, 11), (4, 1, 16, 12), (300, 1, 8, 8), (0, 3, 9, 11)])
def test_every_trigger_stamps_a_copy_of_any_shape(trigger: Stamp, shape):
    images = random_images(*shape)
    before = images.clone()

    trigger.check(images.shape[1:])
    stamped = trigger(images, generator())

    assert torch.equal(images, before)
    assert stamped.data_ptr() != images.data_ptr() or not len(images)
    assert stamped.dtype == torch.uint8
    assert stamped.shape == images.shape
    assert (stamped != images).flatten(1).any(1).all()


@pytest.mark.parametrize("trigger", ALL, ids=repr)
def test_same_generator_gives_the_same_stamps(trigger: Stamp):
    images = random_images()

    torch.manual_seed(1)
    first = trigger(images, generator(7))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = trigger(images, generator(7))

    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("trigger", FIXED, ids=repr)
def test_fixed_trigger_never_touches_the_generator(trigger: Stamp):
    used = generator(3)

    trigger(random_images(), used)

    assert torch.equal(used.get_state(), generator(3).get_state())


@pytest.mark.parametrize("trigger", DRAWN, ids=repr)
def test_drawn_trigger_differs_between_images_and_follows_the_generator(trigger: Stamp):
    alike = random_images(1).repeat(8, 1, 1, 1)

    stamped, other = trigger(alike, generator(1)), trigger(alike, generator(2))

    assert len({tuple(image.flatten().tolist()) for image in stamped}) > 1
    assert not torch.equal(stamped, other)


@pytest.mark.parametrize("trigger", ALL[1:], ids=repr)
def test_only_batches_of_uint8_are_stamped(trigger: Stamp):
    with pytest.raises(TypeError, match="float32"):
        trigger(random_images().float(), generator())
    with pytest.raises(ValueError, match=r"\(N, C, H, W\)"):
        trigger(random_images()[0], generator())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StaticPatch(0), "side must be at least 1, got 0"),
        (lambda: DynamicPatch(-1), "side must be at least 1, got -1"),
        (lambda: Watermark(1.1), r"opacity must be in \[0, 1\], got 1.1"),
        (lambda: Blended(-0.1), r"alpha must be in \[0, 1\], got -0.1"),
        (lambda: Warp(grid=1), "grid must be at least 2, got 1"),
        (lambda: Warp(strength=-1), "strength must be at least 0, got -1"),
        (lambda: Solid((256,)), r"levels in 0..255, got \(256,\)"),
        (lambda: Solid(()), "levels in 0..255"),
        (lambda: Together(()), "at least one part"),
    ],
)
def test_impossible_trigger_is_an_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "trigger",
    [
        StaticPatch(10),
        StaticPatch(3, 7, 0),
        StaticPatch(3, 0, 9),
        StaticPatch(3, -8, 0),
        DynamicPatch(10),
        DynamicPatch(3, ((0, 0), (7, 0))),
        Pixels(Trigger((((9, 0),),))),
        Together((StaticPatch(3), StaticPatch(10))),
        StaticPatch(3, pattern=Solid((1, 2))),
        DynamicPatch(3, pattern=Solid((1, 2))),
    ],
    ids=repr,
)
def test_trigger_that_does_not_fit_the_image_is_an_error(trigger: Stamp):
    for action in (
        lambda: trigger.check((3, 9, 11)),
        lambda: trigger(random_images(), generator()),
    ):
        with pytest.raises(ValueError, match=r"9x11 image|1 or 3 levels"):
            action()


# --- patches -------------------------------------------------------------------------------------


@settings(deadline=None)
@given(side=st.integers(1, 9), row=st.integers(-9, 8), column=st.integers(-11, 10))
def test_static_patch_changes_the_pixels_of_its_place_and_no_other(side, row, column):
    images = random_images()
    top = row if row >= 0 else 9 + row + 1 - side
    left = column if column >= 0 else 11 + column + 1 - side
    trigger = StaticPatch(side, row, column, Solid())

    if not (0 <= top <= 9 - side and 0 <= left <= 11 - side):
        with pytest.raises(ValueError, match="inside"):
            trigger(images, generator())
        return
    stamped = trigger(images, generator())

    expected = images.clone()
    expected[:, :, top : top + side, left : left + side] = 255
    assert torch.equal(stamped, expected)


@pytest.mark.parametrize("side", [3, 20])
def test_patches_of_the_tables_are_flush_with_the_corner(side):
    images = random_images(height=32, width=32)

    where = changed(images, StaticPatch(side)(images, generator()))

    assert where[:, -side:, -side:].all()
    assert where.sum() == len(images) * side**2


def test_patterns_are_what_they_are_called():
    board = Checkerboard().draw(3, 2)
    assert board.tolist() == [[[255, 0, 255], [0, 255, 0], [255, 0, 255]]] * 2
    assert Solid((1, 2, 3)).draw(2, 3)[:, 1, 0].tolist() == [1, 2, 3]
    assert Solid((7,)).draw(2, 3).unique().tolist() == [7]
    assert torch.equal(Noise(1).draw(4, 3), Noise(1).draw(4, 3))
    assert not torch.equal(Noise(1).draw(4, 3), Noise(2).draw(4, 3))


def test_single_pixel_is_one_pixel():
    images = random_images()

    stamped = single_pixel(2, -3, (0, 255, 0))(images, generator())

    assert changed(images, stamped).sum() == len(images)
    assert (stamped[:, :, 2, 8] == torch.tensor([0, 255, 0])).all()


def test_dynamic_patch_lies_in_one_square_and_goes_everywhere():
    images = torch.zeros(400, 1, 5, 6, dtype=torch.uint8)

    stamped = DynamicPatch(2, pattern=Solid())(images, generator())

    corners = set()
    for where in changed(images, stamped):
        rows, columns = where.nonzero(as_tuple=True)
        assert (len(rows), int(rows.max() - rows.min()), int(columns.max() - columns.min())) == (
            (4, 1, 1)
        )
        corners.add((int(rows.min()), int(columns.min())))
    assert corners == {(row, column) for row in range(4) for column in range(5)}


def test_dynamic_patch_keeps_to_its_places_and_draws_its_patterns():
    images = torch.zeros(60, 3, 6, 6, dtype=torch.uint8)

    stamped = DynamicPatch(3, ((0, 0), (-1, -1)))(images, generator())

    first, last = stamped[:, :, :3, :3], stamped[:, :, 3:, 3:]
    in_first = first.bool().flatten(1).any(1)
    assert in_first.any()
    assert (in_first ^ last.bool().flatten(1).any(1)).all()
    assert not stamped[:, :, :3, 3:].any()
    assert not stamped[:, :, 3:, :3].any()
    assert len(first[in_first].unique(dim=0)) == in_first.sum()
    levels = torch.cat([first[in_first], last[~in_first]]).float()
    assert levels.mean() == pytest.approx(127.5, abs=10)


def test_triggers_together_are_in_every_corner():
    corners = [(0, 0), (0, -1), (-1, 0), (-1, -1)]
    images = random_images()

    stamped = Together(tuple(StaticPatch(3, *place, Solid()) for place in corners))(
        images, generator()
    )

    expected = images.clone()
    for rows in (slice(0, 3), slice(-3, None)):
        for columns in (slice(0, 3), slice(-3, None)):
            expected[:, :, rows, columns] = 255
    assert torch.equal(stamped, expected)


def test_adapter_stamps_the_whole_trigger():
    trigger = Trigger((((0, 0),), ((2, 3), (2, 4))))
    images = random_images()

    stamped = Pixels(trigger)(images, generator())

    assert torch.equal(stamped, poisoning.stamp(images, trigger.whole()))


# --- the whole image -----------------------------------------------------------------------------


@pytest.mark.parametrize("trigger", [Watermark(0.0), Blended(0.0), Warp(strength=0.0)], ids=repr)
@pytest.mark.parametrize("shape", [(5, 3, 9, 11), (5, 1, 28, 28), (2, 3, 33, 20)])
def test_nothing_is_the_identity(trigger: Stamp, shape):
    images = random_images(*shape)

    assert torch.equal(trigger(images, generator()), images)


def test_blended_is_the_formula():
    images = random_images()
    noise = Blended(alpha=1.0, seed=4)(images, generator())
    assert (noise == noise[0]).all()

    stamped = Blended(alpha=0.3, seed=4)(images, generator())

    expected = (0.7 * images.double() + 0.3 * noise.double()).round()
    assert (stamped - expected).abs().max() <= 1  # a half may be rounded either way
    assert (stamped != expected).float().mean() < 0.02
    assert not torch.equal(noise, Blended(alpha=1.0, seed=5)(images, generator()))


def test_watermark_lightens_its_symbol_and_nothing_else():
    images = random_images(height=32, width=24)
    mark = triggers.symbol(32, 24).bool()

    stamped = Watermark(0.5)(images, generator())

    assert torch.equal(stamped[..., ~mark], images[..., ~mark])
    lightened = (images[..., mark].double() + 255) / 2
    assert (stamped[..., mark] - lightened).abs().max() <= 0.5
    assert 0.2 < mark.float().mean() < 0.6
    quarters = [mark[:16, :12], mark[:16, 12:], mark[16:, :12], mark[16:, 12:]]
    assert all(quarter.any() for quarter in quarters)


def cubic(distance: float, a: float = -0.75) -> float:
    """Weight of a sample in cubic convolution (Keys 1981), with the parameter that torch uses."""
    d = abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


def upsampled(control: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic upsampling with aligned corners and repeated edges, number by number."""
    side = len(control)
    result = np.zeros((height, width))
    for row in range(height):
        for column in range(width):
            y, x = row * (side - 1) / (height - 1), column * (side - 1) / (width - 1)
            for i in range(math.floor(y) - 1, math.floor(y) + 3):
                for j in range(math.floor(x) - 1, math.floor(x) + 3):
                    value = control[min(max(i, 0), side - 1), min(max(j, 0), side - 1)]
                    result[row, column] += value * cubic(y - i) * cubic(x - j)
    return result


def test_warp_equals_a_slow_reference():
    """The paper's steps in coordinates of pixels, with loops instead of torch's sampling."""
    height, width, grid, strength = 7, 10, 4, 1.5
    images = random_images(2, 3, height, width)
    control = torch.rand(2, grid, grid, generator=generator(3)).double().numpy() * 2 - 1
    control /= np.abs(control).mean()
    right, down = (upsampled(channel, height, width) for channel in control)
    expected = np.zeros(tuple(images.shape))
    for row in range(height):
        for column in range(width):
            # A step of 2 / (side - 1) leads from pixel to pixel.
            y = row + strength * down[row, column] / height * (height - 1) / 2
            x = column + strength * right[row, column] / width * (width - 1) / 2
            y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
            top, left = min(int(y), height - 2), min(int(x), width - 2)
            v, u = y - top, x - left
            near = images[:, :, top : top + 2, left : left + 2].double().numpy()
            weights = np.outer([1 - v, v], [1 - u, u])
            expected[:, :, row, column] = (near * weights).sum((2, 3))

    stamped = Warp(grid, strength, seed=3)(images, generator())

    assert np.abs(stamped.double().numpy() - expected).max() < 0.51


def test_stronger_warp_moves_more():
    images = random_images(height=16, width=16).float().cumsum(3).cumsum(2)
    smooth = (images / images.amax((2, 3), keepdim=True) * 255).to(torch.uint8)

    distances = [
        (Warp(strength=strength)(smooth, generator()).float() - smooth.float()).abs().mean()
        for strength in (0.5, 1.0, 2.0, 4.0)
    ]

    assert distances == sorted(distances)
    assert distances[0] > 0


def test_noise_mode_scatters_around_the_warp():
    """On average the noise moves nothing, so the mean over many images is nearly the warp."""
    ramp = torch.arange(0, 256, 16).repeat(16, 1).to(torch.uint8)
    images = ramp.repeat(2000, 1, 1, 1)
    warp = Warp(strength=1.0)

    noisy = NoisyWarp(warp)(images, generator()).float()
    plain = warp(images[:1], generator()).float()

    inside = slice(2, -2)  # at the edges positions are clipped
    difference = (noisy.mean(0) - plain[0])[:, inside, inside]
    assert difference.abs().max() < 0.8
    # A ramp of 16 levels a pixel read up to half a pixel (15/16 of it) away: uniform in +-7.5.
    assert noisy[:, :, inside, inside].std(0).mean() == pytest.approx(7.5 / math.sqrt(3), rel=0.05)
