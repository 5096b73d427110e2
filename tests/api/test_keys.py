"""Keys over HTTP: how a server becomes locked, who opens it, and what a key, a quota and a use look like."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from api.access import KEPT_S, UNKNOWN_KEPT_S
from api.documents import KeyDocument, KeyListDocument, NewKeyDocument, QuotaDocument, UsageDocument
from powergrad.jobs import keys, lifecycle, quotas
from powergrad.jobs.keys import Scope
from powergrad.jobs.quotas import Quota
from tests.api.callers import bearer, calling, made
from tests.api.conftest import DIGITS, Api, serving, settings_for, until
from tests.api.test_contract import fits
from tests.jobs import builders

BUSY_S = 4.0  # for a machine that is busy with other things
UNKNOWN = f"pg_{'0' * 12}_{'A' * 43}"


def elapsed_until(question: Callable[[], bool]) -> float:
    began = time.monotonic()
    until(question)
    return time.monotonic() - began


def status(api: Api, key: str | None = None) -> int:
    return api.http.get("/v1/jobs", headers={} if key is None else bearer(key)).status_code


# --- locked or not


def test_the_first_key_locks_the_server_at_once(any_api: Api) -> None:
    assert status(any_api) == 200
    answer = any_api.http.post("/v1/keys", json={"scopes": ["admin"]})
    assert answer.status_code == 201
    assert status(any_api) == 401
    assert status(any_api, answer.json()["key"]) == 200


def test_what_was_made_before_there_were_keys_belongs_to_the_owner_local(api: Api) -> None:
    job = api.submit()
    for owner, seen in (("local", 200), ("ada", 404)):
        with calling(api, made(api, owner)) as http:
            assert http.get(f"/v1/jobs/{job['id']}").status_code == seen


def test_a_key_made_in_the_database_locks_a_running_server_within_the_second(any_api: Api) -> None:
    assert status(any_api) == 200
    key = builders.do(any_api.store, keys.create)
    assert elapsed_until(lambda: status(any_api) == 401) < KEPT_S + BUSY_S
    assert status(any_api, key) == 200


def test_a_second_key_opens_without_waiting_for_the_next_look(any_api: Api) -> None:
    assert status(any_api, made(any_api, "ada")) == 200
    second = builders.do(any_api.store, keys.create, owner="ben")
    any_api.parts.key_ring._looked_at = time.monotonic() - UNKNOWN_KEPT_S  # the next look would be due in nine tenths of a second
    assert status(any_api, second) == 200


def test_wrong_keys_do_not_make_the_database_look_each_time(any_api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    made(any_api, "ada")
    ring, looks = any_api.parts.key_ring, 0
    real = ring._read

    def counting() -> Any:
        nonlocal looks
        looks += 1
        return real()

    monkeypatch.setattr(ring, "_read", counting)
    began = time.monotonic()
    assert {status(any_api, UNKNOWN) for _ in range(100)} == {401}
    assert looks <= 2 + (time.monotonic() - began) / UNKNOWN_KEPT_S


def test_a_revoked_key_opens_nothing_within_the_second_and_the_last_locks_the_server(any_api: Api) -> None:
    key = made(any_api, "ada")
    assert status(any_api, key) == 200
    builders.do(any_api.store, keys.revoke, key)
    assert elapsed_until(lambda: status(any_api, key) == 401) < KEPT_S + BUSY_S
    said = any_api.http.get("/v1/jobs", headers=bearer(key))
    assert said.json()["detail"] == "the key was revoked"
    assert status(any_api) == 401, "no key that works is not no key"


def test_a_key_ends_by_itself(api: Api) -> None:
    key = made(api, "ada", ttl_s=0.5)
    assert status(api, key) == 200
    until(lambda: status(api, key) == 401)
    assert "expired at 20" in api.http.get("/v1/jobs", headers=bearer(key)).json()["detail"]


@pytest.mark.parametrize(
    "shown",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer pg_"},
        {"Authorization": f"Bearer {UNKNOWN}"},
        {"Authorization": f"Basic {UNKNOWN}"},
        {"Authorization": "Bearer " + "x" * 8000},
        {"Authorization": b"Bearer \xff\xfe"},
        {"Cookie": "powergrad_session=pgs_nothing"},
        {"Cookie": "powergrad_session="},
        {"X-API-Key": UNKNOWN},
    ],
    ids=str,
)
def test_what_is_no_key_opens_nothing(api: Api, shown: dict[str, str | bytes]) -> None:
    made(api, "ada")
    answer = api.http.get("/v1/jobs", headers=shown)  # type: ignore[arg-type]  # bytes that are no text are what is tried
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")
    assert answer.headers["www-authenticate"].startswith("Bearer")


def test_the_kind_of_authorization_is_read_in_any_case(api: Api) -> None:
    key = made(api, "ada")
    assert [api.http.get("/v1/jobs", headers={"Authorization": f"{kind} {key}"}).status_code for kind in ("bearer", "BEARER")] == [200, 200]


def test_a_server_that_others_reach_is_locked_without_any_key(sqlite_url: str, tmp_path: Path) -> None:
    """So it is when the keys are lost while it runs, or when the database came too late to be asked at the start."""
    with serving(settings_for(sqlite_url, tmp_path, host="0.0.0.0")) as api:  # the settings' host; the test itself listens on loopback
        assert (status(api), status(api, UNKNOWN)) == (401, 401)
        assert api.http.get("/healthz", headers={"Host": "powergrad.example"}).status_code == 200


def test_a_locked_server_answers_by_every_name_and_an_open_one_only_by_this_machines(api: Api) -> None:
    foreign = {"Host": "powergrad.example"}
    assert [api.http.get(path, headers=foreign).status_code for path in ("/healthz", "/v1/jobs")] == [403, 403]
    key = made(api, "ada")
    assert api.http.get("/healthz", headers=foreign).status_code == 200
    assert api.http.get("/v1/jobs", headers=foreign | bearer(key)).status_code == 200
    assert api.http.get("/v1/jobs", headers=foreign).status_code == 401


def test_no_page_of_another_origin_uses_a_key(api: Api) -> None:
    key = made(api, "ada")
    answer = api.http.post("/v1/jobs", json=DIGITS, headers=bearer(key) | {"Origin": "https://evil.example"})
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden_origin")


def test_a_database_that_is_away_opens_nothing(sqlite_url: str, tmp_path: Path) -> None:
    with serving(settings_for(sqlite_url, tmp_path)) as api:
        key = made(api, "ada")
        assert status(api, key) == 200
        path = Path(sqlite_url.removeprefix("sqlite:///"))
        api.parts.store.engine.dispose()
        path.rename(path.with_suffix(".away"))
        path.mkdir()  # SQLite cannot open a directory
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        api.parts.key_ring.forget()
        assert (status(api, key), status(api), status(api, UNKNOWN)) == (503, 401, 401), "the last look holds"


# --- keys as documents


def test_a_key_is_made_shown_once_listed_and_revoked(any_api: Api) -> None:
    with calling(any_api, made(any_api, "root", Scope.ADMIN)) as http:
        answer = http.post("/v1/keys", json={"owner": "ada", "name": "laptop", "scopes": ["read", "submit"], "ttl_seconds": 3600})
        fits(NewKeyDocument, answer)
        assert answer.headers["cache-control"] == "no-store"
        new = answer.json()
        assert (new["owner"], new["name"], new["scopes"], new["state"]) == ("ada", "laptop", ["read", "submit"], "active")
        assert status(any_api, new["key"]) == 200
        listed = http.get("/v1/keys")
        fits(KeyListDocument, listed)
        assert [one["owner"] for one in listed.json()["data"]] == ["ada", "root"]
        assert new["key"].rpartition("_")[2] not in listed.text
        revoked = http.delete(f"/v1/keys/{new['id']}")
        fits(KeyDocument, revoked)
        assert revoked.json()["state"] == http.delete(f"/v1/keys/{new['id']}").json()["state"] == "revoked"
        assert status(any_api, new["key"]) == 401


@pytest.mark.parametrize("key_id", ["000000000000", "nothing", "%00", UNKNOWN, "a" * 300])
def test_no_key_is_revoked_that_is_not_there(any_api: Api, key_id: str) -> None:
    answer = any_api.http.delete(f"/v1/keys/{key_id}")
    assert (answer.status_code, answer.json()["code"]) == (404, "key_not_found")


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"owner": "a b"}, "/owner"),
        ({"owner": None}, "/owner"),
        ({"name": "x" * 65}, "/name"),
        ({"scopes": []}, "/scopes"),
        ({"scopes": ["root"]}, "/scopes/0"),
        ({"scopes": "read"}, "/scopes"),
        ({"ttl_seconds": 0}, "/ttl_seconds"),
        ({"ttl_seconds": 10**12}, "/ttl_seconds"),
        ({"secret": "mine"}, "/secret"),
    ],
)
def test_a_bad_key_is_refused_where_it_is_bad(api: Api, body: dict[str, object], pointer: str) -> None:
    answer = api.http.post("/v1/keys", json=body)
    assert (answer.status_code, [one["pointer"] for one in answer.json()["errors"]]) == (422, [pointer])
    assert api.http.get("/v1/keys").json()["data"] == []


def test_keys_made_at_the_same_moment_all_work(any_api: Api) -> None:
    with calling(any_api, made(any_api, "root", Scope.ADMIN)) as http:
        new: list[str] = []
        threads = [threading.Thread(target=lambda: new.append(http.post("/v1/keys", json={}).json()["key"])) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [status(any_api, key) for key in new] == [200] * 8


# --- quotas and use


def test_everybody_sees_their_own_use_and_limits(any_api: Api) -> None:
    builders.do(any_api.store, quotas.grant, "ada", Quota(max_queued=3, max_gpu_s=1.5))
    builders.submit(any_api.store, owner="ada")
    key = made(any_api, "ada", Scope.READ)
    answer = any_api.http.get("/v1/usage", headers=bearer(key))
    fits(UsageDocument, answer)
    assert answer.json() == {
        "object": "usage",
        "owner": "ada",
        "queued": {"used": 1, "granted": 3},
        "running": {"used": 0, "granted": None},
        "gpu_seconds": {"used": 0.0, "granted": 1.5},
        "bytes": {"used": 0, "granted": None},
        "key": keys.id_of(key),
        "scopes": ["read"],
    }


def test_without_keys_the_use_is_the_local_owners(api: Api) -> None:
    api.submit()
    found = api.http.get("/v1/usage").json()
    assert (found["owner"], found["key"], found["queued"]["used"]) == ("local", None, 1)


def test_an_admin_sets_all_limits_of_an_owner_at_once(any_api: Api) -> None:
    with calling(any_api, made(any_api, "root", Scope.ADMIN)) as http:
        first = http.put("/v1/owners/ada/quota", json={"queued": 5, "running": 2, "gpu_seconds": 7200.5, "bytes": 2**40})
        fits(QuotaDocument, first)
        granted = {name: first.json()[name]["granted"] for name in ("queued", "running", "gpu_seconds", "bytes")}
        assert granted == {"queued": 5, "running": 2, "gpu_seconds": 7200.5, "bytes": 2**40}
        assert http.get("/v1/owners/ada/quota").json() == first.json()
        second = http.put("/v1/owners/ada/quota", json={"running": 1}).json()
        assert [second[name]["granted"] for name in ("queued", "running", "gpu_seconds", "bytes")] == [None, 1, None, None]
        assert http.get("/v1/owners/nobody/quota").json()["queued"] == {"used": 0, "granted": None}


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"queued": -1}, "/queued"),
        ({"queued": 2**31}, "/queued"),
        ({"running": 1.5}, "/running"),
        ({"gpu_seconds": "all"}, "/gpu_seconds"),
        ({"bytes": 2**53}, "/bytes"),
        ({"gpus": 1}, "/gpus"),
    ],
)
def test_a_bad_limit_is_refused_where_it_is_bad(any_api: Api, body: dict[str, object], pointer: str) -> None:
    answer = any_api.http.put("/v1/owners/ada/quota", json=body)
    assert (answer.status_code, [one["pointer"] for one in answer.json()["errors"]]) == (422, [pointer])


def test_the_widest_limits_are_stored(any_api: Api) -> None:
    widest = {"queued": 2**31 - 1, "running": 2**31 - 1, "gpu_seconds": 1e12, "bytes": 2**53 - 1}
    found = any_api.http.put("/v1/owners/ada/quota", json=widest).json()
    assert {name: found[name]["granted"] for name in widest} == widest


def test_a_full_quota_is_429_and_says_of_what_and_how_much(any_api: Api) -> None:
    builders.do(any_api.store, quotas.grant, "local", Quota(max_queued=1))
    any_api.submit()
    answer = any_api.http.post("/v1/jobs", json=DIGITS)
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) > 0
    said = answer.json()
    assert {name: said[name] for name in ("code", "quota", "used", "granted")} == {
        "code": "quota_exceeded",
        "quota": "queued",
        "used": 1,
        "granted": 1,
    }
    assert said["detail"] == "quota of queued: 1 of 1 are used: wait until jobs have started, or cancel some"


def test_a_repeated_submission_is_answered_even_when_the_queue_is_full(any_api: Api) -> None:
    builders.do(any_api.store, quotas.grant, "local", Quota(max_queued=1))
    once = {"Idempotency-Key": "once"}
    first = any_api.http.post("/v1/jobs", json=DIGITS, headers=once)
    again = any_api.http.post("/v1/jobs", json=DIGITS, headers=once)
    assert (again.status_code, again.headers["idempotency-replayed"]) == (202, "true")
    assert again.json()["id"] == first.json()["id"]
    assert any_api.http.post("/v1/jobs", json=DIGITS, headers={"Idempotency-Key": "twice"}).status_code == 429


def test_of_many_at_once_exactly_as_many_are_stored_as_are_granted(any_api: Api) -> None:
    builders.do(any_api.store, quotas.grant, "local", Quota(max_queued=5))
    answers: list[int] = []
    threads = [threading.Thread(target=lambda: answers.append(any_api.http.post("/v1/jobs", json=DIGITS).status_code)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [202] * 5 + [429] * 11


def test_a_job_that_the_quota_holds_back_says_so_from_the_start(any_api: Api) -> None:
    builders.do(any_api.store, quotas.grant, "local", Quota(max_running=1))
    builders.running(any_api.store)
    answer = any_api.http.post("/v1/jobs", json=DIGITS)
    assert answer.json()["queue"]["waiting_for"] == "running quota of 1"
    looked = any_api.http.get(answer.headers["location"])
    assert (looked.json(), looked.headers["etag"]) == (answer.json(), answer.headers["etag"])


def test_resume_and_retry_are_429_where_the_queue_is_full(any_api: Api) -> None:
    paused, failed = any_api.submit()["id"], any_api.submit()["id"]
    any_api.http.post(f"/v1/jobs/{paused}/pause")
    any_api.http.post(f"/v1/jobs/{failed}/cancel")
    builders.do(any_api.store, quotas.grant, "local", Quota(max_queued=0))
    answers = [any_api.http.post(f"/v1/jobs/{job_id}/{verb}") for job_id, verb in ((paused, "resume"), (failed, "retry"))]
    assert [(answer.status_code, answer.json()["quota"]) for answer in answers] == [(429, "queued")] * 2


# --- streams


@pytest.mark.parametrize("ends", ["revoked", "expired"])
@pytest.mark.parametrize("path", ["events", "logs?follow=true"])
def test_a_stream_ends_with_the_key_that_opened_it(any_api: Api, path: str, ends: str) -> None:
    job_id = builders.submit(any_api.store, owner="ada")
    key, other = made(any_api, "ada", ttl_s=1.0 if ends == "expired" else None), made(any_api, "ada")
    with calling(any_api, key) as http, calling(any_api, other) as staying:
        headers = {"Accept": "text/event-stream"}
        with (
            http.stream("GET", f"/v1/jobs/{job_id}/{path}", headers=headers) as cut,
            staying.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) as kept,
        ):
            assert (cut.status_code, kept.status_code) == (200, 200)
            if ends == "revoked":
                builders.do(any_api.store, keys.revoke, key)
            took_s = elapsed_until(lambda: cut.read() is not None)  # when the stream is over
            assert took_s < 2 * KEPT_S + BUSY_S
            assert b"event: end" not in cut.content, "the job has not ended: whoever has another key may come again"
            lines = kept.iter_lines()
            builders.do(any_api.store, lifecycle.cancel, job_id, owner="ada")
            assert any(line == "event: end" for line in lines), "the other key's goes on to the job's end"
        assert http.get("/v1/jobs").status_code == 401


def test_a_stream_that_everybody_could_open_ends_when_the_server_is_locked(any_api: Api) -> None:
    job = any_api.submit()
    with any_api.http.stream("GET", f"/v1/jobs/{job['id']}/events", headers={"Accept": "text/event-stream"}) as stream:
        builders.do(any_api.store, keys.create)
        assert elapsed_until(lambda: bool(stream.read())) < 2 * KEPT_S + BUSY_S
        assert b"event: end" not in stream.content
