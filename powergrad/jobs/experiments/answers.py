"""What becomes of an experiment's task when it ends: findings, files and choices are the experiment's, if it still wants them."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Row, select, update

from powergrad.jobs.debts import owe
from powergrad.jobs.store import Tx
from powergrad.jobs.tables import experiments, tasks

KIND = "experiment"
DRAW, DECIDE = "search_draw", "search_decide"


def folder(experiment_id: str) -> str:
    """An experiment's directory below the artifact root: a folder for each report."""
    return f"experiments/{experiment_id}"


def ended(tx: Tx, task_id: str, *, result: dict[str, Any] | None, error: dict[str, Any] | None) -> None:
    """Store what an analysis found, or why it found nothing, in the transaction that ends its task.

    It holds the task's row and waits for the experiment's; nobody who holds an experiment waits for the row of a task.
    """
    arguments = tx.run(select(tasks.c.arguments).where(tasks.c.id == task_id)).scalar_one()
    row = _held(tx, arguments["experiment"])
    if row is None:
        owe(tx, folder(arguments["experiment"]))  # deleted meanwhile, and written to since
        return
    into, current = arguments["into"], report_folder(row)
    if row.task_id != task_id or result is None:
        if into != current:
            owe(tx, into)
        if row.task_id == task_id:
            _store(tx, row, {"error": error})
        return
    if current is not None and current != into:
        owe(tx, current)
    findings = {**result["findings"], "arms": [_without_curve(arm) for arm in result["findings"]["arms"]]}
    _store(tx, row, {"findings": findings, "files": result["files"], "findings_key": arguments["key"], "error": None})


def drawn(tx: Tx, task_id: str, *, result: dict[str, Any] | None, error: dict[str, Any] | None) -> None:
    """The same for the settings of a search."""
    _answered(tx, task_id, "draw", result, error)


def decided(tx: Tx, task_id: str, *, result: dict[str, Any] | None, error: dict[str, Any] | None) -> None:
    """The same for who goes on in a search."""
    _answered(tx, task_id, "decide", result, error)


def _answered(tx: Tx, task_id: str, name: str, result: dict[str, Any] | None, error: dict[str, Any] | None) -> None:
    arguments = tx.run(select(tasks.c.arguments).where(tasks.c.id == task_id)).scalar_one()
    row = _held(tx, arguments["experiment"])
    state = {} if row is None else row.plan.get(name) or {}
    if row is None or state.get("task") != task_id:
        return
    rest = {key: value for key, value in state.items() if key != "task"}
    told = {**rest, "error": error} if result is None else {"key": state["asked"], "answer": result}
    changed = {"plan": {**row.plan, name: told}, "due_at": tx.now_ms, "revision": row.revision + 1}
    tx.run(update(experiments).where(experiments.c.id == row.id).values(**changed))


def report_folder(row: Row[Any]) -> str | None:
    """Where the files of the report are."""
    first = next(iter((row.files or {}).values()), None)
    return None if first is None else str(first["path"]).rpartition("/")[0]


def _without_curve(arm: dict[str, Any]) -> dict[str, Any]:
    """Curves are most of the findings, and wanted in the report alone, which has them."""
    return {name: value for name, value in arm.items() if name != "curve"}


def _held(tx: Tx, experiment_id: str) -> Row[Any] | None:
    return tx.one(select(experiments).where(experiments.c.id == experiment_id).with_for_update())


def _store(tx: Tx, row: Row[Any], values: dict[str, Any]) -> None:
    changed = {**values, "task_id": None, "due_at": tx.now_ms, "revision": row.revision + 1}
    tx.run(update(experiments).where(experiments.c.id == row.id).values(**changed))
