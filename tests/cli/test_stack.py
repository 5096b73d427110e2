"""The embedded stack's rules that need no trained network: its lock, its address, its broker."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kombu import Connection

from powergrad.cli import stack
from powergrad.cli.stack import Part, Stack, StackError


def until(fact: Callable[[], bool], *, within_s: float = 20.0) -> None:
    """Wait for a fact; fail when it does not come true in time."""
    deadline = time.monotonic() + within_s
    while not fact():
        assert time.monotonic() < deadline, f"not true after {within_s} s"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture(params=["short", "x" * 120], ids=["plain path", "path too long for a socket"])
def broker(request: pytest.FixtureRequest, tmp_path: Path, said: list[str]) -> Iterator[Stack]:
    """A stack with nothing but its Valkey, started."""
    made = Stack(tmp_path / f"{request.param} #1%", port=0, say=said.append)
    made._make_folders()
    made.parts = [made._valkey()]
    made.parts[0].start()
    try:
        until(lambda: stack.ask_valkey(made._socket))
        yield made
    finally:
        made.stop()


def revived(made: Stack) -> Callable[[], bool]:
    def fact() -> bool:
        made.tend()
        return made.parts[0].is_alive and stack.ask_valkey(made._socket)

    return fact


def test_celery_s_transport_reaches_the_socket(broker: Stack) -> None:
    with Connection(broker._environment()["REDIS_URL"]) as line:
        queue = line.SimpleQueue("doorbell")
        queue.put({"ring": 1})
        message = queue.get(timeout=5)
        assert message.payload == {"ring": 1}
        message.ack()
        queue.close()


def test_the_socket_is_for_its_owner_alone_and_there_is_no_port(broker: Stack) -> None:
    assert broker._socket.parent.stat().st_mode & 0o777 == 0o700
    assert len(os.fsencode(broker._socket)) <= 107
    process = broker.parts[0].process
    assert process is not None
    inodes = {os.readlink(entry) for entry in Path(f"/proc/{process.pid}/fd").iterdir() if os.readlink(entry).startswith("socket:")}
    listening = {f"socket:[{line.split()[9]}]" for line in Path("/proc/net/tcp").read_text().splitlines()[1:]}
    assert inodes
    assert not inodes & listening


def test_a_killed_broker_comes_back_with_what_it_held(broker: Stack, said: list[str]) -> None:
    with Connection(broker._environment()["REDIS_URL"]) as line:
        line.SimpleQueue("doorbell").put({"ring": 1})
    time_of_sync = time.monotonic() + 1.2  # appendfsync everysec
    until(lambda: time.monotonic() > time_of_sync)
    broker.parts[0].signal(signal.SIGKILL)
    until(lambda: not broker.parts[0].is_alive)
    until(revived(broker))
    with Connection(broker._environment()["REDIS_URL"]) as line:
        message = line.SimpleQueue("doorbell").get(timeout=5)
        message.ack()
    assert any("SIGKILL" in line for line in said)


def test_a_file_that_valkey_cannot_read_is_set_aside(broker: Stack, said: list[str]) -> None:
    broker.parts[0].signal(signal.SIGKILL)
    until(lambda: not broker.parts[0].is_alive)
    folder = broker.data_dir / "valkey" / "appendonlydir"
    next(folder.glob("*.incr.aof")).write_bytes(b"*3\r\n$3\r\nSET\r\n$1\r\na\r\n$1\r\nb\r\nnot a command\r\n*1\r\n$4\r\nPING\r\n")
    until(revived(broker))
    assert (folder.parent / "appendonlydir.broken-1").is_dir()
    assert any("no job is lost" in line for line in said)


def test_the_broker_dies_with_a_killed_parent(tmp_path: Path) -> None:
    program = (
        "import sys, time, pathlib\n"
        "from powergrad.cli.stack import Stack, ask_valkey\n"
        f"made = Stack(pathlib.Path({str(tmp_path)!r}))\n"
        "made._make_folders(); part = made._valkey(); part.start()\n"
        "while not ask_valkey(made._socket): time.sleep(0.01)\n"
        "print(part.process.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
    until(lambda: not is_alive(pid), within_s=5)


def test_a_second_stack_is_refused_and_told_who_holds_the_directory(tmp_path: Path) -> None:
    lock = stack.take_lock(tmp_path / "powergrad.lock")
    with pytest.raises(StackError, match=rf"pid {os.getpid()};"):
        Stack(tmp_path, port=0).start()
    lock.close()
    stack.take_lock(tmp_path / "powergrad.lock").close()


def test_loopback_is_told_by_name_and_address() -> None:
    assert all(stack.is_loopback(host) for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"))
    assert not any(stack.is_loopback(host) for host in ("0.0.0.0", "192.168.1.5", "::", "example.org", ""))


def test_a_taken_port_is_refused_with_a_way_out(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StackError, match=f"port {port} on 127.0.0.1: .*--port"):
            Stack(tmp_path, port=port).start()
    stack.take_lock(tmp_path / "powergrad.lock").close()  # the refused start has let go of the directory


def test_a_part_that_keeps_dying_is_started_ever_later(tmp_path: Path, said: list[str]) -> None:
    made = Stack(tmp_path, say=said.append)
    made._make_folders()
    part = Part(
        "api", [sys.executable, "-c", "print('no such luck'); raise SystemExit(7)"], made.logs / "api.log", tmp_path, dict(os.environ)
    )
    made.parts = [part]
    part.start()

    def three_deaths() -> bool:
        made.tend()
        return part.deaths == 3

    until(three_deaths)
    assert part.wait_s == pytest.approx(0.8)
    assert "ended with exit code 7; starting it again in 0.2 s" in said[0]
    assert "no such luck" in said[0], "the reason stands in the log, and is told with the death"
    assert "in 0.8 s" in said[2]
    made.stop()


def test_what_ignores_sigterm_is_killed_after_its_grace(tmp_path: Path) -> None:
    made = Stack(tmp_path)
    made._make_folders()
    program = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    part = Part("worker", [sys.executable, "-c", program], made.logs / "worker.log", tmp_path, dict(os.environ))
    made.parts = [part]
    part.start()
    until(lambda: "deaf" in stack.tail(part.log, 1))
    assert part.process is not None
    made.stop(grace_s=0.2)
    assert part.process.returncode == -signal.SIGKILL


def test_a_socket_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(StackError, match="belongs to you"):
        stack.check_private(tmp_path / "link")


def test_a_log_that_has_grown_is_put_aside(tmp_path: Path) -> None:
    log = tmp_path / "api.log"
    with log.open("wb") as file:
        file.truncate(stack.LOG_LIMIT_BYTES + 1)
    stack.rotate(log)
    assert not log.exists()
    assert (tmp_path / "api.log.1").exists()


def test_a_live_log_that_has_grown_is_copied_and_emptied_under_its_writer(tmp_path: Path) -> None:
    """The child goes on at the new end: no hole as long as the old log, and the old lines stand in the copy."""
    made = Stack(tmp_path)
    made._make_folders()
    program = "import sys; [print(line.strip(), flush=True) for line in sys.stdin]"
    part = Part("api", [sys.executable, "-c", program], made.logs / "api.log", tmp_path, dict(os.environ))
    with part.log.open("ab") as log:
        part.process = subprocess.Popen(part.command, stdin=subprocess.PIPE, stdout=log)
    made.parts = [part]
    assert part.process.stdin is not None
    try:
        part.process.stdin.write(b"x" * stack.LOG_LIMIT_BYTES + b"\n")
        part.process.stdin.flush()
        until(lambda: part.log.stat().st_size > stack.LOG_LIMIT_BYTES)
        made.tend()
        assert part.log.stat().st_size == 0
        assert (made.logs / "api.log.1").stat().st_size == stack.LOG_LIMIT_BYTES + 1
        part.process.stdin.write(b"new\n")
        part.process.stdin.flush()
        until(lambda: part.log.read_bytes() == b"new\n")
    finally:
        part.process.stdin.close()
        part.process.wait()


@pytest.mark.parametrize("code", sorted(stack.HOPELESS_EXITS))
def test_a_first_start_that_says_it_is_hopeless_is_not_repeated(tmp_path: Path, said: list[str], code: int) -> None:
    made = Stack(tmp_path, say=said.append)
    made._make_folders()
    program = f"print('POWERGRAD_X=y: must be z'); raise SystemExit({code})"
    part = Part("worker", [sys.executable, "-c", program], made.logs / "worker.log", tmp_path, dict(os.environ))
    part.log.write_text("what an earlier start said\n")
    made.parts = [part]
    part.start()
    until(lambda: not part.is_alive)
    with pytest.raises(StackError, match=rf"worker cannot start \(exit code {code}\)[^$]*POWERGRAD_X=y: must be z") as told:
        made.ready(10.0)
    assert "earlier" not in str(told.value)
    assert said == []


def test_a_setting_that_is_wrong_stops_the_start_with_the_part_s_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POWERGRAD_LOG_FORMAT", "runes")
    made = Stack(tmp_path, port=0)
    try:
        made.start()
        with pytest.raises(StackError, match=r"cannot start \(exit code \d+\)"):
            made.ready(60.0)
        assert {part.deaths for part in made.parts} == {0}
    finally:
        made.stop(grace_s=5.0)


@pytest.mark.parametrize("given", ["postgresql+psycopg://somewhere/else", "", None])
def test_the_database_is_the_environment_s_or_the_data_directory_s_own(
    given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("POWERGRAD_DATABASE_URL", raising=False)
    if given is not None:
        monkeypatch.setenv("POWERGRAD_DATABASE_URL", given)
    assert Stack(tmp_path)._environment()["POWERGRAD_DATABASE_URL"] == (given or f"sqlite:///{tmp_path / 'powergrad.db'}")


def test_a_path_that_sqlite_cannot_open_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    long = tmp_path / "/".join(["x" * 100] * 5)
    with pytest.raises(StackError, match="SQLite opens at most 504; choose a shorter one"):
        Stack(long, port=0).start()
    assert list(tmp_path.iterdir()) == []


def test_the_longest_path_allowed_is_one_that_sqlite_opens(tmp_path: Path) -> None:
    left = stack.DATABASE_PATH_LIMIT - len(os.fsencode(tmp_path)) - len("/powergrad.db")
    names = ["x" * 99] * (left // 100) + ["y" * (left % 100 - 1)] * (left % 100 > 1)
    made = Stack(tmp_path.joinpath(*names), port=0)
    made._make_folders()
    made._migrate()
    assert (made.data_dir / "powergrad.db").stat().st_size > 0


def test_importing_the_guard_loads_no_library(tmp_path: Path) -> None:
    """It lives as long as the service does: it must stay small."""
    program = "import json, sys, powergrad.cli.guard; print(json.dumps([*sys.modules]))"
    printed = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    packages = {name.partition(".")[0] for name in json.loads(printed)}
    assert packages.isdisjoint({"pydantic", "httpx2", "typer", "rich", "sqlalchemy", "torch", "api", "worker"})
