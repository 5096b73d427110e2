"""Class folders: which files there are, of which class, in which split. Reads names only; `decode` reads the images."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from powergrad.data.decode import SUFFIXES
from powergrad.data.errors import DataMissing, DataUnreadable
from powergrad.data.split import stratified


@dataclass(frozen=True)
class Listing:
    """Files of one split and their classes, in the order of class and then path."""

    files: tuple[Path, ...]
    labels: Tensor
    """(N,) int64, on the CPU."""


@dataclass(frozen=True)
class ClassFolders:
    """A data set of class folders; `test` is None where there is no test folder."""

    class_names: tuple[str, ...]
    train: Listing
    val: Listing
    test: Listing | None


def class_folders(path: str, *, data_root: Path, val_fraction: float) -> ClassFolders:
    """Either train/ and val/ (and test/, if there is one) with a folder per class, or a folder per class of which a share is held out.

    path: relative to data_root.  Raises DataMissing (names the folder or the class) and DataUnreadable (something leads out of the root).
    """
    root = data_root.resolve()
    folder = _inside(root / path, root)
    if not folder.is_dir():
        raise DataMissing(f"path={path!r}: there is no folder {folder}: put one folder of images per class there")
    if (folder / "train").is_dir() and (folder / "val").is_dir():
        names = _class_names(folder / "train", root)
        train, val = (_listing(folder / part, names, root, whole=part == "train") for part in ("train", "val"))
        return ClassFolders(names, train, val, _listing(folder / "test", names, root) if (folder / "test").is_dir() else None)
    names = _class_names(folder, root)
    everything = _listing(folder, names, root, whole=True)
    train_index, val_index = stratified(everything.labels, val_fraction, class_names=names)
    return ClassFolders(names, _subset(everything, train_index), _subset(everything, val_index), None)


def _inside(path: Path, root: Path) -> Path:
    resolved = path.resolve()
    if not resolved.is_relative_to(root):
        raise DataUnreadable(f"{path}: leads to {resolved}, out of the data root {root}: copy the files below the root instead")
    return resolved


def _class_names(folder: Path, root: Path) -> tuple[str, ...]:
    names = tuple(sorted(entry.name for entry in _inside(folder, root).iterdir() if entry.is_dir() and not entry.name.startswith(".")))
    if len(names) < 2:
        found = f"only the class {names[0]!r}" if names else "no class"
        raise DataMissing(f"{folder} holds {found}: at least 2 folders of images are needed, one per class")
    return names


def _listing(folder: Path, names: tuple[str, ...], root: Path, *, whole: bool = False) -> Listing:
    """whole: every class must have images (a class may be absent from val or test)."""
    unknown = sorted(
        entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".") and entry.name not in names
    )
    if unknown:
        raise DataMissing(f"{folder / unknown[0]}: class {unknown[0]!r} has no folder among the training images")
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        members = sorted(_image_files(folder / name, root)) if (folder / name).is_dir() else []
        if whole and not members:
            raise DataMissing(f"class {name!r} is empty: {folder / name} holds no image ({', '.join(sorted(SUFFIXES))})")
        files += members
        labels += [label] * len(members)
    if not files:
        raise DataMissing(f"{folder} holds no image")
    return Listing(tuple(files), torch.tensor(labels))


def _image_files(folder: Path, root: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(_inside(folder, root)):
        for name in names:
            path = Path(parent, name)
            if path.suffix.lower() not in SUFFIXES or name.startswith("."):
                continue
            found = _inside(path, root) if path.is_symlink() else path
            if found.exists() and not found.is_file():  # opening a pipe would wait for ever
                raise DataUnreadable(f"{path}: not a regular file: replace it or leave it out")
            yield found


def _subset(listing: Listing, index: Tensor) -> Listing:
    return Listing(tuple(listing.files[i] for i in index.tolist()), listing.labels[index])
