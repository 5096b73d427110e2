"""The life of a job: every change of its row is made here, each by one conditional UPDATE and with its event in the same transaction.

    user        submit  cancel  pause  resume  retry  amend  remove
    worker      claim  renew  record  prune  finish
    anybody     sweep  expire

Every function takes an open write transaction (`Store.write()`); the caller commits, and rings the workers only after that. The row is
the job; messages are doorbells. `attempt` fences: what a run writes says WHERE id AND attempt AND state, and no row means `Fenced`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ValidationError
from sqlalchemy import ColumnElement, Row, and_, delete, func, insert, or_, select, true, update
from ulid import ULID

from powergrad import protocol
from powergrad.jobs import accounts, datasets, debts, fleet, metrics, outbox, quotas
from powergrad.jobs.debts import owe
from powergrad.jobs.errors import (
    CheckpointNotFound,
    Fenced,
    IdempotencyMismatch,
    IllegalMove,
    InvalidSpec,
    JobError,
    JobNotFound,
    QuotaExceeded,
    VersionMismatch,
    Violation,
    refusal,
)
from powergrad.jobs.spec import JobSpec, default_name, violations_of
from powergrad.jobs.states import MOVES, OWNED, TERMINAL, End, JobState, Outcome, Reason, ReasonCode, next_move
from powergrad.jobs.store import Tx
from powergrad.jobs.tables import (
    IS_OWNED,
    IS_QUEUED,
    artifacts,
    attempts,
    checkpoints,
    deletions,
    events,
    idempotency_keys,
    job_labels,
    jobs,
    metric_chunks,
    tasks,
)

LOCAL_OWNER = "local"
LEASE_TTL_S = 30.0
CANCEL_GRACE_S = 7.0  # with a sweep every 2 s, a cancel ends within 10 s even when its worker is dead
IDEMPOTENCY_TTL_S = 24 * 3600.0
CLAIM_CANDIDATES = 64
BEST_BY = "val_top1"
MOST_DEBTS = 500  # directories freed in a round of the sweeper
MOST_EXPIRED = 100

STORING = (protocol.CheckpointWritten, protocol.CheckpointSkipped, protocol.RolledBack, protocol.ArtifactWritten)

Event = tuple[str, dict[str, Any]]

_INSERT_JOBS, _INSERT_EVENTS = insert(jobs), insert(events)


# --- what a user does ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Submission:
    """A job to store. body_sha256: of what was sent, compared when the idempotency key comes again."""

    spec: JobSpec
    owner: str = LOCAL_OWNER
    idempotency_key: str | None = None
    body_sha256: str = ""
    notes: str = ""
    cloned_from: str | None = None


@dataclass(frozen=True)
class Submitted:
    """replayed: the job was there before, under the same idempotency key. row: what was stored; None when replayed."""

    job_id: str
    replayed: bool
    row: dict[str, Any] | None = field(default=None, repr=False, compare=False)


def body_hash(body: Any) -> str:
    """SHA-256 of a decoded JSON body, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def submit(tx: Tx, new: Submission) -> Submitted:
    """Store a job, its first event and its idempotency key. Raises IdempotencyMismatch, InvalidSpec, QuotaExceeded."""
    (result,) = submit_all(tx, [new])
    if isinstance(result, JobError):
        raise result
    return result


def submit_all(tx: Tx, group: Sequence[Submission]) -> list[Submitted | JobError]:
    """Store many jobs by a few statements; the result of each, in order. One that is refused takes no other with it."""
    results: list[Submitted | JobError] = []
    fresh: list[dict[str, Any]] = []
    born: list[dict[str, Any]] = []
    queued: Counter[str] = Counter()
    limited = quotas.limited(tx, {new.owner for new in group})
    for new in group:
        job_id = f"job_{ULID.from_timestamp(tx.now_ms)}"  # the database's clock: ids sort as created_at does
        try:
            earlier = None if new.idempotency_key is None else _take_key(tx, new, job_id)
        except IdempotencyMismatch as error:
            results.append(error)
            continue
        if earlier is not None:
            results.append(Submitted(earlier, replayed=True))
            continue
        try:
            if new.owner in limited:
                quotas.check_submission(tx, new.owner, new=queued[new.owner] + 1)
            settled, dataset_id = _with_references_pinned(tx, new, job_id)
        except (InvalidSpec, QuotaExceeded) as error:
            _let_key_go(tx, new)
            results.append(error)
            continue
        queued[new.owner] += 1
        fresh.append({**_new_row(tx, job_id, settled), "dataset_id": dataset_id})
        born.append(_created(tx, fresh[-1], new))
        results.append(Submitted(job_id, replayed=False, row=fresh[-1]))
    if fresh:
        _put_jobs(tx, fresh, born)
    return results


def _put_jobs(tx: Tx, fresh: list[dict[str, Any]], born: list[dict[str, Any]]) -> None:
    tx.run(_INSERT_JOBS, fresh)
    tx.run(_INSERT_EVENTS, born)
    labels = [{"job_id": row["id"], "key": key, "value": value} for row in fresh for key, value in row["labels"].items()]
    if labels:
        tx.run(insert(job_labels), labels)


def _new_row(tx: Tx, job_id: str, new: Submission) -> dict[str, Any]:
    spec = new.spec
    return {
        "id": job_id,
        "owner": new.owner,
        "name": spec.name or default_name(spec),
        "state": JobState.QUEUED,
        "spec": spec.model_dump(mode="json"),
        "resolved": {},
        "gpus": spec.resources.gpus,
        "priority": spec.priority,
        "labels": spec.labels,
        "notes": new.notes,
        "retention": {"keep_last": spec.checkpoint.keep_last, "keep_best": spec.checkpoint.keep_best},
        "ttl_s": _whole_seconds(spec.retention.ttl_seconds),
        "bytes": 0,
        "attempt": 0,
        "failures": 0,
        "max_attempts": spec.limits.max_attempts,
        "version": 1,
        "revision": 1,
        "seq": 1,
        "trained_ms": 0,
        "progress": initial_progress(spec.epochs),
        "latest": {},
        "best": {},
        "created_at": tx.now_ms,
        "queued_at": tx.now_ms,
    }


def _whole_seconds(seconds: float | None) -> int | None:
    return None if seconds is None else math.ceil(seconds)


def _created(tx: Tx, row: dict[str, Any], new: Submission) -> dict[str, Any]:
    origin = {"cloned_from": new.cloned_from} if new.cloned_from else {}
    data = {"state": row["state"], "name": row["name"], **origin}
    return {"job_id": row["id"], "seq": 1, "at": tx.now_ms, "type": "created", "data": data}


def _take_key(tx: Tx, new: Submission, job_id: str) -> str | None:
    """The job stored earlier under this key, or None after taking the key for `job_id`. A concurrent twin waits for our commit here."""
    statement = tx.insert(idempotency_keys).on_conflict_do_nothing().returning(idempotency_keys.c.job_id)
    row = {"owner": new.owner, "key": new.idempotency_key, "body_sha256": new.body_sha256, "job_id": job_id, "created_at": tx.now_ms}
    if tx.one(statement, row) is not None:
        return None
    held = tx.one(select(idempotency_keys).where(idempotency_keys.c.owner == new.owner, idempotency_keys.c.key == new.idempotency_key))
    if held is None:
        return _take_key(tx, new, job_id)  # it was let go while we waited for it
    if held.body_sha256 != new.body_sha256:
        raise IdempotencyMismatch(new.idempotency_key or "")
    return str(held.job_id)


def _let_key_go(tx: Tx, new: Submission) -> None:
    """What was refused was not stored: its key may come again with another body."""
    if new.idempotency_key is not None:
        held = and_(idempotency_keys.c.owner == new.owner, idempotency_keys.c.key == new.idempotency_key)
        tx.run(delete(idempotency_keys).where(held))


def with_references_resolved(tx: Tx, spec: JobSpec, *, owner: str = LOCAL_OWNER) -> JobSpec:
    """The spec with names that move (best, latest, a data set's newest version) fixed to what they mean now.

    Raises UnknownReference, NotReady.
    """
    pinned, _ = datasets.with_version_pinned(tx, spec, owner=owner)
    return with_origin_resolved(tx, pinned, owner=owner)


def _with_references_pinned(tx: Tx, new: Submission, job_id: str) -> tuple[Submission, str | None]:
    """The same for a submission, with what it refers to kept for it; and the id of its data set. Raises UnknownReference, NotReady."""
    spec, dataset_id = datasets.with_version_pinned(tx, new.spec, owner=new.owner)
    settled = replace(new, spec=spec)
    return (settled if spec.model.init_from is None else _with_origin_pinned(tx, settled, job_id)), dataset_id


def _with_origin_pinned(tx: Tx, new: Submission, job_id: str) -> Submission:
    """The submission with the very checkpoint that `model.init_from` means now, kept from retention from here on.

    Raises UnknownReference, NotReady.
    """
    origin = str(new.spec.model.init_from).partition("/")[0]
    with suppress(JobNotFound):  # told below
        locked(tx, origin, owner=new.owner)  # before its checkpoints, as its own attempt does: the two never wait for each other
    spec = with_origin_resolved(tx, new.spec, owner=new.owner)
    pin(tx, origin, str(spec.model.init_from).partition("/")[2], by=job_id, owner=new.owner)
    return replace(new, spec=spec)


def with_origin_resolved(tx: Tx, spec: JobSpec, *, owner: str = LOCAL_OWNER) -> JobSpec:
    """The spec with `model.init_from` naming a step instead of best or latest. Raises UnknownReference, NotReady."""
    wanted = spec.model.init_from
    if wanted is None:
        return spec
    origin, _, name = wanted.partition("/")
    try:
        found = checkpoint_row(tx, origin, name or "best", owner=owner)
    except (JobNotFound, CheckpointNotFound) as error:
        code = "not_found" if isinstance(error, JobNotFound) or name.startswith("step-") else "no_checkpoint"
        raise refusal([Violation("/model/init_from", code, str(error), wanted)]) from None
    model = spec.model.model_copy(update={"init_from": f"{origin}/{checkpoint_id(found.step)}"})
    return spec.model_copy(update={"model": model})


def pin(tx: Tx, job_id: str, wanted: str, *, pinned: bool = True, by: str | None = None, owner: str = LOCAL_OWNER) -> str:
    """Keep a checkpoint (an id, best or latest) from retention, or leave it to it again; its id. Twice is no error.

    by: the job that needs it. Raises JobNotFound, CheckpointNotFound.
    """
    locked(tx, job_id, owner=owner)
    found = checkpoint_row(tx, job_id, wanted, owner=owner)
    if found.pinned is not pinned:
        here = and_(checkpoints.c.job_id == job_id, checkpoints.c.step == found.step)
        tx.run(update(checkpoints).where(here).values(pinned=pinned))
        told = {"id": checkpoint_id(found.step), "pinned": pinned} | ({} if by is None else {"by": by})
        _write(tx, jobs.c.id == job_id, {}, [("checkpoint_pinned", told)])
    return checkpoint_id(found.step)


def checkpoint_row(tx: Tx, job_id: str, wanted: str, *, owner: str = LOCAL_OWNER) -> Row[Any]:
    """A whole checkpoint by id, `best` or `latest`. Raises JobNotFound, CheckpointNotFound."""
    if tx.one(select(jobs.c.id).where(jobs.c.id == job_id, jobs.c.owner == owner)) is None:
        raise JobNotFound(job_id)
    rows = whole_checkpoints(tx, job_id)
    chosen = {"latest": rows[0] if rows else None, "best": best_of(rows)}.get(wanted) or next(
        (row for row in rows if checkpoint_id(row.step) == wanted), None
    )
    if chosen is None:
        raise CheckpointNotFound(job_id, wanted)
    return chosen


def whole_checkpoints(tx: Tx, job_id: str) -> Sequence[Row[Any]]:
    """Those that can be gone on from or downloaded, newest first."""
    query = select(checkpoints).where(checkpoints.c.job_id == job_id, checkpoints.c.broken.is_(False))
    return tx.all(query.order_by(checkpoints.c.step.desc()))


def best_of(rows: Sequence[Row[Any]]) -> Row[Any] | None:
    """The highest score, the earlier on a tie; without any score the newest."""
    scored = [row for row in rows if row.score is not None]
    return min(scored, key=lambda row: (-row.score, row.step)) if scored else (rows[0] if rows else None)


def cancel(tx: Tx, job_id: str, *, owner: str = LOCAL_OWNER) -> JobState:
    """Ask for the end of a job; the state it is in now. Twice is no error. Raises JobNotFound, IllegalMove."""
    row = locked(tx, job_id, owner=owner)
    state = JobState(row.state)
    if state in (JobState.CANCELLING, JobState.CANCELLED):
        return state
    if state in TERMINAL:
        raise IllegalMove("cancel", state)
    asked = {"cancel_requested_at": tx.now_ms}
    _move(tx, row, JobState.CANCELLING, asked)
    if state in (JobState.QUEUED, JobState.PAUSED):
        _move(tx, locked(tx, job_id, owner=owner), JobState.CANCELLED, {"finished_at": tx.now_ms, "not_before": None})
        return JobState.CANCELLED
    return JobState.CANCELLING


def pause(tx: Tx, job_id: str, *, owner: str = LOCAL_OWNER) -> JobState:
    """Ask a job to write a checkpoint and give its device back; the state it is in now. Twice is no error."""
    row = locked(tx, job_id, owner=owner)
    match JobState(row.state):
        case JobState.PAUSING | JobState.PAUSED as state:
            return state
        case JobState.QUEUED:
            _move(tx, row, JobState.PAUSED)
            return JobState.PAUSED
        case JobState.RUNNING:
            _move(tx, row, JobState.PAUSING)
            return JobState.PAUSING
        case state:
            raise IllegalMove("pause", state)


def resume(tx: Tx, job_id: str, *, owner: str = LOCAL_OWNER) -> JobState:
    """Put a paused job back into the queue; the state it is in now. Twice is no error. Raises QuotaExceeded."""
    is_limited = bool(quotas.limited(tx, [owner]))  # before the row: a submission waits for the two in this order
    row = locked(tx, job_id, owner=owner)
    match JobState(row.state):
        case JobState.QUEUED | JobState.RUNNING as state:
            return state
        case JobState.PAUSED:
            if is_limited:
                quotas.check_queued(tx, owner)
            _move(tx, row, JobState.QUEUED, {"queued_at": tx.now_ms, "not_before": None})
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
        raise InvalidSpec(violations_of(error)) from error
    fresh = {
        "failures": 0,
        "reason": None,
        "spec": spec,
        "max_attempts": spec["limits"]["max_attempts"],
        "queued_at": tx.now_ms,
        "finished_at": None,
        "cancel_requested_at": None,
    }
    _move(tx, row, JobState.QUEUED, fresh, extra={"retry": True, **raised})
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
        _put_labels(tx, job_id, change.labels)
    _write(tx, jobs.c.id == job_id, {**values, "version": row.version + 1}, [("amended", told)])
    if change.retention is not None and JobState(row.state) not in OWNED:
        _let_go(tx, job_id)


def _new_retention(row: Row[Any], change: dict[str, Any]) -> dict[str, Any]:
    """The columns that hold it: when the job goes is a number to look for, what it keeps is not."""
    kept = {name: value for name, value in change.items() if name != "ttl_seconds"}
    ttl = {"ttl_s": _whole_seconds(change["ttl_seconds"])} if "ttl_seconds" in change else {}
    return {"retention": {**row.retention, **kept}, **ttl}


def remove(tx: Tx, job_id: str, *, owner: str = LOCAL_OWNER) -> str:
    """Delete a terminal job and all that is stored of it; the directory whose files are to be freed after the commit."""
    row = locked(tx, job_id, owner=owner)
    if JobState(row.state) not in TERMINAL:
        raise IllegalMove("delete", row.state, "cancel it first")
    _forget(tx, [job_id])
    return job_dir(job_id)


@dataclass(frozen=True)
class Removed:
    """Jobs that were deleted, newest first, and what their checkpoints and artifacts took."""

    ids: list[str]
    bytes: int


def remove_all(tx: Tx, job_ids: Sequence[str], *, owner: str = LOCAL_OWNER) -> Removed:
    """Delete the owner's jobs among these that have ended; the others are left. Their files stay a debt, for the sweeper."""
    mine = (jobs.c.id.in_(list(job_ids)), jobs.c.owner == owner, jobs.c.state.in_(list(TERMINAL)))
    rows = tx.all(_for_update(tx, select(jobs.c.id, jobs.c.bytes).where(*mine).order_by(jobs.c.id)))
    ids = [row.id for row in reversed(rows)]
    _forget(tx, ids)
    return Removed(ids, sum(row.bytes for row in rows))


def _forget(tx: Tx, job_ids: Sequence[str]) -> None:
    """Delete all rows of jobs that this transaction holds, and owe their files."""
    if not job_ids:
        return
    for table in (job_labels, attempts, events, metric_chunks, checkpoints, artifacts, idempotency_keys):
        tx.run(delete(table).where(table.c.job_id.in_(job_ids)))
    asked = tx.all(delete(tasks).where(tasks.c.job_id.in_(job_ids)).returning(tasks.c.id))
    tx.run(delete(jobs).where(jobs.c.id.in_(job_ids)))
    owe(tx, *(f"tasks/{task.id}" for task in asked), *map(job_dir, job_ids))


def job_dir(job_id: str) -> str:
    """A job's directory below the artifact root."""
    return f"jobs/{job_id}"


def initial_progress(epochs: int) -> dict[str, Any]:
    """`progress` of a job that has not started."""
    return {
        "phase": None,
        "epoch": 0,
        "epochs": epochs,
        "step": 0,
        "steps": None,
        "fraction": 0.0,
        "eta_s": None,
        "images_per_s": None,
        "ended_early": None,
    }


# --- what a worker does ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Offer:
    """What a worker's free slots give. device: their name for people; cpu_threads: cores of one slot."""

    worker: str
    device: str
    gpus: int
    """GPU slots that the worker holds for this claim; 0 on a CPU slot."""
    cpu_threads: int
    lease_ttl_s: float = LEASE_TTL_S
    could_hold: int = 0
    """GPU slots that it could hold now; no more than `gpus` if smaller."""
    in_all: int = 0
    """GPU slots that it has, free or not; no more than it could hold if smaller."""

    @property
    def within_reach(self) -> int:
        return max(self.gpus, self.could_hold)


class SlotsWanted(Exception):
    """The next job wants another number of slots than the offer holds, and the worker could have them: offer again with `count`."""

    def __init__(self, count: int) -> None:
        super().__init__(f"the next job wants {count} slot(s)")
        self.count = count


@dataclass(frozen=True)
class Run:
    """One attempt's right to write about its job."""

    job_id: str
    attempt: int
    lease_ttl_s: float = LEASE_TTL_S


@dataclass(frozen=True)
class Claim:
    """A job taken: the run, its spec, and what earlier attempts left."""

    run: Run
    spec: JobSpec
    gpus: int
    cpu_threads: int
    precision: str | None  # fixed by the first attempt; None before it
    trained_s: float
    resume: list[protocol.ResumePoint] = field(default_factory=list)
    stored: frozenset[str] = frozenset()
    """Directories (relative to the job's) of all its checkpoints, those with it that cannot be gone on from."""
    init_from: Origin | None = None
    dataset: datasets.Place | None = None
    """Where an uploaded or registered set is; None for a built-in one."""


@dataclass(frozen=True)
class Origin:
    """Another job's weights to begin with. path: of the file, below the artifact root."""

    path: str
    sha256: str


def claim(tx: Tx, offer: Offer) -> Claim | None:
    """Take the best runnable job that fits the offer, or None: highest priority, then the owner with the fewest running, then age.

    A job that wants more GPUs than are free now keeps its turn: the worker that is to host it takes nothing that comes after it.
    Raises SlotsWanted.
    """
    hosts = _Hosts(tx)
    for candidate in _candidates(tx, offer):
        wanted = min(1, offer.gpus) if candidate.gpus is None else candidate.gpus
        if wanted > offer.within_reach:
            if hosts.take(wanted) == offer.worker:
                return None
            continue
        if max(1, wanted) != max(1, offer.gpus):
            raise SlotsWanted(max(1, wanted))
        spec = _readable_spec(tx, candidate)
        if spec is None:
            continue
        try:
            origin = _origin(tx, candidate, spec)
        except (JobNotFound, CheckpointNotFound) as error:
            _fail_without_origin(tx, candidate, error)
            continue
        place = None if candidate.dataset_id is None else datasets.place(tx, candidate.dataset_id)
        if candidate.dataset_id is not None and place is None:
            _fail_without_data(tx, candidate)
            continue
        cpu_threads = candidate.resolved.get("cpu_threads") or spec.resources.cpu_threads or offer.cpu_threads * max(1, wanted)
        resolved = {**candidate.resolved, "cpu_threads": cpu_threads, "gpus": wanted}
        values = {
            "state": JobState.RUNNING,
            "attempt": candidate.attempt + 1,
            "version": candidate.version + 1,
            "worker": offer.worker,
            "heard": 0,
            "lease_until": tx.now_ms + int(offer.lease_ttl_s * 1000),
            "not_before": None,
            "reason": None,
            "started_at": candidate.started_at or tx.now_ms,
            "resolved": resolved,
            "gpus": wanted,
            "progress": {**candidate.progress, "phase": "starting", "eta_s": None, "images_per_s": None},
        }
        # version: everything above was read before the row was ours, and the user may have changed it since
        where = and_(jobs.c.id == candidate.id, jobs.c.state == JobState.QUEUED, jobs.c.version == candidate.version)
        happened: list[Event] = [
            ("claimed", {"attempt": candidate.attempt + 1, "worker": offer.worker, "device": offer.device}),
            _state_event(JobState.QUEUED, JobState.RUNNING, candidate.attempt + 1),
        ]
        if _write(tx, where, values, happened) is None:
            continue  # somebody else has it
        outbox.announce(tx, candidate, JobState.RUNNING)
        taken = _claimed(tx, candidate, offer, spec=spec, gpus=wanted, cpu_threads=cpu_threads)
        return replace(taken, init_from=origin, dataset=place)
    return None


class _Hosts:
    """The workers that keep their free slots for jobs that wait for more: one job each, in the order of the queue.

    Every worker comes to the same answer by itself: a job's host is the smallest worker that could run it and keeps nothing for another
    one before it, the first by name among equals. What a worker does not see, jobs larger than itself, takes no host of its size away.
    """

    def __init__(self, tx: Tx) -> None:
        self._tx = tx
        self._free: list[tuple[int, str]] | None = None

    def take(self, gpus: int) -> str | None:
        """The host of the next job, which wants so many; None when there is none left."""
        if self._free is None:
            self._free = fleet.hosts(self._tx)
        host = next((host for host in self._free if host[0] >= gpus), None)
        if host is None:
            return None
        self._free.remove(host)
        return host[1]


def _origin(tx: Tx, candidate: Row[Any], spec: JobSpec) -> Origin | None:
    """What `model.init_from` stands for. Raises JobNotFound, CheckpointNotFound when it is gone, unless the job can go on without it."""
    if spec.model.init_from is None:
        return None
    job_id, _, name = spec.model.init_from.partition("/")
    try:
        found = checkpoint_row(tx, job_id, name or "best", owner=candidate.owner)
    except (JobNotFound, CheckpointNotFound):
        if whole_checkpoints(tx, candidate.id):
            return None  # it has weights of its own by now
        raise
    return Origin(f"{job_dir(job_id)}/{found.path}/model.safetensors", found.sha256)


def _fail_without_origin(tx: Tx, candidate: Row[Any], error: JobError) -> None:
    detail = f"model.init_from={candidate.spec['model']['init_from']}: {error}"
    hint = "The weights it was to start from have been deleted: submit it again with another model.init_from."
    _fail_unclaimed(tx, candidate, Reason(ReasonCode.DATA_MISSING, detail, hint, {}))


def _fail_without_data(tx: Tx, candidate: Row[Any]) -> None:
    data = candidate.spec["data"]
    detail = f"data set {data['dataset']} ({data['version']}) has been deleted"
    hint = "Upload it again: the same files are the same version. Then retry the job."
    _fail_unclaimed(tx, candidate, Reason(ReasonCode.DATA_MISSING, detail, hint, {}))


def _fail_unclaimed(tx: Tx, candidate: Row[Any], reason: Reason) -> None:
    """Fail a queued job that can never start, unless something has changed it since it was read."""
    held = tx.one(_for_update(tx, select(jobs).where(jobs.c.id == candidate.id, jobs.c.version == candidate.version)))
    if held is not None:
        _move(tx, held, JobState.FAILED, {"reason": reason.as_json(), "finished_at": tx.now_ms})


def _readable_spec(tx: Tx, candidate: Row[Any]) -> JobSpec | None:
    """The stored spec; None when this release cannot read it (another one stored it): then the job fails, and holds up no other."""
    try:
        return JobSpec.model_validate(candidate.spec)
    except ValidationError as error:
        detail = f"this release cannot read the stored spec: {InvalidSpec(violations_of(error))}"
        _fail_unclaimed(tx, candidate, Reason(ReasonCode.INTERNAL, detail, "Submit it again as a new job.", {}))
        return None


def _candidates(tx: Tx, offer: Offer) -> list[Row[Any]]:
    left = quotas.spent(tx)
    owners = [owner for owner in _owners(tx, IS_QUEUED) if left.get(owner) != 0]
    share = max(4, CLAIM_CANDIDATES // len(owners)) if owners else 0
    best = (
        select(jobs)
        .where(_runnable(tx, gpus=max(offer.within_reach, offer.in_all)))
        .order_by(jobs.c.priority.desc(), jobs.c.queued_at, jobs.c.id)
        .limit(share)
    )
    rows = [row for owner in owners for row in tx.all(best.where(jobs.c.owner == owner))]
    if len(owners) > 1:
        held = select(jobs.c.owner, func.count().label("n")).where(IS_OWNED).group_by(jobs.c.owner)
        running = {row.owner: row.n for row in tx.all(held)}
        rows.sort(key=lambda row: (-row.priority, running.get(row.owner, 0), row.queued_at, row.id))
    return rows


def _owners(tx: Tx, which: ColumnElement[bool]) -> list[str]:
    """Owners of such jobs, one index look-up each: whoever queues a thousand jobs must not hide the others' few."""
    owners: list[str] = []
    while True:
        beyond = select(func.min(jobs.c.owner)).where(which, jobs.c.owner > (owners[-1] if owners else ""))
        owner = tx.run(beyond).scalar_one()
        if owner is None:
            return owners
        owners.append(owner)


def _runnable(tx: Tx, *, gpus: int | None = None) -> ColumnElement[bool]:
    """Queued and due, and, where `gpus` is given, fit for a worker with so many."""
    due = or_(jobs.c.not_before.is_(None), jobs.c.not_before <= tx.now_ms)
    fits = () if gpus is None else (or_(jobs.c.gpus.is_(None), jobs.c.gpus <= gpus),)
    return and_(IS_QUEUED, due, *fits)


def _claimed(tx: Tx, candidate: Row[Any], offer: Offer, *, spec: JobSpec, gpus: int, cpu_threads: int) -> Claim:
    run = Run(candidate.id, candidate.attempt + 1, offer.lease_ttl_s)
    tx.run(insert(attempts).values(job_id=run.job_id, number=run.attempt, worker=offer.worker, device=offer.device, started_at=tx.now_ms))
    stored = tx.all(select(checkpoints).where(checkpoints.c.job_id == run.job_id).order_by(checkpoints.c.step.desc()))
    points = [
        protocol.ResumePoint(id=checkpoint_id(row.step), path=row.path, step=row.step, sha256=row.sha256)
        for row in stored
        if not row.broken
    ]
    return Claim(
        run=run,
        spec=spec,
        gpus=gpus,
        cpu_threads=cpu_threads,
        precision=candidate.resolved.get("precision"),
        trained_s=candidate.trained_ms / 1000,
        resume=points,
        stored=frozenset(row.path for row in stored),
    )


def has_work(tx: Tx, *, gpus: int) -> bool:
    """Whether a queued job is due that a worker with so many GPUs could run."""
    return tx.one(select(jobs.c.id).where(_runnable(tx, gpus=gpus)).limit(1)) is not None


def renew(tx: Tx, run: Run, *, trained_ms: int = 0) -> JobState:
    """Extend the lease and read the wishes of the user: RUNNING, PAUSING or CANCELLING.

    trained_ms: training time since the last call. A lapsed lease that nobody has taken is renewed (a laptop slept). Raises Fenced.
    """
    values: dict[str, Any] = {"lease_until": tx.now_ms + int(run.lease_ttl_s * 1000)}
    if trained_ms:  # what a user can see moves the revision
        values |= {"trained_ms": jobs.c.trained_ms + trained_ms, "revision": jobs.c.revision + 1}
    row = tx.one(update(jobs).where(_owned(run)).values(**values).returning(jobs.c.state, jobs.c.owner, jobs.c.gpus))
    if row is None:
        raise Fenced(run.job_id, run.attempt)
    quotas.charge(tx, row.owner, trained_ms * (row.gpus or 0))
    return JobState(row.state)


def state_of(tx: Tx, run: Run) -> JobState:
    """The state this run's job is in, without writing. Raises Fenced."""
    row = tx.one(select(jobs.c.state).where(_owned(run)))
    if row is None:
        raise Fenced(run.job_id, run.attempt)
    return JobState(row.state)


def record(tx: Tx, run: Run, messages: Sequence[protocol.Message], *, said_before: int | None = None) -> JobState:
    """Write down what the trainer said, all of it or nothing; the state of the job. Raises Fenced.

    said_before: messages of this attempt that came before these; with it, what was written down already is not written again, so that
    a call whose commit was never confirmed can be repeated.
    """
    row = tx.one(_for_update(tx, select(jobs).where(_owned(run))))
    if row is None:
        raise Fenced(run.job_id, run.attempt)
    draft = _Draft.of(row)
    if said_before is not None:
        messages = messages[max(0, row.heard - said_before) :]
    for message in messages:
        draft.take(tx, run, message)
    draft.close(tx, run)
    values: dict[str, Any] = {
        "progress": draft.progress,
        "latest": draft.latest,
        "best": draft.best,
        "best_step": draft.best_step,
        "resolved": draft.resolved,
        "heard": row.heard + len(messages),
    }
    if any(isinstance(message, STORING) for message in messages):
        values["bytes"] = accounts.stored(run.job_id)
    if _write(tx, _owned(run), values, draft.events) is None:
        raise Fenced(run.job_id, run.attempt)
    return JobState(row.state)


def finish(tx: Tx, run: Run, end: End, *, trained_ms: int = 0) -> JobState:
    """Close the attempt and move the job on; the state it is in then. Raises Fenced."""
    row = tx.one(_for_update(tx, select(jobs).where(_owned(run))))
    if row is None:
        raise Fenced(run.job_id, run.attempt)
    return _end_attempt(tx, row, end, trained_ms=trained_ms)


def prunable(tx: Tx, job_id: str) -> list[Row[Any]]:
    """Checkpoints that retention lets go: never the newest, the best or a pinned one."""
    job = tx.one(select(jobs.c.retention).where(jobs.c.id == job_id))
    if job is None:
        return []
    rows = tx.all(select(checkpoints).where(checkpoints.c.job_id == job_id).order_by(checkpoints.c.step.desc()))
    whole = [row for row in rows if not row.broken]
    kept = {row.step for row in whole[: max(1, job.retention["keep_last"])]}
    ranked = sorted((row for row in whole if row.score is not None), key=lambda row: (-row.score, row.step))
    kept |= {row.step for row in ranked[: max(1, job.retention["keep_best"])]}
    return [row for row in rows if row.step not in kept and not row.pinned and not (row.broken and not whole)]


def prune(tx: Tx, run: Run) -> list[str]:
    """Forget what retention lets go; the directories (relative to the job's) to delete after the commit. Raises Fenced.

    Whoever deletes them says so by `freed`; what is left of them then is the sweeper's to free.
    """
    if tx.one(_for_update(tx, select(jobs.c.id).where(_owned(run)))) is None:  # held: a pin comes before or after
        raise Fenced(run.job_id, run.attempt)
    return _let_go(tx, run.job_id)


def _let_go(tx: Tx, job_id: str) -> list[str]:
    """Prune a job whose row this transaction holds."""
    gone = prunable(tx, job_id)
    if gone:
        tx.run(delete(checkpoints).where(checkpoints.c.job_id == job_id, checkpoints.c.step.in_([row.step for row in gone])))
        owe(tx, *(f"{job_dir(job_id)}/{row.path}" for row in gone))
        _write(tx, jobs.c.id == job_id, {"bytes": accounts.stored(job_id)}, [])
    return [row.path for row in gone]


def checkpoint_paths(tx: Tx, job_id: str) -> set[str]:
    """The directories (relative to the job's) that rows name."""
    return {row.path for row in tx.all(select(checkpoints.c.path).where(checkpoints.c.job_id == job_id))}


def checkpoint_id(step: int) -> str:
    """`step-00000800`."""
    return f"step-{step:08d}"


@dataclass
class _Draft:
    """The job row's moving parts while a batch of messages is folded into them."""

    progress: dict[str, Any]
    latest: dict[str, Any]
    best: dict[str, Any]
    best_step: int | None
    resolved: dict[str, Any]
    events: list[Event] = field(default_factory=list)
    points: dict[str, list[metrics.Point]] = field(default_factory=dict)

    @classmethod
    def of(cls, row: Row[Any]) -> _Draft:
        return cls(dict(row.progress), dict(row.latest), dict(row.best), row.best_step, dict(row.resolved))

    def take(self, tx: Tx, run: Run, message: protocol.Message) -> None:
        match message:
            case protocol.Phase():
                self.progress["phase"] = message.name
                self.events.append(("phase", {"name": message.name, "attempt": run.attempt}))
            case protocol.Plan():
                self._plan(tx, run, message)
            case protocol.Step():
                self._step(message)
            case protocol.Evaluation():
                self._evaluation(run, message)
            case protocol.CheckpointWritten():
                self._checkpoint(tx, run, message)
            case protocol.CheckpointSkipped():
                step = int(message.id.removeprefix("step-"))
                tx.run(update(checkpoints).where(checkpoints.c.job_id == run.job_id, checkpoints.c.step == step).values(broken=True))
                self.events.append(("checkpoint_skipped", {"id": message.id, "detail": message.detail, "attempt": run.attempt}))
            case protocol.CheckpointFailed():
                self.events.append(("checkpoint_failed", {"step": message.step, "detail": message.detail, "attempt": run.attempt}))
            case protocol.RolledBack():
                self._roll_back(tx, run, message)
            case protocol.ArtifactWritten():
                self._artifact(tx, run, message)
            case protocol.Note():
                self.events.append(("note", {"detail": message.detail, "attempt": run.attempt}))
            case protocol.Done():
                self._done(run, message)
            case protocol.EvaluationProgress() | protocol.Failure():
                pass  # signs of life and failures are the supervisor's business

    def close(self, tx: Tx, run: Run) -> None:
        """Store the points gathered and announce them."""
        if self.points:
            steps = [step for series in self.points.values() for step, _ in series]
            metrics.append(tx, run.job_id, self.points)
            self.events.append(("metrics", {"attempt": run.attempt, "from_step": min(steps), "to_step": max(steps)}))
            self.points = {}

    def _plan(self, tx: Tx, run: Run, plan: protocol.Plan) -> None:
        self.events.append(("plan", {**plan.model_dump(exclude={"type"}), "attempt": run.attempt}))
        self.resolved |= {
            "precision": plan.precision,
            "determinism": plan.determinism,
            "determinism_reason": plan.determinism_reason,
            "parameters": plan.parameters,
            "classes": plan.classes,
            "train_images": plan.train_images,
            "val_images": plan.val_images,
            "test_images": plan.test_images,
        }
        self._at(plan.resumed_step, plan.resumed_step / plan.steps_per_epoch, plan.steps, plan.epochs)
        self.progress["ended_early"] = None
        if run.attempt > 1:
            self._rewind(tx, run, plan)
        tx.run(
            update(attempts)
            .where(attempts.c.job_id == run.job_id, attempts.c.number == run.attempt)
            .values(device=plan.device, resumed_from=plan.resumed_from)
        )

    def _rewind(self, tx: Tx, run: Run, plan: protocol.Plan) -> None:
        """Cut history back to the step gone on from: what lies after it belongs to a past that did not last."""
        tx.run(update(checkpoints).where(checkpoints.c.job_id == run.job_id, checkpoints.c.step > plan.resumed_step).values(broken=True))
        self._cut_metrics(tx, run, plan.resumed_step)
        self.events.append(("resumed", {"attempt": run.attempt, "from_step": plan.resumed_step, "checkpoint": plan.resumed_from}))

    def _roll_back(self, tx: Tx, run: Run, back: protocol.RolledBack) -> None:
        """The same within an attempt. The rows of later checkpoints go at once: the trainer may write these steps again, in the same
        place, and retention must not free a directory that has become another checkpoint's. (Those of earlier attempts it cannot.)"""
        kept = {name: [point for point in series if point[0] <= back.to_step] for name, series in self.points.items()}
        self.points = {name: series for name, series in kept.items() if series}
        self.close(tx, run)
        later = and_(checkpoints.c.job_id == run.job_id, checkpoints.c.step > back.to_step)
        gone = tx.all(
            delete(checkpoints).where(later, checkpoints.c.pinned.is_(False)).returning(checkpoints.c.path, checkpoints.c.attempt)
        )
        owe(tx, *(f"{job_dir(run.job_id)}/{row.path}" for row in gone if row.attempt < run.attempt))
        tx.run(update(checkpoints).where(later).values(broken=True))
        self._cut_metrics(tx, run, back.to_step)
        steps, epochs = self.progress["steps"], self.progress["epochs"]
        self._at(back.to_step, back.to_step * epochs / steps if steps else 0.0, steps, epochs)
        self.progress["eta_s"] = None
        self.events.append(("rolled_back", {**back.model_dump(exclude={"type"}), "attempt": run.attempt}))

    def _cut_metrics(self, tx: Tx, run: Run, step: int) -> None:
        metrics.truncate(tx, run.job_id, step)
        self.latest = metrics.latest(tx, run.job_id)
        self.best = _held_out(self.best)  # a test score is told again at the end
        if self.best_step is not None and self.best_step > step:
            self._find_best(tx, run)

    def _find_best(self, tx: Tx, run: Run) -> None:
        series = metrics.read(tx, run.job_id, BEST_BY)
        scored = [(-value, step) for step, value in zip(series.steps, series.values, strict=True) if value is not None]
        self.best_step = min(scored)[1] if scored else None
        self.best = {} if self.best_step is None else _held_out(metrics.values_at(tx, run.job_id, self.best_step))

    def _step(self, step: protocol.Step) -> None:
        self._points(step.step, {**step.metrics, "images_per_s": step.images_per_s})
        self._at(step.step, step.epoch, self.progress["steps"], self.progress["epochs"])
        # the phase `training` is said once an attempt: a step means that it trains again after an evaluation
        self.progress |= {"phase": "training", "eta_s": step.eta_s, "images_per_s": step.images_per_s}

    def _evaluation(self, run: Run, evaluation: protocol.Evaluation) -> None:
        self._points(evaluation.step, evaluation.metrics)
        self.events.append(("evaluation", {**evaluation.model_dump(exclude={"type"}), "attempt": run.attempt}))
        score = evaluation.metrics.get(BEST_BY)
        if evaluation.split == "test":
            self.best |= evaluation.metrics
        elif score is not None and score > self.best.get(BEST_BY, -math.inf):
            self.best, self.best_step = dict(evaluation.metrics), evaluation.step

    def _checkpoint(self, tx: Tx, run: Run, written: protocol.CheckpointWritten) -> None:
        row = {
            "attempt": run.attempt,
            "epoch": written.epoch,
            "path": written.path,
            "metrics": written.metrics,
            "score": written.metrics.get(BEST_BY),
            "bytes": written.bytes,
            "total_bytes": written.total_bytes,
            "sha256": written.sha256,
            "broken": False,
            "created_at": tx.now_ms,
        }
        before = tx.one(select(checkpoints.c.path).where(checkpoints.c.job_id == run.job_id, checkpoints.c.step == written.step))
        if before is not None and before.path != written.path:
            owe(tx, f"{job_dir(run.job_id)}/{before.path}")  # an earlier attempt's, which nobody writes again
        statement = tx.insert(checkpoints).values(job_id=run.job_id, step=written.step, pinned=False, **row)
        tx.run(statement.on_conflict_do_update(index_elements=["job_id", "step"], set_=row))
        told = {"id": written.id, "step": written.step, "epoch": written.epoch, "bytes": written.bytes, "sha256": written.sha256}
        self.events.append(("checkpoint", {**told, "metrics": written.metrics, "is_best": written.is_best, "attempt": run.attempt}))

    def _artifact(self, tx: Tx, run: Run, written: protocol.ArtifactWritten) -> None:
        told = written.model_dump(include={"media_type", "bytes", "sha256"})
        row = {**told, "path": written.path, "attempt": run.attempt, "created_at": tx.now_ms}
        here = and_(artifacts.c.job_id == run.job_id, artifacts.c.name == written.name)
        before = tx.one(select(artifacts.c.path).where(here))
        if before is not None and before.path != written.path:
            owe(tx, f"{job_dir(run.job_id)}/{before.path}")
        statement = tx.insert(artifacts).values(job_id=run.job_id, name=written.name, **row)
        tx.run(statement.on_conflict_do_update(index_elements=["job_id", "name"], set_=row))
        self.events.append(("artifact", {"name": written.name, **told, "attempt": run.attempt}))

    def _done(self, run: Run, done: protocol.Done) -> None:
        """An end before the last epoch: `fraction` stays what was trained of the plan, and the reason stands beside it."""
        if done.detail:
            self.events.append(("note", {"detail": done.detail, "attempt": run.attempt}))
        if done.outcome == "succeeded":
            self.progress["ended_early"] = done.detail or None

    def _points(self, step: int, values: protocol.Metrics) -> None:
        for name, value in values.items():
            self.points.setdefault(name, []).append((step, math.nan if value is None else value))
            self.latest[name] = value

    def _at(self, step: int, epoch: float, steps: int | None, epochs: int) -> None:
        self.progress |= {"step": step, "steps": steps, "epoch": math.floor(epoch + 1e-9), "epochs": epochs}
        self.progress["fraction"] = round(step / steps, 6) if steps else 0.0


def _held_out(values: dict[str, float | None]) -> dict[str, float | None]:
    return {name: value for name, value in values.items() if name.startswith("val_")}


# --- what anybody does -----------------------------------------------------------------------------------------------------------


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
        row = tx.one(_for_update(tx, select(jobs).where(jobs.c.id == job_id, overdue)))
        if row is not None:
            moved.append((row.id, _end_attempt(tx, row, End(Outcome.LOST, _worker_lost(row)))))
    tx.run(delete(idempotency_keys).where(_expired(tx)))
    runnable = len(tx.all(select(jobs.c.id).where(_runnable(tx)).limit(CLAIM_CANDIDATES)))
    owed = select(deletions.c.path).where(debts.due(tx)).order_by(deletions.c.created_at).limit(MOST_DEBTS)
    return Swept(moved, runnable, [row.path for row in tx.all(owed)])


def expire(tx: Tx, *, limit: int = MOST_EXPIRED) -> list[str]:
    """Delete jobs that have outlived their end by their `ttl_seconds`, or else by the server's; their ids, the first ended first.

    A job stays while one of its checkpoints is pinned, or while a job that has not ended starts from one.
    """
    if not has_outlived(tx):
        return []
    query = (
        select(jobs.c.id).where(_outlived(tx), jobs.c.id.not_in(_origins_in_use(tx))).order_by(jobs.c.finished_at, jobs.c.id).limit(limit)
    )
    if tx.connection.dialect.name == "postgresql":
        query = query.with_for_update(skip_locked=True)  # of two sweepers each takes what the other leaves
    ids = [row.id for row in tx.all(query)]
    _forget(tx, ids)
    return ids


def has_outlived(tx: Tx) -> bool:
    """Whether `expire` may find something: a look that takes no write lock. It reads every job that has ended."""
    return tx.one(select(jobs.c.id).where(_outlived(tx)).limit(1)) is not None


def _outlived(tx: Tx) -> ColumnElement[bool]:
    over = jobs.c.finished_at <= tx.now_ms - 1000 * jobs.c.ttl_s  # NULL, and so not over, where the job has none of its own
    if tx.job_ttl_s is not None:
        over = or_(over, and_(jobs.c.ttl_s.is_(None), jobs.c.finished_at <= tx.now_ms - int(1000 * tx.job_ttl_s)))
    pinned = select(checkpoints.c.step).where(checkpoints.c.job_id == jobs.c.id, checkpoints.c.pinned)
    return and_(jobs.c.finished_at.is_not(None), over, ~pinned.exists())


def _origins_in_use(tx: Tx) -> set[str]:
    """Jobs from whose weights others start that have not ended."""
    origin = jobs.c.spec["model"]["init_from"].as_string()
    alive = jobs.c.state.in_([state for state in JobState if state not in TERMINAL])
    rows = tx.all(select(origin.label("origin")).distinct().where(jobs.c.owner.in_(_owners(tx, true())), alive, origin.is_not(None)))
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


# --- the one way a job row changes -----------------------------------------------------------------------------------------------


def locked(tx: Tx, job_id: str, *, owner: str = LOCAL_OWNER) -> Row[Any]:
    """The job's row, held until the transaction ends. Raises JobNotFound."""
    row = tx.one(_for_update(tx, select(jobs).where(jobs.c.id == job_id, jobs.c.owner == owner)))
    if row is None:
        raise JobNotFound(job_id)
    return row


def _for_update(tx: Tx, query: Any) -> Any:
    """SQLite's write transaction holds the only write lock already; PostgreSQL locks the row."""
    return query.with_for_update() if tx.connection.dialect.name == "postgresql" else query


def _owned(run: Run) -> ColumnElement[bool]:
    return and_(jobs.c.id == run.job_id, jobs.c.attempt == run.attempt, IS_OWNED)


def _end_attempt(tx: Tx, row: Row[Any], end: End, *, trained_ms: int = 0) -> JobState:
    state = JobState(row.state)
    move = next_move(state, end, failures=row.failures, max_attempts=row.max_attempts)
    reason = end.reason.as_json() if end.reason else None
    ended = {"ended_at": tx.now_ms, "outcome": end.outcome, "reason": reason}
    tx.run(update(attempts).where(attempts.c.job_id == row.id, attempts.c.number == row.attempt).values(**ended))
    quotas.charge(tx, row.owner, trained_ms * (row.gpus or 0))
    values: dict[str, Any] = {
        "failures": move.failures,
        "lease_until": None,
        "worker": None,
        "trained_ms": row.trained_ms + trained_ms,
        "reason": reason if move.keeps_reason else None,
        "progress": {**row.progress, "phase": None, "eta_s": None, "images_per_s": None},
    }
    if move.state is JobState.QUEUED:
        values["not_before"] = tx.now_ms + int(move.backoff_s * 1000) if move.backoff_s else None
        # queued_at stays: a job that was interrupted keeps its age, and so its place
    if move.state in TERMINAL:
        values["finished_at"] = tx.now_ms
        # a cancel that its worker did not answer: the trainer may live on until its lease ends, so a retry waits for that
        values["not_before"] = row.lease_until if end.outcome is Outcome.LOST and row.lease_until > tx.now_ms else None
    told: dict[str, Any] = {"attempt": row.attempt, "outcome": end.outcome}
    if end.reason is not None and state is not JobState.CANCELLING:
        told["reason"] = {"code": end.reason.code, "detail": end.reason.detail}
    _move(tx, row, move.state, values, before=[("attempt_ended", told)], extra={"retry_in_s": move.backoff_s} if move.backoff_s else {})
    return move.state


def _move(
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
    name, told = _state_event(origin, to, row.attempt)
    happened = [*before, (name, {**told, **(extra or {})})]
    if _write(tx, where, {**(values or {}), "state": to, "version": row.version + 1}, happened) is None:
        raise Fenced(row.id, row.attempt)
    outbox.announce(tx, row, to, (values or {}).get("reason"))


def _state_event(origin: JobState, to: JobState, attempt: int) -> Event:
    return "state", {"from": origin, "to": to, "attempt": attempt}


def _write(tx: Tx, where: ColumnElement[bool], values: dict[str, Any], happened: Sequence[Event]) -> Row[Any] | None:
    """UPDATE one job and append its events, numbered from the row's own counter; None when the condition found no row."""
    counted = {"seq": jobs.c.seq + len(happened), "revision": jobs.c.revision + 1}
    row = tx.one(update(jobs).where(where).values(**values, **counted).returning(jobs.c.id, jobs.c.seq))
    if row is not None and happened:
        first = row.seq - len(happened) + 1
        numbered = [
            {"job_id": row.id, "seq": first + i, "at": tx.now_ms, "type": kind, "data": data} for i, (kind, data) in enumerate(happened)
        ]
        tx.run(insert(events), numbered)
    return row


def _put_labels(tx: Tx, job_id: str, labels: dict[str, str]) -> None:
    if labels:
        tx.run(insert(job_labels), [{"job_id": job_id, "key": key, "value": value} for key, value in labels.items()])


def effective_spec(claim: Claim) -> JobSpec:
    """The claim's spec with what the first attempt fixed, so that every attempt computes the same bits."""
    spec = claim.spec
    if spec.precision == "auto" and claim.precision is not None:
        spec = spec.model_copy(update={"precision": claim.precision})
    return spec
