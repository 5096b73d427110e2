"""The soak itself: its schedule is a function of the seed, its figures are what they say, its witness sees what the kernel sees.

The soaks proper take minutes and are left out of the ordinary run: `pytest -m long tests/faults/test_seeds.py`. A seed that has found a
defect stays in SEEDS.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.faults import chaos
from tests.faults.customers import FATES, SHAPES, draw_plan
from tests.faults.history import Record
from tests.faults.injuries import BY_DATABASE, Done
from tests.faults.witness import Witness
from tests.worker.conftest import until

SEEDS = [("sqlite", 1), ("postgresql", 2)]


@pytest.mark.long
@pytest.mark.faults
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("database", "seed"), SEEDS)
def test_a_soak_breaks_no_rule(database: str, seed: int, tmp_path: Path) -> None:
    report = chaos.soak(tmp_path, seed=seed, minutes=1.5, database=database, workers=2)
    assert not report.violations, chaos.told(report)
    assert sum(report.faults.values()) >= 5, chaos.told(report)
    assert report.jobs.get("succeeded", 0) >= 10, chaos.told(report)


@pytest.mark.parametrize("database", BY_DATABASE)
def test_a_schedule_is_a_function_of_its_seed_and_holds_every_kind_of_injury(database: str) -> None:
    hour = chaos.schedule(5, minutes=60, database=database)
    assert hour == chaos.schedule(5, minutes=60, database=database)
    assert hour[:20] != chaos.schedule(6, minutes=60, database=database)[:20]
    assert {blow.kind.name for blow in hour} == {kind.name for kind in BY_DATABASE[database]}
    assert all(0 < blow.at_s < 3600 for blow in hour)
    assert abs(len(hour) - 3600 / chaos.MEAN_PAUSE_S) < 5 * (3600 / chaos.MEAN_PAUSE_S) ** 0.5  # a Poisson count, five deviations


def test_users_plans_are_a_function_of_their_seed_and_hold_every_shape_and_fate() -> None:
    plans = [draw_plan(random.Random(n), n) for n in range(500)]
    assert plans == [draw_plan(random.Random(n), n) for n in range(500)]
    assert {plan.shape for plan in plans} == SHAPES.keys()
    assert {plan.fate for plan in plans} == FATES.keys()
    assert any(plan.cut for plan in plans)
    assert any(plan.twice for plan in plans)


def record(*events: tuple[float, str, dict[str, object]]) -> Record:
    told = [{"seq": i, "at": at, "type": kind, "data": data} for i, (at, kind, data) in enumerate(events, start=1)]
    return Record({"id": "job_1"}, told, {}, [], [], {})


def struck(at: float, kind: str = "kill_worker", *jobs: str) -> chaos.Struck:
    return chaos.Struck(at, kind, Done("", interrupted=jobs))


def test_a_recovery_lasts_from_the_kill_to_the_next_attempts_first_step() -> None:
    history = record(
        (1.0, "claimed", {"attempt": 1}),
        (10.5, "metrics", {"attempt": 1}),  # what the killed one had said was stored before; nothing of it comes later
        (12.0, "claimed", {"attempt": 2}),
        (14.0, "metrics", {"attempt": 2}),
    )
    (found,) = chaos.recoveries([struck(10.0, "kill_worker", "job_1")], {"job_1": history})
    assert (found.seconds, found.lone) == (4.0, True)
    near = [struck(5.0, "stop_worker"), struck(10.0, "kill_worker", "job_1")]
    assert [one.lone for one in chaos.recoveries(near, {"job_1": history})] == [False]


def test_a_job_that_its_user_paused_meanwhile_has_no_recovery() -> None:
    history = record((1.0, "claimed", {"attempt": 1}), (11.0, "state", {"to": "pausing"}), (30.0, "metrics", {"attempt": 2}))
    assert list(chaos.recoveries([struck(10.0, "kill_worker", "job_1")], {"job_1": history})) == []


FAMILY = """
import os, signal, sys
from setproctitle import setproctitle
setproctitle("powergrad: template")
for _ in range(2):
    if os.fork() == 0:
        setproctitle("powergrad: trainer job_0000")
        while True:
            sum(range(10_000))
setproctitle("powergrad: template")
signal.pause()
"""


def test_the_witness_sees_two_trainers_of_a_job_and_whether_the_one_works_or_is_stopped() -> None:
    """A template of straw with two children that say they train the same job."""
    parent = subprocess.Popen([sys.executable, "-c", FAMILY])
    witness = Witness(psutil.Process().pid)
    witness.start()
    try:
        until(lambda: len(witness.living()) == 2)
        first, second = witness.living()
        until(lambda: witness.overlaps() and witness.overlaps()[0].cpu_s > chaos.STALE_CPU_S)
        for sighting in (first, second):
            psutil.Process(sighting.pid).send_signal(signal.SIGSTOP)
        until(lambda: first.looks[-1][1] and second.looks[-1][1])
        psutil.Process(second.pid).kill()
        until(lambda: len(witness.living()) == 1)
        (overlap,) = witness.overlaps()
        assert overlap.job == "job_0000"
        assert 0.0 < overlap.stopped_s < overlap.seconds
    finally:
        witness.stop()
        for process in [*psutil.Process(parent.pid).children(), psutil.Process(parent.pid)]:
            process.kill()
        parent.wait()


def test_errors_in_logs_are_counted_by_their_names(tmp_path: Path) -> None:
    (tmp_path / "worker-1.log").write_text(
        "Traceback (most recent call last):\n  File x\nKeyError: 'a'\nsqlalchemy.exc.OperationalError: away\n"
    )
    (tmp_path / "worker-2.log").write_text("2026 [info] ready\nKeyError: 'b'\n")
    assert chaos.errors_in(tmp_path) == {"worker: KeyError": 2, "worker: OperationalError": 1}
