"""How a search goes on: its settings are drawn, and those that wait at a rung are chosen from, by tasks of a worker's child.

The settings of all trials are drawn at once. ASHA's jobs pause themselves at the first rung; with each that comes to rest there or ends, the
task `decide` says who goes on and how far. The others stay paused, with their checkpoints. The search is over when nothing is at work and
nobody is sent on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError
from sqlalchemy import select

from powergrad.jobs import tasks
from powergrad.jobs.errors import InvalidSpec
from powergrad.jobs.experiments.answers import DECIDE, DRAW
from powergrad.jobs.experiments.plan import Question
from powergrad.jobs.experiments.records import Record, Run
from powergrad.jobs.experiments.stages import SEARCH, Place, Plan, Trial, Wanted, job_spec
from powergrad.jobs.rows import for_update, go_on
from powergrad.jobs.states import OWNED, JobState
from powergrad.jobs.store import Tx
from powergrad.jobs.tables import jobs
from powergrad.jobs.tables import tasks as task_rows

RETRY_MS = 10_000
MOST_TRIES = 5


@dataclass(frozen=True)
class Move:
    """What becomes of a search now. over: nothing more will happen by itself."""

    plan: Plan
    stored: dict[str, Any]
    over: bool
    rings: bool = False
    due_ms: int | None = None


def next_move(tx: Tx, record: Record, plan: Plan, stored: dict[str, Any], found: Sequence[Run], *, runs_on: bool, room: int | None) -> Move:
    """stored: the row's plan, of which `draw` and `decide` say what is under way.  runs_on: neither paused nor cancelled as a whole.
    room: how many jobs may be queued."""
    if not plan.trials:
        return _drawn(tx, record, plan, stored, runs_on=runs_on)
    if record.question.spec.strategy != "asha":
        return Move(plan, stored, over=True)
    return _sent_on(tx, record, plan, stored, found, runs_on=runs_on, room=room)


def _drawn(tx: Tx, record: Record, plan: Plan, stored: dict[str, Any], *, runs_on: bool) -> Move:
    """The settings of all trials, once the task that draws them has ended; else that task."""
    question, state = record.question, stored.get("draw") or {}
    if "answer" in state:
        trials = tuple(_trial(record, number, settings) for number, settings in enumerate(state["answer"]["trials"]))
        return Move(replace(plan, trials=trials), {**stored, "draw": None}, over=False)
    search = question.spec.search
    space = {path: one.model_dump(mode="json") for path, one in question.spec.space.items()}
    arguments = {"space": space, "trials": search.trials, "seed": search.seed, "strategy": question.spec.strategy}
    return _with_task(tx, record, plan, stored, "draw", DRAW, arguments, key="draw", runs_on=runs_on)


def _trial(record: Record, number: int, settings: dict[str, Any]) -> Trial:
    """What was drawn by itself may break a rule together: such a trial is told of, and not run."""
    question = record.question
    try:
        place = Place(SEARCH, number, 0, question.base.seed)
        job_spec(question, Wanted(place, settings, question.base.epochs), experiment_id=record.row.id, name=record.row.name)
    except (ValidationError, InvalidSpec) as error:
        detail = str(error) if isinstance(error, InvalidSpec) else "; ".join(str(one["msg"]) for one in error.errors())
        return Trial(settings, refused=detail[:300])
    return Trial(settings, hold_epoch=first_hold(question))


def first_hold(question: Question) -> int | None:
    """The first rung, where there is one before the end."""
    first = question.spec.search.min_epochs
    return first if question.spec.strategy == "asha" and first < question.base.epochs else None


def _sent_on(tx: Tx, record: Record, plan: Plan, stored: dict[str, Any], found: Sequence[Run], *, runs_on: bool, room: int | None) -> Move:
    held = {run.place.arm: run for run in found if is_held(run)}
    plan = replace(plan, trials=_with_rungs(tx, record, plan.trials, held))
    state = stored.get("decide") or {}
    rings, due_ms = False, None
    if "answer" in state and runs_on:
        chosen = [one for one in state["answer"]["go_on"] if one["trial"] in held]
        now = chosen if room is None else chosen[:room]
        for one in sorted(now, key=lambda one: held[one["trial"]].job_id):  # rows are held in the order of their ids, by everybody
            plan = _go_on(tx, plan, one["trial"], held.pop(one["trial"]).job_id, one["until"])
        rest = [one for one in chosen if one not in now]
        state = {**state, "answer": {"go_on": rest}} if rest else {"key": state["key"]}
        rings, due_ms = bool(now), tx.now_ms + RETRY_MS if rest else None
        stored = {**stored, "decide": state}
        if rings or rest:
            return Move(plan, stored, over=False, rings=rings, due_ms=due_ms)
    arguments = _question(record.question, plan, found, held)
    key = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()[:32]
    if not held or (state.get("key") == key and "task" not in state):
        return Move(plan, stored, over=True)
    return _with_task(tx, record, plan, stored, "decide", DECIDE, arguments, key=key, runs_on=runs_on)


def is_held(run: Run) -> bool:
    """Whether its job has paused itself at a rung."""
    return run.state == JobState.PAUSED and run.hold_epoch is not None and run.epoch >= run.hold_epoch


def _with_rungs(tx: Tx, record: Record, trials: Sequence[Trial], held: Mapping[int, Run]) -> tuple[Trial, ...]:
    """What each trial that waits has shown at its rung."""
    new = {run.job_id: number for number, run in held.items() if str(run.hold_epoch) not in trials[number].rungs}
    changed = list(trials)
    for row in tx.all(select(jobs.c.id, jobs.c.latest).where(jobs.c.id.in_(list(new)))) if new else ():
        number = new[row.id]
        rungs = {**trials[number].rungs, str(held[number].hold_epoch): row.latest.get(record.question.spec.metric)}
        changed[number] = replace(trials[number], rungs=rungs)
    return tuple(changed)


def _go_on(tx: Tx, plan: Plan, number: int, job_id: str, until: int | None) -> Plan:
    row = tx.one(for_update(tx, select(jobs).where(jobs.c.id == job_id)))
    if row is not None and row.state == JobState.PAUSED:
        go_on(tx, row, until)
    trials = list(plan.trials)
    trials[number] = replace(trials[number], hold_epoch=until)
    return replace(plan, trials=tuple(trials))


def _question(question: Question, plan: Plan, found: Sequence[Run], held: Mapping[int, Run]) -> dict[str, Any]:
    search, states = question.spec.search, {run.place.arm: _word(run) for run in found}
    trials = [
        {"number": number, "state": "held" if number in held else states[number], "rungs": trial.rungs}
        for number, trial in enumerate(plan.trials)
        if number in states
    ]
    return {
        "direction": question.direction,
        "reduction": search.reduction,
        "min_epochs": search.min_epochs,
        "epochs": question.base.epochs,
        "trials": trials,
    }


def _word(run: Run) -> str:
    """A job that its user has paused will go on some day: it counts as at work."""
    if not run.is_open:
        return "succeeded" if run.state == JobState.SUCCEEDED else "failed"
    return "running" if JobState(run.state) in OWNED or run.state == JobState.PAUSED else "queued"


def _with_task(
    tx: Tx, record: Record, plan: Plan, stored: dict[str, Any], name: str, kind: str, arguments: dict[str, Any], *, key: str, runs_on: bool
) -> Move:
    """Ask a worker's child, one question at a time; again, a few times, where it failed or its task was lost."""
    state = stored.get(name) or {}
    if "task" in state and tx.one(select(task_rows.c.id).where(task_rows.c.id == state["task"])) is not None:
        return Move(plan, stored, over=False)  # its end is news
    tries = state.get("tries", 0) if state.get("asked") == key else 0
    if not runs_on:
        return Move(plan, stored, over=False)
    if tries >= MOST_TRIES:
        told = {"detail": f"the search does not go on: {(state.get('error') or {}).get('detail', 'its tasks were lost')}"}
        return Move(plan, {**stored, "stuck": told}, over=True)
    ready_ms = state.get("at", 0) + RETRY_MS if tries else tx.now_ms
    if tx.now_ms < ready_ms:
        return Move(plan, stored, over=False, due_ms=ready_ms)
    task_id = tasks.new_id(tx)
    tasks.submit(tx, task_id, kind, {**arguments, "experiment": record.row.id}, owner=record.row.owner)
    asked = {"key": state.get("key"), "asked": key, "task": task_id, "at": tx.now_ms, "tries": tries + 1}
    return Move(plan, {**stored, name: asked}, over=False, rings=True)
