"""A whole stack as a user starts it (`powergrad up`), to be hurt from outside: by signals, and through its own API.

`site` is one stack on SQLite for all tests that leave it standing; `new_site` makes one of a test's own, on either database, with settings of its choice.
"""

from __future__ import annotations

import hashlib
import os
import random
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import select

from powergrad.cli.stack import LAUNCHER, free_port, socket_path
from powergrad.client import ApiError, Client, Unreachable
from powergrad.client.models import Event
from powergrad.jobs import tables
from powergrad.jobs.store import Store
from tests.faults import history
from tests.faults.postgresql import PostgreSQL
from tests.worker.conftest import tiny_spec, until

LEASE = {
    "POWERGRAD_LEASE_TTL_S": "8",
    "POWERGRAD_LEASE_MARGIN_S": "1",
    "POWERGRAD_HEARTBEAT_S": "1",
    "POWERGRAD_LOOK_S": "0.1",
    "POWERGRAD_POLL_S": "0.5",
    "POWERGRAD_SWEEP_S": "0.5",
}
READY_S = 120.0
SEED = os.environ.get("POWERGRAD_SEED") or str(secrets.randbelow(1_000_000))

_numbers = count(1)


@dataclass
class Site:
    """One data directory with a stack on it that can be stopped and started again.

    settings: environment of every process, over LEASE.  database_url: None is the data directory's own SQLite.
    """

    data_dir: Path
    port: int
    up: subprocess.Popen[bytes] | None = None
    settings: dict[str, str] = field(default_factory=dict)
    database_url: str | None = None
    workers: int = 1
    slots: int = 2
    postgresql: PostgreSQL | None = None
    client: Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = Client(f"http://127.0.0.1:{self.port}", retries=0)

    def start(self) -> None:
        log = (self.data_dir.parent / "up.log").open("ab")
        dies_with_us = [sys.executable, "-I", "-S", str(LAUNCHER), str(os.getpid())]  # whatever becomes of this process
        command = [
            *dies_with_us,
            sys.executable,
            "-m",
            "powergrad.cli.main",
            "up",
            "--port",
            str(self.port),
            "--data-dir",
            str(self.data_dir),
            "--workers",
            str(self.workers),
            "--slots",
            str(self.slots),
        ]
        inherited = {name: value for name, value in os.environ.items() if name != "POWERGRAD_DATABASE_URL"}
        database = {} if self.database_url is None else {"POWERGRAD_DATABASE_URL": self.database_url}
        environment = {**inherited, **LEASE, **database, **self.settings}
        self.up = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        until(self.is_ready, within_s=READY_S)

    @property
    def store_url(self) -> str:
        """The database, for tests that look or reach into it."""
        return self.database_url or f"sqlite:///{self.data_dir / 'powergrad.db'}"

    def is_ready(self) -> bool:
        assert self.up is not None
        assert self.up.poll() is None, (self.data_dir.parent / "up.log").read_text()
        try:
            return self.client.health().ready
        except Unreachable:
            return False

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        assert self.up is not None
        self.up.send_signal(number)
        code = self.up.wait(90)
        self.up = None
        return code

    def close(self) -> None:
        """Stop it, whatever state it is in; nothing of it is left."""
        family = self.processes("") if self.up is not None else []
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.resume()
        if self.up is not None and self.up.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                self.stop(signal.SIGTERM)
        if self.up is not None:
            self.up.kill()
            self.up.wait()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.client.close()
        self.store.close()

    def valkey_socket(self) -> Path:
        return socket_path(self.data_dir)

    # --- what is there

    def processes(self, title: str = "powergrad: ") -> list[psutil.Process]:
        """Processes of this stack whose title starts so."""
        assert self.up is not None
        try:
            family = psutil.Process(self.up.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return [process for process in family if _title(process).startswith(title)]

    def the(self, title: str) -> psutil.Process:
        found: list[psutil.Process] = until(lambda: self.processes(title))
        return found[0]

    def valkey(self) -> psutil.Process:
        assert self.up is not None
        family = psutil.Process(self.up.pid).children(recursive=True)
        return next(process for process in family if "valkey-server" in _title(process))

    # --- jobs

    def submit(self, **changes: Any) -> str:
        return self.client.submit(small_spec(**changes)).id

    def until_checkpoint(self, job_id: str) -> None:
        until(lambda: self.ask(lambda: self.client.checkpoints(job_id)))

    def until_step(self, job_id: str, step: int) -> None:
        until(lambda: (job := self.ask(lambda: self.client.get(job_id))) and job.progress.step >= step)

    def until_state(self, job_id: str, *states: str, within_s: float = 120.0) -> Any:
        def arrived() -> Any:
            job = self.ask(lambda: self.client.get(job_id))
            return job if job is not None and job.state in states else None

        return until(arrived, within_s=within_s)

    def ask(self, question: Callable[[], Any]) -> Any:
        """The answer, or None while the API is away."""
        try:
            return question()
        except Unreachable:
            return None
        except ApiError as error:
            if error.status != 503:
                raise
            return None

    def weights_sha256(self, job_id: str) -> str:
        checkpoints = self.client.checkpoints(job_id)
        return next(checkpoint.sha256 for checkpoint in checkpoints if checkpoint.is_latest)

    def events(self, job_id: str) -> list[Event]:
        found: list[Event] = []
        while page := self.client.events(job_id, found[-1].seq if found else 0, limit=1000).data:
            found += page
        return found

    # --- what is left of them

    def record(self, job_id: str) -> history.Record:
        """All that the judge wants to know of a job."""
        job = self.client.get(job_id).model_dump(mode="json")
        found = self.client.metrics(job_id, points=1000)["data"]
        with self.store.read() as tx:
            rows = tx.all(select(tables.attempts).where(tables.attempts.c.job_id == job_id).order_by(tables.attempts.c.number))
            lease = tx.one(select(tables.jobs.c.lease_until, tables.jobs.c.worker).where(tables.jobs.c.id == job_id))
            paths = {row.step: row.path for row in tx.all(select(tables.checkpoints).where(tables.checkpoints.c.job_id == job_id))}
        shown = [checkpoint.model_dump(mode="json") for checkpoint in self.client.checkpoints(job_id)]
        assert lease is not None
        return history.Record(
            job=job,
            events=[{"seq": event.seq, "at": _seconds(event), "type": event.type, "data": event.data} for event in self.events(job_id)],
            series={one["name"]: list(zip(one["steps"], one["values"], strict=True)) for one in found},
            checkpoints=shown,
            attempts=[dict(row._mapping) for row in rows],
            lease=dict(lease._mapping),
            files={one["id"]: _sha256(self.job_dir(job_id) / paths[one["step"]] / "model.safetensors") for one in shown},
        )

    def job_dir(self, job_id: str) -> Path:
        return self.data_dir / "jobs" / job_id

    @cached_property
    def store(self) -> Store:
        """The stack's database, to look and to reach into."""
        return Store(self.store_url)

    def undisturbed(self, job_id: str) -> history.Undisturbed:
        """What a job has shown of its spec's ordinary course, if nothing has happened to it."""
        record = self.record(job_id)
        latest = [checkpoint["sha256"] for checkpoint in record.checkpoints if checkpoint["is_latest"]]
        reason = record.job["reason"]
        return history.Undisturbed(
            state=record.job["state"],
            reason=None if reason is None else reason["code"],
            series=record.series,
            weights_sha256=latest[0] if latest else None,
        )

    def check_history(self, job_id: str, *, asked: history.Asked | None = None, undisturbed: history.Undisturbed | None = None) -> None:
        """The judge's rules for one job that has ended. asked: None where it is nobody's business whether it was cancelled."""
        record = self.record(job_id)
        broken = history.judge(record, asked or history.Asked(cancel="maybe"), undisturbed)
        assert not broken, "\n".join(f"{one.rule}: {one.evidence}" for one in broken)
        if record.job["state"] == "succeeded":
            plan = record.of_type("plan")[-1]["data"]
            wanted = [plan["steps_per_epoch"] * (i + 1) for i in range(plan["epochs"])]
            assert [step for step, _ in record.series["val_top1"]] == wanted, "a gap or a repeat"


def _seconds(event: Event) -> float:
    assert event.at is not None
    return event.at.timestamp()


def _sha256(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


def small_spec(**changes: Any) -> dict[str, Any]:
    """Eight epochs of eleven steps, and a checkpoint of 2 MB after each: three seconds of one core."""
    return tiny_spec(**{"model": {"name": "resnet20"}, "epochs": 8} | changes)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("site") / "data", free_port("127.0.0.1"))
    made.start()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def standing(request: pytest.FixtureRequest) -> None:
    """A stack that a failed test has left stopped is started again for the next one."""
    if "site" in request.fixturenames:
        shared: Site = request.getfixturevalue("site")
        if shared.up is None or shared.up.poll() is not None:
            shared.start()


@pytest.fixture
def dice(request: pytest.FixtureRequest) -> random.Random:
    """The random numbers of one test, the same again for the same POWERGRAD_SEED."""
    print(f"POWERGRAD_SEED={SEED}")
    return random.Random(f"{SEED} {request.node.nodeid}")


@pytest.fixture
def new_site(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    """Starts stacks of the test's own, one data directory each: `new_site(database="postgresql", workers=2, settings={…})`.

    A PostgreSQL is the site's own too, at `site.postgresql`, to be hurt at will.
    """
    with ExitStack() as made:

        def start(*, database: str = "sqlite", **options: Any) -> Site:
            folder = tmp_path / f"site-{next(_numbers)}"
            folder.mkdir()
            server = made.enter_context(PostgreSQL()) if database == "postgresql" else None
            site = Site(folder / "data", free_port("127.0.0.1"), database_url=None if server is None else server.url, **options)
            site.postgresql = server
            made.callback(site.close)
            site.start()
            return site

        yield start


@pytest.fixture(scope="session")
def undisturbed(site: Site) -> str:
    """sha256 of the weights of a run that nothing happened to."""
    return undisturbed_sha256(site)


def undisturbed_sha256(site: Site) -> str:
    job_id = site.submit()
    assert site.until_state(job_id, "succeeded", "failed").state == "succeeded"
    site.check_history(job_id)
    return site.weights_sha256(job_id)
