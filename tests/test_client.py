"""What the clients do when the wire misbehaves: a real HTTP server made here shows the faults that a healthy API cannot be made to show."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import re
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.message import Message
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import httpx2
import pytest

from powergrad.client import ApiError, AsyncClient, Client, ClientError, DownloadCorrupt, Retries, Unreachable
from powergrad.client.errors import retry_after_s

QUICK = Retries(count=5, first_s=0.001, cap_s=0.002)
WEIGHTS = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()

Answer = Callable[["Handler"], None]


@dataclass(frozen=True)
class Asked:
    """One request as it came; headers give None for what was not sent."""

    path: str
    headers: Message


class Handler(BaseHTTPRequestHandler):
    """Gives the scripted answers in turn, the last one again and again, and notes what was asked."""

    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def do_any(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.asked.append(Asked(self.path, self.headers))
        script = self.server.script
        (script.pop(0) if len(script) > 1 else script[0])(self)

    do_GET = do_POST = do_DELETE = do_PATCH = do_any  # noqa: N815 - http.server's names

    def log_message(self, *arguments: object) -> None:
        pass

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"content-length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def hang_up(self) -> None:
        """Reset the connection, as a killed server does."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True


class FaultyServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, *script: Answer) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = list(script)
        self.asked: list[Asked] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()


Ask = Callable[..., Any]


def _blocking(server: FaultyServer, method: str, *arguments: Any, retries: Retries = QUICK, **named: Any) -> Any:
    with Client(server.url, retries=retries) as client:
        result = getattr(client, method)(*arguments, **named)
        return list(result) if isinstance(result, Iterator) else result


def _awaited(server: FaultyServer, method: str, *arguments: Any, retries: Retries = QUICK, **named: Any) -> Any:
    async def run() -> Any:
        async with AsyncClient(server.url, retries=retries) as client:
            result = getattr(client, method)(*arguments, **named)
            return [one async for one in result] if isinstance(result, AsyncIterator) else await result

    return asyncio.run(run())


@pytest.fixture(params=[_blocking, _awaited], ids=["Client", "AsyncClient"])
def ask(request: pytest.FixtureRequest) -> Ask:
    """Call a method of either client; iterators come back as lists."""
    return request.param  # type: ignore[no-any-return]


def job(state: str = "running", **fields: Any) -> bytes:
    return json.dumps({"id": "job_1", "object": "job", "state": state, **fields}).encode()


def answer(status: int, body: bytes = b"", **headers: str) -> Answer:
    return lambda handler: handler.reply(status, body, **headers)


def drop(handler: Handler) -> None:
    handler.hang_up()


def problem(status: int, **fields: Any) -> Answer:
    body = json.dumps({"type": "about:blank", "status": status, **fields}).encode()
    return answer(status, body, content_type="application/problem+json")


# --- repeating calls


@pytest.mark.parametrize("fault", [answer(503), answer(429, retry_after="0"), drop], ids=["503", "429", "reset"])
def test_a_call_that_may_be_repeated_survives_a_passing_fault(ask: Ask, fault: Answer) -> None:
    with FaultyServer(fault, fault, answer(200, job())) as server:
        assert ask(server, "get", "job_1").state == "running"
    assert len(server.asked) == 3


@pytest.mark.parametrize(("method", "argument"), [("submit", {"data": {"dataset": "digits"}}), ("clone", "job_1")])
def test_what_makes_a_job_is_repeated_under_one_idempotency_key(ask: Ask, method: str, argument: Any) -> None:
    with FaultyServer(drop, answer(503), answer(202, job("queued"))) as server:
        ask(server, method, argument)
    keys = {asked.headers["idempotency-key"] for asked in server.asked}
    assert len(server.asked) == 3
    assert len(keys) == 1
    assert re.fullmatch("[0-9a-f]{32}", keys.pop())


def test_two_submissions_have_two_keys(ask: Ask) -> None:
    with FaultyServer(answer(202, job("queued"))) as server:
        ask(server, "submit", {"data": {"dataset": "digits"}})
        ask(server, "submit", {"data": {"dataset": "digits"}})
    assert server.asked[0].headers["idempotency-key"] != server.asked[1].headers["idempotency-key"]


@pytest.mark.parametrize("fault", [drop, answer(503)], ids=["reset", "503"])
def test_a_call_that_may_not_be_repeated_is_made_once(ask: Ask, fault: Answer) -> None:
    with FaultyServer(fault, answer(202, job())) as server, pytest.raises((Unreachable, ApiError)):
        ask(server, "retry", "job_1")
    assert len(server.asked) == 1


def test_patience_ends(ask: Ask) -> None:
    with FaultyServer(answer(503)) as server, pytest.raises(ApiError) as refused:
        ask(server, "get", "job_1", retries=Retries(count=2, first_s=0.001))
    assert refused.value.status == 503
    assert len(server.asked) == 3


def test_waits_double_and_are_cut_by_up_to_half() -> None:
    retries, lost = Retries(count=10, first_s=1.0, cap_s=8.0), httpx2.ReadError("reset")
    for tries, longest in ((1, 1.0), (2, 2.0), (3, 4.0), (4, 8.0), (9, 8.0)):
        waits = {retries.wait_after(lost, tries=tries, repeatable=True) for _ in range(50)}
        assert all(wait is not None and longest / 2 <= wait <= longest for wait in waits)
        assert len(waits) > 1, "clients that fail together must not come back together"


def test_the_server_s_own_waiting_time_is_kept_unless_it_is_too_long() -> None:
    def busy(seconds: str) -> httpx2.Response:
        return httpx2.Response(503, headers={"Retry-After": seconds})

    assert Retries().wait_after(busy("7"), tries=1, repeatable=True) == 7.0
    assert Retries().wait_after(busy("3600"), tries=1, repeatable=True) is None


def test_a_waiting_time_may_be_a_date() -> None:
    def asked(said: str) -> float | None:
        return retry_after_s(httpx2.Response(503, headers={"Retry-After": said}))

    in_a_minute = asked(format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True))
    assert in_a_minute is not None
    assert 30.0 < in_a_minute <= 60.0
    assert asked("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    for nonsense in ("soon", "", "Wed, 21 Oct 2015 07:28:00 -0000", "99999999999999999999 Oct"):
        assert asked(nonsense) is None


def test_a_deletion_whose_answer_was_lost_has_happened(ask: Ask) -> None:
    with FaultyServer(drop, problem(404, code="not_found")) as server:
        assert ask(server, "delete", "job_1") is None


def test_deleting_what_is_not_there_is_refused(ask: Ask) -> None:
    with FaultyServer(problem(404, code="job_not_found", detail="no such job")) as server, pytest.raises(ApiError, match="no such job"):
        ask(server, "delete", "job_1")


# --- refusals and nonsense


def test_a_refusal_carries_every_violation_and_is_not_repeated(ask: Ask) -> None:
    errors = [
        {"pointer": "/loss/alpha", "code": "out_of_range", "detail": "must be at most 1", "value": 1.4},
        {"pointer": "/epochs", "code": "wrong_type", "detail": "must be an integer", "value": "many"},
    ]
    with (
        FaultyServer(problem(422, code="invalid_spec", detail="2 violations", errors=errors)) as server,
        pytest.raises(ApiError) as refused,
    ):
        ask(server, "submit", {"loss": {"alpha": 1.4}, "epochs": "many"})
    assert (refused.value.status, refused.value.code) == (422, "invalid_spec")
    assert [(one.pointer, one.detail, one.value) for one in refused.value.errors] == [
        ("/loss/alpha", "must be at most 1", 1.4),
        ("/epochs", "must be an integer", "many"),
    ]
    assert len(server.asked) == 1


@pytest.mark.parametrize("body", [b"<html>hello</html>", b'{"no": "job"}', b"[]"])
def test_an_answer_of_something_else_is_said_to_be_that(ask: Ask, body: bytes) -> None:
    with FaultyServer(answer(200, body)) as server, pytest.raises(ClientError, match="not one of PowerGrad's API"):
        ask(server, "get", "job_1")


def test_a_refusal_that_is_no_problem_document_is_quoted(ask: Ask) -> None:
    with FaultyServer(answer(502, b"upstream says no")) as server, pytest.raises(ApiError, match="502: upstream says no"):
        ask(server, "get", "job_1")


def test_nothing_listening_is_called_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets the port meanwhile
        with Client(f"http://127.0.0.1:{taken.getsockname()[1]}", retries=0) as client, pytest.raises(Unreachable) as gone:
            client.get("job_1")
    assert gone.value.refused


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    with FaultyServer(answer(200, job())) as server:
        assert ask(server, "get", "job_1").id == "job_1"


# --- waiting for a change


def test_changes_are_asked_for_with_the_last_etag_until_the_job_has_ended(ask: Ask) -> None:
    script = (
        answer(200, job(), etag='"1"'),
        answer(304, etag='"1"'),
        answer(200, job(progress={"step": 5}), etag='"2"'),
        answer(200, job("succeeded"), etag='"3"'),
    )
    with FaultyServer(*script) as server:
        seen = ask(server, "changes", "job_1")
    assert [(one.state, one.progress.step) for one in seen] == [("running", None), ("running", 5), ("succeeded", None)]
    assert [asked.headers["if-none-match"] for asked in server.asked] == [None, '"1"', '"1"', '"2"']
    assert [("wait=30" in asked.path) for asked in server.asked] == [False, True, True, True]


def test_waiting_too_long_is_a_timeout(ask: Ask) -> None:
    with FaultyServer(answer(200, job(), etag='"1"'), answer(304, etag='"1"')) as server, pytest.raises(TimeoutError, match="job_1"):
        ask(server, "wait", "job_1", 0.05)


def test_pages_are_fetched_until_there_are_no_more(ask: Ask) -> None:
    def page(ids: list[str], *, has_more: bool) -> Answer:
        data = [{"id": one, "state": "queued"} for one in ids]
        return answer(200, json.dumps({"object": "list", "data": data, "has_more": has_more}).encode())

    with FaultyServer(page(["job_3", "job_2"], has_more=True), page(["job_1"], has_more=False)) as server:
        found = ask(server, "list", state=["queued", "running"], labels={"team": "vision"}, page_size=2)
    assert [one.id for one in found] == ["job_3", "job_2", "job_1"]
    assert server.asked[0].path == "/v1/jobs?limit=2&label.team=vision&state=queued&state=running"
    assert "after=job_2" in server.asked[1].path


# --- the event stream


def frames(*seqs: int, end: bool = False, cut_in: int | None = None) -> Answer:
    """A stream of these events, then its end frame, or a reset in the middle of the frame of event `cut_in`."""

    def frame(seq: int) -> bytes:
        data = json.dumps({"seq": seq, "at": "2026-01-01T00:00:00Z", "type": "metrics", "data": {"to_step": seq}})
        return f"id: {seq}\nevent: metrics\ndata: {data}\n\n".encode()

    def stream(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream")
        handler.send_header("connection", "close")
        handler.end_headers()
        handler.wfile.write(b": ping\n\n" + b"".join(map(frame, seqs)))
        if cut_in is not None:
            handler.wfile.write(frame(cut_in)[:-8])
        if end:
            handler.wfile.write(b"event: end\ndata: {}\n\n")
        handler.close_connection = True

    return stream


def test_a_stream_that_breaks_goes_on_without_gap_or_repeat(ask: Ask) -> None:
    script = (frames(1, 2, 3, cut_in=4), drop, answer(503), frames(4, 5), frames(5, 6, end=True))
    with FaultyServer(*script) as server:
        events = ask(server, "stream", "job_1")
    assert [event.seq for event in events] == [1, 2, 3, 4, 5, 6]
    assert [asked.headers["last-event-id"] for asked in server.asked] == [None, "3", "3", "3", "5"]


def test_a_stream_can_begin_in_the_middle(ask: Ask) -> None:
    with FaultyServer(frames(8, end=True)) as server:
        assert [event.seq for event in ask(server, "stream", "job_1", 7)] == [8]
    assert server.asked[0].headers["last-event-id"] == "7"


def test_a_stream_that_never_gets_anywhere_is_given_up(ask: Ask) -> None:
    with FaultyServer(frames()) as server, pytest.raises(Unreachable, match="before its end frame"):
        ask(server, "stream", "job_1", retries=Retries(count=3, first_s=0.001))
    assert len(server.asked) == 4


def test_a_stream_of_a_job_that_is_not_there_is_refused(ask: Ask) -> None:
    with FaultyServer(problem(404, code="job_not_found", detail="no such job")) as server, pytest.raises(ApiError, match="no such job"):
        ask(server, "stream", "job_1")


# --- the log that is followed

LOG = "one\nzwölf\nthree\n".encode()


def log_part(start: int, end: int, *, complete: bool = False, cut: bool = False) -> Answer:
    """LOG from `start`, in two chunks, to `end`, where it ends well or is reset."""

    def send(handler: Handler) -> None:
        handler.send_response(200)
        for name, value in {"transfer-encoding": "chunked", "log-offset": str(start), "log-complete": str(complete).lower()}.items():
            handler.send_header(name, value)
        handler.end_headers()
        middle = (start + end) // 2
        for block in (LOG[start:middle], LOG[middle:end]):
            if block:
                handler.wfile.write(b"%x\r\n%s\r\n" % (len(block), block))
        handler.wfile.flush()
        if not cut:
            handler.wfile.write(b"0\r\n\r\n")
        handler.close_connection = cut

    return send


def queries_of(server: FaultyServer) -> list[str]:
    return [asked.path.partition("?")[2] for asked in server.asked]


def test_a_followed_log_goes_on_where_it_broke_in_the_middle_of_a_character_too(ask: Ask) -> None:
    half = LOG.index("ö".encode()) + 1
    script = (log_part(0, half, cut=True), drop, answer(503), log_part(half, half + 4), log_part(half + 4, len(LOG), complete=True))
    with FaultyServer(*script) as server:
        assert "".join(ask(server, "follow_logs", "job_1")) == LOG.decode()
    wanted = [half, half, half, half + 4]
    assert queries_of(server) == ["follow=true", *(f"follow=true&offset={offset}" for offset in wanted)]


def test_a_followed_tail_goes_on_from_where_the_server_said_it_begins(ask: Ask) -> None:
    with FaultyServer(log_part(4, 4, cut=True), log_part(4, len(LOG), complete=True)) as server:
        assert "".join(ask(server, "follow_logs", "job_1", tail=2)) == LOG[4:].decode()
    assert queries_of(server) == ["follow=true&tail=2", "follow=true&offset=4"]


def test_a_log_that_ends_before_its_job_is_asked_for_again_but_not_for_ever(ask: Ask) -> None:
    with FaultyServer(log_part(0, 0)) as server, pytest.raises(Unreachable, match="before its end"):
        ask(server, "follow_logs", "job_1", retries=Retries(count=3, first_s=0.001))
    assert len(server.asked) == 4


def test_a_log_of_a_job_that_is_not_there_is_refused(ask: Ask) -> None:
    with FaultyServer(problem(404, code="job_not_found", detail="no such job")) as server, pytest.raises(ApiError, match="no such job"):
        ask(server, "follow_logs", "job_1")


# --- downloads


def listing(sha256: str = SHA256) -> Answer:
    data = [{"id": "step-00000044", "bytes": len(WEIGHTS), "sha256": sha256, "is_best": True, "is_latest": True}]
    return answer(200, json.dumps({"object": "list", "data": data}).encode())


def weights(*, stop_after: int | None = None, ignore_range: bool = False, content: bytes = WEIGHTS) -> Answer:
    """The file from where the client asks, cut off after `stop_after` bytes."""

    def send(handler: Handler) -> None:
        asked = handler.headers.get("range")
        start = 0 if asked is None or ignore_range else int(asked.removeprefix("bytes=").removesuffix("-"))
        handler.send_response(206 if start else 200)
        handler.send_header("content-length", str(len(content) - start))
        if start:
            handler.send_header("content-range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        handler.end_headers()
        end = len(content) if stop_after is None else start + stop_after
        handler.wfile.write(content[start:end])
        if end < len(content):
            handler.wfile.flush()
            handler.connection.shutdown(socket.SHUT_WR)
            handler.close_connection = True

    return send


def test_a_broken_download_goes_on_where_it_broke(ask: Ask, tmp_path: Path) -> None:
    with FaultyServer(listing(), weights(stop_after=300_000), weights(stop_after=300_000), weights()) as server:
        path = ask(server, "download", "job_1", "best", tmp_path / "best.safetensors")
    assert path.read_bytes() == WEIGHTS
    assert [asked.headers["range"] for asked in server.asked[1:]] == [None, "bytes=300000-", "bytes=600000-"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["best.safetensors"]


def test_a_later_call_goes_on_with_an_abandoned_download(ask: Ask, tmp_path: Path) -> None:
    target = tmp_path / "best.safetensors"
    with FaultyServer(listing(), weights(stop_after=500_000), listing(), weights()) as server:
        with pytest.raises(Unreachable):
            ask(server, "download", "job_1", "best", target, retries=Retries(count=0))
        assert not target.exists(), "a file under its name is a whole one"
        ask(server, "download", "job_1", "best", target)
    assert target.read_bytes() == WEIGHTS
    assert server.asked[-1].headers["range"] == "bytes=500000-"


def test_a_server_without_ranges_sends_it_all_again(ask: Ask, tmp_path: Path) -> None:
    with FaultyServer(listing(), weights(stop_after=300_000), weights(ignore_range=True)) as server:
        path = ask(server, "download", "job_1", "latest", tmp_path / "a.safetensors")
    assert path.read_bytes() == WEIGHTS


def test_a_changed_byte_is_found_and_nothing_is_kept(ask: Ask, tmp_path: Path) -> None:
    changed = WEIGHTS[:-1] + b"\0"
    with FaultyServer(listing(), weights(content=changed)) as server, pytest.raises(DownloadCorrupt, match="sha256"):
        ask(server, "download", "job_1", "best", tmp_path / "best.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_gets_a_name_of_job_and_checkpoint(ask: Ask, tmp_path: Path) -> None:
    with FaultyServer(listing(), weights()) as server:
        path = ask(server, "download", "job_1", "step-00000044", tmp_path)
    assert path == tmp_path / "job_1-step-00000044.safetensors"


def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(ask: Ask, tmp_path: Path) -> None:
    with FaultyServer(listing()) as server, pytest.raises(ApiError, match="step-00000044"):
        ask(server, "download", "job_1", "step-00000001", tmp_path)


# --- the two of them


def test_both_clients_have_the_same_methods_and_parameters() -> None:
    def methods(kind: type) -> dict[str, list[str]]:
        named = inspect.getmembers(kind, inspect.isfunction)
        return {name: list(inspect.signature(method).parameters) for name, method in named if not name.startswith("_")}

    assert methods(Client) == methods(AsyncClient)


@pytest.mark.parametrize("url", ["127.0.0.1:8642", "ftp://127.0.0.1", "http://"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ClientError, match="http://"):
        Client(url)


def test_an_artifact_goes_on_where_it_broke_and_is_verified(ask: Ask, tmp_path: Path) -> None:
    found = answer(200, json.dumps({"object": "list", "data": [{"name": "model.onnx", "bytes": len(WEIGHTS), "sha256": SHA256}]}).encode())
    with FaultyServer(found, weights(stop_after=400_000), weights()) as server:
        path = ask(server, "download_artifact", "job_1", "model.onnx", tmp_path)
        with pytest.raises(ApiError, match=r"it has: model\.onnx"):
            server.script = [found]
            ask(server, "download_artifact", "job_1", "model.pt2", tmp_path)
    assert path == tmp_path / "model.onnx"
    assert path.read_bytes() == WEIGHTS
    assert [asked.headers["range"] for asked in server.asked[1:3]] == [None, "bytes=400000-"]
    assert server.asked[1].path == "/v1/jobs/job_1/artifacts/model.onnx"


# --- predictions


def test_a_prediction_that_takes_long_is_waited_for(ask: Ask, tmp_path: Path) -> None:
    result = {
        "object": "prediction",
        "job": "job_1",
        "checkpoint": "step-00000044",
        "predictions": [{"label": "cat", "index": 0, "probability": 1.0}],
    }
    task = {"id": "task_1", "object": "task", "state": "running", "result": None, "error": None}
    done = task | {"state": "succeeded", "result": result}
    image = tmp_path / "cat.webp"
    image.write_bytes(b"RIFF\x00\x00\x00\x00WEBP")
    with FaultyServer(answer(202, json.dumps(task).encode()), answer(200, json.dumps(done).encode())) as server:
        found = ask(server, "predict", "job_1", image, 3)
    assert [one.label for one in found.predictions] == ["cat"]
    assert server.asked[0].path == "/v1/predict/job_1?checkpoint=best&top=3"
    assert server.asked[0].headers["content-type"] == "image/webp"
    assert server.asked[1].path == "/v1/tasks/task_1"


def test_a_prediction_that_fails_after_a_while_raises(ask: Ask) -> None:
    task = {"id": "task_1", "object": "task", "state": "queued", "result": None, "error": None}
    failed = task | {"state": "failed", "error": {"code": "crashed", "detail": "by signal SIGKILL"}}
    with (
        FaultyServer(answer(202, json.dumps(task).encode()), answer(200, json.dumps(failed).encode())) as server,
        pytest.raises(ApiError, match="crashed: by signal SIGKILL"),
    ):
        ask(server, "predict", "job_1", b"\xff\xd8\xff")
    assert server.asked[0].headers["content-type"] == "image/jpeg"


# --- the key

KEY = "pg_0a1b2c3d4e5f_" + "s3cret" * 7 + "x"


def test_the_key_is_shown_with_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POWERGRAD_API_KEY", f" {KEY}\n")  # as a file that was read has it
    with FaultyServer(answer(200, job())) as server:
        with Client(server.url) as client, Client(server.url, api_key="pg_another") as other:
            client.get("job_1")
            client.dry_run({})
            other.get("job_1")
        asyncio.run(_get_once(server.url))
    shown = [asked.headers["authorization"] for asked in server.asked]
    assert shown == [f"Bearer {KEY}", f"Bearer {KEY}", "Bearer pg_another", f"Bearer {KEY}"]


async def _get_once(url: str) -> None:
    async with AsyncClient(url) as client:
        await client.get("job_1")


@pytest.mark.parametrize("empty", [None, "", " "])
def test_no_key_is_no_header(monkeypatch: pytest.MonkeyPatch, ask: Ask, empty: str | None) -> None:
    monkeypatch.delenv("POWERGRAD_API_KEY", raising=False)
    if empty is not None:
        monkeypatch.setenv("POWERGRAD_API_KEY", empty)
    with FaultyServer(answer(200, job())) as server:
        ask(server, "get", "job_1")
    assert server.asked[0].headers["authorization"] is None


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_takes_the_key_nowhere(monkeypatch: pytest.MonkeyPatch, ask: Ask, status: int) -> None:
    monkeypatch.setenv("POWERGRAD_API_KEY", KEY)
    with FaultyServer(answer(200, job())) as thief:
        there = thief.url.replace("127.0.0.1", "localhost")
        with FaultyServer(answer(status, location=f"{there}/v1/jobs/job_1")) as server, pytest.raises(ApiError) as refused:
            ask(server, "get", "job_1")
    assert (refused.value.status, thief.asked) == (status, [])


def test_no_client_and_no_error_shows_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POWERGRAD_API_KEY", KEY)
    with FaultyServer(problem(401, code="unauthenticated", detail="no such key")) as server, Client(server.url) as client:
        with pytest.raises(ApiError) as refused:
            client.get("job_1")
        for shown in (client, client._core, client._http, client._http.headers, refused.value, refused.value.__dict__):
            assert "s3cret" not in repr(shown)
    monkeypatch.setenv("POWERGRAD_API_KEY", f"{KEY}\n{KEY}")
    with pytest.raises(ClientError, match="POWERGRAD_API_KEY") as bad:
        Client()
    assert "s3cret" not in str(bad.value)
