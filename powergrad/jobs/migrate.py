"""Bring a job database to this release's schema: `python -P -m powergrad.jobs.migrate` (POWERGRAD_DATABASE_URL, or --database-url).

Any number may run at once: PostgreSQL waits on an advisory lock, SQLite on its write lock. POWERGRAD_FIRST_ADMIN, as ID:SHA256 of a key's secret,
gives a database that knows no key yet its first.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text

from powergrad.jobs import keys
from powergrad.jobs.store import Store

FIRST_ADMIN = "POWERGRAD_FIRST_ADMIN"
ADVISORY_LOCK = 0x706F776572  # "power"


def migrate(store: Store) -> None:
    """Create or upgrade the tables; nothing happens when they are current."""
    with store.engine.connect().execution_options(writes=True) as connection, connection.begin():
        if not store.is_sqlite:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": ADVISORY_LOCK})
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def is_current(store: Store) -> bool:
    """Whether the database's schema is this release's."""
    with store.engine.connect() as connection:
        found = MigrationContext.configure(connection).get_current_revision()
    return found == ScriptDirectory.from_config(_config()).get_current_head()


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def main() -> int:
    parser = argparse.ArgumentParser(description="Bring the job database to this release's schema.")
    parser.add_argument(
        "--database-url", default=os.environ.get("POWERGRAD_DATABASE_URL"), help="SQLAlchemy URL; default $POWERGRAD_DATABASE_URL"
    )
    url, first_admin = parser.parse_args().database_url, os.environ.get(FIRST_ADMIN)
    if not url:
        parser.error("no database: give --database-url or set POWERGRAD_DATABASE_URL")
    store = Store(url)
    try:
        migrate(store)
        if first_admin:
            with store.write() as tx:
                keys.adopt(tx, first_admin, owner="admin", name="first")
    except ValueError as error:
        parser.error(f"{FIRST_ADMIN}: {error}")
    finally:
        store.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
