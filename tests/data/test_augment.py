"""Augmentation moves, mirrors, crops and erases by draws that belong to each image."""

from __future__ import annotations

import pytest
import torch
from scipy import stats  # type: ignore[import-untyped]
from torch import Tensor
from torchvision.transforms import v2  # type: ignore[import-untyped]
from torchvision.transforms.v2 import functional as vision  # type: ignore[import-untyped]

from powergrad.data.augment import (
    CROP_RATIO,
    Augmentation,
    Erasing,
    PadCrop,
    ResizedCrop,
    build,
    build_erasing,
    normalised,
    resized_crop_boxes,
    standard,
)
from powergrad.data.draws import Stream, integers, repeated, uniforms
from powergrad.data.policies import RandAugment, TrivialAugment
from powergrad.spec import AugmentSpec, RandAugmentSpec, TrivialAugmentSpec

IMAGES = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
INDEX = torch.arange(100, 140)


def one_by_one(images: torch.Tensor, index: torch.Tensor, augmentation: Augmentation, epoch: int) -> torch.Tensor:
    """The same by padding, slicing and flipping each image alone."""
    assert isinstance(augmentation.crop, PadCrop)
    pad, size, out = augmentation.crop.pad, images.shape[-1], []
    for image, i in zip(images, index, strict=True):
        dy, dx, mirror = (
            int(integers(i, below, seed=augmentation.seed, stream=stream, epoch=epoch))
            for stream, below in ((Stream.SHIFT_Y, 2 * pad + 1), (Stream.SHIFT_X, 2 * pad + 1), (Stream.FLIP, 2))
        )
        crop = torch.nn.functional.pad(image, (pad,) * 4)[:, dy : dy + size, dx : dx + size]
        out.append(crop.flip(2) if mirror and augmentation.flip else crop)
    return torch.stack(out)


def test_a_batch_is_what_each_image_alone_would_be() -> None:
    for flip in (False, True):
        augmentation = standard(16, seed=3, flip=flip)
        assert torch.equal(augmentation(IMAGES, INDEX, epoch=2), one_by_one(IMAGES, INDEX, augmentation, 2))


def test_the_split_into_batches_changes_nothing() -> None:
    augmentation = standard(16, seed=3, flip=True)
    parts = [augmentation(IMAGES[i : i + 7], INDEX[i : i + 7], epoch=1) for i in range(0, 40, 7)]
    assert torch.equal(torch.cat(parts), augmentation(IMAGES, INDEX, epoch=1))


def test_the_next_epoch_augments_anew() -> None:
    augmentation = standard(16, seed=3, flip=False)
    assert not torch.equal(augmentation(IMAGES, INDEX, epoch=0), augmentation(IMAGES, INDEX, epoch=1))


def test_the_pad_is_an_eighth_of_the_side() -> None:
    assert [standard(size, seed=0, flip=False).crop for size in (8, 16, 32, 224)] == [PadCrop(1), PadCrop(2), PadCrop(4), PadCrop(28)]


def test_one_channel_is_normalised_and_becomes_three() -> None:
    grey = IMAGES[:, :1]
    out = normalised(grey, mean=torch.full((1, 1, 1, 1), 51.0), std=torch.full((1, 1, 1, 1), 102.0))
    assert out.shape == (40, 3, 16, 16)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, ((grey.float() - 51) / 102).repeat(1, 3, 1, 1))


def crop_boxes(index: Tensor, height: int, width: int, *, scale: tuple[float, float] = (0.08, 1.0), epoch: int = 0) -> Tensor:
    return resized_crop_boxes(index, sizes=torch.tensor([[height, width]]).expand(len(index), 2), seed=5, epoch=epoch, scale=scale)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [15, 32])
def test_a_resized_crop_is_torchvisions_of_the_same_box(size: int, channels: int) -> None:
    """Of float pixels, antialiased: rounding to a level is half of one, and float32 weights at 255 are off by 1e-4 at most."""
    images = torch.randint(0, 256, (60, channels, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    index = torch.arange(60)
    found = ResizedCrop()(images, index, seed=5, epoch=0)
    assert found.dtype == torch.uint8
    for image, crop, (left, top, right, bottom) in zip(images, found, crop_boxes(index, size, size).tolist(), strict=True):
        expected = vision.resized_crop(image.float(), top, left, bottom - top, right - left, [size, size], antialias=True)
        assert (crop.float() - expected).abs().max() <= 0.5 + 1e-4


@pytest.mark.parametrize(("height", "width"), [(400, 300), (100, 500), (32, 32)])
def test_crop_boxes_are_distributed_as_torchvisions(height: int, width: int) -> None:
    """Two-sample Kolmogorov-Smirnov over width, height and corner: p under 1e-3 once in a thousand seeds, and this seed is fixed."""
    left, top, right, bottom = crop_boxes(torch.arange(2000), height, width).unbind(1)
    transform, image = v2.RandomResizedCrop(8), torch.zeros(3, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [transform.make_params([image]) for _ in range(2000)]
    for values, name in ((right - left, "width"), (bottom - top, "height"), (left, "left"), (top, "top")):
        assert stats.ks_2samp(values.numpy(), [params[name] for params in drawn]).pvalue > 1e-3


def test_crop_boxes_lie_within_their_images_and_ratios() -> None:
    index = torch.arange(500)
    sizes = torch.stack([100 + index % 90, 120 + index % 70], dim=1)
    left, top, right, bottom = resized_crop_boxes(index, sizes=sizes, seed=0, epoch=0, scale=(0.3, 0.9)).unbind(1)
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (right <= sizes[:, 1]).all()
    assert (bottom <= sizes[:, 0]).all()
    wide, high = (right - left).double(), (bottom - top).double()
    # sides of 50 pixels and more, each rounded by half of one: 2 % of the ratio, 2 % of the area
    assert (wide / high).min() > 0.98 * CROP_RATIO[0]
    assert (wide / high).max() < 1.02 * CROP_RATIO[1]
    share = wide * high / sizes.prod(1)
    assert share.min() > 0.98 * 0.3
    assert share.max() < 1.02 * 0.9


@pytest.mark.parametrize(
    ("height", "width", "box"), [(10, 1000, [493, 0, 506, 10]), (1000, 10, [0, 493, 10, 506]), (50, 50, [0, 0, 50, 50])]
)
def test_where_no_box_fits_it_is_the_largest_in_the_middle(height: int, width: int, box: list[int]) -> None:
    """The whole area fits no permitted ratio of a long image; a square one is kept whole."""
    index = torch.arange(20)
    scale = (1.0, 1.0) if height != width else (4.0, 4.0)
    assert crop_boxes(index, height, width, scale=scale).tolist() == [box] * 20


def test_an_images_box_depends_on_no_other() -> None:
    index = torch.arange(100)
    sizes = torch.stack([200 + index, 300 - index], dim=1)
    whole = resized_crop_boxes(index, sizes=sizes, seed=1, epoch=2)
    alone = [resized_crop_boxes(index[i : i + 1], sizes=sizes[i : i + 1], seed=1, epoch=2) for i in range(100)]
    assert torch.equal(torch.cat(alone), whole)
    assert not torch.equal(resized_crop_boxes(index, sizes=sizes, seed=1, epoch=3), whole)


def test_the_split_of_resized_crops_changes_nothing() -> None:
    augmentation = Augmentation(3, ResizedCrop(), flip=True)
    parts = [augmentation(IMAGES[i : i + 7], INDEX[i : i + 7], epoch=1) for i in range(0, 40, 7)]
    assert torch.equal(torch.cat(parts), augmentation(IMAGES, INDEX, epoch=1))


def test_half_of_the_images_are_mirrored() -> None:
    """20,000 fair draws: 0.5 within 4 standard errors, 0.0141."""
    images = torch.tensor([0, 1], dtype=torch.uint8).expand(20_000, 1, 2, 2)
    mirrored = Augmentation(9, None, flip=True)(images, torch.arange(20_000), epoch=0)[:, 0, 0, 0].double()
    assert abs(float(mirrored.mean()) - 0.5) < 0.0141


def test_nothing_to_do_gives_the_images_themselves() -> None:
    assert Augmentation(0, None, flip=False)(IMAGES, INDEX, epoch=0) is IMAGES


def test_erasing_is_torchvisions_of_the_same_box() -> None:
    images, index = torch.randn(50, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(50)
    erasing = Erasing(seed=2, p=0.6)
    found = erasing(images, index, epoch=1)
    boxes = erasing.boxes(index, size=16, epoch=1).tolist()
    erased = [torch.equal(found[i], images[i]) is False for i in range(50)]
    assert 0 < sum(erased) < 50
    for image, result, changed, (left, top, right, bottom) in zip(images, found, erased, boxes, strict=True):
        expected = vision.erase(image, top, left, bottom - top, right - left, torch.zeros(1, 1, 1)) if changed else image
        assert torch.equal(result, expected)


def test_erased_boxes_are_distributed_as_torchvisions() -> None:
    """As for crops. Where no box fitted, ours is empty and torchvision's is left out (v is None)."""
    left, top, right, bottom = Erasing(seed=0, p=1.0).boxes(torch.arange(2000), size=32, epoch=0).unbind(1)
    transform, image = v2.RandomErasing(p=1.0), torch.zeros(3, 32, 32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [params for params in (transform.make_params([image]) for _ in range(2000)) if params["v"] is not None]
    for values, name in ((right - left, "w"), (bottom - top, "h"), (left, "j"), (top, "i")):
        assert stats.ks_2samp(values.numpy(), [params[name] for params in drawn]).pvalue > 1e-3


@pytest.mark.parametrize("p", [0.25, 1.0])
def test_erasing_touches_its_share_of_the_images(p: float) -> None:
    """20,000 draws: within 4 standard errors, 4 * sqrt(p (1 - p) / 20,000)."""
    images = torch.ones(20_000, 1, 16, 16)
    share = float((Erasing(seed=0, p=p)(images, torch.arange(20_000), epoch=0) == 0).flatten(1).any(1).double().mean())
    assert abs(share - p) <= 4 * (p * (1 - p) / 20_000) ** 0.5


def test_the_split_of_erasing_changes_nothing_and_the_format_is_kept() -> None:
    images = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=torch.channels_last)
    erasing = Erasing(seed=1, p=0.5)
    whole = erasing(images, INDEX, epoch=0)
    assert torch.equal(torch.cat([erasing(images[i : i + 7], INDEX[i : i + 7], epoch=0) for i in range(0, 40, 7)]), whole)
    assert whole.is_contiguous(memory_format=torch.channels_last)


def test_a_spec_builds_its_parts() -> None:
    def built(spec: AugmentSpec) -> Augmentation | None:
        return build(spec, size=32, seed=4, flip_default=True)

    assert built(AugmentSpec()) == standard(32, seed=4, flip=True)
    assert built(AugmentSpec(crop="none", flip=False)) is None
    assert built(AugmentSpec(crop="resized", flip=False)) == Augmentation(4, ResizedCrop(scale=(0.08, 1.0)), flip=False)
    assert built(AugmentSpec(crop="resized", crop_scale=0.5)) == Augmentation(4, ResizedCrop(scale=(0.5, 1.0)), flip=True)
    trivial = AugmentSpec(crop="none", policy=TrivialAugmentSpec(name="trivial"))
    assert built(trivial) == Augmentation(4, None, flip=True, policy=TrivialAugment())
    rand = AugmentSpec(crop="none", flip=False, policy=RandAugmentSpec(name="rand", num_ops=3, magnitude=7))
    assert built(rand) == Augmentation(4, None, flip=False, policy=RandAugment(num_ops=3, magnitude=7))


def test_a_spec_builds_its_erasing() -> None:
    assert build_erasing(AugmentSpec(), seed=0) is None
    assert build_erasing(AugmentSpec(erasing=0.25), seed=3) == Erasing(3, 0.25)


def test_uniform_draws_are_even() -> None:
    """Kolmogorov-Smirnov over 100,000 draws, of indices and of repeats: p as above."""
    for index in (torch.arange(100_000), repeated(torch.arange(10_000), 10).flatten()):
        drawn = uniforms(index, seed=0, stream=Stream.ERASE)
        assert drawn.min() >= 0
        assert drawn.max() < 1
        assert stats.kstest(drawn.numpy(), "uniform").pvalue > 1e-3
