"""What a job gave: read from its row and its metric series, once when it has ended, and kept with the experiment's run.

So the experiment knows its numbers when the job is deleted, and collecting the evidence of 500 runs reads 500 rows.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, select

from powergrad.experiments.findings import Moment
from powergrad.jobs import metrics
from powergrad.jobs.retention import BEST_BY
from powergrad.jobs.store import Tx
from powergrad.jobs.tables import attempts

MOST_MOMENTS = 500
MOST_MOMENTS_IN_ALL = 20_000
"""Of all runs together: a moment takes about 100 bytes of JSON."""
FINAL = ("val_", "test_", "train_", "images_per_s")
DIGITS = 6
"""Significant digits of joules and epochs: no meter here is finer."""
TOLD = ("cpu_threads", "gpus", "precision", "determinism", "determinism_reason", "train_images", "val_images", "test_images")


def score(row: Row[Any], metric: str) -> float | None:
    """The metric after the last evaluation of a job that succeeded; None where there is none, or it was not finite."""
    value = row.latest.get(metric)
    return float(value) if row.state == "succeeded" and value is not None and math.isfinite(value) else None


def of_job(tx: Tx, row: Row[Any], metric: str, *, with_curve: bool = True) -> dict[str, Any]:
    """reason, final, curve, seconds, joules and what it ran on, as JSON."""
    begun = row.started_at is not None
    energy = _energy(tx, row.id) if begun else ([], [])
    return {
        "reason": None if row.reason is None else row.reason["code"],
        "final": {name: value for name, value in row.latest.items() if name.startswith(FINAL)},
        "curve": _curve(tx, row, metric, energy) if begun and with_curve else [],
        "seconds": row.trained_ms / 1000,
        "joules": energy[1][-1] if energy[1] else None,
        "ran_on": {**{name: row.resolved[name] for name in TOLD if name in row.resolved}, "device": _device(tx, row) if begun else None},
    }


def thinned(curve: Sequence[Moment], limit: int) -> list[Moment]:
    """At most so many moments, evenly spread and with the last: of runs with as many evaluations the same ones, so that they can be compared."""
    count = len(curve)
    return list(curve) if count <= limit else [curve[(i + 1) * count // limit - 1] for i in range(limit)]


def _device(tx: Tx, row: Row[Any]) -> str | None:
    query = select(attempts.c.device).where(attempts.c.job_id == row.id).order_by(attempts.c.number.desc()).limit(1)
    last = tx.one(query)
    return None if last is None else str(last.device)


def _curve(tx: Tx, row: Row[Any], metric: str, energy: tuple[list[int], list[float]]) -> list[Moment]:
    """The metric at each evaluation. What training measures itself (train_…) is taken from the last point before it."""
    series = metrics.read(tx, row.id, metric)
    marks = metrics.read(tx, row.id, BEST_BY).steps if metric.startswith("train_") else series.steps
    steps_in_all, epochs = row.progress["steps"], row.progress["epochs"]
    if not steps_in_all or not series.steps:
        return []
    speed = metrics.read(tx, row.id, metrics.SPEED)
    clock = metrics.Clock(speed.steps, speed.values, batch_size=row.spec["data"]["batch_size"])
    curve = [
        Moment(
            step=step,
            epoch=round(step * epochs / steps_in_all, DIGITS),
            seconds=clock.at(step),
            joules=_known_at(energy, step),
            value=_known_at((series.steps, series.values), step),
        )
        for step in marks
    ]
    return thinned(curve, MOST_MOMENTS)


def _known_at(points: tuple[Sequence[int], Sequence[float | None]], step: int) -> float | None:
    """The value at a step, or else the last one before it."""
    place = bisect_right(points[0], step)
    return points[1][place - 1] if place else None


def _energy(tx: Tx, job_id: str) -> tuple[list[int], list[float]]:
    """Steps and joules so far: the meter counts from the start of each attempt, so what came before it is added."""
    series = metrics.read(tx, job_id, "gpu_energy_j")
    known = [(step, value) for step, value in zip(series.steps, series.values, strict=True) if value is not None]
    starts = _starts(tx, job_id) if known else []
    joules: list[float] = []
    before = last = 0.0
    for step, value in known:
        while starts and step > starts[0]:
            before, last = before + last, 0.0
            starts.pop(0)
        last = value
        joules.append(_rounded(before + value))
    return [step for step, _ in known], joules


def _starts(tx: Tx, job_id: str) -> list[int]:
    """The steps from which the attempts after the first went on."""
    query = select(attempts.c.resumed_from).where(attempts.c.job_id == job_id, attempts.c.resumed_from.is_not(None))
    return [int(row.resumed_from.removeprefix("step-")) for row in tx.all(query.order_by(attempts.c.number))]


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
