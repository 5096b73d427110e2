"""Webhook deliveries, stored in the transaction of the move they tell of, so that no move is missed and none is told that did not happen."""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import Row, insert
from ulid import ULID

from powergrad.jobs.states import JobState
from powergrad.jobs.store import Tx, rfc3339
from powergrad.jobs.tables import deliveries

EVENTS = {
    JobState.RUNNING: "job.started",
    JobState.PAUSED: "job.paused",
    JobState.SUCCEEDED: "job.succeeded",
    JobState.FAILED: "job.failed",
    JobState.CANCELLED: "job.cancelled",
}


def announce(tx: Tx, row: Row[Any], to: JobState, reason: dict[str, Any] | None = None) -> None:
    """Owe the job's webhook a call about its move, if it asked for that kind."""
    webhook, event = row.spec.get("webhook"), EVENTS.get(to)
    if webhook is None or event is None or event not in webhook["events"]:
        return
    job = {"id": row.id, "name": row.name, "state": to, "reason": reason, "labels": row.labels, "metrics": {"best": row.best}}
    owe(tx, owner=row.owner, url=webhook["url"], event=event, data=job, job_id=row.id)


def owe(tx: Tx, *, owner: str, url: str, event: str, data: dict[str, Any], job_id: str | None = None) -> str:
    """Store a delivery that is due at once; its id."""
    delivery_id = f"msg_{ULID.from_timestamp(tx.now_ms)}"
    body = {"type": event, "timestamp": rfc3339(tx.now_ms), "data": data}
    row = {"id": delivery_id, "owner": owner, "job_id": job_id, "url": url, "event": event, "body": json.dumps(body, separators=(",", ":"))}
    tx.run(insert(deliveries).values(**row, state="pending", attempt=0, due_at=tx.now_ms, created_at=tx.now_ms))
    return delivery_id
