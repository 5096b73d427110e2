"""Rows 1, 2 and 4: trainers and the template they are forked from are killed or frozen; the job ends with the bits of an undisturbed run."""

from __future__ import annotations

import random

import psutil
import pytest

from tests.faults.conftest import LEASE, Site, gone
from tests.faults.moments import finish, frozen, pass_by, reason_codes, strike, trainer_of, trainers_of
from tests.worker.conftest import until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]


@pytest.mark.row(1)
def test_a_killed_trainer_is_followed_by_one_with_the_same_bits(site: Site, undisturbed: str, dice: random.Random) -> None:
    job_id = site.submit()
    strike(site, job_id, dice)
    trainer_of(site, job_id).kill()
    finish(site, job_id, undisturbed)
    assert reason_codes(site.client.get(job_id)) == ["crashed", None]


@pytest.mark.row(1)
@pytest.mark.long
def test_trainers_killed_one_after_the_other(site: Site, undisturbed: str, dice: random.Random) -> None:
    job_id = site.submit(limits={"max_attempts": 10})
    for _ in range(4):
        until(lambda: trainers_of(site, job_id) or site.client.get(job_id).is_terminal)
        if site.client.get(job_id).is_terminal:
            break
        trainer = trainer_of(site, job_id)
        pass_by(dice.uniform(0.0, 1.0))
        trainer.kill()
        psutil.wait_procs([trainer], timeout=10)
    finish(site, job_id, undisturbed)


@pytest.mark.row(2)
def test_a_killed_template_takes_its_trainers_along_and_another_comes(site: Site, undisturbed: str, dice: random.Random) -> None:
    job_ids = [site.submit(), site.submit()]
    for job_id in job_ids:
        site.until_checkpoint(job_id)
    strike(site, dice.choice(job_ids), dice)
    template = site.the("powergrad: template")
    trainers = [process for process in site.processes("powergrad: trainer job_") if process.is_running()]
    template.kill()
    until(lambda: all(gone(trainer) for trainer in trainers), within_s=1.0)
    for job_id in job_ids:
        finish(site, job_id, undisturbed)
        job = site.client.get(job_id)
        trained = [attempt for attempt in job.attempts[1:] if attempt.device is not None]  # one caught by the kill before its plan has none
        assert job.attempts[-1] in trained
        assert all(attempt.resumed_from is not None for attempt in trained), job.attempts
    assert until(lambda: [process for process in site.processes("powergrad: template") if process.pid != template.pid])


@pytest.mark.row(4)
def test_a_trainer_frozen_past_its_lease_spoils_nothing(site: Site, undisturbed: str, dice: random.Random) -> None:
    job_id = site.submit()
    strike(site, job_id, dice)
    with frozen(trainer_of(site, job_id)):
        pass_by(float(LEASE["POWERGRAD_LEASE_TTL_S"]) + dice.uniform(0.5, 2.0))
    finish(site, job_id, undisturbed)
    job = site.client.get(job_id)
    assert sum(attempt.outcome == "succeeded" for attempt in job.attempts) == 1
