"""Stories drawn at random: whatever users, crashes and lost commits do to an experiment, no run is ever made twice, and it comes to an end."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import event, select
from sqlalchemy.exc import OperationalError

from powergrad.jobs import lifecycle as job_moves
from powergrad.jobs import sweeps, tasks
from powergrad.jobs.artifacts import Artifacts
from powergrad.jobs.claims import Claim
from powergrad.jobs.errors import ExperimentNotFound, Fenced, IllegalMove, JobNotFound, QuotaExceeded
from powergrad.jobs.experiments import lifecycle
from powergrad.jobs.experiments.lifecycle import ENDED, NewExperiment
from powergrad.jobs.states import Outcome
from powergrad.jobs.sweeper import advance_experiments
from powergrad.jobs.tables import experiment_runs, experiments, jobs
from tests.jobs import builders as b
from tests.jobs.experiments import builders as e
from tests.stores import FakeClock, Fault, FlakyStore

QUESTIONS: tuple[dict[str, Any], ...] = (
    {"seeds": 2},
    {"seeds": 2, "tune": {"optimizer.lr": [0.1, 0.2, 0.4]}, "tuning": {"halving": 2}},
    {
        "strategy": "asha",
        "space": {"optimizer.lr": {"values": [0.1, 0.2, 0.4, 0.8]}},
        "search": {"trials": 4, "reduction": 2},
        "spec": {"epochs": 4},
    },
)
REFUSED = (IllegalMove, Fenced, JobNotFound, ExperimentNotFound, QuotaExceeded, OperationalError)


class World:
    """One experiment, a worker that may die, a user who may do anything, and sweepers; every transaction may go wrong."""

    def __init__(self, migrated: Path, which: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="powergrad-exp-"))
        shutil.copy(migrated, self.folder / "jobs.db")
        self.clock = FakeClock()
        self.store = FlakyStore(f"sqlite:///{self.folder}/jobs.db", clock=self.clock, pool_size=1)
        event.listen(self.store.engine, "connect", _careless)
        self.artifacts = Artifacts(str(self.folder / "artifacts"))
        self.new = NewExperiment(e.question(**QUESTIONS[which]), idempotency_key="k", body_sha256="1")
        self.claims: list[Claim] = []
        self.seen: dict[tuple[str, int, int, int], str] = {}

    def close(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    def submit(self, _pick: int) -> None:
        b.do(self.store, lifecycle.submit, self.new)

    def claim(self, _pick: int) -> None:
        claim = b.claim(self.store)
        if claim is not None:
            self.claims.append(claim)

    def train(self, pick: int) -> None:
        if self.claims:
            claim = self.claims.pop(pick % len(self.claims))
            e.train(self.store, claim, lambda *_: None if pick % 5 == 0 else (pick % 7) / 10)

    def stop(self, pick: int) -> None:
        if self.claims:
            b.finish(self.store, self.claims.pop(pick % len(self.claims)).run, Outcome.STOPPED)

    def die(self, _pick: int) -> None:
        self.claims.clear()
        self.clock.advance(31)
        b.do(self.store, sweeps.sweep)

    def advance(self, _pick: int) -> None:
        b.do(self.store, lifecycle.advance)

    def sweep(self, _pick: int) -> None:
        advance_experiments(self.store, self.artifacts, lambda: None)

    def answer(self, pick: int) -> None:
        task = b.do(self.store, tasks.claim, lease_s=60.0)
        if task is not None and pick % 3 == 0:
            b.do(self.store, tasks.fail, task, "crashed", "it did")
        elif task is not None:
            b.do(self.store, tasks.finish, task, e.quick_answer(task))

    def move(self, pick: int) -> None:
        for experiment_id in self.ids():
            b.do(self.store, (lifecycle.pause, lifecycle.resume, lifecycle.resume)[pick % 3], experiment_id)

    def cancel(self, pick: int) -> None:
        for experiment_id in self.ids() if pick % 4 == 0 else ():
            b.do(self.store, lifecycle.cancel, experiment_id)

    def more(self, pick: int) -> None:
        for experiment_id in self.ids() if pick % 3 == 0 else ():
            b.do(self.store, lifecycle.add_seeds, experiment_id, 1)

    def meddle(self, pick: int) -> None:
        moves: tuple[Callable[..., Any], ...] = (job_moves.cancel, job_moves.pause, job_moves.resume, job_moves.retry, job_moves.remove)
        with self.store.read() as tx:
            some = [row.id for row in tx.all(select(jobs.c.id).order_by(jobs.c.id))]
        if some:
            b.do(self.store, moves[pick % len(moves)], some[pick // len(moves) % len(some)])

    def wait(self, pick: int) -> None:
        self.clock.advance((0.1, 6, 12, 70)[pick % 4])

    def ids(self) -> list[str]:
        with self.store.read() as tx:
            return [row.id for row in tx.all(select(experiments.c.id))]

    def holds(self) -> None:
        """One experiment at most; a run is one job for ever, and every job of the experiment is a run."""
        with self.store.read() as tx:
            assert len(tx.all(select(experiments.c.id))) <= 1
            made = tx.all(select(experiment_runs))
            of_experiment = {row.id for row in tx.all(select(jobs.c.id).where(jobs.c.experiment.is_not(None)))}
        now = {(run.stage, run.arm, run.candidate, run.seed): run.job_id for run in made}
        assert self.seen.items() <= now.items()
        assert of_experiment <= set(now.values())
        assert Counter(now.values()).total() == len(set(now.values()))
        self.seen = now

    def calm_down(self) -> None:
        """Nobody meddles any more: it ends, and an end is an end."""
        self.store.fault = None
        self.submit(0)
        self.claims.clear()
        (experiment_id,) = self.ids()
        self.clock.advance(31)
        b.do(self.store, sweeps.sweep)
        self.clock.advance(400)  # back-offs
        with suppress(IllegalMove):
            b.do(self.store, lifecycle.resume, experiment_id)
        for run in e.runs(self.store, experiment_id):
            with suppress(IllegalMove, JobNotFound):
                b.do(self.store, job_moves.resume, run.job_id)
        for _ in range(30):
            e.settle(self.store)
            self.sweep(0)
            e.do_tasks_quickly(self.store)
            self.clock.advance(100)
        self.holds()
        shown = e.get(self.store, experiment_id)
        assert shown["state"] in ENDED
        rests = {"paused"} if shown["stage"] == "search" else set()
        assert set(shown["counts"]) <= {"succeeded", "failed", "cancelled", "deleted"} | rests
        with self.store.read() as tx:
            assert not lifecycle.needs_advance(tx)
            assert not tasks.has_work(tx)


ACTIONS = (
    "submit",
    "claim",
    "claim",
    "train",
    "train",
    "stop",
    "die",
    "advance",
    "sweep",
    "answer",
    "move",
    "cancel",
    "more",
    "meddle",
    "wait",
)
STORIES = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 1000), st.sampled_from([None, None, None, *Fault])), max_size=60)


@given(which=st.integers(0, len(QUESTIONS) - 1), story=STORIES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_no_run_is_made_twice_and_every_experiment_ends(sqlite_file: Path, which: int, story: list[tuple[str, int, Fault | None]]) -> None:
    world = World(sqlite_file, which)
    try:
        for action, pick, fault in story:
            world.store.fault = fault
            with suppress(*REFUSED):
                getattr(world, action)(pick)
            world.store.fault = None
            world.holds()
        world.calm_down()
    finally:
        world.close()


def _careless(connection: Any, _record: Any) -> None:
    connection.execute("PRAGMA synchronous=OFF")
