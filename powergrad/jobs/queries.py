"""What the API shows of a job: rows read and turned into the JSON of the contract, page by page.

Pages are keyed by the last row seen, so their cost does not grow with the number of jobs stored.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, and_, bindparam, func, or_, select

from powergrad.jobs import fleet, gpus, quotas
from powergrad.jobs.errors import ArtifactNotFound, JobNotFound
from powergrad.jobs.retention import best_of, checkpoint_id, checkpoint_row, whole_checkpoints
from powergrad.jobs.rows import LOCAL_OWNER
from powergrad.jobs.spec import JobSpec
from powergrad.jobs.states import TERMINAL, JobState
from powergrad.jobs.store import Tx, rfc3339
from powergrad.jobs.tables import IS_QUEUED, artifacts, attempts, events, job_labels, jobs

SORT = re.compile(r"(?P<falling>-?)metrics\.(?P<name>[A-Za-z0-9_]{1,64})")
MAX_POSITION = 1000  # counted no further: "1000" then means "at least"


# Built once: to build one of these statements and its cache key costs SQLAlchemy four times what it costs to run it
_JOB = select(jobs).where(jobs.c.id == bindparam("id"), jobs.c.owner == bindparam("owner"))
_ATTEMPTS = select(attempts).where(attempts.c.job_id == bindparam("id")).order_by(attempts.c.number)
_SOONER = or_(
    jobs.c.priority > bindparam("priority"),
    and_(
        jobs.c.priority == bindparam("priority"),
        or_(
            jobs.c.queued_at < bindparam("queued_at"),
            and_(jobs.c.queued_at == bindparam("queued_at"), jobs.c.id < bindparam("id")),
        ),
    ),
)
_UNSET: dict[str, Any] = dict.fromkeys(jobs.c.keys())
_AHEAD = select(func.count()).select_from(select(jobs.c.id).where(IS_QUEUED, _SOONER).limit(MAX_POSITION - 1).subquery())


@dataclass(frozen=True)
class Filter:
    """Which jobs to list; empty means all. q: part of a name, or the start of an id."""

    owner: str = LOCAL_OWNER
    states: Sequence[JobState] = ()
    labels: dict[str, str] = field(default_factory=dict)
    experiment: str | None = None
    created_after_ms: int | None = None
    created_before_ms: int | None = None
    q: str | None = None


@dataclass(frozen=True)
class Page:
    """Jobs of one page, as JSON, and whether more follow."""

    data: list[dict[str, Any]]
    has_more: bool


def get(tx: Tx, job_id: str, *, owner: str = LOCAL_OWNER) -> dict[str, Any]:
    """A job as JSON. Raises JobNotFound."""
    row = tx.one(_JOB, {"id": job_id, "owner": owner})
    if row is None:
        raise JobNotFound(job_id)
    made = tx.all(_ATTEMPTS, {"id": job_id})
    held_back = quotas.held_back(tx, owner) if row.state == JobState.QUEUED else None
    return _job(tx, row, made, fleet.capacity(tx), position=_position(tx, row), held_back=held_back)


def shown_new(tx: Tx, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Jobs that this transaction has just stored, as `get` would show each, without reading them back."""
    capacity, positions = fleet.capacity(tx), _new_positions(tx, rows)
    held_back = {owner: quotas.held_back(tx, owner) for owner in {row["owner"] for row in rows}}
    return [
        _job(tx, SimpleNamespace(**_UNSET | row), (), capacity, position=positions[row["id"]], held_back=held_back[row["owner"]])
        for row in rows
    ]


def _new_positions(tx: Tx, rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Places of jobs stored together: of each priority only the first is counted, as the others follow it."""
    positions: dict[str, int] = {}
    for priority in {row["priority"] for row in rows}:
        line = sorted((row for row in rows if row["priority"] == priority), key=lambda row: (row["queued_at"], row["id"]))
        first = _position(tx, SimpleNamespace(**line[0]))
        assert first is not None, "a new job is queued"
        positions |= {row["id"]: min(first + place, MAX_POSITION) for place, row in enumerate(line)}
    return positions


def etag(job: dict[str, Any]) -> str:
    """Changes exactly when the job's JSON does, progress, attempts and queue position included."""
    # the revision counts every change of the row; only the place in the queue moves without it
    waits = job["queue"]
    place = "" if job["state"] != JobState.QUEUED else f"-{waits['position']}-{zlib.crc32(waits['waiting_for'].encode()):08x}"
    return f'"{job["version"]}-{job["revision"]}{place}"'


def page(tx: Tx, wanted: Filter, *, limit: int, after: str | None = None, sort: str | None = None) -> Page:
    """Jobs, newest first, or by `sort` (`-metrics.val_top1`: highest best value first; without `-` lowest first).

    after: id of the last job seen. Raises ValueError for a sort it does not know, and, when sorting, JobNotFound for `after`.
    """
    rows = _page(tx, select(jobs), wanted, limit=limit, after=after, sort=sort)
    shown = rows[:limit]
    made: dict[str, list[Row[Any]]] = {}
    for attempt in tx.all(select(attempts).where(attempts.c.job_id.in_([row.id for row in shown])).order_by(attempts.c.number)):
        made.setdefault(attempt.job_id, []).append(attempt)
    capacity = fleet.capacity(tx)
    held_back = quotas.held_back(tx, wanted.owner) if any(row.state == JobState.QUEUED for row in shown) else None
    return Page([_job(tx, row, made.get(row.id, []), capacity, position=None, held_back=held_back) for row in shown], len(rows) > limit)


def page_pulse(tx: Tx, wanted: Filter, *, limit: int, after: str | None = None, sort: str | None = None) -> list[tuple[str, int]]:
    """What a page's rows are like, in one look at little: it moves whenever a job comes, goes, changes or changes places."""
    rows = _page(tx, select(jobs.c.id, jobs.c.revision), wanted, limit=limit, after=after, sort=sort)
    return [(row.id, row.revision) for row in rows]


def _page(tx: Tx, query: Select[Any], wanted: Filter, *, limit: int, after: str | None, sort: str | None) -> Sequence[Row[Any]]:
    """The page's rows, and one more where more follow."""
    query = query.where(*conditions(wanted))
    if sort:
        query = _sorted(tx, query, sort, after=after, owner=wanted.owner)
    else:
        query = query.where(*() if after is None else (jobs.c.id < after,)).order_by(jobs.c.id.desc())
    return tx.all(query.limit(limit + 1))


SUMMARY = tuple(
    jobs.c[name]
    for name in (
        *(
            "id",
            "name",
            "state",
            "reason",
            "spec",
            "progress",
            "latest",
            "best",
            "labels",
            "priority",
            "experiment",
            "attempt",
            "worker",
            "gpus",
        ),
        *("not_before", "hold_epoch", "trained_ms", "bytes", "created_at", "started_at", "finished_at", "version", "revision"),
    )
)


def summaries(
    tx: Tx,
    wanted: Filter,
    *,
    limit: int,
    after: str | None = None,
    sort: str | None = None,
    metrics: Sequence[str] = (),
    fields: Sequence[str] = (),
) -> Page:
    """The jobs of `page`, each as the line of a table. metrics: those that are told; fields: dotted names of the spec's values to tell."""
    rows = _page(tx, select(*SUMMARY), wanted, limit=limit, after=after, sort=sort)
    capacity = fleet.capacity(tx)
    held_back = quotas.held_back(tx, wanted.owner) if any(row.state == JobState.QUEUED for row in rows[:limit]) else None
    shown = [{**_summary(row, metrics, fields), "waiting_for": _waiting_for(row, capacity, tx.now_ms, held_back)} for row in rows[:limit]]
    return Page(shown, len(rows) > limit)


def _summary(row: Row[Any], metrics: Sequence[str], fields: Sequence[str]) -> dict[str, Any]:
    known = {
        kind: {name: values[name] for name in metrics if name in values} for kind, values in (("latest", row.latest), ("best", row.best))
    }
    return {
        "id": row.id,
        "object": "job_summary",
        "name": row.name,
        "state": row.state,
        "reason": None if row.reason is None else row.reason["code"],
        "progress": row.progress,
        "metrics": known,
        "fields": {name: _field(row.spec, name) for name in fields},
        "model": row.spec["model"]["name"],
        "dataset": row.spec["data"]["dataset"],
        "alpha": row.spec["loss"]["alpha"],
        "seed": row.spec["seed"],
        "epochs": row.spec["epochs"],
        "labels": row.labels,
        "priority": row.priority,
        "experiment": row.experiment,
        "attempt": row.attempt,
        "worker": row.worker,
        "trained_seconds": row.trained_ms / 1000,
        "bytes": row.bytes,
        "created_at": rfc3339(row.created_at),
        "started_at": rfc3339(row.started_at),
        "finished_at": rfc3339(row.finished_at),
        "version": row.version,
        "revision": row.revision,
    }


def _field(spec: Any, dotted: str) -> Any:
    """None where the spec has no such field."""
    for name in dotted.split("."):
        spec = spec.get(name) if isinstance(spec, dict) else None
    return spec


@dataclass(frozen=True)
class Ended:
    """Ids of jobs that have ended, newest first, what they take on disk, and whether more fit."""

    ids: list[str]
    bytes: int
    has_more: bool


def ended(tx: Tx, wanted: Filter, *, limit: int) -> Ended:
    """The first jobs that fit and have ended."""
    over = jobs.c.state.in_(list(TERMINAL))
    rows = tx.all(select(jobs.c.id, jobs.c.bytes).where(*conditions(wanted), over).order_by(jobs.c.id.desc()).limit(limit + 1))
    return Ended([row.id for row in rows[:limit]], sum(row.bytes for row in rows[:limit]), len(rows) > limit)


def conditions(wanted: Filter) -> list[ColumnElement[bool]]:
    """Which rows of `jobs` are meant."""
    found: list[ColumnElement[bool]] = [jobs.c.owner == wanted.owner]
    if wanted.states:
        found.append(jobs.c.state.in_(list(wanted.states)))
    for key, value in wanted.labels.items():
        found.append(jobs.c.id.in_(select(job_labels.c.job_id).where(job_labels.c.key == key, job_labels.c.value == value)))
    if wanted.experiment is not None:
        found.append(jobs.c.experiment == wanted.experiment)
    if wanted.created_after_ms is not None:
        found.append(jobs.c.created_at > wanted.created_after_ms)
    if wanted.created_before_ms is not None:
        found.append(jobs.c.created_at < wanted.created_before_ms)
    if wanted.q:
        found.append(or_(jobs.c.name.icontains(wanted.q, autoescape=True), jobs.c.id.istartswith(wanted.q, autoescape=True)))
    return found


def _sorted(tx: Tx, query: Select[Any], sort: str, *, after: str | None, owner: str) -> Select[Any]:
    """By a best metric, jobs without it last; ties by id. The keyset is (value, id) of the last job seen."""
    parts = SORT.fullmatch(sort)
    if parts is None:
        raise ValueError(f"sort={sort[:64]!r}: must be metrics.NAME or -metrics.NAME, like -metrics.val_top1")
    value = jobs.c.best[parts["name"]].as_float()
    falling = bool(parts["falling"])
    if after is not None:
        last = tx.one(select(value.label("value")).where(jobs.c.id == after, jobs.c.owner == owner))
        if last is None:
            raise JobNotFound(after)
        same = and_(value.is_(None) if last.value is None else value == last.value, jobs.c.id < after)
        if last.value is None:
            query = query.where(same)
        else:
            query = query.where(or_(value < last.value if falling else value > last.value, value.is_(None), same))
    return query.order_by(value.is_(None), value.desc() if falling else value.asc(), jobs.c.id.desc())


def _job(
    tx: Tx,
    row: Row[Any] | SimpleNamespace,
    made: Sequence[Row[Any]],
    capacity: fleet.Capacity,
    *,
    position: int | None,
    held_back: str | None,
) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "job",
        "name": row.name,
        "state": row.state,
        "reason": row.reason,
        "spec": row.spec,
        "resolved": row.resolved,
        "attempt": row.attempt,
        "failures": row.failures,
        "attempts": [_attempt(attempt) for attempt in made],
        "progress": row.progress,
        "metrics": {"latest": row.latest, "best": row.best, "best_step": row.best_step},
        "queue": {"position": position, "waiting_for": _waiting_for(row, capacity, tx.now_ms, held_back)},
        "labels": row.labels,
        "notes": row.notes,
        "priority": row.priority,
        "retention": {**row.retention, "ttl_seconds": row.ttl_s},
        "bytes": row.bytes,
        "experiment": row.experiment,
        "trained_seconds": row.trained_ms / 1000,
        "created_at": rfc3339(row.created_at),
        "started_at": rfc3339(row.started_at),
        "finished_at": rfc3339(row.finished_at),
        "expires_at": rfc3339(_expires_at_ms(tx, row)),
        "version": row.version,
        "revision": row.revision,
    }


def _expires_at_ms(tx: Tx, row: Row[Any] | SimpleNamespace) -> int | None:
    """None while it has not ended, and for ever where neither the job nor the server has a rule."""
    ttl_s = tx.job_ttl_s if row.ttl_s is None else row.ttl_s
    return None if row.finished_at is None or ttl_s is None else row.finished_at + int(1000 * ttl_s)


def _attempt(row: Row[Any]) -> dict[str, Any]:
    return {
        "number": row.number,
        "worker": row.worker,
        "device": row.device,
        "started_at": rfc3339(row.started_at),
        "ended_at": rfc3339(row.ended_at),
        "outcome": row.outcome,
        "reason": row.reason,
        "resumed_from": row.resumed_from,
    }


def _waiting_for(row: Row[Any] | SimpleNamespace, capacity: fleet.Capacity, now_ms: int, held_back: str | None) -> str | None:
    """Why a queued job does not run, or one that its search has paused, in words; else None. held_back: by which limit its owner's jobs are,
    if any."""
    if row.state == JobState.PAUSED and row.hold_epoch is not None and row.progress["epoch"] >= row.hold_epoch:
        return f"its search, which held it after {row.hold_epoch} epoch{'' if row.hold_epoch == 1 else 's'} and sends on the best there"
    if row.state != JobState.QUEUED:
        return None
    if row.not_before is not None and row.not_before > now_ms:
        return f"the next attempt, not before {rfc3339(row.not_before)}"
    if held_back is not None:
        return held_back
    if capacity.workers == 0 and capacity.starting:
        return "a worker: it is still loading torch"
    if capacity.workers == 0:
        return "a worker: none is alive"
    if row.gpus is not None and row.gpus > capacity.gpus:
        return f"needs {gpus.in_words(row.gpus)}; the largest worker has {capacity.gpus or 'none'}"
    if row.gpus is not None and row.gpus > 1:
        return f"{gpus.in_words(row.gpus)} of one worker, free at the same time"
    if row.gpus is not None and 0 < row.gpus < 1:
        return capacity.short_of_memory(row.gpus) or f"{gpus.in_words(row.gpus)} that is free"
    return "a free slot"


def _position(tx: Tx, row: Row[Any] | SimpleNamespace) -> int | None:
    """Place in the queue, 1 is next; counted to MAX_POSITION."""
    if row.state != JobState.QUEUED:
        return None
    return int(tx.run(_AHEAD, {"priority": row.priority, "queued_at": row.queued_at, "id": row.id}).scalar_one()) + 1


# --- events and checkpoints ------------------------------------------------------------------------------------------------------


def events_after(tx: Tx, job_id: str, seq: int, *, limit: int = 1000) -> list[dict[str, Any]]:
    """Events numbered above `seq`, oldest first."""
    rows = tx.all(select(events).where(events.c.job_id == job_id, events.c.seq > seq).order_by(events.c.seq).limit(limit))
    return [{"seq": row.seq, "at": rfc3339(row.at), "type": row.type, "data": row.data} for row in rows]


def pulse(tx: Tx, job_ids: Sequence[str]) -> dict[str, tuple[int, int, JobState]]:
    """revision, newest event number and state of many jobs in one look: what a tailer watches. Jobs that are gone are left out."""
    rows = tx.all(select(jobs.c.id, jobs.c.revision, jobs.c.seq, jobs.c.state).where(jobs.c.id.in_(list(job_ids))))
    return {row.id: (row.revision, row.seq, JobState(row.state)) for row in rows}


def exists(tx: Tx, job_id: str, *, owner: str = LOCAL_OWNER) -> None:
    """Raises JobNotFound unless the job is there and the owner's."""
    if tx.one(select(jobs.c.id).where(jobs.c.id == job_id, jobs.c.owner == owner)) is None:
        raise JobNotFound(job_id)


def spec_of(tx: Tx, job_id: str, *, owner: str = LOCAL_OWNER) -> JobSpec:
    """A job's spec. Raises JobNotFound."""
    row = tx.one(select(jobs.c.spec).where(jobs.c.id == job_id, jobs.c.owner == owner))
    if row is None:
        raise JobNotFound(job_id)
    return JobSpec.model_validate(row.spec)


def list_checkpoints(tx: Tx, job_id: str, *, owner: str = LOCAL_OWNER) -> list[dict[str, Any]]:
    """A job's whole checkpoints as JSON, newest first. Raises JobNotFound."""
    exists(tx, job_id, owner=owner)
    rows = whole_checkpoints(tx, job_id)
    return [_checkpoint(row, best=best_of(rows), latest=rows[0]) for row in rows]


def get_checkpoint(tx: Tx, job_id: str, wanted: str, *, owner: str = LOCAL_OWNER) -> dict[str, Any]:
    """A checkpoint by id, `best` or `latest`, as JSON. Raises JobNotFound, CheckpointNotFound."""
    chosen, rows = checkpoint_row(tx, job_id, wanted, owner=owner), whole_checkpoints(tx, job_id)
    return _checkpoint(chosen, best=best_of(rows), latest=rows[0])


def _checkpoint(row: Row[Any], *, best: Row[Any] | None, latest: Row[Any]) -> dict[str, Any]:
    return {
        "id": checkpoint_id(row.step),
        "object": "checkpoint",
        "epoch": row.epoch,
        "step": row.step,
        "attempt": row.attempt,
        "metrics": row.metrics,
        "bytes": row.bytes,
        "sha256": row.sha256,
        "is_best": best is not None and row.step == best.step,
        "is_latest": row.step == latest.step,
        "pinned": row.pinned,
        "created_at": rfc3339(row.created_at),
    }


@dataclass(frozen=True)
class StoredCheckpoint:
    """Where a checkpoint lies (relative to the job's directory) and what its weights file must be."""

    id: str
    path: str
    bytes: int
    sha256: str


def find_checkpoint(tx: Tx, job_id: str, wanted: str, *, owner: str = LOCAL_OWNER) -> StoredCheckpoint:
    """A checkpoint by id, `best` or `latest`. Raises JobNotFound, CheckpointNotFound."""
    chosen = checkpoint_row(tx, job_id, wanted, owner=owner)
    return StoredCheckpoint(checkpoint_id(chosen.step), chosen.path, chosen.bytes, chosen.sha256)


def list_artifacts(tx: Tx, job_id: str, *, owner: str = LOCAL_OWNER) -> list[dict[str, Any]]:
    """What a job's attempts wrote beside the checkpoints, as JSON, by name. Raises JobNotFound."""
    exists(tx, job_id, owner=owner)
    # sorted here: each database has its own idea of an alphabet
    rows = sorted(tx.all(select(artifacts).where(artifacts.c.job_id == job_id)), key=lambda row: str(row.name))
    return [
        {
            "name": row.name,
            "object": "artifact",
            "attempt": row.attempt,
            "media_type": row.media_type,
            "bytes": row.bytes,
            "sha256": row.sha256,
            "created_at": rfc3339(row.created_at),
        }
        for row in rows
    ]


@dataclass(frozen=True)
class StoredArtifact:
    """Where an artifact lies (relative to the job's directory) and what its file must be."""

    name: str
    path: str
    media_type: str
    bytes: int
    sha256: str


def find_artifact(tx: Tx, job_id: str, name: str, *, owner: str = LOCAL_OWNER) -> StoredArtifact:
    """An artifact by name. Raises JobNotFound, ArtifactNotFound."""
    exists(tx, job_id, owner=owner)
    row = tx.one(select(artifacts).where(artifacts.c.job_id == job_id, artifacts.c.name == name))
    if row is None:
        raise ArtifactNotFound(job_id, name)
    return StoredArtifact(row.name, row.path, row.media_type, row.bytes, row.sha256)


def attempt_numbers(tx: Tx, job_id: str, *, owner: str = LOCAL_OWNER) -> list[int]:
    """Numbers of the attempts made, oldest first. Raises JobNotFound."""
    exists(tx, job_id, owner=owner)
    return [row.number for row in tx.all(select(attempts.c.number).where(attempts.c.job_id == job_id).order_by(attempts.c.number))]
