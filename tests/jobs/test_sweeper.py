"""Rounds of the sweeper, and its thread."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from sqlalchemy import select

from powergrad.jobs import lifecycle, rows, sweeps
from powergrad.jobs.artifacts import Artifacts
from powergrad.jobs.states import JobState
from powergrad.jobs.store import Store
from powergrad.jobs.sweeper import Sweeper, sweep_once
from powergrad.jobs.tables import deletions
from tests.jobs import builders as b
from tests.stores import FakeClock


class Rings:
    def __init__(self) -> None:
        self.count = 0
        self.heard = threading.Event()

    def __call__(self) -> None:
        self.count += 1
        self.heard.set()


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    return Artifacts(str(tmp_path / "artifacts"))


def test_an_idle_round_writes_and_rings_nothing(store: Store, artifacts: Artifacts) -> None:
    b.running(store)
    rings = Rings()
    assert sweep_once(store, artifacts, rings) is None
    assert rings.count == 0


def test_a_due_job_is_rung_for(store: Store, artifacts: Artifacts, clock: FakeClock) -> None:
    run = b.running(store)
    b.fail(store, run)
    rings = Rings()
    sweep_once(store, artifacts, rings)
    assert rings.count == 0
    clock.advance(60)
    sweep_once(store, artifacts, rings)
    assert rings.count == 1


def test_a_lapsed_job_is_moved_and_rung_for(store: Store, artifacts: Artifacts, clock: FakeClock) -> None:
    run = b.running(store)
    clock.advance(rows.LEASE_TTL_S + 1)
    rings = Rings()
    swept = sweep_once(store, artifacts, rings)
    assert swept is not None
    assert swept.moved == [(run.job_id, JobState.QUEUED)]
    assert rings.count == 1


class Stuck(Artifacts):
    """A root where one job's files cannot be deleted."""

    def __init__(self, root: str, stuck: str) -> None:
        super().__init__(root)
        self.stuck = stuck

    def delete(self, path: str) -> None:
        if path == self.stuck:
            raise PermissionError(path)
        super().delete(path)


def test_files_that_cannot_be_freed_stay_a_debt_and_hold_up_no_others(store: Store, tmp_path: Path) -> None:
    ids = [b.bring_to(store, JobState.CANCELLED) for _ in range(3)]
    artifacts = Stuck(str(tmp_path), stuck=f"jobs/{ids[0]}")
    for job_id in ids:
        (artifacts.local_dir(f"jobs/{job_id}/checkpoints/a1") / "model.safetensors").write_bytes(b"x")
        b.do(store, lifecycle.remove, job_id)
    sweep_once(store, artifacts, Rings())
    assert sorted(path.name for path in (tmp_path / "jobs").iterdir()) == [ids[0]]
    with store.read() as tx:
        assert [row.path for row in tx.all(select(deletions))] == [f"jobs/{ids[0]}"]
    sweep_once(store, Artifacts(str(tmp_path)), Rings())
    assert list((tmp_path / "jobs").iterdir()) == []
    with store.read() as tx:
        assert not sweeps.needs_sweep(tx)


def test_the_thread_sweeps_until_it_is_stopped_and_outlives_a_bad_round(sqlite_store: Store, artifacts: Artifacts) -> None:
    class FirstFails(Rings):
        def __call__(self) -> None:
            self.count += 1
            if self.count == 1:
                raise RuntimeError("a broken bell")
            self.heard.set()

    rings, others = FirstFails(), set(threading.enumerate())  # an API under test elsewhere has a sweeper too
    b.submit(sqlite_store)
    sweeper = Sweeper(sqlite_store, artifacts, rings, interval_s=0.01)
    sweeper.start()
    assert rings.heard.wait(timeout=30)
    sweeper.stop()
    assert rings.count >= 2
    assert "sweeper" not in {thread.name for thread in set(threading.enumerate()) - others}
