"""Series, their levels, and what reading fewer points keeps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from powergrad.jobs import metrics
from powergrad.jobs.metrics import BLOCK, CHUNK, MAX_LEVEL, Point
from powergrad.jobs.store import Store, Tx
from powergrad.jobs.tables import metadata, metric_chunks

values = st.one_of(st.floats(-1e6, 1e6), st.just(math.nan), st.sampled_from([0.0, -0.0, 1.0]))


@pytest.fixture(scope="module")
def tx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tx]:
    """One open transaction for all: the levels are arithmetic, and hypothesis wants many rounds."""
    store = Store(f"sqlite:///{tmp_path_factory.mktemp('metrics')}/jobs.db")
    with store.write() as opened:
        metadata.create_all(opened.connection)
        yield opened
    store.close()


def series(length: int, draw: Sequence[float]) -> list[Point]:
    """`length` points at rising, uneven steps; the values go through `draw` again and again, so that they cost hypothesis little."""
    return [(3 * i + i % 2, draw[i * 7 % len(draw)] if i % 11 else float(i)) for i in range(length)]


def stored(tx: Tx, job_id: str) -> list[tuple[object, ...]]:
    order = (metric_chunks.c.name, metric_chunks.c.level, metric_chunks.c.ordinal)
    rows = tx.all(select(metric_chunks).where(metric_chunks.c.job_id == job_id).order_by(*order))
    return [(row.name, row.level, row.ordinal, row.count, row.last_step, row.points) for row in rows]


def rebuilt(tx: Tx, points: list[Point]) -> list[tuple[object, ...]]:
    tx.run(metric_chunks.delete())
    metrics.append(tx, "whole", {"loss": points})
    found = stored(tx, "whole")
    tx.run(metric_chunks.delete())
    return found


@given(st.data())
def test_levels_are_a_pure_function_of_the_points(tx: Tx, data: st.DataObject) -> None:
    """Appended in any batches, cut back and appended again: the same bytes as when stored at once."""
    tx.run(metric_chunks.delete())
    points = series(data.draw(st.integers(1, 3 * CHUNK)), data.draw(st.lists(values, min_size=1, max_size=40)))
    for _ in range(data.draw(st.integers(1, 3))):
        for cut in sorted({*data.draw(st.lists(st.integers(1, len(points)), max_size=5)), len(points)}):
            metrics.append(tx, "job", {"loss": points[:cut]})  # what is stored already comes again, and is dropped
        keep = data.draw(st.integers(0, len(points)))
        metrics.truncate(tx, "job", points[keep - 1][0] if keep else -1)
        left = points[:keep]
        assert metrics.read(tx, "job", "loss").steps == [step for step, _ in left]
        found = stored(tx, "job")
        assert found == rebuilt(tx, left)
        metrics.append(tx, "job", {"loss": left})


@given(
    length=st.integers(1, 20_000),
    draw=st.lists(values, min_size=1, max_size=60),
    limit=st.integers(1, 700),
    share=st.floats(-0.1, 1.1),
)
def test_reading_fewer_points_keeps_the_ends_and_the_extremes(tx: Tx, length: int, draw: list[float], limit: int, share: float) -> None:
    tx.run(metric_chunks.delete())
    points = series(length, draw)
    metrics.append(tx, "job", {"loss": points})
    after = round(share * points[-1][0])
    wanted = [(step, value) for step, value in points if step > after]
    found = metrics.read(tx, "job", "loss", points=limit, after=after)
    assert found.total == length
    assert len(found.steps) <= max(limit, 4)
    assert found.steps == sorted(set(found.steps))
    truth = {step: None if math.isnan(value) else value for step, value in wanted}
    assert all(truth[step] == value for step, value in zip(found.steps, found.values, strict=True))
    if wanted:
        assert (found.steps[0], found.steps[-1]) == (wanted[0][0], wanted[-1][0])
    finite = [value for value in truth.values() if value is not None]
    if finite:
        shown = [value for value in found.values if value is not None]
        assert (min(shown), max(shown)) == (min(finite), max(finite))


def test_reading_all_points_gives_every_one(tx: Tx) -> None:
    tx.run(metric_chunks.delete())
    points = [(i, float(i)) for i in range(3 * CHUNK + 5)]
    metrics.append(tx, "job", {"loss": points})
    found = metrics.read(tx, "job", "loss")
    assert list(zip(found.steps, found.values, strict=True)) == points
    assert metrics.read(tx, "job", "loss", after=3 * CHUNK).steps == list(range(3 * CHUNK + 1, 3 * CHUNK + 5))


def test_a_long_series_is_read_through_few_points(tx: Tx, monkeypatch: pytest.MonkeyPatch) -> None:
    tx.run(metric_chunks.delete())
    metrics.append(tx, "job", {"loss": [(i, math.sin(i / 1000)) for i in range(200_000)]})
    unpacked = []
    unpack = metrics._unpack

    def counting(data: bytes) -> list[Point]:
        unpacked.append(len(data) // 16)
        return unpack(data)

    monkeypatch.setattr(metrics, "_unpack", counting)
    assert len(metrics.read(tx, "job", "loss", points=500).steps) <= 500
    assert sum(unpacked) < 8 * (500 + CHUNK) + 2 * MAX_LEVEL * CHUNK  # one level, and two chunks of each finer one


def test_points_that_do_not_rise_are_dropped_and_infinity_is_kept_as_a_gap(tx: Tx) -> None:
    tx.run(metric_chunks.delete())
    metrics.append(tx, "job", {"loss": [(5, 1.0), (5, 2.0), (3, 9.0), (6, math.inf)]})
    found = metrics.read(tx, "job", "loss")
    assert (found.steps, found.values) == ([5, 6], [1.0, None])


def test_values_at_a_step_and_the_latest_ones(tx: Tx) -> None:
    tx.run(metric_chunks.delete())
    metrics.append(tx, "job", {"a": [(i, float(i)) for i in range(2 * BLOCK)], "b": [(4, math.nan)], "c": [(9, 1.0)]})
    assert metrics.values_at(tx, "job", 4) == {"a": 4.0, "b": None}
    assert metrics.latest(tx, "job") == {"a": 31.0, "b": None, "c": 1.0}
    assert metrics.names(tx, "job") == ["a", "b", "c"]


def test_jobs_and_names_do_not_touch_each_other(store: Store) -> None:
    with store.write() as tx:
        for job_id in ("one", "two"):
            metrics.append(tx, job_id, {"a": [(i, 1.0) for i in range(40)], "b": [(i, 2.0) for i in range(0, 40, 2)]})
        metrics.truncate(tx, "one", 10)
    with store.read() as tx:
        lengths = {(job_id, name): metrics.read(tx, job_id, name).total for job_id in ("one", "two") for name in "ab"}
    assert lengths == {("one", "a"): 11, ("one", "b"): 6, ("two", "a"): 40, ("two", "b"): 20}
