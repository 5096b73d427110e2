"""When an experiment is analysed, and how its evidence comes to a worker: a task, with the evidence as a file in its directory.

Not while an analysis is under way, not more often than every few seconds while runs end quickly, and always once more at the end. The
directory is owed before the file is written, so that whoever is killed between the two leaves nothing for ever.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Row, select, update

from powergrad.jobs import debts, tasks
from powergrad.jobs.artifacts import Artifacts
from powergrad.jobs.experiments import evidence
from powergrad.jobs.experiments.answers import KIND, folder
from powergrad.jobs.experiments.records import Record
from powergrad.jobs.store import Store, Tx
from powergrad.jobs.tables import experiments
from powergrad.jobs.tables import tasks as task_rows

INTERVAL_MS = 5_000
LOST_MS = 60_000  # from the wish to the task: a file written, and one transaction
RETRY_MS = 10_000  # doubled at each try
MOST_TRIES = 4


@dataclass(frozen=True)
class Asked:
    """An analysis that somebody is to hand over."""

    experiment_id: str
    task_id: str


@dataclass(frozen=True)
class Move:
    """What becomes of an experiment's analysis now: values for its row, and when to look again."""

    key: str | None
    task_id: str | None
    error: dict[str, Any] | None
    plan: dict[str, Any] = field(default_factory=dict)
    due_ms: int | None = None
    asked: Asked | None = None


def next_move(tx: Tx, row: Row[Any], plan: dict[str, Any], key: str | None, *, ended: bool, hands_over: bool) -> Move:
    """key: of the evidence as it is now; None while there is none. ended: no further run will end by itself.

    hands_over: whether the caller gives what is asked to `hand_over` after its commit; else whoever advances experiments next asks for it.
    """
    asked: dict[str, Any] = plan.get("analysis") or {"key": None, "at": 0, "tries": 0}
    task_id = row.task_id
    if task_id is not None:
        lost_ms = asked["at"] + LOST_MS
        if tx.one(select(task_rows.c.id).where(task_rows.c.id == task_id)) is not None:
            return Move(key, task_id, row.error)  # its end is news
        if tx.now_ms < lost_ms:
            return Move(key, task_id, row.error, due_ms=lost_ms)
    if key is None or key == row.findings_key:
        return Move(key, None, row.error if key is None else None)
    tries = asked["tries"] if asked["key"] == key else 0
    if tries >= MOST_TRIES:
        return Move(key, None, row.error)
    pause_ms = RETRY_MS * 2 ** (tries - 1) if tries else 0 if ended else INTERVAL_MS
    if tx.now_ms < asked["at"] + pause_ms:
        return Move(key, None, row.error, due_ms=asked["at"] + pause_ms)
    if not hands_over:
        return Move(key, None, row.error, due_ms=tx.now_ms)
    task_id = tasks.new_id(tx)
    debts.owe(tx, tasks.task_dir(task_id), after_s=LOST_MS / 1000)
    wish = {"key": key, "at": tx.now_ms, "tries": tries + 1}
    return Move(key, task_id, row.error, {"analysis": wish}, tx.now_ms + LOST_MS, Asked(row.id, task_id))


def hand_over(store: Store, artifacts: Artifacts, asked: Asked) -> bool:
    """Write the evidence where a worker finds it, and store the task; False when nobody wants it any more. Ring after it."""
    with store.read() as tx:
        row = _asking(tx, asked)
        if row is None:
            return False
        collected = evidence.collect(tx, Record(row))
        key = row.plan["analysis"]["key"]
    path = f"{tasks.task_dir(asked.task_id)}/evidence.json"
    artifacts.write(path, json.dumps(collected, allow_nan=False).encode())
    with store.write() as tx:
        if _asking(tx, asked, held=True) is None:
            return False  # the directory stays owed
        if not debts.keep(tx, tasks.task_dir(asked.task_id)):
            # it took so long that the file may be gone: ask anew
            anew = {"task_id": None, "due_at": tx.now_ms, "revision": experiments.c.revision + 1}
            tx.run(update(experiments).where(experiments.c.id == asked.experiment_id).values(**anew))
            return False
        arguments = {"experiment": asked.experiment_id, "evidence": path, "into": f"{folder(asked.experiment_id)}/{key}", "key": key}
        tasks.submit(tx, asked.task_id, KIND, arguments, owner=row.owner)
    return True


def _asking(tx: Tx, asked: Asked, *, held: bool = False) -> Row[Any] | None:
    query = select(experiments).where(experiments.c.id == asked.experiment_id, experiments.c.task_id == asked.task_id)
    return tx.one(query.with_for_update() if held else query)
