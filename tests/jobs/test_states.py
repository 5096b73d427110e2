"""The tables of the state machine."""

from __future__ import annotations

import pytest

from powergrad.jobs.states import MAX_BACKOFF_S, MOVES, OWNED, RETRY, TERMINAL, End, JobState, NextMove, Outcome, ReasonCode, next_move
from tests.jobs.builders import reason


def move(state: JobState, outcome: Outcome, code: ReasonCode | None = None, *, failures: int = 0, max_attempts: int = 3) -> NextMove:
    return next_move(state, End(outcome, None if code is None else reason(code)), failures=failures, max_attempts=max_attempts)


def test_every_state_has_its_moves_and_every_reason_its_rule() -> None:
    assert set(MOVES) == set(JobState)
    assert set(RETRY) == set(ReasonCode)


def test_terminal_states_leave_only_to_the_queue() -> None:
    assert {state for terminal in TERMINAL for state in MOVES[terminal]} == {JobState.QUEUED}


@pytest.mark.parametrize("state", sorted(OWNED))
@pytest.mark.parametrize("outcome", list(Outcome))
@pytest.mark.parametrize("failures", [0, 1, 2, 5])
def test_the_end_of_an_attempt_makes_a_legal_move(state: JobState, outcome: Outcome, failures: int) -> None:
    codes: list[ReasonCode | None] = list(ReasonCode) if outcome in (Outcome.FAILED, Outcome.LOST) else [None]
    for code in codes:
        found = move(state, outcome, code, failures=failures)
        assert found.state in MOVES[state]
        assert found.failures - failures in (0, 1)
        assert found.keeps_reason == (found.state is JobState.FAILED)


@pytest.mark.parametrize(
    ("state", "outcome", "code", "failures", "expected"),
    [
        (JobState.RUNNING, Outcome.SUCCEEDED, None, 0, JobState.SUCCEEDED),
        (JobState.PAUSING, Outcome.SUCCEEDED, None, 0, JobState.SUCCEEDED),
        (JobState.CANCELLING, Outcome.SUCCEEDED, None, 0, JobState.CANCELLED),
        (JobState.RUNNING, Outcome.STOPPED, None, 0, JobState.QUEUED),
        (JobState.PAUSING, Outcome.STOPPED, None, 0, JobState.PAUSED),
        (JobState.CANCELLING, Outcome.STOPPED, None, 0, JobState.CANCELLED),
        (JobState.RUNNING, Outcome.HELD, None, 2, JobState.PAUSED),
        (JobState.PAUSING, Outcome.HELD, None, 0, JobState.PAUSED),
        (JobState.CANCELLING, Outcome.HELD, None, 0, JobState.CANCELLED),
        (JobState.RUNNING, Outcome.LOST, ReasonCode.WORKER_LOST, 0, JobState.QUEUED),
        (JobState.RUNNING, Outcome.LOST, ReasonCode.WORKER_LOST, 2, JobState.FAILED),
        (JobState.PAUSING, Outcome.LOST, ReasonCode.WORKER_LOST, 2, JobState.PAUSED),
        (JobState.RUNNING, Outcome.FAILED, ReasonCode.CRASHED, 1, JobState.QUEUED),
        (JobState.RUNNING, Outcome.FAILED, ReasonCode.CRASHED, 2, JobState.FAILED),
        (JobState.PAUSING, Outcome.FAILED, ReasonCode.CRASHED, 1, JobState.PAUSED),
        (JobState.PAUSING, Outcome.FAILED, ReasonCode.DIVERGED, 0, JobState.FAILED),
        (JobState.RUNNING, Outcome.FAILED, ReasonCode.DEVICE_LOST, 2, JobState.QUEUED),
    ],
)
def test_where_a_job_goes(state: JobState, outcome: Outcome, code: ReasonCode | None, failures: int, expected: JobState) -> None:
    assert move(state, outcome, code, failures=failures).state is expected


@pytest.mark.parametrize(
    ("outcome", "code", "cost"),
    [
        (Outcome.STOPPED, None, 0),
        (Outcome.HELD, None, 0),
        (Outcome.SUCCEEDED, None, 0),
        (Outcome.FAILED, ReasonCode.DEVICE_LOST, 0),
        (Outcome.FAILED, ReasonCode.CRASHED, 1),
        (Outcome.LOST, ReasonCode.WORKER_LOST, 1),
    ],
)
def test_only_the_jobs_own_fault_and_a_lost_worker_cost_an_attempt(outcome: Outcome, code: ReasonCode | None, cost: int) -> None:
    assert move(JobState.RUNNING, outcome, code).failures == cost


def test_the_back_off_doubles_up_to_its_limit() -> None:
    waits = [move(JobState.RUNNING, Outcome.FAILED, ReasonCode.OUT_OF_MEMORY_GPU, failures=n, max_attempts=100).backoff_s for n in range(6)]
    assert waits == [30.0, 60.0, 120.0, 240.0, MAX_BACKOFF_S, MAX_BACKOFF_S]
