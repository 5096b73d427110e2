"""Keys and sessions over both databases: what opens, what does not, and what is stored of either."""

from __future__ import annotations

import hmac
import secrets
from pathlib import Path

import pytest
from sqlalchemy import func, select

from powergrad.jobs import keys, sweeper
from powergrad.jobs.artifacts import Artifacts
from powergrad.jobs.errors import KeyNotFound
from powergrad.jobs.keys import Caller, Scope
from powergrad.jobs.store import Store
from powergrad.jobs.tables import api_keys, metadata, sessions
from tests.jobs.builders import do
from tests.stores import FakeClock


def opened(store: Store, key: str) -> Caller | str:
    with store.read() as tx:
        return keys.opened_by(keys.stored(tx), key, now_ms=tx.now_ms)


def session(store: Store, token: str) -> keys.Session | None:
    with store.read() as tx:
        return keys.session_of(tx, token)


def everything(store: Store) -> str:
    """Every value of every table, as text."""
    with store.read() as tx:
        return "\n".join(str(row) for table in metadata.sorted_tables for row in tx.all(select(table)))


def test_a_key_made_elsewhere_is_taken_on_as_the_first_only(store: Store) -> None:
    secret = secrets.token_urlsafe(keys.SECRET_BYTES)
    key, told = f"pg_{'0123456789ab'}_{secret}", f"0123456789ab:{keys.digest(secret)}"
    assert do(store, keys.adopt, told, owner="admin") is True
    assert opened(store, key) == Caller("admin", frozenset(Scope), "0123456789ab")
    assert secret not in everything(store)
    assert do(store, keys.adopt, f"ffffffffffff:{keys.digest('other')}", owner="admin") is False, "whoever restarts the server makes no key"
    assert opened(store, "pg_ffffffffffff_" + "x" * 43) == "no such key"


@pytest.mark.parametrize("told", ["", "0123456789ab", "0123456789ab:abc", f"0123456789AB:{'0' * 64}", f"0123456789ab:{'0' * 65}"])
def test_what_is_no_key_is_not_taken_on(store: Store, told: str) -> None:
    with pytest.raises(ValueError, match="must be ID:SHA256"):
        do(store, keys.adopt, told, owner="admin")


def test_a_key_opens_for_its_owner_and_scopes(store: Store) -> None:
    key = do(store, keys.create, owner="ada", scopes=frozenset({Scope.SUBMIT}))
    found = opened(store, key)
    assert isinstance(found, Caller)
    assert (found.owner, found.scopes, found.key_id) == ("ada", frozenset({Scope.READ, Scope.SUBMIT}), keys.id_of(key))


@pytest.mark.parametrize(
    ("given", "held"),
    [({Scope.READ}, {Scope.READ}), ({Scope.ADMIN}, set(Scope)), ({Scope.READ, Scope.SUBMIT}, {Scope.READ, Scope.SUBMIT})],
)
def test_a_scope_includes_those_before_it(sqlite_store: Store, given: set[Scope], held: set[Scope]) -> None:
    found = opened(sqlite_store, do(sqlite_store, keys.create, scopes=frozenset(given)))
    assert isinstance(found, Caller)
    assert found.scopes == held


def test_nothing_stored_opens_the_server(store: Store) -> None:
    key = do(store, keys.create)
    token, _ = do(store, keys.sign_in, keys.id_of(key))
    stored = everything(store)
    assert key.split("_", 2)[2] not in stored
    assert token.removeprefix(keys.SESSION_PREFIX) not in stored
    with store.read() as tx:
        row = tx.one(select(api_keys))
    assert row is not None
    assert opened(store, f"pg_{row.id}_{row.secret_sha256}"[: len(key)]) == "no such key"


def test_every_changed_character_of_a_key_closes_it(sqlite_store: Store) -> None:
    key = do(sqlite_store, keys.create)
    for place in range(len(key)):
        other = "A" if key[place] != "A" else "B"
        assert opened(sqlite_store, key[:place] + other + key[place + 1 :]) == "no such key"
    assert opened(sqlite_store, key + "A") == opened(sqlite_store, key[:-1]) == opened(sqlite_store, "") == "no such key"


def test_an_unknown_id_and_a_wrong_secret_are_compared_alike(sqlite_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tells them apart by time would tell who guesses which ids there are."""
    key = do(sqlite_store, keys.create)
    wrong = f"pg_{keys.id_of(key)}_{secrets.token_urlsafe(32)}"
    compared: list[tuple[int, int]] = []
    real = hmac.compare_digest

    def noting(one: str, other: str) -> bool:
        compared.append((len(one), len(other)))
        return real(one, other)

    monkeypatch.setattr("powergrad.jobs.keys.hmac.compare_digest", noting)
    for shown in (wrong, f"pg_{'0' * 12}_{secrets.token_urlsafe(32)}", "nonsense"):
        assert opened(sqlite_store, shown) == "no such key"
    assert compared == [(64, 64)] * 3


def test_a_revoked_key_opens_nothing_and_stays_in_the_list(store: Store) -> None:
    key = do(store, keys.create)
    assert do(store, keys.revoke, keys.id_of(key))["state"] == "revoked"
    again = do(store, keys.revoke, key)
    assert opened(store, key) == "the key was revoked"
    with store.read() as tx:
        assert keys.listed(tx) == [again]
        assert keys.are_configured(tx), "the server stays locked"
        assert not keys.have_working(tx)


def test_an_expired_key_opens_nothing(store: Store, clock: FakeClock) -> None:
    key = do(store, keys.create, ttl_s=60.0)
    clock.advance(59.9)
    assert isinstance(opened(store, key), Caller)
    clock.advance(0.1)
    assert str(opened(store, key)).startswith("the key expired at 2027-")
    with store.read() as tx:
        assert keys.listed(tx)[0]["state"] == "expired"
        assert not keys.have_working(tx)


def test_who_shows_a_wrong_secret_does_not_hear_what_became_of_the_key(sqlite_store: Store) -> None:
    key = do(sqlite_store, keys.create)
    do(sqlite_store, keys.revoke, key)
    assert opened(sqlite_store, f"pg_{keys.id_of(key)}_{secrets.token_urlsafe(32)}") == "no such key"


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"owner": "a b"}, "owner='a b': must match"),
        ({"owner": ""}, "owner='': must match"),
        ({"name": "x" * 65}, "name='xxx"),
        ({"scopes": frozenset()}, "scopes: at least one"),
        ({"ttl_s": 0.0}, "ttl_s=0: must be greater than 0"),
        ({"ttl_s": float("inf")}, "ttl_s=inf: must be"),
    ],
)
def test_a_bad_key_is_not_made(sqlite_store: Store, named: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        do(sqlite_store, keys.create, **named)
    with sqlite_store.read() as tx:
        assert keys.listed(tx) == []


def test_no_key_has_an_id_that_is_not_there(sqlite_store: Store) -> None:
    with pytest.raises(KeyNotFound, match="no key 'nothing'"):
        do(sqlite_store, keys.revoke, "nothing")


def test_a_session_ends_with_its_key_or_after_half_a_day(store: Store, clock: FakeClock) -> None:
    longer, shorter = do(store, keys.create), do(store, keys.create, ttl_s=60.0)
    _, until_noon = do(store, keys.sign_in, keys.id_of(longer))
    _, a_minute = do(store, keys.sign_in, keys.id_of(shorter))
    assert until_noon.expires_at_ms - clock.now_ms == 12 * 3600 * 1000
    assert a_minute.expires_at_ms - clock.now_ms == 60 * 1000


def test_a_session_is_gone_when_its_key_is_revoked_or_it_is_signed_out(store: Store) -> None:
    key = do(store, keys.create)
    (first, _), (second, _) = do(store, keys.sign_in, keys.id_of(key)), do(store, keys.sign_in, keys.id_of(key))
    assert None not in (session(store, first), session(store, second))
    do(store, keys.sign_out, first)
    assert session(store, first) is None
    assert session(store, second) is not None
    do(store, keys.revoke, key)
    assert session(store, second) is None


def test_nobody_signs_in_with_a_key_that_has_ended(store: Store, clock: FakeClock) -> None:
    revoked, expired = do(store, keys.create), do(store, keys.create, ttl_s=1.0)
    do(store, keys.revoke, revoked)
    clock.advance(1.0)
    for key in (revoked, expired):
        with pytest.raises(KeyNotFound):
            do(store, keys.sign_in, keys.id_of(key))


def test_a_key_has_a_bounded_number_of_sessions_and_the_oldest_go(store: Store, clock: FakeClock) -> None:
    key, other = do(store, keys.create), do(store, keys.create)
    do(store, keys.sign_in, keys.id_of(other))
    tokens = []
    for _ in range(keys.MOST_SESSIONS + 3):
        clock.advance(0.001)
        tokens.append(do(store, keys.sign_in, keys.id_of(key))[0])
    assert [session(store, token) is not None for token in tokens] == [False] * 3 + [True] * keys.MOST_SESSIONS
    with store.read() as tx:
        assert tx.run(select(func.count()).select_from(sessions)).scalar_one() == keys.MOST_SESSIONS + 1


def test_expired_sessions_are_swept(store: Store, clock: FakeClock, tmp_path: Path) -> None:
    key = do(store, keys.create)
    older, _ = do(store, keys.sign_in, keys.id_of(key))
    clock.advance(1.0)
    newer, _ = do(store, keys.sign_in, keys.id_of(key))
    clock.advance(keys.SESSION_S - 1.0)
    sweeper.sweep_once(store, Artifacts(str(tmp_path)), lambda: None)
    assert (session(store, older), session(store, newer) is not None) == (None, True)
