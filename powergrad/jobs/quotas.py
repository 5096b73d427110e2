"""What an owner may have: queued and running jobs, GPU seconds, stored bytes. No row, or NULL in it, is no limit.

The rules are checked in the transaction that would break them: queued, bytes and GPU seconds at a submission, queued when a job comes back to
the queue at its owner's wish, running at a claim. Of two such transactions the second waits for the first: SQLite has one writer anyway, on
PostgreSQL a lock of the owner's makes them come one after the other.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import bindparam, func, or_, select, text, update

from powergrad.jobs.errors import QuotaExceeded
from powergrad.jobs.store import Tx
from powergrad.jobs.tables import IS_OWNED, IS_QUEUED, datasets, jobs, owners

LOCKS = 0x71756F74  # "quot": these advisory locks among others of the database
CLAIMS = ""  # no owner's name

# built once, as they are asked at every submission and every look at a queued job
_ROW = select(owners).where(owners.c.name == bindparam("owner"))
_LIMITED = select(owners.c.name).where(
    owners.c.name.in_(bindparam("some", expanding=True)),
    or_(*(owners.c[name].is_not(None) for name in ("max_queued", "max_running", "max_gpu_ms", "max_bytes"))),
)
_RUNNING = select(func.count()).where(jobs.c.owner == bindparam("owner"), IS_OWNED)


@dataclass(frozen=True)
class Quota:
    """None is no limit."""

    max_queued: int | None = None
    max_running: int | None = None
    max_gpu_s: float | None = None
    max_bytes: int | None = None


def grant(tx: Tx, owner: str, quota: Quota) -> None:
    """Set all of an owner's limits."""
    row: dict[str, Any] = {
        "max_queued": quota.max_queued,
        "max_running": quota.max_running,
        "max_gpu_ms": None if quota.max_gpu_s is None else round(quota.max_gpu_s * 1000),
        "max_bytes": quota.max_bytes,
    }
    tx.run(tx.insert(owners).values(name=owner, **row).on_conflict_do_update(index_elements=["name"], set_=row))


def granted(tx: Tx, owner: str) -> Quota:
    """An owner's limits."""
    row = tx.one(_ROW, {"owner": owner})
    if row is None:
        return Quota()
    return Quota(row.max_queued, row.max_running, None if row.max_gpu_ms is None else row.max_gpu_ms / 1000, row.max_bytes)


def usage(tx: Tx, owner: str) -> dict[str, Any]:
    """Limits and use of an owner, as JSON."""
    row = tx.one(_ROW, {"owner": owner})
    return {
        "object": "usage",
        "owner": owner,
        "queued": {"used": _queued(tx, owner), "granted": None if row is None else row.max_queued},
        "running": {"used": _running(tx, owner), "granted": None if row is None else row.max_running},
        "gpu_seconds": {
            "used": 0.0 if row is None else row.gpu_ms / 1000,
            "granted": None if row is None or row.max_gpu_ms is None else row.max_gpu_ms / 1000,
        },
        "bytes": {"used": stored_bytes(tx, owner), "granted": None if row is None else row.max_bytes},
    }


def limited(tx: Tx, some: Collection[str]) -> set[str]:
    """Those of some owners that have any limit; until this transaction ends, nobody else submits for them."""
    found = {str(row.name) for row in tx.all(_LIMITED, {"some": sorted(some)})}
    _wait_for_others(tx, found)
    return found


def _wait_for_others(tx: Tx, names: Iterable[str]) -> None:
    """Take the locks of these names until the transaction ends.

    Not the owners' rows: who books GPU time holds a job's row when it comes for one, and who submits may hold one and wait for that job's.
    """
    if tx.connection.dialect.name != "postgresql":
        return
    for key in sorted({zlib.crc32(name.encode()) - 2**31 for name in names}):  # always in this order: nobody waits in a circle
        tx.run(text("SELECT pg_advisory_xact_lock(:locks, :key)"), {"locks": LOCKS, "key": key})


def check_submission(tx: Tx, owner: str, *, new: int = 1) -> None:
    """Raises QuotaExceeded when so many new jobs are too many."""
    check_queued(tx, owner, new=new)
    row = tx.one(_ROW, {"owner": owner})
    if row is None:
        return
    if row.max_gpu_ms is not None and row.gpu_ms >= row.max_gpu_ms:
        raise QuotaExceeded("gpu_seconds", row.gpu_ms // 1000, row.max_gpu_ms // 1000, "ask whoever runs the server for more")
    check_bytes(tx, owner)


def check_queued(tx: Tx, owner: str, *, new: int = 1) -> None:
    """Raises QuotaExceeded when so many more jobs in the queue are too many."""
    row = tx.one(_ROW, {"owner": owner})
    if row is not None and row.max_queued is not None and (queued := _queued(tx, owner)) + new > row.max_queued:
        raise QuotaExceeded("queued", queued, row.max_queued, "wait until jobs have started, or cancel some")


def check_bytes(tx: Tx, owner: str, *, more: int = 0) -> None:
    """Raises QuotaExceeded when the owner stores as much as is granted, or would with so many bytes more."""
    granted = tx.run(select(owners.c.max_bytes).where(owners.c.name == owner)).scalar_one_or_none()
    if granted is not None and (used := stored_bytes(tx, owner)) + max(1, more) > granted:
        raise QuotaExceeded("bytes", used, granted, "delete jobs or data sets")


def stored_bytes(tx: Tx, owner: str) -> int:
    """What an owner's jobs and uploaded sets take."""
    of_jobs = _count(tx, select(func.coalesce(func.sum(jobs.c.bytes), 0)).where(jobs.c.owner == owner))
    uploaded = (datasets.c.owner == owner, datasets.c.source == "uploaded")
    return of_jobs + _count(tx, select(func.coalesce(func.sum(datasets.c.bytes), 0)).where(*uploaded))


def spent(tx: Tx) -> dict[str, int | None]:
    """Of every owner with a limit that stops claims: how many more jobs may start now; None is any number. Nobody else claims meanwhile."""
    limited = tx.all(select(owners).where(owners.c.max_running.is_not(None) | owners.c.max_gpu_ms.is_not(None)))
    if not limited:
        return {}
    _wait_for_others(tx, [CLAIMS])
    held = select(jobs.c.owner, func.count().label("n")).where(IS_OWNED).group_by(jobs.c.owner)
    running = {row.owner: row.n for row in tx.all(held)}
    left: dict[str, int | None] = {}
    for row in limited:
        left[row.name] = None if row.max_running is None else max(0, row.max_running - running.get(row.name, 0))
        if row.max_gpu_ms is not None and row.gpu_ms >= row.max_gpu_ms:
            left[row.name] = 0
    return left


def held_back(tx: Tx, owner: str) -> str | None:
    """The limit that keeps an owner's queued jobs from starting now, in words; None where none does."""
    row = tx.one(_ROW, {"owner": owner})
    if row is None:
        return None
    if row.max_gpu_ms is not None and row.gpu_ms >= row.max_gpu_ms:
        return f"GPU quota: all {row.max_gpu_ms // 1000:,} seconds granted are used"
    if row.max_running is not None and _running(tx, owner) >= row.max_running:
        return f"running quota of {row.max_running}"
    return None


def charge(tx: Tx, owner: str, gpu_ms: float) -> None:
    """Book GPU time: of a job on two GPUs each second counts twice, on half of one it is half a second."""
    gpu_ms = round(gpu_ms)
    if gpu_ms <= 0:
        return
    if not tx.run(update(owners).where(owners.c.name == owner).values(gpu_ms=owners.c.gpu_ms + gpu_ms)).rowcount:
        booked = {"gpu_ms": owners.c.gpu_ms + gpu_ms}
        tx.run(tx.insert(owners).values(name=owner, gpu_ms=gpu_ms).on_conflict_do_update(index_elements=["name"], set_=booked))


def _running(tx: Tx, owner: str) -> int:
    return int(tx.run(_RUNNING, {"owner": owner}).scalar_one())


def _queued(tx: Tx, owner: str) -> int:
    return _count(tx, select(func.count()).where(jobs.c.owner == owner, IS_QUEUED))


def _count(tx: Tx, query: Any) -> int:
    return int(tx.run(query).scalar_one())
