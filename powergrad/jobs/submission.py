"""How a job comes to be: stored with its first event and its idempotency key in one transaction.

The caller commits, and rings the workers only after that.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from sqlalchemy import and_, delete, insert, select
from ulid import ULID

from powergrad.jobs import copies, datasets, quotas
from powergrad.jobs.errors import (
    CheckpointNotFound,
    IdempotencyMismatch,
    InvalidSpec,
    JobError,
    JobNotFound,
    QuotaExceeded,
    Violation,
    refusal,
)
from powergrad.jobs.retention import checkpoint_id, checkpoint_row, pin
from powergrad.jobs.rows import LOCAL_OWNER, locked, whole_seconds
from powergrad.jobs.spec import JobSpec, default_name
from powergrad.jobs.states import JobState
from powergrad.jobs.store import Tx
from powergrad.jobs.tables import (
    events,
    idempotency_keys,
    job_labels,
    jobs,
)

IDEMPOTENCY_TTL_S = 24 * 3600.0
_INSERT_JOBS, _INSERT_EVENTS = insert(jobs), insert(events)


@dataclass(frozen=True)
class Submission:
    """A job to store. body_sha256: of what was sent, compared when the idempotency key comes again."""

    spec: JobSpec
    owner: str = LOCAL_OWNER
    idempotency_key: str | None = None
    body_sha256: str = ""
    notes: str = ""
    cloned_from: str | None = None
    experiment: str | None = None
    job_id: str | None = None
    """A new id that was chosen before; None: one is made."""
    hold_epoch: int | None = None
    """Epochs after which it pauses itself; None, or one that is not before its last, is no hold."""


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
        job_id = new.job_id or f"job_{ULID.from_timestamp(tx.now_ms)}"  # the database's clock: ids sort as created_at does
        try:
            earlier = None if new.idempotency_key is None else take_key(tx, new, job_id)
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
    copies.begin(tx, [row["id"] for row in fresh if row["spec"]["outputs"]["mlflow"]])
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
        "ttl_s": whole_seconds(spec.retention.ttl_seconds),
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
        "experiment": new.experiment,
        "hold_epoch": new.hold_epoch,
        "created_at": tx.now_ms,
        "queued_at": tx.now_ms,
    }


def _created(tx: Tx, row: dict[str, Any], new: Submission) -> dict[str, Any]:
    origin = {"cloned_from": new.cloned_from} if new.cloned_from else {}
    data = {"state": row["state"], "name": row["name"], **origin}
    return {"job_id": row["id"], "seq": 1, "at": tx.now_ms, "type": "created", "data": data}


class Keyed(Protocol):
    """What may come with an idempotency key."""

    @property
    def owner(self) -> str: ...
    @property
    def idempotency_key(self) -> str | None: ...
    @property
    def body_sha256(self) -> str: ...


def take_key(tx: Tx, new: Keyed, job_id: str) -> str | None:
    """What was stored earlier under this key, or None after taking the key for `job_id`. A concurrent twin waits for our commit here.

    Raises IdempotencyMismatch.
    """
    statement = tx.insert(idempotency_keys).on_conflict_do_nothing().returning(idempotency_keys.c.job_id)
    row = {"owner": new.owner, "key": new.idempotency_key, "body_sha256": new.body_sha256, "job_id": job_id, "created_at": tx.now_ms}
    if tx.one(statement, row) is not None:
        return None
    held = tx.one(select(idempotency_keys).where(idempotency_keys.c.owner == new.owner, idempotency_keys.c.key == new.idempotency_key))
    if held is None:
        return take_key(tx, new, job_id)  # it was let go while we waited for it
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
