"""The named data sets: scikit-learn's digits, and torchvision's, read by torchvision's own classes."""

from __future__ import annotations

import fcntl
import functools
import pickle
import string
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision import datasets  # type: ignore[import-untyped]

from powergrad.data.catalogue import DATASETS
from powergrad.data.decode import Source
from powergrad.data.draws import epoch_order
from powergrad.data.errors import DataMissing, DataUnreadable
from powergrad.data.folders import Listing, stay_inside
from powergrad.data.images import Encoded, Order, Parts, Pixels, resized

# torchvision's readers raise these on files that are cut short or are not what their name says
_BROKEN = (OSError, ValueError, EOFError, KeyError, IndexError, AssertionError, TypeError, RuntimeError, pickle.UnpicklingError)
_FETCH_FAILED = (OSError, RuntimeError, ValueError, EOFError, tarfile.TarError, zipfile.BadZipFile, ImportError)

Choice = Mapping[str, Any]
"""Arguments that choose a split."""


@dataclass(frozen=True)
class _Recipe:
    """How one of torchvision's sets is opened: where it lies, which arguments give which split, where images and labels are kept."""

    kind: Callable[..., Any]
    place: str
    """Below the data root; what must be there before torchvision is asked."""
    read: Callable[[Any, int], Pixels | Encoded]
    """The images of an opened split, scaled to a side if they are in memory."""
    train: Choice
    test: Choice | None = None
    val: Choice | None = None
    root: str = ""
    """Below the data root; what torchvision is told as its root."""
    names: Callable[[Any], Sequence[str]] = lambda whole: whole.classes
    options: Choice = field(default_factory=dict)

    def open(self, data_root: Path, choice: Choice, *, download: bool = False) -> Any:
        return self.kind(str(data_root / self.root), **self.options, **choice, download=download)

    @property
    def choices(self) -> tuple[Choice, ...]:
        return tuple(choice for choice in (self.train, self.val, self.test) if choice is not None)


def digits(size: int) -> Parts:
    """scikit-learn's 1,797 digits, 8×8 pixels of 17 grey levels, scaled to size×size."""
    grey, labels = (torch.from_numpy(array) for array in digit_arrays())
    return Parts(tuple(string.digits), Pixels(resized(grey, size), labels), None, None)


@functools.cache
def digit_arrays() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(1797, 1, 8, 8) grey levels of 0 to 255 and (1797,) digits. Parsed once: a template process does it for all its forks."""
    bunch = load_digits()
    return np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None], bunch.target.astype(np.int64)


def torchvision_set(name: str, *, data_root: Path, size: int, download: bool) -> Parts:
    """One of torchvision's sets from `data_root`, where torchvision itself would put it. Images kept in memory come size×size.

    Raises DataMissing naming the folder looked at, DataUnreadable if what is there is not complete.
    """
    recipe = _RECIPES[name]
    if download:
        _fetch(recipe, name, data_root)
    place = data_root / recipe.place
    if not place.exists():
        way_out = ", or set data.download to true" if DATASETS[name].can_download else ": it cannot be downloaded from here"
        raise DataMissing(f"{name} is not at {place}: copy the unpacked files there{way_out}")
    try:
        return _parts(recipe, name, data_root, size)
    except _BROKEN as error:
        if isinstance(error.__context__, ImportError):  # torchvision says so by a RuntimeError
            raise DataMissing(f"{name}: {error}") from error
        raise DataUnreadable(f"{place}: incomplete or corrupted ({error}): copy {name} there again") from error


def _parts(recipe: _Recipe, name: str, data_root: Path, size: int) -> Parts:
    whole = recipe.open(data_root, recipe.train)
    names = tuple(recipe.names(whole))
    if len(names) != DATASETS[name].classes:  # a folder too few would renumber the rest
        raise ValueError(f"{len(names)} classes instead of {DATASETS[name].classes}")

    def part(choice: Choice | None) -> Pixels | Encoded | None:
        if choice is None:
            return None
        return _fitting(recipe.read(whole if choice is recipe.train else recipe.open(data_root, choice), size), names, data_root.resolve())

    train = part(recipe.train)
    assert train is not None
    return Parts(names, train, part(recipe.val), part(recipe.test))


def _fitting(part: Pixels | Encoded, names: tuple[str, ...], root: Path) -> Pixels | Encoded:
    count = len(part.pixels) if isinstance(part, Pixels) else len(part)
    if count == 0 or len(part.labels) != count or int(part.labels.max()) >= len(names) or int(part.labels.min()) < 0:
        raise ValueError(f"{count} images, {len(part.labels)} labels of {len(names)} classes do not fit")
    if isinstance(part, Listing):
        stay_inside(part.files, root)
    return part


def _fetch(recipe: _Recipe, name: str, data_root: Path) -> None:
    (data_root / recipe.root).mkdir(parents=True, exist_ok=True)
    with _alone(data_root / f".download-{name}.lock"):  # two arms of an experiment start at once
        try:
            for choice in recipe.choices:
                recipe.open(data_root, choice, download=True)
        except _FETCH_FAILED as error:
            raise DataMissing(f"{name} could not be downloaded to {data_root} ({error}): copy the unpacked files there") from error


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class Items:
    """Images of a set that hands them out one by one, opened already."""

    whole: Any
    """Sized; whole[i] is a PIL image and its class, however deep in a file it lies. Picklable, and opens its files in each process."""
    name: str
    places: NDArray[np.int64]
    labels: Tensor
    """(N,) int64, on the CPU."""

    @property
    def order(self) -> Order:
        return epoch_order

    def __len__(self) -> int:
        return len(self.places)

    def fetch(self, index: Sequence[int]) -> Iterator[tuple[str, Source]]:
        for place in self.places[list(index)].tolist():
            name = f"{self.name}, image {place}"
            try:
                image: Image.Image = self.whole[place][0]
            except _BROKEN as error:
                raise DataUnreadable(f"{name}: cannot be read ({error}): copy the files there again") from error
            yield name, image

    def names(self) -> Iterator[str]:
        return (f"{Path(self.name).name}, image {place}" for place in self.places.tolist())

    def subset(self, index: Tensor) -> Items:
        return Items(self.whole, self.name, self.places[index.numpy()], self.labels[index])


def _grey(whole: Any, size: int) -> Pixels:
    return _sized(torch.as_tensor(whole.data)[:, None], whole.targets, size)


def _emnist(whole: Any, size: int) -> Pixels:
    return _sized(whole.data.transpose(1, 2)[:, None], whole.targets, size)  # its files hold each character lying on its side


def _qmnist(whole: Any, size: int) -> Pixels:
    return _sized(whole.data[:, None], whole.targets[:, 0], size)  # the other columns tell who wrote it


def _colour(whole: Any, size: int) -> Pixels:
    return _sized(torch.as_tensor(whole.data).permute(0, 3, 1, 2), whole.targets, size)


def _colour_planes(whole: Any, size: int) -> Pixels:
    return _sized(torch.as_tensor(whole.data), whole.labels, size)


def _sized(pixels: Tensor, labels: Any, size: int) -> Pixels:
    return Pixels(resized(pixels.contiguous(), size), torch.as_tensor(labels, dtype=torch.int64))


def _listed(files: Sequence[str | Path], labels: Sequence[int]) -> Listing:
    return Listing(tuple(map(str, files)), torch.tensor(labels, dtype=torch.int64))


def _image_files(whole: Any, _: int) -> Listing:
    return _listed(whole._image_files, whole._labels)


def _images(whole: Any, _: int) -> Listing:
    return _listed(whole._images, whole._labels)


def _samples(whole: Any, _: int) -> Listing:
    return _listed(*zip(*(whole.samples if hasattr(whole, "samples") else whole._samples), strict=True))


def _imgs(whole: Any, _: int) -> Listing:
    return _listed(*zip(*whole.imgs, strict=True))


def _sun397(whole: Any, _: int) -> Listing:
    return _listed(*zip(*sorted(zip(whole._image_files, whole._labels, strict=True)), strict=True))  # they come as the disk has them


def _caltech101(whole: Any, _: int) -> Listing:
    folder = Path(whole.root, "101_ObjectCategories")
    numbered = zip(whole.y, whole.index, strict=True)
    return _listed([folder / whole.categories[label] / f"image_{number:04d}.jpg" for label, number in numbered], whole.y)


def _caltech256(whole: Any, _: int) -> Listing:
    folder = Path(whole.root, "256_ObjectCategories")
    numbered = zip(whole.y, whole.index, strict=True)
    return _listed([folder / whole.categories[label] / f"{label + 1:03d}_{number:04d}.jpg" for label, number in numbered], whole.y)


def _pcam(whole: Any, _: int) -> Items:
    path = whole._base_folder / whole._FILES[whole._split]["targets"][0]
    with whole.h5py.File(path) as file:
        labels = torch.from_numpy(file["y"][:].astype(np.int64).reshape(-1))
    return Items(whole, str(path.parent / whole._FILES[whole._split]["images"][0]), np.arange(len(whole)), labels)


_TRAIN, _VAL, _TEST = ({"split": part} for part in ("train", "val", "test"))
_TRAINING, _HELD_BACK = {"train": True}, {"train": False}
_STL10_NAMES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")  # its class_names.txt
# the signs by number, as the data set's authors list them (Stallkamp et al., Neural Networks 32, 2012)
_GTSRB_NAMES = (
    *(f"Speed limit {limit} km/h" for limit in (20, 30, 50, 60, 70, 80)), "End of speed limit 80 km/h", "Speed limit 100 km/h",
    "Speed limit 120 km/h", "No passing", "No passing for vehicles over 3.5 t", "Right of way at the next intersection", "Priority road",
    "Yield", "Stop", "No vehicles", "Vehicles over 3.5 t prohibited", "No entry", "General caution", "Dangerous curve to the left",
    "Dangerous curve to the right", "Double curve", "Bumpy road", "Slippery road", "Road narrows on the right", "Road work",
    "Traffic signals", "Pedestrians", "Children crossing", "Bicycles crossing", "Beware of ice or snow", "Wild animals crossing",
    "End of all speed and passing limits", "Turn right ahead", "Turn left ahead", "Ahead only", "Go straight or right",
    "Go straight or left", "Keep right", "Keep left", "Roundabout mandatory", "End of no passing", "End of no passing by vehicles over 3.5 t",
)  # fmt: skip

_RECIPES = {
    "cifar10": _Recipe(datasets.CIFAR10, "cifar-10-batches-py", _colour, _TRAINING, _HELD_BACK),
    "cifar100": _Recipe(datasets.CIFAR100, "cifar-100-python", _colour, _TRAINING, _HELD_BACK),
    "mnist": _Recipe(datasets.MNIST, "MNIST/raw", _grey, _TRAINING, _HELD_BACK),
    "fashion-mnist": _Recipe(datasets.FashionMNIST, "FashionMNIST/raw", _grey, _TRAINING, _HELD_BACK),
    "kmnist": _Recipe(datasets.KMNIST, "KMNIST/raw", _grey, _TRAINING, _HELD_BACK),
    "qmnist": _Recipe(datasets.QMNIST, "QMNIST/raw", _qmnist, _TRAINING, _HELD_BACK),
    "emnist": _Recipe(datasets.EMNIST, "EMNIST/raw", _emnist, _TRAINING, _HELD_BACK, options={"split": "balanced"}),
    "usps": _Recipe(datasets.USPS, "usps/usps.bz2", _grey, _TRAINING, _HELD_BACK, root="usps", names=lambda _: string.digits),
    "svhn": _Recipe(datasets.SVHN, "svhn/train_32x32.mat", _colour_planes, _TRAIN, _TEST, root="svhn", names=lambda _: string.digits),
    "stl10": _Recipe(datasets.STL10, "stl10_binary", _colour_planes, _TRAIN, _TEST, names=lambda _: _STL10_NAMES),
    "caltech101": _Recipe(datasets.Caltech101, "caltech101/101_ObjectCategories", _caltech101, {}, names=lambda whole: whole.categories),
    "caltech256": _Recipe(datasets.Caltech256, "caltech256/256_ObjectCategories", _caltech256, {},
                          names=lambda whole: [name.partition(".")[2] for name in whole.categories]),
    "country211": _Recipe(datasets.Country211, "country211", _samples, _TRAIN, _TEST, {"split": "valid"}),
    "dtd": _Recipe(datasets.DTD, "dtd/dtd", _image_files, _TRAIN, _TEST, _VAL),
    "eurosat": _Recipe(datasets.EuroSAT, "eurosat/2750", _samples, {}),
    "fgvc-aircraft": _Recipe(datasets.FGVCAircraft, "fgvc-aircraft-2013b", _image_files, _TRAIN, _TEST, _VAL),
    "flowers102": _Recipe(datasets.Flowers102, "flowers-102", _image_files, _TRAIN, _TEST, _VAL),
    "food101": _Recipe(datasets.Food101, "food-101", _image_files, _TRAIN, _TEST),
    "gtsrb": _Recipe(datasets.GTSRB, "gtsrb/GTSRB", _samples, _TRAIN, _TEST, names=lambda _: _GTSRB_NAMES),
    "imagenette": _Recipe(datasets.Imagenette, "imagenette2", _samples, _TRAIN, None, _VAL,
                          names=lambda whole: [names[0] for names in whole.classes]),
    "oxford-iiit-pet": _Recipe(datasets.OxfordIIITPet, "oxford-iiit-pet", _images, {"split": "trainval"}, _TEST),
    "pcam": _Recipe(datasets.PCAM, "pcam", _pcam, _TRAIN, _TEST, _VAL, names=lambda _: ("normal", "tumor")),
    # the test images have no public labels; names start with their letter's folder: /a/airfield
    "places365": _Recipe(datasets.Places365, "places365", _imgs, {"split": "train-standard"}, None, _VAL, root="places365",
                         names=lambda whole: [name[3:] for name in whole.classes], options={"small": True}),
    "rendered-sst2": _Recipe(datasets.RenderedSST2, "rendered-sst2", _samples, _TRAIN, _TEST, _VAL),
    "stanford-cars": _Recipe(datasets.StanfordCars, "stanford_cars", _samples, _TRAIN, _TEST),
    "sun397": _Recipe(datasets.SUN397, "SUN397", _sun397, {}),
}  # fmt: skip
