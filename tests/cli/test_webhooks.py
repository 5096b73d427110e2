"""`powergrad webhooks`, both clients and a receiver's verification, against a real server and a real receiver."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from powergrad.cli.main import main
from powergrad.client import ApiError, AsyncClient, Client, ForgedWebhook, verify_webhook
from powergrad.jobs import logs, outbox
from powergrad.jobs.outbox import Delivery
from tests.api.conftest import Api, serving, settings_for, until
from tests.receivers import Answer, Receiver, receiving

Captured = pytest.CaptureFixture[str]
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
AT_S = 1_700_000_000


@dataclass
class Site:
    api: Api
    receiver: Receiver
    client: Client


@pytest.fixture(scope="module")
def running(sqlite_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Api, Receiver]]:
    logs.configure("json")  # on standard error, as the process itself does: standard output is the command's
    folder = tmp_path_factory.mktemp("webhooks")
    shutil.copy(sqlite_file, folder / "jobs.db")
    settings = settings_for(f"sqlite:///{folder}/jobs.db", folder, allowed_hosts="127.0.0.1")
    with receiving() as receiver, serving(settings) as api:
        yield api, receiver


@pytest.fixture
def site(running: tuple[Api, Receiver], monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A server and a receiver that it may call, both named by the environment."""
    api, receiver = running
    for name in [name for name in os.environ if name.startswith("POWERGRAD_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("POWERGRAD_URL", api.url)
    receiver.answer = lambda _: Answer()
    receiver.calls.clear()
    with Client(api.url) as client:
        yield Site(api, receiver, client)


def test_a_test_that_was_heard_ends_with_zero_and_can_be_verified(site: Site, capsys: Captured) -> None:
    assert main(["webhooks", "test", site.receiver.url]) == 0
    assert "delivered" in capsys.readouterr().out
    assert main(["webhooks", "secret"]) == 0
    secret = capsys.readouterr().out.strip()
    (call,) = site.receiver.calls
    assert verify_webhook(call.body, call.headers, secret)["type"] == "webhook.test"


def test_a_test_that_was_not_heard_ends_with_one_and_says_why(site: Site, capsys: Captured) -> None:
    site.receiver.answer = lambda _: Answer(500)
    assert main(["webhooks", "test", site.receiver.url]) == 1
    told = capsys.readouterr()
    assert "pending" in told.out
    assert "the receiver answered 500" in told.err
    assert "next try" in told.err


def test_a_test_to_a_host_that_may_not_be_called_is_refused(site: Site, capsys: Captured) -> None:
    assert main(["webhooks", "test", "https://169.254.169.254/latest"]) == 3
    assert "/url" in (told := capsys.readouterr().err)
    assert "POWERGRAD_ALLOWED_HOSTS" in told


def test_deliveries_are_listed_and_sent_again(site: Site, capsys: Captured) -> None:
    job = site.client.submit({"data": {"dataset": "digits"}, "webhook": {"url": site.receiver.url}})
    site.client.cancel(job.id)
    until(lambda: site.receiver.calls)
    assert main(["webhooks", "deliveries", "--job", job.id, "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert (listed["event"], listed["job"]) == ("job.cancelled", job.id)
    assert main(["webhooks", "retry", listed["id"], "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["id"], again["state"]) == (listed["id"], "delivered")
    until(lambda: len(site.receiver.calls) == 2)
    assert {call.id for call in site.receiver.calls} == {listed["id"]}
    assert main(["webhooks", "deliveries", "--state", "delivered", "-n", "1"]) == 0
    assert listed["id"] in capsys.readouterr().out
    assert main(["webhooks", "deliveries", "--state", "lost"]) == 3


def test_a_rotation_keeps_the_old_secret_for_a_day(site: Site, capsys: Captured) -> None:
    main(["webhooks", "secret"])
    old = capsys.readouterr().out.strip()
    assert main(["webhooks", "rotate"]) == 0
    told = capsys.readouterr()
    assert told.out.strip() != old
    assert "signs too, until" in told.err
    site.client.test_webhook(site.receiver.url)
    (call,) = until(lambda: site.receiver.calls)
    for secret in (old, told.out.strip()):
        assert verify_webhook(call.body, call.headers, secret)


def test_both_clients_say_the_same(site: Site) -> None:
    made = site.client.test_webhook(site.receiver.url)
    until(lambda: site.client.delivery(made.id).state == "delivered")

    async def ask() -> None:
        async with AsyncClient(site.api.url) as client:
            assert await client.webhook_secret() == site.client.webhook_secret()
            assert await client.delivery(made.id) == site.client.delivery(made.id)
            assert [one.id async for one in client.deliveries(page_size=1)] == [one.id for one in site.client.deliveries()]
            with pytest.raises(ApiError, match="delivery_not_found"):
                await client.retry_delivery("msg_01KAQZ5V3N8T4W6Y7C9E1G2H3J")

    asyncio.run(ask())


# --- a receiver's verification ---------------------------------------------------------------------------------------------------


def signed(body: str = '{"type":"job.succeeded"}', *, secret: str = SECRET) -> tuple[str, dict[str, str]]:
    delivery = Delivery("msg_1", 1, "local", "https://hooks.example/", body, (secret,))
    return body, outbox.signed_headers(delivery, now_ms=AT_S * 1000)


def test_what_the_server_signed_is_verified_in_any_case_of_the_headers() -> None:
    body, headers = signed()
    for given in (headers, {name.title(): value for name, value in headers.items()}):
        assert verify_webhook(body.encode(), given, SECRET, now_s=AT_S + 299) == {"type": "job.succeeded"}


@pytest.mark.parametrize("forged", ["body", "id", "timestamp", "secret", "version", "missing", "empty"])
def test_nothing_else_is(forged: str) -> None:
    body, headers = signed()
    secret = SECRET
    match forged:
        case "body":
            body = body.replace("succeeded", "failed")
        case "id":
            headers["webhook-id"] = "msg_2"
        case "timestamp":
            headers["webhook-timestamp"] = str(AT_S + 1)
        case "secret":
            secret = "whsec_" + "A" * 44
        case "version":
            headers["webhook-signature"] = headers["webhook-signature"].replace("v1,", "v1a,")
        case "missing":
            del headers["webhook-signature"]
        case "empty":
            headers["webhook-signature"] = ""
    with pytest.raises(ForgedWebhook):
        verify_webhook(body, headers, secret, now_s=AT_S)


@pytest.mark.parametrize("now_s", [AT_S + 301, AT_S - 301])
def test_a_call_of_another_time_is_no_call(now_s: float) -> None:
    body, headers = signed()
    with pytest.raises(ForgedWebhook, match="webhook-timestamp"):
        verify_webhook(body, headers, SECRET, now_s=now_s)


def test_a_secret_that_is_none_is_said_to_be_that() -> None:
    body, headers = signed()
    with pytest.raises(ValueError, match="whsec_"):
        verify_webhook(body, headers, "whsec_not base64", now_s=AT_S)
