"""Metric series: points in packed chunks, with min/max levels made at append, so that a plot of any length costs the same.

Level 0 holds every (step, value). Each whole block of 16 points of a level gives two points of the next: its minimum and its maximum,
in step order. Blocks are counted from the start of the series, so the levels are a pure function of the points, whatever the batches they
came in, and cutting a series back is arithmetic on counts. A value that is not finite is kept as NaN and never wins a minimum or maximum.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from sqlalchemy import and_, delete, func, select

from powergrad.jobs.store import Tx
from powergrad.jobs.tables import metric_chunks

BLOCK = 16
CHUNK = 1024  # points in a chunk: 16 KiB
MAX_LEVEL = 6
SPEED = "images_per_s"
CLOCK_DIGITS = 6
"""Significant digits of seconds: no clock here is finer."""

Point = tuple[int, float]


@dataclass(frozen=True)
class Series:
    """A (possibly downsampled) series. total: points stored; steps rise strictly."""

    name: str
    total: int
    steps: list[int]
    values: list[float | None]


def append(tx: Tx, job_id: str, points: dict[str, list[Point]]) -> None:
    """Add points to series by name; steps must rise, and points at or before a series' last step are dropped (they came twice)."""
    for name, new in points.items():
        tail = _tail(tx, job_id, name, 0)
        fresh = _rising(new, -1 if tail is None else tail.last_step)
        if fresh:
            _append_level(tx, job_id, name, 0, fresh)


def _rising(points: Iterable[Point], last: int) -> list[Point]:
    fresh = []
    for step, value in points:
        if step > last:
            fresh.append((step, value if math.isfinite(value) else math.nan))
            last = step
    return fresh


def truncate(tx: Tx, job_id: str, step: int) -> None:
    """Cut every series of a job back to the points at or before `step`."""
    names = [row.name for row in tx.all(select(metric_chunks.c.name).where(metric_chunks.c.job_id == job_id).distinct())]
    for name in names:
        keep = _count_up_to(tx, job_id, name, step)
        for level in range(MAX_LEVEL + 1):
            _cut(tx, job_id, name, level, keep)
            keep = keep // BLOCK * 2


def names(tx: Tx, job_id: str) -> list[str]:
    """Names of a job's series, sorted."""
    query = select(metric_chunks.c.name).where(metric_chunks.c.job_id == job_id, metric_chunks.c.level == 0).distinct()
    return sorted(row.name for row in tx.all(query))


def read(tx: Tx, job_id: str, name: str, *, points: int | None = None, after: int = -1) -> Series:
    """A series' points with step > `after`, at most about `points` of them (None: all), keeping every bucket's extremes and both ends."""
    total = _total(tx, job_id, name)
    if points is None:
        chosen = _points(tx, job_id, name, 0, after)
    else:
        chosen = reduce_to(_fewest(tx, job_id, name, points=points, after=after), points)
    return Series(name, total, [step for step, _ in chosen], [_finite(value) for _, value in chosen])


def latest(tx: Tx, job_id: str) -> dict[str, float | None]:
    """The last value of every series."""
    return {name: _finite(_unpack(_tail(tx, job_id, name, 0).points)[-1][1]) for name in names(tx, job_id)}


def values_at(tx: Tx, job_id: str, step: int) -> dict[str, float | None]:
    """The value of every series that has a point at exactly `step`."""
    found: dict[str, float | None] = {}
    for name in names(tx, job_id):
        head = _head_points(tx, job_id, name, 0, step - 1)
        if head and head[0][0] == step:
            found[name] = _finite(head[0][1])
    return found


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value


def reduce_to(points: Sequence[Point], limit: int) -> list[Point]:
    """At most max(limit, 4) of the points: both ends, and each bucket's minimum and maximum in step order."""
    buckets = max(1, (limit - 2) // 2)
    if len(points) <= max(limit, 4):
        return list(points)
    inner = points[1:-1]
    chosen = [points[0]]
    for i in range(buckets):
        chosen += _extremes(inner[i * len(inner) // buckets : (i + 1) * len(inner) // buckets])
    return [*chosen, points[-1]]


def _extremes(points: Sequence[Point]) -> list[Point]:
    finite = [point for point in points if not math.isnan(point[1])]
    if not finite:
        return list(points[:1])
    low, high = min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])
    return [low] if low[0] == high[0] else sorted((low, high))


def _block_pair(points: Sequence[Point]) -> list[Point]:
    """Exactly two points for a block, so that counts alone relate the levels."""
    extremes = _extremes(points)
    if len(extremes) == 2:
        return extremes
    other = points[-1] if points[-1][0] != extremes[0][0] else points[0]
    return sorted((extremes[0], other))


class Clock:
    """Seconds of training up to a step, added up from the speed that the trainer tells: evaluations and checkpoints are not in it.

    rates: images a second at each step; what is not known, or not finite, is left out.
    """

    def __init__(self, steps: Sequence[int], rates: Sequence[float | None], *, batch_size: int) -> None:
        known = [(step, batch_size / rate) for step, rate in zip(steps, rates, strict=True) if rate is not None and rate > 0]
        self._steps = [step for step, _ in known]
        self._of_step = [of_step for _, of_step in known]
        laps = [(step - before) * s for (step, before, s) in zip(self._steps, [0, *self._steps], self._of_step, strict=False)]
        self._sums = list(accumulate(laps))

    def at(self, step: int) -> float | None:
        """None where no speed is known at all."""
        if not self._steps:
            return None
        place = min(bisect_left(self._steps, step), len(self._steps) - 1)
        seconds = self._sums[place] + (step - self._steps[place]) * self._of_step[place]
        return float(f"{seconds:.{CLOCK_DIGITS}g}")


# --- storage ---------------------------------------------------------------------------------------------------------------------


def _append_level(tx: Tx, job_id: str, name: str, level: int, new: list[Point]) -> None:
    tail = _tail(tx, job_id, name, level)
    before = 0 if tail is None else tail.ordinal * CHUNK + tail.count
    ordinal, held = (0, []) if tail is None else (tail.ordinal, _unpack(tail.points))
    merged = held + new
    first_of_merged = ordinal * CHUNK
    for offset in range(0, len(merged), CHUNK):
        _put(tx, job_id, name, level, ordinal + offset // CHUNK, merged[offset : offset + CHUNK])
    if level < MAX_LEVEL:
        _fold(tx, job_id, name, level, before, first_of_merged, merged)


def _fold(tx: Tx, job_id: str, name: str, level: int, before: int, first: int, merged: list[Point]) -> None:
    """Make the next level's points for the blocks of this level that have just become whole."""
    start, end = before // BLOCK * BLOCK, (first + len(merged)) // BLOCK * BLOCK
    # CHUNK is a multiple of BLOCK, so a block that was begun lies in the tail chunk, which `merged` starts with
    pairs = [point for at in range(start, end, BLOCK) for point in _block_pair(merged[at - first : at - first + BLOCK])]
    if pairs:
        _append_level(tx, job_id, name, level + 1, pairs)


def _put(tx: Tx, job_id: str, name: str, level: int, ordinal: int, points: list[Point]) -> None:
    row = {"count": len(points), "last_step": points[-1][0], "points": _pack(points)}
    statement = tx.insert(metric_chunks).values(job_id=job_id, name=name, level=level, ordinal=ordinal, **row)
    tx.run(statement.on_conflict_do_update(index_elements=["job_id", "name", "level", "ordinal"], set_=row))


def _cut(tx: Tx, job_id: str, name: str, level: int, keep: int) -> None:
    whole, rest = divmod(keep, CHUNK)
    here = and_(metric_chunks.c.job_id == job_id, metric_chunks.c.name == name, metric_chunks.c.level == level)
    border = tx.one(select(metric_chunks).where(here, metric_chunks.c.ordinal == whole)) if rest else None
    tx.run(delete(metric_chunks).where(here, metric_chunks.c.ordinal >= whole))
    if border is not None:
        _put(tx, job_id, name, level, whole, _unpack(border.points)[:rest])


def _tail(tx: Tx, job_id: str, name: str, level: int) -> Any:
    query = select(metric_chunks).where(metric_chunks.c.job_id == job_id, metric_chunks.c.name == name, metric_chunks.c.level == level)
    return tx.one(query.order_by(metric_chunks.c.ordinal.desc()).limit(1))


def _total(tx: Tx, job_id: str, name: str) -> int:
    query = select(func.coalesce(func.sum(metric_chunks.c.count), 0)).where(
        metric_chunks.c.job_id == job_id, metric_chunks.c.name == name, metric_chunks.c.level == 0
    )
    return int(tx.run(query).scalar_one())


def _points(tx: Tx, job_id: str, name: str, level: int, after: int) -> list[Point]:
    query = select(metric_chunks.c.points).where(
        metric_chunks.c.job_id == job_id, metric_chunks.c.name == name, metric_chunks.c.level == level, metric_chunks.c.last_step > after
    )
    rows = tx.all(query.order_by(metric_chunks.c.ordinal))
    return [point for row in rows for point in _unpack(row.points) if point[0] > after]


def _count_up_to(tx: Tx, job_id: str, name: str, step: int) -> int:
    here = and_(metric_chunks.c.job_id == job_id, metric_chunks.c.name == name, metric_chunks.c.level == 0)
    border = tx.one(select(metric_chunks).where(here, metric_chunks.c.last_step > step).order_by(metric_chunks.c.ordinal).limit(1))
    if border is None:
        return _total(tx, job_id, name)
    return int(border.ordinal) * CHUNK + sum(at <= step for at, _ in _unpack(border.points))


def _fewest(tx: Tx, job_id: str, name: str, *, points: int, after: int) -> list[Point]:
    """The coarsest level that still has `points` points after `after`, completed at both ends by finer ones."""
    level = 0
    here = and_(metric_chunks.c.job_id == job_id, metric_chunks.c.name == name, metric_chunks.c.last_step > after)
    counts = {
        row.level: row.n
        for row in tx.all(select(metric_chunks.c.level, func.sum(metric_chunks.c.count).label("n")).where(here).group_by("level"))
    }
    while counts.get(level + 1, 0) >= max(points, 4) + CHUNK:  # the first chunk may lie partly before `after`
        level += 1
    found = _points(tx, job_id, name, level, after)
    for finer in range(level):
        # of the block that `after` cuts and of the one still open the coarser level knows too little; overlap is harmless
        ends = _head_points(tx, job_id, name, finer, after) + _tail_points(tx, job_id, name, finer, after)
        found = _merge(found, ends)
    return found


def _head_points(tx: Tx, job_id: str, name: str, level: int, after: int) -> list[Point]:
    """The points with step > `after` of the first block that has any."""
    here = and_(metric_chunks.c.job_id == job_id, metric_chunks.c.name == name, metric_chunks.c.level == level)
    query = select(metric_chunks.c.points).where(here, metric_chunks.c.last_step > after)
    chunk = tx.one(query.order_by(metric_chunks.c.ordinal).limit(1))
    if chunk is None:
        return []
    points = _unpack(chunk.points)
    first = next(i for i, (step, _) in enumerate(points) if step > after)
    return points[first : (first // BLOCK + 1) * BLOCK]


def _tail_points(tx: Tx, job_id: str, name: str, level: int, after: int) -> list[Point]:
    """The points of a level's unfinished last block, and its very last point."""
    tail = _tail(tx, job_id, name, level)
    if tail is None:
        return []
    points = _unpack(tail.points)
    open_block = tail.count % BLOCK or 1
    return [point for point in points[-open_block:] if point[0] > after]


def _merge(one: Iterable[Point], other: Iterable[Point]) -> list[Point]:
    return sorted({step: value for points in (one, other) for step, value in points}.items())


def _pack(points: Sequence[Point]) -> bytes:
    steps, values = array("q", [step for step, _ in points]), array("d", [value for _, value in points])
    return steps.tobytes() + values.tobytes()


def _unpack(data: bytes) -> list[Point]:
    half = len(data) // 2
    steps, values = array("q"), array("d")
    steps.frombytes(data[:half])
    values.frombytes(data[half:])
    return list(zip(steps, values, strict=True))
