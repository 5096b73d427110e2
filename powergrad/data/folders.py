"""Class folders: which files there are, of which class, in which split. Reads names only; `decode` reads the images."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from powergrad.data.decode import SUFFIXES
from powergrad.data.draws import epoch_order
from powergrad.data.errors import DataMissing, DataUnreadable
from powergrad.data.images import Order, Parts

_WNID = re.compile(r"n\d{8}")  # WordNet's number of a noun, as ImageNet names its classes


@dataclass(frozen=True)
class Listing:
    """Files of one split and their classes, in an order that does not hang on the disk's."""

    files: tuple[str, ...]
    """Their paths, as strings: a million of them are many."""
    labels: Tensor
    """(N,) int64, on the CPU."""

    @property
    def order(self) -> Order:
        return epoch_order

    def __len__(self) -> int:
        return len(self.files)

    def fetch(self, index: Sequence[int]) -> Iterator[tuple[str, Path]]:
        for place in index:
            yield self.files[place], Path(self.files[place])

    def names(self) -> Iterator[str]:
        return ("/".join(Path(file).parts[-2:]) for file in self.files)

    def subset(self, index: Tensor) -> Listing:
        return Listing(tuple(self.files[i] for i in index.tolist()), self.labels[index])


def class_folders(path: str, *, data_root: Path) -> Parts:
    """Either train/ and val/ (and test/, if there is one) with a folder per class, or a folder per class, without a validation split.

    path: relative to data_root.  Raises DataMissing (names the folder or the class) and DataUnreadable (something leads out of the root).
    """
    root = data_root.resolve()
    folder = inside(root / path, root)
    if not folder.is_dir():
        raise DataMissing(f"path={path!r}: there is no folder {folder}: put one folder of images per class there")
    if (folder / "train").is_dir() and (folder / "val").is_dir():
        parts = _train_and_val(folder, root)
        return replace(parts, test=_listing(folder / "test", parts.class_names, root)) if (folder / "test").is_dir() else parts
    names = _class_names(folder, root)
    return Parts(names, _listing(folder, names, root, whole=True), None, None)


def imagenet(path: str, *, data_root: Path) -> Parts:
    """ImageNet as train/ and val/ with a folder per wnid; any number of classes, which are called by their wnids.

    path: relative to data_root.  Raises DataMissing (says how to unpack the archives) and DataUnreadable.
    """
    root = data_root.resolve()
    folder = inside(root / path, root)
    for part in ("train", "val"):
        if not (folder / part).is_dir():
            raise DataMissing(f"path={path!r}: there is no folder {folder / part}: {_unpacking(folder, part)}")
        odd = sorted(entry.name for entry in (folder / part).iterdir() if not _WNID.fullmatch(entry.name) and entry.name[0] != ".")
        if odd:
            raise DataMissing(f"{folder / part / odd[0]}: must be a folder named by its wnid, like n01440764: {_unpacking(folder, part)}")
    return _train_and_val(folder, root)


def _unpacking(folder: Path, part: str) -> str:
    archive = folder / f"ILSVRC2012_img_{part}.tar"
    found = f"unpack {archive}" if archive.exists() else f"unpack ILSVRC2012_img_{part}.tar"
    if part == "train":
        return f"{found}, and each tar in it into a folder of its name (n01440764.tar into train/n01440764)"
    return f"{found} and sort its images into a folder per wnid (the classes are in ILSVRC2012_devkit_t12.tar.gz)"


def inside(path: Path, root: Path) -> Path:
    """The path with its links followed.  root: resolved.  Raises DataUnreadable if it lies elsewhere than below the root."""
    resolved = path.resolve()
    if not resolved.is_relative_to(root):
        raise DataUnreadable(f"{path}: leads to {resolved}, out of the data root {root}: copy the files below the root instead")
    return resolved


def stay_inside(files: Sequence[str], root: Path) -> None:
    """Raises DataUnreadable for a file that lies elsewhere than below the root, by its name or by a link.  root: resolved."""
    for folder in {os.path.dirname(file) for file in files}:
        inside(Path(folder), root)
    for file in files:
        if os.path.islink(file):
            inside(Path(file), root)


def _train_and_val(folder: Path, root: Path) -> Parts:
    names = _class_names(folder / "train", root)
    train, val = (_listing(folder / part, names, root, whole=part == "train") for part in ("train", "val"))
    return Parts(names, train, val, None)


def _class_names(folder: Path, root: Path) -> tuple[str, ...]:
    names = tuple(sorted(entry.name for entry in inside(folder, root).iterdir() if entry.is_dir() and not entry.name.startswith(".")))
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
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        members = sorted(_image_files(folder / name, root), key=Path) if (folder / name).is_dir() else []
        if whole and not members:
            raise DataMissing(f"class {name!r} is empty: {folder / name} holds no image ({', '.join(sorted(SUFFIXES))})")
        files += members
        labels += [label] * len(members)
    if not files:
        raise DataMissing(f"{folder} holds no image")
    return Listing(tuple(files), torch.tensor(labels))


def _image_files(folder: Path, root: Path) -> Iterator[str]:
    folders = [str(inside(folder, root))]
    for parent in folders:
        with os.scandir(parent) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif os.path.splitext(entry.name)[1].lower() in SUFFIXES and not entry.name.startswith("."):
                    yield _checked(entry, root)


def _checked(entry: os.DirEntry[str], root: Path) -> str:
    found = str(inside(Path(entry.path), root)) if entry.is_symlink() else entry.path
    if not entry.is_file() and os.path.exists(found):  # opening a pipe would wait for ever
        raise DataUnreadable(f"{entry.path}: not a regular file: replace it or leave it out")
    return found
