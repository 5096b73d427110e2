"""Supervising one attempt: start the trainer, write down what it says, hold its lease, end it when it must end.

Two threads. The caller's reads the trainer's messages and stores them in batches, each a fenced transaction. The lease's thread renews the
lease and hands the new deadline to the trainer; when it cannot renew until the margin, or is told that the attempt is over, it kills the
trainer, so that two trainers of one job never write at the same time. (If this whole process freezes, the trainer's own watchdog does it.)
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

import structlog

from powergrad import protocol
from powergrad.archives import stamp_of
from powergrad.jobs import claims, recording, retention, rows, sweeper
from powergrad.jobs.artifacts import Artifacts
from powergrad.jobs.errors import Fenced
from powergrad.jobs.states import End, JobState, Outcome, ReasonCode
from powergrad.jobs.store import Store, is_unavailable
from powergrad.protocol import boottime_s
from powergrad.sinks.tensorboard import EventFile
from worker import child, ends
from worker.settings import WorkerSettings
from worker.slots import TakenSlots
from worker.template import Template, Trainer

log = structlog.get_logger(__name__)

FLUSH_S = 0.25  # steps are gathered so long; what changes the course of a job is written at once
READ_BYTES = 1 << 16
KILL_WAIT_S = 10.0
STACK_DUMP_S = 1.0
RETRY_S = 0.5
URGENT = (protocol.Phase, protocol.Plan, protocol.Evaluation, protocol.CheckpointWritten, protocol.RolledBack)
SIGNS_OF_LIFE = (
    protocol.Phase,
    protocol.Plan,
    protocol.Step,
    protocol.Evaluation,
    protocol.EvaluationProgress,
    protocol.CheckpointWritten,
    protocol.RolledBack,
    protocol.ArtifactWritten,
)


@dataclass
class Bench:
    """What every supervision of a worker works with."""

    settings: WorkerSettings
    store: Store
    artifacts: Artifacts
    template: Template
    draining: threading.Event
    device_lost: Callable[[], None]
    """Called when a trainer reports that its device is gone: the worker takes no more and ends."""


def supervise(bench: Bench, claim: claims.Claim, taken: TakenSlots) -> JobState | None:
    """Run one attempt to its end; the state the job is in then, or None when the attempt was fenced off."""
    with structlog.contextvars.bound_contextvars(job=claim.run.job_id, attempt=claim.run.attempt):
        log.info("attempt starts", device=taken.device, resume=claim.resume[0].id if claim.resume else None)
        try:
            state = _Supervision(bench, claim, taken).run()
        except Fenced:
            log.info("attempt is fenced off")
            return None
        log.info("attempt ended", state=state.value)
        return state


class _DataChanged(Exception):
    """The job's data are not what it was accepted with."""


class _Supervision:
    def __init__(self, bench: Bench, claim: claims.Claim, taken: TakenSlots) -> None:
        self.bench, self.claim, self.taken = bench, claim, taken
        self.run_dir = bench.artifacts.local_path(rows.job_dir(claim.run.job_id))
        self.log_path = self.run_dir / "logs" / f"a{claim.run.attempt}.log"
        self.lines = _Lines()
        self.unsaid: list[protocol.Message] = []  # read from the trainer, not stored yet
        self.said_before = 0  # messages that are stored
        self.said: protocol.Done | protocol.Failure | None = None
        self.why: ends.Why | None = None
        run, wanted = claim.run, claim.spec.outputs.tensorboard
        self.event_file = EventFile(run.job_id, run.attempt, claim.spec, self.run_dir) if wanted else None
        self.oom_before = ends.count_oom_kills()
        self.started_s = self.progressed_s = self.flushed_s = time.monotonic()

    def run(self) -> JobState:
        _clear_leftovers(self.run_dir, self.claim.run.attempt - 1, self.claim.stored)
        lease = _Lease(self.bench, self.claim.run, started_s=self.started_s)
        try:
            trainer, events_fd = self._start(lease)
        except (OSError, EOFError) as error:
            lease.stop()
            return self._finish(ends.not_started(error), lease)
        except _DataChanged as error:
            lease.stop()
            return self._finish(ends.data_changed(str(error)), lease)
        try:
            self._listen(trainer, lease, events_fd)
            exit_code = self._reap(trainer)
        finally:
            lease.stop()
            trainer.kill()
            trainer.close()
            os.close(events_fd)
        self._store_all(lease)
        while not self._write_event_file(is_last=True):
            time.sleep(RETRY_S)
        self._store_all(lease)
        end = ends.classify(self._ending(exit_code), self.log_path)
        state = self._finish(end, lease)
        with self.bench.store.read() as tx:
            registered = retention.checkpoint_paths(tx, self.claim.run.job_id)
        _clear_leftovers(self.run_dir, self.claim.run.attempt, registered)
        return state

    # --- the trainer's process

    def _start(self, lease: _Lease) -> tuple[Trainer, int]:
        """Fork the trainer, with the lease held from before: a template that has just died takes seconds to come back."""
        config = protocol.TrainerConfig(
            run_id=self.claim.run.job_id,
            attempt=self.claim.run.attempt,
            spec=claims.effective_spec(self.claim).training(),
            run_dir=str(self.run_dir),
            data_root=str(self.bench.settings.data_dir / "datasets"),
            device="cuda:0" if self.claim.gpus else "cpu",
            cpu_threads=self.claim.cpu_threads,
            gpu_share=min(1.0, self.claim.gpus or 1.0),
            ranks=max(1, int(self.claim.gpus)),
            cpus=self.taken.cpus,
            init_from=self._initial_weights(),
            dataset_dir=self._dataset_dir(),
            resume=self.claim.resume,
            hold_epoch=self.claim.hold_epoch,
            deadline_s=lease.deadline_s,
        )
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        log_fd = os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        events_fd, events_out = os.pipe()
        control_in, control_fd = os.pipe()
        lease.start(control_fd)
        launch = child.Launch(
            config_json=config.model_dump_json(),
            title=f"powergrad: trainer {self.claim.run.job_id}",
            visible_gpus=tuple(gpu.uuid for gpu in self.taken.gpus[: ceil(self.claim.gpus)]),
            log=log_fd,
            events=events_out,
            control=control_in,
            locks=tuple(self.taken.fds),
        )
        try:
            self._refuse_changed_data()  # the lease is being renewed: a million names take half a minute
            trainer = self.bench.template.spawn(launch)
        except BaseException:
            os.close(events_fd)
            raise
        finally:
            for fd in (log_fd, events_out, control_in):
                os.close(fd)
        self.taken.hand_over()
        lease.guard(trainer)
        return trainer, events_fd

    def _dataset_dir(self) -> str | None:
        place = self.claim.dataset
        if place is None:
            return None
        return str(
            self.bench.artifacts.local_path(place.path) if place.is_uploaded else self.bench.settings.data_dir / "datasets" / place.path
        )

    def _refuse_changed_data(self) -> None:
        """Raises _DataChanged for a registered folder that looks otherwise than when it was read."""
        place, folder = self.claim.dataset, self._dataset_dir()
        if place is None or place.stamp is None or folder is None:
            return
        try:
            stamp = stamp_of(Path(folder))
        except OSError as error:
            raise _DataChanged(f"data set folder {place.path} cannot be read ({error.strerror})") from error
        if stamp != place.stamp:
            raise _DataChanged(f"data set folder {place.path} has changed since it was registered")

    def _initial_weights(self) -> protocol.InitialWeights | None:
        origin = self.claim.init_from
        if origin is None:
            return None
        return protocol.InitialWeights(path=str(self.bench.artifacts.local_path(origin.path)), sha256=origin.sha256)

    def _listen(self, trainer: Trainer, lease: _Lease, events_fd: int) -> None:
        """Until the trainer has said all it will say: its pipe is closed, or it is gone and the pipe is empty."""
        while True:
            readable, _, _ = select.select([events_fd, trainer.sentinel], [], [], FLUSH_S)
            if events_fd in readable:
                data = os.read(events_fd, READ_BYTES)
                if not data:
                    return
                self._take(self.lines.feed(data))
            elif readable:
                return
            if lease.over.is_set():
                self.why = self.why or "told_to_stop"
                return
            self._consider_stopping(trainer, lease)
            if self._is_time_to_store():
                self._store(lease)

    def _take(self, lines: list[bytes]) -> None:
        for line in lines:
            try:
                message = protocol.decode_message(line)
            except ValueError:
                log.warning("not a message", line=line[:200])
                continue
            if isinstance(message, SIGNS_OF_LIFE):
                self.progressed_s = time.monotonic()
            if isinstance(message, protocol.Done | protocol.Failure):
                self.said = message
            self.unsaid.append(message)

    def _consider_stopping(self, trainer: Trainer, lease: _Lease) -> None:
        now = time.monotonic()
        limits = self.claim.spec.limits
        if lease.state is JobState.CANCELLING:
            self.why = self.why or "told_to_stop"
            trainer.kill()
        elif limits.max_seconds is not None and self.claim.trained_s + now - self.started_s > limits.max_seconds:
            self.why = "deadline"
            lease.tell_to_stop()
        elif lease.state is JobState.PAUSING or self.bench.draining.is_set():
            self.why = self.why or "told_to_stop"
            lease.tell_to_stop()
        elif now - self.progressed_s > limits.stall_seconds and self.why is None:
            self.why = "stalled"
            _dump_stacks(trainer.pid)
            trainer.kill()
        if lease.told_s is not None and now - lease.told_s > self.bench.settings.stop_grace_s:
            log.warning("no checkpoint within the grace period: killed", grace_s=self.bench.settings.stop_grace_s)
            trainer.kill()

    def _reap(self, trainer: Trainer) -> int | None:
        exit_code = trainer.wait(KILL_WAIT_S)  # its pipe is closed: it is on its way out
        if exit_code is None:
            trainer.kill()
            exit_code = trainer.wait(KILL_WAIT_S)
        return exit_code

    def _ending(self, exit_code: int | None) -> ends.Ending:
        limits = self.claim.spec.limits
        return ends.Ending(
            exit_code=exit_code,
            said=self.said,
            why=self.why,
            oom_kills=ends.count_oom_kills() - self.oom_before if exit_code == -signal.SIGKILL and self.why is None else 0,
            stall_seconds=limits.stall_seconds,
            max_seconds=limits.max_seconds,
        )

    # --- what is stored

    def _is_time_to_store(self) -> bool:
        if not self.unsaid:
            return False
        return time.monotonic() - self.flushed_s >= FLUSH_S or any(isinstance(message, URGENT) for message in self.unsaid)

    def _store(self, lease: _Lease) -> bool:
        """Write down what was heard; False when the database is away (it is kept and tried again)."""
        self.flushed_s = time.monotonic()
        wrote_checkpoint = any(isinstance(message, protocol.CheckpointWritten) for message in self.unsaid)
        try:
            with self.bench.store.write() as tx:
                lease.state = recording.record(tx, self.claim.run, self.unsaid, said_before=self.said_before)
                # in one transaction: an older checkpoint goes only when the newer, which its trainer has read back, is on record
                gone = recording.prune(tx, self.claim.run) if wrote_checkpoint else []
            self.said_before += len(self.unsaid)
            self.unsaid = []
            self._free(gone)
        except Fenced:
            lease.fence()
            raise
        except Exception as error:
            if not is_unavailable(error):
                raise
            log.warning("database away: messages kept", messages=len(self.unsaid))
            return False
        if wrote_checkpoint:
            self._write_event_file(is_last=False)
        return True

    def _store_all(self, lease: _Lease) -> None:
        while self.unsaid and not self._store(lease):
            time.sleep(RETRY_S)

    def _write_event_file(self, *, is_last: bool) -> bool:
        """Of all that is stored by now, if the job asks for one; False when the database is away."""
        if self.event_file is None:
            return True
        try:
            told = self.event_file.write(self.bench.store, is_last=is_last)
        except Exception as error:
            if not is_unavailable(error):
                raise
            return False
        self.unsaid += [] if told is None else [told]
        return True

    def _free(self, pruned: list[str]) -> None:
        sweeper.free(self.bench.store, self.bench.artifacts, [f"{rows.job_dir(self.claim.run.job_id)}/{path}" for path in pruned])

    def _finish(self, end: End, lease: _Lease) -> JobState:
        if end.outcome is Outcome.FAILED and end.reason is not None:
            log.warning("attempt failed", code=end.reason.code.value, detail=end.reason.detail)
            if end.reason.code is ReasonCode.DEVICE_LOST:
                self.bench.device_lost()
        while True:
            try:
                with self.bench.store.write() as tx:
                    return recording.finish(tx, self.claim.run, end, trained_ms=lease.unbooked_ms())
            except Exception as error:
                if not is_unavailable(error):
                    raise
                log.warning("database away: the end is kept", outcome=end.outcome.value)
                time.sleep(RETRY_S)


@dataclass
class _Lease:
    """The right to run, renewed from its own thread. `over`: the attempt must end at once, and nothing more may be written."""

    bench: Bench
    run: rows.Run
    started_s: float
    deadline_s: float = 0.0
    state: JobState = JobState.RUNNING
    told_s: float | None = None
    over: threading.Event = field(default_factory=threading.Event)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _send_lock: threading.Lock = field(default_factory=threading.Lock)
    _control_fd: int = -1
    _booked_s: float = 0.0
    _trainer: Trainer | None = None
    _thread: threading.Thread | None = None

    def __post_init__(self) -> None:
        self.deadline_s = boottime_s() + self._term_s()
        self._booked_s = self.started_s

    def _term_s(self) -> float:
        return self.bench.settings.lease_ttl_s - self.bench.settings.lease_margin_s

    def start(self, control_fd: int) -> None:
        """Renew from now on; the trainer reads orders from the other end of `control_fd`, which is the lease's to close."""
        self._control_fd = control_fd
        context = structlog.contextvars.get_contextvars()
        self._thread = threading.Thread(target=self._keep, args=(context,), name=f"lease-{self.run.job_id}", daemon=True)
        self._thread.start()

    def guard(self, trainer: Trainer) -> None:
        """The trainer to kill when the lease ends, or at once if it has."""
        self._trainer = trainer
        if self.over.is_set():
            trainer.kill()

    def stop(self) -> None:
        """The trainer is gone: no more renewals, so that the end is written by one thread alone."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        self._trainer = None  # its number may be another process's from here on
        with self._send_lock:
            if self._control_fd >= 0:
                os.close(self._control_fd)
            self._control_fd = -1

    def fence(self) -> None:
        self.over.set()
        if self._trainer is not None:
            self._trainer.kill()

    def tell_to_stop(self) -> None:
        """Ask the trainer, once, for a checkpoint and its end."""
        if self.told_s is None:
            self.told_s = time.monotonic()
            self._send(protocol.Control(stop="checkpoint"))

    def unbooked_ms(self) -> int:
        """Training time not yet added to the job's account; it is from here on."""
        now = time.monotonic()
        spent_ms = int((now - self._booked_s) * 1000)
        self._booked_s += spent_ms / 1000
        return spent_ms

    def _keep(self, context: dict[str, object]) -> None:
        structlog.contextvars.bind_contextvars(**context)
        renewed_s = time.monotonic()
        while not self._stopping.wait(self.bench.settings.look_s):
            try:
                if time.monotonic() - renewed_s >= self.bench.settings.heartbeat_s:
                    self._renew()
                    renewed_s = time.monotonic()
                else:
                    with self.bench.store.read() as tx:
                        self.state = recording.state_of(tx, self.run)
            except Fenced:
                log.info("lease: the job was taken from this attempt")
                return self.fence()
            except Exception as error:
                if not is_unavailable(error):
                    log.exception("lease: cannot renew")
                else:
                    log.warning("lease: database away", left_s=round(self.deadline_s - boottime_s(), 1))
            if boottime_s() > self.deadline_s:
                log.warning("lease: not renewed in time, so the trainer is killed")
                return self.fence()
        return None

    def _renew(self) -> None:
        asked_s, booked_s = boottime_s(), self._booked_s
        try:
            with self.bench.store.write() as tx:
                self.state = recording.renew(tx, self.run, trained_ms=self.unbooked_ms())
        except BaseException:
            self._booked_s = booked_s
            raise
        self.deadline_s = asked_s + self._term_s()
        self._send(protocol.Control(deadline_s=self.deadline_s))

    def _send(self, order: protocol.Control) -> None:
        with self._send_lock, suppress(BrokenPipeError):
            if self._control_fd >= 0:
                os.write(self._control_fd, protocol.encode(order))


class _Lines:
    """Whole lines out of blocks of bytes."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        return lines


def _clear_leftovers(run_dir: Path, last_attempt: int, registered: Collection[str]) -> None:
    """Free what attempts up to `last_attempt` wrote and no row names: cut off between publishing and telling, or written anew since."""
    for attempt_dir in (run_dir / "checkpoints").glob("a*"):
        if not attempt_dir.name[1:].isdigit() or int(attempt_dir.name[1:]) > last_attempt:
            continue
        for found in attempt_dir.iterdir():
            if str(found.relative_to(run_dir)) not in registered:
                shutil.rmtree(found, ignore_errors=True)
        with suppress(OSError):
            attempt_dir.rmdir()  # only when empty


def _dump_stacks(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGUSR1)  # its ranks too, where it has any
        time.sleep(STACK_DUMP_S)
