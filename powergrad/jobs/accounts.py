"""What a job takes on disk: the bytes of its checkpoints and artifacts, kept in its row."""

from __future__ import annotations

from sqlalchemy import func, select, update

from powergrad.jobs.store import Tx
from powergrad.jobs.tables import artifacts, checkpoints, jobs


def recount(tx: Tx, job_id: str) -> None:
    """Add up anew, rather than keep adding: a sum of what is there never drifts."""
    of_checkpoints = select(func.coalesce(func.sum(checkpoints.c.total_bytes), 0)).where(checkpoints.c.job_id == job_id).scalar_subquery()
    of_artifacts = select(func.coalesce(func.sum(artifacts.c.bytes), 0)).where(artifacts.c.job_id == job_id).scalar_subquery()
    tx.run(update(jobs).where(jobs.c.id == job_id).values(bytes=of_checkpoints + of_artifacts))
