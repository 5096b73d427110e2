"""Jobs on several GPUs or on a part of one: slots of one worker at once, a turn that is kept, nobody starved and nobody stuck."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from sqlalchemy import update

from powergrad.jobs import fleet, queries, sweeps
from powergrad.jobs.claims import Claim, Offer, SlotsWanted
from powergrad.jobs.gpus import QUARTERS
from powergrad.jobs.states import JobState
from powergrad.jobs.store import Store
from powergrad.jobs.tables import jobs
from tests.jobs import builders as b
from tests.stores import FakeClock
from worker.slots import Reach, Token, choose, reach


def register(store: Store, name: str, gpus: int, state: fleet.WorkerState = "ready") -> None:
    info = fleet.WorkerInfo(id=name, host="h", pid=1, version="0", slots=[], devices=[], gpus=gpus)
    b.do(store, fleet.register, info, state=state)


def offer(worker: str = "w", *, held: float = 1, free: float = 4, in_all: int = 4, part_with_memory: float = 1.0) -> Offer:
    """What a worker of four GPUs offers that holds one and could have the rest."""
    found = Offer(worker=worker, device="GPUs", gpus=held, cpu_threads=3, could_hold=free, in_all=in_all)
    return replace(found, part_with_memory=part_with_memory)


def wanting(store: Store, gpus: float | None, **overrides: Any) -> str:
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


# --- parts of a GPU


def test_a_part_is_asked_for_and_claimed_with_its_share_of_the_threads(store: Store) -> None:
    job_id = wanting(store, 0.75)
    with pytest.raises(SlotsWanted) as wanted:
        b.claim(store, offer())
    assert wanted.value.count == 0.75
    claim = b.claimed(store, offer(held=0.75))
    assert (claim.run.job_id, claim.gpus, claim.cpu_threads) == (job_id, 0.75, 2)
    assert (b.row(store, job_id).gpus, b.row(store, job_id).resolved["gpus"]) == (0.75, 0.75)


def test_a_quarter_has_a_thread_however_few_cores_there_are(store: Store) -> None:
    wanting(store, 0.25)
    assert b.claimed(store, offer(held=0.25)).cpu_threads == 1


def test_whole_numbers_stay_whole_in_what_is_shown(store: Store) -> None:
    job_id = wanting(store, 2)
    assert repr(b.claimed(store, offer(held=2.0)).gpus) == "2"
    assert repr(b.row(store, job_id).resolved["gpus"]) == "2"


def test_who_leaves_it_to_the_worker_gets_no_mere_part(store: Store) -> None:
    register(store, "w", 1)
    wanting(store, None)
    assert b.claim(store, offer(held=0.25, free=0.5, in_all=1)) is None
    assert b.claimed(store, offer(held=1, free=1, in_all=1)).gpus == 1


def test_a_job_on_the_cpu_takes_a_whole_slot_of_a_worker_with_gpus(store: Store) -> None:
    register(store, "w", 1)
    job_id = wanting(store, 0)
    with pytest.raises(SlotsWanted) as wanted:
        b.claim(store, offer(held=0.25, free=1, in_all=1))
    assert wanted.value.count == 1
    assert b.claim(store, offer(held=0.25, free=0.5, in_all=1)) is None, "its turn is kept"
    assert b.claimed(store).run.job_id == job_id


def test_a_whole_gpu_that_is_waited_for_is_not_refilled_with_parts(store: Store) -> None:
    register(store, "w", 1)
    whole = wanting(store, 1)
    wanting(store, 0.25)
    assert b.claim(store, offer(held=0.25, free=0.75, in_all=1)) is None
    assert b.claimed(store, offer(held=1, free=1, in_all=1)).run.job_id == whole


def test_half_a_gpu_that_is_waited_for_is_not_refilled_with_quarters(store: Store) -> None:
    register(store, "w", 1)
    register(store, "x", 1)
    half, quarter = wanting(store, 0.5), wanting(store, 0.25)
    assert b.claim(store, offer("w", held=0.25, free=0.25, in_all=1)) is None
    assert b.claimed(store, offer("x", held=0.25, free=0.25, in_all=1)).run.job_id == quarter
    assert b.claimed(store, offer("w", held=0.5, free=0.5, in_all=1)).run.job_id == half


def test_a_part_whose_memory_another_program_has_is_passed_over(store: Store) -> None:
    register(store, "w", 4)
    half, quarter = wanting(store, 0.5), wanting(store, 0.25)
    with pytest.raises(SlotsWanted) as wanted:
        b.claim(store, offer(part_with_memory=0.25))
    assert wanted.value.count == 0.25
    assert b.claimed(store, offer(held=0.25, part_with_memory=0.25)).run.job_id == quarter
    assert b.claim(store, offer(part_with_memory=0.25)) is None
    assert b.state(store, half) is JobState.QUEUED


def test_a_job_whose_siblings_are_on_gpus_is_none_for_a_worker_without(store: Store) -> None:
    register(store, "w", 4)
    first, second = wanting(store, None), wanting(store, None)
    with store.write() as tx:
        tx.run(update(jobs).values(experiment="exp_1"))
    assert b.claimed(store, offer()).run.job_id == first
    assert b.claim(store) is None
    again = b.claimed(store, offer())
    assert (again.run.job_id, again.gpus) == (second, 1)


@pytest.mark.parametrize(("gpus", "words"), [(0.25, "a quarter of a GPU"), (0.5, "half a GPU"), (0.75, "three quarters of a GPU")])
def test_a_part_says_what_it_waits_for(store: Store, gpus: float, words: str) -> None:
    job_id = wanting(store, gpus)
    register(store, "w", 0)
    assert waiting_for(store, job_id) == f"needs {words}; the largest worker has none"
    register(store, "v", 1)
    assert waiting_for(store, job_id) == f"{words} that is free"


@dataclass
class Worker:
    """A worker as its service acts: one slot first, more or less when the next job wants that."""

    store: Store
    name: str
    in_all: int
    running: list[Claim] = field(default_factory=list)
    held: dict[str, set[Token]] = field(default_factory=dict)

    @property
    def free(self) -> dict[int, list[int]]:
        used = {token for tokens in self.held.values() for token in tokens}
        return {index: [token for token in range(QUARTERS) if (index, token) not in used] for index in range(self.in_all)}

    def _choose(self, wanted: float) -> set[Token] | None:
        return choose(self.free, wanted, dict.fromkeys(range(self.in_all), QUARTERS))

    def claim(self) -> Claim | None:
        held, could_hold = self._choose(1) or self._choose(0.25), Reach(self.in_all, 1.0)
        if held is None:
            return None
        while True:
            offered = offer(self.name, held=len(held) / QUARTERS, free=could_hold.gpus, in_all=self.in_all)
            try:
                found = b.claim(self.store, offered)
                break
            except SlotsWanted as wanted:
                if (chosen := self._choose(wanted.count)) is not None:
                    held = chosen
                else:
                    could_hold = could_hold.and_no_more_than(reach(self.free, dict.fromkeys(range(self.in_all), QUARTERS)))
        if found is not None:
            assert len(held) == (found.gpus or 1) * QUARTERS
            self.running.append(found)
            self.held[found.run.job_id] = held
        return found

    def finish(self, claim: Claim) -> None:
        self.running.remove(claim)
        del self.held[claim.run.job_id]
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


def test_four_quarters_run_beside_each_other_and_a_fifth_waits(store: Store) -> None:
    register(store, "w", 1)
    worker = Worker(store, "w", 1)
    first, *_ = [wanting(store, 0.25) for _ in range(5)]
    claims = [worker.claim() for _ in range(5)]
    assert [claim is not None for claim in claims] == [True] * 4 + [False]
    assert claims[0] is not None
    assert claims[0].run.job_id == first
    worker.finish(claims[0])
    assert worker.claim() is not None


def test_a_whole_gpu_is_not_starved_by_quarters_that_keep_coming(store: Store) -> None:
    register(store, "w", 2)
    worker = Worker(store, "w", 2)
    for _ in range(8):
        wanting(store, 0.25)
    while worker.claim():
        pass
    whole = wanting(store, 1)
    for _ in range(5):  # one ends, another comes
        wanting(store, 0.25)
        worker.finish(worker.running[0])
        if started := worker.claim():
            break
    assert started is not None
    assert started.run.job_id == whole
    assert worker.claim() is None, "its GPU was the first to be empty, and the other is full"


@pytest.mark.parametrize("seed", range(4))
def test_whatever_comes_everything_that_fits_is_run(sqlite_store: Store, clock: FakeClock, seed: int) -> None:
    """Workers of all sizes, jobs of all widths, small ones coming as long as a wide one waits: none is left over, no quarter is used twice."""
    store, dice = sqlite_store, random.Random(seed)
    sizes = [dice.choice([1, 2, 4, 8]) for _ in range(3)]
    workers = [Worker(store, f"w{number}", size) for number, size in enumerate(sizes)]
    widths = [None, *(width for width in (0, 0.25, 0.5, 0.5, 0.75, 1, 1, 2, 3, 8) if width <= max(sizes))]
    for worker in workers:
        register(store, worker.name, worker.in_all)
    left = {wanting(store, dice.choice(widths), owner=dice.choice(["ada", "bob"])) for _ in range(12)}
    for _ in range(200):
        if not left:
            break
        dice.choice(workers).claim()
        busy = [worker for worker in workers if worker.running]
        if busy and dice.random() < 0.6:
            wanting(store, dice.choice([0.25, 0.25, 1]), owner=dice.choice(["ada", "bob"]))
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
