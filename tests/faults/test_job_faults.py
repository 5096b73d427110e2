"""Row 9: jobs that cannot succeed fail with the right reason, after a bounded number of attempts, and harm no other job."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import pytest

from tests.faults.conftest import Site
from tests.faults.moments import finish, reason_codes, trainers_of
from tests.worker.conftest import until

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
