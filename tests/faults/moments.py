"""When and on what to strike: moments of a run drawn at random, and the same again for the same POWERGRAD_SEED."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress

import psutil

from powergrad.client.models import Job
from tests.faults.conftest import Site
from tests.worker.conftest import until

LAST_STEP = 66  # of the 88 of a small run: what comes later could find the job ended
JITTER_S = 0.2


def strike(site: Site, job_id: str, dice: random.Random, *, checkpointed: bool = False) -> str:
    """Wait for a random moment of a small run: just claimed, at some step, after some checkpoint; what it was.

    checkpointed: only moments with something to go on from.
    """
    kinds = ["step", "checkpoint"] if checkpointed else ["claim", "plan", "step", "step", "checkpoint"]
    kind = dice.choice(kinds)
    match kind:
        case "claim":
            site.until_state(job_id, "running")
        case "plan":
            until(lambda: any(event.type == "plan" for event in site.events(job_id)))
        case "step":
            kind = f"step {(step := dice.randint(12 if checkpointed else 1, LAST_STEP))}"
            site.until_step(job_id, step)
            if checkpointed:
                site.until_checkpoint(job_id)
        case _:
            site.until_checkpoint(job_id)
    later_s = dice.uniform(0.0, JITTER_S)
    time.sleep(later_s)  # no fact is waited for: this is the random moment itself
    print(f"struck {later_s:.3f} s after {kind}")
    return kind


def trainer_of(site: Site, job_id: str) -> psutil.Process:
    """The job's trainer as soon as there is one."""
    return site.the(f"powergrad: trainer {job_id}")


def trainers_of(site: Site, job_id: str) -> list[psutil.Process]:
    return site.processes(f"powergrad: trainer {job_id}")


def tree_of(process: psutil.Process) -> list[psutil.Process]:
    """A process and all that it has made, itself first."""
    return [process, *process.children(recursive=True)]


def kill_all(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


@contextmanager
def frozen(*processes: psutil.Process) -> Iterator[None]:
    """SIGSTOP for the length of the block."""
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.resume()


@contextmanager
def frozen_between_writes(site: Site, *processes: psutil.Process) -> Iterator[None]:
    """The same, but never with SQLite's one write lock in hand: until such a process thaws, nobody can write, and nothing could follow."""
    while True:
        with frozen(*processes):
            if not site.store_url.startswith("sqlite") or can_write(site):
                yield
                return
        print("frozen in a write: again")


def can_write(site: Site) -> bool:
    with closing(sqlite3.connect(site.data_dir / "powergrad.db", timeout=3.0, isolation_level=None)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return False
        connection.execute("ROLLBACK")
        return True


@contextmanager
def unguarded(site: Site) -> Iterator[None]:
    """Nobody restarts what dies within the block: the stack's guard is stopped."""
    assert site.up is not None
    os.kill(site.up.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(site.up.pid, signal.SIGCONT)


def reason_codes(job: Job) -> list[str | None]:
    """Why each attempt failed; None where it did not."""
    return [((attempt.model_extra or {}).get("reason") or {}).get("code") for attempt in job.attempts]


def pass_by(seconds: float) -> None:
    """Let a fault last so long: its length is the requirement."""
    deadline = time.monotonic() + seconds
    until(lambda: time.monotonic() >= deadline, within_s=seconds + 60.0)


def finish(site: Site, job_id: str, sha256: str) -> None:
    """The job succeeds with these weights and a history without fault."""
    job = site.until_state(job_id, "succeeded", "failed", "cancelled")
    assert job.state == "succeeded", job.reason
    assert site.weights_sha256(job_id) == sha256
    site.check_history(job_id)
    until(lambda: not trainers_of(site, job_id), within_s=10.0)
