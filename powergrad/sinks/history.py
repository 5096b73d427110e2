"""A job's surviving metric points, each with the time at which it was stored.

Points carry no time of their own. The events say when points of which steps were stored, and what a resume or a roll-back took away, so
the same history has the same times however often it is read.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select

from powergrad.jobs import metrics
from powergrad.jobs.store import Tx
from powergrad.jobs.tables import events, jobs

CUTS = {"resumed": "from_step", "rolled_back": "to_step"}
"""Events that end a past, and the field with the last step of it that stays."""


@dataclass(frozen=True)
class Times:
    """last_steps rise strictly; stored_ms[i]: when the points after last_steps[i - 1], up to last_steps[i], were stored."""

    last_steps: tuple[int, ...]
    stored_ms: tuple[int, ...]

    def at_ms(self, step: int) -> int:
        """When the points of a step were stored. Raises IndexError where nothing was."""
        return self.stored_ms[min(bisect_left(self.last_steps, step), len(self.stored_ms) - 1)]


@dataclass(frozen=True)
class History:
    """series: by name, sorted; steps rise strictly, and None is a value that is not finite."""

    created_ms: int
    series: dict[str, list[tuple[int, float | None]]]
    times: Times


def read(tx: Tx, job_id: str, *, after: dict[str, int] | None = None) -> History:
    """What is stored of a job's metrics.  after: by name, the last step that is not wanted any more."""
    known = after or {}
    series = {}
    for name in metrics.names(tx, job_id):
        found = metrics.read(tx, job_id, name, after=known.get(name, -1))
        series[name] = list(zip(found.steps, found.values, strict=True))
    created_ms = int(tx.run(select(jobs.c.created_at).where(jobs.c.id == job_id)).scalar_one())
    return History(created_ms, series, _times(tx, job_id))


def _times(tx: Tx, job_id: str) -> Times:
    query = select(events.c.type, events.c.at, events.c.data).where(events.c.job_id == job_id, events.c.type.in_(["metrics", *CUTS]))
    steps: list[int] = []
    at: list[int] = []
    for event in tx.all(query.order_by(events.c.seq)):
        if event.type == "metrics":
            _put(steps, at, event.data["to_step"], event.at)
        else:
            _cut(steps, at, event.data[CUTS[event.type]])
    return Times(tuple(steps), tuple(at))


def _put(steps: list[int], at: list[int], step: int, now: int) -> None:
    if not steps or step > steps[-1]:  # an evaluation at a step that is known brings no new one
        steps.append(step)
        at.append(now)


def _cut(steps: list[int], at: list[int], kept: int) -> None:
    first_gone = bisect_left(steps, kept + 1)
    crosses = first_gone < len(steps) and kept > (steps[first_gone - 1] if first_gone else 0)
    last = at[first_gone] if crosses else 0
    del steps[first_gone:], at[first_gone:]
    if crosses:
        steps.append(kept)
        at.append(last)


def flat(spec: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A spec's leaves by dotted path, `loss.alpha`, as `--set` names them; a list is a leaf."""
    leaves: dict[str, Any] = {}
    for key, value in spec.items():
        if isinstance(value, dict):
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves
