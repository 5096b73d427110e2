"""Where a split's images come from: a tensor on the device, or files decoded as they are needed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from powergrad.data.decode import decode
from powergrad.data.errors import DataUnreadable
from powergrad.process import die_with_parent


class Images(Protocol):
    """Images of one split, all of one size."""

    def __len__(self) -> int: ...

    def batches(self, index: Tensor, batch_size: int) -> Iterator[Tensor]:
        """The images at `index` (n,), in that order: (≤ batch_size, C, S, S) uint8 on the device, C 1 or 3."""
        ...


@dataclass(frozen=True)
class Split:
    """Images and their classes."""

    images: Images
    labels: Tensor
    """(N,) int64, on the device."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ResidentImages:
    """All images in one tensor on the device: (N, C, S, S) uint8."""

    pixels: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def batches(self, index: Tensor, batch_size: int) -> Iterator[Tensor]:
        for chunk in torch.split(index, batch_size):
            yield self.pixels[chunk]


@dataclass(frozen=True)
class FileImages:
    """Images decoded each time they are asked for, here or in `workers` processes; their number changes no bit."""

    files: tuple[Path, ...]
    size: int
    workers: int
    device: torch.device

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, index: Tensor, batch_size: int) -> Iterator[Tensor]:
        """Raises DataUnreadable that names the file."""
        loader: DataLoader[Any] = DataLoader(
            _Decoding(self.files, self.size),
            batch_size=None,
            sampler=[chunk.tolist() for chunk in torch.split(index.cpu(), batch_size)],
            num_workers=self.workers,
            collate_fn=_as_it_is,
            worker_init_fn=partial(_start_worker, os.getpid()),
            # forked, so that a worker starts in milliseconds; it touches neither CUDA nor a parallel region
            multiprocessing_context="fork" if self.workers else None,
            generator=torch.Generator(),  # its own: the loader draws a seed, and the global generator must not move
        )
        for pixels in loader:
            if isinstance(pixels, str):
                raise DataUnreadable(pixels)
            yield torch.from_numpy(pixels).to(self.device, non_blocking=True)


class _Decoding(Dataset[NDArray[np.uint8] | str]):
    """A list of places gives their images (n, 3, S, S), or the message of the file that cannot be read.

    Arrays and messages rather than tensors and exceptions: the first travel by pipe, not by shared memory (64 MiB in a container by
    default), the second would come back wrapped in a worker's traceback.
    """

    def __init__(self, files: tuple[Path, ...], size: int) -> None:
        self.files, self.size = files, size

    def __getitem__(self, index: list[int]) -> NDArray[np.uint8] | str:
        try:
            return np.stack([decode(self.files[i], self.size) for i in index])
        except DataUnreadable as error:
            return str(error)


def _as_it_is(value: object) -> object:
    return value


def _start_worker(trainer_pid: int, _: int) -> None:
    die_with_parent(trainer_pid)


def made_resident(images: FileImages, beat: Beat) -> ResidentImages:
    """Decodes every file once and keeps the result on the device. `beat` is called after each few images."""
    channels, size = 3, images.size
    pixels = torch.empty(len(images), channels, size, size, dtype=torch.uint8, device=images.device)
    done = 0
    for batch in images.batches(torch.arange(len(images)), batch_size=64):
        pixels[done : done + len(batch)] = batch
        done += len(batch)
        beat()
    return ResidentImages(pixels)


class Beat(Protocol):
    """A sign of life during long loading."""

    def __call__(self) -> None: ...


def resized(pixels: Tensor, size: int) -> Tensor:
    """(N, C, H, W) uint8 at size×size, bilinear, antialiased when shrinking, in chunks that bound the float copies."""
    if pixels.shape[-2:] == (size, size):
        return pixels
    shrinks = pixels.shape[-1] > size
    chunks = [
        F.interpolate(chunk.float(), size=(size, size), mode="bilinear", align_corners=False, antialias=shrinks)
        .round()
        .clamp(0, 255)
        .to(torch.uint8)
        for chunk in torch.split(pixels, 4096)
    ]
    return torch.cat(chunks)
