"""A real service for a benchmark's time, on a temporary directory, and the plain processes that are its peers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from powergrad.cli.stack import Stack
from powergrad.client import Client
from powergrad.client.models import Event
from powergrad.protocol import TrainerConfig

PLAIN = Path(__file__).with_name("plain.py")
READY_S = 120.0
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
OVER = frozenset({"succeeded", "failed", "cancelled"})


class BenchmarkError(Exception):
    """What was to be measured did not happen; the message says what did instead."""


@contextmanager
def service(*, slots: int) -> Iterator[Client]:
    """A client of an embedded stack that is ready and idle."""
    with tempfile.TemporaryDirectory(prefix="powergrad-bench-") as folder:
        stack = Stack(Path(folder) / "data", port=0, slots=slots)
        with stack, Client(stack.url) as client:
            stack.ready(READY_S)
            yield client


def watch(client: Client, job_id: str, *, until: str) -> Iterator[tuple[Event, datetime]]:
    """The job's events as they come, each with the time it was heard, until the phase or state `until`. Raises BenchmarkError."""
    for event in client.stream(job_id):
        heard = datetime.now().astimezone()
        yield event, heard
        if marker(event) == until:
            return
        if marker(event) in OVER:
            break
    raise BenchmarkError(f"{job_id} ended before it was {until}: {client.get(job_id).reason}")


def marker(event: Event) -> str:
    """What an event marks: the phase or state entered, else its type."""
    match event.type:
        case "phase":
            return str(event.data["name"])
        case "state":
            return str(event.data["to"])
        case kind:
            return kind


def cancel(client: Client, job_id: str) -> None:
    """Cancel a job and wait for its end."""
    client.cancel(job_id)
    client.wait(job_id, timeout_s=60)


class PlainProcess:
    """A fresh Python that trains by itself, heard line by line in a thread. Use as a context manager: it is killed at the end."""

    def __init__(self, config: TrainerConfig, *, default_threads: bool) -> None:
        self.messages: list[tuple[float, dict[str, Any]]] = []
        """(perf_counter, message) of all that was heard."""
        self.begun_s = time.perf_counter()
        command = [sys.executable, "-P", str(PLAIN), config.model_dump_json(), *(["--default-threads"] if default_threads else [])]
        environment = {name: value for name, value in os.environ.items() if name not in THREAD_VARIABLES}
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
        self._changed = threading.Condition()
        self._over = False
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._thread.join()

    def wait_for(self, **wanted: Any) -> float:
        """When the first message with these fields was heard. Raises BenchmarkError when the process ends without."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._find(wanted) is not None)
            found = self._find(wanted)
        if found is None:
            raise BenchmarkError(f"the plain process ended without {wanted}; its last word: {self.messages[-1:]}")
        return found

    def speeds(self) -> list[float]:
        """Images per second at each log point so far. Raises BenchmarkError when the process has ended."""
        with self._changed:
            if self._over:
                raise BenchmarkError(f"the plain process ended while it was measured; its last word: {self.messages[-1:]}")
            return [message["images_per_s"] for _, message in self.messages if message["type"] == "step"]

    def _find(self, wanted: dict[str, Any]) -> float | None:
        return next((heard for heard, message in self.messages if wanted.items() <= message.items()), None)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            heard = time.perf_counter()
            with self._changed:
                self.messages.append((heard, json.loads(line)))
                self._changed.notify_all()
        with self._changed:
            self._over = True
            self._changed.notify_all()
