"""A lease and the process that it guards."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import psutil

from powergrad.jobs.rows import Run
from tests.worker.conftest import Place
from worker import child
from worker.supervisor import _Lease
from worker.template import Trainer


def started(place: Place, function: str, root: Path) -> Trainer:
    """A real child of the template's."""
    answer, theirs = os.pipe()
    (root / "tasks").mkdir(exist_ok=True)
    errand = child.Errand(f"tests.worker.errands:{function}", "{}", str(root), "powergrad: test", 60, 8 << 30, theirs)
    try:
        return place.service.template.spawn(errand)
    finally:
        os.close(answer)
        os.close(theirs)


def test_a_fence_kills_the_trainer(place: Place, tmp_path: Path) -> None:
    lease = _Lease(place.service.bench, Run("job_none", 1), started_s=time.monotonic())
    trainer = started(place, "hang", tmp_path)
    lease.guard(trainer)
    lease.fence()
    assert trainer.wait(10) == -9
    trainer.close()


def test_a_fence_after_the_trainer_has_gone_only_says_so(place: Place, tmp_path: Path) -> None:
    """Its last words are refused when its process has long been buried: nobody must be killed for it."""
    lease = _Lease(place.service.bench, Run("job_none", 1), started_s=time.monotonic())
    trainer = started(place, "die", tmp_path)
    lease.guard(trainer)
    assert trainer.wait(10) == -9
    lease.stop()
    trainer.close()
    lease.fence()
    assert lease.over.is_set()


def test_a_process_is_let_go_of_while_it_is_still_on_its_way_out(place: Place, tmp_path: Path) -> None:
    """Between SIGKILL and its end lies a moment; an attempt that was fenced off must not end in an error for it."""
    process = started(place, "hang", tmp_path)
    killer = threading.Timer(0.3, process.kill)
    killer.start()
    process.close()
    killer.join()
    assert not psutil.pid_exists(process.pid)
