"""The process: what it imports, how it starts, refuses to start, and ends; measured on a real child."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from tests.api.conftest import DEADLINE_S, NO_BROKER, until

ROOT = Path(__file__).parents[2]


def environment(sqlite_url: str, tmp_path: Path, **more: str) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "POWERGRAD_DATA_DIR": str(tmp_path),
        "POWERGRAD_DATABASE_URL": sqlite_url,
        "REDIS_URL": NO_BROKER,
        **more,
    }


@contextmanager
def running(sqlite_url: str, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], httpx2.Client]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (tmp_path / "api.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "api"],
            env=environment(sqlite_url, tmp_path, POWERGRAD_PORT=str(port), POWERGRAD_LOG_FORMAT="json"),
            stderr=log,
            cwd=tmp_path,
        )
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
            until(lambda: answers(http) or process.poll() is not None, within_s=60)
            assert process.poll() is None, (tmp_path / "api.log").read_text()
            yield process, http
    finally:
        process.kill()
        process.wait()


def answers(http: httpx2.Client) -> bool:
    try:
        return http.get("/healthz").status_code == 200
    except httpx2.TransportError:
        return False


def refused(tmp_path: Path, env: dict[str, str]) -> str:
    done = subprocess.run([sys.executable, "-P", "-m", "api"], env=env, cwd=tmp_path, capture_output=True, timeout=60, check=False)
    assert done.returncode == 78
    return done.stderr.decode()


def test_the_api_imports_with_training_and_worker_blocked() -> None:
    code = """
import sys
from importlib.abc import MetaPathFinder
class Blocked(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "torchvision", "scipy", "matplotlib", "sklearn", "worker"}:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
from api.main import create_app
from api.settings import ApiSettings
create_app(ApiSettings(data_dir=sys.argv[1])).openapi()
"""
    done = subprocess.run([sys.executable, "-c", code, "/nonexistent"], cwd=ROOT, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_it_ends_at_once_and_well_when_told_to_even_with_open_streams(sqlite_url: str, tmp_path: Path) -> None:
    with running(sqlite_url, tmp_path) as (process, http):
        job = http.post("/v1/jobs", json={"data": {"dataset": "digits"}}).json()
        with http.stream("GET", f"/v1/jobs/{job['id']}/events", headers={"Accept": "text/event-stream"}) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("event: created") or next(lines)
            process.send_signal(signal.SIGTERM)
            # 2 s is the promise; the rest is for a machine that is busy with other things
            assert process.wait(timeout=8) == 0
    assert b"Traceback" not in (tmp_path / "api.log").read_bytes()


def test_it_is_small_and_idle_when_nothing_happens(sqlite_url: str, tmp_path: Path) -> None:
    with running(sqlite_url, tmp_path) as (process, http):
        for _ in range(50):
            assert http.post("/v1/jobs", json={"data": {"dataset": "digits"}}).status_code == 202
        http.get("/openapi.json")
        status = Path(f"/proc/{process.pid}/status").read_text()
        resident_mib = int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024
        assert resident_mib < 150
        title = Path(f"/proc/{process.pid}/cmdline").read_bytes().rstrip(b"\\0 ")
        assert title.startswith(b"powergrad: api")


def test_it_refuses_an_address_that_others_could_reach(sqlite_url: str, tmp_path: Path) -> None:
    said = refused(tmp_path, environment(sqlite_url, tmp_path, POWERGRAD_HOST="0.0.0.0"))
    assert "POWERGRAD_HOST=0.0.0.0: other machines can reach this address" in said
    assert "powergrad keys create" in said


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("POWERGRAD_SWEEP_S", "abc", "POWERGRAD_SWEEP_S=abc: must be a valid number"),
        ("POWERGRAD_PORT", "99999", "POWERGRAD_PORT=99999: must be at most 65535"),
        ("POWERGRAD_LOG_FORMAT", "xml", "POWERGRAD_LOG_FORMAT=xml: must be 'console' or 'json'"),
        ("POWERGRAD_DATABASE_URL", "mysql://user:secret@host/jobs", "POWERGRAD_DATABASE_URL: must be sqlite:"),
        ("POWERGRAD_DATABASE_URL", "postgresql+psycopg://user:secret@host:port/jobs", "POWERGRAD_DATABASE_URL: must be sqlite:"),
        ("POWERGRAD_DATABASE_URL", "secret", "POWERGRAD_DATABASE_URL: must be sqlite:"),
        ("POWERGRAD_DATABASE_URL", "sqlite:////proc/none/jobs.db", "/proc/none: cannot be made"),
        ("REDIS_URL", "http://:secret@host", "REDIS_URL: must be redis://"),
        ("REDIS_URL", "redis://:secret@host:port/0", "REDIS_URL: must be redis://"),
    ],
)
def test_a_wrong_setting_is_named_and_no_password_shown(sqlite_url: str, tmp_path: Path, variable: str, value: str, said: str) -> None:
    heard = refused(tmp_path, environment(sqlite_url, tmp_path, **{variable: value}))
    assert heard.startswith(f"powergrad api: {said}")
    assert heard.count("\n") == 1
    assert "secret" not in heard


def test_the_log_of_a_database_that_is_away_has_no_password(tmp_path: Path) -> None:
    url = "postgresql+psycopg://user:secret@127.0.0.1:1/jobs"  # nothing listens on port 1
    with running(url, tmp_path) as (_, http):
        assert http.get("/v1/jobs", timeout=DEADLINE_S).status_code == 503
        assert http.post("/v1/jobs", json={"data": {"dataset": "digits"}}, timeout=DEADLINE_S).status_code == 503
        assert "secret" not in http.get("/readyz", timeout=DEADLINE_S).text
    log = (tmp_path / "api.log").read_text()
    assert "database away" in log
    assert "secret" not in log


def test_it_refuses_a_database_that_was_not_migrated_and_says_what_to_run(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/empty.db"
    assert f"python -P -m powergrad.jobs.migrate --database-url {url}" in refused(tmp_path, environment(url, tmp_path))


@pytest.mark.parametrize("name", ["api.main", "api.__main__"])
def test_importing_it_starts_nothing(name: str) -> None:
    code = f"import threading, {name}; print(threading.active_count())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=DEADLINE_S * 3, check=True)
    assert done.stdout.strip() == b"1"
