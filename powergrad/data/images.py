"""Where a split's images come from: a tensor on the device, or encoded images decoded as they are needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from powergrad.data.decode import Box, Source, decode
from powergrad.data.draws import epoch_order
from powergrad.data.errors import DataUnreadable
from powergrad.process import die_with_parent


class Crop(Protocol):
    """Which part of each image an epoch takes: a pure function, and picklable, for it travels to the loader's workers."""

    def __call__(self, index: int, epoch: int, height: int, width: int) -> Box | None:
        """index: the image's place in its split.  height, width: in pixels, upright.  None is the middle square."""
        ...


class Order(Protocol):
    """The order of an epoch as a pure function."""

    def __call__(self, count: int, *, seed: int, epoch: int, device: torch.device | str) -> Tensor:
        """A permutation of range(count), (count,) int64 on the device."""
        ...


class Beat(Protocol):
    """A sign of life during long loading."""

    def __call__(self) -> None: ...


class Images(Protocol):
    """Images of one split, all of one size."""

    def __len__(self) -> int: ...

    def batches(self, index: Tensor, batch_size: int, *, epoch: int = 0, crop: Crop | None = None) -> Iterator[Tensor]:
        """The images at `index` (n,), in that order: (≤ batch_size, C, S, S) uint8 on the device, C 1 or 3.

        crop: which part of each is taken, from its original pixels, in that epoch; images that are kept as tensors have none left.
        """
        ...

    def digest(self, update: Callable[[bytes], None]) -> None:
        """Tells `update` what identifies the images, in their order."""
        ...


@dataclass(frozen=True)
class Split:
    """Images and their classes."""

    images: Images
    labels: Tensor
    """(N,) int64, on the device."""
    order: Order = epoch_order
    """In which order an epoch goes through them."""
    files: Encoded | None = None
    """Where they come from; None where they never were files of their own."""

    def __len__(self) -> int:
        return len(self.labels)

    def names(self, index: Sequence[int]) -> dict[int, str]:
        """What the images at `index` are called, by their places; none where they never were files."""
        wanted = set(index)
        return {} if self.files is None else {place: name for place, name in enumerate(self.files.names()) if place in wanted}

    def originals(self, index: Sequence[int], size: int) -> NDArray[np.uint8]:
        """(n, C, S, S), S being `size` where there are files to decode again, else the images' own.  Raises DataUnreadable."""
        places = torch.tensor(index, dtype=torch.int64, device=self.labels.device)
        images = self.images if self.files is None else FileImages(self.files, size, workers=0, device=torch.device("cpu"))
        return torch.cat(list(images.batches(places, 64))).cpu().numpy()


@dataclass(frozen=True)
class Pixels:
    """Images of one split that are in memory already."""

    pixels: Tensor
    """(N, C, S, S) uint8, on the CPU."""
    labels: Tensor
    """(N,) int64, on the CPU."""

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Tensor) -> Pixels:
        return Pixels(self.pixels[index], self.labels[index])


class Encoded(Protocol):
    """Images of one split as they lie in files; picklable."""

    @property
    def labels(self) -> Tensor:
        """(N,) int64, on the CPU."""
        ...

    @property
    def order(self) -> Order: ...

    def __len__(self) -> int: ...

    def fetch(self, index: Sequence[int]) -> Iterable[tuple[str, Source]]:
        """Name and source of each image at `index`, for `decode`.  Raises DataUnreadable that names what cannot be read."""
        ...

    def names(self) -> Iterator[str]:
        """What each image is called, the same wherever the data lie."""
        ...

    def subset(self, index: Tensor) -> Self:
        """index: rising places."""
        ...


@dataclass(frozen=True)
class Parts:
    """A data set as it was found."""

    class_names: tuple[str, ...]
    train: Pixels | Encoded
    val: Pixels | Encoded | None
    """None where it brings none; `with_validation` then holds a share of train out."""
    test: Pixels | Encoded | None
    """None where it brings none."""


@dataclass(frozen=True)
class ResidentImages:
    """All images in one tensor on the device: (N, C, S, S) uint8."""

    pixels: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def batches(self, index: Tensor, batch_size: int, *, epoch: int = 0, crop: Crop | None = None) -> Iterator[Tensor]:
        assert crop is None, f"epoch {epoch}: the original pixels are gone"
        for chunk in torch.split(index, batch_size):
            yield self.pixels[chunk]

    def digest(self, update: Callable[[bytes], None]) -> None:
        for chunk in torch.split(self.pixels, 4096):
            update(chunk.cpu().numpy().tobytes())


@dataclass(frozen=True)
class FileImages:
    """Images decoded each time they are asked for, here or in `workers` processes; their number changes no bit."""

    files: Encoded
    size: int
    workers: int
    device: torch.device

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, index: Tensor, batch_size: int, *, epoch: int = 0, crop: Crop | None = None) -> Iterator[Tensor]:
        """Raises DataUnreadable that names the file."""
        loader: DataLoader[Any] = DataLoader(
            _Decoding(self.files, self.size, epoch=epoch, crop=crop),
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

    def digest(self, update: Callable[[bytes], None]) -> None:
        """By their names and places: reading all of them would take as long as an epoch."""
        for name in self.files.names():
            update(name.encode(errors="surrogateescape") + b"\0")


class _Decoding(Dataset[NDArray[np.uint8] | str]):
    """A list of places gives their images (n, 3, S, S), or the message of the file that cannot be read.

    Arrays and messages rather than tensors and exceptions: the first travel by pipe, not by shared memory (64 MiB in a container by
    default), the second would come back wrapped in a worker's traceback.
    """

    def __init__(self, files: Encoded, size: int, *, epoch: int, crop: Crop | None) -> None:
        self.files, self.size, self.epoch, self.crop = files, size, epoch, crop

    def __getitem__(self, index: list[int]) -> NDArray[np.uint8] | str:
        try:
            sources = zip(index, self.files.fetch(index), strict=True)
            return np.stack([self._decoded(place, name, source) for place, (name, source) in sources])
        except DataUnreadable as error:
            return str(error)

    def _decoded(self, place: int, name: str, source: Source) -> NDArray[np.uint8]:
        crop = None if self.crop is None else partial(self.crop, place, self.epoch)
        return decode(source, self.size, crop=crop, name=name)


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
