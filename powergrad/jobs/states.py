"""The state machine of a job, in tables: which moves are legal, how an attempt's end moves the job, what is tried again.

Pure: no clock, no database. `rows`, `lifecycle` and `claims` decide here and then act.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


S = JobState

MOVES: dict[JobState, frozenset[JobState]] = {
    S.QUEUED: frozenset({S.RUNNING, S.PAUSED, S.CANCELLING, S.FAILED}),
    S.RUNNING: frozenset({S.QUEUED, S.SUCCEEDED, S.FAILED, S.PAUSING, S.PAUSED, S.CANCELLING}),
    S.PAUSING: frozenset({S.PAUSED, S.SUCCEEDED, S.FAILED, S.CANCELLING}),
    S.PAUSED: frozenset({S.QUEUED, S.CANCELLING}),
    S.CANCELLING: frozenset({S.CANCELLED}),
    # terminal states leave only by an explicit retry
    S.SUCCEEDED: frozenset(),
    S.FAILED: frozenset({S.QUEUED}),
    S.CANCELLED: frozenset({S.QUEUED}),
}
TERMINAL = frozenset({S.SUCCEEDED, S.FAILED, S.CANCELLED})
OWNED = frozenset({S.RUNNING, S.PAUSING, S.CANCELLING})
"""States in which an attempt holds a lease."""


class Outcome(StrEnum):
    """How one attempt ended."""

    SUCCEEDED = "succeeded"
    STOPPED = "stopped"  # told to: checkpointed for a pause or a drain, or killed for a cancel
    HELD = "held"  # checkpointed at the epoch where the job pauses itself
    FAILED = "failed"
    LOST = "lost"  # its lease lapsed


class ReasonCode(StrEnum):
    """The closed set of causes of a failed attempt."""

    OUT_OF_MEMORY_GPU = "out_of_memory_gpu"
    OUT_OF_MEMORY_HOST = "out_of_memory_host"
    DIVERGED = "diverged"
    DATA_MISSING = "data_missing"
    DATA_UNREADABLE = "data_unreadable"
    WORKER_LOST = "worker_lost"
    STALLED = "stalled"
    DEADLINE = "deadline"
    CRASHED = "crashed"
    STORAGE = "storage"
    DEVICE_LOST = "device_lost"
    INTERNAL = "internal"


@dataclass(frozen=True)
class RetryRule:
    """retried: another attempt is made while failures < max_attempts. backoff_s: wait before it, doubled each time up to 5 min.
    costs: the attempt counts as a failure."""

    retried: bool
    backoff_s: float = 0.0
    costs: bool = True


RETRY: dict[ReasonCode, RetryRule] = {
    ReasonCode.OUT_OF_MEMORY_GPU: RetryRule(retried=True, backoff_s=30.0),  # another program may have held the memory
    ReasonCode.OUT_OF_MEMORY_HOST: RetryRule(retried=True, backoff_s=10.0),
    ReasonCode.DIVERGED: RetryRule(retried=False),  # the same bits diverge again
    ReasonCode.DATA_MISSING: RetryRule(retried=False),
    ReasonCode.DATA_UNREADABLE: RetryRule(retried=False),
    ReasonCode.WORKER_LOST: RetryRule(retried=True),
    ReasonCode.STALLED: RetryRule(retried=True, backoff_s=1.0),
    ReasonCode.DEADLINE: RetryRule(retried=False),
    ReasonCode.CRASHED: RetryRule(retried=True, backoff_s=1.0),
    ReasonCode.STORAGE: RetryRule(retried=True, backoff_s=30.0),
    ReasonCode.DEVICE_LOST: RetryRule(retried=True, backoff_s=5.0, costs=False),
    ReasonCode.INTERNAL: RetryRule(retried=True, backoff_s=5.0),
}
MAX_BACKOFF_S = 300.0


@dataclass(frozen=True)
class Reason:
    """Why an attempt or a job failed. evidence: exit_code, signal, traceback, log_tail. hint: what to try."""

    code: ReasonCode
    detail: str
    hint: str
    evidence: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        return {"code": self.code.value, "detail": self.detail, "hint": self.hint, "evidence": self.evidence}


@dataclass(frozen=True)
class End:
    """The end of an attempt as its supervisor (or the sweeper) saw it. reason: for FAILED and LOST."""

    outcome: Outcome
    reason: Reason | None = None


@dataclass(frozen=True)
class NextMove:
    """Where the job goes when its attempt has ended. failures: the new count. backoff_s: how long it stays unclaimable."""

    state: JobState
    failures: int
    backoff_s: float = 0.0
    keeps_reason: bool = False


def next_move(state: JobState, end: End, *, failures: int, max_attempts: int) -> NextMove:
    """The move a job in `state` makes when its attempt ends with `end`. `state` is one of OWNED."""
    if state is S.CANCELLING:
        return NextMove(S.CANCELLED, failures)  # a late success is discarded too
    if end.outcome is Outcome.SUCCEEDED:
        return NextMove(S.SUCCEEDED, failures)
    if end.outcome is Outcome.HELD:
        return NextMove(S.PAUSED, failures)
    if end.outcome is Outcome.STOPPED:
        return NextMove(S.PAUSED if state is S.PAUSING else S.QUEUED, failures)
    assert end.reason is not None, "a failed attempt has a reason"
    rule = RETRY[end.reason.code]
    failures += rule.costs
    if state is S.PAUSING and end.outcome is Outcome.LOST:
        return NextMove(S.PAUSED, failures)  # the pause was asked for before the worker was lost
    if not rule.retried or failures >= max_attempts:
        return NextMove(S.FAILED, failures, keeps_reason=True)
    if state is S.PAUSING:
        return NextMove(S.PAUSED, failures)
    backoff_s = min(MAX_BACKOFF_S, rule.backoff_s * 2 ** max(0, failures - 1))
    return NextMove(S.QUEUED, failures, backoff_s)
