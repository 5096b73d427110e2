"""A data set of class folders, looked at file by file before anything trains on it: runs in a limited child of a worker.

Every image is decoded as training will decode it. What cannot be decoded fails the set, or is left out of it if the uploader asked for
that; everything else that is odd is reported, and changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from powergrad import durable
from powergrad.archives import MOST_NAMED, SPLITS, is_split, stamp_of, version_of, walk
from powergrad.data.decode import BROKEN, FORMATS, decode
from powergrad.data.errors import DataError, DataMissing, DataUnreadable
from powergrad.data.folders import class_folders, inside
from powergrad.data.samples import COLUMNS, draw
from powergrad.data.split import with_validation
from powergrad.thumbnails import SIDE as SIDE_SHOWN

SIDE = 32
"""Images are decoded to this size: how much of a file is read does not hang on it."""
SKIPPED = "skipped.json"
"""Beside an upload's tree: what was left out of it, and why."""
MOST_CLASSES = 32_768  # ImageNet-21K has 21,841
COUNTED_CLASSES = 2000
VAL_FRACTION = 0.1  # any: whether a validation split can be held out does not hang on its size


def check(arguments: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """What is in a set: {"state": ready or failed, "error": {code, detail} or None, version, files, bytes, report, samples}.

    arguments: path and source of the set, skip_unreadable, and samples, the folder for pictures of them.  root: the artifact root.  Raises DataMissing, DataUnreadable.
    """
    is_registered = arguments["source"] == "registered"
    base = root / "datasets" if is_registered else root
    folder = inside(base / arguments["path"], base.resolve())
    if not folder.is_dir():
        raise DataMissing(f"there is no folder {arguments['path']}: put one folder of images per class there")
    stamp = stamp_of(folder) if is_registered else None
    try:
        _classes(folder, base)  # first: it costs nothing, and what it finds settles the matter
        seen = _look(folder)
        if arguments["skip_unreadable"] and not is_registered:
            _leave_out(folder, seen)
        error = _unreadable(seen) or _hopeless(folder, base)
    except DataMissing as missing:
        return _failed(folder, "data_missing", _plain(missing, folder))
    except DataUnreadable as unreadable:
        return _failed(folder, "data_unreadable", _plain(unreadable, folder))
    if is_registered and stamp_of(folder) != stamp:
        raise DataUnreadable("the folder changed while it was read: register it again when nothing writes to it")
    return {
        "state": "failed" if error else "ready",
        "error": error,
        "version": version_of(seen.folders, ((name, digest) for name, digest in seen.digests.items())),
        "files": len(seen.digests),
        "bytes": seen.bytes,
        "report": {**_report(seen), "stamp": stamp},
        "samples": None if error else _samples(seen, folder, arguments.get("samples"), root),
    }


def _samples(seen: _Seen, folder: Path, path: str | None, root: Path) -> dict[str, Any] | None:
    """What is drawn below the artifact root, and where; None without a place for it."""
    if path is None:
        return None
    whole = {name: digest for name, digest in seen.digests.items() if name not in seen.unreadable and name not in seen.skipped}
    return {"path": path, "tile": SIDE_SHOWN, "columns": COLUMNS, "splits": draw(folder, whole, place=seen.place, out_dir=root / path)}


def _classes(folder: Path, base: Path) -> None:
    """Raises DataMissing for one class, an empty class, a class that cannot be split; DataUnreadable for a link that leads away."""
    parts = class_folders(str(folder), data_root=base)
    if len(parts.class_names) > MOST_CLASSES:
        raise DataUnreadable(f"{len(parts.class_names):,} classes, of at most {MOST_CLASSES:,}")
    with_validation(parts, VAL_FRACTION)


def _plain(error: DataError, folder: Path) -> str:
    """What is wrong, without where the server keeps its files."""
    return str(error).replace(f"{folder}{os.sep}", "").replace(str(folder), "the set")


def _failed(folder: Path, code: str, detail: str) -> dict[str, Any]:
    """Of a set that has no classes to train on, only the folders are told."""
    return {
        "state": "failed",
        "error": {"code": code, "detail": detail},
        "version": version_of(*_names(folder)),
        "files": 0,
        "bytes": 0,
        "report": None,
    }


def _names(folder: Path) -> tuple[list[str], list[tuple[str, str]]]:
    found = list(walk(folder))
    return [one.name for one in found if one.status is None], [
        (one.name, _digest(folder / one.name)) for one in found if one.status is not None
    ]


@dataclass
class _Seen:
    """What was found in the files of a set."""

    is_split: bool
    folders: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    bytes: int = 0
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    odd: dict[str, str] = field(default_factory=dict)
    modes: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    sides: Counter[int] = field(default_factory=Counter)

    def place(self, name: str) -> tuple[str, str]:
        """Split and class of an image."""
        first, _, rest = name.partition("/")
        return (first, rest.partition("/")[0]) if self.is_split else ("train", first)


def _look(folder: Path) -> _Seen:
    seen = _Seen(is_split(folder))
    for found in walk(folder):
        if found.status is None:
            seen.folders.append(found.name)
            continue
        seen.digests[found.name] = _digest(folder / found.name)
        seen.bytes += found.status.st_size
        _look_at(seen, folder, found.name)
        if found.name not in seen.unreadable:
            split, label = seen.place(found.name)
            seen.counts.setdefault(label, Counter())[split] += 1
    return seen


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _look_at(seen: _Seen, folder: Path, name: str) -> None:
    try:
        decode(folder / name, SIDE, name=name)
        with Image.open(folder / name, formats=FORMATS) as image:  # its header again
            mode, kind, size, frames = image.mode, image.format or "?", image.size, _frames(image)
    except DataUnreadable as error:
        seen.unreadable[name] = _plain(error, folder).removeprefix(f"{name}: ")
        return
    except MemoryError:
        seen.unreadable[name] = "takes more memory to decode than a check has: shrink the image or leave it out"
        return
    seen.modes[mode] += 1
    seen.formats[kind] += 1
    seen.sides[min(size)] += 1
    if frames > 1 and kind != "MPO":  # a camera's JPEG with a preview in it
        seen.odd[name] = f"animated, {frames} frames: the first is used"
    elif mode == "CMYK":
        seen.odd[name] = "CMYK: converted to RGB without a colour profile"
    elif mode.startswith("I"):
        seen.odd[name] = "16 bits a pixel: the upper 8 are used"


def _frames(image: Image.Image) -> int:
    """1 where what follows the first is broken: training does not look at it either."""
    try:
        return int(getattr(image, "n_frames", 1))
    except BROKEN:
        return 1


def _leave_out(folder: Path, seen: _Seen) -> None:
    """Delete what is unreadable. It is noted first: if this process dies in between, the next one tells of all of it."""
    note = folder.parent / SKIPPED
    before = json.loads(note.read_text("utf-8")) if note.exists() else {}
    seen.skipped, seen.unreadable = {**before, **seen.unreadable}, {}
    if not seen.skipped:
        return
    durable.write(note, json.dumps(seen.skipped).encode())
    for name in seen.skipped:
        (folder / name).unlink(missing_ok=True)
        seen.digests.pop(name, None)
    seen.bytes = sum((folder / name).stat().st_size for name in seen.digests)


def _unreadable(seen: _Seen) -> dict[str, str] | None:
    if not seen.unreadable:
        return None
    first, why = next(iter(seen.unreadable.items()))
    count = len(seen.unreadable)
    detail = f"{count:,} image{'s' if count > 1 else ''} cannot be decoded, the first is {first}: {why}"
    return {"code": "data_unreadable", "detail": f"{detail} (or upload the set with unreadable=skip)"}


def _hopeless(folder: Path, base: Path) -> dict[str, str] | None:
    """A class may be empty now that images have been left out. Raises DataMissing."""
    _classes(folder, base)
    return None


def _report(seen: _Seen) -> dict[str, Any]:
    splits = [split for split in SPLITS if any(counts[split] for counts in seen.counts.values())]
    labels = sorted(seen.counts)
    report = {
        "splits": {split: sum(counts[split] for counts in seen.counts.values()) for split in splits},
        "classes": len(labels),
        "class_counts": {label: {split: seen.counts[label][split] for split in splits} for label in labels[:COUNTED_CLASSES]},
        "unreadable": _list(seen.unreadable),
        "skipped": _list(seen.skipped),
        "odd": _list(seen.odd),
        "duplicates": _duplicates(seen),
        "modes": dict(seen.modes),
        "formats": dict(seen.formats),
        "sides": _sides(seen.sides),
    }
    return {**report, "warnings": list(_warnings(report))}


def _list(found: Mapping[str, str]) -> dict[str, Any]:
    return {"count": len(found), "first": [{"name": name, "why": found[name][:300]} for name in list(found)[:MOST_NAMED]]}


def _duplicates(seen: _Seen) -> dict[str, Any]:
    """Images that are there byte for byte more than once: in two splits, under two classes, or elsewhere in their own class."""
    by_digest: dict[str, list[str]] = {}
    for name, digest in seen.digests.items():
        by_digest.setdefault(digest, []).append(name)
    across_splits: list[list[str]] = []
    across_classes: list[list[str]] = []
    within = 0
    for names in by_digest.values():
        places = [seen.place(name) for name in names]
        if len({split for split, _ in places}) > 1:
            across_splits.append(names)
        if len({label for _, label in places}) > 1:
            across_classes.append(names)
        within += len(places) - len(set(places))
    return {
        "across_splits": {"count": len(across_splits), "first": [names[:4] for names in across_splits[:MOST_NAMED]]},
        "across_classes": {"count": len(across_classes), "first": [names[:4] for names in across_classes[:MOST_NAMED]]},
        "within_classes": within,
    }


def _sides(sides: Counter[int]) -> dict[str, int] | None:
    """Of the images' shorter sides, in pixels."""
    if not sides:
        return None
    middle, passed = sum(sides.values()) // 2, 0
    for side in sorted(sides):
        passed += sides[side]
        if passed > middle:
            return {"min": min(sides), "median": side, "max": max(sides)}
    raise AssertionError("the middle lies within")


def _warnings(report: Mapping[str, Any]) -> Iterator[str]:
    duplicates = report["duplicates"]
    if count := duplicates["across_splits"]["count"]:
        names = ", ".join(duplicates["across_splits"]["first"][0])
        yield f"{count:,} images are in more than one split, which makes the scores better than they are: {names}"
    if count := duplicates["across_classes"]["count"]:
        names = ", ".join(duplicates["across_classes"]["first"][0])
        yield f"{count:,} images are in more than one class: {names}"
    if count := duplicates["within_classes"]:
        yield f"{count:,} images are there again in the same class and split"
    if report["skipped"]["count"]:
        yield f"{report['skipped']['count']:,} images could not be decoded and are left out"
    sizes = [sum(counts.values()) for counts in report["class_counts"].values()]
    if sizes and max(sizes) > 10 * min(sizes):
        yield f"the largest class has {max(sizes):,} images, the smallest {min(sizes):,}: think of loss.class_weights"
