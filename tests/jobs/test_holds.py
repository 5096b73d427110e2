"""A job that pauses itself at an epoch: how it gets there, who may send it on, and what wins when others want something else."""

from __future__ import annotations

import pytest

from powergrad.jobs import lifecycle, queries, rows, submission, sweeps
from powergrad.jobs.errors import Fenced, IllegalMove
from powergrad.jobs.rows import Run
from powergrad.jobs.states import JobState, Outcome, ReasonCode
from powergrad.jobs.store import Store
from tests.jobs import builders as b
from tests.stores import FakeClock

S = JobState


def submitted(store: Store, hold_epoch: int | None) -> str:
    return b.do(store, submission.submit, submission.Submission(b.spec(epochs=3), hold_epoch=hold_epoch)).job_id


def trained(store: Store, *, hold_epoch: int | None = 1) -> Run:
    """A job claimed and trained for an epoch, its checkpoint on record."""
    submitted(store, hold_epoch)
    run = b.claimed(store).run
    number = b.STEPS_PER_EPOCH
    b.record(store, run, b.plan(epochs=3), b.step(number), b.evaluation(number, 0.5), b.checkpoint(number, 0.5))
    return run


def go_on(store: Store, job_id: str, hold_epoch: int | None) -> None:
    with store.write() as tx:
        rows.go_on(tx, rows.locked(tx, job_id), hold_epoch)


def test_a_held_job_is_paused_at_no_cost_and_says_where(store: Store) -> None:
    run = trained(store)
    assert b.finish(store, run, Outcome.HELD) is S.PAUSED
    row = b.row(store, run.job_id)
    assert (row.state, row.failures, row.hold_epoch, row.worker, row.finished_at, row.reason) == ("paused", 0, 1, None, None, None)
    assert b.told(store, run.job_id, "state")[-1] == {"from": "running", "to": "paused", "attempt": 1, "reason": "held at epoch 1"}
    assert b.told(store, run.job_id, "attempt_ended")[-1]["outcome"] == "held"
    assert b.claim(store) is None


def test_a_held_job_says_that_its_search_holds_it(store: Store) -> None:
    run = trained(store)
    b.finish(store, run, Outcome.HELD)
    with store.read() as tx:
        shown = queries.get(tx, run.job_id)
        (line,) = queries.summaries(tx, queries.Filter(), limit=2).data
    told = "its search, which held it after 1 epoch and sends on the best there"
    assert shown["queue"] == {"position": None, "waiting_for": told}
    assert line["waiting_for"] == told
    assert queries.etag(shown) == f'"{shown["version"]}-{shown["revision"]}"'


def test_a_job_that_its_user_has_paused_waits_for_nothing(store: Store) -> None:
    """Neither one without a hold nor one that has not come to its."""
    for job_id in (submitted(store, None), submitted(store, 2)):
        b.do(store, lifecycle.pause, job_id)
        with store.read() as tx:
            assert queries.get(tx, job_id)["queue"]["waiting_for"] is None


def test_a_claim_carries_the_hold(store: Store) -> None:
    submitted(store, 2)
    assert b.claimed(store).hold_epoch == 2
    submitted(store, None)
    assert b.claimed(store).hold_epoch is None


def test_a_job_sent_on_holds_at_the_next_epoch_or_at_its_end_only(store: Store) -> None:
    run = trained(store)
    b.finish(store, run, Outcome.HELD)
    go_on(store, run.job_id, 2)
    claim = b.claimed(store)
    assert (claim.run.job_id, claim.hold_epoch, claim.resume[0].step) == (run.job_id, 2, b.STEPS_PER_EPOCH)
    b.finish(store, claim.run, Outcome.HELD)
    go_on(store, run.job_id, None)
    assert b.claimed(store).hold_epoch is None


def test_a_job_sent_on_comes_before_those_that_have_not_begun(store: Store, clock: FakeClock) -> None:
    run = trained(store)
    clock.advance(1)
    submitted(store, 1)
    b.finish(store, run, Outcome.HELD)
    clock.advance(1)
    go_on(store, run.job_id, 2)
    assert b.claimed(store).run.job_id == run.job_id


@pytest.mark.parametrize("state", [state for state in JobState if state is not S.PAUSED])
def test_only_a_paused_job_is_sent_on(store: Store, state: JobState) -> None:
    job_id = b.bring_to(store, state)
    before = b.row(store, job_id)
    with pytest.raises(IllegalMove, match=f"cannot resume a job that is {state}"):
        go_on(store, job_id, 2)
    assert b.row(store, job_id) == before


def test_a_users_resume_takes_the_hold_off(store: Store) -> None:
    run = trained(store)
    b.finish(store, run, Outcome.HELD)
    b.do(store, lifecycle.resume, run.job_id)
    assert b.claimed(store).hold_epoch is None


@pytest.mark.parametrize("ended", [S.FAILED, S.CANCELLED])
def test_a_retry_keeps_no_hold(store: Store, ended: JobState) -> None:
    run = trained(store)
    if ended is S.FAILED:
        b.fail(store, run, ReasonCode.DIVERGED)
    else:
        b.do(store, lifecycle.cancel, run.job_id)
        b.finish(store, run, Outcome.STOPPED)
    assert b.do(store, lifecycle.retry, run.job_id) is S.QUEUED
    assert b.claimed(store).hold_epoch is None


def test_a_cancel_wins_over_the_hold(store: Store) -> None:
    run = trained(store)
    b.do(store, lifecycle.cancel, run.job_id)
    assert b.finish(store, run, Outcome.HELD) is S.CANCELLED
    assert "reason" not in b.told(store, run.job_id, "state")[-1]


def test_a_pause_that_meets_the_hold_is_one_pause(store: Store) -> None:
    run = trained(store)
    b.do(store, lifecycle.pause, run.job_id)
    assert b.finish(store, run, Outcome.HELD) is S.PAUSED
    assert b.row(store, run.job_id).hold_epoch == 1


def test_a_drain_before_the_hold_keeps_it(store: Store) -> None:
    run = trained(store, hold_epoch=2)
    assert b.finish(store, run, Outcome.STOPPED) is S.QUEUED
    assert b.claimed(store).hold_epoch == 2


@pytest.mark.parametrize("how", ["crashed", "lost"])
def test_an_attempt_that_ends_between_its_checkpoint_and_its_word_is_followed_by_one_that_holds(
    store: Store, clock: FakeClock, how: str
) -> None:
    run = trained(store)
    if how == "crashed":
        b.fail(store, run)
    else:
        clock.advance(rows.LEASE_TTL_S + 1)
        b.do(store, sweeps.sweep)
    clock.advance(60)
    claim = b.claimed(store)
    assert (claim.hold_epoch, claim.resume[0].step) == (1, b.STEPS_PER_EPOCH)
    b.record(store, claim.run, b.plan(epochs=3, resumed_step=b.STEPS_PER_EPOCH))
    assert b.finish(store, claim.run, Outcome.HELD) is S.PAUSED
    assert b.row(store, run.job_id).failures == 1, "of the attempt before"


def test_of_a_hold_and_a_cancel_at_once_the_job_is_cancelled(store: Store) -> None:
    """The cancel finds it running, or paused already."""
    run = trained(store)
    b.at_once([lambda: b.finish(store, run, Outcome.HELD), lambda: b.do(store, lifecycle.cancel, run.job_id)])
    assert b.state(store, run.job_id) is S.CANCELLED


def test_of_a_hold_and_a_pause_at_once_the_job_is_paused(store: Store) -> None:
    run = trained(store)
    b.at_once([lambda: b.finish(store, run, Outcome.HELD), lambda: b.do(store, lifecycle.pause, run.job_id)])
    assert b.state(store, run.job_id) is S.PAUSED


def test_a_stale_attempt_holds_nothing(store: Store, clock: FakeClock) -> None:
    run = trained(store)
    clock.advance(rows.LEASE_TTL_S + 1)
    b.do(store, sweeps.sweep)
    with pytest.raises(Fenced):
        b.finish(store, run, Outcome.HELD)
    assert b.state(store, run.job_id) is S.QUEUED
