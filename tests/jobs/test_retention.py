"""What goes and what stays: jobs that have outlived their end, checkpoints beyond what is kept, and the bytes that are left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, insert, select

from powergrad import protocol
from powergrad.jobs import lifecycle, queries, recording, retention, sweeper, sweeps
from powergrad.jobs.artifacts import Artifacts
from powergrad.jobs.lifecycle import Amendment
from powergrad.jobs.queries import Filter
from powergrad.jobs.rows import Run
from powergrad.jobs.states import TERMINAL, JobState, Outcome
from powergrad.jobs.store import Store
from powergrad.jobs.tables import artifacts as artifact_rows
from powergrad.jobs.tables import checkpoints as checkpoint_rows
from powergrad.jobs.tables import deletions, events, jobs
from tests.jobs import builders as b
from tests.stores import FakeClock

HOUR_S = 3600.0


def artifact(name: str, size: int, *, attempt: int = 1) -> protocol.ArtifactWritten:
    path = f"artifacts/a{attempt}/{name}"
    return protocol.ArtifactWritten(name=name, path=path, media_type="text/plain", bytes=size, sha256="0" * 64)


def expire(store: Store, **named: Any) -> list[str]:
    return b.do(store, sweeps.expire, **named)


def shown(store: Store, job_id: str) -> dict[str, Any]:
    with store.read() as tx:
        return queries.get(tx, job_id)


def steps(store: Store, job_id: str) -> list[int]:
    with store.read() as tx:
        return [row.step for row in tx.all(select(checkpoint_rows.c.step).where(checkpoint_rows.c.job_id == job_id).order_by("step"))]


def owed(store: Store) -> set[str]:
    with store.read() as tx:
        return {row.path for row in tx.all(select(deletions.c.path))}


def bytes_by_hand(store: Store, job_id: str) -> int:
    with store.read() as tx:
        of_checkpoints = select(func.sum(checkpoint_rows.c.total_bytes)).where(checkpoint_rows.c.job_id == job_id)
        of_artifacts = select(func.sum(artifact_rows.c.bytes)).where(artifact_rows.c.job_id == job_id)
        return sum(int(tx.run(query).scalar_one() or 0) for query in (of_checkpoints, of_artifacts))


def with_checkpoints(store: Store, *numbers: int, best: int = 0, **overrides: Any) -> Run:
    run = b.running(store, **overrides)
    b.record(store, run, b.plan(), *(b.checkpoint(number, 0.9 if number == best else 0.5) for number in numbers))
    return run


# --- time to live ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED])
def test_a_job_goes_when_it_has_outlived_its_end(store: Store, clock: FakeClock, state: JobState) -> None:
    job_id = b.bring_to(store, state, retention={"ttl_seconds": HOUR_S})
    clock.advance(HOUR_S - 1)
    assert expire(store) == []
    clock.advance(1)
    assert expire(store) == [job_id]
    assert owed(store) == {f"jobs/{job_id}"}
    with store.read() as tx:
        assert tx.one(select(jobs.c.id)) is None
        assert tx.one(select(events.c.seq)) is None


@pytest.mark.parametrize("state", [state for state in JobState if state not in TERMINAL])
def test_a_job_that_has_not_ended_has_no_age(store: Store, clock: FakeClock, state: JobState) -> None:
    b.bring_to(store, state, retention={"ttl_seconds": 0})
    clock.advance(HOUR_S)
    assert expire(store) == []


def test_a_job_that_goes_on_after_a_retry_does_not_go(store: Store, clock: FakeClock) -> None:
    job_id = b.bring_to(store, JobState.FAILED, retention={"ttl_seconds": HOUR_S})
    b.do(store, lifecycle.retry, job_id)
    clock.advance(2 * HOUR_S)
    assert expire(store) == []


def test_the_server_s_rule_is_for_jobs_without_one(database_url: str, clock: FakeClock) -> None:
    store = Store(database_url, clock=clock, job_ttl_s=HOUR_S)
    try:
        plain, longer = (b.bring_to(store, JobState.SUCCEEDED, retention={"ttl_seconds": ttl}) for ttl in (None, 3 * HOUR_S))
        assert shown(store, plain)["expires_at"] == "2027-01-15T09:00:00.000Z"
        assert shown(store, longer)["expires_at"] == "2027-01-15T11:00:00.000Z"
        clock.advance(2 * HOUR_S)
        assert expire(store) == [plain]
        clock.advance(2 * HOUR_S)
        assert expire(store) == [longer]
    finally:
        store.close()


def test_without_any_rule_a_job_stays_for_ever(store: Store, clock: FakeClock) -> None:
    job_id = b.bring_to(store, JobState.SUCCEEDED)
    clock.advance(1e9)
    assert expire(store) == []
    assert shown(store, job_id)["expires_at"] is None


def test_a_pinned_checkpoint_keeps_its_job(store: Store, clock: FakeClock) -> None:
    run = with_checkpoints(store, 10, 20, retention={"ttl_seconds": 0})
    b.finish(store, run)
    b.do(store, retention.pin, run.job_id, "step-00000010")
    clock.advance(HOUR_S)
    assert expire(store) == []
    b.do(store, retention.pin, run.job_id, "step-00000010", pinned=False)
    assert expire(store) == [run.job_id]


def test_a_job_stays_while_one_that_has_not_ended_starts_from_it(store: Store, clock: FakeClock) -> None:
    run = with_checkpoints(store, 10, retention={"ttl_seconds": 0})
    b.finish(store, run)
    other = b.bring_to(store, JobState.SUCCEEDED, retention={"ttl_seconds": 0})
    child = b.submit(store, model={"init_from": f"{run.job_id}/best"})
    b.do(store, retention.pin, run.job_id, "best", pinned=False)  # as its owner may
    assert expire(store, limit=1) == [other], "one that stays holds up no other"
    assert expire(store) == []
    b.do(store, lifecycle.cancel, child)
    assert expire(store) == [run.job_id]


def test_expiry_is_done_in_parts_oldest_end_first(store: Store, clock: FakeClock) -> None:
    ended = []
    for _ in range(3):
        ended.append(b.bring_to(store, JobState.CANCELLED, retention={"ttl_seconds": 1}))
        clock.advance(1)
    clock.advance(HOUR_S)
    assert [expire(store, limit=2), expire(store, limit=2), expire(store, limit=2)] == [ended[:2], ended[2:], []]


def test_two_sweepers_delete_each_job_once(store: Store, clock: FakeClock) -> None:
    ended = {b.bring_to(store, JobState.CANCELLED, retention={"ttl_seconds": 0}) for _ in range(20)}
    found = b.at_once([lambda: expire(store, limit=10) for _ in range(4)])
    while more := expire(store):
        found.append(more)
    assert sorted(job_id for part in found for job_id in part) == sorted(ended)


def test_a_sweep_deletes_and_frees(store: Store, clock: FakeClock, tmp_path: Path) -> None:
    files = Artifacts(str(tmp_path))
    job_id = b.bring_to(store, JobState.SUCCEEDED, retention={"ttl_seconds": 10})
    files.write(f"jobs/{job_id}/logs/a1.log", b"all of it")
    clock.advance(10)
    assert sweeper.sweep_once(store, files, lambda: None, expires=False) is None
    assert sweeper.sweep_once(store, files, lambda: None) is not None
    assert not (tmp_path / "jobs" / job_id).exists()
    assert owed(store) == set()
    assert sweeper.sweep_once(store, files, lambda: None) is None


def test_a_fraction_of_a_second_is_rounded_up(store: Store) -> None:
    assert shown(store, b.submit(store, retention={"ttl_seconds": 0.25}))["retention"]["ttl_seconds"] == 1


# --- changes of mind -------------------------------------------------------------------------------------------------------------


def test_a_new_time_to_live_counts_from_the_end(store: Store, clock: FakeClock) -> None:
    job_id = b.bring_to(store, JobState.SUCCEEDED)
    b.do(store, lifecycle.amend, job_id, Amendment(retention={"ttl_seconds": HOUR_S}))
    assert shown(store, job_id)["retention"] == {"keep_last": 2, "keep_best": 1, "ttl_seconds": 3600}
    b.do(store, lifecycle.amend, job_id, Amendment(retention={"ttl_seconds": None}))
    assert shown(store, job_id)["retention"]["ttl_seconds"] is None
    clock.advance(2 * HOUR_S)
    assert expire(store) == []
    b.do(store, lifecycle.amend, job_id, Amendment(retention={"ttl_seconds": HOUR_S}))
    assert expire(store) == [job_id]


def paused(store: Store, run: Run) -> None:
    b.do(store, lifecycle.pause, run.job_id)
    b.finish(store, run, Outcome.STOPPED)


def queued_again(store: Store, run: Run) -> None:
    b.finish(store, run, Outcome.STOPPED)


@pytest.mark.parametrize("leave", [b.finish, b.fail, paused, queued_again])
def test_keeping_less_frees_at_once_where_no_worker_holds_the_job(store: Store, leave: Callable[[Store, Run], object]) -> None:
    run = with_checkpoints(store, 10, 20, 30, 40, best=20, checkpoint={"keep_last": 9})
    leave(store, run)
    before = b.row(store, run.job_id)
    b.do(store, retention.pin, run.job_id, "step-00000010")
    b.do(store, lifecycle.amend, run.job_id, Amendment(retention={"keep_last": 1}))
    assert steps(store, run.job_id) == [10, 20, 40], "the pinned, the best, the newest"
    assert owed(store) == {f"jobs/{run.job_id}/checkpoints/a1/step-00000030"}
    after = b.row(store, run.job_id)
    assert (before.bytes, after.bytes) == (800, 600)
    assert after.revision > before.revision


def test_keeping_less_of_a_running_job_waits_for_its_next_checkpoint(store: Store) -> None:
    run = with_checkpoints(store, 10, 20, 30, best=20)
    b.do(store, lifecycle.amend, run.job_id, Amendment(retention={"keep_last": 1}))
    assert steps(store, run.job_id) == [10, 20, 30]
    assert b.do(store, recording.prune, run) == ["checkpoints/a1/step-00000010"]


def test_what_is_pruned_is_a_debt_until_it_is_freed(store: Store, tmp_path: Path) -> None:
    files = Artifacts(str(tmp_path))
    run = with_checkpoints(store, 10, 20, 30, best=30, checkpoint={"keep_last": 1})
    for number in (10, 20, 30):
        files.write(f"jobs/{run.job_id}/checkpoints/a1/{retention.checkpoint_id(number)}/model.safetensors", b"x")
    b.do(store, recording.prune, run)  # and its worker is killed before it deletes anything
    sweeper.sweep_once(store, files, lambda: None)
    assert sorted(path.name for path in (tmp_path / "jobs" / run.job_id / "checkpoints" / "a1").iterdir()) == ["step-00000030"]
    assert owed(store) == set()


# --- bytes -----------------------------------------------------------------------------------------------------------------------


def test_bytes_follow_every_change_of_checkpoints_and_artifacts(store: Store) -> None:
    run = b.running(store, checkpoint={"keep_last": 1}, on_divergence="rollback")
    seen: list[int] = []

    def after(*messages: protocol.Message) -> None:
        b.record(store, run, *messages)
        found = b.row(store, run.job_id).bytes
        assert found == bytes_by_hand(store, run.job_id)
        seen.append(found)

    after(b.plan())
    after(b.checkpoint(10, 0.5), artifact("labels.json", 7))
    after(b.checkpoint(20, 0.6))
    after(b.checkpoint(20, 0.6))  # heard twice
    after(artifact("labels.json", 9))
    after(protocol.RolledBack(from_step=25, to_step=10, checkpoint="step-00000010", lr_scale=0.5, detail="diverged"))
    after(protocol.CheckpointSkipped(id="step-00000010", path="checkpoints/a1/step-00000010", detail="broken"))
    after(b.checkpoint(20, 0.7))
    assert seen == [0, 207, 407, 407, 409, 209, 209, 409]
    b.do(store, recording.prune, run)
    assert b.row(store, run.job_id).bytes == bytes_by_hand(store, run.job_id) == 209


def test_a_checkpoint_written_anew_by_a_later_attempt_frees_the_earlier_one(store: Store) -> None:
    run = with_checkpoints(store, 10, 20)
    b.fail(store, run)
    with store.write() as tx:
        tx.run(jobs.update().values(not_before=None))
    again = b.claimed(store).run
    b.record(store, again, b.plan(resumed_step=10), b.checkpoint(20, attempt=2))
    assert owed(store) == {f"jobs/{run.job_id}/checkpoints/a1/step-00000020"}
    assert b.row(store, run.job_id).bytes == bytes_by_hand(store, run.job_id) == 400


def test_a_way_back_behind_an_earlier_attempt_s_checkpoint_frees_it(store: Store) -> None:
    run = with_checkpoints(store, 10, 25)
    b.finish(store, run, Outcome.STOPPED)
    again = b.claimed(store).run
    back = protocol.RolledBack(from_step=29, to_step=10, checkpoint="step-00000010", lr_scale=0.5, detail="diverged")
    b.record(store, again, b.plan(resumed_step=25), back)
    assert steps(store, run.job_id) == [10]
    assert owed(store) == {f"jobs/{run.job_id}/checkpoints/a1/step-00000025"}
    assert b.row(store, run.job_id).bytes == 200


def test_a_claim_knows_all_directories_that_rows_name(store: Store) -> None:
    run = with_checkpoints(store, 10, 20)
    b.record(store, run, protocol.CheckpointSkipped(id="step-00000020", path="checkpoints/a1/step-00000020", detail="broken"))
    b.finish(store, run, Outcome.STOPPED)
    claim = b.claimed(store)
    assert [point.step for point in claim.resume] == [10]
    assert claim.stored == {"checkpoints/a1/step-00000010", "checkpoints/a1/step-00000020"}


# --- many at once ----------------------------------------------------------------------------------------------------------------


def test_only_the_owner_s_ended_jobs_are_deleted(store: Store) -> None:
    states = sorted(JobState, key=lambda state: state is JobState.QUEUED)  # last: what comes after it would be claimed in its place
    mine = [b.bring_to(store, state) for state in states]
    theirs = b.submit(store, owner="somebody-else")
    b.do(store, lifecycle.cancel, theirs, owner="somebody-else")
    gone = b.do(store, lifecycle.remove_all, [*mine, theirs, "job_unknown"])
    ended = [job_id for job_id, state in zip(mine, states, strict=True) if state in TERMINAL]
    assert gone.ids == sorted(ended, reverse=True)
    with store.read() as tx:
        assert {row.id for row in tx.all(select(jobs.c.id))} == {*mine, theirs} - set(ended)
    assert owed(store) == {f"jobs/{job_id}" for job_id in ended}


def test_what_would_go_is_what_fits_and_has_ended(store: Store) -> None:
    for state in (JobState.SUCCEEDED, JobState.FAILED):
        b.bring_to(store, state, labels={"team": "x"})
    failed = b.bring_to(store, JobState.FAILED, labels={"team": "y"})
    b.submit(store, labels={"team": "x"})
    with store.read() as tx:
        assert queries.ended(tx, Filter(labels={"team": "y"}), limit=10).ids == [failed]
        found = queries.ended(tx, Filter(labels={"team": "x"}), limit=1)
    assert (len(found.ids), found.has_more) == (1, True)


def test_debts_beyond_one_round_are_paid_in_the_next_and_none_is_starved(store: Store, tmp_path: Path, clock: FakeClock) -> None:
    files = Artifacts(str(tmp_path))
    many = [f"jobs/job_{number:026}" for number in range(sweeps.MOST_DEBTS + 1)]
    for path in many:
        files.write(f"{path}/x", b"x")
    with store.write() as tx:
        tx.run(insert(deletions), [{"path": path, "created_at": clock.now_ms} for path in many])
    swept = sweeper.sweep_once(store, files, lambda: None)
    assert swept is not None
    assert len(swept.debts) == sweeps.MOST_DEBTS
    assert len(owed(store)) == 1
    sweeper.sweep_once(store, files, lambda: None)
    assert list((tmp_path / "jobs").iterdir()) == []
