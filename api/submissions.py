"""Stores submissions in groups: a thread puts all that wait into one transaction, so that one flush to disk makes many jobs durable.

Each caller hears of its own job only after the commit. When a group fails, each of its submissions is tried alone, so that one that
cannot be stored takes no other with it.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from api import errors
from api.errors import RETRY_AFTER_S, Refused
from powergrad.jobs import queries, submission
from powergrad.jobs.store import Store, Tx
from powergrad.jobs.submission import Submission, Submitted

MOST_TOGETHER = 64  # a group's transaction stays in the tens of milliseconds, so that workers' writes get in between
MOST_WAITING = 2048

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Stored:
    """A job as it was committed. replayed: it was there before, under the same idempotency key."""

    job: dict[str, Any]
    replayed: bool


Result = Stored | BaseException


@dataclass(frozen=True)
class _Waiting:
    new: Submission
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Stored]


class Submissions:
    """`store` from the event loop; `start` and `stop` frame the thread. committed: told after each commit how many jobs it made."""

    def __init__(self, store: Store, committed: Callable[[int], None]) -> None:
        self._store, self._committed = store, committed
        self._queue: queue.Queue[_Waiting | None] = queue.Queue(MOST_WAITING)
        self._thread = threading.Thread(target=self._run, name="submissions", daemon=True)

    async def store(self, new: Submission) -> Stored:
        """The job, committed. Raises IdempotencyMismatch, InvalidSpec (of model.init_from), what the database raises, or Refused (503) when too many wait."""
        loop = asyncio.get_running_loop()
        waiting = _Waiting(new, loop, loop.create_future())
        try:
            self._queue.put_nowait(waiting)
        except queue.Full:
            retry = {"Retry-After": str(RETRY_AFTER_S)}
            raise Refused(errors.UNAVAILABLE, f"{MOST_WAITING} submissions wait for the database", headers=retry) from None
        return await waiting.future

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Store what waits, then end."""
        self._queue.put(None)
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        while (first := self._queue.get()) is not None:
            group = [first, *self._others()]
            results = self._settle([waiting.new for waiting in group])
            made = sum(isinstance(result, Stored) and not result.replayed for result in results)
            if made:
                self._committed(made)
            _deliver(group, results)

    def _others(self) -> list[_Waiting]:
        found: list[_Waiting] = []
        while len(found) < MOST_TOGETHER - 1 and not self._queue.empty():
            waiting = self._queue.get_nowait()
            if waiting is None:
                self._queue.put(None)
                break
            found.append(waiting)
        return found

    def _settle(self, group: Sequence[Submission]) -> list[Result]:
        try:
            with self._store.write() as tx:
                return _submit(tx, group)
        except Exception as error:  # noqa: BLE001 - it is the callers' to hear
            if len(group) == 1:
                return [error]
            log.warning("a group of submissions failed: each is tried alone", size=len(group), error=str(error).splitlines()[0])
            return [result for new in group for result in self._settle([new])]


def _submit(tx: Tx, group: Sequence[Submission]) -> list[Result]:
    results = submission.submit_all(tx, group)
    rows = [result.row for result in results if isinstance(result, Submitted) and result.row is not None]
    new_jobs = {job["id"]: job for job in queries.shown_new(tx, rows)}
    return [
        _stored(tx, result, new_jobs, owner=new.owner) if isinstance(result, Submitted) else result
        for new, result in zip(group, results, strict=True)
    ]


def _stored(tx: Tx, result: Submitted, new_jobs: dict[str, dict[str, Any]], *, owner: str) -> Stored:
    # a replayed key may name a job of this very group
    job = new_jobs.get(result.job_id) or queries.get(tx, result.job_id, owner=owner)
    return Stored(job, result.replayed)


def _deliver(group: Sequence[_Waiting], results: Sequence[Result]) -> None:
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Stored], Result]]] = {}
    for waiting, result in zip(group, results, strict=True):
        by_loop.setdefault(waiting.loop, []).append((waiting.future, result))
    for loop, pairs in by_loop.items():
        loop.call_soon_threadsafe(_resolve, pairs)


def _resolve(pairs: Sequence[tuple[asyncio.Future[Stored], Result]]) -> None:
    for future, result in pairs:
        if future.cancelled():
            continue
        if isinstance(result, Stored):
            future.set_result(result)
        else:
            future.set_exception(result)
