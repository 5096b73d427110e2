"""Every way an attempt can end, and the reason it is given."""

from __future__ import annotations

import errno
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from powergrad import protocol
from powergrad.jobs.states import Outcome, ReasonCode
from powergrad.process import DEADLINE_PASSED, ORPHANED
from worker.ends import Ending, classify, count_oom_kills, log_tail, not_started, signal_name
from worker.template import LOST_EXIT

PLAIN = Ending(exit_code=0, said=None, why=None, oom_kills=0, stall_seconds=600, max_seconds=None)
FAILURE = protocol.Failure(code="diverged", detail="train_loss is not finite at step 3", hint="lower lr", traceback="Traceback…")


@pytest.mark.parametrize(
    ("ending", "outcome", "code"),
    [
        (replace(PLAIN, said=protocol.Done(outcome="succeeded")), Outcome.SUCCEEDED, None),
        (replace(PLAIN, said=protocol.Done(outcome="stopped"), why="told_to_stop"), Outcome.STOPPED, None),
        (replace(PLAIN, exit_code=-signal.SIGKILL, why="told_to_stop"), Outcome.STOPPED, None),
        (replace(PLAIN, said=protocol.Done(outcome="held")), Outcome.HELD, None),
        (replace(PLAIN, said=protocol.Done(outcome="held"), why="told_to_stop"), Outcome.HELD, None),
        (replace(PLAIN, said=protocol.Done(outcome="held"), exit_code=-signal.SIGKILL), Outcome.HELD, None),
        (replace(PLAIN, said=protocol.Done(outcome="held"), why="deadline", max_seconds=1.0), Outcome.HELD, None),
        (replace(PLAIN, said=protocol.Done(outcome="succeeded"), why="deadline", max_seconds=1.0), Outcome.SUCCEEDED, None),
        (replace(PLAIN, said=protocol.Done(outcome="stopped"), why="deadline", max_seconds=1.0), Outcome.FAILED, ReasonCode.DEADLINE),
        (replace(PLAIN, exit_code=-signal.SIGKILL, why="stalled"), Outcome.FAILED, ReasonCode.STALLED),
        (replace(PLAIN, exit_code=1, said=FAILURE), Outcome.FAILED, ReasonCode.DIVERGED),
        (replace(PLAIN, exit_code=-signal.SIGSEGV), Outcome.FAILED, ReasonCode.CRASHED),
        (replace(PLAIN, exit_code=3), Outcome.FAILED, ReasonCode.CRASHED),
        (replace(PLAIN, exit_code=-signal.SIGKILL, oom_kills=1), Outcome.FAILED, ReasonCode.OUT_OF_MEMORY_HOST),
        (replace(PLAIN, exit_code=DEADLINE_PASSED), Outcome.STOPPED, None),
        (replace(PLAIN, exit_code=ORPHANED), Outcome.STOPPED, None),
        (replace(PLAIN, exit_code=LOST_EXIT), Outcome.FAILED, ReasonCode.WORKER_LOST),
    ],
)
def test_an_ending_has_its_outcome_and_reason(ending: Ending, outcome: Outcome, code: ReasonCode | None, tmp_path: Path) -> None:
    end = classify(ending, tmp_path / "none.log")
    assert end.outcome is outcome
    assert (end.reason.code if end.reason else None) is code


def test_the_evidence_names_the_signal_and_holds_the_log(tmp_path: Path) -> None:
    log = tmp_path / "a1.log"
    log.write_text("".join(f"line {i}\n" for i in range(80)) + "Segmentation fault\x00")
    reason = classify(replace(PLAIN, exit_code=-signal.SIGSEGV), log).reason
    assert reason is not None
    assert reason.evidence["signal"] == "SIGSEGV"
    assert reason.evidence["exit_code"] is None
    assert len(reason.evidence["log_tail"]) == 50
    assert reason.evidence["log_tail"][-1] == "Segmentation fault\ufffd"  # PostgreSQL's JSON holds no NUL


def test_the_trainers_own_words_are_kept(tmp_path: Path) -> None:
    reason = classify(replace(PLAIN, exit_code=1, said=FAILURE), tmp_path / "none.log").reason
    assert reason is not None
    assert (reason.detail, reason.hint, reason.evidence["traceback"]) == (FAILURE.detail, FAILURE.hint, FAILURE.traceback)


def test_a_log_of_one_endless_line_is_cut(tmp_path: Path) -> None:
    log = tmp_path / "a1.log"
    log.write_bytes(b"x" * (1 << 20))
    assert len(log_tail(log)[0]) == 64 * 1024


def test_signal_names() -> None:
    assert signal_name(-9) == "SIGKILL"
    assert signal_name(0) is None
    assert signal_name(-64) in {"SIGRTMAX", "signal 64"}


def test_the_memory_counter_is_a_number() -> None:
    assert count_oom_kills() >= 0


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/data/jobs/job_1/logs"), ReasonCode.STORAGE),
        (OSError(errno.EROFS, "Read-only file system"), ReasonCode.STORAGE),
        (OSError(errno.ECONNREFUSED, "Connection refused"), ReasonCode.WORKER_LOST),
        (EOFError(), ReasonCode.WORKER_LOST),
    ],
)
def test_a_trainer_that_could_not_be_started(error: BaseException, code: ReasonCode) -> None:
    end = not_started(error)
    assert end.reason is not None
    assert (end.outcome, end.reason.code) == (Outcome.FAILED, code)
    if isinstance(error, OSError) and error.filename:
        assert "/data/jobs/job_1/logs" in end.reason.detail
