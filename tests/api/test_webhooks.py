"""Webhooks over real sockets: what is sent, to whom it never is, and what the routes show."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from api import deliverer as sending
from api.deliverer import Deliverer
from api.documents import DeliveryDocument, DeliveryListDocument, WebhookSecretDocument
from powergrad.addresses import AllowList, addresses_of
from powergrad.jobs import keys, lifecycle, outbox
from powergrad.jobs.keys import Scope
from powergrad.jobs.migrate import migrate
from powergrad.jobs.outbox import LEASE_MS
from powergrad.jobs.store import Store
from tests.api.conftest import Api, serving, settings_for, until
from tests.jobs import builders
from tests.jobs.builders import do
from tests.receivers import NAME, Answer, Authority, Call, Receiver, receiving
from tests.stores import FakeClock

HERE = AllowList.parse("127.0.0.1")
LOOK_S = 0.02


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.made_in(tmp_path_factory.mktemp("authority"))


@contextmanager
def delivering(store: Store, allow: AllowList = HERE, **more: Any) -> Iterator[Deliverer]:
    running = Deliverer(store, allow, look_s=LOOK_S, **more)
    running.start()
    try:
        yield running
    finally:
        running.stop(grace_s=0)


def owed(store: Store, url: str, *, owner: str = "local") -> str:
    return do(store, outbox.owe, owner=owner, url=url, event="webhook.test", data={})


def shown(store: Store, delivery_id: str, owner: str = "local") -> dict[str, Any]:
    with store.read() as tx:
        return outbox.get(tx, delivery_id, owner=owner)


def ended(store: Store, delivery_id: str) -> dict[str, Any]:
    """The delivery once it is delivered or failed."""
    until(lambda: shown(store, delivery_id)["state"] != "pending")
    return shown(store, delivery_id)


def tried(store: Store, delivery_id: str) -> dict[str, Any]:
    """The delivery once a try has come to something."""
    until(lambda: shown(store, delivery_id)["error"] is not None)
    return shown(store, delivery_id)


def is_signed_by(secret: str, call: Call) -> bool:
    """As the specification of Standard Webhooks words it."""
    message = f"{call.headers['webhook-id']}.{call.headers['webhook-timestamp']}.".encode() + call.body
    made = hmac.new(base64.b64decode(secret.removeprefix("whsec_")), message, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(made).decode()}" in call.headers["webhook-signature"].split(" ")


# --- what is sent ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_database_url(empty_database_url: str) -> str:
    """Of a database that no other server of this process looks into: its deliverer would take what is due, under its own allow-list."""
    store = Store(empty_database_url)
    migrate(store)
    store.close()
    return empty_database_url


def test_a_jobs_end_is_told_signed_and_once(own_database_url: str, tmp_path: Path) -> None:
    settings = settings_for(own_database_url, tmp_path, allowed_hosts="127.0.0.1")
    with receiving() as receiver, serving(settings) as api:
        job = api.submit(webhook={"url": receiver.url + "?q=1"}, labels={"team": "vision"})
        api.http.post(f"/v1/jobs/{job['id']}/cancel")
        found = until(lambda: api.http.get("/v1/webhooks/deliveries", params={"state": "delivered"}).json()["data"])
        secret = api.http.get("/v1/webhooks/secret").json()["secret"]
    (call,), (delivery,) = receiver.calls, found
    assert is_signed_by(secret, call)
    assert not is_signed_by(outbox.SECRET_PREFIX + base64.b64encode(b"another").decode(), call)
    assert abs(int(call.headers["webhook-timestamp"]) - time.time()) < 60
    assert (call.path, call.headers["content-type"], call.headers["host"]) == ("/hook?q=1", "application/json", receiver.listed)
    body = json.loads(call.body)
    assert (body["type"], body["data"]["id"], body["data"]["labels"]) == ("job.cancelled", job["id"], {"team": "vision"})
    assert (delivery["id"], delivery["job"], delivery["status"], delivery["attempt"]) == (call.id, job["id"], 204, 1)
    assert delivery["payload"] == body


def test_the_certificate_must_be_that_of_the_name_and_the_connection_goes_to_the_address(sqlite_store: Store, authority: Authority) -> None:
    allow = AllowList.parse(f"{NAME},other.test")
    with (
        receiving(tls=authority.server()) as receiver,
        delivering(sqlite_store, allow, resolve=lambda *_: ["127.0.0.1"], tls=authority.client()),
    ):
        good = ended(sqlite_store, owed(sqlite_store, f"https://{NAME}:{receiver.port}/a"))
        bad = tried(sqlite_store, owed(sqlite_store, f"https://other.test:{receiver.port}/b"))
    assert good["state"] == "delivered"
    assert bad["state"] == "pending"
    assert "certificate" in bad["error"].lower()
    assert [(call.path, call.headers["host"]) for call in receiver.calls] == [("/a", f"{NAME}:{receiver.port}")]


def test_a_receiver_that_was_down_hears_it_when_it_is_up(store: Store, clock: FakeClock) -> None:
    with receiving() as gone:
        pass
    with delivering(store):
        delivery_id = owed(store, gone.url)
        first = tried(store, delivery_id)
        assert (first["state"], first["status"], first["attempt"]) == ("pending", None, 1)
        with receiving(port=gone.port) as back:
            clock.advance(6.1)  # the first pause and its jitter
            assert ended(store, delivery_id)["state"] == "delivered"
    assert [call.id for call in back.calls] == [delivery_id]


def _has_more_calls_than(receiver: Receiver, count: int) -> bool:
    return len(receiver.calls) > count


def test_an_answer_that_refuses_is_tried_again_and_gone_is_not(sqlite_store: Store, clock: FakeClock) -> None:
    statuses = iter([500, 503, 200])
    with delivering(sqlite_store), receiving(lambda _: Answer(next(statuses))) as busy, receiving(lambda _: Answer(410)) as over:
        delivery_id, last = owed(sqlite_store, busy.url), owed(sqlite_store, over.url)
        seen = []
        for _ in range(2):
            seen.append(tried(sqlite_store, delivery_id)["status"])
            clock.advance(40)
            until(partial(_has_more_calls_than, busy, len(seen)))
        assert ended(sqlite_store, delivery_id)["attempt"] == 3
        gone = ended(sqlite_store, last)
    assert seen == [500, 503]
    assert (gone["state"], gone["status"], len(over.calls)) == ("failed", 410, 1)


def test_a_sender_cut_off_before_it_could_store_is_followed_by_one_with_the_same_id(store: Store, clock: FakeClock) -> None:
    held = threading.Event()

    def holding(_: Call) -> Answer:
        held.wait(20)
        return Answer()

    with receiving(holding) as receiver:
        with delivering(store):
            delivery_id = owed(store, receiver.url)
            until(lambda: receiver.calls)
        assert shown(store, delivery_id)["state"] == "pending"
        held.set()
        clock.advance(LEASE_MS / 1000)
        with delivering(store):
            assert ended(store, delivery_id)["attempt"] == 2
    assert [call.id for call in receiver.calls] == [delivery_id] * 2
    assert receiver.calls[0].body == receiver.calls[1].body


def test_several_senders_send_each_delivery_once(store: Store) -> None:
    with receiving() as one, receiving() as other:
        wanted = [owed(store, receiver.url) for receiver in (one, other) for _ in range(10)]
        with delivering(store), delivering(store), delivering(store):
            for delivery_id in wanted:
                assert ended(store, delivery_id)["state"] == "delivered"
    assert sorted(call.id for call in one.calls + other.calls) == sorted(wanted)


def test_a_slow_receiver_holds_up_no_other(sqlite_store: Store) -> None:
    done = threading.Event()

    def slow(_: Call) -> Answer:
        done.wait(20)
        return Answer()

    with receiving(slow) as stuck, receiving(address="127.0.0.2") as quick:
        allow = AllowList.parse("127.0.0.0/8")
        backlog = [owed(sqlite_store, f"{stuck.url}/{i}") for i in range(30)]
        last = owed(sqlite_store, quick.url)
        with delivering(sqlite_store, allow):
            until(lambda: len(stuck.calls) == sending.MOST_OF_A_HOST)
            assert ended(sqlite_store, last)["state"] == "delivered"
            assert len(stuck.calls) == stuck.connections == sending.MOST_OF_A_HOST
            done.set()
            assert ended(sqlite_store, backlog[0])["state"] == "delivered"


def test_one_owner_never_takes_all_the_places(sqlite_store: Store) -> None:
    load = sending.Load()
    many = [outbox.Due(f"msg_{i}", "a", f"https://{i}.example/") for i in range(100)]
    assert sum(load.take(one) for one in many) == sending.MOST_OF_AN_OWNER
    assert load.full_owners == ["a"]
    assert load.take(outbox.Due("msg_b", "b", "https://1.example/"))
    others = [outbox.Due(f"msg_{i}", f"o{i}", f"https://{i}.other.example/") for i in range(100)]
    assert sum(load.take(one) for one in others) == sending.MOST_AT_ONCE - sending.MOST_OF_AN_OWNER - 1


# --- answers that are no answers ---------------------------------------------------------------------------------------------------


def test_of_a_huge_answer_little_is_read(sqlite_store: Store) -> None:
    chunk, chunks = b"x" * 65536, 2000
    with receiving(lambda _: Answer(200, body=(chunk for _ in range(chunks)))) as receiver, delivering(sqlite_store):
        assert ended(sqlite_store, owed(sqlite_store, receiver.url))["state"] == "delivered"
        # what the sender took, and what the kernels' buffers hold: a few MB at most, of 131
        assert receiver.sent_bytes < 16 * 2**20


def test_a_body_that_never_ends_changes_nothing_about_its_status(sqlite_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "DRAIN_S", 0.1)
    done = threading.Event()

    def endless() -> Iterator[bytes]:
        yield b"x"
        done.wait(20)

    with receiving(lambda _: Answer(200, body=endless())) as receiver, delivering(sqlite_store):
        assert ended(sqlite_store, owed(sqlite_store, receiver.url))["status"] == 200
        done.set()


@contextmanager
def dripping() -> Iterator[str]:
    """A server that sends a header line every few milliseconds, and never the last one; its URL."""
    done = threading.Event()

    def drip(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\n")
            while not done.wait(0.02):
                connection.sendall(b"x: y\r\n")

    def serve() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=drip, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        done.set()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def test_an_answer_in_drops_is_cut_off(sqlite_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read is quick; only the limit of the whole try ends it."""
    monkeypatch.setattr(sending, "TRY_S", 0.5)
    with dripping() as url, delivering(sqlite_store):
        found = tried(sqlite_store, owed(sqlite_store, url))
    assert (found["state"], found["status"]) == ("pending", None)
    assert "no answer within" in found["error"]


def test_what_is_no_http_is_no_answer(sqlite_store: Store) -> None:
    with receiving(lambda _: Answer(200, {"x": "\0\r\n\r\n"})) as receiver, delivering(sqlite_store):
        assert "no answer" in tried(sqlite_store, owed(sqlite_store, receiver.url))["error"]


# --- whom nothing is sent to -----------------------------------------------------------------------------------------------------


def no_connection(store: Store, url_of: Callable[[Receiver], str], allow: AllowList, resolve: Any = addresses_of) -> str:
    """Why the delivery failed; the receiver on 127.0.0.1 must have seen no connection."""
    with receiving() as victim, delivering(store, allow, resolve=resolve):
        found = ended(store, owed(store, url_of(victim)))
        assert (found["state"], found["status"], found["attempt"]) == ("failed", None, 1)
        assert victim.connections == 0
    return str(found["error"])


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "0x7f.0.0.1",
        "0",
        "0.0.0.0",
        "localhost",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[::127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "user@127.0.0.1",
        "hooks.example@127.0.0.1",
    ],
)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_no_spelling_of_this_machine_is_connected_to(host: str, scheme: str, sqlite_store: Store) -> None:
    error = no_connection(sqlite_store, lambda victim: f"{scheme}://{host}:{victim.port}/", AllowList.parse("hooks.corp"))
    assert error.startswith("not called")


def test_a_name_that_leads_to_this_machine_is_not_connected_to(sqlite_store: Store) -> None:
    """Its port is open to listed networks, so that the address alone decides."""
    allow = AllowList.parse("192.168.77.0/24")
    error = no_connection(sqlite_store, lambda victim: f"https://evil.test:{victim.port}/", allow, lambda *_: ["127.0.0.1"])
    assert "not a public address" in error


def test_one_good_address_does_not_open_the_way_to_a_bad_one(sqlite_store: Store) -> None:
    allow = AllowList.parse("127.0.0.2")
    no_connection(sqlite_store, lambda victim: f"http://evil.test:{victim.port}/", allow, lambda *_: ["127.0.0.2", "127.0.0.1"])


def test_a_name_that_changes_its_meaning_is_held_against_the_rule_each_time(sqlite_store: Store, clock: FakeClock) -> None:
    """127.0.0.2 stands for the public address that the name has while it is looked at, 127.0.0.1 for the target behind it."""
    asked: list[str] = []

    def rebinding(host: str, _: int) -> Sequence[str]:
        asked.append(host)
        return ["127.0.0.2"] if len(asked) == 1 else ["127.0.0.1"]

    with receiving() as victim, receiving(lambda _: Answer(500), address="127.0.0.2", port=victim.port) as bait:
        with delivering(sqlite_store, AllowList.parse("127.0.0.2"), resolve=rebinding):
            delivery_id = owed(sqlite_store, f"http://evil.test:{victim.port}/")
            assert tried(sqlite_store, delivery_id)["status"] == 500
            assert (asked, bait.connections) == (["evil.test"], 1)  # once a try: what was checked is what was called
            clock.advance(6.1)
            assert ended(sqlite_store, delivery_id)["error"].startswith("not called")
        assert (len(asked), bait.connections, victim.connections) == (2, 1, 0)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_a_failure_and_is_not_followed(status: int, sqlite_store: Store) -> None:
    with receiving() as victim, receiving(lambda _: Answer(status, {"Location": victim.url}), address="127.0.0.2") as lure:
        with delivering(sqlite_store, AllowList.parse("127.0.0.2")):
            found = tried(sqlite_store, owed(sqlite_store, lure.url))
        assert (found["state"], found["status"], victim.connections) == ("pending", status, 0)
    assert "redirects are not followed" in found["error"]


def test_a_proxy_of_the_environment_is_not_asked(sqlite_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as proxy, receiving() as receiver:
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://{proxy.listed}")
        with delivering(sqlite_store):
            assert ended(sqlite_store, owed(sqlite_store, receiver.url))["state"] == "delivered"
        assert proxy.connections == 0


# --- the routes ------------------------------------------------------------------------------------------------------------------


REFUSED_URLS = [
    "https://127.0.0.1/hook",
    "https://169.254.169.254/latest/meta-data",
    "https://[::ffff:10.0.0.1]/",
    "https://2130706433/",
    "https://user:pass@hooks.example/",
    "http://hooks.example/",
    "https://hooks.example:22/",
    "https://localhost/",
]


@pytest.mark.parametrize("url", REFUSED_URLS)
def test_a_job_whose_webhook_may_not_be_called_is_refused(api: Api, url: str) -> None:
    job = api.submit()
    answers = {
        "/webhook/url": api.http.post("/v1/jobs", json={"data": {"dataset": "digits"}, "webhook": {"url": url}}),
        "/set/webhook.url": api.http.post(f"/v1/jobs/{job['id']}/clone", json={"set": {"webhook.url": url}}),
        "/url": api.http.post("/v1/webhooks/test", json={"url": url}),
    }
    for pointer, answer in answers.items():
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_spec")
        assert [(one["pointer"], one["code"], one["value"]) for one in answer.json()["errors"]] == [(pointer, "address_refused", url)]
    assert len(api.http.get("/v1/jobs").json()["data"]) == 1
    assert api.http.get("/v1/webhooks/deliveries").json()["data"] == []


def test_a_dry_run_refuses_it_too(api: Api) -> None:
    body = {"data": {"dataset": "digits"}, "webhook": {"url": REFUSED_URLS[0]}}
    assert api.http.post("/v1/jobs", params={"dry_run": True}, json=body).status_code == 422


def test_a_test_is_delivered_like_the_others(own_database_url: str, tmp_path: Path) -> None:
    with receiving() as receiver, serving(settings_for(own_database_url, tmp_path, allowed_hosts=receiver.listed)) as api:
        answer = api.http.post("/v1/webhooks/test", json={"url": receiver.url})
        DeliveryDocument.model_validate_json(answer.content)
        assert (answer.status_code, answer.json()["event"], answer.json()["job"]) == (202, "webhook.test", None)
        path = answer.headers["location"]
        found = until(lambda: (seen := api.http.get(path).json())["state"] == "delivered" and seen)
        secret = api.http.get("/v1/webhooks/secret").json()["secret"]
        again = api.http.post(f"{path}/retry")
        assert (again.status_code, again.json()["state"]) == (202, "pending")
        until(lambda: len(receiver.calls) == 2)
    assert is_signed_by(secret, receiver.calls[0])
    assert {call.id for call in receiver.calls} == {found["id"]}


def test_after_a_rotation_both_secrets_sign(api: Api) -> None:
    old = api.http.get("/v1/webhooks/secret")
    new = api.http.post("/v1/webhooks/secret/rotate")
    for answer in (old, new):
        WebhookSecretDocument.model_validate_json(answer.content)
        assert answer.headers["cache-control"] == "no-store"
    assert old.json()["secret"] != new.json()["secret"] == api.http.get("/v1/webhooks/secret").json()["secret"]
    assert (old.json()["previous_until"], new.json()["previous_until"] is None) == (None, False)


@pytest.mark.parametrize("path", ["msg_01KAQZ5V3N8T4W6Y7C9E1G2H3J", "x", "msg_%00"])
def test_a_delivery_that_is_not_there_is_not_found(api: Api, path: str) -> None:
    for answer in (api.http.get(f"/v1/webhooks/deliveries/{path}"), api.http.post(f"/v1/webhooks/deliveries/{path}/retry")):
        assert (answer.status_code, answer.json()["code"]) == (404, "delivery_not_found")


@pytest.mark.parametrize("params", [{"state": "lost"}, {"limit": 0}, {"job": "x"}, {"after": "x"}])
def test_a_filter_that_makes_no_sense_is_refused(api: Api, params: dict[str, Any]) -> None:
    answer = api.http.get("/v1/webhooks/deliveries", params=params)
    assert (answer.status_code, answer.json()["errors"][0]["parameter"]) == (422, next(iter(params)))


@pytest.mark.parametrize("body", [{}, {"url": None}, {"url": "ftp://x"}, {"url": "https://a b"}, {"url": "https://x", "more": 1}, [], "x"])
def test_a_test_without_a_url_is_refused(api: Api, body: Any) -> None:
    assert api.http.post("/v1/webhooks/test", json=body).status_code == 422


def test_deliveries_are_listed_by_page_job_and_state(any_api: Api) -> None:
    jobs = [builders.submit(any_api.store, webhook={"url": "https://203.0.113.1/"}) for _ in range(3)]
    for job_id in jobs:
        do(any_api.store, lifecycle.cancel, job_id)
    get = any_api.http.get
    first = get("/v1/webhooks/deliveries", params={"limit": 2})
    DeliveryListDocument.model_validate_json(first.content)
    rest = get("/v1/webhooks/deliveries", params={"limit": 2, "after": first.json()["last_id"]}).json()
    assert [one["job"] for one in first.json()["data"] + rest["data"]] == jobs[::-1]
    assert (first.json()["has_more"], rest["has_more"]) == (True, False)
    assert [one["job"] for one in get("/v1/webhooks/deliveries", params={"job": jobs[1]}).json()["data"]] == [jobs[1]]
    assert get("/v1/webhooks/deliveries", params={"state": "delivered"}).json()["data"] == []


def test_an_owner_sees_and_signs_only_their_own(sqlite_url: str, tmp_path: Path) -> None:
    with serving(settings_for(sqlite_url, tmp_path)) as api:
        a, b = (do(api.store, keys.create, owner=owner) for owner in "ab")
        looker = do(api.store, keys.create, owner="a", scopes=frozenset({Scope.READ}))
        delivery_id = owed(api.store, "https://203.0.113.1/", owner="a")

        def asked(key: str, path: str, method: str = "GET") -> Any:
            return api.http.request(method, f"/v1/webhooks/{path}", headers={"Authorization": f"Bearer {key}"} if key else {})

        until(lambda: asked(a, "deliveries").status_code == 200)
        assert [one["id"] for one in asked(a, "deliveries").json()["data"]] == [delivery_id]
        assert asked(b, "deliveries").json()["data"] == []
        assert asked(b, f"deliveries/{delivery_id}").status_code == 404
        assert asked(b, f"deliveries/{delivery_id}/retry", "POST").status_code == 404
        assert asked(a, f"deliveries/{delivery_id}/retry", "POST").status_code == 202
        assert asked(a, "secret").json()["secret"] != asked(b, "secret").json()["secret"]
        assert asked(looker, f"deliveries/{delivery_id}").status_code == 200
        for path, method in (("secret", "GET"), ("secret/rotate", "POST"), (f"deliveries/{delivery_id}/retry", "POST")):
            assert (asked(looker, path, method).status_code, asked("", path, method).status_code) == (403, 401)


def test_a_list_of_hosts_that_makes_no_sense_stops_the_server(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a name, an address or a network"):
        settings_for("", tmp_path, allowed_hosts="https://hooks.corp")


def test_the_server_ends_though_a_try_is_at_work(sqlite_url: str, tmp_path: Path) -> None:
    held = threading.Event()

    def holding(_: Call) -> Answer:
        held.wait(30)
        return Answer()

    with receiving(holding) as receiver:
        with serving(settings_for(sqlite_url, tmp_path, allowed_hosts="127.0.0.1")) as api:
            api.http.post("/v1/webhooks/test", json={"url": receiver.url})
            until(lambda: receiver.calls)
        held.set()
