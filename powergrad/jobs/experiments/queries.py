"""What the API shows of an experiment: as JSON, one or a page of them, its evidence and the files of its report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, Select, func, select

from powergrad.experiments.findings import ArmEvidence, Evidence
from powergrad.experiments.labels import labels
from powergrad.jobs.errors import ArtifactNotFound, ReportNotReady
from powergrad.jobs.experiments import evidence as evidences
from powergrad.jobs.experiments import records, stages
from powergrad.jobs.experiments.records import DELETED, Record
from powergrad.jobs.experiments.stages import SEARCH, VERDICT
from powergrad.jobs.queries import Page
from powergrad.jobs.rows import LOCAL_OWNER
from powergrad.jobs.states import OWNED, TERMINAL, JobState
from powergrad.jobs.store import Tx, rfc3339
from powergrad.jobs.tables import experiment_runs, experiments, jobs

_STATE = func.coalesce(jobs.c.state, experiment_runs.c.state, DELETED)
_GROUPS = (
    select(
        experiment_runs.c.experiment_id,
        experiment_runs.c.stage,
        experiment_runs.c.arm,
        _STATE.label("state"),
        func.count().label("n"),
        func.sum(jobs.c.trained_ms).label("trained_ms"),
        func.sum(jobs.c.progress["fraction"].as_float()).label("fractions"),
    )
    .select_from(experiment_runs.outerjoin(jobs, jobs.c.id == experiment_runs.c.job_id))
    .group_by(experiment_runs.c.experiment_id, experiment_runs.c.stage, experiment_runs.c.arm, _STATE)
)
_NOT_COUNTED = {"n": 0, "mean": None, "sd": None, "low": None, "high": None}


@dataclass(frozen=True)
class StoredFile:
    """A file of the report: where it lies below the artifact root, and what it must be."""

    name: str
    path: str
    media_type: str
    bytes: int
    sha256: str


def get(tx: Tx, experiment_id: str, *, owner: str = LOCAL_OWNER) -> dict[str, Any]:
    """An experiment as JSON. Raises ExperimentNotFound."""
    record = records.find(tx, experiment_id, owner=owner)
    return _shown(record, tx.all(_GROUPS.where(experiment_runs.c.experiment_id == experiment_id)))


def page(tx: Tx, *, owner: str = LOCAL_OWNER, limit: int, after: str | None = None, state: Sequence[str] = ()) -> Page:
    """Experiments, newest first. after: id of the last one seen."""
    rows, groups = _page(tx, select(experiments), owner=owner, limit=limit, after=after, state=state)
    return Page([_shown(Record(row), groups[row.id]) for row in rows[:limit]], len(rows) > limit)


_LINE = select(
    *(column for column in experiments.c if column is not experiments.c.findings),  # of a large search half a megabyte
    experiments.c.findings["verdict"].as_string().label("verdict"),
)


def summaries(tx: Tx, *, owner: str = LOCAL_OWNER, limit: int, after: str | None = None, state: Sequence[str] = ()) -> Page:
    """The experiments of `page`, each as the line of a table: without its arms, and without reading what was found of each."""
    rows, groups = _page(tx, _LINE, owner=owner, limit=limit, after=after, state=state)
    return Page([_summary(Record(row), groups[row.id]) for row in rows[:limit]], len(rows) > limit)


def _page(
    tx: Tx, query: Select[Any], *, owner: str, limit: int, after: str | None, state: Sequence[str]
) -> tuple[Sequence[Row[Any]], dict[str, list[Row[Any]]]]:
    """The page's rows, and one more where more follow; and the counts of the runs of each."""
    mine = [experiments.c.owner == owner]
    mine += [] if after is None else [experiments.c.id < after]
    mine += [experiments.c.state.in_([str(one) for one in state])] if state else []
    rows = tx.all(query.where(*mine).order_by(experiments.c.id.desc()).limit(limit + 1))
    groups: dict[str, list[Row[Any]]] = {row.id: [] for row in rows[:limit]}
    for group in tx.all(_GROUPS.where(experiment_runs.c.experiment_id.in_(list(groups)))):
        groups[group.experiment_id].append(group)
    return rows, groups


def etag(experiment: dict[str, Any]) -> str:
    """Changes exactly when the experiment's JSON does, the progress of its jobs included."""
    digest = hashlib.sha256(json.dumps(experiment, sort_keys=True).encode()).hexdigest()
    return f'"{experiment["version"]}-{digest[:16]}"'


def pulse(tx: Tx, experiment_ids: Sequence[str]) -> dict[str, tuple[int, int, JobState]]:
    """What a tailer watches, in the shape of the jobs': revision, the revisions of its jobs together, and state."""
    some = list(experiment_ids)
    moved = select(jobs.c.experiment, func.sum(jobs.c.revision).label("moves")).where(jobs.c.experiment.in_(some))
    moves = {row.experiment: int(row.moves) for row in tx.all(moved.group_by(jobs.c.experiment))}
    rows = tx.all(select(experiments.c.id, experiments.c.revision, experiments.c.state).where(experiments.c.id.in_(some)))
    return {row.id: (row.revision, moves.get(row.id, 0), JobState(row.state)) for row in rows}


def evidence(tx: Tx, experiment_id: str, *, owner: str = LOCAL_OWNER) -> Evidence:
    """All that is known now. Raises ExperimentNotFound."""
    return evidences.collect(tx, records.find(tx, experiment_id, owner=owner))


def file(tx: Tx, experiment_id: str, name: str, *, owner: str = LOCAL_OWNER) -> StoredFile:
    """A file of the newest report. Raises ExperimentNotFound, ReportNotReady; ArtifactNotFound for a name that no report has."""
    files = records.find(tx, experiment_id, owner=owner).row.files
    if not files:
        raise ReportNotReady(experiment_id)
    if name not in files:
        raise ArtifactNotFound(experiment_id, name)
    return StoredFile(name, **{key: files[name][key] for key in ("path", "media_type", "bytes", "sha256")})


def _shown(record: Record, groups: Sequence[Row[Any]]) -> dict[str, Any]:
    row, question, plan = record.row, record.question, record.plan
    findings: dict[str, Any] = row.findings or {}
    return {
        "id": row.id,
        "object": "experiment",
        "name": row.name,
        "state": row.state,
        "stage": stages.stage(question, plan),
        "spec": row.spec,
        "counts": _counted(groups),
        "progress": _progress(record, groups),
        "arms": _arms(record, groups, findings),
        "baseline": question.baseline,
        "best": findings.get("best"),
        "verdict": findings.get("verdict"),
        "warnings": [*_warnings(record), *findings.get("warnings", ())],
        "tuning": stages.tuning_evidence(question, plan),
        "analysis": {"state": _analysis(row), "error": row.error},
        "files": sorted(row.files or ()),
        "notes": row.notes,
        "cloned_from": row.cloned_from,
        "created_at": rfc3339(row.created_at),
        "started_at": rfc3339(row.started_at),
        "finished_at": rfc3339(row.finished_at),
        "version": row.version,
    }


def _summary(record: Record, groups: Sequence[Row[Any]]) -> dict[str, Any]:
    row, question, plan = record.row, record.question, record.plan
    return {
        "id": row.id,
        "object": "experiment_summary",
        "name": row.name,
        "state": row.state,
        "stage": stages.stage(question, plan),
        "strategy": question.spec.strategy,
        "metric": question.spec.metric,
        "arm_count": len(evidences.arms(record)),
        "counts": _counted(groups),
        "progress": _progress(record, groups),
        "verdict": row.verdict,
        "analysis": {"state": _analysis(row), "error": row.error},
        "created_at": rfc3339(row.created_at),
        "started_at": rfc3339(row.started_at),
        "finished_at": rfc3339(row.finished_at),
        "version": row.version,
    }


def _counted(groups: Sequence[Row[Any]]) -> dict[str, int]:
    totals = {str(state): 0 for state in (*JobState, DELETED)}
    for group in groups:
        totals[group.state] += group.n
    return {state: count for state, count in totals.items() if count}


def _progress(record: Record, groups: Sequence[Row[Any]]) -> dict[str, Any]:
    """In epochs, as a run of tuning may be shorter than one of the verdict; the time left at the pace of what was trained so far."""
    planned = stages.all_epochs(record.question, record.plan)
    done = made = seconds = 0.0
    for group in groups:
        runs, epochs = planned.get(group.stage, (0, 0))
        each = epochs / runs if runs else 0.0
        over = group.state in TERMINAL or group.state == DELETED
        done += each * (group.n if over else group.fractions or 0.0)
        made += each * (group.fractions or 0.0)  # of a failed run the part that it trained
        seconds += float(group.trained_ms or 0) / 1000  # PostgreSQL adds integers up to a decimal
    total = sum(epochs for _, epochs in planned.values())
    runs_done = sum(group.n for group in groups if group.state in TERMINAL or group.state == DELETED)
    at_work = sum(group.n for group in groups if group.state in OWNED)
    has_ended = record.row.finished_at is not None
    left = seconds / made * (total - done) / at_work if made and seconds and at_work and not has_ended else None
    return {
        "fraction": 1.0 if has_ended else round(min(1.0, done / total), 6) if total else 0.0,
        "runs_done": runs_done,
        "runs": max(sum(runs for runs, _ in planned.values()), sum(group.n for group in groups)),
        "eta_s": None if left is None else round(left, 1),
    }


def _arms(record: Record, groups: Sequence[Row[Any]], findings: dict[str, Any]) -> list[dict[str, Any]]:
    arms = evidences.arms(record)
    known = {arm["index"]: arm for arm in findings.get("arms", ())}
    counts: dict[int, list[Row[Any]]] = {}
    for group in groups:
        if group.stage in (VERDICT, SEARCH):
            counts.setdefault(group.arm, []).append(group)
    metric = record.question.spec.metric
    return [
        _arm(arm, label, _counted(counts.get(arm["index"], ())), known.get(arm["index"], {}), metric)
        for arm, label in zip(arms, labels(arms, record.question.spec.spec), strict=True)
    ]


def _arm(arm: ArmEvidence, label: str, counts: dict[str, int], found: dict[str, Any], metric: str) -> dict[str, Any]:
    estimate = found.get("metrics", {}).get(metric, _NOT_COUNTED)
    return {
        "index": arm["index"],
        "label": label,
        "settings": arm["settings"],
        "tuned": arm["tuned"],
        "counts": counts,
        **{name: estimate[name] for name in _NOT_COUNTED},
        "difference": found.get("difference"),
        "convergence": found.get("convergence"),
    }


def _warnings(record: Record) -> list[str]:
    """What the findings cannot know, as it keeps runs from being made."""
    failed = [
        f"Arm {arm} has no verdict: every value that tuning tried for it failed."
        for arm in stages.failed_arms(record.question, record.plan)
    ]
    stuck = record.row.plan.get("stuck")
    refused = [trial.refused for trial in record.plan.trials if trial.refused is not None]
    if refused:
        failed.append(f"{len(refused)} of {len(record.plan.trials)} settings drawn break a rule together and were not run: {refused[0]}")
    return [*failed, stuck["detail"]] if stuck else failed


def _analysis(row: Row[Any]) -> str:
    if row.task_id is not None:
        return "running"
    if row.error is not None:
        return "failed"
    if row.findings_key is None:
        return "none"
    return "current" if row.findings_key == row.evidence_key else "stale"
