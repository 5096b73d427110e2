"""One metric of many runs at once, thinned out for a plot in which they overlay each other.

It costs a few queries however many runs there are, and, thanks to the levels of a series (`powergrad.jobs.metrics`), hardly more for a
long run than for a short one: 200 runs of 10,000 points are a quarter of a million numbers to look at, not two million.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, Row, and_, func, or_, select

from powergrad.jobs.errors import JobNotFound
from powergrad.jobs.metrics import BLOCK, CHUNK, SPEED, Clock
from powergrad.jobs.queries import Filter, conditions
from powergrad.jobs.store import Tx
from powergrad.jobs.tables import jobs, metric_chunks

MOST_RUNS = 500
DIGITS = 7
"""Significant digits of a value: as many as float32 has, in which training measures."""
EPOCH_DIGITS = 6  # after the point: a millionth of an epoch is less than a step of any set there is
SPEED_POINTS = 1000
"""Of the speed, to tell seconds from: a fifth of a percent of the run lies between two."""


class Axis(StrEnum):
    STEP = "step"
    EPOCH = "epoch"
    SECONDS = "seconds"


@dataclass(frozen=True)
class Chosen:
    """The runs to compare, in the order in which they are shown, and whether more fit."""

    rows: Sequence[Row[Any]]
    has_more: bool

    def version(self) -> list[tuple[str, int]]:
        """Moves whenever anything of the runs does."""
        return [(row.id, row.revision) for row in self.rows]


@dataclass
class Curve:
    """A series, whole or thinned out. total: points stored; values: NaN where not finite."""

    total: int = 0
    steps: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def add(self, steps: array[int], values: array[float]) -> None:
        """Go on with those of the points that come later than what is there."""
        new = bisect_left(steps, self.steps[-1] + 1) if self.steps else 0
        self.steps.extend(steps[new:])
        self.values.extend(values[new:])


def choose(tx: Tx, wanted: Filter, *, job_ids: Sequence[str] = ()) -> Chosen:
    """The owner's runs among `job_ids` that fit, in that order, or else the newest that fit, at most MOST_RUNS.

    Raises JobNotFound, which names every id that is not one of the owner's jobs.
    """
    batch_size = jobs.c.spec["data"]["batch_size"].as_integer().label("batch_size")
    query = select(jobs.c.id, jobs.c.name, jobs.c.state, jobs.c.revision, jobs.c.progress, batch_size)
    if not job_ids:
        rows = tx.all(query.where(*conditions(wanted)).order_by(jobs.c.id.desc()).limit(MOST_RUNS + 1))
        return Chosen(rows[:MOST_RUNS], len(rows) > MOST_RUNS)
    order = {job_id: place for place, job_id in enumerate(dict.fromkeys(job_ids))}
    mine = {row.id for row in tx.all(select(jobs.c.id).where(jobs.c.owner == wanted.owner, jobs.c.id.in_(list(order))))}
    unknown = [job_id for job_id in order if job_id not in mine]
    if unknown:
        raise JobNotFound(", ".join(unknown))
    return Chosen(sorted(tx.all(query.where(*conditions(wanted), jobs.c.id.in_(list(order)))), key=lambda row: order[row.id]), False)


def compare(tx: Tx, chosen: Chosen, name: str, *, points: int, axis: Axis) -> list[dict[str, Any]]:
    """The metric of each run as JSON, at most max(points, 4) points of it: both ends, and the extremes of each bucket between them."""
    ids = [row.id for row in chosen.rows]
    found = curves(tx, ids, name, points=points)
    speeds = curves(tx, ids, SPEED, points=SPEED_POINTS) if axis is Axis.SECONDS else {}
    return [_shown(row, thinned(found[row.id], points), axis, speeds.get(row.id)) for row in chosen.rows]


def _shown(row: Row[Any], curve: Curve, axis: Axis, speed: Curve | None) -> dict[str, Any]:
    x = _along(row, curve.steps, axis, speed)
    values = [None if math.isnan(value) else float(f"{value:.{DIGITS}g}") for value in curve.values]
    return {
        "job": row.id,
        "run": row.name,
        "state": row.state,
        "total": curve.total,
        "x": x,
        "values": values,
    }


def _along(row: Row[Any], steps: Sequence[int], axis: Axis, speed: Curve | None) -> list[Any]:
    """None for a step of which it is not known."""
    if axis is Axis.STEP:
        return list(steps)
    if speed is None:
        in_all, epochs = row.progress["steps"], row.progress["epochs"]
        return [round(step * epochs / in_all, EPOCH_DIGITS) if in_all else None for step in steps]
    clock = Clock(speed.steps, speed.values, batch_size=row.batch_size)
    return [clock.at(step) for step in steps]


# --- many series from the store

Counts = dict[str, dict[int, int]]
"""Points of each level of a series, by job."""


def curves(tx: Tx, job_ids: Sequence[str], name: str, *, points: int) -> dict[str, Curve]:
    """Each job's series from its coarsest level that has `points` points, completed at both ends; empty where a job has none."""
    counts = _counts(tx, job_ids, name)
    found = {job_id: Curve(total=counts.get(job_id, {}).get(0, 0)) for job_id in job_ids}
    at_level: dict[int, list[str]] = {}
    for job_id, levels in counts.items():
        at_level.setdefault(max((level for level in levels if levels[level] >= points), default=0), []).append(job_id)
    for level, of_jobs in at_level.items():
        if level:  # of a block a coarser level has the extremes, which the very first point need not be one of
            _add(found, _chunks(tx, of_jobs, name, 0, metric_chunks.c.ordinal == 0), lambda _: slice(1))
        _add(found, _chunks(tx, of_jobs, name, level), lambda _: slice(None))
        for finer in reversed(range(level)):  # what the level above does not have yet, and the very last point
            _add(
                found, _chunks(tx, of_jobs, name, finer, _is_last(of_jobs, counts, finer)), lambda count: slice(-(count % BLOCK or 1), None)
            )
    return found


def _counts(tx: Tx, job_ids: Sequence[str], name: str) -> Counts:
    """Told by the last chunk of each level, the only one that may not be full."""
    ours = and_(metric_chunks.c.job_id.in_(job_ids), metric_chunks.c.name == name)
    last = select(metric_chunks.c.job_id, metric_chunks.c.level, func.max(metric_chunks.c.ordinal).label("ordinal")).where(ours)
    ends = last.group_by(metric_chunks.c.job_id, metric_chunks.c.level).subquery()
    same = (metric_chunks.c[column] == ends.c[column] for column in ("job_id", "level", "ordinal"))
    query = select(metric_chunks.c.job_id, metric_chunks.c.level, metric_chunks.c.ordinal, metric_chunks.c.count)
    counts: Counts = {}
    for row in tx.all(query.join(ends, and_(metric_chunks.c.name == name, *same))):
        counts.setdefault(row.job_id, {})[row.level] = row.ordinal * CHUNK + row.count
    return counts


def _is_last(job_ids: Sequence[str], counts: Counts, level: int) -> ColumnElement[bool]:
    """Which chunks of a level are the jobs' last."""
    by_ordinal: dict[int, list[str]] = {}
    for job_id in job_ids:
        by_ordinal.setdefault((counts[job_id][level] - 1) // CHUNK, []).append(job_id)
    return or_(*(and_(metric_chunks.c.ordinal == ordinal, metric_chunks.c.job_id.in_(ids)) for ordinal, ids in by_ordinal.items()))


def _chunks(tx: Tx, job_ids: Sequence[str], name: str, level: int, *which: ColumnElement[bool]) -> Sequence[Row[Any]]:
    ours = (metric_chunks.c.job_id.in_(job_ids), metric_chunks.c.name == name, metric_chunks.c.level == level)
    query = select(metric_chunks.c.job_id, metric_chunks.c.points).where(*ours, *which)
    return tx.all(query.order_by(metric_chunks.c.job_id, metric_chunks.c.ordinal))


def _add(found: dict[str, Curve], chunks: Sequence[Row[Any]], part_of: Callable[[int], slice]) -> None:
    """part_of: which of a chunk's points are meant, by their number."""
    for row in chunks:
        half = len(row.points) // 2
        steps, values = array("q"), array("d")
        steps.frombytes(row.points[:half])
        values.frombytes(row.points[half:])
        part = part_of(len(steps))
        found[row.job_id].add(steps[part], values[part])


def thinned(curve: Curve, limit: int) -> Curve:
    """At most max(limit, 4) of the points: both ends, and each bucket's minimum and maximum in step order."""
    count = len(curve.steps)
    if count <= max(limit, 4):
        return curve
    buckets, inner = max(1, (limit - 2) // 2), count - 2
    places = [0]
    for bucket in range(buckets):
        places += _extremes(curve.values, 1 + bucket * inner // buckets, 1 + (bucket + 1) * inner // buckets)
    places.append(count - 1)
    return Curve(curve.total, array("q", [curve.steps[i] for i in places]), array("d", [curve.values[i] for i in places]))


def _extremes(values: array[float], start: int, end: int) -> list[int]:
    """Places of the minimum and the maximum of those that are finite; the first place where none is."""
    part = values[start:end]
    if math.isnan(sum(part)):  # the loops that Python runs itself are for the few buckets that need them
        finite = [place for place in range(start, end) if not math.isnan(values[place])]
        if not finite:
            return [start]
        low, high = min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)
    else:
        low, high = start + part.index(min(part)), start + part.index(max(part))
    return [low] if low == high else sorted((low, high))
