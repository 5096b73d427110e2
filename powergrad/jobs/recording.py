"""What a run writes about its job: its lease, what its trainer said, its end. All of it is fenced by the attempt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Row, and_, delete, select, update

from powergrad import protocol
from powergrad.jobs import accounts, metrics, quotas
from powergrad.jobs.debts import owe
from powergrad.jobs.errors import (
    Fenced,
)
from powergrad.jobs.retention import BEST_BY, let_go
from powergrad.jobs.rows import Event, Run, end_attempt, for_update, job_dir, owned, write
from powergrad.jobs.states import End, JobState
from powergrad.jobs.store import Tx
from powergrad.jobs.tables import (
    artifacts,
    attempts,
    checkpoints,
    jobs,
)

STORING = (protocol.CheckpointWritten, protocol.CheckpointSkipped, protocol.RolledBack, protocol.ArtifactWritten)


def renew(tx: Tx, run: Run, *, trained_ms: int = 0) -> JobState:
    """Extend the lease and read the wishes of the user: RUNNING, PAUSING or CANCELLING.

    trained_ms: training time since the last call. A lapsed lease that nobody has taken is renewed (a laptop slept). Raises Fenced.
    """
    values: dict[str, Any] = {"lease_until": tx.now_ms + int(run.lease_ttl_s * 1000)}
    if trained_ms:  # what a user can see moves the revision
        values |= {"trained_ms": jobs.c.trained_ms + trained_ms, "revision": jobs.c.revision + 1}
    row = tx.one(update(jobs).where(owned(run)).values(**values).returning(jobs.c.state, jobs.c.owner, jobs.c.gpus))
    if row is None:
        raise Fenced(run.job_id, run.attempt)
    quotas.charge(tx, row.owner, trained_ms * (row.gpus or 0))
    return JobState(row.state)


def state_of(tx: Tx, run: Run) -> JobState:
    """The state this run's job is in, without writing. Raises Fenced."""
    row = tx.one(select(jobs.c.state).where(owned(run)))
    if row is None:
        raise Fenced(run.job_id, run.attempt)
    return JobState(row.state)


def record(tx: Tx, run: Run, messages: Sequence[protocol.Message], *, said_before: int | None = None) -> JobState:
    """Write down what the trainer said, all of it or nothing; the state of the job. Raises Fenced.

    said_before: messages of this attempt that came before these; with it, what was written down already is not written again, so that
    a call whose commit was never confirmed can be repeated.
    """
    row = tx.one(for_update(tx, select(jobs).where(owned(run))))
    if row is None:
        raise Fenced(run.job_id, run.attempt)
    draft = _Draft.of(row)
    if said_before is not None:
        messages = messages[max(0, row.heard - said_before) :]
    for message in messages:
        draft.take(tx, run, message)
    draft.close(tx, run)
    values: dict[str, Any] = {
        "progress": draft.progress,
        "latest": draft.latest,
        "best": draft.best,
        "best_step": draft.best_step,
        "resolved": draft.resolved,
        "heard": row.heard + len(messages),
    }
    if any(isinstance(message, STORING) for message in messages):
        values["bytes"] = accounts.stored(run.job_id)
    if write(tx, owned(run), values, draft.events) is None:
        raise Fenced(run.job_id, run.attempt)
    return JobState(row.state)


def finish(tx: Tx, run: Run, end: End, *, trained_ms: int = 0) -> JobState:
    """Close the attempt and move the job on; the state it is in then. Raises Fenced."""
    row = tx.one(for_update(tx, select(jobs).where(owned(run))))
    if row is None:
        raise Fenced(run.job_id, run.attempt)
    return end_attempt(tx, row, end, trained_ms=trained_ms)


def prune(tx: Tx, run: Run) -> list[str]:
    """Forget what retention lets go; the directories (relative to the job's) to delete after the commit. Raises Fenced.

    Whoever deletes them says so by `freed`; what is left of them then is the sweeper's to free.
    """
    if tx.one(for_update(tx, select(jobs.c.id).where(owned(run)))) is None:  # held: a pin comes before or after
        raise Fenced(run.job_id, run.attempt)
    return let_go(tx, run.job_id)


@dataclass
class _Draft:
    """The job row's moving parts while a batch of messages is folded into them."""

    progress: dict[str, Any]
    latest: dict[str, Any]
    best: dict[str, Any]
    best_step: int | None
    resolved: dict[str, Any]
    events: list[Event] = field(default_factory=list)
    points: dict[str, list[metrics.Point]] = field(default_factory=dict)

    @classmethod
    def of(cls, row: Row[Any]) -> _Draft:
        return cls(dict(row.progress), dict(row.latest), dict(row.best), row.best_step, dict(row.resolved))

    def take(self, tx: Tx, run: Run, message: protocol.Message) -> None:
        match message:
            case protocol.Phase():
                self.progress["phase"] = message.name
                self.events.append(("phase", {"name": message.name, "attempt": run.attempt}))
            case protocol.Plan():
                self._plan(tx, run, message)
            case protocol.Step():
                self._step(message)
            case protocol.Evaluation():
                self._evaluation(run, message)
            case protocol.CheckpointWritten():
                self._checkpoint(tx, run, message)
            case protocol.CheckpointSkipped():
                step = int(message.id.removeprefix("step-"))
                tx.run(update(checkpoints).where(checkpoints.c.job_id == run.job_id, checkpoints.c.step == step).values(broken=True))
                self.events.append(("checkpoint_skipped", {"id": message.id, "detail": message.detail, "attempt": run.attempt}))
            case protocol.CheckpointFailed():
                self.events.append(("checkpoint_failed", {"step": message.step, "detail": message.detail, "attempt": run.attempt}))
            case protocol.RolledBack():
                self._roll_back(tx, run, message)
            case protocol.ArtifactWritten():
                self._artifact(tx, run, message)
            case protocol.Note():
                self.events.append(("note", {"detail": message.detail, "attempt": run.attempt}))
            case protocol.Done():
                self._done(run, message)
            case protocol.EvaluationProgress() | protocol.Failure():
                pass  # signs of life and failures are the supervisor's business

    def close(self, tx: Tx, run: Run) -> None:
        """Store the points gathered and announce them."""
        if self.points:
            steps = [step for series in self.points.values() for step, _ in series]
            metrics.append(tx, run.job_id, self.points)
            self.events.append(("metrics", {"attempt": run.attempt, "from_step": min(steps), "to_step": max(steps)}))
            self.points = {}

    def _plan(self, tx: Tx, run: Run, plan: protocol.Plan) -> None:
        self.events.append(("plan", {**plan.model_dump(exclude={"type"}), "attempt": run.attempt}))
        self.resolved |= {
            "precision": plan.precision,
            "determinism": plan.determinism,
            "determinism_reason": plan.determinism_reason,
            "parameters": plan.parameters,
            "classes": plan.classes,
            "train_images": plan.train_images,
            "val_images": plan.val_images,
            "test_images": plan.test_images,
        }
        self._at(plan.resumed_step, plan.resumed_step / plan.steps_per_epoch, plan.steps, plan.epochs)
        self.progress["ended_early"] = None
        if run.attempt > 1:
            self._rewind(tx, run, plan)
        tx.run(
            update(attempts)
            .where(attempts.c.job_id == run.job_id, attempts.c.number == run.attempt)
            .values(device=plan.device, resumed_from=plan.resumed_from)
        )

    def _rewind(self, tx: Tx, run: Run, plan: protocol.Plan) -> None:
        """Cut history back to the step gone on from: what lies after it belongs to a past that did not last."""
        tx.run(update(checkpoints).where(checkpoints.c.job_id == run.job_id, checkpoints.c.step > plan.resumed_step).values(broken=True))
        self._cut_metrics(tx, run, plan.resumed_step)
        self.events.append(("resumed", {"attempt": run.attempt, "from_step": plan.resumed_step, "checkpoint": plan.resumed_from}))

    def _roll_back(self, tx: Tx, run: Run, back: protocol.RolledBack) -> None:
        """The same within an attempt. The rows of later checkpoints go at once: the trainer may write these steps again, in the same
        place, and retention must not free a directory that has become another checkpoint's. (Those of earlier attempts it cannot.)"""
        kept = {name: [point for point in series if point[0] <= back.to_step] for name, series in self.points.items()}
        self.points = {name: series for name, series in kept.items() if series}
        self.close(tx, run)
        later = and_(checkpoints.c.job_id == run.job_id, checkpoints.c.step > back.to_step)
        gone = tx.all(
            delete(checkpoints).where(later, checkpoints.c.pinned.is_(False)).returning(checkpoints.c.path, checkpoints.c.attempt)
        )
        owe(tx, *(f"{job_dir(run.job_id)}/{row.path}" for row in gone if row.attempt < run.attempt))
        tx.run(update(checkpoints).where(later).values(broken=True))
        self._cut_metrics(tx, run, back.to_step)
        steps, epochs = self.progress["steps"], self.progress["epochs"]
        self._at(back.to_step, back.to_step * epochs / steps if steps else 0.0, steps, epochs)
        self.progress["eta_s"] = None
        self.events.append(("rolled_back", {**back.model_dump(exclude={"type"}), "attempt": run.attempt}))

    def _cut_metrics(self, tx: Tx, run: Run, step: int) -> None:
        metrics.truncate(tx, run.job_id, step)
        self.latest = metrics.latest(tx, run.job_id)
        self.best = _held_out(self.best)  # a test score is told again at the end
        if self.best_step is not None and self.best_step > step:
            self._find_best(tx, run)

    def _find_best(self, tx: Tx, run: Run) -> None:
        series = metrics.read(tx, run.job_id, BEST_BY)
        scored = [(-value, step) for step, value in zip(series.steps, series.values, strict=True) if value is not None]
        self.best_step = min(scored)[1] if scored else None
        self.best = {} if self.best_step is None else _held_out(metrics.values_at(tx, run.job_id, self.best_step))

    def _step(self, step: protocol.Step) -> None:
        self._points(step.step, {**step.metrics, "images_per_s": step.images_per_s})
        self._at(step.step, step.epoch, self.progress["steps"], self.progress["epochs"])
        # the phase `training` is said once an attempt: a step means that it trains again after an evaluation
        self.progress |= {"phase": "training", "eta_s": step.eta_s, "images_per_s": step.images_per_s}

    def _evaluation(self, run: Run, evaluation: protocol.Evaluation) -> None:
        self._points(evaluation.step, evaluation.metrics)
        self.events.append(("evaluation", {**evaluation.model_dump(exclude={"type"}), "attempt": run.attempt}))
        score = evaluation.metrics.get(BEST_BY)
        if evaluation.split == "test":
            self.best |= evaluation.metrics
        elif score is not None and score > self.best.get(BEST_BY, -math.inf):
            self.best, self.best_step = dict(evaluation.metrics), evaluation.step

    def _checkpoint(self, tx: Tx, run: Run, written: protocol.CheckpointWritten) -> None:
        row = {
            "attempt": run.attempt,
            "epoch": written.epoch,
            "path": written.path,
            "metrics": written.metrics,
            "score": written.metrics.get(BEST_BY),
            "bytes": written.bytes,
            "total_bytes": written.total_bytes,
            "sha256": written.sha256,
            "broken": False,
            "created_at": tx.now_ms,
        }
        before = tx.one(select(checkpoints.c.path).where(checkpoints.c.job_id == run.job_id, checkpoints.c.step == written.step))
        if before is not None and before.path != written.path:
            owe(tx, f"{job_dir(run.job_id)}/{before.path}")  # an earlier attempt's, which nobody writes again
        statement = tx.insert(checkpoints).values(job_id=run.job_id, step=written.step, pinned=False, **row)
        tx.run(statement.on_conflict_do_update(index_elements=["job_id", "step"], set_=row))
        told = {"id": written.id, "step": written.step, "epoch": written.epoch, "bytes": written.bytes, "sha256": written.sha256}
        self.events.append(("checkpoint", {**told, "metrics": written.metrics, "is_best": written.is_best, "attempt": run.attempt}))

    def _artifact(self, tx: Tx, run: Run, written: protocol.ArtifactWritten) -> None:
        told = written.model_dump(include={"media_type", "bytes", "sha256"})
        row = {**told, "path": written.path, "attempt": run.attempt, "created_at": tx.now_ms}
        here = and_(artifacts.c.job_id == run.job_id, artifacts.c.name == written.name)
        before = tx.one(select(artifacts.c.path).where(here))
        if before is not None and before.path != written.path:
            owe(tx, f"{job_dir(run.job_id)}/{before.path}")
        statement = tx.insert(artifacts).values(job_id=run.job_id, name=written.name, **row)
        tx.run(statement.on_conflict_do_update(index_elements=["job_id", "name"], set_=row))
        self.events.append(("artifact", {"name": written.name, **told, "attempt": run.attempt}))

    def _done(self, run: Run, done: protocol.Done) -> None:
        """An end before the last epoch: `fraction` stays what was trained of the plan, and the reason stands beside it."""
        if done.detail:
            self.events.append(("note", {"detail": done.detail, "attempt": run.attempt}))
        if done.outcome == "succeeded":
            self.progress["ended_early"] = done.detail or None

    def _points(self, step: int, values: protocol.Metrics) -> None:
        for name, value in values.items():
            self.points.setdefault(name, []).append((step, math.nan if value is None else value))
            self.latest[name] = value

    def _at(self, step: int, epoch: float, steps: int | None, epochs: int) -> None:
        self.progress |= {"step": step, "steps": steps, "epoch": math.floor(epoch + 1e-9), "epochs": epochs}
        self.progress["fraction"] = round(step / steps, 6) if steps else 0.0


def _held_out(values: dict[str, float | None]) -> dict[str, float | None]:
    return {name: value for name, value in values.items() if name.startswith("val_")}
