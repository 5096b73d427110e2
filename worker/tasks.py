"""Short work beside the slots, one piece at a time: a thread that claims tasks and runs each in a limited child of the template.

The child has torch already, no GPU, a lower priority than any trainer, and bounds on memory, processor time and the size of its answer.
Whatever becomes of it, this process goes on.
"""

from __future__ import annotations

import json
import os
import select
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import structlog

from powergrad.jobs import tasks
from powergrad.jobs.artifacts import Artifacts
from powergrad.jobs.errors import Fenced
from powergrad.jobs.store import Store, is_unavailable
from worker import child
from worker.ends import signal_name
from worker.template import LOST_EXIT, Template, Trainer

log = structlog.get_logger(__name__)

KINDS = {"predict": "powergrad.predict:predict"}
"""Kind of a task -> the function `(arguments, artifact root) -> JSON` that its child calls."""
DEADLINE_S = 60.0
LEASE_S = DEADLINE_S + 30.0  # the child is killed at the deadline; the rest is for the template to start it and for the store
CPU_S = 60
MEMORY_BYTES = 8 << 30  # address space beyond what the template maps: a network of 600 million parameters, twice
ANSWER_BYTES = 4 << 20
LOOK_S = 0.5  # a ring goes to one worker of many, and may be lost
READ_BYTES = 1 << 16
RETRY_S = 0.5


@dataclass
class TaskRunner:
    """`start` and `stop` frame its thread; `wake` says that a task may wait."""

    store: Store
    artifacts: Artifacts
    template: Template
    draining: threading.Event
    _awake: threading.Event = field(default_factory=threading.Event)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="tasks", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        self._awake.set()

    def stop(self) -> None:
        """Wait for the task at work; one that takes longer than its deadline is killed by then, and another worker has it."""
        self._stopping.set()
        self.wake()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._awake.wait(LOOK_S)
            self._awake.clear()
            try:
                while self._may_claim() and (task := self._claim()) is not None:
                    self._do(task)
            except Exception as error:  # the thread outlives its tasks
                if is_unavailable(error):
                    log.warning("tasks: database away", error=str(error).splitlines()[0])
                else:
                    log.exception("a task failed")

    def _may_claim(self) -> bool:
        return self.template.ready.is_set() and not self.draining.is_set() and not self._stopping.is_set()

    def _claim(self) -> tasks.Task | None:
        with self.store.read() as tx:
            if not tasks.has_work(tx):
                return None
        with self.store.write() as tx:
            return tasks.claim(tx, lease_s=LEASE_S)

    def _do(self, task: tasks.Task) -> None:
        started_s = time.monotonic()
        answer = self._answer(task)
        log.info("task ended", task=task.id, kind=task.kind, seconds=round(time.monotonic() - started_s, 2), error=answer.get("error"))
        while time.monotonic() - started_s < LEASE_S:
            try:
                with self.store.write() as tx:
                    if "error" in answer:
                        tasks.fail(tx, task, answer["error"]["code"], answer["error"]["detail"])
                    else:
                        tasks.finish(tx, task, answer["result"])
                return
            except Fenced:
                log.info("task was taken or deleted meanwhile", task=task.id)
                return
            except Exception as error:
                if not is_unavailable(error):
                    raise
                time.sleep(RETRY_S)

    def _answer(self, task: tasks.Task) -> dict[str, Any]:
        """{"result": …} or {"error": {code, detail}}."""
        function = KINDS.get(task.kind)
        if function is None:
            return _error("internal", f"this worker's release knows no task of kind {task.kind!r}; it knows {', '.join(KINDS)}")
        answer_fd, answer_out = os.pipe()
        errand = child.Errand(
            function=function,
            arguments_json=json.dumps(task.arguments),
            root=str(self.artifacts.root()),
            title=f"powergrad: {task.kind} {task.id}",
            cpu_s=CPU_S,
            memory_bytes=MEMORY_BYTES,
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
            return _hear(process, answer_fd)
        finally:
            process.kill()
            process.wait(RETRY_S)
            process.close()
            os.close(answer_fd)


def _hear(process: Trainer, answer_fd: int) -> dict[str, Any]:
    """What the child says before it ends or must end."""
    heard, until_s = b"", time.monotonic() + DEADLINE_S
    while (left_s := until_s - time.monotonic()) > 0:
        readable, _, _ = select.select([answer_fd], [], [], left_s)
        data = os.read(answer_fd, READ_BYTES) if readable else b""
        heard += data
        if len(heard) > ANSWER_BYTES:
            return _error("internal", f"the answer has more than {ANSWER_BYTES:,} bytes")
        if readable and not data:
            return _understood(process, heard)
    return _error("deadline", f"it took longer than {DEADLINE_S:g} s")


def _understood(process: Trainer, heard: bytes) -> dict[str, Any]:
    if heard.endswith(b"\n"):  # the child's last byte: what lacks it was cut off
        answer: dict[str, Any] = json.loads(heard)
        return answer
    exit_code = process.wait(RETRY_S)
    if exit_code == LOST_EXIT:
        return _error("worker_lost", "the template process died, and this child with it")
    how = signal_name(exit_code)
    if how == "SIGXCPU":
        return _error("deadline", f"it took more than {CPU_S} s of processor time")
    return _error("crashed", f"the child ended without an answer ({how or f'exit code {exit_code}'})")


def _error(code: str, detail: str) -> dict[str, Any]:
    return {"error": {"code": code, "detail": detail}}
