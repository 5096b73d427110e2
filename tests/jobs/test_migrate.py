"""The migrations make what the code's tables say, from nothing, once, however many start at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, text

from powergrad.jobs import keys, lifecycle, queries
from powergrad.jobs.migrate import _config, is_current, migrate
from powergrad.jobs.states import JobState
from powergrad.jobs.store import Store
from powergrad.jobs.tables import metadata
from tests.jobs.builders import at_once, bring_to, claimed, do, finish, running, state, submit
from tests.jobs.older import make_older


def test_the_migrated_schema_is_the_codes_own(empty_database_url: str) -> None:
    store = Store(empty_database_url)
    assert not is_current(store)
    migrate(store)
    assert is_current(store)
    with store.engine.connect() as connection:
        # alembic does not see into SQLite's indexes: they are compared below, as SQL
        options = {
            "compare_type": True,
            "compare_server_default": True,
            "include_object": lambda *found: not store.is_sqlite or found[2] != "index",
        }
        assert compare_metadata(MigrationContext.configure(connection, opts=options), metadata) == []
    store.close()


def test_the_migrated_indexes_are_the_codes_own(tmp_path: Path) -> None:
    migrated, created = Store(f"sqlite:///{tmp_path}/migrated.db"), Store(f"sqlite:///{tmp_path}/created.db")
    migrate(migrated)
    metadata.create_all(created.engine)
    assert indexes(migrated) == indexes(created) != set()
    migrated.close()
    created.close()


def indexes(store: Store) -> set[str]:
    with store.read() as tx:
        return {row.sql for row in tx.all(text("SELECT sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL"))}


def test_the_schema_can_be_taken_back(empty_database_url: str) -> None:
    store = Store(empty_database_url)
    migrate(store)
    with store.engine.connect().execution_options(writes=True) as connection, connection.begin():
        config = _config()
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
    assert set(inspect(store.engine).get_table_names()) == {"alembic_version"}
    migrate(store)
    submit(store)
    store.close()


def test_jobs_of_the_first_release_go_on_after_the_upgrade(empty_database_url: str) -> None:
    store = Store(empty_database_url)
    migrate(store)
    run = running(store)
    in_order = sorted(JobState, key=lambda wanted: wanted is JobState.QUEUED)  # last, or the others' claims would take it
    job_ids = {wanted: bring_to(store, wanted) for wanted in in_order}
    make_older(store)
    migrate(store)
    assert {wanted: state(store, job_id) for wanted, job_id in job_ids.items()} == {wanted: wanted for wanted in JobState}
    assert finish(store, run) is JobState.SUCCEEDED, "its worker is of the old release still"
    assert claimed(store).run.job_id == job_ids[JobState.QUEUED]
    do(store, lifecycle.resume, job_ids[JobState.PAUSED])
    for ended in (JobState.FAILED, JobState.CANCELLED):
        do(store, lifecycle.retry, job_ids[ended])
    assert {claimed(store).run.job_id for _ in range(3)} == {job_ids[s] for s in (JobState.PAUSED, JobState.FAILED, JobState.CANCELLED)}
    do(store, lifecycle.remove, job_ids[JobState.SUCCEEDED])
    with store.read() as tx:
        shown = queries.get(tx, run.job_id)
    assert (shown["state"], shown["spec"]["data"]["dataset"]) == ("succeeded", "digits")
    store.close()


def test_many_may_migrate_at_once_and_again(empty_database_url: str) -> None:
    def once() -> bool:
        store = Store(empty_database_url)
        migrate(store)
        store.close()
        return True

    assert all(at_once([once] * 4))
    store = Store(empty_database_url)
    job_id = submit(store)
    migrate(store)
    assert job_id
    store.close()


def test_the_command_migrates_from_any_directory(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/cli.db"
    done = subprocess.run(
        [sys.executable, "-P", "-m", "powergrad.jobs.migrate", "--database-url", url],
        cwd=tmp_path,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    store = Store(url)
    assert is_current(store)
    store.close()


def test_the_command_says_what_it_needs() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "powergrad.jobs.migrate"], env={"PATH": ""}, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert b"POWERGRAD_DATABASE_URL" in done.stderr


def migrated_by_command(database: Path, first_admin: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"POWERGRAD_DATABASE_URL": f"sqlite:///{database}", "POWERGRAD_FIRST_ADMIN": first_admin}
    command = [sys.executable, "-P", "-m", "powergrad.jobs.migrate"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_command_gives_a_new_database_its_first_admin(tmp_path: Path) -> None:
    told = f"0123456789ab:{keys.digest('secret')}"
    for _ in range(2):  # compose runs it at every `up`
        assert migrated_by_command(tmp_path / "jobs.db", told).returncode == 0
    store = Store(f"sqlite:///{tmp_path}/jobs.db")
    with store.read() as tx:
        assert [(key["id"], key["owner"], key["scopes"]) for key in keys.listed(tx)] == [
            ("0123456789ab", "admin", ["admin", "read", "submit"])
        ]
    store.close()


def test_the_command_says_what_a_first_admin_must_be(tmp_path: Path) -> None:
    done = migrated_by_command(tmp_path / "jobs.db", "pg_0123456789ab_secret")
    assert done.returncode == 2
    assert "POWERGRAD_FIRST_ADMIN: must be ID:SHA256" in done.stderr
    assert "secret" not in done.stderr
