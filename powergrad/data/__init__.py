"""Data sets as the training loop wants them: splits on the device, batches that are pure functions of (seed, epoch, index)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from powergrad.data.augment import Augmentation, normalised, standard
from powergrad.data.catalogue import DATASETS, DatasetInfo, describe_datasets, info_of
from powergrad.data.errors import DataError, DataMissing, DataUnreadable
from powergrad.data.folders import class_folders, imagenet
from powergrad.data.images import Beat, Encoded, FileImages, Parts, Pixels, ResidentImages, Split, made_resident
from powergrad.data.known import digits, torchvision_set
from powergrad.data.split import with_validation
from powergrad.spec import ClassFolderData, DataSpec, DigitsData, ImageNetData, TorchvisionData

__all__ = [
    "DATASETS",
    "Batch",
    "Data",
    "DataError",
    "DataMissing",
    "DataUnreadable",
    "DatasetInfo",
    "Split",
    "describe_datasets",
    "open_data",
]

RESIDENT_BYTES = 2 * 2**30
"""Class folders that decode to no more than this are decoded once and kept on the device."""

Batch = tuple[Tensor, Tensor]
"""Images (B, 3, S, S) float32, normalised, channels last, and labels (B,) int64, on the device."""


@dataclass(frozen=True)
class Data:
    """An open data set."""

    class_names: tuple[str, ...]
    image_size: int
    train: Split
    val: Split
    test: Split | None
    """None where the data set brings none."""
    augmentation: Augmentation | None
    mean: Tensor
    std: Tensor
    """(1, 1 or 3, 1, 1) float32, of pixels in [0, 255]."""
    seed: int

    def train_batches(self, *, epoch: int, batch_size: int, first: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from number `first` on, all of `batch_size` (what is left over waits for another epoch's order)."""
        order = self.train.order(len(self.train), seed=self.seed, epoch=epoch, device=self.train.labels.device)
        whole = len(order) - len(order) % batch_size
        index = order[first * batch_size : whole]
        for chunk, pixels in zip(torch.split(index, batch_size), self.train.images.batches(index, batch_size), strict=True):
            augmented = pixels if self.augmentation is None else self.augmentation(pixels, chunk, epoch=epoch)
            yield normalised(augmented, mean=self.mean, std=self.std), self.train.labels[chunk]

    def held_out_batches(self, split: Split, *, batch_size: int) -> Iterator[Batch]:
        """All images of a split in order, as they are; the last batch may be smaller."""
        index = torch.arange(len(split), device=split.labels.device)
        for chunk, pixels in zip(torch.split(index, batch_size), split.images.batches(index, batch_size), strict=True):
            yield normalised(pixels, mean=self.mean, std=self.std), split.labels[chunk]


def open_data(
    spec: DataSpec,
    *,
    data_root: Path,
    seed: int,
    device: torch.device,
    beat: Beat = lambda: None,
    resident_bytes: int = RESIDENT_BYTES,
) -> Data:
    """The data set of a spec, split, on the device. `beat` is called now and then while it loads.

    resident_bytes: class folders larger than this, decoded, are read from their files each epoch instead; no bit depends on it.
    Raises DataMissing, DataUnreadable.
    """
    info = info_of(spec.dataset)
    size = spec.image_size or info.image_size
    parts = _parts(spec, size=size, data_root=data_root)
    given = [part for part in (parts.train, parts.val, parts.test) if part is not None]
    resident = sum(map(len, given)) * 3 * size * size <= resident_bytes
    opened = partial(_opened, size=size, workers=getattr(spec, "workers", 0), resident=resident, device=device, beat=beat)
    assert parts.val is not None, "a set without a validation split has one held out"
    return Data(
        class_names=parts.class_names,
        image_size=size,
        train=opened(parts.train),
        val=opened(parts.val),
        test=None if parts.test is None else opened(parts.test),
        augmentation=standard(size, seed=seed, flip=info.flip) if (spec.augment or info.augment) == "standard" else None,
        mean=_per_channel(info.mean, device),
        std=_per_channel(info.std, device),
        seed=seed,
    )


def _parts(spec: DataSpec, *, size: int, data_root: Path) -> Parts:
    match spec:
        case DigitsData():
            return with_validation(digits(size), spec.val_fraction)
        case TorchvisionData():
            return with_validation(torchvision_set(spec.dataset, data_root=data_root, size=size, download=spec.download), spec.val_fraction)
        case ClassFolderData():
            return with_validation(class_folders(spec.path, data_root=data_root), spec.val_fraction)
        case ImageNetData():
            return imagenet(spec.path, data_root=data_root)
        case _:
            raise DataMissing(f"dataset={spec.dataset!r}: this worker does not know it")


def _opened(part: Pixels | Encoded, *, size: int, workers: int, resident: bool, device: torch.device, beat: Beat) -> Split:
    if isinstance(part, Pixels):
        return Split(ResidentImages(part.pixels.to(device)), part.labels.to(device))
    files = FileImages(part, size=size, workers=workers, device=device)
    return Split(made_resident(files, beat) if resident else files, part.labels.to(device), part.order)


def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    return (torch.tensor(values, device=device) * 255)[None, :, None, None]
