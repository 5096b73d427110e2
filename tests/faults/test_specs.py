"""Row 17: bodies, parameters and bytes that no honest client sends. Each is refused with what is wrong in it, and the process serves on.

What is sent where is read off the OpenAPI document: a route that is added is tried too.
"""

from __future__ import annotations

import gzip
import json
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import jsonschema_rs
import pytest

from api import errors
from api.openapi import operations
from tests.fuzz.site import Site, serving

pytestmark = [pytest.mark.faults, pytest.mark.row(17)]

HUGE = 10**4000
JSON = "application/json"
NUMBERS = {"NaN": "NaN", "Infinity": "Infinity", "-Infinity": "-Infinity", "1e308": "1e308", "1e400": "1e400", "10^4000": str(HUGE)}
TEXTS = {"NUL": r'"\u0000"', "lone surrogate": r'"\ud800"', "half a pair": r'"a\udfff"'}
SHAPES = {"deep list": "[" * 50 + "]" * 50, "list": "[]", "object": '{"\\u0000":1}', "true": "true"}
BODIES: dict[str, bytes] = {
    "empty name": b'{"": 1}',
    "unknown key": b'{"zzz": 1}',
    "100,000 deep lists": b'{"zzz":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "100,000 deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "100,000 open lists": b"[" * 100_000,
    "5,000 digits": b'{"zzz":' + b"9" * 5000 + b"}",
    "NUL": b"{}\0",
    "invalid UTF-8": b'{"name": "\xff\xfe"}',
    "surrogate in UTF-8": b'{"name": "\xed\xa0\x80"}',
    "byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": "{}".encode("utf-16"),
    "cut short": b'{"name": "a',
    "two documents": b"{}{}",
    "single quotes": b"{'name': 1}",
    "comment": b"{}//",
    "list": b"[]",
    "number": b"1",
    "null": b"null",
    "text": b'"{}"',
    "NaN": b"NaN",
    "white space": b" \n\t",
    "10 MB": b'{"zzz":"' + b"x" * 10_000_000 + b'"}',
}
PARAMETERS = ["NaN", "Infinity", "1e308", str(HUGE), "\0", "a\0b", "%", "\ud800", "x" * 10_000, "[]", "{}", "-1e9", "1.5e3", "٣"]


@dataclass(frozen=True)
class Route:
    """An operation, its path filled in with what is there."""

    method: str
    url: str
    operation: dict[str, Any]
    fields: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.method} {self.url}"


@pytest.fixture(scope="module")
def server(sqlite_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("specs")
    copy = folder / "jobs.db"
    copy.write_bytes(sqlite_file.read_bytes())
    with serving(f"sqlite:///{copy}", folder / "data", "redis://127.0.0.1:1/0") as running:
        yield running


@pytest.fixture(scope="module")
def document(server: Site) -> dict[str, Any]:
    with server.client() as http:
        found: dict[str, Any] = http.get("/openapi.json").json()
    return found


@pytest.fixture(scope="module")
def http(server: Site) -> Iterator[httpx2.Client]:
    with server.client(server.admin) as client:
        yield client


@pytest.fixture(autouse=True)
def _still_serves(server: Site) -> Iterator[None]:
    """After each test the process is there, serves both owners, and has logged nothing that it did not foresee."""
    yield
    assert server.is_well()
    assert server.defects() == []


def routes(document: dict[str, Any], server: Site) -> list[Route]:
    jobs = {"cloneJob": "succeeded", "retryJob": "failed", "updateJob": "paused"}
    found = []
    for method, path, operation in operations(document):
        job = server.anna.jobs[jobs.get(operation["operationId"], "succeeded")]
        values = {"job_id": job, "experiment_id": server.anna.experiment, "checkpoint_id": "best", "owner": "somebody"}
        url = re.sub(r"{(\w+)}", lambda name, known=values: known.get(name[1], "x"), path)  # type: ignore[misc]
        media = operation.get("requestBody", {}).get("content", {}).get(JSON)
        fields = tuple(_resolved(document, media["schema"])["properties"]) if media else ()
        found.append(Route(method.upper(), url, operation, fields))
    return found


def _resolved(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return found


@pytest.fixture(scope="module")
def json_routes(document: dict[str, Any], server: Site) -> list[Route]:
    found = [route for route in routes(document, server) if route.fields]
    assert len(found) >= 9
    return found


def send(http: httpx2.Client, route: Route, body: bytes | Iterator[bytes], **headers: str) -> httpx2.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return http.request(route.method, route.url, content=body, headers={"Content-Type": JSON} | named)


def refused(answer: httpx2.Response, what: str) -> dict[str, Any]:
    """The problem, which is one of the caller's and documented to be."""
    assert 400 <= answer.status_code < 500, f"{what}: {answer.status_code} {answer.text[:300]}"
    assert answer.headers["content-type"] == errors.MEDIA_TYPE, what
    assert len(answer.content) < 100_000, what
    found: dict[str, Any] = answer.json()
    assert found["status"] == answer.status_code
    return found


# --- bodies


@pytest.mark.parametrize("value", [*NUMBERS.values(), *TEXTS.values(), *SHAPES.values()], ids=[*NUMBERS, *TEXTS, *SHAPES])
def test_a_value_that_is_none_is_refused_at_its_field(http: httpx2.Client, json_routes: list[Route], value: str) -> None:
    tried = 0
    for route in json_routes:
        for field in route.fields:
            answer = send(http, route, f'{{"{field}": {value}}}'.encode())
            if answer.status_code < 300 and json.loads(value) in ([], True):
                continue  # a right value of this field, on a route that asks for no other
            problem = refused(answer, f"{route}: {field}")
            assert str(document_status := answer.status_code) in route.operation["responses"], document_status
            pointers = [error["pointer"] for error in problem.get("errors", [])]
            is_right = answer.status_code in (401, 404, 409, 429) or _may_be(value, field)
            assert is_right or any(pointer.startswith(f"/{field}") for pointer in pointers), f"{route}: {field}: {answer.text[:300]}"
            tried += 1
    assert tried >= 40


def _may_be(value: str, field: str) -> bool:
    """Whether it is a right value of the field, so that what is refused is something else: a field that is missing."""
    return (value == "[]" and field in ("export",)) or (value == "true" and field in ("deterministic",))


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_none_is_refused(http: httpx2.Client, json_routes: list[Route], name: str) -> None:
    for route in json_routes:
        problem = refused(send(http, route, BODIES[name]), f"{route}: {name}")
        assert str(problem["status"]) in route.operation["responses"], route
        if "key" in name:
            assert "/zzz" in [error["pointer"] for error in problem["errors"]], route
        if name == "10 MB":
            assert problem["code"] == "too_large"


def test_a_name_given_twice_is_refused_by_name_wherever_it_stands(http: httpx2.Client, json_routes: list[Route]) -> None:
    for route in json_routes:
        field = route.fields[0]
        for body in (f'{{"{field}": 1, "{field}": 1}}', f'{{"{field}": {{"a": {{"b": 1, "c": 2, "b": 1}}}}}}'):
            problem = refused(send(http, route, body.encode()), str(route))
            assert problem["code"] == "malformed"
            assert f"'{field if body.count(field) == 2 else 'b'}' is given twice" in problem["detail"]
    assert refused(send(http, json_routes[0], b'{"\\ud800": 1, "\\ud800": 2}'), "a surrogate")["code"] == "malformed"


def test_a_body_in_pieces_without_a_length_is_read_like_any_other(http: httpx2.Client, json_routes: list[Route]) -> None:
    for route in json_routes:
        problem = refused(send(http, route, iter([b'{"zz', b'z": 1}'])), str(route))
        assert "/zzz" in [error["pointer"] for error in problem["errors"]]
        assert refused(send(http, route, iter([b'{"zzz":"', *[b"x" * 100_000] * 100, b'"}'])), str(route))["code"] == "too_large"


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, gzip", "x"])
def test_a_compressed_body_is_refused(http: httpx2.Client, json_routes: list[Route], encoding: str) -> None:
    bomb = gzip.compress(b"{" + b" " * 50_000_000 + b"}")
    for route in json_routes:
        problem = refused(send(http, route, bomb, Content_Encoding=encoding), str(route))
        assert (problem["status"], problem["code"]) == (415, "unsupported_media_type")
        assert "Content-Encoding" in problem["detail"]


def test_every_call_that_changes_something_says_that_it_takes_json_only(
    document: dict[str, Any], http: httpx2.Client, server: Site
) -> None:
    for route in routes(document, server):
        if route.method in ("POST", "PUT", "PATCH", "DELETE"):
            answer = http.request(route.method, route.url, content=b"<a/>", headers={"Content-Type": "text/xml"})
            assert refused(answer, str(route))["code"] == "unsupported_media_type"
            assert "415" in route.operation["responses"], route


# --- parameters


@pytest.mark.parametrize("value", PARAMETERS, ids=lambda value: repr(value[:12]))
def test_a_parameter_that_is_none_is_refused_by_name(document: dict[str, Any], http: httpx2.Client, server: Site, value: str) -> None:
    raw = "%ED%A0%80" if value == "\ud800" else str(httpx2.QueryParams({"v": value}))[2:]
    tried = 0
    for route in routes(document, server):
        for parameter in route.operation.get("parameters", []):
            if parameter["in"] == "query" and route.method in ("GET", "HEAD") and parameter["name"] != "label":
                answer = http.request(route.method, f"{route.url}?{parameter['name']}={raw}")
                assert answer.status_code < 500, f"{route}: {parameter['name']}: {answer.text[:300]}"
                if not _may_be_text(document, parameter["schema"], value):
                    named = route.method == "HEAD" or [error["parameter"] for error in refused(answer, str(route))["errors"]]
                    assert named is True or parameter["name"] in named, f"{route}: {parameter['name']}: {answer.text[:300]}"
                tried += 1
    assert tried >= 20


def _may_be_text(document: dict[str, Any], schema: dict[str, Any], value: str) -> bool:
    """Whether a parameter is a text (or several), and this is a right one."""
    one = schema.get("items", schema)
    one = _resolved(document, one) if "$ref" in one else one
    return one.get("type") == "string" and jsonschema_rs.is_valid(one, value.replace("\ud800", "\ufffd"), validate_formats=True)


@pytest.mark.parametrize("value", PARAMETERS, ids=lambda value: repr(value[:12]))
def test_a_path_that_leads_nowhere_is_a_refusal(document: dict[str, Any], http: httpx2.Client, server: Site, value: str) -> None:
    raw = "%ED%A0%80" if value == "\ud800" else str(httpx2.QueryParams({"v": value}))[2:]
    for method, path, _ in operations(document):
        if "{" in path:
            answer = http.request(method.upper(), re.sub(r"{\w+}", raw, path), content=b"{}", headers={"Content-Type": JSON})
            assert 400 <= answer.status_code < 500 or (path.endswith("/quota") and answer.status_code == 200), (
                f"{method} {path}: {answer.text[:300]}"
            )


@pytest.mark.parametrize("value", [b"\xff", b"\xc3\x28", b"a" * 10_000, b"NaN", str(HUGE).encode(), b'"', b"W/", b"*", b",,,"])
def test_a_header_that_is_nonsense_is_no_error_of_the_server(
    document: dict[str, Any], http: httpx2.Client, server: Site, value: bytes
) -> None:
    tried = 0
    for route in routes(document, server):
        for parameter in route.operation.get("parameters", []):
            if parameter["in"] == "header":
                headers = [(b"Content-Type", JSON.encode()), (parameter["name"].encode(), value)]
                answer = http.request(route.method, route.url, headers=headers, content=b'{"zzz": 1}' if route.fields else b"")
                assert answer.status_code < 500, f"{route}: {parameter['name']}: {answer.text[:300]}"
                tried += 1
    assert tried >= 10


@pytest.mark.parametrize(
    "key", [b"Bearer \xff", b"Bearer pg_" + b"0" * 10_000, b"Bearer", b"", b"Basic YTpi", b"bearer  pg_\x80", b"Bearer\tx"]
)
def test_a_key_that_is_none_opens_nothing(server: Site, key: bytes) -> None:
    with server.client() as http:
        answer = http.get("/v1/jobs", headers=[(b"Authorization", key)])
    assert refused(answer, repr(key))["code"] == "unauthenticated"
    assert "Bearer" in answer.headers["www-authenticate"]


# --- bytes


def spoken(server: Site, sent: bytes, *, ends: bool = False, within_s: float = 20.0) -> bytes:
    """What the server answers to these bytes, to the end of the connection; ends: that no more is sent is told, which uvicorn hangs up upon."""
    with closing(connected(server, within_s)) as line:
        try:
            line.sendall(sent)
            if ends:
                line.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has hung up before all was sent
        heard = b""
        try:
            while block := line.recv(65536):
                heard += block
        except ConnectionResetError:
            pass
        return heard


def connected(server: Site, within_s: float = 20.0) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=within_s)


def head(server: Site, *lines: str, request: str = "POST /v1/jobs HTTP/1.1") -> bytes:
    kept = ["Host: localhost", f"Authorization: Bearer {server.admin}", "Connection: close"]
    return "\r\n".join([request, *kept, *lines, "", ""]).encode("latin-1")


ODD: dict[str, Callable[[Site], bytes]] = {
    "no method known": lambda server: head(server, request="BREW /v1/jobs HTTP/1.1"),
    "lower-case method": lambda server: head(server, request="get /v1/jobs HTTP/1.1"),
    "no HTTP": lambda _: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    "only line ends": lambda _: b"\r\n" * 1000,
    "HTTP/9.9": lambda server: head(server, request="GET /healthz HTTP/9.9"),
    "path of 100 KB": lambda server: head(server, request=f"GET /{'a' * 100_000} HTTP/1.1"),
    "path with NUL": lambda server: head(server, request="GET /v1/jobs\0 HTTP/1.1"),
    "absolute path elsewhere": lambda server: head(server, request="GET http://example.com/v1/jobs HTTP/1.1"),
    "NUL in a header": lambda server: head(server, "X: a\0b", request="GET /v1/jobs HTTP/1.1"),
    "header without a colon": lambda server: head(server, "nonsense", request="GET /v1/jobs HTTP/1.1"),
    "folded header": lambda server: head(server, "X: a", "\tb", request="GET /v1/jobs HTTP/1.1"),
    "20,000 headers": lambda server: head(server, *[f"X-{number}: a" for number in range(20_000)], request="GET /v1/jobs HTTP/1.1"),
    "header of 1 MB": lambda server: head(server, f"X: {'a' * 1_000_000}", request="GET /v1/jobs HTTP/1.1"),
    "two lengths": lambda server: head(server, f"Content-Type: {JSON}", "Content-Length: 2", "Content-Length: 4") + b"{}  ",
    "length and pieces": lambda server: (
        head(server, f"Content-Type: {JSON}", "Content-Length: 2", "Transfer-Encoding: chunked") + b"0\r\n\r\n"
    ),
    "length is no number": lambda server: head(server, f"Content-Type: {JSON}", "Content-Length: abc") + b"{}",
    "length below zero": lambda server: head(server, f"Content-Type: {JSON}", "Content-Length: -1") + b"{}",
    "length of 10^30": lambda server: head(server, f"Content-Type: {JSON}", f"Content-Length: {10**30}") + b"{}",
    "length too large": lambda server: head(server, f"Content-Type: {JSON}", "Content-Length: 100") + b"{}",
    "length too small": lambda server: head(server, f"Content-Type: {JSON}", "Content-Length: 1") + b"{}",
    "pieces of no length": lambda server: head(server, f"Content-Type: {JSON}", "Transfer-Encoding: chunked") + b"xyz\r\n{}\r\n0\r\n\r\n",
    "pieces below zero": lambda server: head(server, f"Content-Type: {JSON}", "Transfer-Encoding: chunked") + b"-2\r\n{}\r\n0\r\n\r\n",
    "piece of 2^70": lambda server: (
        head(server, f"Content-Type: {JSON}", "Transfer-Encoding: chunked") + b"f" * 18 + b"\r\n{}\r\n0\r\n\r\n"
    ),
    "unknown transfer encoding": lambda server: head(server, f"Content-Type: {JSON}", "Transfer-Encoding: gzip") + b"{}",
}


UNFINISHED = {"only line ends", "length of 10^30", "length too large"}
"""What the server rightly waits for the rest of."""


@pytest.mark.parametrize("name", ODD)
def test_bytes_that_are_no_request_make_no_job_and_no_defect(server: Site, http: httpx2.Client, name: str) -> None:
    before = http.get("/v1/jobs?limit=1").json()["first_id"]
    heard = spoken(server, ODD[name](server), ends=name in UNFINISHED)
    assert not heard or re.match(rb"HTTP/1.1 [2-4]\d\d ", heard), heard[:200]
    if ODD[name](server).startswith(b"POST"):
        assert not heard or heard.startswith(b"HTTP/1.1 4"), heard[:200]
    assert http.get("/v1/jobs?limit=1").json()["first_id"] == before


def test_a_head_without_end_is_cut_off(server: Site) -> None:
    """Whoever can reach the server could fill its memory otherwise."""
    sent = 0
    with closing(connected(server)) as line:
        line.sendall(b"GET /v1/jobs HTTP/1.1\r\nHost: localhost\r\nX: ")
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            while sent < 50_000_000:
                line.sendall(b"a" * 100_000)
                sent += 100_000
    # what lies in the buffers of the two ends has been sent too
    assert sent < 20_000_000


def test_a_long_head_and_a_body_behind_it_are_served(server: Site) -> None:
    """What comes with the end of a head is no part of it."""
    body = json.dumps({"data": {"dataset": "digits"}, "labels": {"a": "x"}}).encode() + b" " * 900_000
    lines = [f"Content-Type: {JSON}", f"Content-Length: {len(body)}", f"X: {'a' * 30_000}"]
    sent = head(server, *lines, request="POST /v1/jobs?dry_run=true HTTP/1.1")
    with closing(connected(server)) as line:
        line.sendall(sent[:100])
        line.sendall(sent[100:] + body)
        assert line.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_what_follows_a_body_is_no_request_of_its_own(server: Site) -> None:
    """A body that ends before its length says so takes nothing of the next request, and one longer than it says is refused as one."""
    second = head(server, request="GET /v1/usage HTTP/1.1")
    first = head(server, f"Content-Type: {JSON}", "Content-Length: 10").replace(b"Connection: close\r\n", b"") + b'{"zzz": 1}'
    answers = re.findall(rb"HTTP/1.1 (\d\d\d) ", spoken(server, first + second))
    assert answers == [b"422", b"200"]


def test_who_hangs_up_with_a_request_waiting_is_no_error_of_the_server(server: Site) -> None:
    request = head(server, f"Content-Type: {JSON}", "Content-Length: 10").replace(b"Connection: close\r\n", b"") + b'{"zzz": 1}'
    for _ in range(20):
        spoken(server, request * 3, ends=True)


def test_half_a_request_holds_nobody_else_up(server: Site, http: httpx2.Client) -> None:
    """Hundreds of connections that send a little and then nothing; in the middle of a line, of the head, of the body."""
    whole = head(server, f"Content-Type: {JSON}", "Content-Length: 100") + b'{"data": '
    lines = [connected(server) for _ in range(300)]
    try:
        for number, line in enumerate(lines):
            line.sendall(whole[: (5, 40, len(whole))[number % 3]])
        for _ in range(20):
            assert http.get("/v1/jobs?limit=1").status_code == 200
            answer = http.post("/v1/jobs?dry_run=true", json={"data": {"dataset": "digits"}})
            assert answer.status_code == 200
        for line in lines[:50]:
            line.sendall(b"x")  # they are still there: it is not by dropping them that the others were served
    finally:
        for line in lines:
            line.close()
