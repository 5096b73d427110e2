"""A worker service inside the test's process: real template, real trainers, real store; only Celery is left out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from powergrad.jobs import migrate, queries, submission
from powergrad.jobs.spec import parse
from powergrad.jobs.store import Store
from worker.service import WorkerService
from worker.settings import WorkerSettings

DEADLINE_S = 60.0


def tiny_spec(**changes: Any) -> dict[str, Any]:
    """Digits at 8 px: about a second an epoch, three epochs of eleven steps."""
    spec = {"data": {"dataset": "digits", "image_size": 8}, "epochs": 3, "optimizer": {"lr": 0.02}, "resources": {"cpu_threads": 1}}
    return spec | changes


@dataclass
class Place:
    """A store with a worker at work on it, and the questions tests ask."""

    service: WorkerService
    store: Store

    def submit(self, *, hold_epoch: int | None = None, **changes: Any) -> str:
        with self.store.write() as tx:
            return submission.submit(tx, submission.Submission(parse(tiny_spec(**changes)), hold_epoch=hold_epoch)).job_id

    def job(self, job_id: str) -> dict[str, Any]:
        with self.store.read() as tx:
            return queries.get(tx, job_id)

    def events(self, job_id: str, kind: str | None = None) -> list[dict[str, Any]]:
        with self.store.read() as tx:
            return [event for event in queries.events_after(tx, job_id, 0) if kind in (None, event["type"])]

    def until(self, question: Callable[[], Any], *, within_s: float = DEADLINE_S) -> Any:
        return until(question, within_s=within_s)

    def until_state(self, job_id: str, *states: str, within_s: float = DEADLINE_S) -> dict[str, Any]:
        self.until(lambda: self.job(job_id)["state"] in states, within_s=within_s)
        return self.job(job_id)

    def until_step(self, job_id: str, step: int) -> None:
        self.until(lambda: self.job(job_id)["progress"]["step"] >= step)

    def weights_sha256(self, job_id: str) -> str:
        with self.store.read() as tx:
            return queries.find_checkpoint(tx, job_id, "latest").sha256


def until(question: Callable[[], Any], *, within_s: float = DEADLINE_S) -> Any:
    """The first true answer; fails when there is none in time."""
    deadline = time.monotonic() + within_s
    while not (answer := question()):
        assert time.monotonic() < deadline, f"not within {within_s:g} s"
        time.sleep(0.02)
    return answer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    data_dir: Path = tmp_path_factory.mktemp("worker")
    settings = WorkerSettings(
        data_dir=data_dir,
        lease_ttl_s=6.0,
        lease_margin_s=1.0,
        heartbeat_s=1.0,
        beat_file=data_dir / "beat",
        look_s=0.1,
        poll_s=0.1,
        sweep_s=0.2,
        slots=2,
    )
    store = Store(settings.database_url)
    migrate.migrate(store)
    service = WorkerService(settings)
    service.start()
    assert service.template.ready.wait(DEADLINE_S)
    yield Place(service, store)
    service.stop()
    store.close()
