"""The data sets by name, and what each brings along when the spec leaves it open. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from powergrad.data.errors import DataMissing
from powergrad.spec import CLASS_FOLDER

Augment = Literal["none", "standard"]


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a data set before it is opened."""

    name: str
    title: str
    classes: int | None
    """None: as many as there are folders."""
    image_size: int
    """Side in pixels when the spec leaves it open."""
    splits: tuple[str, ...]
    """As they are used: val is held out of train where the data set brings none."""
    augment: Augment
    """When the spec leaves it open."""
    flip: bool
    """Whether the standard augmentation mirrors images: not where a mirrored class is another class, or none."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Of the training pixels in [0, 1], one per channel or one for all."""
    needs_files: bool
    """It must lie below the data root."""
    can_download: bool


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

DATASETS = {
    info.name: info
    for info in (
        # mean and std of the 1,797 digits, measured
        DatasetInfo("digits", "Hand-written digits, 1,797 of 8×8 pixels (comes with scikit-learn)", 10, 16, ("train", "val"), "standard", False,
                    (0.3053,), (0.3760,), needs_files=False, can_download=False),
        # the usual per-channel figures of the training splits
        DatasetInfo("cifar10", "CIFAR-10, 60,000 of 32×32 pixels", 10, 32, ("train", "val", "test"), "standard", True,
                    (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), needs_files=True, can_download=True),
        DatasetInfo("cifar100", "CIFAR-100, 60,000 of 32×32 pixels", 100, 32, ("train", "val", "test"), "standard", True,
                    (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), needs_files=True, can_download=True),
        DatasetInfo("mnist", "MNIST, 70,000 of 28×28 pixels", 10, 28, ("train", "val", "test"), "standard", False,
                    (0.1307,), (0.3081,), needs_files=True, can_download=True),
        DatasetInfo("fashion-mnist", "Fashion-MNIST, 70,000 of 28×28 pixels", 10, 28, ("train", "val", "test"), "standard", True,
                    (0.2860,), (0.3530,), needs_files=True, can_download=True),
        DatasetInfo(CLASS_FOLDER, "A folder of images per class, below the data root", None, 64, ("train", "val"), "standard", True,
                    IMAGENET_MEAN, IMAGENET_STD, needs_files=True, can_download=False),
    )
}  # fmt: skip


def info_of(name: str) -> DatasetInfo:
    """Raises DataMissing for a name that is not in the catalogue."""
    try:
        return DATASETS[name]
    except KeyError:
        raise DataMissing(f"dataset={name!r}: must be one of {', '.join(DATASETS)}") from None


def describe_datasets() -> list[dict[str, Any]]:
    """The catalogue as plain JSON values, in a fixed order."""
    return [
        {
            "name": info.name,
            "title": info.title,
            "classes": info.classes,
            "image_size": info.image_size,
            "splits": list(info.splits),
            "augment": info.augment,
            "needs_files": info.needs_files,
            "can_download": info.can_download,
        }
        for info in DATASETS.values()
    ]
