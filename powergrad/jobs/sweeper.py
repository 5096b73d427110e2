"""A thread that sweeps: in the API and in every worker, any number at once.

Each round looks first and writes only when there is something to do, so idle sweepers cost a read. What cannot be done now (database
away, files busy) is done in a later round.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from powergrad.jobs import fleet, lifecycle, tasks
from powergrad.jobs.artifacts import Artifacts
from powergrad.jobs.store import Store, is_unavailable

INTERVAL_S = 2.0

log = structlog.get_logger(__name__)


def sweep_once(store: Store, artifacts: Artifacts, ring: Callable[[], None]) -> lifecycle.Swept | None:
    """One round: move lapsed jobs on, free the files of removed ones, ring when a job is due. None when there was nothing to do."""
    with store.read() as tx:
        due = lifecycle.has_work(tx, gpus=max(1, fleet.capacity(tx).gpus))
        needed = lifecycle.needs_sweep(tx) or tasks.needs_sweep(tx)
    if not needed:
        if due:
            ring()
        return None
    with store.write() as tx:
        again = tasks.sweep(tx)  # first: what it gives up is freed below
        swept = lifecycle.sweep(tx)
    for path in swept.debts:
        _free(store, artifacts, path)
    for job_id, state in swept.moved:
        log.warning("lease lapsed", job=job_id, state=state.value)
    for task_id in again:
        log.warning("lease lapsed", task=task_id)
    if swept.runnable or again:
        ring()
    return swept


def _free(store: Store, artifacts: Artifacts, path: str) -> None:
    try:
        artifacts.delete(path)
    except OSError as error:
        log.warning("files not freed yet", path=path, error=str(error))  # and one that stays so must not hold up the others
        return
    with store.write() as tx:
        lifecycle.freed(tx, path)


@dataclass
class Sweeper:
    """Runs `sweep_once` every `interval_s` until stopped."""

    store: Store
    artifacts: Artifacts
    ring: Callable[[], None]
    interval_s: float = INTERVAL_S
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="sweeper", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def _run(self) -> None:
        while not self._stop.wait(self.interval_s):
            try:
                sweep_once(self.store, self.artifacts, self.ring)
            except Exception as error:  # the sweeper outlives its rounds
                if is_unavailable(error):
                    log.warning("sweep: database away", error=str(error).splitlines()[0])
                else:
                    log.exception("sweep failed")
