"""Policies do to each image what torchvision's operation of the same strength does to it alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2  # type: ignore[import-untyped]
from torchvision.transforms.v2.functional._geometry import _get_inverse_affine_matrix  # type: ignore[import-untyped]

from powergrad.data.augment import Augmentation, PadCrop
from powergrad.data.policies import LEVELS, Drawn, Op, RandAugment, TrivialAugment, altered

POLICIES: dict[str, tuple[TrivialAugment | RandAugment, v2.Transform]] = {
    "trivial": (TrivialAugment(), v2.TrivialAugmentWide()),
    "rand": (RandAugment(), v2.RandAugment()),
}
# torchvision's own names, in its order: its private table is the only list of strengths there is
NAMES = tuple(v2.TrivialAugmentWide._AUGMENTATION_SPACE)
GEOMETRIC = (Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y, Op.ROTATE)
BLENDS = (Op.COLOR, Op.CONTRAST, Op.SHARPNESS)
EVERY_LEVEL = torch.arange(LEVELS).repeat(2)
BOTH_WAYS = torch.arange(2).repeat_interleave(LEVELS)


def noise(count: int, channels: int, size: int) -> Tensor:
    """Neighbours that differ widely: a pixel taken from the wrong place shows."""
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))


def smooth(count: int, channels: int, size: int) -> Tensor:
    """Ramps over part of the range, which autocontrast and equalize stretch; the first image is of one grey."""
    ramp = torch.arange(size * size).view(size, size) * 150 // (size * size) + 40
    images = torch.stack([(ramp.rot90(n % 4) + 7 * c).clamp(max=255) for n in range(count) for c in range(channels)])
    images[:channels] = 90
    return images.view(count, channels, size, size).to(torch.uint8)


def strength(transform: v2.Transform, op: Op, *, level: int, negative: int, size: int) -> float:
    magnitudes, signed = transform._AUGMENTATION_SPACE[NAMES[op]]
    values = magnitudes(LEVELS, size, size)
    return 0.0 if values is None else float(values[level]) * (-1 if signed and negative else 1)


def torchvisions(transform: v2.Transform, images: Tensor, drawn: Drawn) -> Tensor:
    """torchvision's functional operations, image by image."""
    out = []
    for image, op, level, negative in zip(images, drawn.op.tolist(), drawn.level.tolist(), drawn.negative.tolist(), strict=True):
        by = strength(transform, Op(op), level=level, negative=negative, size=images.shape[-1])
        out.append(transform._apply_image_or_video_transform(image, NAMES[op], by, transform.interpolation, transform._fill))
    return torch.stack(out)


def all_of(op: Op) -> Drawn:
    return Drawn(torch.full_like(EVERY_LEVEL, op), EVERY_LEVEL, BOTH_WAYS)


def between_two_pixels(transform: v2.Transform, drawn: Drawn, size: int) -> Tensor:
    """(N, 1, size, size) bool: where the pixel's place in the source is half-way between two pixels, by torchvision's matrix in float64."""
    out, steps = [], torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    for op, level, negative in zip(drawn.op.tolist(), drawn.level.tolist(), drawn.negative.tolist(), strict=True):
        by = strength(transform, Op(op), level=level, negative=negative, size=size)
        degrees = math.degrees(math.atan(by))
        centre = [-size / 2, -size / 2] if op in (Op.SHEAR_X, Op.SHEAR_Y) else [0.0, 0.0]
        shear = [degrees if op == Op.SHEAR_X else 0.0, degrees if op == Op.SHEAR_Y else 0.0]
        a, b, c, d, e, f = _get_inverse_affine_matrix(centre, -by if op == Op.ROTATE else 0.0, [0.0, 0.0], 1.0, shear)
        places = torch.stack([a * steps + b * steps[:, None] + c, d * steps + e * steps[:, None] + f]) + (size - 1) / 2
        out.append(((places - places.floor() - 0.5).abs() < 1e-4).any(0, keepdim=True))
    return torch.stack(out)


def test_the_operations_are_torchvisions_in_its_order() -> None:
    assert tuple(name.lower() for name in NAMES) == tuple(op.name.replace("_", "").lower() for op in Op)
    assert tuple(v2.RandAugment._AUGMENTATION_SPACE) == NAMES


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("op", [op for op in Op if op not in (*GEOMETRIC, *BLENDS)])
def test_an_operation_equals_torchvisions_at_every_strength(op: Op, name: str, channels: int) -> None:
    policy, transform = POLICIES[name]
    for images in (noise(2 * LEVELS, channels, 16), smooth(2 * LEVELS, channels, 16)):
        assert torch.equal(altered(images, all_of(op), policy.space(16), look=True), torchvisions(transform, images, all_of(op)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("op", GEOMETRIC)
def test_a_move_takes_the_pixels_that_torchvisions_takes(op: Op, name: str, channels: int) -> None:
    """Except half-way between two, where torchvision's float32 matrix product decides by its rounding. Odd sizes and translations included."""
    policy, transform = POLICIES[name]
    for size in (17, 32):
        images = noise(2 * LEVELS, channels, size)
        found, expected = altered(images, all_of(op), policy.space(size), look=True), torchvisions(transform, images, all_of(op))
        assert not torch.equal(found, images)
        other = (found != expected) & ~between_two_pixels(transform, all_of(op), size)
        assert not other.any()
        assert (found != expected).float().mean() < 0.01  # so that the exception stays one; 0.002 is usual


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("op", BLENDS)
def test_a_blend_is_torchvisions_but_for_rounding(op: Op, name: str, channels: int) -> None:
    """Values are cut off below, so where the exact one is whole (1 % of them), the last bit decides: one level, on 0.2 % of the pixels."""
    policy, transform = POLICIES[name]
    for images in (noise(2 * LEVELS, channels, 16), smooth(2 * LEVELS, channels, 16)):
        found, expected = altered(images, all_of(op), policy.space(16), look=True), torchvisions(transform, images, all_of(op))
        assert (found.int() - expected.int()).abs().max() <= 1
        assert (found != expected).float().mean() < 0.005


def test_color_leaves_grey_images_as_they_are() -> None:
    images = noise(2 * LEVELS, 1, 16)
    assert torch.equal(altered(images, all_of(Op.COLOR), TrivialAugment().space(16), look=True), images)


@pytest.mark.parametrize("policy", [TrivialAugment(), RandAugment(num_ops=3, magnitude=20)])
def test_computing_all_and_choosing_gives_the_same_bits(policy: TrivialAugment | RandAugment) -> None:
    """What a GPU does with small batches."""
    images, index = noise(100, 3, 16), torch.arange(100)
    drawn = policy.drawn(index, seed=1, epoch=0)
    for each in drawn if isinstance(drawn, list) else [drawn]:
        assert torch.equal(altered(images, each, policy.space(16), look=False), altered(images, each, policy.space(16), look=True))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", [TrivialAugment(), RandAugment(num_ops=3, magnitude=20)])
def test_the_split_into_batches_changes_no_bit(policy: TrivialAugment | RandAugment, channels: int) -> None:
    images, index = noise(100, channels, 16), torch.arange(1000, 1100)
    augmentation = Augmentation(5, PadCrop(2), flip=True, policy=policy)
    whole = augmentation(images, index, epoch=3)
    for size in (1, 7, 50):
        parts = [augmentation(images[i : i + size], index[i : i + size], epoch=3) for i in range(0, 100, size)]
        assert torch.equal(torch.cat(parts), whole)


def test_neither_the_images_nor_a_global_generator_change() -> None:
    images, index, state = noise(50, 3, 16), torch.arange(50), torch.get_rng_state()
    TrivialAugment()(images, index, seed=0, epoch=0)
    assert torch.equal(images, noise(50, 3, 16))
    assert torch.equal(torch.get_rng_state(), state)


def test_rand_augment_applies_its_operations_in_turn() -> None:
    images, index = noise(60, 3, 16), torch.arange(60)
    policy = RandAugment(num_ops=2, magnitude=12)
    first, second = policy.drawn(index, seed=2, epoch=1)
    once = altered(images, first, policy.space(16), look=True)
    assert torch.equal(policy(images, index, seed=2, epoch=1), altered(once, second, policy.space(16), look=True))
    assert set(first.level.tolist()) == {12}


def test_a_further_operation_leaves_the_first_ones_as_drawn() -> None:
    index = torch.arange(100)
    two, three = (RandAugment(num_ops=n).drawn(index, seed=0, epoch=0) for n in (2, 3))
    assert all(torch.equal(a.op, b.op) and torch.equal(a.negative, b.negative) for a, b in zip(two, three[:2], strict=True))
    assert not torch.equal(three[0].op, three[1].op)


def test_operations_strengths_and_directions_are_drawn_evenly() -> None:
    """Chi-square of 100,000 draws: 99.9 % points at 13, 30 and 1 degrees of freedom."""
    drawn = TrivialAugment().drawn(torch.arange(100_000), seed=0, epoch=0)
    for values, below, limit in ((drawn.op, len(Op), 34.5), (drawn.level, LEVELS, 59.7), (drawn.negative, 2, 10.8)):
        counts = torch.bincount(values, minlength=below).double()
        assert len(counts) == below
        assert float(((counts - 1e5 / below) ** 2 / (1e5 / below)).sum()) < limit


def test_epochs_and_seeds_draw_anew() -> None:
    images, index = noise(50, 3, 16), torch.arange(50)
    results = [TrivialAugment()(images, index, seed=seed, epoch=epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert not any(torch.equal(results[i], results[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
