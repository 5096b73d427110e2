"""A browser's session: what its cookie is, what it opens, when it ends, and what a page or a guesser cannot do."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from http.cookies import SimpleCookie
from itertools import count

import httpx2
import pytest
from sqlalchemy import select, update

from api.access import COOKIE, KEPT_S, MOST_TRIES, TRIES_S, Tries
from api.documents import SessionDocument
from api.errors import Refused
from powergrad.jobs import keys
from powergrad.jobs.keys import Scope
from powergrad.jobs.tables import sessions
from tests.api.callers import bearer, calling, made
from tests.api.conftest import DIGITS, Api, until
from tests.api.test_contract import fits
from tests.api.test_keys import BUSY_S, UNKNOWN, elapsed_until
from tests.jobs import builders
from tests.stores import FakeClock

_addresses = count(1)


def stranger() -> dict[str, str]:
    """A proxy on this machine says that the request is from an address that none has come from before."""
    return {"X-Forwarded-For": f"203.0.113.{next(_addresses)}"}


def sign_in(http: httpx2.Client, key: str, **headers: str) -> httpx2.Response:
    return http.post("/v1/session", json={"key": key}, headers=stranger() | headers)


@pytest.fixture
def browser(any_api: Api) -> Iterator[httpx2.Client]:
    """Keeps cookies and sends its own origin with what changes something, as browsers do."""
    with calling(any_api) as http:
        http.event_hooks["request"].append(lambda request: _say_origin(request, any_api.url))
        yield http


def _say_origin(request: httpx2.Request, origin: str) -> None:
    if request.method not in ("GET", "HEAD"):
        request.headers.setdefault("Origin", origin)


def cookie_of(answer: httpx2.Response) -> SimpleCookie:
    return SimpleCookie(answer.headers["set-cookie"])


# --- what it is


def test_who_shows_a_key_is_told_whose_it_is_and_goes_on_by_cookie(any_api: Api, browser: httpx2.Client) -> None:
    key = made(any_api, "ada")
    answer = sign_in(browser, key)
    fits(SessionDocument, answer)
    said = answer.json()
    assert (said["owner"], said["scopes"], said["key"]) == ("ada", ["read", "submit"], keys.id_of(key))
    assert browser.get("/v1/session").json() == said
    job = browser.post("/v1/jobs", json=DIGITS)
    assert job.status_code == 202
    assert any_api.http.get(job.headers["location"], headers=bearer(key)).status_code == 200


def test_no_script_and_no_other_site_gets_the_cookie(any_api: Api, browser: httpx2.Client) -> None:
    answer = sign_in(browser, made(any_api, "ada"))
    cookie = cookie_of(answer)[COOKIE]
    assert (cookie["httponly"], cookie["samesite"].lower(), cookie["path"], cookie["secure"]) == (True, "strict", "/", "")
    assert 12 * 3600 - 60 < int(cookie["max-age"]) <= 12 * 3600
    assert cookie["domain"] == ""
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(("proto", "is_secure"), [("https", True), ("https, http", True), ("http", False), ("", False)])
def test_a_browser_that_came_by_https_sends_it_by_https_only(any_api: Api, browser: httpx2.Client, proto: str, is_secure: bool) -> None:
    answer = sign_in(browser, made(any_api, "ada"), **{"X-Forwarded-Proto": proto})
    assert bool(cookie_of(answer)[COOKIE]["secure"]) is is_secure


def test_every_session_has_256_random_bits_and_only_their_hash_is_stored(any_api: Api, browser: httpx2.Client) -> None:
    key = made(any_api, "ada")
    tokens = [cookie_of(sign_in(browser, key))[COOKIE].value for _ in range(2)]
    assert len(set(tokens)) == 2
    assert all(re.fullmatch(r"pgs_[A-Za-z0-9_-]{43}", token) for token in tokens)  # 43 characters of 6 bits
    with any_api.store.read() as tx:
        stored = {row.token_sha256 for row in tx.all(select(sessions))}
    assert stored == {hashlib.sha256(token.encode()).hexdigest() for token in tokens}


def test_without_keys_everybody_is_the_local_owner(api: Api) -> None:
    assert api.http.get("/v1/session").json() == {
        "object": "session",
        "owner": "local",
        "scopes": ["admin", "read", "submit"],
        "key": None,
        "expires_at": None,
    }


def test_a_key_without_a_session_says_who_it_is(any_api: Api) -> None:
    key = made(any_api, "ada", Scope.READ, ttl_s=600)
    answer = any_api.http.get("/v1/session", headers=bearer(key))
    fits(SessionDocument, answer)
    assert (answer.json()["owner"], answer.json()["scopes"]) == ("ada", ["read"])
    assert answer.json()["expires_at"] is not None


def test_a_shown_key_goes_before_a_cookie(any_api: Api, browser: httpx2.Client) -> None:
    sign_in(browser, made(any_api, "ada"))
    assert browser.get("/v1/session", headers=bearer(made(any_api, "ben"))).json()["owner"] == "ben"
    assert browser.get("/v1/session", headers=bearer(UNKNOWN)).status_code == 401


# --- what it opens


def test_a_session_is_good_for_what_its_key_is(any_api: Api, browser: httpx2.Client) -> None:
    sign_in(browser, made(any_api, "ada", Scope.READ))
    answer = browser.post("/v1/jobs", json=DIGITS)
    assert (browser.get("/v1/jobs").status_code, answer.status_code, answer.json()["code"]) == (200, 403, "forbidden_scope")


def test_what_changes_something_must_come_from_this_servers_own_page(any_api: Api, browser: httpx2.Client) -> None:
    key = made(any_api, "ada")
    sign_in(browser, key)
    job = browser.post("/v1/jobs", json=DIGITS).json()
    cookie = {"Cookie": f"{COOKIE}={browser.cookies[COOKIE]}"}
    for origin in ({}, {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Origin": f"{any_api.url}0"}):
        for method, path in (("POST", f"/v1/jobs/{job['id']}/cancel"), ("POST", "/v1/jobs"), ("DELETE", "/v1/session")):
            answer = any_api.http.request(method, path, headers=cookie | origin)
            assert (answer.status_code, answer.json()["code"]) == (403, "forbidden_origin"), (origin, method, path)
    assert any_api.http.get("/v1/jobs", headers=cookie).status_code == 200, "to look needs no origin: browsers send none"
    assert browser.get(f"/v1/jobs/{job['id']}").json()["state"] == "queued"
    assert browser.post(f"/v1/jobs/{job['id']}/cancel").status_code == 202


def test_no_other_page_signs_anybody_in(any_api: Api) -> None:
    key = made(any_api, "ada")
    for headers, status in (({"Origin": "https://evil.example"}, 403), ({"Content-Type": "text/plain"}, 415)):
        answer = any_api.http.post("/v1/session", content=f'{{"key": "{key}"}}', headers={"Content-Type": "application/json"} | headers)
        assert (answer.status_code, "set-cookie" in answer.headers) == (status, False)


# --- when it ends


def test_signing_out_ends_it_at_once(any_api: Api, browser: httpx2.Client) -> None:
    sign_in(browser, made(any_api, "ada"))
    cookie = {"Cookie": f"{COOKIE}={browser.cookies[COOKIE]}"}
    assert any_api.http.get("/v1/jobs", headers=cookie).status_code == 200
    answer = browser.delete("/v1/session")
    assert (answer.status_code, cookie_of(answer)[COOKIE]["max-age"]) == (204, "0")
    assert COOKIE not in browser.cookies
    assert any_api.http.get("/v1/jobs", headers=cookie).status_code == 401, "whoever kept the cookie has nothing"


def test_it_ends_with_its_key(any_api: Api, browser: httpx2.Client) -> None:
    key = made(any_api, "ada")
    sign_in(browser, key)
    assert browser.get("/v1/jobs").status_code == 200
    builders.do(any_api.store, keys.revoke, key)
    assert elapsed_until(lambda: browser.get("/v1/jobs").status_code == 401) < KEPT_S + BUSY_S


def test_it_lasts_no_longer_than_its_key(any_api: Api, browser: httpx2.Client) -> None:
    answer = sign_in(browser, made(any_api, "ada", ttl_s=1.5))
    assert int(cookie_of(answer)[COOKIE]["max-age"]) <= 1
    cookie = {"Cookie": f"{COOKIE}={cookie_of(answer)[COOKIE].value}"}
    until(lambda: any_api.http.get("/v1/jobs", headers=cookie).status_code == 401)


def test_an_expired_one_opens_nothing_even_before_it_is_swept(any_api: Api, browser: httpx2.Client) -> None:
    sign_in(browser, made(any_api, "ada"))
    with any_api.store.write() as tx:
        tx.run(update(sessions).values(expires_at=tx.now_ms - 1))
    any_api.parts.key_ring.forget()
    answer = browser.get("/v1/jobs")
    assert (answer.status_code, answer.json()["detail"]) == (401, "the session is over: sign in again")


# --- what a guesser cannot do


@pytest.mark.parametrize("key", ["", "pg_", UNKNOWN, "x" * 256])
def test_a_wrong_key_begins_nothing(any_api: Api, browser: httpx2.Client, key: str) -> None:
    made(any_api, "ada")
    answer = sign_in(browser, key)
    assert (answer.status_code, answer.json()["code"], "set-cookie" in answer.headers) == (401, "unauthenticated", False)


@pytest.mark.parametrize("body", [{}, {"key": 1}, {"key": None}, {"key": "x" * 257}, {"token": "x"}, [], "key"])
def test_a_bad_body_is_no_try(any_api: Api, body: object) -> None:
    made(any_api, "ada")
    address = stranger()
    for _ in range(MOST_TRIES + 1):
        assert any_api.http.post("/v1/session", json=body, headers=address).status_code == 422


def test_an_address_has_ten_wrong_tries_a_minute_and_others_their_own(any_api: Api) -> None:
    key, address = made(any_api, "ada"), stranger()
    tried = [any_api.http.post("/v1/session", json={"key": UNKNOWN}, headers=address) for _ in range(MOST_TRIES + 2)]
    assert [answer.status_code for answer in tried] == [401] * MOST_TRIES + [429] * 2
    assert tried[-1].json()["code"] == "too_many_tries"
    assert 0 < int(tried[-1].headers["retry-after"]) <= TRIES_S
    assert any_api.http.post("/v1/session", json={"key": key}, headers=address).status_code == 429, "or the answer would tell a right one"
    assert any_api.http.post("/v1/session", json={"key": key}, headers=stranger()).status_code == 200


def test_right_keys_are_no_tries(any_api: Api) -> None:
    key, address = made(any_api, "ada"), stranger()
    for _ in range(MOST_TRIES + 2):
        assert any_api.http.post("/v1/session", json={"key": key}, headers=address).status_code == 200


def test_many_at_once_are_many(any_api: Api) -> None:
    made(any_api, "ada")
    address = stranger()
    answers: list[int] = []

    def guess() -> None:
        answers.append(any_api.http.post("/v1/session", json={"key": UNKNOWN}, headers=address).status_code)

    threads = [threading.Thread(target=guess) for _ in range(3 * MOST_TRIES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [401] * MOST_TRIES + [429] * 2 * MOST_TRIES


def is_taken(tries: Tries, address: str) -> bool:
    try:
        tries.take(address)
    except Refused:
        return False
    return True


def test_tries_come_back_a_minute_after_they_were_made(clock: FakeClock) -> None:
    tries = Tries(clock=lambda: clock.now_ms / 1000)
    for _ in range(MOST_TRIES):
        assert is_taken(tries, "192.0.2.1")
        clock.advance(1)
    assert not is_taken(tries, "192.0.2.1")
    clock.advance(TRIES_S - MOST_TRIES)
    assert [is_taken(tries, "192.0.2.1") for _ in range(2)] == [True, False]


@pytest.mark.parametrize(
    ("one", "other", "are_same"),
    [
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("192.0.2.1", "192.0.2.2", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("", "", True),
    ],
)
def test_who_has_a_whole_network_is_one_guesser(clock: FakeClock, one: str, other: str, are_same: bool) -> None:
    tries = Tries(clock=lambda: clock.now_ms / 1000)
    for _ in range(MOST_TRIES):
        tries.take(one)
    assert is_taken(tries, other) is not are_same


def test_a_guesser_with_many_addresses_fills_no_memory(clock: FakeClock) -> None:
    tries = Tries(clock=lambda: clock.now_ms / 1000)
    for number in range(10_000):
        tries.take(f"198.51.{number // 256}.{number % 256}")
    assert len(tries._made) <= 4096
