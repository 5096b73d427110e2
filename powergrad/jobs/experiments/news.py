"""What tells an experiment that one of its jobs has moved.

Who moves a job holds the job's row, and so must not wait for the experiment's: whoever looks at an experiment holds that row first and its
jobs' after it (cancelling all of them, say), and the two would wait for each other. Hence a row of its own for each move, whose key nobody
else writes: an INSERT that waits for nobody. Who looks takes the rows away first and reads the jobs after that, so that what is told
later is looked at later.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import delete, insert, select

from powergrad.jobs.store import Tx
from powergrad.jobs.tables import experiment_news

MOST = 100


def tell(tx: Tx, experiment_id: str, job_id: str, seq: int) -> None:
    """A job has changed its state (or is gone). seq: the number of its newest event, one further where it is gone."""
    tx.run(insert(experiment_news).values(experiment_id=experiment_id, job_id=job_id, seq=seq))


def tell_all(tx: Tx, moved: Sequence[tuple[str, str, int]]) -> None:
    """The same of many at once."""
    if moved:
        tx.run(insert(experiment_news), [{"experiment_id": experiment, "job_id": job, "seq": seq} for experiment, job, seq in moved])


def waiting(tx: Tx) -> list[str]:
    """Experiments that have not been looked at since something was told; some of them where they are many."""
    query = select(experiment_news.c.experiment_id).distinct().order_by(experiment_news.c.experiment_id).limit(MOST)
    return [row.experiment_id for row in tx.all(query)]


def take(tx: Tx, experiment_id: str) -> None:
    """What was told is about to be looked at."""
    tx.run(delete(experiment_news).where(experiment_news.c.experiment_id == experiment_id))
