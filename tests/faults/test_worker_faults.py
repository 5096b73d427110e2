"""Rows 3, 4 and 8: workers are killed or frozen, four are rung at once; a job has one owner at a time and ends with the same bits."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest
from celery import Celery

from powergrad.cli.stack import free_port
from powergrad.client.models import Event
from powergrad.jobs import doorbell
from tests.faults.conftest import LEASE, Site, gone, undisturbed_sha256
from tests.faults.moments import (
    finish,
    frozen,
    frozen_between_writes,
    kill_all,
    pass_by,
    reason_codes,
    strike,
    trainer_of,
    trainers_of,
    tree_of,
)
from tests.faults.postgresql import PostgreSQL
from tests.worker.conftest import until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]

TTL_S = float(LEASE["POWERGRAD_LEASE_TTL_S"])
WORKERS = 4


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgresql", marks=pytest.mark.long)])
def crew(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Four workers of one host, which share its four slots."""
    with ExitStack() as made:
        server = made.enter_context(PostgreSQL()) if request.param == "postgresql" else None
        url = None if server is None else server.url
        site = Site(tmp_path_factory.mktemp("crew") / "data", free_port("127.0.0.1"), workers=WORKERS, slots=WORKERS, database_url=url)
        made.callback(site.close)
        site.start()
        yield site


@pytest.fixture(autouse=True)
def all_hands(request: pytest.FixtureRequest) -> None:
    """Who is to take over must be there: what the test before has killed comes back first."""
    if "crew" in request.fixturenames:
        crew: Site = request.getfixturevalue("crew")

        def ready() -> int:
            living = {process.pid for process in crew.processes("powergrad: worker")}
            return sum(worker["state"] == "ready" and worker["pid"] in living for worker in crew.client.workers())

        until(lambda: ready() == WORKERS, within_s=240.0)


@pytest.fixture(scope="module")
def expected(crew: Site) -> str:
    """sha256 of the weights of a run that nothing happened to."""
    return undisturbed_sha256(crew)


def worker_of(trainer: psutil.Process) -> psutil.Process:
    template = trainer.parent()
    worker = template.parent() if template is not None else None
    assert worker is not None
    return worker


def claims(site: Site, job_id: str) -> list[Event]:
    return [event for event in site.ask(lambda: site.events(job_id)) or [] if event.type == "claimed"]


# --- row 3


@pytest.mark.row(3)
@pytest.mark.parametrize("whole_tree", [pytest.param(False, marks=pytest.mark.long), True], ids=["worker alone", "whole tree"])
def test_a_killed_worker_leaves_nothing_and_another_takes_over(crew: Site, expected: str, dice: random.Random, whole_tree: bool) -> None:
    job_id = crew.submit()
    strike(crew, job_id, dice, checkpointed=True)
    worker = worker_of(trainer_of(crew, job_id))
    family = tree_of(worker)
    kill_all(dice.sample(family, len(family)) if whole_tree else [worker])
    until(lambda: all(gone(process) for process in family), within_s=2.0)
    until(lambda: len(claims(crew, job_id)) == 2, within_s=TTL_S + 5.0)
    finish(crew, job_id, expected)
    job = crew.client.get(job_id)
    assert [attempt.outcome for attempt in job.attempts] == ["lost", "succeeded"]
    assert reason_codes(job) == ["worker_lost", None]
    assert job.attempts[1].resumed_from is not None


@pytest.mark.row(3)
@pytest.mark.long
def test_workers_killed_one_after_the_other(crew: Site, expected: str, dice: random.Random) -> None:
    job_id = crew.submit(limits={"max_attempts": 10})
    for _ in range(3):
        until(lambda: trainers_of(crew, job_id) or crew.client.get(job_id).is_terminal)
        if crew.client.get(job_id).is_terminal:
            break
        family = tree_of(worker_of(trainer_of(crew, job_id)))
        pass_by(dice.uniform(0.0, 1.0))
        kill_all(family)
        psutil.wait_procs(family, timeout=10)
    finish(crew, job_id, expected)


@pytest.mark.row(3)
@pytest.mark.long
def test_a_worker_of_another_host_is_missed_when_its_lease_ends(new_site: Callable[..., Site], tmp_path: Path, dice: random.Random) -> None:
    """A host of its own name has its own locks: nothing but the lease tells that its worker is gone."""
    if subprocess.run(["unshare", "--uts", "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("needs the right to make a UTS namespace")
    site = new_site(slots=1)
    expected = undisturbed_sha256(site)
    with frozen(site.the("powergrad: worker")):
        elsewhere = psutil.Process(worker_elsewhere(site, tmp_path / "elsewhere.log").pid)
        try:
            job_id = site.submit()
            until(lambda: [child for child in tree_of(elsewhere) if f"trainer {job_id}" in " ".join(child.cmdline())])
            site.until_checkpoint(job_id)
        finally:
            kill_all(tree_of(elsewhere))
    until(lambda: len(claims(site, job_id)) == 2, within_s=TTL_S + 5.0)
    finish(site, job_id, expected)
    assert reason_codes(site.client.get(job_id)) == ["worker_lost", None]


def worker_elsewhere(site: Site, log: Path) -> subprocess.Popen[bytes]:
    command = ["unshare", "--uts", "sh", "-c", 'hostname elsewhere && exec "$@"', "sh", sys.executable, "-P", "-m", "worker"]
    environment = {
        **os.environ,
        **LEASE,
        "POWERGRAD_DATA_DIR": str(site.data_dir),
        "POWERGRAD_DATABASE_URL": site.store_url,
        "POWERGRAD_SLOTS": "1",
        "REDIS_URL": broker_url(site),
    }
    with log.open("ab") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, env=environment, cwd=site.data_dir)


# --- row 4


@pytest.mark.row(4)
@pytest.mark.parametrize("whole_tree", [False, pytest.param(True, marks=pytest.mark.long)], ids=["supervisor", "whole tree"])
def test_a_worker_frozen_past_its_lease_writes_nothing_when_it_thaws(
    crew: Site, expected: str, dice: random.Random, whole_tree: bool
) -> None:
    job_id = crew.submit(epochs=20)
    strike(crew, job_id, dice, checkpointed=True)
    trainer = trainer_of(crew, job_id)
    worker = worker_of(trainer)
    with frozen_between_writes(crew, *(tree_of(worker) if whole_tree else [worker])):
        until(lambda: len(claims(crew, job_id)) == 2, within_s=TTL_S + 5.0)
        if not whole_tree:
            assert gone(trainer), "its own watchdog ends it before anybody else may have the job"
        until(lambda: (crew.client.get(job_id).progress.model_extra or {})["phase"] == "training")
    until(lambda: gone(trainer), within_s=10.0)
    job = crew.until_state(job_id, "succeeded", "failed")
    assert [attempt.outcome for attempt in job.attempts] == ["lost", "succeeded"]
    crew.check_history(job_id)
    until(lambda: not trainers_of(crew, job_id), within_s=10.0)
    after = [crew.submit() for _ in range(WORKERS)]  # one each: the thawed one works on too
    for other in after:
        finish(crew, other, expected)


# --- row 8


@pytest.mark.row(8)
def test_twenty_doorbells_for_one_job_make_one_claim(crew: Site, expected: str) -> None:
    workers = crew.processes("powergrad: worker")
    assert len(workers) == WORKERS
    with frozen(*workers):
        job_id = crew.submit()
        ring(crew, times=20)
    finish(crew, job_id, expected)
    assert len(claims(crew, job_id)) == crew.client.get(job_id).attempt == 1


def ring(site: Site, *, times: int) -> None:
    with Celery(broker=broker_url(site), set_as_current=False) as bell:
        for _ in range(times):
            bell.send_task(doorbell.TASK, queue=doorbell.QUEUE, ignore_result=True)


def broker_url(site: Site) -> str:
    return f"redis+socket://{quote(str(site.valkey_socket()))}"
