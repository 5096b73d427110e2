"""A data set on its way to the server: an archive as it lies on the disk, or a folder packed while it is sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from powergrad.archives import packed
from powergrad.client.errors import ClientError

BLOCK_BYTES = 1 << 18
SUFFIXES = {
    (".zip",): "application/zip",
    (".tar",): "application/x-tar",
    (".tar.gz", ".tgz"): "application/gzip",
    (".tar.bz2", ".tbz2", ".tbz"): "application/x-bzip2",
    (".tar.xz", ".txz"): "application/x-xz",
}
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Source:
    """What is sent. size: None where only sending it tells; stream: from its beginning, each time it is called."""

    media_type: str
    size: int | None
    stream: Callable[[], Iterator[bytes]]


def source_of(path: Path, on_progress: OnProgress | None) -> Source:
    """What to send for a folder or an archive. Raises ClientError, OSError."""
    if path.is_dir():
        return Source("application/x-tar", None, lambda: packed(path, on_progress))
    media_type = next((kind for suffixes, kind in SUFFIXES.items() if path.name.lower().endswith(suffixes)), None)
    if media_type is None:
        known = ", ".join(suffix for suffixes in SUFFIXES for suffix in suffixes)
        raise ClientError(f"{path}: must be a folder, or an archive ({known})")
    size = path.stat().st_size
    return Source(media_type, size, lambda: _blocks(path, size, on_progress))


def name_of(path: Path) -> str:
    """A name for the set by that of its file or folder: what a name may not have becomes -."""
    name = path.resolve().name
    ending = next((suffix for suffixes in SUFFIXES for suffix in suffixes if name.lower().endswith(suffix)), "")
    stem = name[: len(name) - len(ending)] if ending and not path.is_dir() else name
    return "".join(one if one.isascii() and (one.isalnum() or one in "._-") else "-" for one in stem)[:64] or "set"


def _blocks(path: Path, size: int, on_progress: OnProgress | None) -> Iterator[bytes]:
    done = 0
    with open(path, "rb", buffering=0) as file:
        while done < size and (block := file.read(min(BLOCK_BYTES, size - done))):
            yield block
            done += len(block)
            if on_progress is not None:
                on_progress(done, size)
    if done != size:
        raise ClientError(f"{path}: changed while it was sent: try again when nothing writes to it")
