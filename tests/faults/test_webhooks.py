"""Row 19: webhooks to where none may go, and a server that dies in the middle of one."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import update

from api.deliverer import Deliverer
from powergrad.addresses import AllowList
from powergrad.jobs import outbox
from powergrad.jobs.store import Store, Tx
from powergrad.jobs.tables import deliveries
from tests.faults.api_process import ApiProcess
from tests.jobs.builders import do
from tests.receivers import Answer, Call, receiving
from tests.stores import FakeClock
from tests.worker.conftest import until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400), pytest.mark.row(19)]

ENDS_WITHIN_S = 60.0
ELSEWHERE = "127.0.0.2"  # stands for a host that may be called; what may not is on 127.0.0.1
APART = "127.0.0.3"
LISTED = f"{ELSEWHERE},{APART},192.168.77.0/24"  # networks on any port: then it is the address that decides


@dataclass
class Served:
    """A real API process and a client of it."""

    api: ApiProcess
    http: httpx2.Client

    def ended(self, path: str) -> dict[str, Any]:
        """The delivery once it is delivered or failed."""
        until(lambda: self.http.get(path).json()["state"] != "pending", within_s=ENDS_WITHIN_S)
        found: dict[str, Any] = self.http.get(path).json()
        return found

    def told_and_cancelled(self, url: str) -> str:
        """Id of a job that has ended, and owes `url` a call."""
        job_id: str = self.http.post("/v1/jobs", json={"data": {"dataset": "digits"}, "webhook": {"url": url}}).json()["id"]
        assert self.http.post(f"/v1/jobs/{job_id}/cancel").json()["state"] == "cancelled"
        return job_id


@pytest.fixture(scope="module")
def served(sqlite_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("api")
    (folder / "jobs.db").write_bytes(sqlite_file.read_bytes())
    store = Store(f"sqlite:///{folder}/jobs.db")
    api = ApiProcess(folder, store, {"POWERGRAD_ALLOWED_HOSTS": LISTED})
    try:
        api.start()
        with httpx2.Client(base_url=f"http://127.0.0.1:{api.port}", trust_env=False, timeout=ENDS_WITHIN_S) as http:
            yield Served(api, http)
    finally:
        api.kill()
        store.close()


SPELLINGS = [
    "127.0.0.1",
    "127.1",
    "2130706433",
    "0x7f000001",
    "017700000001",
    "0.0.0.0",
    "[::1]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[64:ff9b::127.0.0.1]",
    "[2002:7f00:1::]",
    "[fe80::1]",
    "169.254.169.254",
    "[::ffff:169.254.169.254]",
    "a@127.0.0.1",
]


def test_no_spelling_of_a_private_address_is_accepted_or_called(served: Served) -> None:
    with receiving() as victim:
        for host in SPELLINGS:
            for scheme in ("http", "https"):
                url = f"{scheme}://{host}:{victim.port}/"
                job = served.http.post("/v1/jobs", json={"data": {"dataset": "digits"}, "webhook": {"url": url}})
                test = served.http.post("/v1/webhooks/test", json={"url": url})
                assert [(one.status_code, one.json()["errors"][0]["code"]) for one in (job, test)] == [(422, "address_refused")] * 2, url
        assert victim.url not in served.http.get("/v1/webhooks/deliveries").text
        assert victim.connections == 0


def test_a_name_that_leads_to_this_machine_is_resolved_and_not_called(served: Served) -> None:
    """By the system's own resolver."""
    with receiving() as victim:
        answer = served.http.post("/v1/webhooks/test", json={"url": f"http://localhost:{victim.port}/"})
        assert answer.status_code == 202, "a listed network might hold it: only its addresses tell"
        found = served.ended(answer.headers["location"])
        assert (found["state"], found["attempt"], victim.connections) == ("failed", 1, 0)
        assert "not a public address" in found["error"]


@pytest.mark.parametrize("status", [301, 307])
def test_a_redirect_to_this_machine_is_not_followed(status: int, served: Served) -> None:
    with receiving() as victim, receiving(lambda _: Answer(status, {"Location": victim.url}), address=ELSEWHERE) as lure:
        path = served.http.post("/v1/webhooks/test", json={"url": lure.url}).headers["location"]
        until(lambda: served.http.get(path).json()["status"] == status, within_s=ENDS_WITHIN_S)
        assert (len(lure.calls), victim.connections) == (1, 0)


def test_a_name_that_is_rebound_between_tries_reaches_nothing(sqlite_store: Store, clock: FakeClock) -> None:
    asked: list[str] = []

    def rebinding(host: str, _: int) -> Sequence[str]:
        asked.append(host)
        return [ELSEWHERE] if len(asked) == 1 else ["127.0.0.1"]

    with receiving() as victim, receiving(lambda _: Answer(503), address=ELSEWHERE, port=victim.port) as bait:
        running = Deliverer(sqlite_store, AllowList.parse(LISTED), look_s=0.02, resolve=rebinding)
        running.start()
        try:
            url = f"http://rebound.test:{victim.port}/"
            delivery_id = do(sqlite_store, outbox.owe, owner="local", url=url, event="webhook.test", data={})
            until(lambda: shown(sqlite_store, delivery_id)["status"] == 503)
            clock.advance(10)
            until(lambda: shown(sqlite_store, delivery_id)["state"] == "failed")
        finally:
            running.stop()
        assert (len(asked), bait.connections, victim.connections) == (2, 1, 0)


def shown(store: Store, delivery_id: str) -> dict[str, Any]:
    with store.read() as tx:
        return outbox.get(tx, delivery_id, owner="local")


def test_an_api_killed_between_the_call_and_its_row_calls_again_with_the_same_id(served: Served) -> None:
    killed = threading.Event()

    def holding(_: Call) -> Answer:
        killed.wait(ENDS_WITHIN_S)
        return Answer()

    with receiving(holding, address=ELSEWHERE) as receiver:
        job_id = served.told_and_cancelled(receiver.url)
        until(lambda: receiver.calls, within_s=ENDS_WITHIN_S)
        served.api.kill()
        killed.set()
        do(served.api.store, _let_the_lease_lapse, receiver.calls[0].id)  # by hand: it would take a minute
        served.api.start()
        found = served.ended(f"/v1/webhooks/deliveries/{receiver.calls[0].id}")
    assert (found["state"], found["attempt"], found["job"]) == ("delivered", 2, job_id)
    assert [call.id for call in receiver.calls] == [found["id"]] * 2
    assert receiver.calls[0].body == receiver.calls[1].body


def _let_the_lease_lapse(tx: Tx, delivery_id: str) -> None:
    assert tx.run(update(deliveries).where(deliveries.c.id == delivery_id).values(due_at=tx.now_ms)).rowcount == 1


def test_receivers_that_hang_break_off_and_lie_cost_no_job_and_no_other_receiver(served: Served) -> None:
    over = threading.Event()

    def hanging(_: Call) -> Answer:
        over.wait(ENDS_WITHIN_S)
        return Answer()

    with (
        receiving(hanging, address=ELSEWHERE) as stuck,
        breaking_off() as broken,
        receiving(lambda _: Answer(200, {"Content-Length": "-5"}), address=ELSEWHERE) as lying,
        receiving(address=APART) as good,
    ):
        jobs = [served.told_and_cancelled(url) for url in (stuck.url, stuck.url, stuck.url, broken, lying.url, good.url)]
        until(lambda: good.calls, within_s=ENDS_WITHIN_S)
        over.set()
    assert [job for job in jobs if job in good.calls[0].body.decode()] == [jobs[-1]]


@contextmanager
def breaking_off() -> Iterator[str]:
    """A server that closes each connection at once; its URL."""

    def serve() -> None:
        try:
            while True:
                listener.accept()[0].close()
        except OSError:
            return

    with socket.create_server((ELSEWHERE, 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://{ELSEWHERE}:{listener.getsockname()[1]}/"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)
