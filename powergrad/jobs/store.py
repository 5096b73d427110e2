"""The job store's connection: one code for SQLite and PostgreSQL.

A `Tx` is one transaction with the database's idea of the time. `store.write()` on SQLite takes the write lock at once (BEGIN IMMEDIATE),
so that a transaction never fails half-way because it was read first; on PostgreSQL it is READ COMMITTED, and every decision is made by a
conditional UPDATE.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, CursorResult, Engine, Row, Table, create_engine, event, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.sql import Executable

BUSY_TIMEOUT_MS = 10_000
IDLE_TRANSACTION_MS = 10_000
"""PostgreSQL ends a transaction that says nothing for so long: of a process that is frozen, or whose host is gone, with rows in its hand that
another is to take over."""
KEEPALIVE = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 20_000}
"""So that a server whose host is gone is an error within a lease and not after the kernel's quarter of an hour."""
Clock = Callable[[], int]
Parameters = dict[str, Any] | Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Tx:
    """One open transaction. now_ms: the database clock at its start. job_ttl_s: of jobs that have none of their own; None is for ever."""

    connection: Connection
    now_ms: int
    job_ttl_s: float | None = None

    def run(self, statement: Executable, parameters: Parameters | None = None) -> CursorResult[Any]:
        return self.connection.execute(statement, parameters)

    def one(self, statement: Executable, parameters: dict[str, Any] | None = None) -> Row[Any] | None:
        return self.connection.execute(statement, parameters).first()

    def all(self, statement: Executable, parameters: dict[str, Any] | None = None) -> Sequence[Row[Any]]:
        return self.connection.execute(statement, parameters).all()

    def insert(self, table: Table) -> sqlite.Insert | postgresql.Insert:
        """An INSERT that knows ON CONFLICT, which both databases spell alike and SQLAlchemy keeps in the dialects."""
        return postgresql.insert(table) if self.connection.dialect.name == "postgresql" else sqlite.insert(table)


class Store:
    """A job database by URL: `sqlite:////abs/path.db` or `postgresql+psycopg://…`.

    clock: milliseconds since 1970, in place of the database's own clock (tests of leases).  job_ttl_s: seconds after its end that a job
    goes which does not say so itself.
    """

    def __init__(self, url: str, *, clock: Clock | None = None, pool_size: int = 5, job_ttl_s: float | None = None) -> None:
        self.url = make_url(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self._clock = clock
        self.job_ttl_s = job_ttl_s
        self.engine = _engine(url, is_sqlite=self.is_sqlite, pool_size=pool_size)

    @contextmanager
    def read(self) -> Iterator[Tx]:
        """A transaction that only looks; it never waits for a writer on SQLite (WAL)."""
        with self.engine.connect() as connection, connection.begin():
            yield Tx(connection, self._now_ms(connection), self.job_ttl_s)

    @contextmanager
    def write(self) -> Iterator[Tx]:
        """A transaction that commits when the block ends well and leaves no trace when it raises."""
        with self.engine.connect().execution_options(writes=True) as connection, connection.begin():
            yield Tx(connection, self._now_ms(connection), self.job_ttl_s)

    def _now_ms(self, connection: Connection) -> int:
        if self._clock is not None:
            return self._clock()
        if self.is_sqlite:
            return time.time_ns() // 1_000_000  # SQLite's clock is the host's
        return int(connection.execute(text("SELECT floor(EXTRACT(EPOCH FROM clock_timestamp()) * 1000)::bigint")).scalar_one())

    def close(self) -> None:
        self.engine.dispose()


def rfc3339(at_ms: int | None) -> str | None:
    """`2026-11-23T09:10:32.120Z`."""
    if at_ms is None:
        return None
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def is_unavailable(error: BaseException) -> bool:
    """True for errors that say the database is away, busy or has dropped the connection: worth trying again later."""
    if isinstance(error, PoolTimeout | OperationalError | InterfaceError):
        return True
    return isinstance(error, DBAPIError) and error.connection_invalidated


def is_full(error: BaseException) -> bool:
    """True for errors that say the database's disk is full (SQLSTATE 53100 is PostgreSQL's word)."""
    cause = error.orig if isinstance(error, DBAPIError) else None
    return getattr(cause, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL or getattr(cause, "sqlstate", None) == "53100"


def _engine(url: str, *, is_sqlite: bool, pool_size: int) -> Engine:
    options: dict[str, Any] = {"json_serializer": _dumps, "pool_size": pool_size, "max_overflow": 10}
    if not is_sqlite:
        engine = create_engine(url, pool_pre_ping=True, connect_args={"connect_timeout": 5, **KEEPALIVE}, **options)
        event.listen(engine, "connect", _prepare_postgresql)
        return engine
    path = make_url(url).database
    if path and path != ":memory:":
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_MS / 1000, "check_same_thread": False}, **options)
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_postgresql(connection: Any, _record: Any) -> None:
    connection.execute(f"SET idle_in_transaction_session_timeout = {IDLE_TRANSACTION_MS}")
    connection.commit()


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves
    cursor = connection.cursor()
    _switch_to_wal(cursor)
    # FULL: an accepted job survives a power cut, as the 202 promises
    for pragma in (f"busy_timeout={BUSY_TIMEOUT_MS}", "synchronous=FULL", "foreign_keys=ON", "cache_size=-4000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _switch_to_wal(cursor: Any) -> None:
    """Waits like any writer: SQLite itself fails at once where two connections switch a new file at the same time."""
    deadline = time.monotonic() + BUSY_TIMEOUT_MS / 1000
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("writes") else "BEGIN")


_ENCODER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False)  # one for all: making one costs as much as using it


def _dumps(value: Any) -> str:
    """JSON that both databases hold: PostgreSQL takes no NUL, UTF-8 no lone surrogate, and a trainer's log may bring either."""
    text = _ENCODER.encode(value)
    if "\\u0000" in text:
        text = _ENCODER.encode(_without_nul(value))
    return text.encode(errors="replace").decode()


def _without_nul(value: Any) -> Any:
    match value:
        case str():
            return value.replace("\0", "\ufffd")
        case dict():
            return {_without_nul(key): _without_nul(item) for key, item in value.items()}
        case list() | tuple():
            return [_without_nul(item) for item in value]
        case _:
            return value
