"""Row 6: the database is locked or restarted. Trainers go on until the margin of their lease, then end; the API says 503."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from powergrad.client import ApiError
from tests.faults.conftest import LEASE, Site, gone, small_spec, undisturbed_sha256
from tests.faults.moments import finish, pass_by, reason_codes, strike, trainer_of, trainers_of
from tests.worker.conftest import until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400), pytest.mark.row(6)]

TTL_S, MARGIN_S, HEARTBEAT_S = (float(LEASE[f"POWERGRAD_{name}_S"]) for name in ("LEASE_TTL", "LEASE_MARGIN", "HEARTBEAT"))
GOES_ON_S = TTL_S - MARGIN_S - HEARTBEAT_S - 2.0  # surely before the margin: a renewal may be as old as a heartbeat, and late
LOCKED_S = 20.0


def refusal_of_a_submission(site: Site) -> ApiError:
    with pytest.raises(ApiError) as refused:
        site.client.submit(small_spec())
    return refused.value


def log_of(site: Site, job_id: str) -> Path:
    return site.data_dir / "jobs" / job_id / "logs" / "a1.log"


def test_a_locked_database_ends_trainers_at_their_margin_and_loses_nothing(site: Site, undisturbed: str, dice: random.Random) -> None:
    """SQLite: somebody holds its write lock for 20 s. One job would go on training for long, the other one ends meanwhile."""
    long = site.submit(epochs=500)
    site.until_checkpoint(long)
    short = site.submit()
    strike(site, short, dice, checkpointed=True)
    trainer, read_before = trainer_of(site, long), log_of(site, long).stat().st_size
    with closing(sqlite3.connect(site.data_dir / "powergrad.db", timeout=10.0, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        pass_by(GOES_ON_S)
        assert not gone(trainer)
        assert log_of(site, long).stat().st_size > read_before, "it goes on training"
        until(lambda: gone(trainer), within_s=TTL_S - GOES_ON_S)
        assert site.client.get(long).state == "running", "who only looks is answered"
        refused = refusal_of_a_submission(site)
        assert (refused.status, refused.retry_after_s) == (503, 2.0)
        pass_by(LOCKED_S - TTL_S - 10.0)  # the refusal took SQLite's busy timeout
        assert not trainers_of(site, long), "nobody starts another while nobody can claim"
    finish(site, short, undisturbed)
    until(lambda: site.client.get(long).attempt == 2 and trainers_of(site, long))
    assert reason_codes(site.client.get(long))[0] in {None, "worker_lost"}
    until(lambda: any(event.type == "resumed" for event in site.events(long)))
    site.client.cancel(long)
    site.until_state(long, "cancelled")
    site.check_history(long)


@pytest.mark.long
@pytest.mark.parametrize("fault", ["stop", "kill", "terminate_backends"])
def test_a_restarted_database_disturbs_no_run(new_site: Callable[..., Site], dice: random.Random, fault: str) -> None:
    site = new_site(database="postgresql")
    server = site.postgresql
    assert server is not None
    expected = undisturbed_sha256(site)
    for _ in range(3):
        job_ids = [site.submit(), site.submit()]
        strike(site, job_ids[0], dice)
        getattr(server, fault)()
        if fault != "terminate_backends":
            refused = refusal_of_a_submission(site)
            assert (refused.status, refused.retry_after_s) == (503, 2.0)
        server.start()
        for job_id in job_ids:
            finish(site, job_id, expected)
            assert site.client.get(job_id).attempt == 1


@pytest.mark.long
def test_a_database_away_for_longer_than_a_lease_ends_the_trainers(new_site: Callable[..., Site], dice: random.Random) -> None:
    site = new_site(database="postgresql")
    server = site.postgresql
    assert server is not None
    expected = undisturbed_sha256(site)
    long, short = site.submit(epochs=500), site.submit()
    site.until_checkpoint(long)
    strike(site, short, dice)
    trainer, read_before = trainer_of(site, long), log_of(site, long).stat().st_size
    server.stop()
    pass_by(GOES_ON_S)
    assert not gone(trainer)
    assert log_of(site, long).stat().st_size > read_before
    until(lambda: gone(trainer), within_s=TTL_S - GOES_ON_S)
    pass_by(dice.uniform(1.0, 5.0))
    server.start()
    finish(site, short, expected)
    until(lambda: any(event.type == "resumed" for event in site.ask(lambda: site.events(long)) or []))
    site.client.cancel(long)
    site.until_state(long, "cancelled")
    site.check_history(long)
