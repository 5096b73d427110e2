"""Every short story of one job, two workers and a store that fails: what `test_simulation` draws at random is gone through here without gaps.

A state that was met before (but for its past) is not gone into again: its futures are the same. So a few thousand transactions stand for
tens of thousands of schedules, and each of them is checked after every step.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from powergrad.jobs import metrics
from powergrad.jobs.tables import attempts, checkpoints, jobs
from tests.jobs.world import Worker, World
from tests.stores import Fault

FAULTS = (None, Fault.BROKEN, Fault.UNCONFIRMED)  # one that never begins leaves what a broken one leaves

# name, pick, amount: `World.act` takes the amount for the action, `World.train` trains 1 + amount % 15 steps
CANCEL, PAUSE, RESUME, SENT_ON = 0, 1, 2, 6
TRAIN = 9  # to the end of an epoch
CRASH = 9  # `World.finish` with an amount that 3 divides fails, with the reason of that number: crashed
STOP = 1


@dataclass(frozen=True)
class Move:
    name: str
    pick: int = 0
    amount: int = 0
    faults: tuple[Fault | None, ...] = (None,)


MOVES = (
    *(Move("claim", worker, faults=FAULTS) for worker in range(2)),
    *(Move("train", worker, TRAIN, FAULTS) for worker in range(2)),
    *(Move("finish", worker, amount, FAULTS) for worker in range(2) for amount in (CRASH, STOP)),
    *(Move("renew", worker) for worker in range(2)),
    Move("act", amount=CANCEL, faults=(None, Fault.UNCONFIRMED)),
    Move("act", amount=PAUSE),
    Move("act", amount=RESUME),
    Move("act", pick=2, amount=SENT_ON),  # to its second epoch: there is but one job, and the pick chooses the hold
    Move("lapse"),
    Move("sweep"),
)


@dataclass(frozen=True)
class Beginning:
    """least: schedules of `depth` steps that there must be from here on, so that none of the moves goes missing. hold_epoch: of the job."""

    moves: tuple[Move, ...]
    depth: int
    least: int
    hold_epoch: int | None = None


TRAINED = (Move("claim"), Move("train", amount=TRAIN))
BEGINNINGS = {
    "queued": Beginning((), 4, 25_000),
    "trained for an epoch": Beginning(TRAINED, 4, 50_000),
    "taken over": Beginning((*TRAINED, Move("lapse"), Move("sweep"), Move("claim")), 3, 3_000),
    "at its hold": Beginning(TRAINED, 4, 50_000, hold_epoch=1),
    "held": Beginning((*TRAINED, Move("finish", amount=STOP)), 4, 15_000, hold_epoch=1),
}


@dataclass(frozen=True)
class Moment:
    """All that a world is made of, to go back to."""

    database: bytes
    now_ms: int
    workers: list[Worker]


@dataclass
class Explorer:
    world: World
    raw: sqlite3.Connection
    seen: dict[Any, int] = field(default_factory=dict)
    """Schedules that begin in a state, by the state and the steps left."""
    steps: int = 0

    def schedules(self, depth: int) -> int:
        """How many schedules of so many steps begin here; each of their steps has been checked."""
        if depth == 0:
            return 1
        known = (self.state(), depth)
        if known not in self.seen:
            here, found = self.moment(), 0
            for move, fault in self.possible():
                self.make(move, fault)
                found += self.schedules(depth - 1)
                self.back_to(here)
            self.seen[known] = found
        return self.seen[known]

    def possible(self) -> Iterator[tuple[Move, Fault | None]]:
        busy = [worker for worker in self.world.workers if worker.claim is not None]
        for move in MOVES:
            there = len(busy) if move.name in {"train", "finish", "renew"} else 2 - len(busy) if move.name == "claim" else 1
            if move.pick < there:
                yield from ((move, fault) for fault in move.faults)

    def make(self, move: Move, fault: Fault | None) -> None:
        self.steps += 1
        self.world.store.fault = fault
        if move.name == "lapse":
            self.world.clock.advance(31.0)
        else:
            with suppress(OperationalError):
                getattr(self.world, move.name)(move.pick, move.amount)
        self.world.store.fault = None
        self.world.checked.clear()
        self.world.everything_holds()

    def moment(self) -> Moment:
        whole = self.raw.serialize()
        # bytes 18 and 19 say that there is a write-ahead log, which a database in memory cannot have
        return Moment(whole[:18] + b"\x01\x01" + whole[20:], self.world.clock.now_ms, deepcopy(self.world.workers))

    def back_to(self, moment: Moment) -> None:
        with closing(sqlite3.connect(":memory:")) as stored:
            stored.deserialize(moment.database)
            stored.backup(self.raw)
        self.world.clock.now_ms = moment.now_ms
        self.world.workers = deepcopy(moment.workers)

    def state(self) -> Any:
        """What the future hangs on: rows less their names and numbers of changes, times as seen from now, what the workers believe."""
        with self.world.store.read() as tx:
            (row,) = tx.all(select(jobs))
            made = tx.all(select(attempts.c.number, attempts.c.outcome, attempts.c.worker).order_by(attempts.c.number))
            kept = tx.all(select(checkpoints.c.step, checkpoints.c.attempt, checkpoints.c.broken).order_by(checkpoints.c.step))
            points = tuple((name, tuple(metrics.read(tx, row.id, name).steps)) for name in metrics.names(tx, row.id))
        now = self.world.clock.now_ms
        lease = None if row.lease_until is None else row.lease_until - now
        due = None if row.not_before is None else max(0, row.not_before - now)
        unheard = None if row.cancel_requested_at is None else now - row.cancel_requested_at > 7000
        counts = (row.state, row.attempt, row.failures, row.worker, row.heard, row.progress["step"], row.best_step, row.hold_epoch)
        job = (*counts, lease, due, unheard)
        return job, tuple(map(tuple, made)), tuple(map(tuple, kept)), points, tuple(_belief(worker) for worker in self.world.workers)


def _belief(worker: Worker) -> Any:
    if worker.claim is None:
        return None
    resumes = tuple((point.step, point.path) for point in worker.claim.resume)
    return worker.claim.run.attempt, worker.claim.hold_epoch, resumes, worker.step, worker.planned, len(worker.unsaid), worker.said_before


@pytest.mark.timeout(600)
@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_whatever_happens_in_a_few_steps_the_history_holds(sqlite_file: Path, beginning: str) -> None:
    here = BEGINNINGS[beginning]
    world = World(sqlite_file, workers=2, hold_epoch=here.hold_epoch)
    raw = sqlite3.connect(world.folder / "jobs.db", isolation_level=None)
    try:
        explorer = Explorer(world, raw)
        for move in here.moves:
            explorer.make(move, None)
        found = explorer.schedules(here.depth)
        print(f"{found:,} schedules of {here.depth} steps by {explorer.steps:,} steps")
        assert found >= here.least
    finally:
        raw.close()
        world.close()
