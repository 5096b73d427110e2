"""Augmentation moves and mirrors whole images, by draws that belong to each image."""

from __future__ import annotations

import torch

from powergrad.data.augment import Augmentation, PadCrop, normalised, standard
from powergrad.data.draws import Stream, integers

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
