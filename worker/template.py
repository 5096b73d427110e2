"""The template process and the trainers forked from it: the standard library's forkserver, watched over.

The forkserver imports torch and torchvision once, ahead of any job; a trainer is then a fork of milliseconds. A standby child is always
kept: it ends the moment its template does, so the keeper thread notices at once and brings a new template up before the next job asks.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from queue import SimpleQueue
from typing import Any

import structlog

from worker import child

log = structlog.get_logger(__name__)

PRELOAD = ["powergrad.template", "worker.child", "multiprocessing.popen_forkserver"]  # the last two are what every fork would import
RESTART_PAUSE_S = 1.0
GONE_WITHIN_S = 10.0
LOST_EXIT = 255  # what multiprocessing reports for a child whose forkserver died


class Trainer:
    """A process forked from the template: a trainer, or the child of a task. `sentinel` becomes readable when it ends."""

    def __init__(self, process: ForkServerProcess, lock: threading.Lock) -> None:
        self._process, self._lock = process, lock
        assert process.pid is not None
        self.pid: int = process.pid
        self.sentinel: int = process.sentinel

    def wait(self, timeout_s: float | None = None) -> int | None:
        """The exit code (negative: the signal that killed it), or None when it still runs after `timeout_s`."""
        if not wait([self.sentinel], timeout_s):
            return None
        with self._lock:  # the standard library reads the exit status once; two readers at a time would lose it
            return self._process.exitcode

    def kill(self) -> None:
        """SIGKILL the process and those it made; those that are gone are no error."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        if self.wait(0) is None:  # it may not have made its group yet; a number that is free again must not be hit
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Let go of a process that has ended, or was killed and takes a moment to end; one that a hung device holds is left to the kernel."""
        if self.wait(GONE_WITHIN_S) is None:
            log.warning("a killed process does not end", pid=self.pid)
            return
        with self._lock:
            self._process.close()


class Template:
    """Keeps a template process with torch imported, and starts trainers from it.

    Every process is started by the keeper's thread, because the kernel's death signal follows the thread that made a child: a template
    made by a supervisor's thread would die with that thread. on_ready: called from the keeper's thread with what the standby told:
    template_pid, models, datasets.
    """

    def __init__(self, on_ready: Callable[[dict[str, Any]], None]) -> None:
        self._context: ForkServerContext = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)
        self._on_ready = on_ready
        self._exit_lock = threading.Lock()
        self._stopping = threading.Event()
        self._wanted: SimpleQueue[tuple[child.Launch | child.Errand, Future[Trainer]]] = SimpleQueue()
        self._bell_in, self._bell_out = os.pipe()
        self.ready = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="template-keeper", daemon=True)

    def start(self) -> None:
        self._keeper.start()

    def stop(self) -> None:
        """Let the standby go; the template ends with this process."""
        self._stopping.set()
        self._ring()
        self._keeper.join(timeout=10)

    def spawn(self, launch: child.Launch | child.Errand) -> Trainer:
        """Fork a trainer or the child of a task; a template that has died is started again first (seconds). Raises OSError or EOFError when that fails."""
        started: Future[Trainer] = Future()
        self._wanted.put((launch, started))
        self._ring()
        return started.result()

    def _ring(self) -> None:
        os.write(self._bell_out, b".")

    def _keep(self) -> None:
        while not self._stopping.is_set():
            try:
                self._watch_one_standby()
            except (OSError, EOFError) as error:
                log.warning("template: start failed", error=repr(error))
            self.ready.clear()
            if not self._stopping.wait(RESTART_PAUSE_S):
                log.warning("template died: starting another")

    def _watch_one_standby(self) -> None:
        """Serve requests until the standby ends, and with it the template."""
        line, theirs = self._context.Pipe(duplex=True)
        with line:
            standby = self._start(child.standby, theirs)
            theirs.close()
            sources: list[Any] = [standby.sentinel, self._bell_in, line]
            while not self._stopping.is_set():
                heard = wait(sources)
                if line in heard:
                    sources.remove(line)
                    self._hear(line)
                if self._bell_in in heard:
                    self._serve()
                if standby.sentinel in heard:
                    return

    def _hear(self, line: Connection) -> None:
        try:
            told = line.recv()
        except EOFError:  # it ended before it had anything to say
            return
        self.ready.set()
        self._on_ready(told)
        log.info("template ready", pid=told["template_pid"])

    def _serve(self) -> None:
        os.read(self._bell_in, 4096)
        while not self._wanted.empty():
            launch, started = self._wanted.get()
            try:
                started.set_result(self._start(child.train if isinstance(launch, child.Launch) else child.run_errand, launch))
            except (OSError, EOFError) as error:
                started.set_exception(error)

    def _start(self, target: Callable[[Any], None], argument: Any) -> Trainer:
        with self._exit_lock:  # starting a process also looks at the exit codes of the others
            process = self._context.Process(target=target, args=(argument,))
            process.start()
        return Trainer(process, self._exit_lock)
