"""An experiment's life: its jobs are made here, each once, its next stage is decided here, and a user moves it as a whole.

    user        submit  add_seeds  cancel  pause  resume  amend  remove
    anybody     advance  needs_advance

Every function takes an open write transaction. Locks are taken in one order, so that nobody waits in a circle: the experiment's row, the
owner's quota, then rows of jobs by id. Who holds a job's row never waits for an experiment's (`news` says how it tells it). That a run is
made once is the primary key of its row: it is written before the job, in the same transaction, while the experiment is held.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError
from sqlalchemy import bindparam, delete, insert, select, update
from ulid import ULID

from powergrad.jobs import debts, quotas, submission
from powergrad.jobs.changes import with_changes
from powergrad.jobs.errors import (
    IdempotencyMismatch,
    IllegalMove,
    InvalidSpec,
    JobError,
    QuotaExceeded,
    VersionMismatch,
    Violation,
    refusal,
)
from powergrad.jobs.experiments import analyses, evidence, news, records, results, searches, stages
from powergrad.jobs.experiments import plan as plans
from powergrad.jobs.experiments.answers import folder
from powergrad.jobs.experiments.plan import Question
from powergrad.jobs.experiments.records import Record, Run
from powergrad.jobs.experiments.spec import MAX_RUNS
from powergrad.jobs.experiments.stages import Plan, Tuned, Wanted
from powergrad.jobs.rows import LOCAL_OWNER, for_update, forget, move_all
from powergrad.jobs.spec import JobSpec, violations_of
from powergrad.jobs.states import OWNED, TERMINAL, JobState
from powergrad.jobs.store import Tx
from powergrad.jobs.submission import Submission, submit_all, take_key, with_references_resolved
from powergrad.jobs.tables import experiment_runs, experiments, idempotency_keys, jobs

QUOTA_WAIT_MS = 10_000
MOST_KEPT = 50
"""Runs whose results are written down at one look: each takes some milliseconds to read."""
RUNNING, PAUSED, CANCELLED = "running", "paused", "cancelled"
"""What a user wants of an experiment as a whole."""
ENDED = frozenset(str(state) for state in TERMINAL)
NOUN = "an experiment"


@dataclass(frozen=True)
class NewExperiment:
    """An experiment to store. body_sha256: of what was sent, compared when the idempotency key comes again."""

    question: Question
    owner: str = LOCAL_OWNER
    idempotency_key: str | None = None
    body_sha256: str = ""
    notes: str = ""
    cloned_from: str | None = None


@dataclass(frozen=True)
class _Asked:
    owner: str
    idempotency_key: str
    body_sha256: str


@dataclass(frozen=True)
class Submitted:
    """replayed: the experiment was there before, under the same idempotency key."""

    experiment_id: str
    replayed: bool


@dataclass(frozen=True)
class Advanced:
    """What a look at one experiment did. experiment_id: None when none was due, or others look at all that are.

    rings: jobs were queued. asked: an analysis is wanted, to be handed over after the commit.
    """

    experiment_id: str | None = None
    rings: bool = False
    asked: analyses.Asked | None = None


# --- what a user does ------------------------------------------------------------------------------------------------------------


def submit(tx: Tx, new: NewExperiment) -> Submitted:
    """Store an experiment, its idempotency key and the jobs of its first stage, all or nothing.

    Raises IdempotencyMismatch, InvalidSpec, QuotaExceeded.
    """
    quotas.limited(tx, {new.owner})  # before the key: submissions wait for the two in this order
    experiment_id = f"exp_{ULID.from_timestamp(tx.now_ms)}"
    earlier = None if new.idempotency_key is None else take_key(tx, new, experiment_id)
    if earlier is not None:
        if not earlier.startswith("exp_"):
            raise IdempotencyMismatch(new.idempotency_key or "")
        return Submitted(earlier, replayed=True)
    question, plan = settled(tx, new.question, owner=new.owner)
    row = {
        "id": experiment_id,
        "owner": new.owner,
        "name": question.name,
        "state": JobState.QUEUED,
        "wish": RUNNING,
        "spec": question.spec.model_dump(mode="json"),
        "plan": {
            "arms": [arm.settings for arm in question.arms],
            "candidates": list(question.candidates),
            "baseline": question.baseline,
            **plan.as_json(),
        },
        "notes": new.notes,
        "version": 1,
        "revision": 1,
        "cloned_from": new.cloned_from,
        "created_at": tx.now_ms,
    }
    tx.run(insert(experiments).values(**row))
    record = records.find(tx, experiment_id, owner=new.owner)
    _look(tx, record, refuses=True)
    return Submitted(experiment_id, replayed=False)


def settled(tx: Tx, question: Question, *, owner: str = LOCAL_OWNER) -> tuple[Question, Plan]:
    """The question with names that move (best, latest, a data set's newest version) fixed to what they mean now, the same for all arms that
    name the same. Raises UnknownReference, NotReady, with everything that is named in vain where it was written."""
    try:
        base = with_references_resolved(tx, question.base, owner=owner)
    except InvalidSpec as error:
        raise refusal([replace(one, pointer="/spec" + one.pointer) for one in error.violations]) from None
    fixed = replace(question, base=base, spec=question.spec.model_copy(update={"spec": base.model_dump(mode="json")}))
    _check_references(tx, fixed, owner)
    pinned = tuple(_pinned(tx, fixed, arm.settings, owner) for arm in fixed.arms)
    return fixed, Plan(seeds=fixed.seeds, pinned=pinned, tuned=tuple(Tuned() for _ in fixed.arms) if fixed.candidates else ())


def _check_references(tx: Tx, question: Question, owner: str) -> None:
    """What arms, candidates and choices name, each once. Raises UnknownReference, NotReady."""
    seen: set[str] = set()
    violations: list[Violation] = []
    for settings, written_at in plans.variations(question):
        names = json.dumps({path: value for path, value in settings.items() if _may_name(path)}, sort_keys=True)
        if names != "{}" and names not in seen:
            seen.add(names)
            try:
                with_references_resolved(tx, JobSpec.model_validate(with_changes(question.spec.spec, settings)), owner=owner)
            except InvalidSpec as error:
                violations += [plans.found_at(one, settings, written_at) for one in error.violations]
    if violations:
        raise refusal(plans.once(violations))


def _may_name(path: str) -> bool:
    """Whether what moves (a job's checkpoint, a set's newest version) can be named there."""
    return path.split(".")[0] in {"data", "model"}


def _pinned(tx: Tx, question: Question, settings: dict[str, Any], owner: str) -> dict[str, Any]:
    if not any(_may_name(path) for path in settings):
        return {}  # as the base
    asked = JobSpec.model_validate(with_changes(question.spec.spec, settings))
    found = with_references_resolved(tx, asked, owner=owner)
    pinned = {} if found.model.init_from is None else {"model.init_from": found.model.init_from}
    version = getattr(found.data, "version", None)
    return pinned if version is None else {**pinned, "data.version": version}


def add_seeds(tx: Tx, experiment_id: str, count: int, *, owner: str = LOCAL_OWNER, idempotency_key: str | None = None) -> bool:
    """Run every arm with so many further seeds, as tuning has set it; an experiment that has ended runs again.

    True: they were added before, under the same key. Raises ExperimentNotFound, IdempotencyMismatch, IllegalMove, InvalidSpec, QuotaExceeded.
    """
    record = records.hold(tx, experiment_id, owner=owner)
    if idempotency_key is not None:
        quotas.limited(tx, {owner})  # before the key, as submissions do
        asked = submission.body_hash({"experiment": experiment_id, "seeds": count})
        if submission.take_key(tx, _Asked(owner, idempotency_key, asked), experiment_id) is not None:
            return True
    question, plan = record.question, record.plan
    if question.spec.strategy != "grid":
        hint = "it runs each of its settings once: compare the best in an experiment of their own"
        raise IllegalMove("add seeds to", "a search", hint, noun=NOUN)
    if record.row.wish == CANCELLED:
        raise IllegalMove("add seeds to", CANCELLED, "clone it instead", noun=NOUN)
    if count < 1 or (len(plan.seeds) + count) * len(question.arms) > MAX_RUNS:
        rule = f"at least 1, and at most {MAX_RUNS} runs of the verdict: {len(plan.seeds)} seeds of {len(question.arms)} arms are there"
        raise InvalidSpec([Violation("/count", "out_of_range", rule, count)])
    more = tuple(range(plan.seeds[-1] + 1, plan.seeds[-1] + 1 + count))
    _look(tx, record, replace(plan, seeds=(*plan.seeds, *more)), refuses=True)
    return False


def cancel(tx: Tx, experiment_id: str, *, owner: str = LOCAL_OWNER) -> str:
    """Ask for the end of all its jobs, and make no more; the state it is in then. Twice is no error. Raises IllegalMove when it has ended."""
    record = records.hold(tx, experiment_id, owner=owner)
    if record.row.state in ENDED and record.row.wish != CANCELLED:
        raise IllegalMove("cancel", record.row.state, noun=NOUN)
    held = _held(tx, experiment_id, JobState.QUEUED, JobState.PAUSED, JobState.RUNNING, JobState.PAUSING)
    asked = {"cancel_requested_at": tx.now_ms}
    waiting = [row for row in held if JobState(row.state) not in OWNED]
    move_all(tx, [row for row in held if JobState(row.state) in OWNED], [JobState.CANCELLING], asked)
    move_all(tx, waiting, [JobState.CANCELLING, JobState.CANCELLED], {**asked, "finished_at": tx.now_ms, "not_before": None})
    return _look(tx, record, wish=CANCELLED).state


def pause(tx: Tx, experiment_id: str, *, owner: str = LOCAL_OWNER) -> str:
    """Have its jobs write a checkpoint and give their devices back, and start no other; the state it is in then."""
    record = records.hold(tx, experiment_id, owner=owner)
    _refuse(record, "pause")
    held = _held(tx, experiment_id, JobState.QUEUED, JobState.RUNNING)
    move_all(tx, [row for row in held if row.state == JobState.QUEUED], [JobState.PAUSED])
    move_all(tx, [row for row in held if row.state == JobState.RUNNING], [JobState.PAUSING])
    return _look(tx, record, wish=PAUSED).state


def resume(tx: Tx, experiment_id: str, *, owner: str = LOCAL_OWNER) -> str:
    """Put its paused jobs back into the queue, but for those that a search holds at a rung; the state it is in then.

    Jobs that are still writing their checkpoint follow once they have paused. Raises IllegalMove, QuotaExceeded.
    """
    record = records.hold(tx, experiment_id, owner=owner)
    _refuse(record, "resume")
    is_limited = bool(quotas.limited(tx, [owner]))
    waits = {run.job_id for run in records.runs(tx, experiment_id) if searches.is_held(run)}
    held = [row for row in _held(tx, experiment_id, JobState.PAUSED) if row.id not in waits]
    if is_limited and held:
        quotas.check_queued(tx, owner, new=len(held))
    move_all(tx, held, [JobState.QUEUED], {"not_before": None})
    pausing = [row.id for row in _held(tx, experiment_id, JobState.PAUSING)]
    return _look(tx, record, wish=RUNNING, resuming=pausing).state


def _refuse(record: Record, action: str) -> None:
    if record.row.state in ENDED or record.row.wish == CANCELLED:
        raise IllegalMove(action, record.row.state, noun=NOUN)


def _held(tx: Tx, experiment_id: str, *some: JobState) -> Sequence[Any]:
    """Its jobs in some states, held in the order of their ids."""
    mine = select(jobs).where(jobs.c.experiment == experiment_id, jobs.c.state.in_([str(state) for state in some]))
    return tx.all(for_update(tx, mine.order_by(jobs.c.id)))


def amend(
    tx: Tx,
    experiment_id: str,
    *,
    name: str | None = None,
    notes: str | None = None,
    expected_version: int | None = None,
    owner: str = LOCAL_OWNER,
) -> None:
    """Change the user's own fields; None leaves a field as it is.

    Raises ExperimentNotFound, and VersionMismatch when `expected_version` is not the experiment's.
    """
    row = records.hold(tx, experiment_id, owner=owner).row
    if expected_version is not None and expected_version != row.version:
        raise VersionMismatch(expected_version, row.version, noun="the experiment")
    values: dict[str, Any] = {} if name is None else {"name": name, "due_at": tx.now_ms}  # the report bears the name
    values |= {} if notes is None else {"notes": notes}
    if values:
        _write(tx, row, values, version=row.version + 1)


def remove(tx: Tx, experiment_id: str, *, owner: str = LOCAL_OWNER) -> None:
    """Delete an experiment that has ended, its jobs and all files. Raises ExperimentNotFound, IllegalMove."""
    row = records.hold(tx, experiment_id, owner=owner).row
    held = _held(tx, experiment_id, *JobState)
    at_work = [job.state for job in held if JobState(job.state) not in TERMINAL | {JobState.PAUSED}]
    if row.state not in ENDED or at_work:
        if row.state in ENDED:
            raise IllegalMove("delete", at_work[0], "it is one of the experiment's: cancel it first")
        raise IllegalMove("delete", row.state, "cancel it first", noun=NOUN)
    forget(tx, [job.id for job in held])  # those too that a search has left at a rung
    news.take(tx, experiment_id)
    for table, column in ((experiment_runs, experiment_runs.c.experiment_id), (experiments, experiments.c.id)):
        tx.run(delete(table).where(column == experiment_id))
    tx.run(delete(idempotency_keys).where(idempotency_keys.c.job_id == experiment_id))
    debts.owe(tx, folder(experiment_id))


# --- what anybody does -----------------------------------------------------------------------------------------------------------


def needs_advance(tx: Tx) -> bool:
    """Whether `advance` would find something to do: a look that takes no write lock."""
    return bool(waiting(tx))


def waiting(tx: Tx) -> list[str]:
    """Experiments that may have news, those that have waited for a moment of their own last; some of them where they are many."""
    due = select(experiments.c.id).where(experiments.c.due_at <= tx.now_ms).order_by(experiments.c.due_at).limit(news.MOST)
    return list(dict.fromkeys([*news.waiting(tx), *(row.id for row in tx.all(due))]))


def advance(tx: Tx, experiment_id: str | None = None) -> Advanced:
    """Look at an experiment that may have news (None: at the first): keep what its runs gave, decide, make the runs that follow, ask for an
    analysis, end it.

    Safe at any time, any number at once: who looks at an experiment holds its row, and whoever comes meanwhile takes the next one.
    """
    for one in waiting(tx) if experiment_id is None else [experiment_id]:
        row = tx.one(_free(tx, one))
        if row is not None:
            return _look(tx, Record(row), hands_over=True).advanced
        if tx.one(select(experiments.c.id).where(experiments.c.id == one)) is None:
            news.take(tx, one)  # of the jobs of one that is gone
    return Advanced()


def _free(tx: Tx, experiment_id: str) -> Any:
    query = select(experiments).where(experiments.c.id == experiment_id)
    return query.with_for_update(skip_locked=True) if tx.connection.dialect.name == "postgresql" else query


@dataclass(frozen=True)
class _Looked:
    state: str
    advanced: Advanced


def _look(
    tx: Tx,
    record: Record,
    plan: Plan | None = None,
    *,
    wish: str | None = None,
    resuming: Sequence[str] = (),
    refuses: bool = False,
    hands_over: bool = False,
) -> _Looked:
    """Take an experiment, whose row this transaction holds, as far as it goes now.

    plan, wish: where the user has changed them.  resuming: jobs that pause at this moment, to go on after that.  refuses: raise what keeps
    runs from being made, instead of waiting for it or noting it.  hands_over: whether the caller hands over the analysis that is asked for.
    """
    row, question = record.row, record.question
    news.take(tx, row.id)  # before the runs are read: see there
    plan, wish = plan or record.plan, wish or row.wish
    stored = {**row.plan, "resuming": [*row.plan.get("resuming", ()), *resuming] if wish == RUNNING else []}
    _resume_stragglers(tx, stored)
    found = _kept(tx, record, records.runs(tx, row.id))
    plan = replace(plan, tuned=stages.with_decisions(question, plan, {run.place: run.score for run in found if _is_settled(run)}))
    search = None
    if question.spec.strategy != "grid" and wish != CANCELLED:
        room = _room(tx, row.owner) if plan.trials else None
        search = searches.next_move(tx, record, plan, stored, found, runs_on=wish == RUNNING, room=room)
        plan, stored = search.plan, search.stored
        found = records.runs(tx, row.id) if search.rings else found
    stored |= plan.as_json()
    made = {run.place for run in found}
    missing = [run for run in stages.wanted(question, plan) if run.place not in made] if wish != CANCELLED else []
    now: list[Wanted] = []
    if missing and wish == RUNNING:
        now = missing if refuses else missing[: _room(tx, row.owner)]
        stored["stuck"] = _make(tx, record, now, refuses=refuses)
        missing = [] if stored["stuck"] else missing[len(now) :]
        found = records.runs(tx, row.id) if now else found
    rests = search is None or search.over  # nothing but jobs that are there decides what comes
    state = _state(found, row, wish=wish, missing=bool(missing) or not rests)
    looked = analyses.next_move(tx, row, stored, evidence.key(record, plan, found), ended=state in ENDED, hands_over=hands_over)
    due = [looked.due_ms, tx.now_ms + QUOTA_WAIT_MS if missing and wish == RUNNING else None]
    due.append(None if search is None else search.due_ms)
    due.append(tx.now_ms if any(run.unseen for run in found) else None)
    values = {
        "wish": wish,
        "state": state,
        "plan": stored | looked.plan,
        "evidence_key": looked.key,
        "task_id": looked.task_id,
        "error": looked.error,
        "due_at": min((at for at in due if at is not None), default=None),
        "started_at": row.started_at or (tx.now_ms if any(run.started for run in found) else None),
        "finished_at": (row.finished_at or tx.now_ms) if state in ENDED else None,
    }
    changed = {name: value for name, value in values.items() if getattr(row, name) != value}
    if changed:
        _write(tx, row, changed, version=row.version + bool({"wish", "state"} & changed.keys()))
    return _Looked(state, Advanced(row.id, rings=bool(now) or bool(search and search.rings), asked=looked.asked))


def _write(tx: Tx, row: Any, values: dict[str, Any], *, version: int) -> None:
    tx.run(update(experiments).where(experiments.c.id == row.id).values(**values, version=version, revision=row.revision + 1))


def _resume_stragglers(tx: Tx, stored: dict[str, Any]) -> None:
    """Let jobs go on that were still pausing when the experiment was resumed."""
    if stored["resuming"]:
        mine = select(jobs).where(jobs.c.id.in_(stored["resuming"])).order_by(jobs.c.id)
        held = tx.all(for_update(tx, mine))
        move_all(tx, [row for row in held if row.state == JobState.PAUSED], [JobState.QUEUED], {"not_before": None})
        stored["resuming"] = [row.id for row in held if row.state == JobState.PAUSING]


def _is_settled(run: Run) -> bool:
    return not run.is_open and not run.unseen


def _kept(tx: Tx, record: Record, found: Sequence[Run]) -> list[Run]:
    """The runs, with what those gave that have ended since the last look written down; of very many the rest is left for the next look."""
    unseen = [run for run in found if run.unseen]
    begun, others = ([run for run in unseen if run.started is wanted] for wanted in (True, False))
    some = {run.job_id: run for run in (*others, *begun[:MOST_KEPT])}  # what never began has no curve to be read
    metric = record.question.spec.metric
    told: dict[str, dict[str, Any]] = {}
    for job in tx.all(select(jobs).where(jobs.c.id.in_(list(some)))):
        result = results.of_job(tx, job, metric, with_curve=some[job.id].counts)
        told[job.id] = {
            "state": job.state,
            "attempt": job.attempt,
            "ended_at": job.finished_at,
            "score": results.score(job, metric),
            "result": result,
        }
    if told:
        kept = update(experiment_runs).where(experiment_runs.c.job_id == bindparam("of_job"))
        columns: dict[str, Any] = {name: bindparam(name) for name in ("state", "attempt", "ended_at", "score", "result")}
        tx.run(kept.values(**columns), [{"of_job": job_id, **values} for job_id, values in told.items()])
    return [replace(run, unseen=False, score=told[run.job_id]["score"]) if run.job_id in told else run for run in found]


def _room(tx: Tx, owner: str) -> int | None:
    """How many more jobs the owner may queue; None is any number."""
    if not quotas.limited(tx, [owner]):
        return None
    try:
        quotas.check_submission(tx, owner, new=0)
    except QuotaExceeded:
        return 0
    queued = quotas.usage(tx, owner)["queued"]
    return None if queued["granted"] is None else max(0, queued["granted"] - queued["used"])


def _make(tx: Tx, record: Record, some: Sequence[Wanted], *, refuses: bool) -> dict[str, Any] | None:
    """Store runs and their jobs, all or none; why not, where what they name is gone. Raises QuotaExceeded, and InvalidSpec if it refuses."""
    row = record.row
    ids = sorted(f"job_{ULID.from_timestamp(tx.now_ms)}" for _ in some)  # of one millisecond: sorted, they keep the order of the runs
    try:
        with tx.connection.begin_nested():
            if refuses and quotas.limited(tx, [row.owner]):
                quotas.check_submission(tx, row.owner, new=len(some))
            new = [_submission(record, run, job_id) for run, job_id in zip(some, ids, strict=True)]
            if new:
                tx.run(insert(experiment_runs), [_run_row(row.id, run, job_id) for run, job_id in zip(some, ids, strict=True)])
            for result in submit_all(tx, new):
                if isinstance(result, JobError):
                    raise result
    except InvalidSpec as error:
        if refuses:
            raise
        return {"detail": f"{len(some)} runs could not be made: {error}"}
    return None


def _submission(record: Record, run: Wanted, job_id: str) -> Submission:
    row = record.row
    try:
        spec = stages.job_spec(record.question, run, experiment_id=row.id, name=row.name)
    except ValidationError as error:
        raise InvalidSpec(violations_of(error, JobSpec)) from error
    return Submission(spec, owner=row.owner, experiment=row.id, job_id=job_id, hold_epoch=run.hold_epoch)


def _run_row(experiment_id: str, run: Wanted, job_id: str) -> dict[str, Any]:
    return {"experiment_id": experiment_id, **vars(run.place), "settings": run.settings, "job_id": job_id}


def _state(found: Sequence[Run], row: Any, *, wish: str, missing: bool) -> str:
    """The experiment's state in the jobs' words. missing: runs are still to be made."""
    states = {run.state for run in found if run.is_open and not searches.is_held(run)}
    if wish == CANCELLED and (JobState.CANCELLING in states or any(run.unseen for run in found)):
        return JobState.CANCELLING
    if states or missing or any(run.unseen for run in found):
        is_idle = states <= {JobState.PAUSED} and (bool(states) or wish == PAUSED)
        if is_idle and not (missing and wish == RUNNING):
            return JobState.PAUSED
        return JobState.RUNNING if any(run.started for run in found) else JobState.QUEUED
    if wish == CANCELLED:
        return JobState.CANCELLED
    return _end(found, row)


def _end(found: Sequence[Run], row: Any) -> str:
    """Failed runs are data: one of the verdict that succeeded is enough."""
    last = {run.state for run in found if run.counts}
    if JobState.SUCCEEDED in last:
        return JobState.SUCCEEDED
    if records.DELETED in last and row.state in ENDED:
        return str(row.state)
    return JobState.CANCELLED if found and {run.state for run in found} == {JobState.CANCELLED} else JobState.FAILED
