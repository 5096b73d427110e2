"""Webhook deliveries, stored in the transaction of the move they tell of, so that no move is missed and none is told that did not happen.

A delivery is pending until an answer of 2xx, or until its tries are used up. Whoever sends claims it by a conditional UPDATE: `due_at`
becomes the end of a lease, `attempt` counts claims and fences what a late sender would store. At least once: a sender that dies between
the answer and the row is followed by another, with the same id. Signed as Standard Webhooks says (https://www.standardwebhooks.com).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Row, delete, func, insert, literal_column, select, update
from ulid import ULID

from powergrad.addresses import AddressRefused, AllowList, target
from powergrad.jobs.errors import DeliveryNotFound, InvalidSpec, Violation
from powergrad.jobs.spec import JobSpec
from powergrad.jobs.states import JobState
from powergrad.jobs.store import Tx, rfc3339
from powergrad.jobs.tables import deliveries, webhook_secrets

EVENTS = {
    JobState.RUNNING: "job.started",
    JobState.PAUSED: "job.paused",
    JobState.SUCCEEDED: "job.succeeded",
    JobState.FAILED: "job.failed",
    JobState.CANCELLED: "job.cancelled",
}
TEST_EVENT = "webhook.test"
PENDING, DELIVERED, FAILED = "pending", "delivered", "failed"
BACKOFF_S = (5.0, 30.0, 120.0, 600.0, 3600.0, 3 * 3600.0, 8 * 3600.0, 24 * 3600.0)
"""Between one try and the next: a restart of the receiver costs seconds, an outage over a weekend night loses nothing."""
JITTER = 0.2  # of each pause, so that a thousand jobs that ended together do not come back together
LEASE_MS = 60_000  # three times what a try may take
KEPT_MS = 30 * 24 * 3600 * 1000
GONE = 410  # the receiver asks never to be called again
SECRET_PREFIX, SECRET_BYTES = "whsec_", 32
OVERLAP_MS = 24 * 3600 * 1000

# spelled out as the index is, or it would not be used
_IS_PENDING: ColumnElement[bool] = deliveries.c.state == literal_column(f"'{PENDING}'")


# --- owing -----------------------------------------------------------------------------------------------------------------------


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
    tx.run(insert(deliveries).values(**row, state=PENDING, attempt=0, due_at=tx.now_ms, created_at=tx.now_ms))
    return delivery_id


def check_webhook(spec: JobSpec, *, allow: AllowList) -> None:
    """Refuse a job whose webhook no delivery could call, whatever its name resolves to. Raises InvalidSpec."""
    if spec.webhook is not None:
        check_url(spec.webhook.url, allow=allow, pointer="/webhook/url")


def check_url(url: str, *, allow: AllowList, pointer: str) -> None:
    """Raises InvalidSpec."""
    try:
        target(url, allow=allow)
    except AddressRefused as error:
        raise InvalidSpec([Violation(pointer, "address_refused", str(error), url)]) from None


# --- sending ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Due:
    """A delivery that waits for its next try: the oldest one to this URL of its owner's."""

    id: str
    owner: str
    url: str


@dataclass(frozen=True)
class Delivery:
    """A claimed try. attempt: its number from 1, which fences the result."""

    id: str
    attempt: int
    owner: str
    url: str
    body: str
    secrets: tuple[str, ...]
    """Newest first; the second one for a day after a rotation."""


@dataclass(frozen=True)
class Result:
    """What came of a try. status: None where no answer came.  error: None is success.  is_final: trying again would change nothing."""

    status: int | None
    error: str | None = None
    is_final: bool = False


def due(tx: Tx, *, limit: int, except_owners: Collection[str] = ()) -> list[Due]:
    """One delivery of each owner and URL that has one due, the longest due first: a receiver with a backlog hides no other."""
    statement = (
        select(func.min(deliveries.c.id).label("oldest"), deliveries.c.owner, deliveries.c.url)
        .where(_IS_PENDING, deliveries.c.due_at <= tx.now_ms, deliveries.c.owner.not_in(except_owners))
        .group_by(deliveries.c.owner, deliveries.c.url)
        .order_by(func.min(deliveries.c.due_at), func.min(deliveries.c.id))
        .limit(limit)
    )
    return [Due(row.oldest, row.owner, row.url) for row in tx.all(statement)]


def claim(tx: Tx, delivery_id: str) -> Delivery | None:
    """Take the next try; None when another sender has it, or it is not due any more."""
    mine = (deliveries.c.id == delivery_id, _IS_PENDING, deliveries.c.due_at <= tx.now_ms)
    # an empty error marks a try at work: see is_at_work
    taken = {"attempt": deliveries.c.attempt + 1, "due_at": tx.now_ms + LEASE_MS, "status": None, "error": None}
    if tx.run(update(deliveries).where(*mine).values(**taken)).rowcount != 1:
        return None
    row = tx.one(select(deliveries).where(deliveries.c.id == delivery_id))
    assert row is not None, "it was updated in this transaction"
    return Delivery(row.id, row.attempt, row.owner, row.url, row.body, signing_secrets(tx, row.owner))


def settle(tx: Tx, tried: Delivery, result: Result) -> str | None:
    """Store what came of a try; the delivery's state. None: the lease had lapsed and another sender has taken it."""
    values: dict[str, Any] = {"status": result.status, "error": result.error and result.error[:500]}
    if result.error is None:
        values |= {"state": DELIVERED, "ended_at": tx.now_ms}
    elif result.is_final or tried.attempt > len(BACKOFF_S):
        values |= {"state": FAILED, "ended_at": tx.now_ms}
    else:
        values |= {"due_at": tx.now_ms + pause_ms(tried.id, tried.attempt)}
    mine = (deliveries.c.id == tried.id, deliveries.c.attempt == tried.attempt, _IS_PENDING)
    if tx.run(update(deliveries).where(*mine).values(**values)).rowcount != 1:
        return None
    return str(values.get("state", PENDING))


def pause_ms(delivery_id: str, attempt: int) -> int:
    """How long to wait after a failed try: its step of the ladder, lengthened by up to a fifth, the same at every call."""
    drawn = int.from_bytes(hashlib.sha256(f"{delivery_id}.{attempt}".encode()).digest()[:4], "big") / 2**32
    return round(BACKOFF_S[attempt - 1] * (1 + JITTER * drawn) * 1000)


def sweep(tx: Tx) -> int:
    """Forget deliveries that are older than 30 days; how many."""
    oldest = ULID.from_timestamp(tx.now_ms - KEPT_MS)
    return tx.run(delete(deliveries).where(deliveries.c.id < f"msg_{str(oldest)[:10]}")).rowcount  # ten letters are the time


# --- signing ---------------------------------------------------------------------------------------------------------------------


def signed_headers(delivery: Delivery, *, now_ms: int) -> dict[str, str]:
    """The headers by which a receiver knows who calls: a signature for each secret, of this very second."""
    at = now_ms // 1000
    signatures = " ".join(f"v1,{signature(secret, delivery.id, at, delivery.body)}" for secret in delivery.secrets)
    return {"webhook-id": delivery.id, "webhook-timestamp": str(at), "webhook-signature": signatures}


def signature(secret: str, message_id: str, at_s: int, body: str) -> str:
    """HMAC-SHA256 of `id.timestamp.body` in base64. secret: whsec_…, whose base64 is the key."""
    key = base64.b64decode(secret.removeprefix(SECRET_PREFIX))
    return base64.b64encode(hmac.digest(key, f"{message_id}.{at_s}.{body}".encode(), "sha256")).decode()


def signing_secrets(tx: Tx, owner: str) -> tuple[str, ...]:
    """The owner's secret, made now if there was none, and for a day after a rotation the one before it. Needs a write transaction."""
    new = tx.insert(webhook_secrets).values(owner=owner, secret=_new_secret()).on_conflict_do_nothing()
    row = _secret_row(tx, owner)
    if row is None:
        tx.run(new)
        row = _secret_row(tx, owner)
    assert row is not None, "it is there or was just stored"
    overlaps = row.previous is not None and row.previous_until > tx.now_ms
    return (row.secret, row.previous) if overlaps else (row.secret,)


def secret(tx: Tx, owner: str) -> dict[str, Any]:
    """The owner's secret as JSON, made now if there was none. Needs a write transaction."""
    current, *previous = signing_secrets(tx, owner)
    row = _secret_row(tx, owner)
    assert row is not None, "it is there or was just stored"
    return {"object": "webhook_secret", "secret": current, "previous_until": rfc3339(row.previous_until) if previous else None}


def rotate(tx: Tx, owner: str) -> dict[str, Any]:
    """A new secret; the old one signs beside it for a day. The one before the old one, if it still did, does so no more."""
    signing_secrets(tx, owner)
    values = {"secret": _new_secret(), "previous": webhook_secrets.c.secret, "previous_until": tx.now_ms + OVERLAP_MS}
    tx.run(update(webhook_secrets).where(webhook_secrets.c.owner == owner).values(**values))
    return secret(tx, owner)


def _secret_row(tx: Tx, owner: str) -> Row[Any] | None:
    return tx.one(select(webhook_secrets).where(webhook_secrets.c.owner == owner))


def _new_secret() -> str:
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


# --- looking ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Page:
    data: list[dict[str, Any]]
    has_more: bool


def page(tx: Tx, *, owner: str, job_id: str | None = None, state: str | None = None, limit: int = 20, after: str | None = None) -> Page:
    """The owner's deliveries, newest first. after: an id, of a delivery that may be gone."""
    wanted: list[ColumnElement[bool]] = [deliveries.c.owner == owner]
    if job_id is not None:
        wanted.append(deliveries.c.job_id == job_id)
    if state is not None:
        wanted.append(deliveries.c.state == state)
    if after is not None:
        wanted.append(deliveries.c.id < after)
    rows = tx.all(select(deliveries).where(*wanted).order_by(deliveries.c.id.desc()).limit(limit + 1))
    return Page([_shown(row, tx.now_ms) for row in rows[:limit]], len(rows) > limit)


def get(tx: Tx, delivery_id: str, *, owner: str) -> dict[str, Any]:
    """Raises DeliveryNotFound."""
    return _shown(_row(tx, delivery_id, owner), tx.now_ms)


def retry(tx: Tx, delivery_id: str, *, owner: str) -> dict[str, Any]:
    """Make a delivery due now, delivered ones too; nothing changes while a try is at work. Raises DeliveryNotFound."""
    row = _row(tx, delivery_id, owner)
    if not _is_at_work(row, tx.now_ms):
        mine = (deliveries.c.id == row.id, deliveries.c.attempt == row.attempt)
        tx.run(update(deliveries).where(*mine).values(state=PENDING, due_at=tx.now_ms, ended_at=None))
    return get(tx, delivery_id, owner=owner)


def _row(tx: Tx, delivery_id: str, owner: str) -> Row[Any]:
    row = tx.one(select(deliveries).where(deliveries.c.id == delivery_id, deliveries.c.owner == owner))
    if row is None:
        raise DeliveryNotFound(delivery_id)
    return row


def _is_at_work(row: Row[Any], now_ms: int) -> bool:
    """Whether a sender holds the delivery: claimed, nothing stored yet, and the lease has not lapsed."""
    return row.state == PENDING and row.attempt > 0 and row.error is None and row.due_at > now_ms


def _shown(row: Row[Any], now_ms: int) -> dict[str, Any]:
    waits = row.state == PENDING and not _is_at_work(row, now_ms)
    return {
        "id": row.id,
        "object": "webhook_delivery",
        "event": row.event,
        "url": row.url,
        "job": row.job_id,
        "state": row.state,
        "attempt": row.attempt,
        "status": row.status,
        "error": row.error,
        "payload": json.loads(row.body),
        "created_at": rfc3339(row.created_at),
        "next_try_at": rfc3339(row.due_at) if waits else None,
        "ended_at": rfc3339(row.ended_at),
    }
