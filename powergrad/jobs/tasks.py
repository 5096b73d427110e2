"""Short work for a limited child of a worker (a prediction, a statistic), its result stored; nothing of it is training.

    anybody     submit  get
    worker      claim  renew  give_back  finish  fail
    sweeper     sweep

A task is claimed like a job, by one conditional UPDATE that moves its `attempt`, which fences every later write. The lease of a short one
is as long as it may run at all, a long one's is renewed. Its states are four of the jobs' own. Files that go with it lie in `task_dir(id)`,
and go with it.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from sqlalchemy import ColumnElement, Row, and_, delete, insert, or_, select, update
from ulid import ULID

from powergrad.jobs import datasets
from powergrad.jobs.debts import owe
from powergrad.jobs.errors import Fenced, TaskNotFound
from powergrad.jobs.experiments import answers
from powergrad.jobs.rows import LOCAL_OWNER
from powergrad.jobs.states import JobState
from powergrad.jobs.store import Tx, rfc3339
from powergrad.jobs.tables import TASK_RUNS, TASK_WAITS, tasks

MAX_ATTEMPTS = 3
KEPT_S = 24 * 3600.0
FORGOTTEN_AT_ONCE = 100
LONG = frozenset({datasets.CHECK})
"""Kinds that may take hours: they have a lane of their own, so that they never hold up the others."""


class Ended(Protocol):
    """Told of a task's end, in its transaction: of one of result and error."""

    def __call__(self, tx: Tx, task_id: str, *, result: dict[str, Any] | None, error: dict[str, Any] | None) -> None: ...


ENDED: dict[str, Ended] = {
    datasets.CHECK: datasets.check_ended,
    answers.KIND: answers.ended,
    answers.DRAW: answers.drawn,
    answers.DECIDE: answers.decided,
}


@dataclass(frozen=True)
class Task:
    """A task taken, for the worker that took it."""

    id: str
    kind: str
    arguments: dict[str, Any]
    attempt: int


def new_id(tx: Tx) -> str:
    """An id for `submit`, so that files can be put in place before the task is seen."""
    return f"task_{ULID.from_timestamp(tx.now_ms)}"


def task_dir(task_id: str) -> str:
    """A task's directory below the artifact root."""
    return f"tasks/{task_id}"


def submit(tx: Tx, task_id: str, kind: str, arguments: dict[str, Any], *, job_id: str | None = None, owner: str = LOCAL_OWNER) -> None:
    """Store a task; ring after the commit. arguments: JSON, paths in it relative to the artifact root."""
    row = {"id": task_id, "kind": kind, "owner": owner, "job_id": job_id, "arguments": arguments}
    tx.run(insert(tasks).values(**row, state=JobState.QUEUED, attempt=0, created_at=tx.now_ms))


def get(tx: Tx, task_id: str, *, owner: str = LOCAL_OWNER) -> dict[str, Any]:
    """A task as JSON. Raises TaskNotFound."""
    row = tx.one(select(tasks).where(tasks.c.id == task_id, tasks.c.owner == owner))
    if row is None:
        raise TaskNotFound(task_id)
    return {
        "id": row.id,
        "object": "task",
        "kind": row.kind,
        "job": row.job_id,
        "state": row.state,
        "attempt": row.attempt,
        "result": row.result,
        "error": row.error,
        "created_at": rfc3339(row.created_at),
        "started_at": rfc3339(row.started_at),
        "finished_at": rfc3339(row.finished_at),
    }


def pulse(tx: Tx, task_ids: list[str]) -> dict[str, tuple[int, int, JobState]]:
    """What a tailer watches, in the shape of the jobs': attempt, 0 (tasks have no events) and state."""
    rows = tx.all(select(tasks.c.id, tasks.c.attempt, tasks.c.state).where(tasks.c.id.in_(task_ids)))
    return {row.id: (row.attempt, 0, JobState(row.state)) for row in rows}


def has_work(tx: Tx, *, long: bool = False) -> bool:
    """Whether a task waits: of the long kinds, or of all others."""
    return tx.one(select(tasks.c.id).where(TASK_WAITS, _in_lane(long=long)).limit(1)) is not None


def _in_lane(*, long: bool) -> ColumnElement[bool]:
    return tasks.c.kind.in_(LONG) if long else tasks.c.kind.not_in(LONG)


def claim(tx: Tx, *, lease_s: float, long: bool = False) -> Task | None:
    """Take the task of a lane that has waited longest, for so long; None when none waits (or others took what did)."""
    for candidate in tx.all(select(tasks).where(TASK_WAITS, _in_lane(long=long)).order_by(tasks.c.id).limit(8)):
        taken = {
            "state": JobState.RUNNING,
            "attempt": candidate.attempt + 1,
            "lease_until": tx.now_ms + int(lease_s * 1000),
            "started_at": tx.now_ms,
        }
        mine = and_(tasks.c.id == candidate.id, TASK_WAITS, tasks.c.attempt == candidate.attempt)
        if tx.run(update(tasks).where(mine).values(**taken)).rowcount:
            return Task(candidate.id, candidate.kind, candidate.arguments, candidate.attempt + 1)
    return None


def renew(tx: Tx, task: Task, *, lease_s: float) -> None:
    """Keep a task for so long from now on. Raises Fenced."""
    if not tx.run(update(tasks).where(_own(task)).values(lease_until=tx.now_ms + int(lease_s * 1000))).rowcount:
        raise Fenced(task.id, task.attempt)


def give_back(tx: Tx, task: Task) -> None:
    """Let another worker have it at once. Raises Fenced."""
    if not tx.run(update(tasks).where(_own(task)).values(state=JobState.QUEUED, lease_until=None)).rowcount:
        raise Fenced(task.id, task.attempt)


def finish(tx: Tx, task: Task, result: dict[str, Any]) -> None:
    """Store what came of it. Raises Fenced."""
    _end(tx, _own(task), task, {"state": JobState.SUCCEEDED, "result": result})


def fail(tx: Tx, task: Task, code: str, detail: str) -> None:
    """Store why nothing came of it. Raises Fenced."""
    _end(tx, _own(task), task, {"state": JobState.FAILED, "error": {"code": code, "detail": detail}})


def _own(task: Task) -> ColumnElement[bool]:
    return and_(tasks.c.id == task.id, tasks.c.attempt == task.attempt, TASK_RUNS)


def _end(tx: Tx, where: ColumnElement[bool], task: Task | Row[Any], values: dict[str, Any]) -> None:
    ended = {**values, "lease_until": None, "finished_at": tx.now_ms}
    if not tx.run(update(tasks).where(where).values(**ended)).rowcount:
        raise Fenced(task.id, task.attempt)
    owe(tx, task_dir(task.id))
    if task.kind in ENDED:
        ENDED[task.kind](tx, task.id, result=values.get("result"), error=values.get("error"))


def needs_sweep(tx: Tx) -> bool:
    """Whether `sweep` would find something to do: a look that takes no write lock."""
    return any(tx.one(select(tasks.c.id).where(look).limit(1)) is not None for look in (_lapsed(tx), _over(tx)))


def sweep(tx: Tx) -> list[str]:
    """Queue again what a lost worker held (or fail it, after MAX_ATTEMPTS), forget what is older than a day; ids of what waits again."""
    again = []
    for row in tx.all(select(tasks).where(_lapsed(tx)).order_by(tasks.c.id)):
        mine = and_(tasks.c.id == row.id, tasks.c.attempt == row.attempt, _lapsed(tx))
        if row.attempt < MAX_ATTEMPTS:
            if tx.run(update(tasks).where(mine).values(state=JobState.QUEUED, lease_until=None)).rowcount:
                again.append(row.id)
        else:
            _give_up(tx, mine, row)
    for row in tx.all(select(tasks.c.id).where(_over(tx)).order_by(tasks.c.created_at).limit(FORGOTTEN_AT_ONCE)):
        tx.run(delete(tasks).where(tasks.c.id == row.id))
        owe(tx, task_dir(row.id))
    return again


def _give_up(tx: Tx, mine: ColumnElement[bool], row: Row[Any]) -> None:
    error = {"code": "worker_lost", "detail": f"{MAX_ATTEMPTS} workers took it and were lost"}
    with suppress(Fenced):
        _end(tx, mine, row, {"state": JobState.FAILED, "error": error})


def _lapsed(tx: Tx) -> ColumnElement[bool]:
    return and_(TASK_RUNS, tasks.c.lease_until < tx.now_ms)


def _over(tx: Tx) -> ColumnElement[bool]:
    """Made more than a day ago and not at work just now."""
    idle = or_(tasks.c.state != JobState.RUNNING, tasks.c.lease_until < tx.now_ms)
    return and_(tasks.c.created_at < tx.now_ms - int(KEPT_S * 1000), idle)
