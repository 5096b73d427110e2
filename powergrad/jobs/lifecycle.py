"""What a user does with a job that is there: cancel, pause, resume, retry, amend, remove.

Every function takes an open write transaction (`Store.write()`); the caller commits, and rings the workers only after that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from sqlalchemy import Row, delete, select

from powergrad.jobs import quotas
from powergrad.jobs.errors import (
    IllegalMove,
    InvalidSpec,
    VersionMismatch,
)
from powergrad.jobs.retention import let_go
from powergrad.jobs.rows import LOCAL_OWNER, for_update, forget, job_dir, locked, move, put_labels, whole_seconds, write
from powergrad.jobs.spec import JobSpec, violations_of
from powergrad.jobs.states import OWNED, TERMINAL, JobState
from powergrad.jobs.store import Tx
from powergrad.jobs.tables import (
    job_labels,
    jobs,
)


def cancel(tx: Tx, job_id: str, *, owner: str = LOCAL_OWNER) -> JobState:
    """Ask for the end of a job; the state it is in now. Twice is no error. Raises JobNotFound, IllegalMove."""
    row = locked(tx, job_id, owner=owner)
    state = JobState(row.state)
    if state in (JobState.CANCELLING, JobState.CANCELLED):
        return state
    if state in TERMINAL:
        raise IllegalMove("cancel", state)
    asked = {"cancel_requested_at": tx.now_ms}
    move(tx, row, JobState.CANCELLING, asked)
    if state in (JobState.QUEUED, JobState.PAUSED):
        move(tx, locked(tx, job_id, owner=owner), JobState.CANCELLED, {"finished_at": tx.now_ms, "not_before": None})
        return JobState.CANCELLED
    return JobState.CANCELLING


def pause(tx: Tx, job_id: str, *, owner: str = LOCAL_OWNER) -> JobState:
    """Ask a job to write a checkpoint and give its device back; the state it is in now. Twice is no error."""
    row = locked(tx, job_id, owner=owner)
    match JobState(row.state):
        case JobState.PAUSING | JobState.PAUSED as state:
            return state
        case JobState.QUEUED:
            move(tx, row, JobState.PAUSED)
            return JobState.PAUSED
        case JobState.RUNNING:
            move(tx, row, JobState.PAUSING)
            return JobState.PAUSING
        case state:
            raise IllegalMove("pause", state)


def resume(tx: Tx, job_id: str, *, owner: str = LOCAL_OWNER) -> JobState:
    """Put a paused job back into the queue, to run to its end; the state it is in now. Twice is no error. Raises QuotaExceeded."""
    is_limited = bool(quotas.limited(tx, [owner]))  # before the row: a submission waits for the two in this order
    row = locked(tx, job_id, owner=owner)
    match JobState(row.state):
        case JobState.QUEUED | JobState.RUNNING as state:
            return state
        case JobState.PAUSED:
            if is_limited:
                quotas.check_queued(tx, owner)
            move(tx, row, JobState.QUEUED, {"queued_at": tx.now_ms, "not_before": None, "hold_epoch": None})
            return JobState.QUEUED
        case JobState.PAUSING:
            raise IllegalMove("resume", JobState.PAUSING, "wait until it is paused")
        case state:
            raise IllegalMove("resume", state)


@dataclass(frozen=True)
class RaisedLimits:
    """New limits given with a retry; None keeps the old one."""

    max_seconds: float | None = None
    max_attempts: int | None = None
    stall_seconds: float | None = None


def retry(tx: Tx, job_id: str, *, limits: RaisedLimits | None = None, owner: str = LOCAL_OWNER) -> JobState:
    """Queue a failed or cancelled job again: it goes on from its last checkpoint, with a fresh count of failures.

    Raises InvalidSpec for limits out of range, QuotaExceeded.
    """
    is_limited = bool(quotas.limited(tx, [owner]))
    row = locked(tx, job_id, owner=owner)
    state = JobState(row.state)
    if state not in (JobState.FAILED, JobState.CANCELLED):
        raise IllegalMove("retry", state, "only a failed or cancelled job can go on")
    if is_limited:
        quotas.check_queued(tx, owner)
    raised = {name: value for name, value in vars(limits or RaisedLimits()).items() if value is not None}
    spec = {**row.spec, "limits": {**row.spec["limits"], **raised}}
    try:
        JobSpec.model_validate(spec)
    except ValidationError as error:
        raise InvalidSpec(violations_of(error, JobSpec)) from error
    fresh = {
        "failures": 0,
        "reason": None,
        "spec": spec,
        "max_attempts": spec["limits"]["max_attempts"],
        "queued_at": tx.now_ms,
        "finished_at": None,
        "cancel_requested_at": None,
        "hold_epoch": None,
    }
    move(tx, row, JobState.QUEUED, fresh, extra={"retry": True, **raised})
    return JobState.QUEUED


@dataclass(frozen=True)
class Amendment:
    """The user's fields to change; None leaves a field as it is.

    retention: of keep_last, keep_best and ttl_seconds those to change; ttl_seconds None is the server's own rule again.
    """

    name: str | None = None
    labels: dict[str, str] | None = None
    notes: str | None = None
    priority: int | None = None
    retention: dict[str, Any] | None = None


def amend(tx: Tx, job_id: str, change: Amendment, *, expected_version: int | None = None, owner: str = LOCAL_OWNER) -> None:
    """Change the user's own fields of a job in any state. Raises VersionMismatch when `expected_version` is not the job's.

    A new retention counts at once for a job that no worker holds; for one that runs, at its next checkpoint.
    """
    row = locked(tx, job_id, owner=owner)
    if expected_version is not None and expected_version != row.version:
        raise VersionMismatch(expected_version, row.version)
    values = {name: value for name, value in vars(change).items() if value is not None}
    if not values:
        return
    told = {"fields": sorted(values)}
    if change.retention is not None:
        values |= _new_retention(row, change.retention)
    if change.labels is not None:
        tx.run(delete(job_labels).where(job_labels.c.job_id == job_id))
        put_labels(tx, job_id, change.labels)
    write(tx, jobs.c.id == job_id, {**values, "version": row.version + 1}, [("amended", told)])
    if change.retention is not None and JobState(row.state) not in OWNED:
        let_go(tx, job_id)


def _new_retention(row: Row[Any], change: dict[str, Any]) -> dict[str, Any]:
    """The columns that hold it: when the job goes is a number to look for, what it keeps is not."""
    kept = {name: value for name, value in change.items() if name != "ttl_seconds"}
    ttl = {"ttl_s": whole_seconds(change["ttl_seconds"])} if "ttl_seconds" in change else {}
    return {"retention": {**row.retention, **kept}, **ttl}


def remove(tx: Tx, job_id: str, *, owner: str = LOCAL_OWNER) -> str:
    """Delete a terminal job and all that is stored of it; the directory whose files are to be freed after the commit."""
    row = locked(tx, job_id, owner=owner)
    if JobState(row.state) not in TERMINAL:
        raise IllegalMove("delete", row.state, "cancel it first")
    forget(tx, [job_id])
    return job_dir(job_id)


@dataclass(frozen=True)
class Removed:
    """Jobs that were deleted, newest first, and what their checkpoints and artifacts took."""

    ids: list[str]
    bytes: int


def remove_all(tx: Tx, job_ids: Sequence[str], *, owner: str = LOCAL_OWNER) -> Removed:
    """Delete the owner's jobs among these that have ended; the others are left. Their files stay a debt, for the sweeper."""
    mine = (jobs.c.id.in_(list(job_ids)), jobs.c.owner == owner, jobs.c.state.in_(list(TERMINAL)))
    rows = tx.all(for_update(tx, select(jobs.c.id, jobs.c.bytes).where(*mine).order_by(jobs.c.id)))
    ids = [row.id for row in reversed(rows)]
    forget(tx, ids)
    return Removed(ids, sum(row.bytes for row in rows))
