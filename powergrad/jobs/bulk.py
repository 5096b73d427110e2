"""One move for many jobs, each by itself: what can be done is done, and of the rest it is told why not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from powergrad.jobs import lifecycle, quotas
from powergrad.jobs.errors import JobError
from powergrad.jobs.store import Store, Tx

Action = Literal["cancel", "pause", "resume", "delete"]
AT_ONCE = 50
"""Jobs in one transaction: a tenth of a second, for which SQLite's other writers wait."""


@dataclass
class Moved:
    """Ids in the order in which they were given."""

    done: list[str] = field(default_factory=list)
    refused: dict[str, JobError] = field(default_factory=dict)


def move(store: Store, action: Action, job_ids: Iterable[str], *, owner: str) -> Moved:
    """Do the same to each of the owner's jobs; one that is there already is done. What was deleted, the sweeper frees the files of."""
    moved, asked = Moved(), list(dict.fromkeys(job_ids))
    in_line = sorted(asked)  # one order for all callers, so that two never wait for each other
    for start in range(0, len(in_line), AT_ONCE):
        with store.write() as tx:
            refused = _move(tx, ACTIONS[action], in_line[start : start + AT_ONCE], owner=owner)
        moved.refused |= refused
    moved.refused = {job_id: moved.refused[job_id] for job_id in asked if job_id in moved.refused}
    moved.done = [job_id for job_id in asked if job_id not in moved.refused]
    return moved


def _move(tx: Tx, act: Callable[..., object], job_ids: Sequence[str], *, owner: str) -> dict[str, JobError]:
    quotas.limited(tx, [owner])  # before any row: a submission waits for the two in this order
    refused: dict[str, JobError] = {}
    for job_id in job_ids:
        try:
            act(tx, job_id, owner=owner)
        except JobError as error:  # raised before anything of the job is written
            refused[job_id] = error
    return refused


ACTIONS: dict[Action, Callable[..., object]] = {
    "cancel": lifecycle.cancel,
    "pause": lifecycle.pause,
    "resume": lifecycle.resume,
    "delete": lifecycle.remove,
}
