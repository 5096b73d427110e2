"""Data sets as the training loop wants them: splits on the device, batches that are pure functions of (seed, epoch, index)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from powergrad.data.augment import Augmentation, Erasing, FileCrop, ResizedCrop, build, build_erasing, normalised
from powergrad.data.catalogue import DATASETS, DatasetInfo, describe_datasets, info_of
from powergrad.data.errors import DataError, DataMissing, DataUnreadable
from powergrad.data.folders import class_folders, imagenet
from powergrad.data.glyphs import glyphs
from powergrad.data.images import Beat, Encoded, FileImages, Parts, Pixels, ResidentImages, Split, made_resident
from powergrad.data.known import digits, torchvision_set
from powergrad.data.mixing import Mixing, build_mixing
from powergrad.data.shards import webdataset
from powergrad.data.split import with_validation
from powergrad.spec import (
    CLASS_FOLDER,
    AugmentSpec,
    ClassFolderData,
    DataSpec,
    DigitsData,
    GlyphsData,
    ImageNetData,
    NamedData,
    TorchvisionData,
    WebDatasetData,
)

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

AUGMENTATIONS = {
    "none": AugmentSpec(crop="none", flip=False),
    "standard": AugmentSpec(crop="pad"),
    "imagenet": AugmentSpec(crop="resized"),
}
"""What the names stand for."""

Part = tuple[Tensor, Tensor, Tensor]
"""Images (b, 3, S, S) float32, normalised, channels last; targets, (b,) int64 classes or (b, C) float32 probabilities where images are
mixed; and the images' own classes (b,). On the device."""


@dataclass(frozen=True)
class Batch:
    """What one step is taken on: this rank's parts of it, to be computed one after the other."""

    labels: Tensor
    """(B,) int64, of all parts of all ranks."""
    parts: tuple[Part, ...]
    is_mixed: bool


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
    """Of uint8 images."""
    mean: Tensor
    std: Tensor
    """(1, 1 or 3, 1, 1) float32, of pixels in [0, 255]."""
    seed: int
    crop: FileCrop | None = None
    """Taken from an encoded image's original pixels."""
    erasing: Erasing | None = None
    mixing: Mixing | None = None

    def train_batches(
        self, *, epoch: int, batch_size: int, first: int = 0, parts: int = 1, rank: int = 0, ranks: int = 1
    ) -> Iterator[Batch]:
        """The batches of one epoch from number `first` on, all of `batch_size` (what is left over waits for another epoch's order).

        Of each batch this rank's share, in `parts`; their product with `ranks` divides batch_size. An image and what becomes of it are
        the same however the batch is shared out.
        """
        order = self.train.order(len(self.train), seed=self.seed, epoch=epoch, device=self.train.labels.device)
        whole = order[: len(order) - len(order) % batch_size].view(-1, batch_size)[first:]  # (batches, B)
        places = torch.arange(batch_size, device=order.device).view(parts, ranks, -1)[:, rank]  # (parts, b)
        if self.mixing is not None:  # each part with the image after its last
            places = torch.cat((places, (places[:, -1:] + 1) % batch_size), dim=1)
        index = whole[:, places].flatten()
        pixels = self.train.images.batches(index, places.shape[1], epoch=epoch, crop=self.crop)
        for members in whole:
            mine = tuple(self._part(next(pixels), members[at], epoch=epoch) for at in places)
            yield Batch(self.train.labels[members], mine, is_mixed=self.mixing is not None)

    def _part(self, pixels: Tensor, index: Tensor, *, epoch: int) -> Part:
        if self.augmentation is not None:
            pixels = self.augmentation(pixels, index, epoch=epoch)
        images, labels = normalised(pixels, mean=self.mean, std=self.std), self.train.labels[index]
        if self.erasing is not None:
            images = self.erasing(images, index, epoch=epoch)
        if self.mixing is None:
            return images, labels, labels
        mixed, targets = self.mixing(images, labels, index, epoch=epoch)
        return mixed.contiguous(memory_format=torch.channels_last), targets, labels[:-1]

    def fingerprint(self) -> str:
        """SHA-256 over class names and, of every split, labels and images: pixels where they are in memory, else the files' names."""
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        for split in (self.train, self.val, self.test):
            if split is not None:
                digest.update(split.labels.cpu().numpy().tobytes())
                split.images.digest(digest.update)
        return digest.hexdigest()

    def held_out_batches(self, split: Split, *, batch_size: int, rank: int = 0, ranks: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of this rank's share of a split, in order, as they are; the last batch may be smaller."""
        index = torch.arange(rank, len(split), ranks, device=split.labels.device)
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
    named_dir: Path | None = None,
) -> Data:
    """The data set of a spec, split, on the device. `beat` is called now and then while it loads.

    resident_bytes: class folders larger than this, decoded, are read from their files each epoch instead; no bit depends on it.
    named_dir: the folder of an uploaded or registered set.  Raises DataMissing, DataUnreadable.
    """
    info = info_of(CLASS_FOLDER if isinstance(spec, NamedData) else spec.dataset)
    size = spec.image_size or info.image_size
    parts = _parts(spec, size=size, data_root=data_root, named_dir=named_dir, device=device, beat=beat)
    settings = _settings(spec, info)
    augmentation, crop = build(settings, size=size, seed=seed, flip_default=info.flip), None
    if augmentation is not None and isinstance(augmentation.crop, ResizedCrop) and not isinstance(parts.train, Pixels):
        crop, augmentation = FileCrop(seed, augmentation.crop), replace(augmentation, crop=None)
    given = [part for part in (parts.train, parts.val, parts.test) if part is not None]
    resident = sum(map(len, given)) * 3 * size * size <= resident_bytes
    opened = partial(_opened, size=size, workers=getattr(spec, "workers", 0), device=device, beat=beat)
    assert parts.val is not None, "a set without a validation split has one held out"
    return Data(
        class_names=parts.class_names,
        image_size=size,
        train=opened(parts.train, resident=resident and crop is None),
        val=opened(parts.val, resident=resident),
        test=None if parts.test is None else opened(parts.test, resident=resident),
        augmentation=augmentation,
        mean=_per_channel(info.mean, device),
        std=_per_channel(info.std, device),
        seed=seed,
        crop=crop,
        erasing=build_erasing(settings, seed=seed),
        mixing=build_mixing(settings, seed=seed, classes=len(parts.class_names)),
    )


def _settings(spec: DataSpec, info: DatasetInfo) -> AugmentSpec:
    chosen = spec.augment or info.augment
    return AUGMENTATIONS[chosen] if isinstance(chosen, str) else chosen


def _parts(spec: DataSpec, *, size: int, data_root: Path, named_dir: Path | None, device: torch.device, beat: Beat) -> Parts:
    match spec:
        case GlyphsData():
            made = glyphs(
                size,
                classes=spec.classes,
                train_per_class=spec.train_per_class,
                val_per_class=spec.val_per_class,
                difficulty=spec.difficulty,
                device=device,
                beat=beat,
            )
            return Parts(made.class_names, Pixels(*made.train), Pixels(*made.val), None)
        case DigitsData():
            return with_validation(digits(size), spec.val_fraction)
        case TorchvisionData():
            return with_validation(torchvision_set(spec.dataset, data_root=data_root, size=size, download=spec.download), spec.val_fraction)
        case ClassFolderData():
            return with_validation(class_folders(spec.path, data_root=data_root), spec.val_fraction)
        case ImageNetData():
            return imagenet(spec.path, data_root=data_root)
        case WebDatasetData():
            return webdataset(spec.train, spec.val, spec.test, data_root=data_root, window=spec.shuffle_window, beat=beat)
        case NamedData():
            if named_dir is None:
                known = f"must be one of {', '.join(DATASETS)}; sets that were uploaded to a server are known there only"
                raise DataMissing(f"dataset={spec.dataset!r}: {known}")
            return with_validation(class_folders(".", data_root=named_dir), spec.val_fraction)


def _opened(part: Pixels | Encoded, *, size: int, workers: int, resident: bool, device: torch.device, beat: Beat) -> Split:
    if isinstance(part, Pixels):
        return Split(ResidentImages(part.pixels.to(device)), part.labels.to(device))
    files = FileImages(part, size=size, workers=workers, device=device)
    return Split(made_resident(files, beat) if resident else files, part.labels.to(device), part.order, part)


def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    return (torch.tensor(values, device=device) * 255)[None, :, None, None]
