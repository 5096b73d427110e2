"""Checkpoints that are either whole or do not exist.

A checkpoint is a directory `checkpoints/a<attempt>/step-<step>` below the run's: model.safetensors (the weights and buffers, nothing
else: equal weights are equal bytes), state.pt (what resuming needs besides) and manifest.json (sizes and sha256 of both, of what was
handed to the file system). It is written under a temporary name, flushed file by file with the manifest last, read back from the disk,
and renamed. What has no manifest does not exist.
Nothing of another attempt's directory is ever written or removed: a thawed old attempt cannot touch its successor's files.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file, save
from torch import Tensor

from powergrad import __version__

FORMAT = 1
MODEL, AVERAGE, STATE, MANIFEST = "model.safetensors", "ema.safetensors", "state.pt", "manifest.json"
UNFINISHED = ".unfinished-"
SPARE_BYTES = 2**23  # directory blocks, and what the log and a database on the same disk go on with while the checkpoint stands there


class CheckpointError(Exception):
    """Base of what can go wrong with a checkpoint.

    CheckpointError
    ├── CheckpointBroken   it is not whole, or not the one meant
    ├── CheckpointExists   another one of the same attempt and step is there
    └── StorageFull        no room to write it
    """


class CheckpointBroken(CheckpointError):
    """A file is missing, cut short or changed."""


class CheckpointExists(CheckpointError):
    """The same attempt has already published a different checkpoint at this step."""


class StorageFull(CheckpointError):
    """The disk or the quota is full. Nothing half-written is left that could be taken for a checkpoint."""


class FileEntry(BaseModel):
    """One file of a checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str
    bytes: int


class Manifest(BaseModel):
    """manifest.json: what a checkpoint is made of and what made it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    format: int
    step: int
    epoch: int
    attempt: int
    torch: str
    powergrad: str
    files: dict[str, FileEntry]

    @property
    def model(self) -> FileEntry:
        """The entry of model.safetensors."""
        return self.files[MODEL]

    @property
    def total_bytes(self) -> int:
        """Of all files, without the manifest itself."""
        return sum(entry.bytes for entry in self.files.values())


@dataclass(frozen=True)
class Published:
    """A checkpoint that is complete, flushed and read back."""

    id: str
    """step-00000800."""
    path: str
    """Relative to the run's directory."""
    manifest: Manifest


@dataclass(frozen=True)
class Loaded:
    """A checkpoint's contents, on the CPU."""

    weights: dict[str, Tensor]
    state: dict[str, Any]
    manifest: Manifest
    ema: dict[str, Tensor] | None
    """The averaged weights, where the run keeps them."""


def checkpoint_id(step: int) -> str:
    """step-00000800 for 800."""
    return f"step-{step:08d}"


def relative_path(*, attempt: int, step: int) -> str:
    """Where a checkpoint is published, relative to the run's directory."""
    return f"checkpoints/a{attempt}/{checkpoint_id(step)}"


def attempt_dir(run_dir: Path, attempt: int) -> Path:
    """Where one attempt publishes."""
    return run_dir / "checkpoints" / f"a{attempt}"


def publish(
    run_dir: Path,
    *,
    attempt: int,
    step: int,
    epoch: int,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Any],
    ema: Mapping[str, Tensor] | None = None,
) -> Published:
    """Writes a checkpoint, or returns the one that is there already with the same weights.

    weights: the model's state_dict, on any device; ema: their average's.  state: tensors, numbers, strings, lists and dicts only (`torch.load` reads it back
    with weights_only=True).  Raises StorageFull, CheckpointExists, CheckpointBroken (it does not read back), OSError.
    """
    tensors = {MODEL: weights} | ({} if ema is None else {AVERAGE: ema})
    parent = attempt_dir(run_dir, attempt)
    final = run_dir / relative_path(attempt=attempt, step=step)
    with _storage_errors(parent):
        _make_durable_dirs(parent)
        _demand_room(parent, weights, ema or {}, state)
        unfinished = parent / f"{UNFINISHED}{final.name}"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            manifest = _write(unfinished, attempt=attempt, step=step, epoch=epoch, tensors=tensors, state=state)
            if verify(unfinished, from_disk=True) != manifest:
                raise CheckpointBroken(f"{unfinished / MANIFEST}: does not read back as it was written: check the disk")
            if not _is_there(final, manifest):
                os.rename(unfinished, final)
                _sync_dir(parent)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return Published(final.name, relative_path(attempt=attempt, step=step), manifest)


def verify(path: Path, *, sha256: str | None = None, from_disk: bool = False) -> Manifest:
    """The manifest of a checkpoint whose files have all been read and compared with it.

    sha256: of the model.safetensors that is meant, if known.  from_disk: not from the system's memory of what was written, where the
    system can forget it (it cannot on tmpfs).  Raises CheckpointBroken that names the file.
    """
    if from_disk:
        _forget_cached(path)
    manifest = read_manifest(path)
    for name, entry in manifest.files.items():
        found = _digest(path / name)
        if found != entry:
            raise CheckpointBroken(
                f"{path / name}: {found.bytes} bytes, sha256 {found.sha256}; the manifest says {entry.bytes}, {entry.sha256}"
            )
    if sha256 is not None and manifest.model.sha256 != sha256:
        raise CheckpointBroken(f"{path / MODEL}: sha256 is {manifest.model.sha256}, not the {sha256} that is meant")
    return manifest


def load(path: Path) -> Loaded:
    """The contents of a checkpoint. Nothing in it is ever executed. Does not compare checksums: `verify` does.

    Raises CheckpointBroken.
    """
    manifest = read_manifest(path)
    try:
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
        ema = load_file(path / AVERAGE) if AVERAGE in manifest.files else None
        return Loaded(load_file(path / MODEL), state, manifest, ema)
    except Exception as error:  # safetensors and torch raise their own kinds, undocumented, for broken files
        raise CheckpointBroken(f"{path}: cannot be read ({error})") from error


def read_manifest(path: Path) -> Manifest:
    """The manifest alone, its files unread. Raises CheckpointBroken, also for a format of a later release."""
    try:
        manifest = Manifest.model_validate_json((path / MANIFEST).read_bytes())
    except (OSError, ValidationError) as error:
        raise CheckpointBroken(f"{path / MANIFEST}: missing or not a manifest ({error})") from error
    if manifest.format != FORMAT:
        raise CheckpointBroken(f"{path / MANIFEST}: format {manifest.format}, this release reads {FORMAT}")
    if not {MODEL, STATE} <= manifest.files.keys() or any(os.path.basename(name) != name for name in manifest.files):
        raise CheckpointBroken(f"{path / MANIFEST}: names the files {sorted(manifest.files)}, not {MODEL} and {STATE}")
    return manifest


def discard_unfinished(run_dir: Path, *, attempt: int) -> None:
    """Removes what a crash of this very attempt left half-written."""
    for path in attempt_dir(run_dir, attempt).glob(f"{UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def _write(
    directory: Path, *, attempt: int, step: int, epoch: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> Manifest:
    entries: dict[str, FileEntry] = {}
    for name, weights in tensors.items():
        with _flushed(directory / name) as file:
            # contiguous: the layout in memory (channels last, say) is no property of the weights
            file.write(save({key: tensor.detach().cpu().contiguous() for key, tensor in weights.items()}))
        entries[name] = file.entry
    with _flushed(directory / STATE) as file:
        torch.save(dict(state), file)
    entries[STATE] = file.entry
    manifest = Manifest(
        format=FORMAT,
        step=step,
        epoch=epoch,
        attempt=attempt,
        torch=torch.__version__,
        powergrad=__version__,
        files=entries,
    )
    with _flushed(directory / MANIFEST) as file:
        file.write((json.dumps(manifest.model_dump(), indent=1) + "\n").encode())
    _sync_dir(directory)
    return manifest


def _is_there(final: Path, manifest: Manifest) -> bool:
    """Whether the same weights are published. What lies there broken makes room: nobody can go on from it."""
    if not final.exists():
        return False
    try:
        published = verify(final)
    except CheckpointBroken:
        shutil.rmtree(final)
        return False
    if published.model != manifest.model:
        raise CheckpointExists(f"{final}: holds other weights of the same attempt and step: choose another run directory or attempt")
    return True


def _digest(path: Path) -> FileEntry:
    try:
        with path.open("rb") as file:
            return FileEntry(sha256=hashlib.file_digest(file, "sha256").hexdigest(), bytes=file.tell())
    except OSError as error:
        raise CheckpointBroken(f"{path}: cannot be read ({error.strerror})") from error


class _Counted:
    """A file being written, and what it must hold: counted on the way in, so that a disk which keeps something else is found out."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._sha256, self._bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> int:
        self._sha256.update(data)
        self._bytes += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    @property
    def entry(self) -> FileEntry:
        return FileEntry(sha256=self._sha256.hexdigest(), bytes=self._bytes)


@contextmanager
def _flushed(path: Path) -> Iterator[Any]:
    with path.open("xb") as file:
        yield _Counted(file)
        file.flush()
        os.fsync(file.fileno())


def _forget_cached(directory: Path) -> None:
    """Have flushed files read from the disk the next time (Linux; elsewhere they are read from where the system likes)."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _sync_dir(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_durable_dirs(path: Path) -> None:
    """mkdir -p whose new names survive a power cut."""
    if path.is_dir():
        return
    _make_durable_dirs(path.parent)
    path.mkdir(exist_ok=True)
    _sync_dir(path.parent)


def _demand_room(directory: Path, *contents: Mapping[str, Any]) -> None:
    needed = sum(map(_bytes_of, contents)) + SPARE_BYTES
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise StorageFull(f"{directory}: {free:,} bytes free, a checkpoint needs {needed:,}: delete old runs or lower checkpoint.keep_last")


def _bytes_of(value: Any) -> int:
    match value:
        case Tensor():
            return value.numel() * value.element_size()
        case Mapping():
            return sum(_bytes_of(inner) for inner in value.values())
        case list() | tuple():
            return sum(_bytes_of(inner) for inner in value)
        case _:
            return 64


@contextmanager
def _storage_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise StorageFull(f"{directory}: {error.strerror}: delete old runs or lower checkpoint.keep_last") from error
        raise
    except RuntimeError as error:
        # torch.save's archive writer reports a failed write as a RuntimeError of its own
        if "PytorchStreamWriter" in str(error) or "unexpected pos" in str(error):
            raise StorageFull(f"{directory}: {error}: delete old runs or lower checkpoint.keep_last") from error
        raise
