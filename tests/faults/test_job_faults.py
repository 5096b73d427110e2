"""Row 9: jobs that cannot succeed fail with the right reason, after a bounded number of attempts, and harm no other job."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from powergrad import protocol
from powergrad.jobs import recording
from powergrad.jobs.store import Store
from tests.faults.conftest import Site, small_spec
from tests.faults.moments import finish, reason_codes, trainers_of
from tests.jobs.builders import claimed, do, row, submit
from tests.stores import FakeClock
from tests.worker.conftest import until
from worker import ends

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]

LITTLE_BYTES = 512 << 20  # beyond the address space that a trainer begins with


@contextmanager
def hurting(site: Site, job_id: str, hurt: Callable[[psutil.Process], None]) -> Iterator[list[int]]:
    """Does something to every trainer of a job when it appears; their pids."""
    seen: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            for trainer in trainers_of(site, job_id):
                if trainer.pid not in seen:
                    with suppress(psutil.NoSuchProcess):
                        hurt(trainer)
                        seen.append(trainer.pid)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def failed(site: Site, job_id: str) -> Any:
    job = site.until_state(job_id, "succeeded", "failed")
    assert job.state == "failed"
    site.check_history(job_id)
    until(lambda: not trainers_of(site, job_id), within_s=10.0)
    return job


@pytest.mark.row(9)
def test_a_trainer_that_crashes_at_every_start_is_given_up_and_another_job_goes_on(site: Site, undisturbed: str) -> None:
    job_id = site.submit(limits={"max_attempts": 3})
    with hurting(site, job_id, lambda trainer: trainer.send_signal(signal.SIGSEGV)) as crashed:
        other = site.submit()
        job = failed(site, job_id)
    assert (job.reason.code, job.reason.evidence["signal"]) == ("crashed", "SIGSEGV")
    assert len(crashed) == len(job.attempts) == 3
    assert reason_codes(job) == ["crashed"] * 3
    finish(site, other, undisturbed)
    assert site.client.get(other).attempt == 1


@pytest.mark.row(9)
def test_a_trainer_that_gets_no_memory_says_so(site: Site, undisturbed: str) -> None:
    other = site.submit()
    # the first layer's output alone has 512 × 64 × 64 × 64 numbers
    job_id = site.submit(data={"dataset": "digits", "image_size": 64, "batch_size": 512}, limits={"max_attempts": 1}, precision="fp32")
    with hurting(site, job_id, lambda trainer: limit_memory(trainer, LITTLE_BYTES)):
        job = failed(site, job_id)
    assert job.reason.code == "out_of_memory_host", job.reason
    assert "batch_size" in job.reason.hint
    finish(site, other, undisturbed)
    assert site.client.get(other).attempt == 1


def limit_memory(process: psutil.Process, more_bytes: int) -> None:
    bound = process.memory_info().vms + more_bytes
    process.rlimit(psutil.RLIMIT_AS, (bound, bound))


@pytest.mark.row(9)
def test_a_loss_that_is_no_number_fails_once(site: Site) -> None:
    job_id = site.submit(optimizer={"lr": 1000.0}, model={"norm": "none"}, precision="fp32")
    job = failed(site, job_id)
    assert (job.reason.code, job.attempt) == ("diverged", 1)
    assert "lr" in job.reason.hint


@pytest.mark.row(9)
def test_a_step_that_hangs_is_killed_and_its_stacks_are_in_the_log(site: Site, undisturbed: str, dice: random.Random) -> None:
    """The hang is real: the file that a step appends a line to has become a pipe that nobody reads."""
    job_id = site.submit(epochs=500, telemetry={}, limits={"stall_seconds": 8.0, "max_attempts": 1})
    other = site.submit()
    site.until_step(job_id, dice.randint(3, 60))
    (journal,) = (site.data_dir / "jobs" / job_id).rglob("a1.jsonl")
    os.mkfifo(pipe := journal.with_name("pipe"))
    os.replace(pipe, journal)
    job = failed(site, job_id)
    assert job.reason.code == "stalled"
    stacks = "\n".join(job.reason.evidence["log_tail"])
    assert "telemetry.py" in stacks
    assert "in append" in stacks
    finish(site, other, undisturbed)
    assert site.client.get(other).attempt == 1


@pytest.mark.row(9)
def test_a_gpu_without_memory_is_tried_again_later_and_given_up(
    sqlite_store: Store, clock: FakeClock, tmp_path: Path, dice: random.Random
) -> None:
    """There is no GPU here: CUDA's own error is raised at a random step, out of what the trainer speaks through."""
    import torch  # here: every collection of these tests would pay its seconds

    from powergrad import trainer

    def speak(message: protocol.Message) -> None:
        if isinstance(message, protocol.Step) and message.step >= fatal_step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    job_id = submit(sqlite_store, **small_spec(limits={"max_attempts": 3}))
    waits_s = []
    for attempt in (1, 2, 3):
        claim = claimed(sqlite_store)
        assert claim.run.attempt == attempt
        fatal_step = dice.randint(1, 8)
        config = protocol.TrainerConfig(
            run_id=job_id, attempt=attempt, spec=claim.spec.training(), run_dir=str(tmp_path), data_root=str(tmp_path)
        )
        said = trainer.run(config, emit=speak, orders=trainer.StandingOrders())
        ending = ends.Ending(exit_code=1, said=said, why=None, oom_kills=0, stall_seconds=600.0, max_seconds=None)
        do(sqlite_store, recording.finish, claim.run, ends.classify(ending, tmp_path / "none.log"))
        due_ms = row(sqlite_store, job_id).not_before or clock.now_ms
        waits_s.append((due_ms - clock.now_ms) / 1000)
        clock.now_ms = due_ms
    stored = row(sqlite_store, job_id)
    assert (stored.state, stored.failures, waits_s) == ("failed", 3, [30.0, 60.0, 0.0])
    assert (stored.reason["code"], "batch_size" in stored.reason["hint"]) == ("out_of_memory_gpu", True)
    assert "2.00 GiB" in stored.reason["evidence"]["traceback"]
