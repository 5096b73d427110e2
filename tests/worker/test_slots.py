"""Slots: cores shared out, locks that exclude and that a child carries on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from worker.slots import QUARTERS, Gpu, Slots, choose_gpus, lock_all, plan_slots, release


def gpus(n: int) -> list[Gpu]:
    return [Gpu(f"GPU-{i}", "a GPU", 80 << 30) for i in range(n)]


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
        assert one.resize(wide, 4) == 3, "the other one has a slot"
        assert other.resize(narrow, 4) == 3, "and the first one let go of what it had found"
        assert [slot.index for taken in (wide, narrow) for slot in taken.slots] == [0, 1]
        assert one.resize(wide, 3) == 3
        assert [slot.index for slot in wide.slots] == [0, 2, 3]
        assert wide.cpus == [0, 1, 4, 5, 6, 7]
        assert len(wide.fds) == 3 * QUARTERS
        assert other.resize(narrow, 2) == 1
        assert one.resize(wide, 1) == 1
        assert other.resize(narrow, 3) == 3
    with one.take() as again:
        assert again is not None
        assert one.resize(again, 4) == 4


def test_the_name_of_many_slots_is_cut_to_what_is_stored(tmp_path: Path) -> None:
    slots = Slots(plan_slots(gpus(64), range(64), count=None, gpu_locks=tmp_path, cpu_locks=tmp_path))
    with slots.take() as taken:
        assert taken is not None
        assert taken.device == "a GPU GPU-0"
        assert slots.resize(taken, 64) == 64
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
