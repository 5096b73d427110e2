"""Owed deliveries: stored with the move, claimed once, fenced, tried on the ladder, signed, kept a month."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json

import pytest
from sqlalchemy import select

from powergrad.addresses import AllowList
from powergrad.jobs import lifecycle, outbox
from powergrad.jobs.errors import DeliveryNotFound, InvalidSpec
from powergrad.jobs.outbox import BACKOFF_S, JITTER, LEASE_MS, Delivery, Due, Result
from powergrad.jobs.states import JobState
from powergrad.jobs.store import Store
from powergrad.jobs.tables import deliveries
from tests.jobs import builders
from tests.jobs.builders import at_once, do
from tests.stores import FakeClock

URL = "https://hooks.example/a"
REFUSED = Result(500, "the receiver answered 500")
ALL = ["job.started", "job.paused", "job.succeeded", "job.failed", "job.cancelled"]


def owed(store: Store, *, owner: str = "local", url: str = URL, job_id: str | None = None) -> str:
    return do(store, outbox.owe, owner=owner, url=url, event="webhook.test", data={}, job_id=job_id)


def claimed(store: Store, delivery_id: str) -> Delivery:
    found = do(store, outbox.claim, delivery_id)
    assert found is not None, "nothing to claim"
    return found


def due(store: Store, **more: object) -> list[Due]:
    with store.read() as tx:
        return outbox.due(tx, **{"limit": 100, **more})  # type: ignore[arg-type]


def shown(store: Store, delivery_id: str, owner: str = "local") -> dict[str, object]:
    with store.read() as tx:
        return outbox.get(tx, delivery_id, owner=owner)


def told_of(store: Store, job_id: str) -> list[str]:
    """The events owed for a job, in order."""
    with store.read() as tx:
        return [row.event for row in tx.all(select(deliveries).where(deliveries.c.job_id == job_id).order_by(deliveries.c.id))]


# --- owing -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "events"),
    [
        (JobState.QUEUED, []),
        (JobState.PAUSED, ["job.paused"]),
        (JobState.CANCELLED, ["job.cancelled"]),
        (JobState.RUNNING, ["job.started"]),
        (JobState.CANCELLING, ["job.started"]),
        (JobState.SUCCEEDED, ["job.started", "job.succeeded"]),
        (JobState.FAILED, ["job.started", "job.failed"]),
    ],
)
def test_each_move_that_was_asked_for_is_owed_once(store: Store, state: JobState, events: list[str]) -> None:
    job_id = builders.bring_to(store, state, webhook={"url": URL, "events": ALL})
    assert told_of(store, job_id) == events


def test_a_job_tells_of_its_ends_only_unless_asked(store: Store) -> None:
    job_id = builders.bring_to(store, JobState.SUCCEEDED, webhook={"url": URL})
    assert told_of(store, job_id) == ["job.succeeded"]
    (waiting,) = due(store)
    body = json.loads(claimed(store, waiting.id).body)
    assert (body["type"], body["data"]["id"], body["data"]["state"]) == ("job.succeeded", job_id, "succeeded")


def test_a_job_without_a_webhook_owes_nothing(store: Store) -> None:
    builders.bring_to(store, JobState.SUCCEEDED)
    assert due(store) == []


def test_a_move_that_is_undone_was_never_owed(store: Store) -> None:
    job_id = builders.submit(store, webhook={"url": URL, "events": ALL})
    with pytest.raises(ZeroDivisionError), store.write() as tx:
        lifecycle.cancel(tx, job_id)
        raise ZeroDivisionError
    assert told_of(store, job_id) == []


def test_a_webhook_that_no_delivery_could_call_is_refused() -> None:
    allow = AllowList.parse("hooks.corp")
    outbox.check_webhook(builders.spec(), allow=allow)
    outbox.check_webhook(builders.spec(webhook={"url": "http://hooks.corp/x"}), allow=allow)
    with pytest.raises(InvalidSpec) as caught:
        outbox.check_webhook(builders.spec(webhook={"url": "https://127.0.0.1/x"}), allow=allow)
    assert [(one.pointer, one.code) for one in caught.value.violations] == [("/webhook/url", "address_refused")]


# --- trying ----------------------------------------------------------------------------------------------------------------------


def test_many_senders_at_once_get_each_try_once(store: Store) -> None:
    delivery_id = owed(store)
    found = at_once([lambda: do(store, outbox.claim, delivery_id)] * 6)
    assert [one.attempt for one in found if one is not None] == [1]
    assert due(store) == []


def test_a_delivered_one_is_not_tried_again(store: Store, clock: FakeClock) -> None:
    tried = claimed(store, owed(store))
    assert do(store, outbox.settle, tried, Result(204)) == "delivered"
    clock.advance(10 * 24 * 3600)
    assert due(store) == []
    assert shown(store, tried.id) | {"state": "delivered", "status": 204, "error": None, "next_try_at": None} == shown(store, tried.id)


def test_failures_climb_the_ladder_to_its_end(store: Store, clock: FakeClock) -> None:
    delivery_id = owed(store)
    for attempt, pause_s in enumerate(BACKOFF_S, 1):
        tried = claimed(store, delivery_id)
        assert (tried.id, tried.attempt) == (delivery_id, attempt)
        assert do(store, outbox.settle, tried, REFUSED) == "pending"
        clock.advance(pause_s - 0.001)
        assert due(store) == []
        clock.advance(pause_s * JITTER + 0.002)
        assert [one.id for one in due(store)] == [delivery_id]
    assert do(store, outbox.settle, claimed(store, delivery_id), REFUSED) == "failed"
    clock.advance(48 * 3600)
    assert due(store) == []
    assert shown(store, delivery_id)["error"] == REFUSED.error


def test_pauses_differ_between_deliveries_and_not_between_calls() -> None:
    pauses = {outbox.pause_ms(f"msg_{i}", 1) for i in range(100)}
    assert len(pauses) > 80
    assert all(5000 <= pause <= 6000 for pause in pauses)
    assert outbox.pause_ms("msg_1", 1) == outbox.pause_ms("msg_1", 1)


def test_a_final_result_ends_at_once(store: Store) -> None:
    tried = claimed(store, owed(store))
    assert do(store, outbox.settle, tried, Result(410, "gone", is_final=True)) == "failed"


def test_a_sender_that_died_is_followed_by_another_with_the_same_id_and_its_own_result_counts_no_more(
    store: Store, clock: FakeClock
) -> None:
    dead = claimed(store, owed(store))
    clock.advance(LEASE_MS / 1000 - 0.001)
    assert due(store) == []
    clock.advance(0.001)
    heir = claimed(store, due(store)[0].id)
    assert (heir.id, heir.attempt, heir.body) == (dead.id, 2, dead.body)
    assert do(store, outbox.settle, dead, REFUSED) is None
    assert do(store, outbox.settle, heir, Result(200)) == "delivered"
    assert do(store, outbox.settle, heir, REFUSED) is None
    assert shown(store, dead.id)["state"] == "delivered"


def test_a_receiver_with_a_backlog_hides_no_other(store: Store, clock: FakeClock) -> None:
    backlog = [owed(store) for _ in range(20)]
    clock.advance(1)
    other, theirs = owed(store, url="https://other.example/"), owed(store, owner="b")
    assert [one.id for one in due(store, limit=3)] == [backlog[0], other, theirs]
    assert [one.id for one in due(store, except_owners=["local"])] == [theirs]


# --- signing ---------------------------------------------------------------------------------------------------------------------


def recomputed(secret: str, headers: dict[str, str], body: str) -> str:
    """As the specification of Standard Webhooks words it."""
    key = base64.b64decode(secret[len("whsec_") :])
    message = b".".join((headers["webhook-id"].encode(), headers["webhook-timestamp"].encode(), body.encode()))
    return "v1," + base64.b64encode(hmac.new(key, message, hashlib.sha256).digest()).decode()


def test_the_signature_is_that_of_the_specification() -> None:
    """Its own example: docs of Standard Webhooks, `Webhook.sign`."""
    secret, message_id, at = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330
    assert outbox.signature(secret, message_id, at, '{"test": 2432232314}') == "g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_an_owner_has_one_secret_and_after_a_rotation_two_sign_for_a_day(store: Store, clock: FakeClock) -> None:
    secrets = at_once([lambda: do(store, outbox.secret, "a")["secret"]] * 4)
    assert len(set(secrets)) == 1
    old = secrets[0]
    assert len(base64.b64decode(old.removeprefix("whsec_"))) == 32
    assert do(store, outbox.secret, "b")["secret"] != old
    new = do(store, outbox.rotate, "a")["secret"]
    assert new != old
    first = claimed(store, owed(store, owner="a"))
    headers = outbox.signed_headers(first, now_ms=1_700_000_000_999)
    assert headers["webhook-timestamp"] == "1700000000"
    assert headers["webhook-signature"].split(" ") == [recomputed(new, headers, first.body), recomputed(old, headers, first.body)]
    clock.advance(24 * 3600)
    assert claimed(store, owed(store, owner="a")).secrets == (new,)
    assert do(store, outbox.secret, "a") == {"object": "webhook_secret", "secret": new, "previous_until": None}


# --- looking ---------------------------------------------------------------------------------------------------------------------


def test_pages_hold_the_owners_own_newest_first(store: Store, clock: FakeClock) -> None:
    mine = []
    for number in range(5):
        mine.append(owed(store, job_id=f"job_{number % 2}"))
        owed(store, owner="b")
        clock.advance(1)
    do(store, outbox.settle, claimed(store, mine[0]), Result(200))
    with store.read() as tx:
        first = outbox.page(tx, owner="local", limit=2)
        rest = outbox.page(tx, owner="local", limit=5, after=first.data[-1]["id"])
        of_job = outbox.page(tx, owner="local", job_id="job_1")
        done = outbox.page(tx, owner="local", state="delivered")
    assert [one["id"] for one in first.data + rest.data] == mine[::-1]
    assert (first.has_more, rest.has_more) == (True, False)
    assert [one["id"] for one in of_job.data] == [mine[3], mine[1]]
    assert [one["id"] for one in done.data] == [mine[0]]


def test_another_owners_delivery_is_not_there(store: Store) -> None:
    delivery_id = owed(store, owner="b")
    with pytest.raises(DeliveryNotFound):
        shown(store, delivery_id)
    with pytest.raises(DeliveryNotFound):
        do(store, outbox.retry, delivery_id, owner="local")


def test_a_retry_makes_it_due_now_but_never_beside_a_try_at_work(store: Store, clock: FakeClock) -> None:
    delivery_id = owed(store)
    tried = claimed(store, delivery_id)
    assert do(store, outbox.retry, delivery_id, owner="local")["next_try_at"] is None
    assert due(store) == []
    do(store, outbox.settle, tried, REFUSED)
    assert due(store) == []  # it waits for its pause
    do(store, outbox.retry, delivery_id, owner="local")
    again = claimed(store, due(store)[0].id)
    assert again.attempt == 2
    do(store, outbox.settle, again, Result(200))
    assert do(store, outbox.retry, delivery_id, owner="local")["state"] == "pending"
    assert claimed(store, due(store)[0].id).attempt == 3


def test_deliveries_are_forgotten_after_thirty_days(store: Store, clock: FakeClock) -> None:
    old = owed(store)
    clock.advance(29 * 24 * 3600)
    young = owed(store)
    assert do(store, outbox.sweep) == 0
    clock.advance(24 * 3600 + 1)
    assert do(store, outbox.sweep) == 1
    assert shown(store, young)["id"] == young
    with pytest.raises(DeliveryNotFound):
        shown(store, old)
