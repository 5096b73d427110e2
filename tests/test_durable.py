"""A file is whole or it is not there, and what could not be finished takes no room."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import pytest

from powergrad import durable
from tests.test_checkpoint import in_a_fork


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "made" / "labels.json"
    durable.write(path, b"before")
    assert durable.write(path, b"after") == path
    assert path.read_bytes() == b"after"
    assert list(path.parent.iterdir()) == [path]


def test_without_room_the_file_before_stays_and_nothing_else_does(tmp_path: Path) -> None:
    """A real limit on file sizes, in a process of its own."""
    path = tmp_path / "labels.json"
    durable.write(path, b"before")

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        with pytest.raises(OSError, match="File too large"):
            durable.write(path, bytes(1000))

    assert in_a_fork(work) == 0
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
