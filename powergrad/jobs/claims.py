"""How a worker comes by a job: an offer of slots, and the best runnable job that fits it."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ValidationError
from sqlalchemy import ColumnElement, Row, and_, func, insert, select, text

from powergrad import protocol
from powergrad.jobs import datasets, fleet, outbox, quotas
from powergrad.jobs import gpus as counts
from powergrad.jobs.errors import (
    CheckpointNotFound,
    InvalidSpec,
    JobError,
    JobNotFound,
)
from powergrad.jobs.retention import checkpoint_id, checkpoint_row, whole_checkpoints
from powergrad.jobs.rows import LEASE_TTL_S, Event, Run, for_update, is_runnable, job_dir, move, owners_with, state_event, write
from powergrad.jobs.spec import JobSpec, violations_of
from powergrad.jobs.states import JobState, Reason, ReasonCode
from powergrad.jobs.store import Tx
from powergrad.jobs.tables import (
    IS_OWNED,
    IS_QUEUED,
    attempts,
    checkpoints,
    jobs,
)

CLAIM_CANDIDATES = 64
SIBLINGS = 8  # of an experiment, among which one has said its precision as soon as any has
FIRST_LOCKS = 0x66697273  # "firs": these advisory locks among others of the database


@dataclass(frozen=True)
class Offer:
    """What a worker's free slots give. device: their name for people; cpu_threads: cores of one slot."""

    worker: str
    device: str
    gpus: float
    """GPUs that the worker holds for this claim: whole ones or a part of one; 0 on a CPU slot."""
    cpu_threads: int
    lease_ttl_s: float = LEASE_TTL_S
    could_hold: float = 0
    """GPUs, or the part of one, that it could hold now; no more than `gpus` if smaller."""
    in_all: int = 0
    """GPUs that it has, free or not; no more than it could hold if smaller."""
    part_with_memory: float = 1.0
    """The largest part of one GPU whose memory is free too."""

    @property
    def within_reach(self) -> float:
        return max(self.gpus, self.could_hold)

    @property
    def size(self) -> float:
        """What it holds, as a job's size is counted."""
        return _size(self.gpus)


def _size(gpus: float) -> float:
    """A job on the CPU takes a whole slot: one of a worker that has GPUs is as large as a GPU."""
    return gpus or 1


class SlotsWanted(Exception):
    """The next job wants another number of slots, or part of one, than the offer holds, and the worker could have it: offer again so."""

    def __init__(self, count: float) -> None:
        super().__init__(f"the next job wants {count:g} slot(s)")
        self.count = count


@dataclass(frozen=True)
class Claim:
    """A job taken: the run, its spec, and what earlier attempts left."""

    run: Run
    spec: JobSpec
    gpus: float
    cpu_threads: int
    precision: str | None  # fixed by the first attempt; None before it
    trained_s: float
    resume: list[protocol.ResumePoint] = field(default_factory=list)
    hold_epoch: int | None = None
    """Epochs after which the job pauses itself; None: it runs to its end."""
    stored: frozenset[str] = frozenset()
    """Directories (relative to the job's) of all its checkpoints, those with it that cannot be gone on from."""
    init_from: Origin | None = None
    dataset: datasets.Place | None = None
    """Where an uploaded or registered set is; None for a built-in one."""


@dataclass(frozen=True)
class Origin:
    """Another job's weights to begin with. path: of the file, below the artifact root."""

    path: str
    sha256: str


def claim(tx: Tx, offer: Offer) -> Claim | None:
    """Take the best runnable job that fits the offer, or None: highest priority, then the owner with the fewest running, then age.

    A job that wants more GPUs than are free now keeps its turn: the worker that is to host it takes nothing that comes after it.
    Raises SlotsWanted.
    """
    hosts = _Hosts(tx)
    for candidate in _candidates(tx, offer):
        alike = _as_its_siblings(tx, candidate)
        wanted = alike["gpus"] if candidate.gpus is None and alike else _wanted(candidate, offer)
        if wanted > max(offer.within_reach, offer.in_all):
            continue  # its siblings' are on GPUs, and this worker has none
        if _size(wanted) > max(offer.size, offer.could_hold):
            if hosts.take(wanted) == offer.worker:
                return None
            continue
        if offer.part_with_memory < wanted < 1:
            continue  # another program has it: no turn that is kept gives it back
        if _size(wanted) != offer.size:
            raise SlotsWanted(_size(wanted))
        spec = _readable_spec(tx, candidate)
        if spec is None:
            continue
        try:
            origin = _origin(tx, candidate, spec)
        except (JobNotFound, CheckpointNotFound) as error:
            _fail_without_origin(tx, candidate, error)
            continue
        place = None if candidate.dataset_id is None else datasets.place(tx, candidate.dataset_id)
        if candidate.dataset_id is not None and place is None:
            _fail_without_data(tx, candidate)
            continue
        resolved = {**alike, **candidate.resolved}
        cpu_threads = resolved.get("cpu_threads") or spec.resources.cpu_threads or max(1, int(offer.cpu_threads * _size(wanted)))
        resolved |= {"cpu_threads": cpu_threads, "gpus": wanted}
        values = {
            "state": JobState.RUNNING,
            "attempt": candidate.attempt + 1,
            "version": candidate.version + 1,
            "worker": offer.worker,
            "heard": 0,
            "lease_until": tx.now_ms + int(offer.lease_ttl_s * 1000),
            "not_before": None,
            "reason": None,
            "started_at": candidate.started_at or tx.now_ms,
            "resolved": resolved,
            "gpus": wanted,
            "progress": {**candidate.progress, "phase": "starting", "eta_s": None, "images_per_s": None},
        }
        if not alike and not _may_be_first(tx, candidate):
            continue  # another worker takes the first of its experiment just now: the next look knows what that one has settled
        # version: everything above was read before the row was ours, and the user may have changed it since
        where = and_(jobs.c.id == candidate.id, jobs.c.state == JobState.QUEUED, jobs.c.version == candidate.version)
        happened: list[Event] = [
            ("claimed", {"attempt": candidate.attempt + 1, "worker": offer.worker, "device": offer.device}),
            state_event(JobState.QUEUED, JobState.RUNNING, candidate.attempt + 1),
        ]
        if write(tx, where, values, happened) is None:
            continue  # somebody else has it
        outbox.announce(tx, candidate, JobState.RUNNING)
        taken = _claimed(tx, candidate, offer, spec=spec, gpus=wanted, cpu_threads=cpu_threads)
        return replace(taken, init_from=origin, dataset=place, precision=resolved.get("precision"))
    return None


def _as_its_siblings(tx: Tx, candidate: Row[Any]) -> dict[str, Any]:
    """What the first job of its experiment has settled for all of them: cpu_threads, gpus and, once its trainer has said it, the precision.

    They are part of the bits, and runs are compared in pairs. Empty for a job that has settled them itself, and where none has yet.
    """
    if candidate.experiment is None or candidate.resolved:
        return {}
    siblings = tx.all(select(jobs.c.resolved, jobs.c.spec).where(*_claimed_before(candidate)).order_by(jobs.c.id).limit(SIBLINGS))
    if not siblings:
        return {}
    same = [
        row.resolved["precision"]
        for row in siblings
        if "precision" in row.resolved and row.spec["precision"] == candidate.spec["precision"]
    ]
    settled = {name: siblings[0].resolved[name] for name in ("cpu_threads", "gpus")}
    return {**settled, "precision": same[0]} if same else settled


def _may_be_first(tx: Tx, candidate: Row[Any]) -> bool:
    """Whether the job may settle what all of its experiment compute with: of two that could be the first, one.

    The other does not wait: a claim may hold rows of jobs that it has failed on its way, and whoever holds a row must not wait for a claim.
    """
    if candidate.experiment is None or candidate.resolved:
        return True
    if tx.connection.dialect.name == "postgresql":
        key = zlib.crc32(candidate.experiment.encode()) - 2**31
        if not tx.run(text("SELECT pg_try_advisory_xact_lock(:locks, :key)"), {"locks": FIRST_LOCKS, "key": key}).scalar_one():
            return False
    return tx.one(select(jobs.c.id).where(*_claimed_before(candidate)).limit(1)) is None  # it may have come between our look and the lock


def _claimed_before(candidate: Row[Any]) -> tuple[ColumnElement[bool], ...]:
    return jobs.c.experiment == candidate.experiment, jobs.c.attempt > 0


def _wanted(candidate: Row[Any], offer: Offer) -> float:
    if candidate.gpus is None:
        return 1 if max(offer.within_reach, offer.in_all) else 0
    return counts.amount(candidate.gpus)


class _Hosts:
    """The workers that keep their free slots for jobs that wait for more: one job each, in the order of the queue.

    Every worker comes to the same answer by itself: a job's host is the smallest worker that could run it and keeps nothing for another
    one before it, the first by name among equals. What a worker does not see, jobs larger than itself, takes no host of its size away.
    """

    def __init__(self, tx: Tx) -> None:
        self._tx = tx
        self._free: list[tuple[int, str]] | None = None

    def take(self, gpus: float) -> str | None:
        """The host of the next job, which wants so many; None when there is none left."""
        if self._free is None:
            self._free = fleet.hosts(self._tx)
        host = next((host for host in self._free if host[0] >= gpus), None)
        if host is None:
            return None
        self._free.remove(host)
        return host[1]


def _origin(tx: Tx, candidate: Row[Any], spec: JobSpec) -> Origin | None:
    """What `model.init_from` stands for. Raises JobNotFound, CheckpointNotFound when it is gone, unless the job can go on without it."""
    if spec.model.init_from is None:
        return None
    job_id, _, name = spec.model.init_from.partition("/")
    try:
        found = checkpoint_row(tx, job_id, name or "best", owner=candidate.owner)
    except (JobNotFound, CheckpointNotFound):
        if whole_checkpoints(tx, candidate.id):
            return None  # it has weights of its own by now
        raise
    return Origin(f"{job_dir(job_id)}/{found.path}/model.safetensors", found.sha256)


def _fail_without_origin(tx: Tx, candidate: Row[Any], error: JobError) -> None:
    detail = f"model.init_from={candidate.spec['model']['init_from']}: {error}"
    hint = "The weights it was to start from have been deleted: submit it again with another model.init_from."
    _fail_unclaimed(tx, candidate, Reason(ReasonCode.DATA_MISSING, detail, hint, {}))


def _fail_without_data(tx: Tx, candidate: Row[Any]) -> None:
    data = candidate.spec["data"]
    detail = f"data set {data['dataset']} ({data['version']}) has been deleted"
    hint = "Upload it again: the same files are the same version. Then retry the job."
    _fail_unclaimed(tx, candidate, Reason(ReasonCode.DATA_MISSING, detail, hint, {}))


def _fail_unclaimed(tx: Tx, candidate: Row[Any], reason: Reason) -> None:
    """Fail a queued job that can never start, unless something has changed it since it was read."""
    held = tx.one(for_update(tx, select(jobs).where(jobs.c.id == candidate.id, jobs.c.version == candidate.version)))
    if held is not None:
        move(tx, held, JobState.FAILED, {"reason": reason.as_json(), "finished_at": tx.now_ms})


def _readable_spec(tx: Tx, candidate: Row[Any]) -> JobSpec | None:
    """The stored spec; None when this release cannot read it (another one stored it): then the job fails, and holds up no other."""
    try:
        return JobSpec.model_validate(candidate.spec)
    except ValidationError as error:
        detail = f"this release cannot read the stored spec: {InvalidSpec(violations_of(error, JobSpec))}"
        _fail_unclaimed(tx, candidate, Reason(ReasonCode.INTERNAL, detail, "Submit it again as a new job.", {}))
        return None


def _candidates(tx: Tx, offer: Offer) -> list[Row[Any]]:
    left = quotas.spent(tx)
    owners = [owner for owner in owners_with(tx, IS_QUEUED) if left.get(owner) != 0]
    share = max(4, CLAIM_CANDIDATES // len(owners)) if owners else 0
    best = (
        select(jobs)
        .where(is_runnable(tx, gpus=max(offer.within_reach, offer.in_all)))
        .order_by(jobs.c.priority.desc(), jobs.c.queued_at, jobs.c.id)
        .limit(share)
    )
    rows = [row for owner in owners for row in tx.all(best.where(jobs.c.owner == owner))]
    if len(owners) > 1:
        held = select(jobs.c.owner, func.count().label("n")).where(IS_OWNED).group_by(jobs.c.owner)
        running = {row.owner: row.n for row in tx.all(held)}
        rows.sort(key=lambda row: (-row.priority, running.get(row.owner, 0), row.queued_at, row.id))
    return rows


def _claimed(tx: Tx, candidate: Row[Any], offer: Offer, *, spec: JobSpec, gpus: float, cpu_threads: int) -> Claim:
    run = Run(candidate.id, candidate.attempt + 1, offer.lease_ttl_s)
    tx.run(insert(attempts).values(job_id=run.job_id, number=run.attempt, worker=offer.worker, device=offer.device, started_at=tx.now_ms))
    stored = tx.all(select(checkpoints).where(checkpoints.c.job_id == run.job_id).order_by(checkpoints.c.step.desc()))
    points = [
        protocol.ResumePoint(id=checkpoint_id(row.step), path=row.path, step=row.step, sha256=row.sha256)
        for row in stored
        if not row.broken
    ]
    return Claim(
        run=run,
        spec=spec,
        gpus=gpus,
        cpu_threads=cpu_threads,
        precision=candidate.resolved.get("precision"),
        trained_s=candidate.trained_ms / 1000,
        resume=points,
        hold_epoch=candidate.hold_epoch,
        stored=frozenset(row.path for row in stored),
    )


def has_work(tx: Tx, *, gpus: int) -> bool:
    """Whether a queued job is due that a worker with so many GPUs could run."""
    return tx.one(select(jobs.c.id).where(is_runnable(tx, gpus=gpus)).limit(1)) is not None


def effective_spec(claim: Claim) -> JobSpec:
    """The claim's spec with what the first attempt fixed, so that every attempt computes the same bits."""
    spec = claim.spec
    if spec.precision == "auto" and claim.precision is not None:
        spec = spec.model_copy(update={"precision": claim.precision})
    return spec
