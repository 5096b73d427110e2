"""Faults of the whole stack: whatever is killed, the job ends once, with the bits of an undisturbed run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import redis

from tests.faults.conftest import Site, gone
from tests.worker.conftest import until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]


def finish(site: Site, job_id: str, expected_sha256: str) -> None:
    job = site.until_state(job_id, "succeeded", "failed")
    assert job.state == "succeeded", job.reason
    assert site.weights_sha256(job_id) == expected_sha256
    site.check_history(job_id)


def test_kill_of_the_whole_worker_leaves_nothing_and_loses_nothing(site: Site, undisturbed: str) -> None:
    job_id = site.submit()
    site.until_checkpoint(job_id)
    family = [*site.processes("powergrad: trainer"), *site.processes("powergrad: template"), *site.processes("powergrad: standby")]
    worker = site.the("powergrad: worker")
    killed_at = time.monotonic()
    os.kill(worker.pid, signal.SIGKILL)
    until(lambda: all(gone(process) for process in family), within_s=2.0)
    finish(site, job_id, undisturbed)
    job = site.client.get(job_id)
    assert job.attempt == 2
    assert job.attempts[1].resumed_from is not None
    assert job.attempts[0].outcome == "lost"
    assert time.monotonic() - killed_at < 120


def test_kill_of_the_trainer(site: Site, undisturbed: str) -> None:
    job_id = site.submit()
    site.until_checkpoint(job_id)
    site.the("powergrad: trainer").kill()
    finish(site, job_id, undisturbed)


def test_kill_of_the_template(site: Site, undisturbed: str) -> None:
    job_id = site.submit()
    site.until_checkpoint(job_id)
    trainer = site.the("powergrad: trainer")
    site.the("powergrad: template").kill()
    until(lambda: gone(trainer), within_s=1.0)
    finish(site, job_id, undisturbed)


def test_flushall_and_a_dead_broker_lose_nothing_and_run_nothing_twice(site: Site, undisturbed: str) -> None:
    running = site.submit()
    site.until_step(running, 3)
    broker = redis.Redis(unix_socket_path=str(site.valkey_socket()))
    waiting = [site.submit(epochs=1) for _ in range(3)]
    broker.flushall()
    site.valkey().kill()
    waiting += [site.submit(epochs=1) for _ in range(2)]  # answered while the broker is away
    finish(site, running, undisturbed)
    assert site.client.get(running).attempt == 1, "a running job is not restarted for a broker's sake"
    for job_id in waiting:
        assert site.until_state(job_id, "succeeded", "failed").state == "succeeded"
        assert site.client.get(job_id).attempt == 1
        site.check_history(job_id)


def test_sigterm_to_the_worker_costs_no_failure_and_no_bit(site: Site, undisturbed: str) -> None:
    job_id = site.submit()
    site.until_step(job_id, 3)
    site.the("powergrad: worker").terminate()
    finish(site, job_id, undisturbed)
    job = site.client.get(job_id)
    assert [attempt.outcome for attempt in job.attempts] == ["stopped", "succeeded"]
    assert job.model_extra is not None
    assert job.model_extra["failures"] == 0


def test_cancel_ends_within_ten_seconds_though_the_worker_is_frozen(site: Site) -> None:
    job_id = site.submit(epochs=500)
    site.until_step(job_id, 3)
    trainer, worker = site.the("powergrad: trainer"), site.the("powergrad: worker")
    worker.suspend()
    try:
        asked_at = time.monotonic()
        site.client.cancel(job_id)
        site.until_state(job_id, "cancelled", within_s=10.0)
        assert time.monotonic() - asked_at < 10.0
        until(lambda: gone(trainer), within_s=10.0)  # its own watchdog: nobody renews its deadline
    finally:
        worker.resume()
    site.check_history(job_id)
    after = site.submit(epochs=1)
    assert site.until_state(after, "succeeded", "failed").state == "succeeded", "the thawed worker works on"


def test_cancel_of_a_job_whose_worker_was_killed(site: Site) -> None:
    job_id = site.submit(epochs=500)
    site.until_step(job_id, 3)
    site.the("powergrad: worker").kill()
    site.client.cancel(job_id)
    site.until_state(job_id, "cancelled", within_s=10.0)
    site.check_history(job_id)


@pytest.mark.parametrize("twice", [False, True])
def test_cancel_from_every_other_state(site: Site, twice: bool) -> None:
    queued = site.submit(resources={"gpus": 1, "cpu_threads": 1})
    paused = site.submit(resources={"gpus": 1, "cpu_threads": 1})
    site.client.pause(paused)
    pausing = site.submit(epochs=500)
    site.until_step(pausing, 3)
    site.client.pause(pausing)
    for job_id in (queued, paused, pausing):
        for _ in range(1 + twice):
            site.client.cancel(job_id)
        site.until_state(job_id, "cancelled", within_s=10.0)
        site.check_history(job_id)


def test_an_api_that_is_killed_comes_back_and_the_job_never_noticed(site: Site, undisturbed: str) -> None:
    job_id = site.submit()
    site.until_step(job_id, 3)
    site.the("powergrad: api").kill()
    finish(site, job_id, undisturbed)
    assert site.client.get(job_id).attempt == 1


def test_a_second_stack_on_the_directory_is_refused_and_names_the_first(site: Site) -> None:
    assert site.up is not None
    command = [sys.executable, "-m", "powergrad.cli.main", "up", "--port", "0", "--data-dir", str(site.data_dir)]
    second = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert second.returncode != 0
    assert str(site.up.pid) in second.stdout + second.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_stack_leaves_no_process_and_goes_on_when_started_again(site: Site, undisturbed: str, number: signal.Signals) -> None:
    job_id = site.submit()
    site.until_step(job_id, 3)
    family = site.processes("")
    assert site.stop(number) == 0
    assert all(gone(process) for process in family)
    site.start()
    finish(site, job_id, undisturbed)
    job = site.client.get(job_id)
    assert job.attempts[0].outcome == "stopped"
    assert job.attempts[1].resumed_from is not None


def test_a_killed_stack_leaves_no_process_and_goes_on_when_started_again(site: Site, undisturbed: str) -> None:
    job_id = site.submit()
    site.until_checkpoint(job_id)
    family = site.processes("")
    assert site.up is not None
    site.up.kill()
    site.up.wait()
    until(lambda: all(gone(process) for process in family), within_s=5.0)
    site.start()
    finish(site, job_id, undisturbed)
