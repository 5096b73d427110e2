"""Row 14, and the life of a whole stack: stopped, killed, started twice."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.faults.conftest import Site, gone
from tests.faults.moments import finish
from tests.worker.conftest import until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]


@pytest.mark.row(14)
def test_a_second_stack_on_the_directory_is_refused_and_names_the_first(site: Site, undisturbed: str) -> None:
    assert site.up is not None
    job_id = site.submit()
    site.until_step(job_id, 3)
    for _ in range(2):
        second = second_stack(site)
        assert second.returncode == 1
        assert f"pid {site.up.pid};" in second.stdout + second.stderr
    finish(site, job_id, undisturbed)
    assert site.client.get(job_id).attempt == 1, "the first one has not noticed"


def second_stack(site: Site) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "powergrad.cli.main", "up", "--port", "0", "--data-dir", str(site.data_dir)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.row(13)
@pytest.mark.long  # the ordinary run tells the command itself so, and every process of it
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


@pytest.mark.row(3, 14)
@pytest.mark.long
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
