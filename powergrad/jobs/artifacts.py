"""The files of jobs, below one root: a directory, or any fsspec URL.

jobs/<id>/checkpoints/a<attempt>/step-…/   jobs/<id>/artifacts/a<attempt>/…   jobs/<id>/logs/a<attempt>.log   tasks/<id>/…
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

import fsspec

BLOCK_BYTES = 1 << 20


class Artifacts:
    """Read and free what lies below the root. Paths are relative, `/`-separated, and never leave it (ValueError)."""

    def __init__(self, root: str) -> None:
        self._fs, self._base = fsspec.core.url_to_fs(root)
        self.is_local = "file" in self._fs.protocol

    def local_dir(self, path: str) -> Path:
        """The directory itself, made if need be; for a trainer, which writes files."""
        directory = self.local_path(path)
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def local_path(self, path: str) -> Path:
        """Where a file is, for a process that reads files."""
        self.root()
        return Path(self._full(path))

    def root(self) -> Path:
        """The directory that paths are relative to."""
        if not self.is_local:
            raise ValueError("trainers work on a directory: the artifact root is not one")
        return Path(self._base)

    def write(self, path: str, data: bytes) -> None:
        """Put a small file there, its directories made if need be."""
        full = self._full(path)
        self._fs.makedirs(full.rpartition("/")[0], exist_ok=True)
        self._fs.pipe_file(full, data)

    def size(self, path: str) -> int | None:
        """Bytes of a file; None when it does not exist."""
        try:
            return int(self._fs.size(self._full(path)))
        except FileNotFoundError:
            return None

    def stream(self, path: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        """The bytes of a file from `start`, `length` of them or all that are there now. Raises FileNotFoundError on the first block."""
        with self._fs.open(self._full(path), "rb") as file:
            file.seek(start)
            left = length
            while left is None or left > 0:
                block = file.read(BLOCK_BYTES if left is None else min(BLOCK_BYTES, left))
                if not block:
                    return
                left = None if left is None else left - len(block)
                yield block

    def free_bytes(self) -> int | None:
        """Free space at the root; None where that has no meaning."""
        if not self.is_local:
            return None
        here = Path(self._base)
        while not here.exists():
            here = here.parent
        return shutil.disk_usage(here).free

    def delete(self, path: str) -> None:
        """Free a file or a directory with all below it; it is no error if it is gone, or if another deletes it at the same time."""
        full = self._full(path)
        while self._fs.lexists(full):
            with suppress(FileNotFoundError):  # a part of it went under our hands: look again
                self._fs.rm(full, recursive=True)

    def _full(self, path: str) -> str:
        parts = PurePosixPath(path).parts
        if not parts or path.startswith("/") or ".." in parts:
            raise ValueError(f"{path!r} is not a path below the artifact root")
        return f"{self._base.rstrip('/')}/{'/'.join(parts)}"
