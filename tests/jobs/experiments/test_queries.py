"""Experiments as JSON: pages, ETags, progress, and 500 jobs by a few statements."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import event

from powergrad.jobs import lifecycle as job_moves
from powergrad.jobs import recording
from powergrad.jobs.experiments import lifecycle, queries
from powergrad.jobs.queries import Filter
from powergrad.jobs.queries import page as job_page
from powergrad.jobs.store import Store
from tests.jobs import builders as b
from tests.jobs.experiments import builders as e
from tests.stores import FakeClock


def pages(store: Store, *, limit: int, **wanted: Any) -> list[list[str]]:
    found: list[list[str]] = []
    after = None
    while True:
        with store.read() as tx:
            page = queries.page(tx, limit=limit, after=after, **wanted)
        found.append([one["id"] for one in page.data])
        if not page.has_more:
            return found
        after = found[-1][-1]


def test_pages_are_newest_first_and_whole(store: Store, clock: FakeClock) -> None:
    ids = []
    for _ in range(5):
        ids.append(e.submit(store))
        clock.advance(0.01)
    e.submit(store, owner="ada")
    b.do(store, lifecycle.cancel, ids[1])
    assert pages(store, limit=2) == [[ids[4], ids[3]], [ids[2], ids[1]], [ids[0]]]
    assert pages(store, limit=9, state=("cancelled",)) == [[ids[1]]]
    with store.read() as tx:
        assert queries.page(tx, limit=9).data[0] == queries.get(tx, ids[4])


def test_the_etag_changes_exactly_with_the_json(store: Store) -> None:
    experiment_id = e.submit(store)
    seen = {queries.etag(e.get(store, experiment_id))}
    assert queries.etag(e.get(store, experiment_id)) in seen
    run = b.claimed(store).run
    for change in (
        lambda: b.record(store, run, b.plan(epochs=2), b.step(10)),  # no row of the experiment has changed
        lambda: b.finish(store, run),
        lambda: b.do(store, lifecycle.amend, experiment_id, notes="why"),
    ):
        change()
        tag = queries.etag(e.get(store, experiment_id))
        assert tag not in seen
        seen.add(tag)


def test_the_time_left_is_told_at_the_pace_so_far(store: Store) -> None:
    experiment_id = e.submit(store)
    assert e.get(store, experiment_id)["progress"]["eta_s"] is None
    claim = b.claimed(store)
    b.do(store, recording.renew, claim.run, trained_ms=60_000)
    e.train(store, claim)
    b.claimed(store)
    assert e.get(store, experiment_id)["progress"] == {"fraction": 0.25, "runs_done": 1, "runs": 4, "eta_s": 180.0}


def test_progress_counts_what_tuning_will_still_bring(store: Store) -> None:
    experiment_id = e.submit(store, tune={"optimizer.lr": [0.1, 0.2]})
    e.train_all(store)
    assert e.get(store, experiment_id)["progress"]["fraction"] == 0.5
    assert e.get(store, experiment_id)["progress"]["runs"] == 8


def test_its_jobs_are_listed_by_its_id(store: Store) -> None:
    experiment_id = e.submit(store)
    b.submit(store)
    with store.read() as tx:
        assert len(job_page(tx, Filter(experiment=experiment_id), limit=100).data) == 4


@contextmanager
def statements(store: Store) -> Iterator[list[str]]:
    told: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        told.append(statement)

    event.listen(store.engine, "before_cursor_execute", note)
    try:
        yield told
    finally:
        event.remove(store.engine, "before_cursor_execute", note)


@pytest.mark.parametrize("act", [lifecycle.pause, lifecycle.cancel])
def test_five_hundred_jobs_are_moved_by_a_few_statements(store: Store, act: Callable[..., str]) -> None:
    """Whatever the machine does beside: 500 round trips more would take a second of their own."""
    alphas = [i / 10 for i in range(10)]
    experiment_id = e.submit(store, seeds=50, grid={"loss.alpha": alphas})
    b.claimed(store)
    with statements(store) as told:
        b.do(store, act, experiment_id)
    assert len(told) < 60
    with statements(store) as told, store.read() as tx:
        shown = queries.get(tx, experiment_id)
        queries.page(tx, limit=100)
    assert sum(shown["counts"].values()) == 500
    assert len(told) < 10


def test_a_job_that_is_retried_by_its_user_tells_its_experiment_nothing_else(store: Store) -> None:
    experiment_id = e.submit(store)
    e.settle(store, lambda *_: None)
    other = e.submit(store)
    version = e.get(store, other)["version"]
    b.do(store, job_moves.retry, e.runs(store, experiment_id)[0].job_id)
    e.advance(store)
    assert e.get(store, other)["version"] == version
