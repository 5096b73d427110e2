"""An experiment's row and its runs as they are read: the question, the plan, and each run beside its job's state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sqlalchemy import Row, select

from powergrad.jobs.errors import ExperimentNotFound
from powergrad.jobs.experiments import plan as plans
from powergrad.jobs.experiments.plan import Question
from powergrad.jobs.experiments.stages import SEARCH, VERDICT, Place, Plan
from powergrad.jobs.rows import LOCAL_OWNER, for_update
from powergrad.jobs.states import TERMINAL, JobState
from powergrad.jobs.store import Tx
from powergrad.jobs.tables import experiment_runs, experiments, jobs

DELETED = "deleted"
"""Of a run whose job went before its end was seen: the word beside the states of jobs."""


@dataclass(frozen=True)
class Record:
    """An experiment's row, and what its JSON means."""

    row: Row[Any]

    @cached_property
    def question(self) -> Question:
        stored = self.row.plan
        return plans.stored(self.row.spec, arms=stored["arms"], candidates=stored["candidates"], baseline=stored["baseline"])

    @cached_property
    def plan(self) -> Plan:
        return Plan.from_json(self.row.plan)


@dataclass(frozen=True)
class Run:
    """A run: where it belongs, and how it stands. state: its job's, or the one in which it was last seen where the job has been deleted."""

    place: Place
    job_id: str
    state: str
    is_open: bool
    """Its job may still end, or end again."""
    unseen: bool
    """Its job has ended, and what it gave is not kept yet."""
    score: float | None
    ended_at: int | None
    fraction: float
    seconds: float
    started: bool
    epoch: int = 0
    hold_epoch: int | None = None

    @property
    def counts(self) -> bool:
        """Whether it is one of those that are compared, and not one by which settings are chosen."""
        return self.place.stage in (VERDICT, SEARCH)


def find(tx: Tx, experiment_id: str, *, owner: str = LOCAL_OWNER) -> Record:
    """Raises ExperimentNotFound."""
    return _record(tx, experiment_id, select(experiments).where(experiments.c.id == experiment_id, experiments.c.owner == owner))


def hold(tx: Tx, experiment_id: str, *, owner: str = LOCAL_OWNER) -> Record:
    """The same, held until the transaction ends: before any row of its jobs, as everybody does. Raises ExperimentNotFound."""
    mine = select(experiments).where(experiments.c.id == experiment_id, experiments.c.owner == owner)
    return _record(tx, experiment_id, for_update(tx, mine))


def _record(tx: Tx, experiment_id: str, query: Any) -> Record:
    row = tx.one(query)
    if row is None:
        raise ExperimentNotFound(experiment_id)
    return Record(row)


_RUNS = select(
    experiment_runs.c.stage,
    experiment_runs.c.arm,
    experiment_runs.c.candidate,
    experiment_runs.c.seed,
    experiment_runs.c.job_id,
    experiment_runs.c.state.label("seen"),
    experiment_runs.c.attempt.label("seen_attempt"),
    experiment_runs.c.ended_at,
    experiment_runs.c.score,
    jobs.c.attempt,
    jobs.c.state,
    jobs.c.finished_at,
    jobs.c.started_at,
    jobs.c.trained_ms,
    jobs.c.progress,
    jobs.c.hold_epoch,
).select_from(experiment_runs.outerjoin(jobs, jobs.c.id == experiment_runs.c.job_id))


def runs(tx: Tx, experiment_id: str) -> list[Run]:
    """Every run that was made, in the order of their jobs."""
    rows = tx.all(_RUNS.where(experiment_runs.c.experiment_id == experiment_id).order_by(experiment_runs.c.job_id))
    return [_run(row) for row in rows]


def _run(row: Row[Any]) -> Run:
    place = Place(row.stage, row.arm, row.candidate, row.seed)
    if row.state is None:
        state = row.seen or DELETED
        return Run(place, row.job_id, state, False, False, row.score, row.ended_at, 1.0, 0.0, started=True)
    ended = JobState(row.state) in TERMINAL
    is_seen = (row.ended_at, row.seen_attempt) == (row.finished_at, row.attempt)
    fraction = 1.0 if ended else float(row.progress["fraction"])
    return Run(
        place=place,
        job_id=row.job_id,
        state=row.state,
        is_open=not ended,
        unseen=ended and not is_seen,
        score=row.score if ended and is_seen else None,
        ended_at=row.finished_at if ended else None,
        fraction=fraction,
        seconds=row.trained_ms / 1000,
        started=row.started_at is not None,
        epoch=row.progress["epoch"],
        hold_epoch=row.hold_epoch,
    )


def counted(found: Sequence[Run]) -> dict[str, int]:
    """Runs by state, in the order of the states."""
    states = [run.state for run in found]
    return {state: states.count(state) for state in (*JobState, DELETED) if state in states}
