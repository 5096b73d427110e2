"""What is to be freed below the artifact root: noted in the transaction that makes it useless, deleted after it, by the sweeper at the latest.

An upload works the other way round: its directory is owed before the first byte is written, due later, and put off for as long as bytes
come. Whoever is killed in between leaves a debt that falls due, and nothing else.
"""

from __future__ import annotations

from sqlalchemy import ColumnElement, delete, update

from powergrad.jobs.store import Tx
from powergrad.jobs.tables import deletions


def owe(tx: Tx, *paths: str, after_s: float = 0.0) -> None:
    """Have files or directories below the artifact root freed after the commit, or so much later."""
    if not paths:
        return
    # created_at is the moment from which on it may be freed
    due_ms = tx.now_ms + int(after_s * 1000)
    new = tx.insert(deletions).on_conflict_do_update(index_elements=["path"], set_={"created_at": due_ms})
    tx.run(new, [{"path": path, "created_at": due_ms} for path in paths])


def put_off(tx: Tx, path: str, *, after_s: float) -> bool:
    """Have it freed so much later; False when it is due already, and may be half gone."""
    mine = (deletions.c.path == path, deletions.c.created_at > tx.now_ms)
    return bool(tx.run(update(deletions).where(*mine).values(created_at=tx.now_ms + int(after_s * 1000))).rowcount)


def keep(tx: Tx, path: str) -> bool:
    """Have it stay after all; False when it is due already, and may be half gone."""
    return bool(tx.run(delete(deletions).where(deletions.c.path == path, deletions.c.created_at > tx.now_ms)).rowcount)


def freed(tx: Tx, *paths: str) -> None:
    """What was to be freed is gone: forget the debts."""
    if paths:
        tx.run(delete(deletions).where(deletions.c.path.in_(paths)))


def due(tx: Tx) -> ColumnElement[bool]:
    """Which debts may be paid now."""
    return deletions.c.created_at <= tx.now_ms
