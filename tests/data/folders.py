"""Builds class folders, and files in the formats of the torchvision sets."""

from __future__ import annotations

import hashlib
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100  # type: ignore[import-untyped]


def image(seed: int, *, width: int = 20, height: int = 16, bands: int = 3) -> Image.Image:
    """A picture of noise."""
    shape = (height, width) if bands == 1 else (height, width, bands)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def class_folder(folder: Path, *, classes: tuple[str, ...] = ("ant", "bee", "cat"), each: int = 8) -> Path:
    """A folder per class, `each` PNGs in it."""
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            image(1000 * label + i).save(folder / name / f"{i:03d}.png")
    return folder


def cifar10(root: Path, monkeypatch: pytest.MonkeyPatch, *, each: int = 20) -> tuple[NDArray[np.uint8], list[int]]:
    """CIFAR-10's six pickles with `each` images, their checksums told to the loader; the training images (N, 32, 32, 3) and labels."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    pixels: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    entries: dict[str, list[list[str]]] = {"train_list": [], "test_list": []}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        batch = {"data": rng.integers(0, 256, (each, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(each)]}
        entries["test_list" if name == "test_batch" else "train_list"].append([name, _pickled(folder / name, batch)])
        if name != "test_batch":
            pixels.append(np.asarray(batch["data"]).reshape(each, 3, 32, 32).transpose(0, 2, 3, 1))
            labels += [i % 10 for i in range(each)]
    names = {"label_names": [f"class {i}" for i in range(10)]}
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": _pickled(folder / "batches.meta", names)})
    for name, value in entries.items():
        monkeypatch.setattr(CIFAR10, name, value)
    return np.concatenate(pixels), labels


def cifar100(root: Path, monkeypatch: pytest.MonkeyPatch, *, each: int = 2) -> None:
    """CIFAR-100's three pickles with `each` images of every class."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, attribute in (("train", "train_list"), ("test", "test_list")):
        labels = [i % 100 for i in range(100 * each)]
        batch = {"data": rng.integers(0, 256, (len(labels), 3072), dtype=np.uint8), "fine_labels": labels}
        monkeypatch.setattr(CIFAR100, attribute, [[name, _pickled(folder / name, batch)]])
    names = {"fine_label_names": [f"class {i}" for i in range(100)]}
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": _pickled(folder / "meta", names)})


def mnist(root: Path, *, folder: str = "MNIST", each: int = 40) -> None:
    """The four idx files of MNIST, or of Fashion-MNIST."""
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part in ("train", "t10k"):
        pixels = rng.integers(0, 256, (each, 28, 28), dtype=np.uint8)
        labels = np.arange(each, dtype=np.uint8) % 10
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, each, 28, 28) + pixels.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, each) + labels.tobytes())


def _pickled(path: Path, value: dict[str, Any]) -> str:
    path.write_bytes(pickle.dumps(value))
    return hashlib.md5(path.read_bytes()).hexdigest()
