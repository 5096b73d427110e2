"""The worker's doorbell where nobody hears it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest

from worker import app
from worker.settings import WorkerSettings


@pytest.fixture
def broker_url(tmp_path: Path) -> Iterator[str]:
    """Leaves the app with its own settings again."""
    before = app.app.conf.broker_url
    yield f"redis+socket://{tmp_path / 'valkey.sock'}"
    app.app.conf.update(broker_url=before)


def test_a_ring_without_a_broker_is_no_error(broker_url: str, tmp_path: Path) -> None:
    app.configure(WorkerSettings(data_dir=tmp_path, redis_url=broker_url))
    app.ring()


def test_a_ring_that_is_cut_off_is_no_error(broker_url: str, tmp_path: Path) -> None:
    """A broker that hangs up on everybody, as one does that is being killed."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "valkey.sock"))
        listener.listen()
        Thread(target=_hang_up, args=(listener,), daemon=True).start()
        app.configure(WorkerSettings(data_dir=tmp_path, redis_url=broker_url))
        app.ring()


def _hang_up(listener: socket.socket) -> None:
    while True:
        try:
            line, _ = listener.accept()
        except OSError:
            return
        line.close()
