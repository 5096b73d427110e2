"""Training images on their way into the network: shifted, mirrored, normalised, on the device, a batch at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from powergrad.data.draws import Stream, integers

PAD_SHARE = 8  # 4 pixels of 32: the CIFAR recipe of He et al. 2016 (arXiv 1512.03385, section 4.2), scaled to the image


@dataclass(frozen=True)
class Augmentation:
    """A random crop of the image padded with black, and a mirror image half of the time."""

    seed: int
    pad: int
    """Pixels on each side; 0 is no crop."""
    flip: bool

    def __call__(self, images: Tensor, index: Tensor, *, epoch: int) -> Tensor:
        """images: (N, C, S, S) uint8; index: (N,) int64, their places in the data set, which decide the draws. Returns the same shape."""
        if self.pad == 0 and not self.flip:
            return images
        size = images.shape[-1]
        steps = torch.arange(size, device=images.device)
        rows = steps + self._shift(index, epoch, Stream.SHIFT_Y)[:, None]  # (N, S)
        columns = steps + self._shift(index, epoch, Stream.SHIFT_X)[:, None]  # (N, S)
        if self.flip:
            mirrored = integers(index, 2, seed=self.seed, stream=Stream.FLIP, epoch=epoch).bool()
            columns = torch.where(mirrored[:, None], columns.flip(1), columns)
        return _take(images, rows, columns)

    def _shift(self, index: Tensor, epoch: int, stream: Stream) -> Tensor:
        """(N,) whole pixels in [-pad, pad]."""
        return integers(index, 2 * self.pad + 1, seed=self.seed, stream=stream, epoch=epoch) - self.pad


def standard(image_size: int, *, seed: int, flip: bool) -> Augmentation:
    """The standard augmentation for images of that side."""
    return Augmentation(seed=seed, pad=max(1, image_size // PAD_SHARE), flip=flip)


def normalised(images: Tensor, *, mean: Tensor, std: Tensor) -> Tensor:
    """(N, 1 or 3, S, S) uint8 as (N, 3, S, S) float32, channels last; mean and std: (1, 1 or 3, 1, 1), of pixels in [0, 255]."""
    pixels = ((images - mean) / std).expand(-1, 3, -1, -1)
    return pixels.contiguous(memory_format=torch.channels_last)


def _take(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """images[n, :, rows[n, i], columns[n, j]], black where a row or column lies outside."""
    size = images.shape[-1]
    inside = ((rows >= 0) & (rows < size))[:, :, None] & ((columns >= 0) & (columns < size))[:, None, :]  # (N, S, S)
    each = torch.arange(len(images), device=images.device)[:, None, None]
    taken = images.permute(0, 2, 3, 1)[each, rows.clamp(0, size - 1)[:, :, None], columns.clamp(0, size - 1)[:, None, :]]  # (N, S, S, C)
    return (taken * inside[..., None]).permute(0, 3, 1, 2)
