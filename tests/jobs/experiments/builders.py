"""Questions with overrides, and a worker that trains whatever it is given in no time, to a score that a test chooses."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import Row, select

from powergrad import protocol
from powergrad.jobs import recording, tasks
from powergrad.jobs.artifacts import Artifacts
from powergrad.jobs.claims import Claim
from powergrad.jobs.experiments import analyses, answers, lifecycle, plan, queries
from powergrad.jobs.experiments.lifecycle import NewExperiment
from powergrad.jobs.experiments.plan import Question
from powergrad.jobs.states import End, JobState, Outcome, ReasonCode
from powergrad.jobs.store import Store
from powergrad.jobs.tables import experiment_runs, jobs
from tests.jobs import builders as b
from worker.tasks import KINDS

EPOCHS = 2
ALPHAS = {"loss.alpha": [1.0, 0.5]}
Score = Callable[[dict[str, str], dict[str, Any]], float | None]
"""From a job's labels and spec; None has it fail."""


def body(**overrides: Any) -> dict[str, Any]:
    spec = {"data": {"dataset": "digits"}, "model": {"name": "resnet8"}, "epochs": EPOCHS, **overrides.pop("spec", {})}
    if overrides.get("strategy", "grid") != "grid":
        return {"spec": spec, **overrides}
    return {"spec": spec, "grid": ALPHAS, "seeds": 2, **overrides}


def question(**overrides: Any) -> Question:
    return plan.parse(body(**overrides))


def submit(store: Store, *, owner: str = "local", key: str | None = None, sha: str = "", **overrides: Any) -> str:
    new = NewExperiment(question(**overrides), owner=owner, idempotency_key=key, body_sha256=sha)
    return b.do(store, lifecycle.submit, new).experiment_id


def get(store: Store, experiment_id: str, *, owner: str = "local") -> dict[str, Any]:
    with store.read() as tx:
        return queries.get(tx, experiment_id, owner=owner)


def runs(store: Store, experiment_id: str) -> list[Row[Any]]:
    """Runs beside their jobs' state, in the order of the jobs."""
    query = select(experiment_runs, jobs.c.state.label("job_state"), jobs.c.spec, jobs.c.name).outerjoin(
        jobs, jobs.c.id == experiment_runs.c.job_id
    )
    with store.read() as tx:
        return list(tx.all(query.where(experiment_runs.c.experiment_id == experiment_id).order_by(experiment_runs.c.job_id)))


def places(store: Store, experiment_id: str) -> list[tuple[str, int, int, int]]:
    return [(run.stage, run.arm, run.candidate, run.seed) for run in runs(store, experiment_id)]


def by_alpha(_labels: dict[str, str], spec: dict[str, Any]) -> float:
    return 0.9 if spec["loss"]["alpha"] == 0.5 else 0.8


def train(store: Store, claim: Claim, score: Score = by_alpha) -> JobState:
    """Says what a trainer says, and ends."""
    value, epochs = score(dict(claim.spec.labels), claim.spec.model_dump(mode="json")), claim.spec.epochs
    if value is None:
        return b.fail(store, claim.run, ReasonCode.DIVERGED)
    begun = claim.resume[0].step // b.STEPS_PER_EPOCH if claim.resume else 0
    until = min(epochs, claim.hold_epoch or epochs)
    said: list[protocol.Message] = [b.plan(epochs=epochs, resumed_step=begun * b.STEPS_PER_EPOCH)]
    for epoch in range(begun + 1, until + 1):
        at = epoch * b.STEPS_PER_EPOCH
        said += [b.step(at), b.evaluation(at, value * epoch / epochs), b.checkpoint(at, value * epoch / epochs, attempt=claim.run.attempt)]
    with store.write() as tx:
        recording.record(tx, claim.run, said)
        return recording.finish(tx, claim.run, End(Outcome.SUCCEEDED if until == epochs else Outcome.HELD))


def train_all(store: Store, score: Score = by_alpha, *, most: int = 1000) -> int:
    """Claim and train until nothing waits; how many jobs."""
    count = 0
    while count < most and (claim := b.claim(store)) is not None:
        train(store, claim, score)
        count += 1
    return count


def advance(store: Store) -> list[lifecycle.Advanced]:
    """Until nothing has news."""
    done = []
    while (looked := b.do(store, lifecycle.advance)).experiment_id is not None:
        done.append(looked)
        assert len(done) < 100, "it has news for ever"
    return done


def settle(store: Store, score: Score = by_alpha) -> int:
    """Train and advance until nothing more happens; how many jobs were trained."""
    count = 0
    while True:
        advance(store)
        trained = train_all(store, score)
        count += trained
        if not trained:
            return count


def hand_over(store: Store, artifacts: Artifacts, looked: list[lifecycle.Advanced]) -> int:
    """Every analysis that was asked for; how many were handed over."""
    return sum(analyses.hand_over(store, artifacts, one.asked) for one in looked if one.asked is not None)


def do_tasks(store: Store, root: Path) -> list[str]:
    """What a worker's children do, in this process: every task that waits; their kinds."""
    done = []
    while (task := b.do(store, tasks.claim, lease_s=60.0)) is not None:
        b.do(store, tasks.finish, task, answer(task, root))
        done.append(task.kind)
    return done


def answer(task: tasks.Task, root: Path) -> dict[str, Any]:
    """What the child of a task gives."""
    module, _, name = KINDS[task.kind].function.partition(":")
    found: dict[str, Any] = getattr(importlib.import_module(module), name)(task.arguments, root)
    return found


def do_tasks_quickly(store: Store) -> int:
    """The same with analyses that find nothing, where only the moments matter; how many tasks."""
    count = 0
    while (task := b.do(store, tasks.claim, lease_s=60.0)) is not None:
        b.do(store, tasks.finish, task, quick_answer(task))
        count += 1
    return count


def quick_answer(task: tasks.Task) -> dict[str, Any]:
    return {"findings": {"arms": []}, "files": {}} if task.kind == answers.KIND else answer(task, Path())
