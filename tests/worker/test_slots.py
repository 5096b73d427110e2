"""Slots: cores shared out, locks that exclude and that a child carries on."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from powergrad.jobs.gpus import QUARTERS
from worker import slots as module
from worker.slots import Gpu, Reach, Slots, TakenSlots, choose, choose_gpus, device_report, lock_all, plan_slots, reach, release

ALL = range(QUARTERS)
ROOT = Path(__file__).parents[2]


def gpus(n: int) -> list[Gpu]:
    return [Gpu(f"GPU-{i}", "a GPU", 80 << 30) for i in range(n)]


def worker(folder: Path, count: int, *, with_memory: Callable[[Gpu], int] = lambda _: QUARTERS) -> Slots:
    """The slots of one of the workers that share a folder of locks; two cores a GPU."""
    return Slots(plan_slots(gpus(count), range(2 * count), count=None, gpu_locks=folder, cpu_locks=folder), with_memory)


@contextmanager
def holding(slots: Slots, part: float) -> Iterator[TakenSlots]:
    with slots.take() as taken:
        assert taken is not None
        assert slots.resize(taken, part) is None
        yield taken


@pytest.mark.parametrize(("cores", "count"), [(2, 1), (2, 2), (7, 3), (64, 8)])
def test_every_core_belongs_to_exactly_one_slot(tmp_path: Path, cores: int, count: int) -> None:
    slots = plan_slots([], range(cores), count=count, gpu_locks=tmp_path, cpu_locks=tmp_path)
    assert sorted(cpu for slot in slots for cpu in slot.cpus) == list(range(cores))
    assert max(len(slot.cpus) for slot in slots) - min(len(slot.cpus) for slot in slots) <= 1


def test_more_slots_than_cores_share_them(tmp_path: Path) -> None:
    slots = plan_slots([], [4, 5], count=5, gpu_locks=tmp_path, cpu_locks=tmp_path)
    assert [slot.cpus for slot in slots] == [(4,), (5,), (4,), (5,), (4,)]


def test_there_is_one_slot_a_gpu_with_all_its_quarters(tmp_path: Path) -> None:
    slots = plan_slots(gpus(2), range(8), count=None, gpu_locks=tmp_path, cpu_locks=tmp_path)
    assert [slot.gpu.uuid for slot in slots if slot.gpu] == ["GPU-0", "GPU-1"]
    assert [path.name for path in slots[1].tokens] == [f"GPU-1.{quarter}.lock" for quarter in range(QUARTERS)]


def test_more_slots_than_gpus_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="slots=3: there is one slot a GPU, and 2 GPUs"):
        plan_slots(gpus(2), range(8), count=3, gpu_locks=tmp_path, cpu_locks=tmp_path)
    assert len(plan_slots(gpus(2), range(8), count=1, gpu_locks=tmp_path, cpu_locks=tmp_path)) == 1


@pytest.mark.parametrize(
    ("visible", "chosen"), [(None, ["GPU-0", "GPU-1"]), ("", []), ("1", ["GPU-1"]), ("GPU-1,0", ["GPU-1", "GPU-0"]), ("0,7,1", ["GPU-0"])]
)
def test_the_visible_gpus_are_chosen_as_cuda_chooses_them(visible: str | None, chosen: list[str]) -> None:
    assert [gpu.uuid for gpu in choose_gpus(gpus(2), visible)] == chosen


def test_two_workers_of_a_host_never_hold_one_gpu(tmp_path: Path) -> None:
    one, other = (Slots(plan_slots(gpus(1), range(4), count=None, gpu_locks=tmp_path, cpu_locks=tmp_path)) for _ in range(2))
    with one.take() as held:
        assert held is not None
        with other.take() as refused:
            assert refused is None
    with other.take() as free_again:
        assert free_again is not None


def test_a_slot_handed_over_is_held_by_its_trainer_alone(tmp_path: Path) -> None:
    one, other = (Slots(plan_slots([], range(4), count=1, gpu_locks=tmp_path, cpu_locks=tmp_path)) for _ in range(2))
    with one.take() as held:
        assert held is not None
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=held.fds) as trainer:
            held.hand_over()
            with other.take() as refused:
                assert refused is None
            trainer.communicate(b"\n")
        with one.take() as twice:
            assert twice is None, "its own worker waits for the supervisor's end"
        with other.take() as free_again:
            assert free_again is not None, "a worker that is frozen here would keep it for ever"


def test_slots_are_widened_all_or_none(tmp_path: Path) -> None:
    one, other = (Slots(plan_slots(gpus(4), range(8), count=None, gpu_locks=tmp_path, cpu_locks=tmp_path)) for _ in range(2))
    with one.take() as wide, other.take() as narrow:
        assert wide is not None
        assert narrow is not None
        assert one.resize(wide, 4) == Reach(3, 1.0), "the other one has a slot"
        assert other.resize(narrow, 4) == Reach(3, 1.0), "and the first one let go of what it had found"
        assert [slot.index for taken in (wide, narrow) for slot in taken.slots] == [0, 1]
        assert one.resize(wide, 3) is None
        assert [slot.index for slot in wide.slots] == [0, 2, 3]
        assert wide.cpus == [0, 1, 4, 5, 6, 7]
        assert len(wide.fds) == 3 * QUARTERS
        assert other.resize(narrow, 2) == Reach(1, 1.0)
        assert one.resize(wide, 1) is None
        assert other.resize(narrow, 3) is None
    with one.take() as again:
        assert again is not None
        assert one.resize(again, 4) is None


def test_the_name_of_many_slots_is_cut_to_what_is_stored(tmp_path: Path) -> None:
    slots = Slots(plan_slots(gpus(64), range(64), count=None, gpu_locks=tmp_path, cpu_locks=tmp_path))
    with slots.take() as taken:
        assert taken is not None
        assert taken.device == "a GPU GPU-0"
        assert slots.resize(taken, 64) is None
        assert taken.device.startswith("64 x a GPU, slots 0, 1, 2, ")
        assert len(taken.device) == 128


def test_a_failed_take_lets_go_of_what_it_had(tmp_path: Path) -> None:
    tokens = [tmp_path / name for name in "abc"]
    held = lock_all(tokens[2:])
    assert held is not None
    assert lock_all(tokens) is None
    again = lock_all(tokens[:2])
    assert again is not None
    release(again)
    release(held)


def test_a_slot_stays_taken_while_a_child_holds_its_lock(tmp_path: Path) -> None:
    token = tmp_path / "slot.lock"
    held = lock_all([token])
    assert held is not None
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=held) as child:
        release(held)
        assert lock_all([token]) is None
        child.communicate(b"\n")
    free = lock_all([token])
    assert free is not None
    release(free)
    assert os.path.exists(token)


# --- parts of a GPU


def test_four_quarters_of_a_gpu_are_held_by_four_and_no_fifth(tmp_path: Path) -> None:
    one, other = worker(tmp_path, 1), worker(tmp_path, 1)
    with ExitStack() as held:
        parts = [held.enter_context(holding(slots, 0.25)) for slots in (one, other, one, other)]
        assert [taken.tokens_of(taken.slots[0]) for taken in parts] == [[0], [1], [2], [3]]
        assert [taken.gpu_count for taken in parts] == [0.25] * 4
        assert (one.quarters_in_use(), other.quarters_in_use()) == ({"GPU-0": 2}, {"GPU-0": 2})
        with one.take() as fifth:
            assert fifth is None
    with holding(other, 1) as whole:
        assert whole.gpu_count == 1


def test_a_part_keeps_the_whole_gpu_from_others_and_another_part_beside_it(tmp_path: Path) -> None:
    one, other = worker(tmp_path, 1), worker(tmp_path, 1)
    with holding(one, 0.5), other.take() as rest:
        assert rest is not None
        assert rest.gpu_count == 0.25, "what it finds first"
        assert other.resize(rest, 1) == Reach(0.5, 0.5)
        assert other.resize(rest, 0.75) == Reach(0.5, 0.5)
        assert rest.gpu_count == 0.25, "what it had"
        assert other.resize(rest, 0.5) is None
        assert rest.device == "0.5 of a GPU GPU-0"


def test_a_release_that_knows_no_parts_keeps_off_a_gpu_in_parts_and_is_kept_off(tmp_path: Path) -> None:
    slots = worker(tmp_path, 1)
    as_before = slots.slots[0].tokens  # it takes all four, in order
    with holding(slots, 0.25):
        assert lock_all(as_before) is None
    whole = lock_all(as_before)
    assert whole is not None
    with slots.take() as none:
        assert none is None
    release(whole)


def test_a_part_goes_to_the_fullest_gpu_that_has_room(tmp_path: Path) -> None:
    slots = worker(tmp_path, 3)
    with ExitStack() as held:
        parts = [held.enter_context(holding(slots, part)) for part in (0.5, 0.75, 0.25, 0.25, 0.5)]
        assert [taken.slots[0].index for taken in parts] == [0, 1, 1, 0, 2]
        with slots.take() as taken:
            assert taken is not None
            assert slots.resize(taken, 1) == Reach(0.5, 0.5)
            assert taken.slots[0].index == 0, "a quarter of the fullest is what it begins with"


def test_parts_share_the_cores_and_a_whole_gpu_has_them_all(tmp_path: Path) -> None:
    (slot,) = plan_slots(gpus(1), range(8), count=None, gpu_locks=tmp_path, cpu_locks=tmp_path)
    slots = Slots([slot], lambda _: QUARTERS)
    with holding(slots, 0.25) as quarter, holding(slots, 0.75) as rest:
        assert (quarter.cpus, rest.cpus) == ([0, 1], [2, 3, 4, 5, 6, 7])
    with holding(slots, 1) as whole:
        assert whole.cpus == list(range(8))
    (narrow,) = plan_slots(gpus(1), [4, 5], count=None, gpu_locks=tmp_path, cpu_locks=tmp_path)
    assert [narrow.cpus_of([token]) for token in ALL] == [[4], [5], [4], [5]]


def test_a_part_needs_its_memory_and_a_whole_gpu_asks_for_none(tmp_path: Path) -> None:
    free = {"GPU-0": 1, "GPU-1": 2}
    slots = worker(tmp_path, 2, with_memory=lambda gpu: free[gpu.uuid])
    with slots.take() as taken:
        assert taken is not None
        assert slots.resize(taken, 0.5) is None
        assert taken.slots[0].index == 1, "the only one with memory for it"
        assert slots.resize(taken, 0.75) == Reach(2, 0.5)
        assert slots.resize(taken, 2) is None
        free["GPU-1"] = 0
        assert slots.resize(taken, 0.5) == Reach(2, 0.25)
        assert taken.gpu_count == 2


def test_where_nvml_cannot_tell_no_part_is_refused() -> None:
    assert module.memory_of(Gpu("GPU-of-nobody", "?", 1)) == QUARTERS


def test_a_part_handed_over_is_its_trainers_until_that_ends(tmp_path: Path) -> None:
    one, other = worker(tmp_path, 1), worker(tmp_path, 1)
    with holding(one, 0.75) as held:
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=held.fds) as trainer:
            held.hand_over()
            with other.take() as rest:
                assert rest is not None
                assert other.resize(rest, 0.5) == Reach(0.25, 0.25)
            trainer.communicate(b"\n")
        with other.take() as free_again:
            assert free_again is not None
            assert free_again.gpu_count == 1


def test_a_device_is_shown_with_the_quarters_in_use(tmp_path: Path) -> None:
    slots = worker(tmp_path, 2)
    with holding(slots, 0.75):
        _, *shown = device_report(gpus(2), slots.quarters_in_use())
    assert [(gpu["uuid"], gpu["quarters_in_use"]) for gpu in shown] == [("GPU-0", 3), ("GPU-1", 0)]


@pytest.mark.parametrize("seed", range(20))
def test_what_is_chosen_is_free_enough_and_no_more_than_that(seed: int) -> None:
    dice = random.Random(seed)
    for _ in range(200):
        free = {index: sorted(dice.sample(ALL, dice.randint(0, QUARTERS))) for index in range(3)}
        memory = {index: dice.randint(0, QUARTERS) for index in range(3)}
        wanted = dice.choice([0.25, 0.5, 0.75, 1, 2, 3])
        chosen, within = choose(free, wanted, memory), reach(free, memory)
        holds = wanted <= (within.part if wanted < 1 else within.gpus)
        assert (chosen is not None) == holds, "else a worker would ask for the same for ever"
        if chosen is None:
            continue
        used = {index for index, _ in chosen}
        assert all(token in free[index] for index, token in chosen)
        assert len(chosen) == wanted * QUARTERS
        assert len(used) == max(1, int(wanted))
        if wanted < 1:
            (index,) = used
            roomy = [len(free[i]) for i in free if min(len(free[i]), memory[i]) >= wanted * QUARTERS]
            assert len(free[index]) == min(roomy)


def test_processes_that_take_parts_and_whole_gpus_at_a_time_never_hold_one_quarter_twice(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.worker.takers", str(tmp_path)]
    takers = [subprocess.Popen([*command, str(seed)], cwd=ROOT, stderr=subprocess.PIPE, text=True) for seed in range(3)]
    said = [taker.communicate()[1] for taker in takers]
    assert [taker.returncode for taker in takers] == [0, 0, 0], said
    assert {path.name for path in tmp_path.iterdir()} == {"locks"}
