"""Row 7: the API is killed, between the commit of a job and its ring above all."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import select

from powergrad.client import Client, Unreachable
from powergrad.jobs.store import Store
from powergrad.jobs.tables import idempotency_keys
from tests.faults.conftest import LEASE, Site, small_spec
from tests.faults.moments import finish, frozen, strike
from tests.worker.conftest import until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400), pytest.mark.row(7)]

SWEEP_S = float(LEASE["POWERGRAD_SWEEP_S"])
START_S = 5.0  # what a busy machine may take from the sweep to the claim


def submitted_and_killed(site: Site, key: str) -> str:
    """Has the API killed as soon as a job is in the database, with a broker that takes no ring; the job's id."""
    store = Store(site.store_url)
    answer: list[Any] = []

    def ask() -> None:
        try:
            with Client(site.client.base_url, retries=0) as client:
                answer.append(client.submit(small_spec(), idempotency_key=key).id)
        except Unreachable as error:
            answer.append(error)

    def stored() -> str | None:
        with store.read() as tx:
            row = tx.one(select(idempotency_keys.c.job_id).where(idempotency_keys.c.key == key))
            return None if row is None else str(row.job_id)

    api = site.the("powergrad: api")
    with frozen(site.valkey()):
        caller = threading.Thread(target=ask)
        caller.start()
        job_id: str = until(stored)
        api.kill()
        api.wait(10)
        caller.join()
    store.close()
    assert isinstance(answer[0], Unreachable) or answer == [job_id]
    print(f"the caller heard: {answer[0]}")
    return job_id


def check_it_starts_and_comes_once(site: Site, dice: random.Random, expected: str) -> None:
    key = f"cut-off-{dice.getrandbits(64):x}"
    job_id = submitted_and_killed(site, key)
    finish(site, job_id, expected)
    job = site.client.get(job_id)
    assert job.started_at is not None
    assert job.created_at is not None
    assert (job.started_at - job.created_at).total_seconds() < SWEEP_S + START_S
    assert job.attempt == 1
    again = site.client.submit(small_spec(), idempotency_key=key)
    assert again.id == job_id


def test_a_job_stored_but_never_rung_for_starts_and_its_key_names_it(site: Site, undisturbed: str, dice: random.Random) -> None:
    check_it_starts_and_comes_once(site, dice, undisturbed)


@pytest.mark.long
def test_the_same_on_postgresql(new_site: Callable[..., Site], undisturbed: str, dice: random.Random) -> None:
    check_it_starts_and_comes_once(new_site(database="postgresql"), dice, undisturbed)


def test_a_running_job_never_notices_that_the_api_was_killed(site: Site, undisturbed: str, dice: random.Random) -> None:
    job_id = site.submit()
    strike(site, job_id, dice)
    site.the("powergrad: api").kill()
    finish(site, job_id, undisturbed)
    assert site.client.get(job_id).attempt == 1
