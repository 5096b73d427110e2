"""How an attempt ended: from the trainer's last word, its exit status and what the supervisor itself did, to an `End`.

Pure but for reading the log's tail and the cgroup's counter.
"""

from __future__ import annotations

import errno
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from powergrad import protocol
from powergrad.jobs.states import End, Outcome, Reason, ReasonCode
from powergrad.process import DEADLINE_PASSED, ORPHANED
from worker.template import LOST_EXIT

LOG_TAIL_LINES = 50
LOG_TAIL_BYTES = 64 * 1024
STORAGE_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS})
MEMORY_EVENTS = Path("/sys/fs/cgroup/memory.events")

Why = Literal["told_to_stop", "stalled", "deadline"]


@dataclass(frozen=True)
class Ending:
    """What is known when a trainer is gone. exit_code: negative for a signal. why: what the supervisor asked of it, if anything."""

    exit_code: int | None
    said: protocol.Done | protocol.Failure | None
    why: Why | None
    oom_kills: int
    stall_seconds: float
    max_seconds: float | None


def classify(ending: Ending, log_path: Path) -> End:
    """The end of the attempt, with the reason where it failed."""
    if isinstance(ending.said, protocol.Done) and ending.said.outcome == "succeeded":
        return End(Outcome.SUCCEEDED)
    if isinstance(ending.said, protocol.Done) and ending.said.outcome == "held":
        return End(Outcome.HELD)
    if ending.why == "deadline":
        return _failed(
            ReasonCode.DEADLINE,
            f"trained longer than limits.max_seconds = {ending.max_seconds:g} s",
            "Retry with a larger limits.max_seconds: it goes on from its last checkpoint.",
            ending,
            log_path,
        )
    if ending.why == "stalled":
        return _failed(
            ReasonCode.STALLED,
            f"no sign of progress for limits.stall_seconds = {ending.stall_seconds:g} s; the stacks are in the log",
            "Look at the stacks at the end of the log; raise limits.stall_seconds if a step really takes so long.",
            ending,
            log_path,
        )
    match ending.said:
        case protocol.Done():
            return End(Outcome.STOPPED)
        case protocol.Failure() as failure:
            return _failed(ReasonCode(failure.code), failure.detail, failure.hint, ending, log_path, traceback=failure.traceback)
    if ending.why == "told_to_stop":
        return End(Outcome.STOPPED)  # it did not write a checkpoint in time: the last one stands
    return _died(ending, log_path)


def not_started(error: BaseException) -> End:
    """The template could not be asked for a trainer: it died, and another is on its way; or there is no room for the log."""
    if isinstance(error, OSError) and error.errno in STORAGE_ERRORS:
        detail = f"{error.filename or 'the log'}: {error.strerror}"
        return End(Outcome.FAILED, Reason(ReasonCode.STORAGE, detail, "Check the disk and its free space: the job goes on by itself.", {}))
    detail = f"the template process did not start a trainer: {error!r}"
    return End(Outcome.FAILED, Reason(ReasonCode.WORKER_LOST, detail, "It goes on by itself.", {}))


def data_changed(detail: str) -> End:
    """A registered folder is not what it was: training on it would be another experiment."""
    hint = "Register the folder again and submit the job anew, or put back what was there."
    return End(Outcome.FAILED, Reason(ReasonCode.DATA_UNREADABLE, detail, hint, {}))


def _died(ending: Ending, log_path: Path) -> End:
    if ending.exit_code in (DEADLINE_PASSED, ORPHANED):
        return End(Outcome.STOPPED)  # this worker froze (a laptop slept): nothing that the job did
    if ending.exit_code == LOST_EXIT:
        return _failed(
            ReasonCode.WORKER_LOST, "the template process died, and its trainers with it", "It goes on by itself.", ending, log_path
        )
    if ending.oom_kills:
        return _failed(
            ReasonCode.OUT_OF_MEMORY_HOST,
            "the system killed the trainer for memory",
            "Lower data.batch_size or data.image_size, train fewer jobs at a time, or give the worker more memory.",
            ending,
            log_path,
        )
    how = "without a word" if ending.exit_code is None else _exit_in_words(ending.exit_code)
    return _failed(ReasonCode.CRASHED, f"the trainer ended {how}", "The end of the log says more.", ending, log_path)


def _failed(code: ReasonCode, detail: str, hint: str, ending: Ending, log_path: Path, *, traceback: str | None = None) -> End:
    evidence = {
        "exit_code": ending.exit_code if ending.exit_code is not None and ending.exit_code >= 0 else None,
        "signal": signal_name(ending.exit_code),
        "traceback": traceback,
        "log_tail": log_tail(log_path),
    }
    return End(Outcome.FAILED, Reason(code, detail, hint, evidence))


def _exit_in_words(exit_code: int) -> str:
    return f"by signal {signal_name(exit_code)}" if exit_code < 0 else f"with exit code {exit_code}"


def signal_name(exit_code: int | None) -> str | None:
    """SIGKILL for -9; None for an ordinary exit."""
    if exit_code is None or exit_code >= 0:
        return None
    try:
        return signal.Signals(-exit_code).name
    except ValueError:
        return f"signal {-exit_code}"


def log_tail(path: Path) -> list[str]:
    """The last 50 lines of a log, at most 64 KiB of them."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return text.replace("\x00", "\ufffd").splitlines()[-LOG_TAIL_LINES:]


def count_oom_kills() -> int:
    """Processes of this control group the kernel has killed for memory so far; 0 where that cannot be read."""
    try:
        lines = MEMORY_EVENTS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
