"""A small world around a job store: workers that may be wrong about what they own, users, sweepers, a clock that only a test turns.

Two tests play in it: one draws long stories at random, one goes through every short one.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sqlalchemy import event, select
from sqlalchemy.exc import OperationalError

from powergrad import protocol
from powergrad.jobs import debts, lifecycle, metrics, queries, recording, rows, sweeps
from powergrad.jobs.claims import Claim
from powergrad.jobs.errors import Fenced, IllegalMove
from powergrad.jobs.rows import Run
from powergrad.jobs.states import MOVES, OWNED, TERMINAL, JobState, Outcome, ReasonCode
from powergrad.jobs.store import Tx
from powergrad.jobs.tables import attempts, events, jobs
from tests.jobs import builders as b
from tests.stores import FakeClock, FlakyStore

WORKERS = 4
EPOCHS = 3
STEPS = EPOCHS * b.STEPS_PER_EPOCH
MAX_ATTEMPTS = 3
HOLDS = (None, 1, 2)
ACTIONS = ("cancel", "pause", "resume", "resume", "retry", "retry", "go_on", "go_on")


@dataclass
class Worker:
    """What a supervisor and its trainer believe. It may be wrong: that is what fences are for."""

    name: str
    claim: Claim | None = None
    step: int = 0
    planned: bool = False
    unsaid: list[protocol.Message] = field(default_factory=list)
    """Heard from its trainer, and not known to be stored."""
    said_before: int = 0

    @property
    def goal(self) -> int:
        """Steps after which its trainer ends of itself: the last one, or where it is to hold."""
        hold = None if self.claim is None else self.claim.hold_epoch
        return STEPS if hold is None else min(STEPS, hold * b.STEPS_PER_EPOCH)

    def forget(self) -> None:
        self.claim, self.planned, self.unsaid, self.said_before = None, False, [], 0


class World:
    """migrated: an empty job database (SQLite), to be copied. hold_epoch: of the first job."""

    def __init__(self, migrated: Path, *, workers: int = WORKERS, hold_epoch: int | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="powergrad-sim-"))
        shutil.copy(migrated, self.folder / "jobs.db")
        self.clock = FakeClock()
        self.store = FlakyStore(f"sqlite:///{self.folder}/jobs.db", clock=self.clock, pool_size=1)
        event.listen(self.store.engine, "connect", _careless)
        self.workers = [Worker(f"w{n}") for n in range(workers)]
        self.accepted: list[str] = []
        self.checked: dict[str, int] = {}
        self.submit(0, 5, hold_epoch=hold_epoch)

    def close(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    # --- users

    def submit(self, pick: int, amount: int, *, hold_epoch: int | None = None) -> None:
        if len(self.accepted) < 4:
            key, owner, limits = f"key-{len(self.accepted)}", ("local", "ada")[pick % 2], {"max_attempts": MAX_ATTEMPTS}
            hold_epoch = hold_epoch or HOLDS[pick % len(HOLDS)]

            def post() -> str:
                made: dict[str, Any] = {"priority": amount % 10, "epochs": EPOCHS, "limits": limits}
                return b.submit(self.store, key=key, owner=owner, hold_epoch=hold_epoch, **made)

            try:
                self.accepted.append(post())
            except OperationalError:
                self.accepted.append(post())  # the caller heard nothing and asks again: the same key is the same job
            self.clock.advance(0.001)

    def act(self, pick: int, amount: int) -> None:
        job_id = self.accepted[pick % len(self.accepted)]
        row = b.row(self.store, job_id)
        action = ACTIONS[amount % len(ACTIONS)]
        try:
            if action == "go_on":
                b.do(self.store, sent_on, job_id, row.owner, HOLDS[pick % len(HOLDS)])
            else:
                b.do(self.store, getattr(lifecycle, action), job_id, owner=row.owner)
        except IllegalMove:
            assert b.row(self.store, job_id) == row

    # --- workers

    def claim(self, pick: int, _amount: int) -> None:
        idle = [worker for worker in self.workers if worker.claim is None]
        if idle:
            worker = idle[pick % len(idle)]
            worker.forget()
            worker.claim = b.claim(self.store, replace(b.OFFER, worker=worker.name))

    def train(self, pick: int, amount: int) -> None:
        """The trainer says something: its plan first, then steps, with an evaluation and a checkpoint after every epoch."""
        worker = self.busy(pick)
        if worker is None or worker.claim is None:
            return
        run, resume = worker.claim.run, worker.claim.resume
        if not worker.planned:
            worker.step = resume[0].step if resume else 0
            worker.unsaid.append(b.plan(resumed_step=worker.step, epochs=EPOCHS))
        goal = max(worker.step, min(worker.step + 1 + amount % 15, worker.goal))
        for number in range(worker.step + 1, goal + 1):
            worker.unsaid.append(b.step(number))
            if number % b.STEPS_PER_EPOCH == 0:
                worker.unsaid += [b.evaluation(number, (number * 37 % 100) / 100), b.checkpoint(number, attempt=run.attempt)]
        worker.planned, worker.step = True, goal
        self.tell(worker, run)
        with self.fenced_off(worker, run):
            b.do(self.store, recording.prune, run)

    def tell(self, worker: Worker, run: Run) -> None:
        """Store what was heard; what is not known to be stored is told again with the next."""
        with self.fenced_off(worker, run):
            assert b.do(self.store, recording.record, run, worker.unsaid, said_before=worker.said_before) in OWNED
            worker.said_before, worker.unsaid = worker.said_before + len(worker.unsaid), []

    def renew(self, pick: int, _amount: int) -> None:
        worker = self.busy(pick)
        if worker is not None and worker.claim is not None:
            with self.fenced_off(worker, worker.claim.run):
                b.do(self.store, recording.renew, worker.claim.run, trained_ms=10)

    def finish(self, pick: int, amount: int) -> None:
        worker = self.busy(pick)
        if worker is None or worker.claim is None:
            return
        code = list(ReasonCode)[amount % len(ReasonCode)] if amount % 3 == 0 else None
        outcome = Outcome.FAILED if code is not None else _own_end(worker)
        run = worker.claim.run
        if worker.unsaid:
            self.tell(worker, run)
        if worker.claim is None:
            return
        owned = self.owns(run)
        with self.fenced_off(worker, run):
            try:
                b.finish(self.store, run, outcome, code)
            except OperationalError:  # as the supervisor does: until it is stored, or somebody else has the job
                with suppress(Fenced) if owned else nullcontext():  # it may have been stored by the try that was never confirmed
                    b.finish(self.store, run, outcome, code)
        worker.forget()

    def die(self, pick: int, _amount: int) -> None:
        self.workers[pick % len(self.workers)].forget()

    # --- anybody

    def wait(self, _pick: int, amount: int) -> None:
        self.clock.advance((0.1, 3.0, 8.0, 31.0, 31.0, 300.0)[amount % 6])

    def overtake(self, pick: int, amount: int) -> None:
        """A worker freezes past its lease: its job is swept up and, if it can go on, taken by another. It will not know when it thaws."""
        self.clock.advance(31.0)
        self.sweep()
        self.claim(pick, amount)

    def sweep(self, _pick: int = 0, _amount: int = 0) -> None:
        for path in b.do(self.store, sweeps.sweep).debts:
            b.do(self.store, debts.freed, path)
        with self.store.read() as tx:
            assert not sweeps.needs_sweep(tx)

    def busy(self, pick: int) -> Worker | None:
        found = [worker for worker in self.workers if worker.claim is not None]
        return found[pick % len(found)] if found else None

    def owns(self, run: Run) -> bool:
        row = b.row(self.store, run.job_id)
        return row.attempt == run.attempt and row.state in OWNED

    @contextmanager
    def fenced_off(self, worker: Worker, run: Run) -> Iterator[None]:
        """A write of a run: it goes through exactly when the job is still that attempt's, and then the worker goes on."""
        row, owned = b.row(self.store, run.job_id), self.owns(run)
        try:
            yield
        except Fenced:
            assert not owned
            assert b.row(self.store, run.job_id) == row
            worker.forget()
        else:
            assert owned

    # --- what must hold

    def everything_holds(self) -> None:
        with self.store.read() as tx:
            stored = tx.all(select(jobs))
            assert sorted(row.id for row in stored) == sorted(self.accepted)
            for row in stored:
                if self.checked.get(row.id) == row.revision:
                    continue  # nothing of it has changed since the last look
                self.checked[row.id] = row.revision
                made = tx.all(select(attempts).where(attempts.c.job_id == row.id).order_by(attempts.c.number))
                happened = tx.all(select(events).where(events.c.job_id == row.id).order_by(events.c.seq))
                check_row(row)
                check_attempts(row, made)
                check_events(row, happened)
                for name in metrics.names(tx, row.id):
                    check_steps(name, metrics.read(tx, row.id, name).steps, reached=row.progress["step"])
                for found in queries.list_checkpoints(tx, row.id, owner=row.owner):
                    assert found["step"] <= row.progress["step"] or row.state not in OWNED

    def calm_down(self) -> None:
        """When nobody interferes any more, every accepted job ends or waits for its user."""
        for worker in self.workers:
            worker.forget()
        self.clock.advance(400)  # every lease has lapsed, every back-off is over
        self.sweep()
        while (found := b.claim(self.store)) is not None:
            resumed = found.resume[0].step if found.resume else 0
            last = max(resumed, Worker("", found).goal)
            rest: list[protocol.Message] = [b.step(number) for number in range(resumed + 1, last + 1)]
            if rest:
                rest.append(b.checkpoint(last, attempt=found.run.attempt))
            b.record(self.store, found.run, b.plan(resumed_step=resumed, epochs=EPOCHS), *rest)
            b.finish(self.store, found.run, Outcome.SUCCEEDED if last == STEPS else Outcome.HELD)
            self.everything_holds()
            with self.store.read() as tx:
                assert metrics.read(tx, found.run.job_id, "train_loss").steps == list(range(1, last + 1))
        with self.store.read() as tx:
            assert all(JobState(row.state) in TERMINAL | {JobState.PAUSED} for row in tx.all(select(jobs)))


def sent_on(tx: Tx, job_id: str, owner: str, hold_epoch: int | None) -> None:
    rows.go_on(tx, rows.locked(tx, job_id, owner=owner), hold_epoch)


def _own_end(worker: Worker) -> Outcome:
    """How a trainer ends that nothing has gone wrong with, now."""
    if not worker.planned or worker.step < worker.goal:
        return Outcome.STOPPED
    return Outcome.SUCCEEDED if worker.step == STEPS else Outcome.HELD


def check_row(row: Any) -> None:
    state = JobState(row.state)
    assert (row.lease_until is not None) == (row.worker is not None) == (state in OWNED)
    assert (row.finished_at is not None) == (state in TERMINAL)
    assert (row.reason is not None) == (state is JobState.FAILED)
    assert row.failures <= row.attempt
    assert 0.0 <= row.progress["fraction"] <= 1.0
    if state is JobState.SUCCEEDED:
        assert row.progress["step"] == STEPS


def check_attempts(row: Any, made: Any) -> None:
    assert [attempt.number for attempt in made] == list(range(1, row.attempt + 1))
    open_ones = [attempt for attempt in made if attempt.ended_at is None]
    assert [attempt.number for attempt in open_ones] == ([row.attempt] if row.state in OWNED else [])
    assert all((attempt.outcome is None) == (attempt.ended_at is None) for attempt in made)
    assert all(attempt.worker == row.worker for attempt in open_ones)


def check_events(row: Any, happened: Any) -> None:
    assert [found.seq for found in happened] == list(range(1, row.seq + 1))
    state = JobState.QUEUED
    attempt = 0
    for found in happened:
        if found.type == "claimed":
            attempt += 1
        if found.type == "state":
            assert JobState(found.data["from"]) is state
            assert JobState(found.data["to"]) in MOVES[state]
            state = JobState(found.data["to"])
        if "attempt" in found.data:
            assert found.data["attempt"] == attempt  # nothing is ever told by an attempt that is over
    assert state == row.state
    check_told_once(happened)
    check_holds(happened)


def check_holds(happened: Any) -> None:
    """A job that is held says at which epoch, and the checkpoint of that epoch was told before."""
    written: set[int] = set()
    for end, moved in itertools.pairwise(happened):
        if end.type == "checkpoint":
            written.add(end.data["step"])
        if end.type == "attempt_ended" and end.data["outcome"] == Outcome.HELD and moved.data["to"] == JobState.PAUSED:
            epoch = int(moved.data["reason"].removeprefix("held at epoch "))
            assert epoch * b.STEPS_PER_EPOCH in written


def check_told_once(happened: Any) -> None:
    """Each attempt says its plan once, and of every step what it has to say once."""
    for kind, place in (("plan", "resumed_step"), ("metrics", "to_step"), ("evaluation", "step"), ("checkpoint", "step")):
        said = [(found.data["attempt"], found.data[place]) for found in happened if found.type == kind]
        assert said == sorted(set(said)), f"{kind}: told twice, or out of order"
        if kind == "plan":
            assert len({attempt for attempt, _ in said}) == len(said)


def check_steps(name: str, steps: list[int], *, reached: int) -> None:
    first = steps[0] if steps else 0
    apart = b.STEPS_PER_EPOCH if name.startswith("val_") else 1
    assert steps == list(range(first, first + len(steps) * apart, apart))
    assert first in (0, apart)
    assert not steps or steps[-1] <= reached  # nothing is left of a past that did not last


def _careless(connection: Any, _record: Any) -> None:
    connection.execute("PRAGMA synchronous=OFF")
