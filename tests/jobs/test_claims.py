"""Jobs on several GPUs: as many slots of one worker at once, a turn that is kept, nobody starved and nobody stuck."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from powergrad.jobs import fleet, queries, sweeps
from powergrad.jobs.claims import Claim, Offer, SlotsWanted
from powergrad.jobs.states import JobState
from powergrad.jobs.store import Store
from tests.jobs import builders as b
from tests.stores import FakeClock


def register(store: Store, name: str, gpus: int, state: fleet.WorkerState = "ready") -> None:
    info = fleet.WorkerInfo(id=name, host="h", pid=1, version="0", slots=[], devices=[], gpus=gpus)
    b.do(store, fleet.register, info, state=state)


def offer(worker: str = "w", *, held: int = 1, free: int = 4, in_all: int = 4) -> Offer:
    """What a worker of four GPUs offers that holds one and could have the rest."""
    return Offer(worker=worker, device="GPUs", gpus=held, cpu_threads=3, could_hold=free, in_all=in_all)


def wanting(store: Store, gpus: int | None, **overrides: Any) -> str:
    return b.submit(store, resources={"gpus": gpus}, **overrides)


def waiting_for(store: Store, job_id: str) -> str | None:
    with store.read() as tx:
        found: str | None = queries.get(tx, job_id)["queue"]["waiting_for"]
    return found


def test_a_wide_job_asks_for_its_slots_and_is_claimed_with_them(store: Store) -> None:
    job_id = wanting(store, 3)
    with pytest.raises(SlotsWanted) as wanted:
        b.claim(store, offer())
    assert wanted.value.count == 3
    assert b.state(store, job_id) is JobState.QUEUED
    claim = b.claimed(store, offer(held=3))
    assert (claim.run.job_id, claim.gpus, claim.cpu_threads) == (job_id, 3, 9)
    assert b.row(store, job_id).resolved["gpus"] == 3


def test_slots_that_the_next_job_does_not_want_are_asked_back(store: Store) -> None:
    job_id = wanting(store, None)
    with pytest.raises(SlotsWanted) as wanted:
        b.claim(store, offer(held=3))
    assert wanted.value.count == 1
    assert b.claimed(store, offer()).gpus == 1
    assert b.row(store, job_id).resolved["gpus"] == 1


def test_a_job_wider_than_the_worker_is_passed_over(store: Store) -> None:
    register(store, "w", 4)
    wide, small = wanting(store, 8), wanting(store, 1)
    assert b.claimed(store, offer()).run.job_id == small
    assert waiting_for(store, wide) == "needs 8 GPUs; the largest worker has 4"


def test_a_wide_job_keeps_its_turn_on_its_host_alone(store: Store) -> None:
    register(store, "host", 4)
    register(store, "other", 4)
    register(store, "small", 2)
    wide, small = wanting(store, 4), wanting(store, 1)
    assert b.claim(store, offer("host", free=3)) is None
    assert waiting_for(store, wide) == "4 GPUs of one worker, free at the same time"
    assert b.claimed(store, offer("other", free=3)).run.job_id == small
    assert b.claimed(store, offer("host", held=4)).run.job_id == wide


def test_any_worker_that_has_the_slots_may_take_it(store: Store) -> None:
    register(store, "host", 4)
    register(store, "other", 4)
    wide = wanting(store, 4)
    assert b.claimed(store, offer("other", held=4)).run.job_id == wide


def test_the_host_is_the_smallest_worker_that_could_run_it(store: Store) -> None:
    register(store, "a", 8)
    register(store, "b", 4)
    register(store, "c", 2)
    wanting(store, 3)
    small = wanting(store, 1)
    assert b.claim(store, offer("b", free=2)) is None
    assert b.claimed(store, offer("a", free=2, in_all=8)).run.job_id == small


@pytest.mark.parametrize("gone", ["silent", "draining"])
def test_another_worker_becomes_host_when_the_first_is_gone(store: Store, clock: FakeClock, gone: str) -> None:
    register(store, "a", 4)
    register(store, "b", 4)
    wanting(store, 4)
    wanting(store, 1)
    assert b.claim(store, offer("a", free=3)) is None
    if gone == "draining":
        register(store, "a", 4, state="draining")
    else:
        clock.advance(fleet.ALIVE_S + 1)
        register(store, "b", 4)
    assert b.claim(store, offer("b", free=3)) is None


def test_each_waiting_wide_job_has_a_host_of_its_own(store: Store) -> None:
    for name in "abc":
        register(store, name, 4)
    wanting(store, 4)
    wanting(store, 4)
    small = wanting(store, 1)
    assert b.claim(store, offer("a", free=3)) is None
    assert b.claim(store, offer("b", free=3)) is None
    assert b.claimed(store, offer("c", free=3)).run.job_id == small


def test_what_comes_before_a_wide_job_still_goes_before_it(store: Store) -> None:
    register(store, "w", 4)
    wanting(store, 4)
    urgent = wanting(store, 1, priority=9)
    assert b.claimed(store, offer(free=2)).run.job_id == urgent


def test_a_cpu_worker_does_not_care_for_wide_jobs(store: Store) -> None:
    register(store, "w", 4)
    wanting(store, 2)
    cpu = wanting(store, 0)
    assert b.claimed(store).run.job_id == cpu


def test_one_gpu_is_one_gpu(store: Store) -> None:
    register(store, "w", 4)
    assert waiting_for(store, wanting(store, 1)) == "a free slot"
    assert waiting_for(store, wanting(store, 5)) == "needs 5 GPUs; the largest worker has 4"


@dataclass
class Worker:
    """A worker as its service acts: one slot first, more when the next job wants them."""

    store: Store
    name: str
    in_all: int
    running: list[Claim] = field(default_factory=list)

    @property
    def free(self) -> int:
        return self.in_all - sum(max(1, claim.gpus) for claim in self.running)

    def claim(self) -> Claim | None:
        if self.free == 0:
            return None
        held, could_hold = 1, self.in_all
        while True:
            try:
                found = b.claim(self.store, offer(self.name, held=held, free=could_hold, in_all=self.in_all))
                break
            except SlotsWanted as wanted:
                if wanted.count <= self.free:
                    held = wanted.count
                else:
                    could_hold = self.free
        if found is not None:
            self.running.append(found)
            assert self.free >= 0
        return found

    def finish(self, claim: Claim) -> None:
        self.running.remove(claim)
        b.finish(self.store, claim.run)


def test_a_wide_job_is_not_starved_by_small_ones_that_keep_coming(store: Store) -> None:
    register(store, "w", 4)
    worker = Worker(store, "w", 4)
    for _ in range(4):
        wanting(store, 1)
    while worker.claim():
        pass
    wide = wanting(store, 4)
    for _ in range(4):  # one ends, another comes
        wanting(store, 1)
        worker.finish(worker.running[0])
        started = worker.claim()
    assert started is not None
    assert started.run.job_id == wide
    assert worker.claim() is None
    worker.finish(started)
    assert all(worker.claim() for _ in range(4)), "those that had to wait"


def test_two_wide_jobs_of_one_worker_run_one_after_the_other(store: Store) -> None:
    register(store, "w", 4)
    worker = Worker(store, "w", 4)
    first, second = wanting(store, 3), wanting(store, 3)
    one = worker.claim()
    assert one is not None
    assert worker.claim() is None
    worker.finish(one)
    other = worker.claim()
    assert other is not None
    assert [one.run.job_id, other.run.job_id] == [first, second]


@pytest.mark.parametrize("seed", range(4))
def test_whatever_comes_everything_that_fits_is_run(sqlite_store: Store, clock: FakeClock, seed: int) -> None:
    """Workers of all sizes, jobs of all widths, small ones coming as long as a wide one waits: none is left over, no GPU is used twice."""
    store, dice = sqlite_store, random.Random(seed)
    sizes = [dice.choice([1, 2, 4, 8]) for _ in range(3)]
    workers = [Worker(store, f"w{number}", size) for number, size in enumerate(sizes)]
    widths = [None, *(width for width in (0, 1, 1, 2, 3, 8) if width <= max(sizes))]
    for worker in workers:
        register(store, worker.name, worker.in_all)
    left = {wanting(store, dice.choice(widths), owner=dice.choice(["ada", "bob"])) for _ in range(12)}
    for _ in range(150):
        dice.choice(workers).claim()
        busy = [worker for worker in workers if worker.running]
        if busy and dice.random() < 0.6:
            wanting(store, 1, owner=dice.choice(["ada", "bob"]))
            worker = dice.choice(busy)
            claim = dice.choice(worker.running)
            worker.finish(claim)
            left.discard(claim.run.job_id)
        clock.advance(0.1)
    assert left == set()


def test_a_resumed_wide_job_has_the_threads_it_began_with(store: Store) -> None:
    register(store, "w", 4)
    wanting(store, 2)
    run = b.claimed(store, offer(held=2)).run
    b.do(store, sweeps.expire_worker, "w")
    b.do(store, sweeps.sweep)
    assert b.row(store, run.job_id).state == JobState.QUEUED
    again = b.claimed(store, replace(offer(held=2), cpu_threads=16))
    assert (again.cpu_threads, again.gpus) == (6, 2)
