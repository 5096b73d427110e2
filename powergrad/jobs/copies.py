"""Which jobs are to be copied to MLflow, and how far each copy has come.

A row is made with the job, so that no job is missed, and claimed by a conditional UPDATE like a webhook's delivery: `due_at` becomes the
end of a lease, `attempt` counts claims and fences what a late copier would store. A job that has ended and is copied whole is due no more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, and_, exists, insert, select, update

from powergrad.jobs.store import Tx
from powergrad.jobs.tables import jobs, mlflow_copies

LEASE_MS = 120_000  # far longer than a round of calls to a server that answers
LONGEST_PAUSE_S = 600.0
FIRST_PAUSE_S = 5.0
WAITED_FOR_MS = 7 * 24 * 3600 * 1000
"""How long a job that has outlived its end stays for a copy that cannot be made."""


@dataclass(frozen=True)
class Copy:
    """A claimed round. attempt fences its result; cursor: what earlier rounds have copied, empty before the first."""

    job_id: str
    attempt: int
    failures: int
    cursor: dict[str, Any]


def begin(tx: Tx, job_ids: Iterable[str]) -> None:
    """Have new jobs copied."""
    rows = [{"job_id": job_id, "due_at": tx.now_ms, "attempt": 0, "failures": 0, "cursor": {}} for job_id in job_ids]
    if rows:
        tx.run(insert(mlflow_copies), rows)


def wake(tx: Tx, job_id: str) -> None:
    """A job that had ended goes on: its copy does too. Nothing for one that is not copied."""
    tx.run(update(mlflow_copies).where(mlflow_copies.c.job_id == job_id, mlflow_copies.c.due_at.is_(None)).values(due_at=tx.now_ms))


def due(tx: Tx, *, limit: int = 20) -> list[str]:
    """Jobs whose copy is due, the longest due first."""
    query = select(mlflow_copies.c.job_id).where(mlflow_copies.c.due_at <= tx.now_ms)
    return [row.job_id for row in tx.all(query.order_by(mlflow_copies.c.due_at).limit(limit))]


def claim(tx: Tx, job_id: str) -> Copy | None:
    """Take the next round; None when another has it, or the job is gone."""
    taken = {"attempt": mlflow_copies.c.attempt + 1, "due_at": tx.now_ms + LEASE_MS}
    mine = and_(mlflow_copies.c.job_id == job_id, mlflow_copies.c.due_at <= tx.now_ms)
    columns = (mlflow_copies.c.attempt, mlflow_copies.c.failures, mlflow_copies.c.cursor)
    row = tx.one(update(mlflow_copies).where(mine).values(**taken).returning(*columns))
    return None if row is None else Copy(job_id, row.attempt, row.failures, dict(row.cursor))


def settle(tx: Tx, copy: Copy, cursor: dict[str, Any], *, again_in_s: float | None) -> None:
    """A round went well. again_in_s: None when the job has ended and all of it is copied; a retry that came meanwhile counts."""
    goes_on = select(jobs.c.id).where(jobs.c.id == copy.job_id, jobs.c.revision != cursor.get("revision"))
    if again_in_s is None and tx.one(goes_on) is not None:
        again_in_s = 0.0
    due_at = None if again_in_s is None else tx.now_ms + int(again_in_s * 1000)
    tx.run(update(mlflow_copies).where(_held(copy)).values(cursor=cursor, due_at=due_at, failures=0, error=None))


def put_off(tx: Tx, copy: Copy, cursor: dict[str, Any], error: str) -> None:
    """A round failed: the next comes later, and later again with each failure in a row. cursor: what was copied all the same."""
    pause_s = min(FIRST_PAUSE_S * 2 ** min(copy.failures, 16), LONGEST_PAUSE_S)
    values = {"cursor": cursor, "due_at": tx.now_ms + int(pause_s * 1000), "failures": copy.failures + 1, "error": error[:500]}
    tx.run(update(mlflow_copies).where(_held(copy)).values(**values))


def give_up(tx: Tx, copy: Copy, cursor: dict[str, Any], error: str) -> None:
    """The copy was deleted where it lay: it is not made again."""
    tx.run(update(mlflow_copies).where(_held(copy)).values(cursor=cursor, due_at=None, error=error[:500]))


def is_waited_for(tx: Tx) -> ColumnElement[bool]:
    """Of a job: its copy is not whole yet, and it ended less than WAITED_FOR_MS ago."""
    unfinished = exists().where(mlflow_copies.c.job_id == jobs.c.id, mlflow_copies.c.due_at.is_not(None))
    return and_(unfinished, jobs.c.finished_at > tx.now_ms - WAITED_FOR_MS)


def _held(copy: Copy) -> ColumnElement[bool]:
    return and_(mlflow_copies.c.job_id == copy.job_id, mlflow_copies.c.attempt == copy.attempt)
