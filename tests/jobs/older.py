"""A database as the first release left it, made of today's by the way back: its tables, and specs without what came later."""

from __future__ import annotations

from alembic import command
from sqlalchemy import select, update

from powergrad.jobs.migrate import _config, is_current
from powergrad.jobs.store import Store
from powergrad.jobs.tables import jobs

NEW_FIELDS = frozenset({"retention", "outputs"})
"""Of a spec, since 0001."""


def make_older(store: Store, revision: str = "0001") -> None:
    """Takes the schema back to `revision`, with all rows in it."""
    with store.engine.connect().execution_options(writes=True) as connection, connection.begin():
        for row in connection.execute(select(jobs.c.id, jobs.c.spec)).all():
            spec = {name: value for name, value in row.spec.items() if name not in NEW_FIELDS}
            connection.execute(update(jobs).where(jobs.c.id == row.id).values(spec=spec))
        config = _config()
        config.attributes["connection"] = connection
        command.downgrade(config, revision)
    assert not is_current(store)
