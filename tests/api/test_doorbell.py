"""The doorbell: it rings over a real Valkey, it coalesces, and nobody waits for a broker that is away."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from api.doorbell import MOST_WAITING, Doorbell
from api.measures import Measures
from powergrad.jobs import doorbell
from powergrad.jobs.states import JobState
from tests.api.conftest import DIGITS, Broker, serving, settings_for, until
from tests.jobs import builders


def rings(broker: Broker) -> int:
    return int(broker.client.llen(doorbell.QUEUE))


def test_a_submission_rings_after_it_is_stored(sqlite_url: str, tmp_path: Path, broker: Broker) -> None:
    with serving(settings_for(sqlite_url, tmp_path, redis_url=broker.url, sweep_s=3600)) as api:
        api.submit()
        until(lambda: rings(broker) == 1)
        raw = broker.client.lindex(doorbell.QUEUE, 0)
        assert raw is not None
        message = json.loads(raw)
        assert message["headers"]["task"] == doorbell.TASK
        assert message["headers"]["expires"] is not None


def test_what_makes_a_job_runnable_rings_and_what_does_not_is_silent(sqlite_url: str, tmp_path: Path, broker: Broker) -> None:
    with serving(settings_for(sqlite_url, tmp_path, redis_url=broker.url, sweep_s=3600)) as api:
        paused, failed = (builders.bring_to(api.store, state) for state in (JobState.PAUSED, JobState.FAILED))
        api.http.post("/v1/jobs", params={"dry_run": "true"}, json=DIGITS)
        api.http.post(f"/v1/jobs/{paused}/resume")
        until(lambda: rings(broker) == 1)
        api.http.post(f"/v1/jobs/{failed}/retry")
        until(lambda: rings(broker) == 2)
        api.http.post(f"/v1/jobs/{paused}/clone")
        until(lambda: rings(broker) == 3)


def test_a_burst_leaves_a_bounded_number_of_rings(sqlite_url: str, tmp_path: Path, broker: Broker) -> None:
    with serving(settings_for(sqlite_url, tmp_path, redis_url=broker.url, sweep_s=3600)) as api, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: api.submit(), range(100)))
        until(lambda: rings(broker) == MOST_WAITING)
        api.submit()
        until(lambda: api.parts.doorbell.is_silent)
        assert rings(broker) == MOST_WAITING


def test_a_sweep_rings_for_a_job_that_nobody_heard_of(sqlite_url: str, tmp_path: Path, broker: Broker) -> None:
    with serving(settings_for(sqlite_url, tmp_path, redis_url=broker.url, sweep_s=0.1)) as api:
        builders.submit(api.store)
        until(lambda: rings(broker) >= 1)


def test_a_broker_that_is_away_costs_a_submission_nothing_and_is_found_again(sqlite_url: str, tmp_path: Path, broker: Broker) -> None:
    with serving(settings_for(sqlite_url, tmp_path, redis_url=broker.url, sweep_s=3600)) as api:
        api.submit()
        until(lambda: rings(broker) == 1)
        broker.stop()
        started = time.monotonic()
        for _ in range(20):
            api.submit()
        assert time.monotonic() - started < 10
        broker.start()
        api.submit()
        until(lambda: rings(broker) >= 1)


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1/0", "redis+socket:///nowhere/valkey.sock"])
def test_ringing_never_waits_and_never_raises(url: str) -> None:
    bell = Doorbell(url, Measures())
    bell.start()
    started = time.monotonic()
    for _ in range(1000):
        bell.ring()
    assert time.monotonic() - started < 1.0
    assert not bell.is_connected()
    bell.stop()
