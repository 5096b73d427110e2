"""The worker's doorbell: where nobody hears it, and where what it says cannot be read."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest
from kombu import Queue
from redis import Redis

from powergrad.cli.stack import Stack, ask_valkey, socket_path
from powergrad.jobs import doorbell
from tests.worker.conftest import until
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


@pytest.mark.parametrize("garbage", [b"", b'{"body": "', b"[]", b"{}", b'{"body": "", "headers": {}}', b"\xff\xfe", b"null"])
def test_a_ring_that_cannot_be_read_is_dropped_and_the_next_one_is_heard(broker_url: str, tmp_path: Path, garbage: bytes) -> None:
    """A real broker with damaged bytes in its queue, as a file that was changed on the disk leaves them."""
    valkey = Stack(tmp_path)
    valkey._make_folders()
    valkey.parts = [valkey._valkey()]
    valkey.parts[0].start()
    try:
        until(lambda: ask_valkey(socket_path(tmp_path)))
        app.configure(WorkerSettings(data_dir=tmp_path, redis_url=f"redis+socket://{socket_path(tmp_path)}"))
        with Redis(unix_socket_path=str(socket_path(tmp_path))) as queue:
            queue.lpush(doorbell.QUEUE, garbage)
        app.ring()
        heard: list[str] = []
        with (
            app.app.connection_for_read() as line,
            line.Consumer(Queue(doorbell.QUEUE), on_message=lambda message: heard.append(message.headers["task"])),
        ):
            line.drain_events(timeout=20)
        assert heard == [doorbell.TASK]
    finally:
        valkey.stop()


def _hang_up(listener: socket.socket) -> None:
    while True:
        try:
            line, _ = listener.accept()
        except OSError:
            return
        line.close()
