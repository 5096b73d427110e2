"""What a job takes on disk: the bytes of its checkpoints and artifacts, kept in its row.

Whatever changes those rows writes the sum of them in the same transaction.
"""

from __future__ import annotations

from sqlalchemy import ColumnElement, func, select

from powergrad.jobs.tables import artifacts, checkpoints


def stored(job_id: str) -> ColumnElement[int]:
    """The value of `jobs.bytes`, for an UPDATE: added up anew, because a sum of what is there never drifts."""
    of_checkpoints = select(func.coalesce(func.sum(checkpoints.c.total_bytes), 0)).where(checkpoints.c.job_id == job_id).scalar_subquery()
    of_artifacts = select(func.coalesce(func.sum(artifacts.c.bytes), 0)).where(artifacts.c.job_id == job_id).scalar_subquery()
    return of_checkpoints + of_artifacts
