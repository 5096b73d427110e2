"""Short work beside the slots, in two lanes of one piece at a time: a thread each that claims tasks and runs each in a limited child of
the template.

The child has torch already, no GPU, a lower priority than any trainer, and bounds on memory, processor time and the size of its answer.
Whatever becomes of it, this process goes on. A task of the long lane holds a short lease that is renewed while its child runs: when this
worker is killed another has the task within LONG_LEASE_S, and when it is drained at once.
"""

from __future__ import annotations

import json
import os
import select
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog

from powergrad.jobs import datasets, tasks
from powergrad.jobs.artifacts import Artifacts
from powergrad.jobs.errors import Fenced
from powergrad.jobs.experiments import answers
from powergrad.jobs.store import Store, is_unavailable
from worker import child
from worker.ends import signal_name
from worker.template import LOST_EXIT, Template, Trainer

log = structlog.get_logger(__name__)

DEADLINE_S = 60.0
LONGEST_S = 7200.0
START_S = 30.0  # what the template may take to start a child, and the store to take its answer
LONG_LEASE_S = 30.0
RENEW_S = 5.0
MEMORY_BYTES = 8 << 30  # address space beyond what the template maps: a network of 600 million parameters, twice
CHECK_MEMORY_BYTES = 2 << 30  # the largest image that is decoded takes 0.6 GiB on its way
CHECK_BYTES_PER_S = 1 << 20  # JPEGs of 100 KB decode at ten times that on one core (measured): room for a slow disk and a busy host
CHECK_FILES_PER_S = 100
ANSWER_BYTES = 4 << 20
LOOK_S = 0.5  # a ring goes to one worker of many, and may be lost
READ_BYTES = 1 << 16
RETRY_S = 0.5


@dataclass(frozen=True)
class Kind:
    """What the child of a kind of task calls, and what it may use.

    function: `module:name`, called with (arguments, artifact root), gives JSON.  cpu_s: None is as long as the deadline.
    """

    function: str
    deadline_s: Callable[[Mapping[str, Any]], float] = lambda _: DEADLINE_S
    memory_bytes: int = MEMORY_BYTES
    cpu_s: int | None = None


def check_s(arguments: Mapping[str, Any]) -> float:
    """How long a check may take: by the size that an upload is known to have, the longest for a folder of any size."""
    if not arguments["bytes"]:
        return LONGEST_S
    size: int = arguments["bytes"]
    files: int = arguments["files"]
    return min(LONGEST_S, DEADLINE_S + size / CHECK_BYTES_PER_S + files / CHECK_FILES_PER_S)


KINDS = {
    "predict": Kind("powergrad.predict:predict"),
    datasets.CHECK: Kind("powergrad.data.check:check", check_s, CHECK_MEMORY_BYTES),
    answers.KIND: Kind("powergrad.experiments.analysis:analyse"),
    answers.DRAW: Kind("powergrad.experiments.search:draw"),
    answers.DECIDE: Kind("powergrad.experiments.search:decide"),
}


@dataclass
class TaskRunner:
    """`start` and `stop` frame its threads; `wake` says that a task may wait."""

    store: Store
    artifacts: Artifacts
    template: Template
    draining: threading.Event
    _lanes: list[_Lane] = field(default_factory=list)

    def start(self) -> None:
        self._lanes = [_Lane(self, long=long) for long in (False, True)]
        for lane in self._lanes:
            lane.thread.start()

    def wake(self) -> None:
        for lane in self._lanes:
            lane.awake.set()

    def stop(self) -> None:
        """Wait for what is at work: a short task ends by its deadline, a long one is given back."""
        for lane in self._lanes:
            lane.stopping.set()
        self.wake()
        for lane in self._lanes:
            lane.thread.join(timeout=10)


class _Lane:
    """One thread that does one task after the other, of the long kinds or of all others."""

    def __init__(self, runner: TaskRunner, *, long: bool) -> None:
        self.store, self.artifacts, self.template, self.draining = runner.store, runner.artifacts, runner.template, runner.draining
        self.long = long
        self.awake, self.stopping = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._run, name="long-tasks" if long else "tasks", daemon=True)

    def _run(self) -> None:
        while not self.stopping.is_set():
            self.awake.wait(LOOK_S)
            self.awake.clear()
            try:
                while self._may_claim() and (task := self._claim()) is not None:
                    self._do(task)
            except Exception as error:  # the thread outlives its tasks
                if is_unavailable(error):
                    log.warning("tasks: database away", error=str(error).splitlines()[0])
                else:
                    log.exception("a task failed")

    def _may_claim(self) -> bool:
        return self.template.ready.is_set() and not self._is_ending()

    def _is_ending(self) -> bool:
        return self.draining.is_set() or self.stopping.is_set()

    def _claim(self) -> tasks.Task | None:
        with self.store.read() as tx:
            if not tasks.has_work(tx, long=self.long):
                return None
        with self.store.write() as tx:
            return tasks.claim(tx, lease_s=LONG_LEASE_S if self.long else DEADLINE_S + START_S, long=self.long)

    def _do(self, task: tasks.Task) -> None:
        started_s = time.monotonic()
        try:
            answer = self._answer(task)
            self._store(task, answer)
        except Fenced:
            log.info("task was taken or deleted meanwhile", task=task.id)
            return
        seconds = round(time.monotonic() - started_s, 2)
        log.info("task ended", task=task.id, kind=task.kind, seconds=seconds, error=None if answer is None else answer.get("error"))

    def _store(self, task: tasks.Task, answer: dict[str, Any] | None) -> None:
        """What came of it, as soon as the database takes it; None gives it back. Raises Fenced."""
        until_s = time.monotonic() + DEADLINE_S
        while True:
            try:
                with self.store.write() as tx:
                    if answer is None:
                        tasks.give_back(tx, task)
                    elif "error" in answer:
                        tasks.fail(tx, task, answer["error"]["code"], answer["error"]["detail"])
                    else:
                        tasks.finish(tx, task, answer["result"])
                return
            except Exception as error:
                if not is_unavailable(error) or time.monotonic() > until_s:
                    raise
                time.sleep(RETRY_S)

    def _answer(self, task: tasks.Task) -> dict[str, Any] | None:
        """{"result": …} or {"error": {code, detail}}; None if another worker shall do it. Raises Fenced."""
        kind = KINDS.get(task.kind)
        if kind is None:
            return _error("internal", f"this worker's release knows no task of kind {task.kind!r}; it knows {', '.join(KINDS)}")
        deadline_s = kind.deadline_s(task.arguments)
        cpu_s = int(deadline_s) if kind.cpu_s is None else kind.cpu_s
        answer_fd, answer_out = os.pipe()
        errand = child.Errand(
            function=kind.function,
            arguments_json=json.dumps(task.arguments),
            root=str(self.artifacts.root()),
            title=f"powergrad: {task.kind} {task.id}",
            cpu_s=cpu_s,
            memory_bytes=kind.memory_bytes,
            answer=answer_out,
        )
        try:
            process = self.template.spawn(errand)
        except (OSError, EOFError) as error:
            os.close(answer_fd)
            return _error("worker_lost", f"the template process did not start a child: {error!r}")
        finally:
            os.close(answer_out)
        try:
            return self._hear(task, process, answer_fd, deadline_s=deadline_s, cpu_s=cpu_s)
        finally:
            process.kill()
            process.close()
            os.close(answer_fd)

    def _hear(self, task: tasks.Task, process: Trainer, answer_fd: int, *, deadline_s: float, cpu_s: int) -> dict[str, Any] | None:
        """What the child says before it ends or must end."""
        heard, until_s, renewed_s = b"", time.monotonic() + deadline_s, time.monotonic()
        while (left_s := until_s - time.monotonic()) > 0:
            if self.long and self._is_ending():
                return None
            if self.long and time.monotonic() - renewed_s > RENEW_S:
                self._renew(task)
                renewed_s = time.monotonic()
            readable, _, _ = select.select([answer_fd], [], [], min(left_s, LOOK_S) if self.long else left_s)
            data = os.read(answer_fd, READ_BYTES) if readable else b""
            heard += data
            if len(heard) > ANSWER_BYTES:
                return _error("internal", f"the answer has more than {ANSWER_BYTES:,} bytes")
            if readable and not data:
                return _understood(process, heard, cpu_s)
        return _error("deadline", f"it took longer than {deadline_s:g} s")

    def _renew(self, task: tasks.Task) -> None:
        """Raises Fenced. A database that is away is no reason to stop: what comes of it is fenced anyway."""
        try:
            with self.store.write() as tx:
                tasks.renew(tx, task, lease_s=LONG_LEASE_S)
        except Exception as error:
            if not is_unavailable(error):
                raise
            log.warning("a task's lease is not renewed: database away", task=task.id)


def _understood(process: Trainer, heard: bytes, cpu_s: int) -> dict[str, Any]:
    if heard.endswith(b"\n"):  # the child's last byte: what lacks it was cut off
        answer: dict[str, Any] = json.loads(heard)
        return answer
    exit_code = process.wait(RETRY_S)
    if exit_code == LOST_EXIT:
        return _error("worker_lost", "the template process died, and this child with it")
    how = signal_name(exit_code)
    if how == "SIGXCPU":
        return _error("deadline", f"it took more than {cpu_s} s of processor time")
    return _error("crashed", f"the child ended without an answer ({how or f'exit code {exit_code}'})")


def _error(code: str, detail: str) -> dict[str, Any]:
    return {"error": {"code": code, "detail": detail}}
