"""A job's checkpoints as rows: which is meant by a name, which are kept, which retention lets go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, and_, delete, select, update

from powergrad.jobs import accounts
from powergrad.jobs.debts import owe
from powergrad.jobs.errors import (
    CheckpointNotFound,
    JobNotFound,
)
from powergrad.jobs.rows import LOCAL_OWNER, job_dir, locked, write
from powergrad.jobs.store import Tx
from powergrad.jobs.tables import (
    checkpoints,
    jobs,
)

BEST_BY = "val_top1"


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
        write(tx, jobs.c.id == job_id, {}, [("checkpoint_pinned", told)])
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


def let_go(tx: Tx, job_id: str) -> list[str]:
    """Prune a job whose row this transaction holds."""
    gone = prunable(tx, job_id)
    if gone:
        tx.run(delete(checkpoints).where(checkpoints.c.job_id == job_id, checkpoints.c.step.in_([row.step for row in gone])))
        owe(tx, *(f"{job_dir(job_id)}/{row.path}" for row in gone))
        write(tx, jobs.c.id == job_id, {"bytes": accounts.stored(job_id)}, [])
    return [row.path for row in gone]


def checkpoint_paths(tx: Tx, job_id: str) -> set[str]:
    """The directories (relative to the job's) that rows name."""
    return {row.path for row in tx.all(select(checkpoints.c.path).where(checkpoints.c.job_id == job_id))}


def checkpoint_id(step: int) -> str:
    """`step-00000800`."""
    return f"step-{step:08d}"
