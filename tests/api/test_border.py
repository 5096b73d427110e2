"""What every request passes: hosts, origins, unknown paths, methods, and errors nobody foresaw."""

from __future__ import annotations

import logging
import socket
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from api.border import host_name
from api.settings import is_loopback
from tests.api.conftest import DIGITS, Api, serving, settings_for, until


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:1", "localhost:8642", "LOCALHOST", "127.8.9.10", "[::1]:80", "[::1]"])
def test_loopback_hosts_are_served(api: Api, host: str) -> None:
    assert api.http.get("/healthz", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8642", "127.0.0.1.evil.example", "192.168.0.1", "[::2]", "0.0.0.0", "localhost.", ""]
)
def test_other_hosts_are_refused(api: Api, host: str) -> None:
    answer = api.http.get("/healthz", headers={"Host": host})
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden_host")
    assert answer.headers["content-type"] == "application/problem+json"


def test_no_web_page_of_another_origin_changes_anything(api: Api) -> None:
    job = api.submit()
    own = api.url
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "http://localhost"):
        for path in (f"/v1/jobs/{job['id']}/cancel", "/v1/jobs"):
            answer = api.http.post(path, headers={"Origin": origin})
            assert (answer.status_code, answer.json()["code"]) == (403, "forbidden_origin")
        assert api.http.delete(f"/v1/jobs/{job['id']}", headers={"Origin": origin}).status_code == 403
    assert api.job(job["id"])["state"] == "queued"
    assert api.http.post(f"/v1/jobs/{job['id']}/cancel", headers={"Origin": own}).status_code == 202


@pytest.mark.parametrize(
    "path", ["/nothing", "/v1", "/v1/jobs/", "/v1/nothing", "/docs/assets/nothing.js", "/docs/assets/../../etc/passwd"]
)
def test_a_path_that_is_not_there_is_a_problem(api: Api, path: str) -> None:
    answer = api.http.get(path)
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["instance"].startswith("/")


def test_a_method_that_is_not_known_names_those_that_are(api: Api) -> None:
    answer = api.http.put("/v1/jobs", json=DIGITS)
    assert (answer.status_code, answer.json()["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v1/jobs", "DELETE, GET, POST"),
        ("PUT", "/v1/jobs/job_00000000000000000000000000", "DELETE, GET, PATCH"),
        ("POST", "/v1/jobs/job_00000000000000000000000000/checkpoints/best/model.safetensors", "GET, HEAD"),
        ("GET", "/v1/jobs/job_00000000000000000000000000/cancel", "POST"),
        ("PUT", "/v1/jobs/cancel", "POST"),
        ("DELETE", "/docs", "GET, HEAD"),
        ("POST", "/docs/assets/swagger-ui.css", "GET, HEAD"),
    ],
)
def test_every_method_of_the_path_is_allowed(api: Api, method: str, path: str, allowed: str) -> None:
    answer = api.http.request(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    assert answer.json()["detail"] == f"{method} is not for {path}; allowed: {allowed}"


def test_an_error_nobody_foresaw_is_a_problem_and_its_text_is_in_the_log(
    api: Api, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise KeyError("secret")

    monkeypatch.setattr(api.parts.room, "check", broken)
    answer = api.http.post("/v1/jobs", json=DIGITS)
    assert (answer.status_code, answer.json()["code"]) == (500, "internal")
    assert "secret" not in answer.text
    assert any(record.name == "api.errors" and "unforeseen" in str(record.msg) for record in caplog.records)


def test_a_database_that_is_away_answers_503_on_every_route_and_comes_back(sqlite_url: str, tmp_path: Path) -> None:
    with serving(settings_for(sqlite_url, tmp_path)) as api:
        job = api.submit()
        path = Path(sqlite_url.removeprefix("sqlite:///"))
        away = path.with_suffix(".away")
        api.parts.store.engine.dispose()
        path.rename(away)
        path.mkdir()  # SQLite cannot open a directory
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        routes = [
            "",
            f"/{job['id']}",
            f"/{job['id']}?wait=5",
            *(f"/{job['id']}/{noun}" for noun in ("events", "metrics", "logs", "checkpoints")),
        ]
        answers = [api.http.get(f"/v1/jobs{route}") for route in routes]
        answers += [api.http.post("/v1/jobs", json=DIGITS), api.http.post(f"/v1/jobs/{job['id']}/cancel"), api.http.get("/v1/workers")]
        assert [(answer.status_code, answer.json()["code"]) for answer in answers] == [(503, "unavailable")] * len(answers)
        assert all(int(answer.headers["retry-after"]) > 0 for answer in answers)
        assert api.http.get("/healthz").status_code == 200
        ready = api.http.get("/readyz")
        assert (ready.status_code, ready.json()["checks"]["broker"][:4]) == (503, "does")
        path.rmdir()
        away.rename(path)
        assert api.submit()["state"] == "queued"


def test_the_domains_error_for_a_busy_database_is_503(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy() -> None:
        raise OperationalError("BEGIN IMMEDIATE", {}, Exception("database is locked"))

    monkeypatch.setattr(api.parts.room, "check", busy)
    answer = api.http.post("/v1/jobs", json=DIGITS)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")


def test_loopback_is_told_by_name_and_address() -> None:
    assert all(is_loopback(host) for host in ("localhost", "127.0.0.1", "127.255.0.1", "::1"))
    assert not any(is_loopback(host) for host in ("", "localhost.evil", "10.0.0.1", "::", "fe80::1", "127.1"))
    assert host_name("[::1]:8642") == "::1"


@pytest.mark.parametrize("head", ["Content-Length: 1000", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/jobs/job_00000000000000000000000000/clone"])
def test_a_client_that_leaves_in_mid_body_is_no_error(api: Api, caplog: pytest.LogCaptureFixture, path: str, head: str) -> None:
    sent = f'POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{head}\r\n\r\n5\r\n{{"a":\r\n'
    before = counted(api, "499")
    with socket.create_connection(("127.0.0.1", api.http.base_url.port or 0)) as connection:
        connection.sendall(sent.encode())
    until(lambda: counted(api, "499") == before + 1)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def counted(api: Api, status: str) -> float:
    """Requests answered with `status` so far."""
    return sum(
        sample.value
        for family in api.parts.measures.registry.collect()
        for sample in family.samples
        if sample.name == "powergrad_http_requests_total" and sample.labels["status"] == status
    )
