"""Many series at once: the right runs, the ends and extremes of each, and the axes they are drawn along."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from powergrad.jobs import comparisons, metrics
from powergrad.jobs.comparisons import Axis
from powergrad.jobs.errors import JobNotFound
from powergrad.jobs.metrics import BLOCK, CHUNK, Point
from powergrad.jobs.queries import Filter
from powergrad.jobs.store import Store
from tests.jobs import builders

LENGTHS = (0, 1, 4, BLOCK, 299, 300, 301, CHUNK - 1, CHUNK, CHUNK + 1, 10 * CHUNK, 10_007)


def series(length: int, seed: int = 0) -> list[Point]:
    """At uneven steps; here and there a value is not finite."""
    draw = random.Random(f"{length} {seed}")
    return [(3 * i + draw.randrange(3), math.nan if draw.random() < 0.01 else draw.gauss(0.0, 1.0)) for i in range(length)]


def stored(store: Store, points: Sequence[Point], name: str = "val_top1") -> str:
    job_id = builders.submit(store)
    builders.do(store, metrics.append, job_id, {name: list(points)})
    return job_id


def test_every_series_keeps_its_ends_and_extremes_whatever_its_length(store: Store) -> None:
    whole = {stored(store, points): points for points in map(series, LENGTHS)}
    with store.read() as tx:
        found = comparisons.curves(tx, list(whole), "val_top1", points=300)
    for job_id, points in whole.items():
        curve = comparisons.thinned(found[job_id], 300)
        shown = list(zip(curve.steps, curve.values, strict=True))
        assert curve.total == len(points)
        assert len(shown) <= 300
        assert set(curve.steps) <= {step for step, _ in points}
        assert list(curve.steps) == sorted(set(curve.steps))
        if len(points) <= 300:
            assert repr(shown) == repr(points)
            continue
        finite = [value for _, value in points if not math.isnan(value)]
        seen = [value for _, value in shown if not math.isnan(value)]
        assert (min(seen), max(seen)) == (min(finite), max(finite))
        assert repr((shown[0], shown[-1])) == repr((points[0], points[-1]))


def test_each_part_of_a_long_series_keeps_its_extremes(store: Store) -> None:
    """A spike of one step is seen, wherever it is."""
    for spike in (0, 1, 17, 5000, 9_990, 9_999):
        job_id = stored(store, [(i, 100.0 if i == spike else math.sin(i / 50)) for i in range(10_000)])
        with store.read() as tx:
            curve = comparisons.thinned(comparisons.curves(tx, [job_id], "val_top1", points=100)[job_id], 100)
        assert (spike, 100.0) in set(zip(curve.steps, curve.values, strict=True))


def test_a_series_without_a_finite_value_is_shown_as_that(store: Store) -> None:
    job_id = stored(store, [(i, math.nan) for i in range(1000)])
    with store.read() as tx:
        curve = comparisons.thinned(comparisons.curves(tx, [job_id], "val_top1", points=50)[job_id], 50)
    assert 4 <= len(curve.steps) <= 50
    assert all(math.isnan(value) for value in curve.values)


def test_a_series_that_was_cut_back_shows_nothing_of_what_went(store: Store) -> None:
    job_id = stored(store, [(i, 0.0 if i < 3000 else 9.0) for i in range(5000)])
    builders.do(store, metrics.truncate, job_id, 2999)
    with store.read() as tx:
        curve = comparisons.curves(tx, [job_id], "val_top1", points=100)[job_id]
    assert (curve.total, curve.steps[-1], set(curve.values)) == (3000, 2999, {0.0})


def test_runs_come_as_asked_and_only_those_that_fit(store: Store) -> None:
    first, second, third = (builders.submit(store, labels={"n": str(n)}) for n in range(3))
    with store.read() as tx:
        assert [row.id for row in comparisons.choose(tx, Filter(), job_ids=[third, first, third]).rows] == [third, first]
        assert [row.id for row in comparisons.choose(tx, Filter(labels={"n": "1"})).rows] == [second]
        assert [row.id for row in comparisons.choose(tx, Filter(labels={"n": "0"}), job_ids=[third, first]).rows] == [first]
        assert [row.id for row in comparisons.choose(tx, Filter()).rows] == [third, second, first]


def test_jobs_of_others_are_named_as_unknown(store: Store) -> None:
    mine, other = builders.submit(store), builders.submit(store, owner="ben")
    with store.read() as tx, pytest.raises(JobNotFound, match=other) as caught:
        comparisons.choose(tx, Filter(), job_ids=[mine, other])
    assert mine not in str(caught.value)


def test_of_more_than_can_be_compared_the_newest_are(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [builders.submit(store) for _ in range(3)]
    monkeypatch.setattr(comparisons, "MOST_RUNS", 2)
    with store.read() as tx:
        chosen = comparisons.choose(tx, Filter())
    assert ([row.id for row in chosen.rows], chosen.has_more) == ([ids[2], ids[1]], True)


def test_a_run_can_be_drawn_along_steps_epochs_or_seconds(store: Store) -> None:
    run = builders.running(store, data={"dataset": "digits", "batch_size": 50})
    steps = [builders.step(number, 1.0) for number in range(1, 31)]
    builders.record(store, run, builders.plan(epochs=3), *steps, builders.evaluation(10, 0.5), builders.evaluation(30, 0.75))
    with store.read() as tx:
        chosen = comparisons.choose(tx, Filter(), job_ids=[run.job_id])
        speed = metrics.read(tx, run.job_id, metrics.SPEED).values[0]
        (shown,) = comparisons.compare(tx, chosen, "val_top1", points=300, axis=Axis.STEP)
        assert (shown["x"], shown["values"], shown["run"], shown["total"]) == ([10, 30], [0.5, 0.75], chosen.rows[0].name, 2)
        assert comparisons.compare(tx, chosen, "val_top1", points=300, axis=Axis.EPOCH)[0]["x"] == [1.0, 3.0]
        assert speed is not None
        seconds = comparisons.compare(tx, chosen, "val_top1", points=300, axis=Axis.SECONDS)[0]["x"]
        assert seconds == pytest.approx([10 * 50 / speed, 30 * 50 / speed], rel=1e-5)


def test_where_no_speed_was_told_there_are_no_seconds(store: Store) -> None:
    job_id = stored(store, [(1, 0.5)])
    with store.read() as tx:
        chosen = comparisons.choose(tx, Filter(), job_ids=[job_id])
        assert comparisons.compare(tx, chosen, "val_top1", points=300, axis=Axis.SECONDS)[0]["x"] == [None]
