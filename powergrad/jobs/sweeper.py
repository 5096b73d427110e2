"""A thread that sweeps: in the API and in every worker, any number at once.

Each round looks first and writes only when there is something to do, so idle sweepers cost a read. What cannot be done now (database
away, files busy) is done in a later round. Jobs that have outlived their end are looked for less often: no index finds them, as each may
have a time of its own, and nobody waits for the minute in which one goes.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import structlog

from powergrad.jobs import claims, debts, fleet, keys, sweeps, tasks
from powergrad.jobs.artifacts import Artifacts
from powergrad.jobs.experiments import analyses
from powergrad.jobs.experiments import lifecycle as experiments
from powergrad.jobs.store import Store, is_unavailable

INTERVAL_S = 2.0
EXPIRY_INTERVAL_S = 30.0

log = structlog.get_logger(__name__)


def sweep_once(store: Store, artifacts: Artifacts, ring: Callable[[], None], *, expires: bool = True) -> sweeps.Swept | None:
    """One round: move lapsed jobs on, delete outlived ones, free the files of those removed, ring when a job is due.

    expires: whether to look for outlived jobs.  None when there was nothing to do.
    """
    with store.read() as tx:
        due = claims.has_work(tx, gpus=max(1, fleet.capacity(tx).gpus))
        expires = expires and sweeps.has_outlived(tx)
        needed = expires or sweeps.needs_sweep(tx) or tasks.needs_sweep(tx) or keys.needs_sweep(tx)
    if not needed:
        if due:
            ring()
        return None
    with store.write() as tx:
        again = tasks.sweep(tx)  # first, as the next: what they give up is freed below
        expired = sweeps.expire(tx) if expires else []
        keys.sweep(tx)
        swept = sweeps.sweep(tx)
    free(store, artifacts, swept.debts)
    for job_id, state in swept.moved:
        log.warning("lease lapsed", job=job_id, state=state.value)
    for task_id in again:
        log.warning("lease lapsed", task=task_id)
    for job_id in expired:
        log.info("outlived its end: deleted", job=job_id)
    if swept.runnable or again:
        ring()
    return swept


def advance_experiments(store: Store, artifacts: Artifacts, ring: Callable[[], None]) -> None:
    """Take every experiment that has news as far as it goes, each in transactions of its own: one that cannot be moved holds up no other."""
    with store.read() as tx:
        some = experiments.waiting(tx)
    for experiment_id in some:
        try:
            with store.write() as tx:
                advanced = experiments.advance(tx, experiment_id)
            handed_over = advanced.asked is not None and analyses.hand_over(store, artifacts, advanced.asked)
        except Exception as error:
            if is_unavailable(error):
                raise
            log.exception("an experiment does not advance", experiment=experiment_id)
            continue
        if advanced.rings or handed_over:
            ring()


def free(store: Store, artifacts: Artifacts, paths: Sequence[str]) -> None:
    """Free files that are owed, and forget those debts; what is busy is owed on."""
    gone, busy = [], []
    for path in paths:
        try:
            artifacts.delete(path)
        except OSError as error:
            log.warning("files not freed yet", path=path, error=str(error))
            busy.append(path)
        else:
            gone.append(path)
    if not paths:
        return
    with store.write() as tx:
        debts.freed(tx, *gone)
        debts.owe(tx, *busy)  # behind all others: one that stays so must not hold up the others


@dataclass
class Sweeper:
    """Runs `sweep_once` every `interval_s` until stopped, at once again while there is more to free than one round takes."""

    store: Store
    artifacts: Artifacts
    ring: Callable[[], None]
    interval_s: float = INTERVAL_S
    expiry_interval_s: float = EXPIRY_INTERVAL_S
    _expired_s: float = -math.inf
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
        wait_s = self.interval_s
        while not self._stop.wait(wait_s):
            wait_s = 0.0 if self._sweep() else self.interval_s

    def _sweep(self) -> bool:
        """One round; whether the next is due at once."""
        expires = time.monotonic() - self._expired_s >= self.expiry_interval_s
        try:
            advance_experiments(self.store, self.artifacts, self.ring)
            swept = sweep_once(self.store, self.artifacts, self.ring, expires=expires)
        except Exception as error:  # the sweeper outlives its rounds
            if is_unavailable(error):
                log.warning("sweep: database away", error=str(error).splitlines()[0])
            else:
                log.exception("sweep failed")
            return False
        if expires:
            self._expired_s = time.monotonic()
        return swept is not None and len(swept.debts) == sweeps.MOST_DEBTS
