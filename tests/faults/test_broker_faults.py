"""Row 5: whatever becomes of the broker, every job finishes and none that runs is started again."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import redis

from tests.faults.conftest import Site, gone
from tests.faults.moments import finish, frozen, pass_by, strike, unguarded
from tests.worker.conftest import until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400), pytest.mark.row(5)]


def killed_for(seconds: float) -> Callable[[Site, random.Random], None]:
    def fault(site: Site, dice: random.Random) -> None:
        with unguarded(site):
            site.valkey().kill()
            pass_by(seconds)

    return fault


def frozen_for(seconds: float) -> Callable[[Site, random.Random], None]:
    def fault(site: Site, dice: random.Random) -> None:
        with frozen(site.valkey()):
            pass_by(seconds)

    return fault


def emptied(site: Site, dice: random.Random) -> None:
    with broker_of(site) as broker:
        broker.flushall()


def directory_deleted(site: Site, dice: random.Random) -> None:
    shutil.rmtree(site.data_dir / "valkey")
    shutil.rmtree(site.valkey_socket().parent)
    site.valkey().kill()


def file_corrupted(site: Site, dice: random.Random) -> None:
    """Its append-only file, in the middle: a cut-off end would be mended."""
    (file,) = (site.data_dir / "valkey" / "appendonlydir").glob("*.incr.aof")
    with unguarded(site):
        with broker_of(site) as broker:
            for number in range(200):  # short commands, so that 64 bytes cannot lie within one
                broker.set(f"of-the-tests-own-{number}", number, ex=1)
        server = site.valkey()
        server.kill()
        until(lambda: gone(server))  # its guard, which would bury it, is stopped
        content = bytearray(file.read_bytes())
        at = dice.randrange(len(content) // 4, len(content) // 2)
        content[at : at + 64] = dice.randbytes(64)
        file.write_bytes(content)


@contextmanager
def broker_of(site: Site) -> Iterator[redis.Redis]:
    client = redis.Redis(unix_socket_path=str(site.valkey_socket()))
    try:
        yield client
    finally:
        client.close()


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(killed_for(2.0), id="killed for 2 s"),
        pytest.param(killed_for(30.0), id="killed for 30 s", marks=pytest.mark.long),
        pytest.param(frozen_for(5.0), id="frozen for 5 s", marks=pytest.mark.long),
        pytest.param(emptied, id="emptied"),
        pytest.param(directory_deleted, id="directory deleted", marks=pytest.mark.long),
        pytest.param(file_corrupted, id="file corrupted", marks=pytest.mark.long),
    ],
)
def test_no_job_is_lost_or_started_twice_for_a_brokers_sake(
    site: Site, undisturbed: str, dice: random.Random, fault: Callable[[Site, random.Random], None]
) -> None:
    running = [site.submit(), site.submit()]
    waiting = [site.submit() for _ in range(2)]
    strike(site, dice.choice(running), dice)
    fault(site, dice)
    waiting += [site.submit() for _ in range(2)]
    for job_id in (*running, *waiting):
        finish(site, job_id, undisturbed)
        assert site.client.get(job_id).attempt == 1
    until(site.is_ready)


def test_a_job_is_accepted_at_once_and_run_while_there_is_no_broker(site: Site, undisturbed: str) -> None:
    with unguarded(site):
        site.valkey().kill()
        finish(site, site.submit(), undisturbed)
    until(site.is_ready)
