"""`powergrad up` as a process of its own: what it leaves behind, and what it survives."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from powergrad.client import Client, Retries
from tests.cli.conftest import TRAINED_S, endless, tiny
from tests.cli.test_stack import until

pytestmark = pytest.mark.faults

PATIENT = Retries(count=60, first_s=0.1, cap_s=0.5)


class Up:
    """A running `powergrad up` and what it has said so far."""

    def __init__(self, data_dir: Path) -> None:
        self.said = data_dir.with_suffix(".err")
        with self.said.open("w") as file:
            command = [sys.executable, "-P", "-m", "powergrad.cli.main", "up", "--port", "0", "--data-dir", str(data_dir)]
            self.process = subprocess.Popen(command, stderr=file, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
        self._url: str | None = None

    def wait_until_ready(self) -> Up:
        until(lambda: self.process.poll() is not None or "is up" in self.said.read_text(), within_s=120)
        assert self.process.poll() is None, self.said.read_text()
        return self

    @property
    def url(self) -> str:
        found = re.search(r"is up +(http://\S+)", self.said.read_text())
        assert found is not None
        return found.group(1)

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def part(self, word: str) -> psutil.Process:
        (found,) = self.parts(word)
        return found

    def parts(self, word: str) -> list[psutil.Process]:
        """Living children with this word in their command line or title."""
        found = []
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):  # a zombie, waiting to be reaped, counts as that too
                found += [child] if word in " ".join(child.cmdline()) else []
        return found

    def end(self, number: int, *, within_s: float = 60.0) -> int:
        self.process.send_signal(number)
        return self.process.wait(within_s)


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    made = Up(tmp_path / "data")
    try:
        yield made.wait_until_ready()
    finally:
        if made.process.poll() is None:
            made.process.kill()
            made.process.wait()


def gone(family: list[psutil.Process]) -> bool:
    return not any(lives(child) for child in family)


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_one_signal_stops_everything_in_order(up: Up, number: int) -> None:
    family = up.family()
    assert up.end(number) == 0
    assert gone(family)
    assert up.said.read_text().rstrip().endswith("Stopped.")


def test_what_runs_writes_a_checkpoint_and_goes_on_at_the_next_start(up: Up, tmp_path: Path) -> None:
    with Client(up.url) as client:
        job = client.submit(tiny(epochs=8, checkpoint={"every_epochs": 8}))
        next(one for one in client.changes(job.id, timeout_s=TRAINED_S) if (one.progress.step or 0) > 0)
    family = up.family()
    assert up.end(signal.SIGTERM) == 0
    assert gone(family)
    again = Up(tmp_path / "data").wait_until_ready()
    try:
        with Client(again.url) as client:
            ended = client.wait(job.id, TRAINED_S)
    finally:
        again.end(signal.SIGTERM)
    assert ended.state == "succeeded"
    assert ended.attempts[1].resumed_from is not None
    assert ended.model_extra is not None
    assert ended.model_extra["failures"] == 0, "a drain costs no attempt"


def test_a_second_signal_kills(up: Up) -> None:
    with Client(up.url) as client:
        job = client.submit(endless())
        next(one for one in client.changes(job.id, timeout_s=TRAINED_S) if (one.progress.step or 0) > 0)
    worker = up.part("worker")
    family = up.family()
    worker.suspend()  # it cannot drain now: only a second signal ends the wait before its 60 s
    up.process.send_signal(signal.SIGINT)
    until(lambda: "Stopping" in up.said.read_text())
    assert up.end(signal.SIGINT, within_s=10) == 0
    until(lambda: gone(family), within_s=5)


@pytest.mark.parametrize("name", ["api", "worker", "valkey"])
def test_a_killed_part_comes_back_and_a_job_gets_done(up: Up, name: str) -> None:
    before = up.part(name)
    before.kill()
    until(lambda: gone([before]) and up.parts(name) not in ([], [before]))
    with Client(up.url, retries=PATIENT) as client:
        assert client.wait(client.submit(tiny()).id, TRAINED_S).state == "succeeded"
    assert f"{name} was ended by SIGKILL" in up.said.read_text()


def test_nothing_outlives_a_killed_up(up: Up) -> None:
    with Client(up.url) as client:
        job = client.submit(endless())
        next(one for one in client.changes(job.id, timeout_s=TRAINED_S) if (one.progress.step or 0) > 0)
    family = up.family()
    assert len(family) >= 4, "valkey, api, worker and below it the trainer"
    up.process.kill()
    until(lambda: gone(family), within_s=5)


def test_a_second_up_on_one_directory_is_refused_and_harms_nothing(up: Up, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "powergrad.cli.main", "up", "--port", "0", "--data-dir", str(tmp_path / "data")]
    second = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert second.returncode == 1
    assert f"pid {up.process.pid};" in second.stderr
    with Client(up.url) as client:
        assert client.health().ready


def test_the_guard_stays_small(up: Up) -> None:
    memory = psutil.Process(up.process.pid).memory_info()
    assert memory.rss < 30_000_000, "20 MB measured; a library that slips in costs ten"


def test_a_broken_installation_is_told_with_the_reason(tmp_path: Path) -> None:
    """The parts cannot start: here because the database file is not one."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "powergrad.db").write_bytes(b"this is no database" * 100)
    command = [sys.executable, "-P", "-m", "powergrad.cli.main", "up", "--port", "0", "--data-dir", str(data)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=dict(os.environ))
    assert ended.returncode == 1
    assert "file is not a database" in ended.stderr
