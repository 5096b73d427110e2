"""What runs in a process forked from the template: a trainer, or the standby that watches over the template.

The worker imports this module too (to name its functions), so torch is imported inside them only, where it is already there.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from typing import Any

from setproctitle import setproctitle


@dataclass(frozen=True)
class Launch:
    """All a trainer process is given. The descriptors are the caller's and travel along; `locks` are only held, never used."""

    config_json: str
    title: str
    visible_gpu: str | None
    log: int
    events: int
    control: int
    locks: tuple[int, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        """While a process is being started, pickling a descriptor sends it (multiprocessing's DupFd)."""
        fds = (self.log, self.events, self.control, *self.locks)
        return _launch_here, (self.config_json, self.title, self.visible_gpu, [DupFd(fd) for fd in fds])


def _launch_here(config_json: str, title: str, visible_gpu: str | None, fds: list[Any]) -> Launch:
    log, events, control, *locks = (fd.detach() for fd in fds)
    return Launch(config_json, title, visible_gpu, log, events, control, tuple(locks))


def train(launch: Launch) -> None:
    """Become a trainer: own process group, own log, one GPU or none, and never outlive the template."""
    _bind_to_template()
    os.setsid()
    for stream in (1, 2):
        os.dup2(launch.log, stream)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    setproctitle(launch.title)
    os.environ["CUDA_VISIBLE_DEVICES"] = launch.visible_gpu or ""
    from powergrad import trainer

    code = trainer.main(launch.config_json, events_fd=launch.events, control_fd=launch.control)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def standby(connection: Connection) -> None:
    """Tell what this installation can train, then wait: this process lives exactly as long as its template and its worker."""
    _bind_to_template()
    setproctitle("powergrad: standby")
    from powergrad import data, models

    connection.send({"template_pid": os.getppid(), "models": models.describe_models(), "datasets": data.describe_datasets()})
    with contextlib.suppress(EOFError):
        connection.recv()
    os._exit(0)


def _bind_to_template() -> None:
    from powergrad import process, template

    process.die_with_parent(template.PID)
