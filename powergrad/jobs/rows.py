"""The one way a job row changes: each by one conditional UPDATE and with its event in the same transaction.

Every function takes an open write transaction (`Store.write()`); the caller commits. The row is the job; messages are doorbells. `attempt`
fences: what a run writes says WHERE id AND attempt AND state, and no row means `Fenced`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Row, and_, delete, func, insert, or_, select, update

from powergrad.jobs import copies, outbox, quotas
from powergrad.jobs.debts import owe
from powergrad.jobs.errors import (
    Fenced,
    IllegalMove,
    JobNotFound,
)
from powergrad.jobs.experiments import news
from powergrad.jobs.states import MOVES, TERMINAL, End, JobState, NextMove, Outcome, next_move
from powergrad.jobs.store import Tx
from powergrad.jobs.tables import (
    IS_OWNED,
    IS_QUEUED,
    artifacts,
    attempts,
    checkpoints,
    events,
    idempotency_keys,
    job_labels,
    jobs,
    metric_chunks,
    mlflow_copies,
    tasks,
)

LOCAL_OWNER = "local"
LEASE_TTL_S = 30.0
Event = tuple[str, dict[str, Any]]


def whole_seconds(seconds: float | None) -> int | None:
    return None if seconds is None else math.ceil(seconds)


def forget(tx: Tx, job_ids: Sequence[str]) -> None:
    """Delete all rows of jobs that this transaction holds, and owe their files."""
    if not job_ids:
        return
    for table in (job_labels, attempts, events, metric_chunks, checkpoints, artifacts, idempotency_keys, mlflow_copies):
        tx.run(delete(table).where(table.c.job_id.in_(job_ids)))
    asked = tx.all(delete(tasks).where(tasks.c.job_id.in_(job_ids)).returning(tasks.c.id))
    gone = tx.all(delete(jobs).where(jobs.c.id.in_(job_ids)).returning(jobs.c.id, jobs.c.seq, jobs.c.experiment))
    news.tell_all(tx, [(job.experiment, job.id, job.seq + 1) for job in gone if job.experiment is not None])
    owe(tx, *(f"tasks/{task.id}" for task in asked), *map(job_dir, job_ids))


def job_dir(job_id: str) -> str:
    """A job's directory below the artifact root."""
    return f"jobs/{job_id}"


@dataclass(frozen=True)
class Run:
    """One attempt's right to write about its job."""

    job_id: str
    attempt: int
    lease_ttl_s: float = LEASE_TTL_S


def owners_with(tx: Tx, which: ColumnElement[bool]) -> list[str]:
    """Owners of such jobs, one index look-up each: whoever queues a thousand jobs must not hide the others' few."""
    owners: list[str] = []
    while True:
        beyond = select(func.min(jobs.c.owner)).where(which, jobs.c.owner > (owners[-1] if owners else ""))
        owner = tx.run(beyond).scalar_one()
        if owner is None:
            return owners
        owners.append(owner)


def is_runnable(tx: Tx, *, gpus: float | None = None) -> ColumnElement[bool]:
    """Queued and due, and, where `gpus` is given, fit for a worker with so many."""
    due = or_(jobs.c.not_before.is_(None), jobs.c.not_before <= tx.now_ms)
    fits = () if gpus is None else (or_(jobs.c.gpus.is_(None), jobs.c.gpus <= gpus),)
    return and_(IS_QUEUED, due, *fits)


def locked(tx: Tx, job_id: str, *, owner: str = LOCAL_OWNER) -> Row[Any]:
    """The job's row, held until the transaction ends. Raises JobNotFound."""
    row = tx.one(for_update(tx, select(jobs).where(jobs.c.id == job_id, jobs.c.owner == owner)))
    if row is None:
        raise JobNotFound(job_id)
    return row


def for_update(tx: Tx, query: Any) -> Any:
    """SQLite's write transaction holds the only write lock already; PostgreSQL locks the row."""
    return query.with_for_update() if tx.connection.dialect.name == "postgresql" else query


def owned(run: Run) -> ColumnElement[bool]:
    return and_(jobs.c.id == run.job_id, jobs.c.attempt == run.attempt, IS_OWNED)


def end_attempt(tx: Tx, row: Row[Any], end: End, *, trained_ms: int = 0) -> JobState:
    state = JobState(row.state)
    then = next_move(state, end, failures=row.failures, max_attempts=row.max_attempts)
    reason = end.reason.as_json() if end.reason else None
    ended = {"ended_at": tx.now_ms, "outcome": end.outcome, "reason": reason}
    tx.run(update(attempts).where(attempts.c.job_id == row.id, attempts.c.number == row.attempt).values(**ended))
    quotas.charge(tx, row.owner, trained_ms * (row.gpus or 0))
    values: dict[str, Any] = {
        "failures": then.failures,
        "lease_until": None,
        "worker": None,
        "trained_ms": row.trained_ms + trained_ms,
        "reason": reason if then.keeps_reason else None,
        "progress": {**row.progress, "phase": None, "eta_s": None, "images_per_s": None},
    }
    if then.state is JobState.QUEUED:
        values["not_before"] = tx.now_ms + int(then.backoff_s * 1000) if then.backoff_s else None
        # queued_at stays: a job that was interrupted keeps its age, and so its place
    if then.state in TERMINAL:
        values["finished_at"] = tx.now_ms
        # a cancel that its worker did not answer: the trainer may live on until its lease ends, so a retry waits for that
        values["not_before"] = row.lease_until if end.outcome is Outcome.LOST and row.lease_until > tx.now_ms else None
    told: dict[str, Any] = {"attempt": row.attempt, "outcome": end.outcome}
    if end.reason is not None and state is not JobState.CANCELLING:
        told["reason"] = {"code": end.reason.code, "detail": end.reason.detail}
    move(tx, row, then.state, values, before=[("attempt_ended", told)], extra=_why(row, end, then))
    return then.state


def _why(row: Row[Any], end: End, then: NextMove) -> dict[str, Any]:
    """What the event of a move says beside where from and where to."""
    if end.outcome is Outcome.HELD and then.state is JobState.PAUSED:
        return {"reason": f"held at epoch {row.progress['epoch']}"}
    return {"retry_in_s": then.backoff_s} if then.backoff_s else {}


def go_on(tx: Tx, row: Row[Any], hold_epoch: int | None) -> None:
    """Put a paused job, whose row this transaction holds, back into the queue; it pauses itself after `hold_epoch` epochs (None: no more).

    It keeps its age, and so comes before those that were submitted after it and have not begun. Raises IllegalMove.
    """
    state = JobState(row.state)
    if state is not JobState.PAUSED:
        raise IllegalMove("resume", state)
    move(tx, row, JobState.QUEUED, {"hold_epoch": hold_epoch, "not_before": None})


def move(
    tx: Tx,
    row: Row[Any],
    to: JobState,
    values: dict[str, Any] | None = None,
    *,
    before: Sequence[Event] = (),
    extra: dict[str, Any] | None = None,
) -> None:
    """Change the state of a row that this transaction has read and holds."""
    origin = JobState(row.state)
    assert to in MOVES[origin], f"no move from {origin} to {to}"
    where = and_(jobs.c.id == row.id, jobs.c.state == origin, jobs.c.attempt == row.attempt)
    name, told = state_event(origin, to, row.attempt)
    happened = [*before, (name, {**told, **(extra or {})})]
    if write(tx, where, {**(values or {}), "state": to, "version": row.version + 1}, happened) is None:
        raise Fenced(row.id, row.attempt)
    outbox.announce(tx, row, to, (values or {}).get("reason"))
    if origin in TERMINAL:
        copies.wake(tx, row.id)


def move_all(tx: Tx, rows: Sequence[Row[Any]], path: Sequence[JobState], values: dict[str, Any] | None = None) -> None:
    """Move many jobs, whose rows this transaction has read and holds, through the same states, each with its events: a few statements."""
    if not rows:
        return
    for row in rows:
        hops = list(zip([JobState(row.state), *path], path, strict=False))
        assert all(to in MOVES[origin] for origin, to in hops), f"no way from {row.state} through {', '.join(path)}"
    counted = {name: jobs.c[name] + len(path) for name in ("seq", "version")} | {"revision": jobs.c.revision + 1}
    ids = [row.id for row in rows]
    moved = tx.run(update(jobs).where(jobs.c.id.in_(ids)).values(**(values or {}), **counted, state=path[-1])).rowcount
    assert moved == len(ids), "they are held"
    tx.run(insert(events), [event for row in rows for event in _hops_told(tx, row, path)])
    for row in rows:
        for to in path:
            outbox.announce(tx, row, to)
    news.tell_all(tx, [(row.experiment, row.id, row.seq + len(path)) for row in rows if row.experiment is not None])


def _hops_told(tx: Tx, row: Row[Any], path: Sequence[JobState]) -> list[dict[str, Any]]:
    told = [state_event(origin, to, row.attempt) for origin, to in zip([JobState(row.state), *path], path, strict=False)]
    return [{"job_id": row.id, "seq": row.seq + 1 + i, "at": tx.now_ms, "type": kind, "data": data} for i, (kind, data) in enumerate(told)]


def state_event(origin: JobState, to: JobState, attempt: int) -> Event:
    return "state", {"from": origin, "to": to, "attempt": attempt}


def write(tx: Tx, where: ColumnElement[bool], values: dict[str, Any], happened: Sequence[Event]) -> Row[Any] | None:
    """UPDATE one job and append its events, numbered from the row's own counter; None when the condition found no row."""
    counted = {"seq": jobs.c.seq + len(happened), "revision": jobs.c.revision + 1}
    row = tx.one(update(jobs).where(where).values(**values, **counted).returning(jobs.c.id, jobs.c.seq, jobs.c.experiment))
    if row is not None and row.experiment is not None and "state" in values:
        news.tell(tx, row.experiment, row.id, row.seq)
    if row is not None and happened:
        first = row.seq - len(happened) + 1
        numbered = [
            {"job_id": row.id, "seq": first + i, "at": tx.now_ms, "type": kind, "data": data} for i, (kind, data) in enumerate(happened)
        ]
        tx.run(insert(events), numbered)
    return row


def put_labels(tx: Tx, job_id: str, labels: dict[str, str]) -> None:
    if labels:
        tx.run(insert(job_labels), [{"job_id": job_id, "key": key, "value": value} for key, value in labels.items()])
