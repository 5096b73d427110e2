"""Every change of a job's row, on both databases."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import event, select, text, update

from powergrad import protocol
from powergrad.jobs import claims, debts, lifecycle, metrics, queries, recording, retention, rows, submission, sweeps
from powergrad.jobs.claims import Offer
from powergrad.jobs.errors import CheckpointNotFound, Fenced, IdempotencyMismatch, IllegalMove, InvalidSpec, JobNotFound, VersionMismatch
from powergrad.jobs.lifecycle import Amendment, RaisedLimits
from powergrad.jobs.rows import Run
from powergrad.jobs.spec import JobSpec
from powergrad.jobs.states import MOVES, TERMINAL, End, JobState, Outcome, ReasonCode
from powergrad.jobs.store import Store
from powergrad.jobs.submission import Submission
from powergrad.jobs.tables import attempts, checkpoints, deletions, events, idempotency_keys, job_labels, jobs, metadata
from tests.jobs import builders as b
from tests.stores import FakeClock

S = JobState

# --- what a user does

USER_MOVES: dict[str, dict[JobState, JobState]] = {
    "cancel": {
        S.QUEUED: S.CANCELLED,
        S.RUNNING: S.CANCELLING,
        S.PAUSING: S.CANCELLING,
        S.PAUSED: S.CANCELLED,
        S.CANCELLING: S.CANCELLING,
        S.CANCELLED: S.CANCELLED,
    },
    "pause": {S.QUEUED: S.PAUSED, S.RUNNING: S.PAUSING, S.PAUSING: S.PAUSING, S.PAUSED: S.PAUSED},
    "resume": {S.QUEUED: S.QUEUED, S.RUNNING: S.RUNNING, S.PAUSED: S.QUEUED},
    "retry": {S.FAILED: S.QUEUED, S.CANCELLED: S.QUEUED},
}


@pytest.mark.parametrize("state", list(JobState))
@pytest.mark.parametrize("action", sorted(USER_MOVES))
def test_a_users_action_makes_its_legal_move_or_none(store: Store, action: str, state: JobState) -> None:
    job_id = b.bring_to(store, state)
    before = b.row(store, job_id)
    act: Callable[..., JobState] = getattr(lifecycle, action)
    expected = USER_MOVES[action].get(state)
    if expected is None:
        with pytest.raises(IllegalMove, match=f"cannot {action} a job that is {state}"):
            b.do(store, act, job_id)
        assert b.row(store, job_id) == before
    else:
        assert b.do(store, act, job_id) is expected
        assert b.state(store, job_id) is expected
        moved = [(told["from"], told["to"]) for told in b.told(store, job_id, "state")]
        assert all(S(to) in MOVES[S(origin)] for origin, to in moved)
        assert (b.row(store, job_id) == before) == (expected is state)  # doing it twice changes nothing


@pytest.mark.parametrize("state", list(JobState))
def test_only_terminal_jobs_are_removed(store: Store, state: JobState) -> None:
    job_id = b.bring_to(store, state)
    if state in TERMINAL:
        assert b.do(store, lifecycle.remove, job_id) == f"jobs/{job_id}"
        with pytest.raises(JobNotFound):
            b.do(store, lifecycle.cancel, job_id)
    else:
        with pytest.raises(IllegalMove):
            b.do(store, lifecycle.remove, job_id)
        assert b.state(store, job_id) is state


@pytest.mark.parametrize("action", ["cancel", "pause", "resume", "retry", "remove"])
def test_anothers_job_is_not_found(store: Store, action: str) -> None:
    job_id = b.submit(store, owner="ada")
    with pytest.raises(JobNotFound):
        b.do(store, getattr(lifecycle, action), job_id, owner="bob")
    with pytest.raises(JobNotFound):
        b.do(store, lifecycle.amend, job_id, Amendment(name="x"), owner="bob")


def test_a_submitted_job_is_queued_with_its_first_event(store: Store) -> None:
    job_id = b.submit(store, labels={"team": "vision"}, priority=7)
    row = b.row(store, job_id)
    assert (row.state, row.attempt, row.failures, row.version, row.seq) == ("queued", 0, 0, 1, 1)
    assert b.told(store, job_id) == [{"state": "queued", "name": "digits-resnet18"}]
    with store.read() as tx:
        assert [(found.key, found.value) for found in tx.all(select(job_labels))] == [("team", "vision")]


def test_ids_sort_as_jobs_were_submitted(store: Store, clock: FakeClock) -> None:
    ids = []
    for _ in range(5):
        ids.append(b.submit(store))
        clock.advance(0.001)
    assert ids == sorted(ids)


def test_the_same_key_and_body_give_the_same_job(store: Store) -> None:
    first = b.do(store, submission.submit, Submission(b.spec(), idempotency_key="k", body_sha256="1"))
    again = b.do(store, submission.submit, Submission(b.spec(), idempotency_key="k", body_sha256="1"))
    assert (first.replayed, again.replayed) == (False, True)
    assert first.job_id == again.job_id


def test_the_same_key_with_another_body_is_refused(store: Store) -> None:
    b.submit(store, key="k", body="1")
    with pytest.raises(IdempotencyMismatch):
        b.submit(store, key="k", body="2")
    b.submit(store, key="k", body="2", owner="another")


def test_concurrent_twins_make_one_job(store: Store) -> None:
    new = Submission(b.spec(), idempotency_key="k", body_sha256="1")
    made = b.at_once([lambda: b.do(store, submission.submit, new) for _ in range(8)])
    assert len({found.job_id for found in made}) == 1
    assert sum(not found.replayed for found in made) == 1
    with store.read() as tx:
        assert len(tx.all(select(jobs.c.id))) == 1


def test_a_key_is_free_again_after_a_day(store: Store, clock: FakeClock) -> None:
    first = b.submit(store, key="k", body="1")
    clock.advance(submission.IDEMPOTENCY_TTL_S + 1)
    b.do(store, sweeps.sweep)
    assert b.submit(store, key="k", body="2") != first


def test_the_hash_of_a_body_ignores_the_order_of_its_keys() -> None:
    assert submission.body_hash({"a": 1, "b": {"c": 2, "d": 3}}) == submission.body_hash({"b": {"d": 3, "c": 2}, "a": 1})
    assert submission.body_hash({"a": 1}) != submission.body_hash({"a": 2})


def test_a_retry_starts_a_fresh_count_with_the_raised_limits(store: Store, clock: FakeClock) -> None:
    job_id = b.bring_to(store, S.FAILED, limits={"max_attempts": 1})
    b.do(store, lifecycle.retry, job_id, limits=RaisedLimits(max_attempts=2))
    row = b.row(store, job_id)
    assert (row.failures, row.max_attempts, row.reason, row.finished_at) == (0, 2, None, None)
    assert row.spec["limits"] == {"max_seconds": None, "max_attempts": 2, "stall_seconds": 600.0}
    again = b.claimed(store)
    assert again.run.attempt == 2
    assert again.spec.limits.max_attempts == 2


def test_a_retry_of_a_cancel_that_its_worker_did_not_answer_waits_for_the_end_of_the_lease(store: Store, clock: FakeClock) -> None:
    """The worker is frozen, and its trainer lives on until its deadline: a second one beside it would train for nothing."""
    run = b.running(store)
    b.do(store, lifecycle.cancel, run.job_id)
    clock.advance(sweeps.CANCEL_GRACE_S + 1)
    b.do(store, sweeps.sweep)
    assert b.state(store, run.job_id) is S.CANCELLED
    b.do(store, lifecycle.retry, run.job_id)
    assert b.claim(store) is None
    clock.advance(rows.LEASE_TTL_S - sweeps.CANCEL_GRACE_S)
    assert b.claimed(store).run == replace(run, attempt=2)


def test_a_retry_of_a_cancel_that_was_answered_starts_at_once(store: Store) -> None:
    run = b.running(store)
    b.do(store, lifecycle.cancel, run.job_id)
    b.finish(store, run, Outcome.STOPPED)
    b.do(store, lifecycle.retry, run.job_id)
    assert b.claimed(store).run == replace(run, attempt=2)


def test_a_retry_with_limits_out_of_range_changes_nothing(store: Store) -> None:
    job_id = b.bring_to(store, S.FAILED)
    with pytest.raises(InvalidSpec) as raised:
        b.do(store, lifecycle.retry, job_id, limits=RaisedLimits(max_attempts=0))
    assert [violation.pointer for violation in raised.value.violations] == ["/limits/max_attempts"]
    assert b.state(store, job_id) is S.FAILED


def test_amending_changes_only_what_is_given(store: Store) -> None:
    job_id = b.submit(store, name="first", labels={"a": "1"})
    b.do(store, lifecycle.amend, job_id, Amendment(labels={"b": "2"}, retention={"keep_last": 5}, priority=9, notes="n"))
    row = b.row(store, job_id)
    assert (row.name, row.labels, row.priority, row.notes, row.version) == ("first", {"b": "2"}, 9, "n", 2)
    assert row.retention == {"keep_last": 5, "keep_best": 1}
    with store.read() as tx:
        assert [found.key for found in tx.all(select(job_labels))] == ["b"]
        assert b.told(store, job_id, "amended") == [{"fields": ["labels", "notes", "priority", "retention"]}]


def test_amending_at_another_version_is_refused(store: Store) -> None:
    job_id = b.submit(store)
    with pytest.raises(VersionMismatch):
        b.do(store, lifecycle.amend, job_id, Amendment(name="x"), expected_version=2)
    b.do(store, lifecycle.amend, job_id, Amendment(name="x"), expected_version=1)
    assert b.row(store, job_id).name == "x"


def test_concurrent_amendments_at_one_version_let_one_through(store: Store) -> None:
    job_id = b.submit(store)

    def amend() -> bool:
        try:
            b.do(store, lifecycle.amend, job_id, Amendment(notes="mine"), expected_version=1)
        except VersionMismatch:
            return False
        return True

    assert sum(b.at_once([amend for _ in range(6)])) == 1


def test_removing_frees_every_row_and_leaves_the_debt_of_its_files(store: Store) -> None:
    other = b.submit(store, labels={"a": "1"}, key="other")
    job_id = b.submit(store, labels={"a": "1"}, key="k", priority=9)
    run = b.claimed(store).run
    assert run.job_id == job_id
    b.record(store, run, b.plan(), b.step(1), b.evaluation(1, 0.5), b.checkpoint(1, 0.5))
    b.finish(store, run)
    b.do(store, lifecycle.remove, job_id)
    with store.read() as tx:
        for table in metadata.sorted_tables:
            for column in {"job_id", "id"} & set(table.c.keys()):
                assert tx.all(select(table).where(table.c[column] == job_id)) == []
        assert [found.path for found in tx.all(select(deletions))] == [f"jobs/{job_id}"]
        assert len(tx.all(select(idempotency_keys))) == 1
    assert b.state(store, other) is S.QUEUED
    b.do(store, debts.freed, f"jobs/{job_id}")
    with store.read() as tx:
        assert tx.all(select(deletions)) == []


# --- who is claimed


def test_nothing_queued_is_nothing_claimed(store: Store) -> None:
    assert b.claim(store) is None
    with store.read() as tx:
        assert not claims.has_work(tx, gpus=1)


@pytest.mark.parametrize("state", [state for state in JobState if state is not S.QUEUED])
def test_only_queued_jobs_are_claimed(store: Store, state: JobState) -> None:
    b.bring_to(store, state)
    assert b.claim(store) is None


def test_eight_workers_make_one_claim_of_one_job(store: Store) -> None:
    job_id = b.submit(store)
    claims = b.at_once([lambda n=n: b.claim(store, replace(b.OFFER, worker=f"w{n}")) for n in range(8)])  # type: ignore[misc]
    (won,) = [found for found in claims if found is not None]
    row = b.row(store, job_id)
    assert (row.attempt, row.state, won.run.attempt) == (1, "running", 1)
    assert len(b.told(store, job_id, "claimed")) == 1


def test_eight_workers_claim_eight_jobs_once_each(store: Store) -> None:
    ids = {b.submit(store) for _ in range(8)}

    def until_empty() -> list[str]:
        got = []
        while (found := b.claim(store)) is not None:
            got.append(found.run.job_id)
        return got

    claimed = [job_id for got in b.at_once([until_empty for _ in range(8)]) for job_id in got]
    assert sorted(claimed) == sorted(ids)


def test_priority_comes_before_age(store: Store, clock: FakeClock) -> None:
    ids = {}
    for name, priority in (("old", 5), ("low", 1), ("high", 9), ("young", 5)):
        ids[b.submit(store, priority=priority)] = name
        clock.advance(1)
    assert [ids[b.claimed(store).run.job_id] for _ in range(4)] == ["high", "old", "young", "low"]


def test_an_amended_priority_counts(store: Store, clock: FakeClock) -> None:
    b.submit(store)
    clock.advance(1)
    urgent = b.submit(store)
    b.do(store, lifecycle.amend, urgent, Amendment(priority=9))
    assert b.claimed(store).run.job_id == urgent


def test_owners_take_turns_at_one_priority(store: Store, clock: FakeClock) -> None:
    owners = {}
    for owner in ("ada", "ada", "ada", "bob", "bob"):
        owners[b.submit(store, owner=owner)] = owner
        clock.advance(1)
    assert [owners[b.claimed(store).run.job_id] for _ in range(5)] == ["ada", "bob", "ada", "bob", "ada"]


def test_a_long_queue_of_one_owner_does_not_hide_another(store: Store, clock: FakeClock) -> None:
    with store.write() as tx:
        for _ in range(claims.CLAIM_CANDIDATES + 10):
            submission.submit(tx, Submission(b.spec(), owner="ada"))
    clock.advance(1)
    bobs = b.submit(store, owner="bob")
    b.claimed(store)
    assert b.claimed(store).run.job_id == bobs


@pytest.mark.parametrize(
    ("wanted", "offered", "fits"), [(None, 0, True), (None, 1, True), (0, 0, True), (0, 1, True), (1, 0, False), (1, 1, True)]
)
def test_a_job_is_claimed_by_a_slot_that_has_its_gpus(store: Store, wanted: int | None, offered: int, fits: bool) -> None:
    b.submit(store, resources={"gpus": wanted})
    with store.read() as tx:
        assert claims.has_work(tx, gpus=offered) is fits
    claim = b.claim(store, replace(b.OFFER, gpus=offered))
    assert (claim is not None) is fits
    if claim is not None:
        assert claim.gpus == (offered if wanted is None else wanted)


def test_what_the_first_attempt_fixed_holds_for_the_next(store: Store) -> None:
    run = b.running(store)
    b.record(store, run, b.plan(precision="bf16"))
    b.finish(store, run, Outcome.STOPPED)
    again = b.claimed(store, Offer(worker="other", device="cpu", gpus=0, cpu_threads=16))
    assert (again.cpu_threads, again.precision, again.gpus) == (2, "bf16", 0)
    assert claims.effective_spec(again).precision == "bf16"
    assert b.claim(store, Offer(worker="gpu", device="H100", gpus=1, cpu_threads=4)) is None


def test_a_spec_of_another_release_fails_its_job_and_holds_up_no_other(store: Store, clock: FakeClock) -> None:
    old = b.submit(store, priority=9)
    with store.write() as tx:
        tx.run(update(jobs).where(jobs.c.id == old).values(spec={"data": {"dataset": "digits"}, "gone": 1}))
    good = b.submit(store)
    assert b.claimed(store).run.job_id == good
    row = b.row(store, old)
    assert (row.state, row.reason["code"], row.attempt) == ("failed", "internal", 0)
    assert "/gone: no such field" in row.reason["detail"]


def test_a_claim_never_overwrites_what_it_has_not_seen(store: Store) -> None:
    """The user's change is stored between a claim's look and its update: the claim must not count as if it had not happened."""
    if store.is_sqlite:
        return  # its claim holds the write lock from its start
    job_id = b.submit(store)
    found: list[claims.Claim | None] = []
    claimer = threading.Thread(target=lambda: found.append(b.claim(store)))
    with store.write() as tx:
        lifecycle.amend(tx, job_id, Amendment(notes="mine"))
        claimer.start()
        until(lambda: waits_for_a_lock(store))
    claimer.join(timeout=30)
    assert found == [None]
    assert b.claimed(store).run.job_id == job_id
    row = b.row(store, job_id)
    assert (row.version, row.notes, row.attempt) == (3, "mine", 1)


def waits_for_a_lock(store: Store) -> bool:
    with store.read() as tx:
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        return bool(tx.run(text(waiting)).scalar_one())


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"


# --- fencing

WRITES: dict[str, Callable[[Store, Run], Any]] = {
    "renew": lambda store, run: b.do(store, recording.renew, run, trained_ms=5),
    "state_of": lambda store, run: b.do(store, recording.state_of, run),
    "record": lambda store, run: b.record(store, run, b.plan(), b.step(3), b.checkpoint(3, 0.5)),
    "finish": b.finish,
    "prune": lambda store, run: b.do(store, recording.prune, run),
}


def everything(store: Store) -> dict[str, list[Any]]:
    with store.read() as tx:
        return {table.name: sorted(map(repr, tx.all(select(table)))) for table in metadata.sorted_tables}


def lose(store: Store, clock: FakeClock, run: Run) -> None:
    clock.advance(rows.LEASE_TTL_S + 1)
    b.do(store, sweeps.sweep)


def take_over(store: Store, clock: FakeClock, run: Run) -> None:
    lose(store, clock, run)
    b.claimed(store, replace(b.OFFER, worker="successor"))


def cancel_for_good(store: Store, clock: FakeClock, run: Run) -> None:
    b.do(store, lifecycle.cancel, run.job_id)
    clock.advance(sweeps.CANCEL_GRACE_S + 1)
    b.do(store, sweeps.sweep)


def delete(store: Store, clock: FakeClock, run: Run) -> None:
    cancel_for_good(store, clock, run)
    b.do(store, lifecycle.remove, run.job_id)


@pytest.mark.parametrize("write", sorted(WRITES))
@pytest.mark.parametrize("overtake", [lose, take_over, cancel_for_good, delete])
def test_a_stale_run_writes_nothing(store: Store, clock: FakeClock, write: str, overtake: Callable[[Store, FakeClock, Run], None]) -> None:
    run = b.running(store, limits={"max_attempts": 5})
    b.record(store, run, b.plan(), b.step(1))
    overtake(store, clock, run)
    before = everything(store)
    with pytest.raises(Fenced):
        WRITES[write](store, run)
    assert everything(store) == before


def test_of_two_finishes_at_once_one_counts(store: Store) -> None:
    run = b.running(store)

    def end(outcome: Outcome) -> bool:
        try:
            b.finish(store, run, outcome, ReasonCode.CRASHED if outcome is Outcome.FAILED else None)
        except Fenced:
            return False
        return True

    outcomes = [Outcome.SUCCEEDED, Outcome.FAILED, Outcome.STOPPED] * 2
    assert sum(b.at_once([lambda outcome=outcome: end(outcome) for outcome in outcomes])) == 1  # type: ignore[misc]
    assert len(b.told(store, run.job_id, "attempt_ended")) == 1


def test_a_batch_with_a_message_that_cannot_be_stored_leaves_nothing(store: Store) -> None:
    run = b.running(store)
    before = everything(store)
    bad = protocol.CheckpointSkipped(id="step-not-a-number", path="p", detail="")
    with pytest.raises(ValueError, match="not-a-number"):
        b.record(store, run, b.plan(), b.step(1), bad)
    assert everything(store) == before


# --- leases, back-off and sweeping


@pytest.mark.parametrize(
    ("action", "expected"),
    [(None, S.QUEUED), (lifecycle.pause, S.PAUSED), (lifecycle.cancel, S.CANCELLED)],
    ids=["running", "pausing", "cancelling"],
)
@pytest.mark.parametrize("max_attempts", [1, 3])
def test_a_lapsed_lease_moves_the_job_on(store: Store, clock: FakeClock, action: Any, expected: JobState, max_attempts: int) -> None:
    run = b.running(store, limits={"max_attempts": max_attempts})
    if action is not None:
        b.do(store, action, run.job_id)
    clock.advance(rows.LEASE_TTL_S + 0.001)
    swept = b.do(store, sweeps.sweep)
    expected = S.FAILED if expected is S.QUEUED and max_attempts == 1 else expected
    assert swept.moved == [(run.job_id, expected)]
    row = b.row(store, run.job_id)
    assert (row.state, row.worker, row.lease_until) == (expected, None, None)
    with store.read() as tx:
        (attempt,) = tx.all(select(attempts))
    assert (attempt.outcome, attempt.ended_at, attempt.reason["code"]) == ("lost", clock(), "worker_lost")


def test_a_lease_that_is_renewed_does_not_lapse(store: Store, clock: FakeClock) -> None:
    run = b.running(store)
    for _ in range(10):
        clock.advance(rows.LEASE_TTL_S - 1)
        with store.read() as tx:
            assert not sweeps.needs_sweep(tx)
        assert b.do(store, sweeps.sweep).moved == []
        assert b.do(store, recording.renew, run, trained_ms=1000) is S.RUNNING
    assert b.row(store, run.job_id).trained_ms == 10_000


def test_a_lapsed_lease_that_nobody_took_is_renewed(store: Store, clock: FakeClock) -> None:
    run = b.running(store)
    clock.advance(3600)
    assert b.do(store, recording.renew, run) is S.RUNNING
    assert b.do(store, sweeps.sweep).moved == []


def test_a_silent_cancel_ends_within_its_grace_though_the_lease_is_renewed(store: Store, clock: FakeClock) -> None:
    run = b.running(store)
    b.do(store, lifecycle.cancel, run.job_id)
    clock.advance(sweeps.CANCEL_GRACE_S - 1)
    assert b.do(store, recording.renew, run) is S.CANCELLING
    assert b.do(store, sweeps.sweep).moved == []
    clock.advance(2)
    assert b.do(store, sweeps.sweep).moved == [(run.job_id, S.CANCELLED)]


def test_many_sweepers_at_once_move_each_job_once(store: Store, clock: FakeClock) -> None:
    runs = [b.running(store) for _ in range(12)]
    clock.advance(rows.LEASE_TTL_S + 1)
    swept = b.at_once([lambda: b.do(store, sweeps.sweep) for _ in range(6)])
    moved = [job_id for found in swept for job_id, _ in found.moved]
    assert sorted(moved) == sorted(run.job_id for run in runs)
    for run in runs:
        assert b.row(store, run.job_id).failures == 1


def test_a_sweep_beside_a_renewal_lets_one_of_them_win(store: Store, clock: FakeClock) -> None:
    run = b.running(store)
    clock.advance(rows.LEASE_TTL_S + 1)

    def renewed() -> bool:
        try:
            b.do(store, recording.renew, run)
        except Fenced:
            return False
        return True

    def swept() -> bool:
        return bool(b.do(store, sweeps.sweep).moved)

    kept, lost = b.at_once([renewed, swept])
    assert kept != lost
    assert b.state(store, run.job_id) is (S.RUNNING if kept else S.QUEUED)


def test_a_retried_job_waits_for_its_back_off(store: Store, clock: FakeClock) -> None:
    run = b.running(store)
    assert b.fail(store, run, ReasonCode.OUT_OF_MEMORY_HOST) is S.QUEUED
    assert b.told(store, run.job_id, "state")[-1]["retry_in_s"] == 10.0
    assert b.claim(store) is None
    assert b.do(store, sweeps.sweep).runnable == 0
    clock.advance(10)
    assert b.do(store, sweeps.sweep).runnable == 1
    assert b.claimed(store).run.attempt == 2


def test_resuming_or_retrying_by_hand_skips_the_back_off(store: Store) -> None:
    run = b.running(store)
    b.fail(store, run, ReasonCode.OUT_OF_MEMORY_HOST)
    b.do(store, lifecycle.pause, run.job_id)
    b.do(store, lifecycle.resume, run.job_id)
    assert b.claimed(store).run.attempt == 2


def test_an_interrupted_job_keeps_its_place(store: Store, clock: FakeClock) -> None:
    run = b.running(store)
    clock.advance(1)
    b.submit(store)
    b.finish(store, run, Outcome.STOPPED)
    assert b.claimed(store).run.job_id == run.job_id


def test_failures_bound_the_attempts_and_drains_cost_none(store: Store, clock: FakeClock) -> None:
    job_id = b.submit(store, limits={"max_attempts": 2})
    free = [(Outcome.STOPPED, None), (Outcome.FAILED, ReasonCode.DEVICE_LOST), (Outcome.STOPPED, None)]
    for outcome, code in free:
        b.finish(store, b.claimed(store).run, outcome, code)
        clock.advance(60)
    assert (b.row(store, job_id).attempt, b.row(store, job_id).failures) == (3, 0)
    assert b.fail(store, b.claimed(store).run) is S.QUEUED
    clock.advance(60)
    assert b.fail(store, b.claimed(store).run) is S.FAILED
    row = b.row(store, job_id)
    assert (row.attempt, row.failures, row.reason["code"], row.finished_at) == (5, 2, "crashed", clock())


def test_a_late_success_of_a_cancelled_job_is_discarded(store: Store) -> None:
    run = b.running(store)
    b.do(store, lifecycle.cancel, run.job_id)
    assert b.finish(store, run) is S.CANCELLED
    assert b.row(store, run.job_id).reason is None


def test_a_log_with_nul_bytes_does_not_keep_an_attempt_from_ending(store: Store) -> None:
    run = b.running(store)
    end = End(Outcome.FAILED, replace(b.reason(ReasonCode.DIVERGED), detail="x\0y", evidence={"log_tail": "a\0\udc80"}))
    assert b.do(store, recording.finish, run, end) is S.FAILED
    assert b.row(store, run.job_id).reason["detail"] == "x\ufffdy"


# --- what the trainer said


def shown(store: Store, job_id: str) -> dict[str, Any]:
    with store.read() as tx:
        return queries.get(tx, job_id)


def test_progress_and_metrics_follow_the_trainer(store: Store) -> None:
    run = b.running(store, epochs=2)
    b.record(store, run, protocol.Phase(name="training"), b.plan(epochs=2), b.step(5), b.step(10), b.evaluation(10, 0.5), b.step(15))
    job = shown(store, run.job_id)
    assert job["progress"] == {
        "phase": "training",
        "epoch": 1,
        "epochs": 2,
        "step": 15,
        "steps": 20,
        "fraction": 0.75,
        "eta_s": 1.0,
        "images_per_s": 100.0,
        "ended_early": None,
    }
    assert job["metrics"]["best"] == {"val_top1": 0.5, "val_loss": 0.5}
    assert job["metrics"]["latest"] == {"train_loss": 1 / 15, "images_per_s": 100.0, "val_top1": 0.5, "val_loss": 0.5}
    assert b.told(store, run.job_id, "metrics") == [{"attempt": 1, "from_step": 5, "to_step": 15}]


def test_the_best_is_the_first_of_the_highest_and_never_nan(store: Store) -> None:
    run = b.running(store)
    told = [b.evaluation(10 * n, top1) for n, top1 in enumerate([None, 0.3, 0.6, None, 0.6, 0.5], start=1)]
    b.record(store, run, b.plan(), *told)
    metrics_shown = shown(store, run.job_id)["metrics"]
    assert metrics_shown["best_step"] == 30
    assert metrics_shown["latest"]["val_top1"] == 0.5


def test_numbers_that_are_not_finite_are_stored_as_null(store: Store) -> None:
    run = b.running(store)
    line = b'{"type":"step","step":1,"epoch":0.1,"metrics":{"train_loss":NaN,"lr":-Infinity},"images_per_s":1.0,"eta_s":Infinity}'
    b.record(store, run, b.plan(), protocol.decode_message(line))
    job = shown(store, run.job_id)
    assert job["metrics"]["latest"] == {"train_loss": None, "lr": None, "images_per_s": 1.0}
    assert job["progress"]["eta_s"] is None


def test_points_that_come_twice_are_stored_once(store: Store) -> None:
    """A supervisor whose commit was not confirmed says it all again."""
    run = b.running(store)
    for _ in range(2):
        b.record(store, run, b.plan(), b.step(1), b.step(2))
    with store.read() as tx:
        assert metrics.read(tx, run.job_id, "train_loss").steps == [1, 2]


def interrupted(store: Store, *, resumed_step: int) -> Run:
    """Three epochs and a half of attempt 1, then attempt 2 that goes on from `resumed_step`."""
    run = b.running(store)
    b.record(store, run, b.plan(), *(b.step(n) for n in range(1, 11)), b.evaluation(10, 0.4), b.checkpoint(10, 0.4))
    b.record(store, run, *(b.step(n) for n in range(11, 21)), b.evaluation(20, 0.6), b.checkpoint(20, 0.6))
    b.record(store, run, *(b.step(n) for n in range(21, 31)), b.evaluation(30, 0.8), b.checkpoint(30, 0.8), b.step(31), b.step(35))
    b.finish(store, run, Outcome.STOPPED)
    again = b.claimed(store)
    assert [point.step for point in again.resume] == [30, 20, 10]
    b.record(store, again.run, b.plan(resumed_step=resumed_step))
    return again.run


@pytest.mark.parametrize("resumed_step", [0, 10, 20, 30])
def test_resuming_cuts_history_back_to_the_step_gone_on_from(store: Store, resumed_step: int) -> None:
    run = interrupted(store, resumed_step=resumed_step)
    job = shown(store, run.job_id)
    with store.read() as tx:
        steps = metrics.read(tx, run.job_id, "train_loss").steps
        kept = [found["step"] for found in queries.list_checkpoints(tx, run.job_id)]
    assert steps == list(range(1, resumed_step + 1))
    assert kept == list(range(resumed_step, 0, -10))
    best = {0: {}, 10: 0.4, 20: 0.6, 30: 0.8}[resumed_step]
    assert job["metrics"]["best"].get("val_top1", {}) == best
    assert job["metrics"]["best_step"] == (resumed_step or None)
    assert job["metrics"]["latest"].get("train_loss") == (1 / resumed_step if resumed_step else None)
    assert job["progress"]["step"] == resumed_step
    assert job["attempts"][1]["resumed_from"] == (retention.checkpoint_id(resumed_step) if resumed_step else None)
    assert b.told(store, run.job_id, "resumed")[0]["from_step"] == resumed_step


def test_a_resumed_run_leaves_no_gap_and_no_repeat(store: Store) -> None:
    run = interrupted(store, resumed_step=20)
    b.record(store, run, *(b.step(n) for n in range(21, 41)), b.evaluation(30, 0.7), b.checkpoint(30, 0.7, attempt=2))
    with store.read() as tx:
        assert metrics.read(tx, run.job_id, "train_loss").steps == list(range(1, 41))
        newest = queries.list_checkpoints(tx, run.job_id)[0]
    assert (newest["step"], newest["attempt"], newest["is_best"]) == (30, 2, True)
    assert shown(store, run.job_id)["metrics"]["best"]["val_top1"] == 0.7


def test_a_checkpoint_that_did_not_verify_is_offered_no_more(store: Store) -> None:
    run = interrupted(store, resumed_step=30)
    b.record(store, run, protocol.CheckpointSkipped(id=retention.checkpoint_id(30), path="p", detail="sha256"))
    b.finish(store, run, Outcome.STOPPED)
    assert [point.step for point in b.claimed(store).resume] == [20, 10]


def test_a_test_score_of_an_abandoned_past_is_forgotten(store: Store) -> None:
    run = b.running(store)
    scored = protocol.Evaluation(step=10, epoch=1, split="test", metrics={"test_top1": 0.3})
    b.record(store, run, b.plan(), b.evaluation(5, 0.5), b.checkpoint(5, 0.5), scored)
    assert shown(store, run.job_id)["metrics"]["best"]["test_top1"] == 0.3
    b.finish(store, run, Outcome.STOPPED)
    again = b.claimed(store).run
    b.record(store, again, b.plan(resumed_step=5))
    found = shown(store, run.job_id)["metrics"]
    assert (found["best"], found["best_step"]) == ({"val_top1": 0.5, "val_loss": 0.5}, 5)
    assert "test_top1" not in found["latest"]


# --- retention


def stored_steps(store: Store, job_id: str) -> list[int]:
    with store.read() as tx:
        return [row.step for row in tx.all(select(checkpoints.c.step).where(checkpoints.c.job_id == job_id).order_by(checkpoints.c.step))]


def mark(store: Store, job_id: str, step: int, **values: bool) -> None:
    with store.write() as tx:
        tx.run(update(checkpoints).where(checkpoints.c.job_id == job_id, checkpoints.c.step == step).values(**values))


def test_retention_keeps_the_newest_and_the_best(store: Store) -> None:
    run = b.running(store, checkpoint={"keep_last": 2, "keep_best": 1})
    b.record(store, run, b.plan(), *(b.checkpoint(10 * n, top1) for n, top1 in enumerate([0.1, 0.9, 0.3, 0.2, 0.4], start=1)))
    gone = b.do(store, recording.prune, run)
    assert gone == [f"checkpoints/a1/{retention.checkpoint_id(step)}" for step in (30, 10)]
    assert stored_steps(store, run.job_id) == [20, 40, 50]
    assert b.do(store, recording.prune, run) == []


def test_retention_never_lets_go_what_is_pinned(store: Store) -> None:
    run = b.running(store, checkpoint={"keep_last": 1, "keep_best": 1})
    b.record(store, run, b.plan(), b.checkpoint(10, 0.1), b.checkpoint(20, 0.2), b.checkpoint(30, 0.3))
    mark(store, run.job_id, 10, pinned=True)
    b.do(store, recording.prune, run)
    assert stored_steps(store, run.job_id) == [10, 30]


def test_a_broken_checkpoint_does_not_count_as_the_newest_or_the_best(store: Store) -> None:
    run = b.running(store, checkpoint={"keep_last": 1, "keep_best": 1})
    b.record(store, run, b.plan(), b.checkpoint(10, 0.1), b.checkpoint(20, 0.2), b.checkpoint(30, 0.9))
    mark(store, run.job_id, 30, broken=True)
    b.do(store, recording.prune, run)
    assert stored_steps(store, run.job_id) == [20]


def test_the_last_checkpoints_stay_when_all_are_broken(store: Store) -> None:
    run = b.running(store)
    b.record(store, run, b.plan(), b.checkpoint(10, 0.1))
    mark(store, run.job_id, 10, broken=True)
    assert b.do(store, recording.prune, run) == []


def test_retention_set_to_nothing_still_keeps_the_newest_and_the_best(store: Store) -> None:
    run = b.running(store)
    b.record(store, run, b.plan(), b.checkpoint(10, 0.9), b.checkpoint(20, 0.2), b.checkpoint(30, 0.3))
    b.do(store, lifecycle.amend, run.job_id, Amendment(retention={"keep_last": 0, "keep_best": 0}))
    b.do(store, recording.prune, run)
    assert stored_steps(store, run.job_id) == [10, 30]


# --- events


def test_events_are_numbered_without_a_gap_by_many_writers_at_once(store: Store) -> None:
    run = b.running(store)
    b.record(store, run, b.plan())

    def write(number: int) -> None:
        for turn in range(5):
            if number % 2:
                b.do(store, lifecycle.amend, run.job_id, Amendment(notes=f"{number}-{turn}"))
            else:
                b.record(store, run, protocol.Note(detail=f"{number}-{turn}"), protocol.Note(detail="two at once"))

    b.at_once([lambda n=n: write(n) for n in range(6)])  # type: ignore[misc]
    numbers = b.event_numbers(store, run.job_id)
    assert numbers == list(range(1, len(numbers) + 1))
    assert numbers[-1] == b.row(store, run.job_id).seq
    assert len(b.told(store, run.job_id, "note")) == 30
    assert b.row(store, run.job_id).version == 2 + 15


def test_every_event_is_json_of_a_known_type(store: Store) -> None:
    run = interrupted(store, resumed_step=10)
    b.fail(store, run, ReasonCode.DIVERGED)
    with store.read() as tx:
        kinds = {row.type for row in tx.all(select(events.c.type))}
    assert kinds == {"created", "claimed", "state", "plan", "metrics", "evaluation", "checkpoint", "attempt_ended", "resumed"}


def test_the_claims_spec_is_the_stored_one(store: Store) -> None:
    overrides: dict[str, Any] = {"loss": {"alpha": 0.25}, "optimizer": {"name": "adamw", "lr": 1e-3}, "limits": {"max_seconds": 1e9}}
    b.submit(store, **overrides)
    assert b.claimed(store).spec == JobSpec.model_validate(b.spec(**overrides).model_dump(mode="json"))


# --- a roll-back, artifacts, an early end


def rolled_back(to_step: int, *, from_step: int = 35) -> protocol.RolledBack:
    return protocol.RolledBack(
        from_step=from_step, to_step=to_step, checkpoint=retention.checkpoint_id(to_step), lr_scale=0.5, detail="the loss is not finite"
    )


def steps_of(store: Store, job_id: str, name: str = "train_loss") -> list[int]:
    with store.read() as tx:
        return metrics.read(tx, job_id, name).steps


def diverged(store: Store) -> Run:
    """A run at step 35, the best checkpoint at 30, the one before it at 20."""
    run = b.running(store)
    b.record(store, run, b.plan())
    for epoch, top1 in ((10, 0.3), (20, 0.4), (30, 0.9)):
        b.record(store, run, *(b.step(epoch + i) for i in range(-9, 1)), b.evaluation(epoch, top1), b.checkpoint(epoch, top1))
    b.record(store, run, *(b.step(i) for i in range(31, 34)))
    return run


def test_a_roll_back_cuts_metrics_and_checkpoints_back_and_says_so(store: Store) -> None:
    run = diverged(store)
    b.record(store, run, b.step(34), b.step(35, 99.0), rolled_back(20))
    job = b.row(store, run.job_id)
    assert steps_of(store, run.job_id) == list(range(1, 21))
    assert steps_of(store, run.job_id, "val_top1") == [10, 20]
    assert stored_steps(store, run.job_id) == [10, 20]
    assert (job.progress["step"], job.progress["epoch"], job.progress["fraction"]) == (20, 2, 0.1)
    assert (job.best_step, job.best["val_top1"], job.latest["val_top1"]) == (20, 0.4, 0.4)
    expected = {"from_step": 35, "to_step": 20, "checkpoint": "step-00000020", "lr_scale": 0.5, "detail": "the loss is not finite"}
    assert b.told(store, run.job_id, "rolled_back") == [{**expected, "attempt": 1}]


def test_points_before_and_after_a_roll_back_in_one_batch_leave_no_gap_and_no_repeat(store: Store) -> None:
    run = b.running(store)
    b.record(store, run, b.plan(), *(b.step(i) for i in range(1, 36)), rolled_back(20), *(b.step(i, 0.5) for i in range(21, 31)))
    assert steps_of(store, run.job_id) == list(range(1, 31))
    with store.read() as tx:
        assert metrics.read(tx, run.job_id, "train_loss").values[20:] == [0.5] * 10
    spans = [(told["from_step"], told["to_step"]) for told in b.told(store, run.job_id, "metrics")]
    assert spans == [(1, 20), (21, 30)]


def test_a_step_written_again_after_a_roll_back_is_a_checkpoint_again(store: Store) -> None:
    run = diverged(store)
    b.record(store, run, rolled_back(20))
    assert b.do(store, recording.prune, run) == []  # step 30's directory is not freed: it may be written again just now
    b.record(store, run, b.checkpoint(30, 0.5))
    assert stored_steps(store, run.job_id) == [10, 20, 30]
    with store.read() as tx:
        assert queries.find_checkpoint(tx, run.job_id, "best").id == "step-00000030"


def test_a_pinned_checkpoint_outlives_a_roll_back_but_is_not_gone_on_from(store: Store) -> None:
    run = diverged(store)
    with store.write() as tx:
        tx.run(update(checkpoints).where(checkpoints.c.step == 30).values(pinned=True))
    b.record(store, run, rolled_back(20))
    assert stored_steps(store, run.job_id) == [10, 20, 30]
    b.finish(store, run, Outcome.STOPPED)
    assert [point.step for point in b.claimed(store).resume] == [20, 10]


def test_a_stale_attempt_rolls_nothing_back(store: Store, clock: FakeClock) -> None:
    run = diverged(store)
    clock.advance(31)
    b.do(store, sweeps.sweep)
    b.claimed(store)
    with pytest.raises(Fenced):
        b.record(store, run, rolled_back(10))
    assert stored_steps(store, run.job_id) == [10, 20, 30]


def artifact(name: str = "labels.json", *, path: str = "artifacts/labels.json", size: int = 7) -> protocol.ArtifactWritten:
    return protocol.ArtifactWritten(name=name, path=path, media_type="application/json", bytes=size, sha256=f"{size:064x}")


def test_an_artifact_is_listed_and_a_later_one_of_its_name_takes_its_place(store: Store) -> None:
    run = b.running(store)
    b.record(store, run, artifact("b.json", path="artifacts/a1/b.json"), artifact())
    b.finish(store, run, Outcome.STOPPED)
    again = b.claimed(store).run
    b.record(store, again, artifact("b.json", path="artifacts/a2/b.json", size=9), artifact())
    with store.read() as tx:
        found = queries.list_artifacts(tx, run.job_id)
        stored = queries.find_artifact(tx, run.job_id, "b.json")
        owed = [row.path for row in tx.all(select(deletions.c.path))]
    assert [(one["name"], one["attempt"], one["bytes"]) for one in found] == [("b.json", 2, 9), ("labels.json", 2, 7)]
    assert stored.path == "artifacts/a2/b.json"
    assert owed == [f"jobs/{run.job_id}/artifacts/a1/b.json"]  # the file that no row names any more, and only that one
    assert [told["name"] for told in b.told(store, run.job_id, "artifact")] == ["b.json", "labels.json"] * 2


def test_an_early_end_is_told_and_the_fraction_stays_what_was_trained(store: Store) -> None:
    run = b.running(store)
    b.record(store, run, b.plan(), b.step(50), protocol.Done(outcome="succeeded", detail="no better val_top1 for 3 epochs"))
    assert b.finish(store, run) is S.SUCCEEDED
    progress = b.row(store, run.job_id).progress
    assert (progress["ended_early"], progress["fraction"]) == ("no better val_top1 for 3 epochs", 0.25)
    assert b.told(store, run.job_id, "note") == [{"detail": "no better val_top1 for 3 epochs", "attempt": 1}]


def test_an_end_after_the_last_epoch_or_by_order_is_no_early_one(store: Store) -> None:
    run = b.running(store)
    b.record(store, run, b.plan(), b.step(200), protocol.Done(outcome="succeeded"))
    assert b.row(store, run.job_id).progress["ended_early"] is None
    b.record(store, run, protocol.Done(outcome="stopped", detail="told to"))
    assert b.row(store, run.job_id).progress["ended_early"] is None


# --- weights of another job to begin with


def trained(store: Store, *, owner: str = rows.LOCAL_OWNER) -> Run:
    """A run whose best checkpoint is step 10 and whose newest is step 30."""
    run = b.running(store, owner=owner)
    b.record(store, run, b.plan(), b.checkpoint(10, 0.9), b.checkpoint(20, 0.2), b.checkpoint(30, 0.3))
    return run


@pytest.mark.parametrize(("asked", "step"), [("", 10), ("/best", 10), ("/latest", 30), ("/step-00000020", 20)])
def test_init_from_is_fixed_to_a_step_when_the_job_is_stored(store: Store, asked: str, step: int) -> None:
    run = trained(store)
    job_id = b.submit(store, model={"init_from": run.job_id + asked})
    assert b.row(store, job_id).spec["model"]["init_from"] == f"{run.job_id}/{retention.checkpoint_id(step)}"
    origin = b.claimed(store).init_from
    assert origin == claims.Origin(f"jobs/{run.job_id}/checkpoints/a1/{retention.checkpoint_id(step)}/model.safetensors", "0" * 64)


def test_a_checkpoint_that_a_job_begins_with_is_kept_from_retention(store: Store) -> None:
    run = trained(store)
    job_id = b.submit(store, model={"init_from": f"{run.job_id}/step-00000020"})
    b.do(store, lifecycle.amend, run.job_id, Amendment(retention={"keep_last": 1, "keep_best": 1}))
    assert b.do(store, recording.prune, run) == []
    assert b.told(store, run.job_id, "checkpoint_pinned") == [{"id": "step-00000020", "pinned": True, "by": job_id}]


@pytest.mark.parametrize(
    ("asked", "code"),
    [("job_01KAQZ5V3N8T4W6Y7C9E1G2H3J/best", "not_found"), ("{own}/best", "no_checkpoint"), ("{own}/step-00000001", "not_found")],
)
def test_what_cannot_be_begun_with_is_refused_and_takes_no_other_with_it(store: Store, asked: str, code: str) -> None:
    own = b.submit(store)
    spec = b.spec(model={"init_from": asked.format(own=own)})
    group = [Submission(b.spec()), Submission(spec, idempotency_key="k", body_sha256="1"), Submission(b.spec())]
    first, refused, last = b.do(store, submission.submit_all, group)
    assert isinstance(first, submission.Submitted)
    assert isinstance(last, submission.Submitted)
    assert isinstance(refused, InvalidSpec)
    assert [(one.pointer, one.code) for one in refused.violations] == [("/model/init_from", code)]
    # its key stands for nothing, so it may come again
    assert not b.do(store, submission.submit, Submission(b.spec(), idempotency_key="k", body_sha256="2")).replayed


def test_another_owners_job_is_not_there_to_begin_with(store: Store) -> None:
    run = trained(store, owner="ann")
    with pytest.raises(InvalidSpec, match="no job"):
        b.submit(store, owner="bob", model={"init_from": run.job_id})
    assert b.submit(store, owner="ann", model={"init_from": run.job_id})


def test_a_job_whose_beginning_was_deleted_fails_and_names_it(store: Store) -> None:
    run = trained(store)
    job_id = b.submit(store, model={"init_from": run.job_id})
    b.finish(store, run)
    b.do(store, lifecycle.remove, run.job_id)
    other = b.submit(store)
    assert b.claimed(store).run.job_id == other  # it holds up nobody
    job = b.row(store, job_id)
    assert (job.state, job.reason["code"], job.attempt) == (S.FAILED, "data_missing", 0)
    assert f"{run.job_id}/step-00000010" in job.reason["detail"]


def test_a_job_with_weights_of_its_own_goes_on_without_its_beginning(store: Store) -> None:
    origin = trained(store)
    b.finish(store, origin)
    b.submit(store, model={"init_from": origin.job_id})
    run = b.claimed(store).run
    b.record(store, run, b.plan(), b.checkpoint(10, 0.5))
    b.finish(store, run, Outcome.STOPPED)
    b.do(store, lifecycle.remove, origin.job_id)
    again = b.claimed(store)
    assert (again.run.job_id, again.init_from, [point.step for point in again.resume]) == (run.job_id, None, [10])


def test_submissions_without_init_from_ask_nothing_more(sqlite_store: Store) -> None:
    asked: list[str] = []
    event.listen(sqlite_store.engine, "before_cursor_execute", lambda *said: asked.append(said[2]))
    b.do(sqlite_store, submission.submit_all, [Submission(b.spec()) for _ in range(10)])
    assert [statement.split()[0] for statement in asked] == ["BEGIN", "SELECT", "INSERT", "INSERT"]  # one look at the quotas of all


def test_pinning_twice_is_no_error_and_one_event(store: Store) -> None:
    run = trained(store)
    for pinned in (True, True, False, False):
        assert b.do(store, retention.pin, run.job_id, "latest", pinned=pinned) == "step-00000030"
    assert [told["pinned"] for told in b.told(store, run.job_id, "checkpoint_pinned")] == [True, False]


def test_a_pin_beside_a_prune_keeps_the_file_or_finds_no_checkpoint(store: Store) -> None:
    for _ in range(5):
        run = trained(store)
        b.do(store, lifecycle.amend, run.job_id, Amendment(retention={"keep_last": 1, "keep_best": 1}))

        def pin(run: Run = run) -> list[str]:
            try:
                return [b.do(store, retention.pin, run.job_id, "step-00000020")]
            except CheckpointNotFound:
                return []

        def prune(run: Run = run) -> list[str]:
            return [path.rpartition("/")[2] for path in b.do(store, recording.prune, run)]

        pinned, gone = b.at_once([pin, prune])
        assert pinned + gone == ["step-00000020"]
