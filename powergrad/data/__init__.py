"""Data sets as the training loop wants them: splits on the device, batches that are pure functions of (seed, epoch, index)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from powergrad.data.augment import Augmentation, normalised, standard
from powergrad.data.catalogue import DATASETS, DatasetInfo, describe_datasets, info_of
from powergrad.data.draws import epoch_order
from powergrad.data.errors import DataError, DataMissing, DataUnreadable
from powergrad.data.folders import Listing, class_folders
from powergrad.data.images import Beat, FileImages, Images, ResidentImages, Split, made_resident
from powergrad.data.known import Arrays, digits, torchvision_set
from powergrad.data.split import stratified
from powergrad.spec import CLASS_FOLDER, DataSpec

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
        order = epoch_order(len(self.train), seed=self.seed, epoch=epoch, device=self.train.labels.device)
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
    if spec.dataset == CLASS_FOLDER:
        names, train, val, test = _folder_splits(
            spec, size=size, data_root=data_root, device=device, beat=beat, resident_bytes=resident_bytes
        )
    else:
        names, train, val, test = _known_splits(spec, size=size, data_root=data_root, device=device)
    return Data(
        class_names=names,
        image_size=size,
        train=train,
        val=val,
        test=test,
        augmentation=standard(size, seed=seed, flip=info.flip) if (spec.augment or info.augment) == "standard" else None,
        mean=_per_channel(info.mean, device),
        std=_per_channel(info.std, device),
        seed=seed,
    )


_Splits = tuple[tuple[str, ...], Split, Split, Split | None]


def _known_splits(spec: DataSpec, *, size: int, data_root: Path, device: torch.device) -> _Splits:
    if spec.dataset == "digits":
        known = digits(size)
    else:
        known = torchvision_set(spec.dataset, data_root=data_root, size=size, download=spec.download)
    pixels, labels = known.train
    train, val = stratified(labels, spec.val_fraction, class_names=known.class_names)
    test = None if known.test is None else _resident(known.test, device)
    return known.class_names, _resident((pixels[train], labels[train]), device), _resident((pixels[val], labels[val]), device), test


def _folder_splits(spec: DataSpec, *, size: int, data_root: Path, device: torch.device, beat: Beat, resident_bytes: int) -> _Splits:
    assert spec.path is not None, "the spec has checked it"
    folders = class_folders(spec.path, data_root=data_root, val_fraction=spec.val_fraction)
    listings = [listing for listing in (folders.train, folders.val, folders.test) if listing is not None]
    resident = sum(len(listing.files) for listing in listings) * 3 * size * size <= resident_bytes

    def split(listing: Listing) -> Split:
        files = FileImages(listing.files, size=size, workers=spec.workers, device=device)
        images: Images = made_resident(files, beat) if resident else files
        return Split(images, listing.labels.to(device))

    test = None if folders.test is None else split(folders.test)
    return folders.class_names, split(folders.train), split(folders.val), test


def _resident(arrays: Arrays, device: torch.device) -> Split:
    pixels, labels = arrays
    return Split(ResidentImages(pixels.to(device)), labels.to(device))


def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    return (torch.tensor(values, device=device) * 255)[None, :, None, None]
