"""The process and its secrets: where it listens, and that whatever is sent to it, no key gets into its log, its database or its title."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from api.__main__ import _exposed
from api.parts import Parts
from powergrad.jobs import keys
from powergrad.jobs.store import Store
from tests.api.callers import bearer
from tests.api.conftest import settings_for, until
from tests.api.test_process import environment, running
from tests.jobs import builders

ELSEWHERE = "192.0.2.1"  # set aside for documentation (RFC 5737): no machine has it, so that nothing is bound
MASKED = "***"


@pytest.fixture
def store(sqlite_url: str) -> Store:
    return Store(sqlite_url)


def secret_of(key: str) -> str:
    return key.split("_", 2)[2]


# --- where it listens


@pytest.mark.parametrize("left", ["none", "revoked", "expired"])
def test_without_a_key_that_works_it_refuses_an_address_that_others_reach(store: Store, sqlite_url: str, tmp_path: Path, left: str) -> None:
    """As a process: tests.api.test_process."""
    if left != "none":
        key = builders.do(store, keys.create, ttl_s=0.001 if left == "expired" else None)
        until(lambda: left == "revoked" or not works(store))
        if left == "revoked":
            builders.do(store, keys.revoke, key)
    for host in (ELSEWHERE, "0.0.0.0", "::", "powergrad.example"):
        said = exposed(sqlite_url, tmp_path, host)
        assert said is not None
        assert said.startswith(f"POWERGRAD_HOST={host}: other machines can reach this address")
        assert "powergrad keys create" in said
    assert exposed(sqlite_url, tmp_path, "127.0.0.1") is None


def test_while_the_database_is_away_it_listens_and_opens_nothing(tmp_path: Path) -> None:
    away = "postgresql+psycopg://user:secret@127.0.0.1:1/jobs"  # nothing listens on port 1
    assert exposed(away, tmp_path, ELSEWHERE) is None
    assert Parts.of(settings_for(away, tmp_path, host=ELSEWHERE)).key_ring.is_locked


def exposed(url: str, folder: Path, host: str) -> str | None:
    return _exposed(Parts.of(settings_for(url, folder, host=host)))


def works(store: Store) -> bool:
    with store.read() as tx:
        return keys.have_working(tx)


def test_with_a_key_that_works_it_listens_wherever_it_is_told_to(store: Store, sqlite_url: str, tmp_path: Path) -> None:
    builders.do(store, keys.create)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "api"],
        env=environment(sqlite_url, tmp_path, POWERGRAD_HOST=ELSEWHERE),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 3, "uvicorn's own, for an address that this machine has not: it tried"
    assert f"('{ELSEWHERE}', 8642): cannot assign requested address" in done.stderr


# --- what it tells


def test_no_secret_gets_into_the_log_or_the_database_or_the_title(store: Store, sqlite_url: str, tmp_path: Path) -> None:
    key, other = builders.do(store, keys.create), builders.do(store, keys.create)
    database = Path(sqlite_url.removeprefix("sqlite:///"))
    with running(sqlite_url, tmp_path) as (process, http):
        shown = bearer(key)
        token = http.post("/v1/session", json={"key": key}).cookies["powergrad_session"]
        for headers in (shown, {"Authorization": f"Bearer {other[:-1]}"}, {"Cookie": f"powergrad_session={token}x"}, {"X-Key": other}):
            http.get("/v1/jobs", headers=headers)
        http.get(f"/v1/jobs?after={other}&q={other}", headers=shown)
        http.get(f"/v1/jobs/{other}/events", headers=shown)
        http.delete(f"/v1/keys/{other}", headers=shown)
        http.post("/v1/jobs", json={"data": {"dataset": other}, other: other}, headers=shown)
        http.post("/v1/jobs", content=f'{{"data": "{other}', headers=shown | {"Content-Type": "application/json"})
        http.post("/v1/session", json={"key": [other], other: 1})
        http.post(f"/{other}", content=other, headers=shown | {"Content-Type": "text/plain", "Origin": f"https://{other}"})
        with socket.create_connection(("127.0.0.1", http.base_url.port or 0)) as line:  # no HTTP at all
            line.sendall(f"{other} {other}\r\nAuthorization Bearer {other}\r\n\r\n".encode())
            line.recv(4096)
        title = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        database.rename(database.with_suffix(".away"))  # what it cannot ask, it logs, with the path that was asked for
        database.mkdir()
        http.get(f"/v1/jobs/{other}", headers=shown)
        database.rmdir()
        database.with_suffix(".away").rename(database)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=20)
    log = (tmp_path / "api.log").read_text()
    stored = b"".join(path.read_bytes() for path in tmp_path.glob("jobs.db*"))
    for secret in (secret_of(key), secret_of(other)[:-1], token.removeprefix(keys.SESSION_PREFIX)):
        assert secret not in log
        assert secret.encode() not in stored + title
    assert "Invalid HTTP request received" in log, "uvicorn's own loggers go the same way"
    assert keys.digest(secret_of(key)).encode() in stored, "the right file was looked at"
