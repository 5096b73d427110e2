"""What runs in a process forked from the template: a trainer, a task, or the standby that watches over the template.

The worker imports this module too (to name its functions), so torch is imported inside them only, where it is already there.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import psutil
from setproctitle import setproctitle

NICE = 10  # a task waits for trainers, never they for it


@dataclass(frozen=True)
class Launch:
    """All a trainer process is given. The descriptors are the caller's and travel along; `locks` are only held, never used."""

    config_json: str
    title: str
    visible_gpus: tuple[str, ...]
    log: int
    events: int
    control: int
    locks: tuple[int, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        """While a process is being started, pickling a descriptor sends it (multiprocessing's DupFd)."""
        fds = (self.log, self.events, self.control, *self.locks)
        return _launch_here, (self.config_json, self.title, self.visible_gpus, [DupFd(fd) for fd in fds])


def _launch_here(config_json: str, title: str, visible_gpus: tuple[str, ...], fds: list[Any]) -> Launch:
    log, events, control, *locks = (fd.detach() for fd in fds)
    return Launch(config_json, title, visible_gpus, log, events, control, tuple(locks))


def train(launch: Launch) -> None:
    """Become a trainer: own process group, own log, its GPUs or none, and never outlive the template."""
    _bind_to_template()
    os.setsid()
    for stream in (1, 2):
        os.dup2(launch.log, stream)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    setproctitle(launch.title)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(launch.visible_gpus)
    from powergrad import trainer

    code = trainer.main(launch.config_json, events_fd=launch.events, control_fd=launch.control)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@dataclass(frozen=True)
class Errand:
    """All that the child of a task is given. function: `module:name`; memory_bytes: beyond what the template has; answer: a descriptor."""

    function: str
    arguments_json: str
    root: str
    title: str
    cpu_s: int
    memory_bytes: int
    answer: int

    def __reduce__(self) -> tuple[Any, ...]:
        given = {name: value for name, value in vars(self).items() if name != "answer"}
        return _errand_here, (given, DupFd(self.answer))


def _errand_here(given: dict[str, Any], answer: Any) -> Errand:
    return Errand(**given, answer=answer.detach())


def run_errand(errand: Errand) -> None:
    """Become the child of a task: limited, below nice, without a GPU; one JSON line is its answer."""
    _bind_to_template()
    os.setsid()
    setproctitle(errand.title)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.nice(NICE)
    _limit(errand)
    try:
        module, _, name = errand.function.partition(":")
        function = getattr(importlib.import_module(module), name)
        answer = {"result": function(json.loads(errand.arguments_json), Path(errand.root))}
    except Exception as error:  # noqa: BLE001 - this is where every error becomes an answer
        answer = {"error": _described(error)}
    with os.fdopen(errand.answer, "wb") as out:
        out.write(json.dumps(answer, allow_nan=False).encode() + b"\n")
    os._exit(0)


def _described(error: Exception) -> dict[str, str]:
    from powergrad import trainer

    failure = trainer.failure_of(error)
    if failure.code == "crashed":
        sys.stderr.write(failure.traceback)  # the worker's log
    return {"code": failure.code, "detail": failure.detail}


def _limit(errand: Errand) -> None:
    """Address space, processor time, no core file. A limit that is lower already stays."""
    mapped_bytes = psutil.Process().memory_info().vms
    wanted = {
        resource.RLIMIT_AS: mapped_bytes + errand.memory_bytes,
        resource.RLIMIT_CPU: errand.cpu_s,
        resource.RLIMIT_CORE: 0,
    }
    for kind, limit in wanted.items():
        _, hard = resource.getrlimit(kind)
        bound = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (bound, hard))


def standby(connection: Connection) -> None:
    """Tell what this installation can train, then wait: this process lives exactly as long as its template and its worker."""
    _bind_to_template()
    setproctitle("powergrad: standby")
    from powergrad import data, models

    with contextlib.suppress(EOFError, OSError):  # the worker has left already: it was stopped while torch was loading
        connection.send({"template_pid": os.getppid(), "models": models.describe_models(), "datasets": data.describe_datasets()})
        connection.recv()
    os._exit(0)


def _bind_to_template() -> None:
    from powergrad import process, template

    process.die_with_parent(template.PID)
