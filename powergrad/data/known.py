"""The named data sets, whole, as tensors: scikit-learn's digits and torchvision's loaders."""

from __future__ import annotations

import fcntl
import functools
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, FashionMNIST  # type: ignore[import-untyped]

from powergrad.data.errors import DataMissing, DataUnreadable
from powergrad.data.images import resized

Arrays = tuple[Tensor, Tensor]  # (N, C, S, S) uint8, (N,) int64
# torchvision's readers raise these on files that are cut short or are not what their name says
_BROKEN = (OSError, ValueError, EOFError, KeyError, IndexError, AssertionError, TypeError, RuntimeError, pickle.UnpicklingError)


@dataclass(frozen=True)
class Known:
    """A whole data set; `test` is None where it brings no test split."""

    class_names: tuple[str, ...]
    train: Arrays
    test: Arrays | None


def digits(size: int) -> Known:
    """scikit-learn's 1,797 digits, 8×8 pixels of 17 grey levels, scaled to size×size."""
    grey, labels = (torch.from_numpy(array) for array in digit_arrays())
    return Known(tuple("0123456789"), (resized(grey, size), labels), None)


@functools.cache
def digit_arrays() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(1797, 1, 8, 8) grey levels of 0 to 255 and (1797,) digits. Parsed once: a template process does it for all its forks."""
    bunch = load_digits()
    return np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None], bunch.target.astype(np.int64)


_TORCHVISION: dict[str, tuple[Callable[..., Any], str]] = {
    "cifar10": (CIFAR10, "cifar-10-batches-py"),
    "cifar100": (CIFAR100, "cifar-100-python"),
    "mnist": (MNIST, "MNIST/raw"),
    "fashion-mnist": (FashionMNIST, "FashionMNIST/raw"),
}


def torchvision_set(name: str, *, data_root: Path, size: int, download: bool) -> Known:
    """One of torchvision's sets from `data_root`, where torchvision itself would put it.

    Raises DataMissing naming the folder looked at, DataUnreadable if what is there is not complete.
    """
    kind, folder = _TORCHVISION[name]
    if download:
        _fetch(kind, name, data_root)
    if not (data_root / folder).is_dir():
        raise DataMissing(f"{name} is not at {data_root / folder}: copy the unpacked files there, or set data.download to true")
    try:
        train, test = (kind(str(data_root), train=part, download=False) for part in (True, False))
        return Known(tuple(train.classes), _arrays(train, size), _arrays(test, size))
    except _BROKEN as error:
        raise DataUnreadable(f"{data_root / folder}: incomplete or corrupted ({error}): copy {name} there again") from error


def _arrays(whole: Any, size: int) -> Arrays:
    pixels = torch.as_tensor(whole.data)
    channels_first = pixels.permute(0, 3, 1, 2) if pixels.ndim == 4 else pixels[:, None]
    labels = torch.as_tensor(whole.targets, dtype=torch.int64)
    if len(labels) != len(pixels) or int(labels.max()) >= len(whole.classes) or int(labels.min()) < 0:
        raise ValueError(f"{len(pixels)} images, {len(labels)} labels of {len(whole.classes)} classes do not fit")
    return resized(channels_first.contiguous(), size), labels


def _fetch(kind: Callable[..., Any], name: str, data_root: Path) -> None:
    data_root.mkdir(parents=True, exist_ok=True)
    with _alone(data_root / f".download-{name}.lock"):  # two arms of an experiment start at once
        try:
            for part in (True, False):
                kind(str(data_root), train=part, download=True)
        except (OSError, RuntimeError) as error:
            raise DataMissing(f"{name} could not be downloaded to {data_root} ({error}): copy the unpacked files there") from error


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
