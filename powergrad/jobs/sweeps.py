"""What anybody may do at any time: move on what a lost worker held, forget what has outlived its time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Row, and_, delete, or_, select, true, update

from powergrad.jobs import copies, debts
from powergrad.jobs.claims import CLAIM_CANDIDATES
from powergrad.jobs.rows import end_attempt, for_update, forget, is_runnable, owners_with
from powergrad.jobs.states import TERMINAL, End, JobState, Outcome, Reason, ReasonCode
from powergrad.jobs.store import Tx
from powergrad.jobs.submission import IDEMPOTENCY_TTL_S
from powergrad.jobs.tables import (
    IS_OWNED,
    checkpoints,
    deletions,
    experiments,
    idempotency_keys,
    jobs,
)

CANCEL_GRACE_S = 7.0  # with a sweep every 2 s, a cancel ends within 10 s even when its worker is dead
MOST_DEBTS = 500  # directories freed in a round of the sweeper
MOST_EXPIRED = 100


@dataclass(frozen=True)
class Swept:
    """What a sweep found. runnable: a queued job is due, so ring. debts: directories of removed jobs still to be freed."""

    moved: list[tuple[str, JobState]]
    runnable: int
    debts: list[str]


def sweep(tx: Tx) -> Swept:
    """Move on the jobs whose lease has passed, end cancels whose worker is silent. Safe to run any number of times at once."""
    overdue = _overdue(tx)
    moved = []
    # by id: two sweepers that locked the same jobs in different orders would wait for each other; sorted here, because ORDER BY id
    # makes SQLite walk all jobs ever stored
    for job_id in sorted(row.id for row in tx.all(select(jobs.c.id).where(overdue))):
        row = tx.one(for_update(tx, select(jobs).where(jobs.c.id == job_id, overdue)))
        if row is not None:
            moved.append((row.id, end_attempt(tx, row, End(Outcome.LOST, _worker_lost(row)))))
    tx.run(delete(idempotency_keys).where(_expired(tx)))
    runnable = len(tx.all(select(jobs.c.id).where(is_runnable(tx)).limit(CLAIM_CANDIDATES)))
    owed = select(deletions.c.path).where(debts.due(tx)).order_by(deletions.c.created_at).limit(MOST_DEBTS)
    return Swept(moved, runnable, [row.path for row in tx.all(owed)])


def expire(tx: Tx, *, limit: int = MOST_EXPIRED) -> list[str]:
    """Delete jobs that have outlived their end by their `ttl_seconds`, or else by the server's; their ids, the first ended first.

    A job stays while one of its checkpoints is pinned, while a job that has not ended starts from one, while its experiment has not ended,
    or, for a week, while its copy in MLflow is not whole.
    """
    if not has_outlived(tx):
        return []
    query = (
        select(jobs.c.id).where(_outlived(tx), jobs.c.id.not_in(_origins_in_use(tx))).order_by(jobs.c.finished_at, jobs.c.id).limit(limit)
    )
    if tx.connection.dialect.name == "postgresql":
        query = query.with_for_update(skip_locked=True)  # of two sweepers each takes what the other leaves
    ids = [row.id for row in tx.all(query)]
    forget(tx, ids)
    return ids


def has_outlived(tx: Tx) -> bool:
    """Whether `expire` may find something: a look that takes no write lock. It reads every job that has ended."""
    return tx.one(select(jobs.c.id).where(_outlived(tx)).limit(1)) is not None


def _outlived(tx: Tx) -> ColumnElement[bool]:
    over = jobs.c.finished_at <= tx.now_ms - 1000 * jobs.c.ttl_s  # NULL, and so not over, where the job has none of its own
    if tx.job_ttl_s is not None:
        over = or_(over, and_(jobs.c.ttl_s.is_(None), jobs.c.finished_at <= tx.now_ms - int(1000 * tx.job_ttl_s)))
    pinned = select(checkpoints.c.step).where(checkpoints.c.job_id == jobs.c.id, checkpoints.c.pinned)
    at_work = select(experiments.c.id).where(experiments.c.id == jobs.c.experiment, experiments.c.finished_at.is_(None))
    return and_(jobs.c.finished_at.is_not(None), over, ~pinned.exists(), ~at_work.exists(), ~copies.is_waited_for(tx))


def _origins_in_use(tx: Tx) -> set[str]:
    """Jobs from whose weights others start that have not ended."""
    origin = jobs.c.spec["model"]["init_from"].as_string()
    alive = jobs.c.state.in_([state for state in JobState if state not in TERMINAL])
    rows = tx.all(select(origin.label("origin")).distinct().where(jobs.c.owner.in_(owners_with(tx, true())), alive, origin.is_not(None)))
    return {row.origin.partition("/")[0] for row in rows}


def expire_worker(tx: Tx, worker: str) -> list[str]:
    """End the leases of a worker that is known to be dead, so that the next sweep moves its jobs on; their ids."""
    held = and_(jobs.c.worker == worker, IS_OWNED)
    return [row.id for row in tx.all(update(jobs).where(held).values(lease_until=0).returning(jobs.c.id))]


def needs_sweep(tx: Tx) -> bool:
    """Whether `sweep` would find something to do: a look that takes no write lock."""
    looks = (
        select(jobs.c.id).where(_overdue(tx)),
        select(idempotency_keys.c.key).where(_expired(tx)),
        select(deletions.c.path).where(debts.due(tx)),
    )
    return any(tx.one(look.limit(1)) is not None for look in looks)


def _overdue(tx: Tx) -> ColumnElement[bool]:
    lapsed = jobs.c.lease_until < tx.now_ms
    unheard = and_(jobs.c.state == JobState.CANCELLING, jobs.c.cancel_requested_at < tx.now_ms - int(CANCEL_GRACE_S * 1000))
    return and_(IS_OWNED, or_(lapsed, unheard))


def _expired(tx: Tx) -> ColumnElement[bool]:
    return idempotency_keys.c.created_at < tx.now_ms - int(IDEMPOTENCY_TTL_S * 1000)


def _worker_lost(row: Row[Any]) -> Reason:
    return Reason(
        ReasonCode.WORKER_LOST,
        f"worker {row.worker} stopped renewing its lease on attempt {row.attempt}",
        "The worker or its machine was killed, froze, or lost the database. The job goes on from its last checkpoint while attempts are left.",
        {"worker": row.worker, "attempt": row.attempt},
    )
