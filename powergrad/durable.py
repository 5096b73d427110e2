"""Files that are whole or absent: written under another name, flushed, renamed."""

from __future__ import annotations

import os
from pathlib import Path

UNFINISHED = ".unfinished-"


def write(path: Path, content: bytes) -> Path:
    """The path, at which the content now lies, instead of what was there before. Its folder is made. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(UNFINISHED + path.name)
    try:
        unfinished.write_bytes(content)
        return publish(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)  # a disk that is full is not to be filled with what nobody will read
        raise


def publish(unfinished: Path, final: Path) -> Path:
    """The final path, at which the flushed file now lies; both are on one file system. Raises OSError."""
    _sync(unfinished, os.O_RDONLY)
    os.replace(unfinished, final)
    _sync(final.parent, os.O_RDONLY | os.O_DIRECTORY)
    return final


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
