"""The evidence of an experiment, put together from its runs; and the key by which one tells whether there is more than was analysed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, cast

from sqlalchemy import select

from powergrad.experiments.findings import ArmEvidence, Direction, Evidence, Moment, RunEvidence
from powergrad.jobs.experiments import results, stages
from powergrad.jobs.experiments.records import Record, Run, runs
from powergrad.jobs.experiments.stages import Plan
from powergrad.jobs.store import Tx, rfc3339
from powergrad.jobs.tables import experiment_runs, jobs

MOST_LIVE = 100
"""Unfinished runs whose curves are looked at; of more the states alone are told. A search has as many as it likes: most of them wait."""


def key(record: Record, plan: Plan, found: Sequence[Run]) -> str | None:
    """Of what has ended and what was decided; None while there is nothing to analyse."""
    ended = [(run.job_id, run.state, run.ended_at) for run in found if run.counts and not run.is_open and run.ended_at is not None]
    if not ended and not any(tuned.rungs for tuned in plan.tuned):
        return None
    known = [record.row.name, sorted(ended), plan.as_json()["tuned"], plan.seeds, plan.as_json()["trials"]]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]


def collect(tx: Tx, record: Record) -> Evidence:
    """All that is known now."""
    question, plan = record.question, record.plan
    found = [run for run in runs(tx, record.row.id) if run.counts]
    told = _results(tx, record, found)
    limit = max(2, min(results.MOST_MOMENTS, results.MOST_MOMENTS_IN_ALL // max(1, len(found))))
    return Evidence(
        experiment=record.row.id,
        name=record.row.name,
        metric=question.spec.metric,
        direction=cast("Direction", question.direction),
        strategy=question.spec.strategy,
        arms=arms(record),
        baseline=question.baseline,
        seeds=list(plan.seeds),
        runs=[_run(run, told.get(run.job_id, {}), limit) for run in sorted(found, key=lambda run: run.place)],
        tuning=stages.tuning_evidence(question, plan),
        shared=question.shared,
        spec=question.spec.spec,
        question=record.row.spec,
        provenance=_provenance(record, told),
    )


def arms(record: Record) -> list[ArmEvidence]:
    """What is compared; of a search the settings drawn so far."""
    question, plan = record.question, record.plan
    if question.spec.strategy != "grid":
        return [ArmEvidence(index=number, settings=dict(trial.settings), tuned={}) for number, trial in enumerate(plan.trials)]
    return [
        ArmEvidence(index=arm.index, settings=arm.settings, tuned=stages.chosen_settings(question, plan, arm.index) or {})
        for arm in question.arms
    ]


def _results(tx: Tx, record: Record, found: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """By job: what was kept of those that ended, and what those at work say now."""
    mine = (experiment_runs.c.experiment_id == record.row.id, experiment_runs.c.result.is_not(None))
    kept = {row.job_id: row.result for row in tx.all(select(experiment_runs.c.job_id, experiment_runs.c.result).where(*mine))}
    live = [run.job_id for run in found if run.is_open and run.started]
    for job_id in live:
        kept.pop(job_id, None)  # of an end that a retry has undone
    some = live[:MOST_LIVE] if record.question.spec.strategy == "grid" else live
    for row in tx.all(select(jobs).where(jobs.c.id.in_(some))):
        kept[row.id] = results.of_job(tx, row, record.question.spec.metric)
    return {run.job_id: kept[run.job_id] for run in found if run.job_id in kept}


def _run(run: Run, told: dict[str, Any], limit: int) -> RunEvidence:
    curve: list[Moment] = told.get("curve", [])
    return RunEvidence(
        job=run.job_id,
        arm=run.place.arm,
        seed=run.place.seed,
        state=run.state,
        reason=told.get("reason"),
        final=told.get("final", {}),
        curve=results.thinned(curve, limit),
        seconds=told.get("seconds", run.seconds),
        joules=told.get("joules"),
    )


def _provenance(record: Record, told: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the runs were made on: a value where all agree, a list where they do not."""
    data = record.question.base.data
    ran_on: dict[str, Any] = {}
    for name in ("device", *results.TOLD):
        values = list({json.dumps(one["ran_on"].get(name)): one["ran_on"].get(name) for one in told.values()}.values())
        if values:
            ran_on[name] = values[0] if len(values) == 1 else values
    return {
        "experiment": record.row.id,
        "created_at": rfc3339(record.row.created_at),
        "data": {"dataset": data.dataset, "version": getattr(data, "version", None)},
        "ran_on": ran_on,
    }
