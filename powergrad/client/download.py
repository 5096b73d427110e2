"""A file that arrives in pieces, over several connections if need be, and appears under its name only when it is whole."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import httpx2

from powergrad.client.errors import DownloadCorrupt
from powergrad.client.models import Artifact, Checkpoint

CHUNK = 1 << 18


class PartialFile:
    """`target` under a temporary name beside it, which carries the digest: a later call, even another process, goes on from it."""

    def __init__(self, target: Path, published: Checkpoint | Artifact) -> None:
        self.target = target
        self.size = published.bytes
        self.sha256 = published.sha256.lower().removeprefix("sha256:")
        self.part = target.with_name(f".{target.name}.{self.sha256[:16]}.part")
        self.done = 0
        self._hash = hashlib.sha256()
        self._file: BinaryIO

    def __enter__(self) -> Self:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.part.open("a+b")
        if self._file.tell() > self.size:
            self._file.truncate(0)
        self._file.seek(0)
        while block := self._file.read(CHUNK):
            self._hash.update(block)
            self.done += len(block)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    @property
    def is_complete(self) -> bool:
        return self.done == self.size

    def accept(self, response: httpx2.Response) -> None:
        """Prepare for this response's body: a full one (200) starts the file again, a range must begin where the file ends."""
        if response.status_code != 206:
            self._restart()
        elif not response.headers.get("content-range", "").startswith(f"bytes {self.done}-"):
            self._fail(f"asked for bytes from {self.done}, got {response.headers.get('content-range')!r}")

    def write(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self._hash.update(chunk)
        self.done += len(chunk)
        if self.done > self.size:
            self._fail(f"longer than the {self.size} bytes published")

    def publish(self) -> Path:
        """Verify, flush, and give the file its name. Raises DownloadCorrupt."""
        if self._hash.hexdigest() != self.sha256:
            self._fail(f"sha256 is {self._hash.hexdigest()}, published was {self.sha256}")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.part.replace(self.target)
        return self.target

    def _restart(self) -> None:
        self._file.truncate(0)
        self._hash = hashlib.sha256()
        self.done = 0

    def _fail(self, why: str) -> None:
        self.part.unlink(missing_ok=True)
        raise DownloadCorrupt(f"{self.target}: {why}; nothing was kept, so try again")


def target_of(path: str | os.PathLike[str] | None, name: str) -> Path:
    """Where to put a download: `path`, or a file called `name` in it if it is a folder (None: the current one).

    A slash at the end says that it is one, to be made if need be. Raises FileNotFoundError where such a folder's parent is not there.
    """
    place = Path(path) if path is not None else Path()
    is_folder = path is not None and os.fspath(path).endswith(os.sep)
    if is_folder and not place.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(place.parent))
    return place / name if is_folder or place.is_dir() else place
