"""Row 13: everything is told to end, and is upgraded while jobs are under way: they write a checkpoint, and the new start goes on from it."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import text

from powergrad.jobs import queries
from powergrad.jobs.store import Store
from tests.faults.conftest import Site, gone, undisturbed_sha256
from tests.faults.moments import finish, unguarded
from tests.jobs.older import make_older
from tests.worker.conftest import until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400), pytest.mark.row(13)]

REQUEUED_S = 15.0
EARLY_STEP = 30  # of 88: a third of the run is left for the signal to find


def seen(site: Site, job_id: str) -> dict[str, Any]:
    """The job, from the database itself: the stack may be down."""
    store = Store(site.store_url)
    try:
        with store.read() as tx:
            return {**queries.get(tx, job_id), "now_ms": tx.now_ms, "checkpoints": queries.list_checkpoints(tx, job_id)}
    finally:
        store.close()


def end_everything(site: Site, dice: random.Random) -> None:
    """SIGTERM to every process of the stack in any order, its guard among them; nothing is left."""
    assert site.up is not None
    family = site.processes("")
    pids = [site.up.pid, *(process.pid for process in family)]
    for pid in dice.sample(pids, len(pids)):
        os.kill(pid, signal.SIGTERM)
    assert site.up.wait(60) == 0
    assert all(gone(process) for process in family)
    site.up = None


def check_it_was_put_back(site: Site, job_id: str, told_ms: int) -> None:
    job = seen(site, job_id)
    assert (job["state"], job["failures"]) == ("queued", 0)
    assert [attempt["outcome"] for attempt in job["attempts"]] == ["stopped"]
    assert job["checkpoints"][0]["step"] >= job["progress"]["step"] >= 1, "nothing that was trained is lost"
    events = site_events(site, job_id)
    assert events[-1]["at_ms"] - told_ms <= 1000 * REQUEUED_S


def site_events(site: Site, job_id: str) -> list[dict[str, Any]]:
    store = Store(site.store_url)
    try:
        with store.read() as tx:
            rows = tx.all(text("SELECT at, type FROM events WHERE job_id = :job ORDER BY seq").bindparams(job=job_id))
            return [{"at_ms": row.at, "type": row.type} for row in rows]
    finally:
        store.close()


def check_everything_told_to_end_goes_on(site: Site, dice: random.Random, expected: str) -> None:
    job_ids = [site.submit(), site.submit()]
    for job_id in job_ids:
        site.until_step(job_id, dice.randint(1, EARLY_STEP))
    told_ms = seen(site, job_ids[0])["now_ms"]
    end_everything(site, dice)
    for job_id in job_ids:
        check_it_was_put_back(site, job_id, told_ms)
    site.start()
    for job_id in job_ids:
        finish(site, job_id, expected)
        assert [attempt.outcome for attempt in site.client.get(job_id).attempts] == ["stopped", "succeeded"]


def test_everything_told_to_end_at_once_goes_on_at_the_next_start(site: Site, undisturbed: str, dice: random.Random) -> None:
    check_everything_told_to_end_goes_on(site, dice, undisturbed)


@pytest.mark.long
def test_the_same_on_postgresql(new_site: Callable[..., Site], undisturbed: str, dice: random.Random) -> None:
    check_everything_told_to_end_goes_on(new_site(database="postgresql"), dice, undisturbed)


@pytest.mark.long
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_a_job_runs_on_while_the_schema_grows_and_the_api_is_started_anew(
    new_site: Callable[..., Site], dice: random.Random, database: str
) -> None:
    """What an upgrade of the API alone is to a worker that has not been upgraded: a table and a column more."""
    site = new_site(database=database)
    expected = undisturbed_sha256(site)
    job_id = site.submit()
    site.until_step(job_id, dice.randint(1, EARLY_STEP))
    with unguarded(site):
        site.the("powergrad: api").kill()
        grow(site)
    until(site.is_ready, within_s=120.0)
    finish(site, job_id, expected)
    assert site.client.get(job_id).attempt == 1
    finish(site, site.submit(), expected)


def grow(site: Site) -> None:
    store = Store(site.store_url)
    with store.write() as tx:
        tx.run(text("ALTER TABLE jobs ADD COLUMN of_a_later_release INTEGER"))
        tx.run(text("CREATE TABLE later_releases (id INTEGER PRIMARY KEY)"))
    store.close()


@pytest.mark.long
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_jobs_under_way_in_the_first_release_are_ended_by_this_one(
    new_site: Callable[..., Site], dice: random.Random, database: str
) -> None:
    site = new_site(database=database)
    expected = undisturbed_sha256(site)
    ended = site.submit()
    site.until_state(ended, "succeeded")
    under_way, waiting = site.submit(), site.submit()
    site.until_step(under_way, dice.randint(1, EARLY_STEP))
    site.client.pause(waiting)
    site.until_state(waiting, "paused")
    assert site.stop(signal.SIGTERM) == 0
    store = Store(site.store_url)
    make_older(store)
    store.close()
    site.start()
    assert site.client.get(ended).state == "succeeded"
    site.check_history(ended)
    finish(site, under_way, expected)
    site.until_state(waiting, "paused")
    site.client.resume(waiting)
    finish(site, waiting, expected)
