"""The data sets by name, and what each brings along when the spec leaves it open. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from powergrad.data.errors import DataMissing
from powergrad.spec import CLASS_FOLDER, GLYPHS, IMAGENET, WEBDATASET

Augment = Literal["none", "standard", "imagenet"]


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a data set before it is opened."""

    name: str
    title: str
    classes: int | None
    """None: the spec or what is found decides."""
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
_TRAIN_VAL, _ALL = ("train", "val"), ("train", "val", "test")


def _photographs(
    name: str, title: str, classes: int | None, *, splits: tuple[str, ...] = _ALL, flip: bool = True, can_download: bool = True
) -> DatasetInfo:
    """Image files of many sizes: cropped and normalised as ImageNet's are."""
    return DatasetInfo(name, title, classes, 224, splits, "imagenet", flip, IMAGENET_MEAN, IMAGENET_STD, True, can_download)


DATASETS = {
    info.name: info
    for info in (
        # mean and std of the 1,797 digits, measured
        DatasetInfo("digits", "Hand-written digits, 1,797 of 8×8 pixels (comes with scikit-learn)", 10, 16, _TRAIN_VAL, "standard", False,
                    (0.3053,), (0.3760,), needs_files=False, can_download=False),
        # of 20,000 of 100 classes at the default difficulty, measured
        DatasetInfo(GLYPHS, "Characters of the DejaVu font, drawn with random deformation, occlusion and noise (made as they are needed)", None,
                    24, _TRAIN_VAL, "none", False, (0.3716,), (0.3545,), needs_files=False, can_download=False),
        # the usual per-channel figures of the training splits, from here to gtsrb
        DatasetInfo("cifar10", "CIFAR-10, 60,000 of 32×32 pixels", 10, 32, _ALL, "standard", True,
                    (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), needs_files=True, can_download=True),
        DatasetInfo("cifar100", "CIFAR-100, 60,000 of 32×32 pixels", 100, 32, _ALL, "standard", True,
                    (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), needs_files=True, can_download=True),
        DatasetInfo("mnist", "MNIST, 70,000 of 28×28 pixels", 10, 28, _ALL, "standard", False,
                    (0.1307,), (0.3081,), needs_files=True, can_download=True),
        DatasetInfo("fashion-mnist", "Fashion-MNIST, 70,000 of 28×28 pixels", 10, 28, _ALL, "standard", True,
                    (0.2860,), (0.3530,), needs_files=True, can_download=True),
        DatasetInfo("kmnist", "Kuzushiji-MNIST, 70,000 of 28×28 pixels", 10, 28, _ALL, "standard", False,
                    (0.1918,), (0.3483,), needs_files=True, can_download=True),
        DatasetInfo("qmnist", "QMNIST, MNIST with all 60,000 test digits", 10, 28, _ALL, "standard", False,
                    (0.1307,), (0.3081,), needs_files=True, can_download=True),
        DatasetInfo("emnist", "EMNIST balanced, 131,600 letters and digits of 28×28 pixels", 47, 28, _ALL, "standard", False,
                    (0.1751,), (0.3332,), needs_files=True, can_download=True),
        DatasetInfo("usps", "USPS, 9,298 hand-written digits of 16×16 pixels", 10, 16, _ALL, "standard", False,
                    (0.2469,), (0.2989,), needs_files=True, can_download=True),
        DatasetInfo("svhn", "Street View House Numbers, 99,289 digits of 32×32 pixels", 10, 32, _ALL, "standard", False,
                    (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), needs_files=True, can_download=True),
        DatasetInfo("stl10", "STL-10, the 13,000 labelled images of 96×96 pixels", 10, 96, _ALL, "standard", True,
                    (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713), needs_files=True, can_download=True),
        DatasetInfo("eurosat", "EuroSAT, 27,000 satellite images of 64×64 pixels", 10, 64, _TRAIN_VAL, "standard", True,
                    (0.3444, 0.3803, 0.4078), (0.2037, 0.1366, 0.1148), needs_files=True, can_download=True),
        DatasetInfo("gtsrb", "German traffic signs, 39,270 of 15 to 250 pixels", 43, 32, _ALL, "standard", False,
                    (0.3403, 0.3121, 0.3214), (0.2724, 0.2608, 0.2669), needs_files=True, can_download=True),
        DatasetInfo("pcam", "PatchCamelyon, 327,680 tissue scans of 96×96 pixels", 2, 96, _ALL, "standard", True,
                    (0.7008, 0.5384, 0.6916), (0.2350, 0.2774, 0.2129), needs_files=True, can_download=False),
        _photographs("caltech101", "Caltech 101, 8,677 images", 101, splits=_TRAIN_VAL),
        _photographs("caltech256", "Caltech 256, 30,607 images, clutter included", 257, splits=_TRAIN_VAL),
        _photographs("country211", "Country211, 63,300 photographs by country", 211),
        _photographs("dtd", "Describable Textures, 5,640 images", 47),
        _photographs("fgvc-aircraft", "FGVC Aircraft, 10,000 images by variant", 100),
        _photographs("flowers102", "Oxford 102 Flowers, 8,189 images", 102),
        _photographs("food101", "Food-101, 101,000 images", 101),
        _photographs("imagenette", "Imagenette, 13,394 images of ten easy ImageNet classes", 10, splits=_TRAIN_VAL),
        _photographs("oxford-iiit-pet", "Oxford-IIIT Pets, 7,349 images by breed", 37),
        _photographs("places365", "Places365-Standard, 1.8 million scenes of 256×256 pixels", 365, splits=_TRAIN_VAL),
        _photographs("rendered-sst2", "Rendered SST2, 9,613 sentences as pictures", 2, flip=False),
        _photographs("stanford-cars", "Stanford Cars, 16,185 images by make, model and year", 196, can_download=False),
        _photographs("sun397", "SUN397, 108,754 scenes", 397, splits=_TRAIN_VAL),
        DatasetInfo(CLASS_FOLDER, "A folder of images per class, below the data root", None, 64, _TRAIN_VAL, "standard", True,
                    IMAGENET_MEAN, IMAGENET_STD, needs_files=True, can_download=False),
        _photographs(IMAGENET, "ImageNet-1K, or some of its classes, as train/ and val/ with a folder per class", None, splits=_TRAIN_VAL,
                     can_download=False),
        _photographs(WEBDATASET, "Tar shards of images and classes (WebDataset), at a URL or below the data root", None, can_download=False),
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
            "flip": info.flip,
            "mean": list(info.mean),
            "std": list(info.std),
            "needs_files": info.needs_files,
            "can_download": info.can_download,
        }
        for info in DATASETS.values()
    ]
