"""The connection: transactions, the clock, what JSON can be stored."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from sqlalchemy import select
from sqlalchemy.exc import DBAPIError, OperationalError

from powergrad.jobs import fleet, lifecycle
from powergrad.jobs.states import JobState
from powergrad.jobs.store import Store, is_unavailable, rfc3339
from powergrad.jobs.tables import catalogue
from tests.jobs.builders import state, submit


def test_a_transaction_that_raises_leaves_no_trace(store: Store) -> None:
    with pytest.raises(RuntimeError), store.write() as tx:
        fleet.publish(tx, "models", [{"name": "resnet18"}])
        raise RuntimeError
    with store.read() as tx:
        assert fleet.published(tx, "models") == []


def test_the_databases_own_clock_is_the_time(database_url: str) -> None:
    store = Store(database_url)
    before = time.time() * 1000
    with store.read() as tx:
        assert before - 1000 < tx.now_ms < time.time() * 1000 + 1000  # the server runs on this host
    store.close()


def test_text_that_a_database_cannot_hold_is_stored_with_replacement_characters(store: Store) -> None:
    entry = {"name": "log", "tail": ["a\0b", "\ud800", "a\\u0000"], "deep": {"k\0": "v"}, "n": 1.5}
    with store.write() as tx:
        fleet.publish(tx, "models", [entry])
    with store.read() as tx:
        found = tx.one(select(catalogue.c.entries))
    assert found is not None
    assert found.entries == [{"name": "log", "tail": ["a\ufffdb", "?", "a\\u0000"], "deep": {"k\ufffd": "v"}, "n": 1.5}]


def test_a_database_that_is_not_there_is_unavailable() -> None:
    store = Store("postgresql+psycopg://nobody@/nowhere?host=/nonexistent")
    with pytest.raises(OperationalError) as raised, store.read():
        pass
    assert is_unavailable(raised.value)
    assert not is_unavailable(ValueError("x"))


def test_a_process_frozen_in_a_transaction_does_not_keep_its_rows_on_postgresql(
    emptied: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = emptied()
    other = Store(url)
    job_id = submit(other)  # on a connection of the ordinary patience, which it keeps: a busy machine is silent for 300 ms as well
    monkeypatch.setattr("powergrad.jobs.store.IDLE_TRANSACTION_MS", 300)
    frozen = Store(url)
    with pytest.raises(DBAPIError) as raised, frozen.write() as tx:
        lifecycle.cancel(tx, job_id)
        with other.write() as later:  # waits for the row until the server has ended the silent one
            assert lifecycle.pause(later, job_id) is JobState.PAUSED
        lifecycle.cancel(tx, job_id)
    assert is_unavailable(raised.value)
    assert state(other, job_id) is JobState.PAUSED
    for store in (frozen, other):
        store.close()


def test_writers_wait_for_each_other_on_sqlite(sqlite_store: Store) -> None:
    """BEGIN IMMEDIATE: the second writer reads what the first has written, it does not fail half-way."""
    from tests.jobs.builders import at_once

    ids = at_once([lambda: submit(sqlite_store) for _ in range(8)])
    assert len(set(ids)) == 8


def test_times_are_utc_with_milliseconds() -> None:
    assert rfc3339(1_795_424_998_120) == "2026-11-23T09:09:58.120Z"
    assert rfc3339(None) is None
