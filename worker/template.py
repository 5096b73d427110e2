"""The template process and the trainers forked from it: the standard library's forkserver, watched over.

The forkserver imports torch and torchvision once, ahead of any job; a trainer is then a fork of milliseconds. A standby child is always
kept: it ends the moment its template does, so the keeper thread notices at once and brings a new template up before the next job asks.
"""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

import structlog

from worker import child

log = structlog.get_logger(__name__)

RESTART_PAUSE_S = 1.0
LOST_EXIT = 255  # what multiprocessing reports for a child whose forkserver died


class Trainer:
    """A trainer process. Its end is noticed through `sentinel`, a descriptor that becomes readable."""

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

    def close(self) -> None:
        with self._lock:
            self._process.close()


class Template:
    """Keeps a template process with torch imported, and starts trainers from it.

    on_ready: called, from the keeper's thread, with what the standby told: template_pid, models, datasets.
    """

    def __init__(self, on_ready: Callable[[dict[str, Any]], None]) -> None:
        self._context: ForkServerContext = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["powergrad.template"])
        self._on_ready = on_ready
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._goodbye: Any = None
        self.ready = threading.Event()
        # The forkserver ends with the pipe it shares with us, not with the thread that made it, but its first start takes seconds:
        # a thread of its own, which lives as long as the process does.
        self._keeper = threading.Thread(target=self._keep, name="template-keeper", daemon=True)

    def start(self) -> None:
        self._keeper.start()

    def stop(self) -> None:
        """Let the standby go; the forkserver ends with this process."""
        self._stopping.set()
        with self._lock:
            if self._goodbye is not None:
                self._goodbye.close()
                self._goodbye = None
        self._keeper.join(timeout=10)

    def spawn(self, launch: child.Launch) -> Trainer:
        """Fork a trainer; a template that has died is started again first (seconds)."""
        with self._lock:
            process = self._context.Process(target=child.train, args=(launch,))
            process.start()
        return Trainer(process, self._lock)

    def _keep(self) -> None:
        while not self._stopping.is_set():
            try:
                self._watch_one_standby()
            except (OSError, EOFError) as error:
                log.warning("template: start failed", error=repr(error))
            self.ready.clear()
            if self._stopping.wait(RESTART_PAUSE_S):
                return
            log.warning("template died: starting another")

    def _watch_one_standby(self) -> None:
        ours, theirs = self._context.Pipe(duplex=True)
        with self._lock:
            process = self._context.Process(target=child.standby, args=(theirs,))
            process.start()
            self._goodbye = ours
        theirs.close()
        standby = Trainer(process, self._lock)
        if wait([ours, standby.sentinel]) and ours.poll():
            told = ours.recv()
            self._on_ready(told)
            self.ready.set()
            log.info("template ready", pid=told["template_pid"])
        standby.wait()
