"""The workers that are alive, what they have, and what they can do (the catalogue of models and data sets the API validates against)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Literal

from sqlalchemy import and_, bindparam, case, delete, func, select, update

from powergrad.jobs.gpus import QUARTERS, quarters, quarters_with_memory
from powergrad.jobs.store import Tx, rfc3339
from powergrad.jobs.tables import IS_OWNED, catalogue, jobs, workers

ALIVE_S = 30.0  # a worker is alive while its heartbeat is younger
FORGOTTEN_S = 24 * 3600.0

WorkerState = Literal["starting", "ready", "draining"]


# built once, like those of queries.get: every job shown asks it
_CAPACITY = select(
    func.coalesce(func.sum(case((workers.c.state == "starting", 0), else_=1)), 0).label("workers"),
    func.coalesce(func.sum(case((workers.c.state == "starting", 1), else_=0)), 0).label("starting"),
    func.coalesce(func.max(workers.c.gpus), 0).label("gpus"),
).where(workers.c.heartbeat_at >= bindparam("since"))


@dataclass(frozen=True)
class WorkerInfo:
    """What a worker says of itself. slots: [{index, device, cpus}]; devices: [{name, memory_bytes, …}]; gpus: how many it owns."""

    id: str
    host: str
    pid: int
    version: str
    slots: list[dict[str, Any]]
    devices: list[dict[str, Any]]
    gpus: int


@dataclass(frozen=True)
class Capacity:
    """What the live workers have together. workers: those that can start a job; starting: still loading torch; gpus: of the one with most."""

    workers: int
    gpus: int
    starting: int = 0
    short_of_memory: Callable[[float], str | None] = field(default=lambda _: None, compare=False)
    """Why no GPU has the memory that a part of it is, in words; None where one has, or where all are in use. To be asked in the transaction."""


def register(tx: Tx, worker: WorkerInfo, *, state: WorkerState = "ready") -> None:
    """A worker has started (or its row was swept away while it slept)."""
    row = {**vars(worker), "state": state, "heartbeat_at": tx.now_ms}
    statement = tx.insert(workers).values(**row, started_at=tx.now_ms)
    tx.run(statement.on_conflict_do_update(index_elements=["id"], set_=row))
    tx.run(delete(workers).where(workers.c.heartbeat_at < tx.now_ms - int(FORGOTTEN_S * 1000)))


def heartbeat(tx: Tx, worker_id: str, *, devices: list[dict[str, Any]], state: WorkerState) -> bool:
    """A worker is alive; False when its row is gone and it must register again."""
    values = {"heartbeat_at": tx.now_ms, "devices": devices, "state": state}
    return tx.run(update(workers).where(workers.c.id == worker_id).values(**values)).rowcount == 1


def retire(tx: Tx, worker_id: str) -> None:
    """A worker has ended well."""
    tx.run(delete(workers).where(workers.c.id == worker_id))


def capacity(tx: Tx) -> Capacity:
    """What the live workers have."""
    row = tx.one(_CAPACITY, {"since": tx.now_ms - int(ALIVE_S * 1000)})
    assert row is not None
    return Capacity(row.workers, row.gpus, row.starting, cache(partial(_short_of_memory, tx)))


def _short_of_memory(tx: Tx, part: float) -> str | None:
    short: list[tuple[int, str]] = []
    for row in tx.all(select(workers.c.host, workers.c.devices).where(_alive(tx), workers.c.state == "ready", workers.c.gpus > 0)):
        for number, gpu in enumerate(device for device in row.devices if device.get("kind") == "gpu"):
            total, used = gpu["memory_bytes"], gpu.get("memory_used_bytes")
            if gpu.get("quarters_in_use", 0) + quarters(part) > QUARTERS:
                continue
            if used is None or quarters_with_memory(total, used) >= quarters(part):
                return None
            needed = f"{part * total / 2**30:.1f} GiB that {part:g} of it is"
            short.append((total - used, f"GPU {number} of {row.host} has {(total - used) / 2**30:.1f} GiB free of the {needed}"))
    return max(short)[1] if short else None


def hosts(tx: Tx) -> list[tuple[int, str]]:
    """GPU slots and name of each worker that takes jobs, the smallest first, then by name."""
    query = select(workers.c.gpus, workers.c.id).where(_alive(tx), workers.c.state == "ready")
    return sorted((row.gpus, row.id) for row in tx.all(query))


def live_workers(tx: Tx, *, owner: str | None = None) -> list[dict[str, Any]]:
    """The live workers as JSON, with the jobs each one runs: an owner's own by their ids and the others' by their number, or everybody's."""
    rows = tx.all(select(workers).where(_alive(tx)).order_by(workers.c.id))
    running: dict[str, list[str]] = {}
    others: Counter[str] = Counter()
    for row in tx.all(select(jobs.c.id, jobs.c.worker, jobs.c.owner).where(IS_OWNED)):
        if owner in (None, row.owner):
            running.setdefault(row.worker, []).append(row.id)
        else:
            others[row.worker] += 1
    return [
        {
            "id": row.id,
            "object": "worker",
            "host": row.host,
            "pid": row.pid,
            "version": row.version,
            "state": row.state,
            "slots": row.slots,
            "devices": row.devices,
            "running": sorted(running.get(row.id, [])),
            "others": others[row.id],
            "started_at": rfc3339(row.started_at),
            "heartbeat_at": rfc3339(row.heartbeat_at),
        }
        for row in rows
    ]


def _alive(tx: Tx) -> Any:
    return and_(workers.c.heartbeat_at >= tx.now_ms - int(ALIVE_S * 1000))


def publish(tx: Tx, kind: str, entries: Sequence[dict[str, Any]]) -> None:
    """Store what workers can do: kind is models, datasets or outputs, each entry has a `name`."""
    row = {"entries": list(entries), "updated_at": tx.now_ms}
    statement = tx.insert(catalogue).values(kind=kind, **row)
    tx.run(statement.on_conflict_do_update(index_elements=["kind"], set_=row))


def published(tx: Tx, kind: str) -> list[dict[str, Any]]:
    """The catalogue of a kind; empty before the first worker has started."""
    row = tx.one(select(catalogue.c.entries).where(catalogue.c.kind == kind))
    return [] if row is None else list(row.entries)
