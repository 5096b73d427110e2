"""API keys `pg_<id>_<secret>`, and the sessions of browsers that showed one. What is stored of either is a SHA-256, so that a stolen database
opens nothing.

Once a key has been made, the server asks every caller for one; a revoked key stays in the list, so that revoking the last one locks the
server instead of opening it. A session is as good as its key, and ends with it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, Row, delete, insert, or_, select, update

from powergrad.jobs.errors import KeyNotFound
from powergrad.jobs.rows import LOCAL_OWNER
from powergrad.jobs.store import Tx, rfc3339
from powergrad.jobs.tables import api_keys, sessions
from powergrad.spec import NAME_PATTERN

ID_BYTES, SECRET_BYTES = 6, 32
KEY = re.compile(r"pg_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
TOLD = re.compile(r"([0-9a-f]{12}):([0-9a-f]{64})")
SESSION_PREFIX = "pgs_"  # by which a log that was about to show one knows it
SESSION_S = 12 * 3600.0
MOST_SESSIONS = 64  # of one key: a browser that never signs out leaves one behind at each sign-in
LONGEST_TTL_S = 100 * 365 * 86_400.0


class Scope(StrEnum):
    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"


IMPLIED: dict[Scope, frozenset[Scope]] = {
    Scope.READ: frozenset({Scope.READ}),
    Scope.SUBMIT: frozenset({Scope.READ, Scope.SUBMIT}),
    Scope.ADMIN: frozenset(Scope),
}


@dataclass(frozen=True)
class Caller:
    """Who asks, and what they may. key_id: None where the server knows no keys and everybody on this machine is the local owner.

    expires_at_ms: when the key, or the session that stands for it, ends; None is never.
    """

    owner: str
    scopes: frozenset[Scope]
    key_id: str | None = None
    expires_at_ms: int | None = None


LOCAL = Caller(LOCAL_OWNER, frozenset(Scope))


@dataclass(frozen=True)
class StoredKey:
    """A key as it is stored, for the check of many callers without asking the database for each."""

    caller: Caller
    secret_sha256: str
    is_revoked: bool

    def refusal(self, now_ms: int) -> str | None:
        """Why the key opens nothing any more; None while it does."""
        if self.is_revoked:
            return "the key was revoked"
        expires_at_ms = self.caller.expires_at_ms
        if expires_at_ms is not None and expires_at_ms <= now_ms:
            return f"the key expired at {rfc3339(expires_at_ms)}"
        return None


def create(
    tx: Tx, *, owner: str = LOCAL_OWNER, name: str = "", scopes: frozenset[Scope] = frozenset({Scope.SUBMIT}), ttl_s: float | None = None
) -> str:
    """Store a new key; the key itself, which nothing can show again. Raises ValueError for a bad owner, name or ttl."""
    for field, value in (("owner", owner), ("name", name or "-")):
        if not re.fullmatch(NAME_PATTERN, value):
            raise ValueError(f"{field}={value!r}: must match {NAME_PATTERN}")
    if not scopes:
        raise ValueError("scopes: at least one of read, submit, admin")
    if ttl_s is not None and not 0 < ttl_s <= LONGEST_TTL_S:
        raise ValueError(f"ttl_s={ttl_s:g}: must be greater than 0 and at most {LONGEST_TTL_S:.0f}, a hundred years")
    key_id, secret = secrets.token_hex(ID_BYTES), secrets.token_urlsafe(SECRET_BYTES)
    row = {
        "id": key_id,
        "secret_sha256": digest(secret),
        "owner": owner,
        "name": name,
        "scopes": sorted(frozenset().union(*(IMPLIED[scope] for scope in scopes))),
        "created_at": tx.now_ms,
        "expires_at": None if ttl_s is None else tx.now_ms + round(ttl_s * 1000),
    }
    tx.run(insert(api_keys).values(**row))
    return f"pg_{key_id}_{secret}"


def adopt(tx: Tx, told: str, *, owner: str, name: str = "") -> bool:
    """Store an admin's key that was made elsewhere, told as ID:SHA256 of its secret, unless a key was ever made; whether it was.

    So a server in containers has its first key from the start, and no file holds what opens it. Raises ValueError.
    """
    parts = TOLD.fullmatch(told)
    if parts is None:
        raise ValueError("must be ID:SHA256, 12 and 64 hexadecimal digits, as scripts/init-env writes it")
    if are_configured(tx):
        return False
    row = {"id": parts[1], "secret_sha256": parts[2], "owner": owner, "name": name, "scopes": sorted(Scope), "created_at": tx.now_ms}
    tx.run(insert(api_keys).values(**row))
    return True


def get(tx: Tx, key_id: str) -> dict[str, Any]:
    """A key as JSON, without its secret. key_id: the id, or the whole key. Raises KeyNotFound."""
    wanted = id_of(key_id) or key_id
    row = tx.one(select(api_keys).where(api_keys.c.id == wanted))
    if row is None:
        raise KeyNotFound(wanted[:16])
    return _shown(row, tx.now_ms)


def listed(tx: Tx) -> list[dict[str, Any]]:
    """All keys as JSON, newest first, without their secrets."""
    return [_shown(row, tx.now_ms) for row in tx.all(select(api_keys).order_by(api_keys.c.created_at.desc(), api_keys.c.id))]


def revoke(tx: Tx, key_id: str) -> dict[str, Any]:
    """The key opens nothing from now on; twice is no error. key_id: the id, or the whole key. Raises KeyNotFound."""
    wanted = id_of(key_id) or key_id
    tx.run(update(api_keys).where(api_keys.c.id == wanted, api_keys.c.revoked_at.is_(None)).values(revoked_at=tx.now_ms))
    tx.run(delete(sessions).where(sessions.c.key_id == wanted))
    return get(tx, wanted)


def are_configured(tx: Tx) -> bool:
    """Whether a key was ever made."""
    return tx.one(select(api_keys.c.id).limit(1)) is not None


def stored(tx: Tx) -> dict[str, StoredKey]:
    """Every key by its id, revoked and expired ones too: who shows one is to hear why it opens nothing."""
    return {row.id: _stored(row) for row in tx.all(select(api_keys))}


def have_working(tx: Tx) -> bool:
    """Whether a key exists that is neither revoked nor expired."""
    return tx.one(select(api_keys.c.id).where(*_working(tx)).limit(1)) is not None


def _working(tx: Tx) -> tuple[ColumnElement[bool], ...]:
    return api_keys.c.revoked_at.is_(None), or_(api_keys.c.expires_at.is_(None), api_keys.c.expires_at > tx.now_ms)


def id_of(key: str) -> str | None:
    """The id in a whole key; None for what is no key."""
    parts = KEY.fullmatch(key)
    return parts[1] if parts else None


def opened_by(known: dict[str, StoredKey], key: str, *, now_ms: int) -> Caller | str:
    """Whose key this is, or why it opens nothing. The secret is compared in constant time; an unknown id costs the same."""
    parts = KEY.fullmatch(key)
    key_id, secret = (parts[1], parts[2]) if parts else ("", key)
    found = known.get(key_id)
    same = hmac.compare_digest(digest(secret), found.secret_sha256 if found else digest(""))
    if found is None or not same:
        return "no such key"
    return found.refusal(now_ms) or found.caller


def digest(secret: str) -> str:
    """SHA-256 in hex. A secret has 256 random bits, so that no slow hash is needed."""
    return hashlib.sha256(secret.encode(errors="replace")).hexdigest()


# --- sessions


@dataclass(frozen=True)
class Session:
    """Which key a browser has shown, and until when it need not show it again."""

    key_id: str
    expires_at_ms: int


def sign_in(tx: Tx, key_id: str) -> tuple[str, Session]:
    """A new session of a key, and its token, which nothing can show again. Raises KeyNotFound when the key has just ended."""
    key = tx.one(select(api_keys.c.expires_at).where(api_keys.c.id == key_id, *_working(tx)))
    if key is None:
        raise KeyNotFound(key_id)
    sweep(tx)
    ends = tx.now_ms + round(SESSION_S * 1000)
    session = Session(key_id, ends if key.expires_at is None else min(ends, key.expires_at))
    token = SESSION_PREFIX + secrets.token_urlsafe(SECRET_BYTES)
    tx.run(insert(sessions).values(token_sha256=digest(token), key_id=key_id, created_at=tx.now_ms, expires_at=session.expires_at_ms))
    mine = select(sessions.c.token_sha256).where(sessions.c.key_id == key_id).order_by(sessions.c.created_at.desc())
    tx.run(delete(sessions).where(sessions.c.token_sha256.in_(mine.offset(MOST_SESSIONS).limit(MOST_SESSIONS))))
    return token, session


def session_of(tx: Tx, token: str) -> Session | None:
    """The session that a token stands for, expired or not; None where there is none (any more)."""
    row = tx.one(select(sessions.c.key_id, sessions.c.expires_at).where(sessions.c.token_sha256 == digest(token)))
    return None if row is None else Session(row.key_id, row.expires_at)


def sign_out(tx: Tx, token: str) -> None:
    """The session is over; twice is no error."""
    tx.run(delete(sessions).where(sessions.c.token_sha256 == digest(token)))


def needs_sweep(tx: Tx) -> bool:
    """Whether a session has expired."""
    return tx.one(select(sessions.c.key_id).where(sessions.c.expires_at <= tx.now_ms).limit(1)) is not None


def sweep(tx: Tx) -> None:
    """Forget expired sessions. They opened nothing before."""
    tx.run(delete(sessions).where(sessions.c.expires_at <= tx.now_ms))


def _stored(row: Row[Any]) -> StoredKey:
    caller = Caller(row.owner, frozenset(Scope(scope) for scope in row.scopes), row.id, row.expires_at)
    return StoredKey(caller, row.secret_sha256, row.revoked_at is not None)


def _shown(row: Row[Any], now_ms: int) -> dict[str, Any]:
    refusal = _stored(row).refusal(now_ms)
    return {
        "id": row.id,
        "object": "key",
        "owner": row.owner,
        "name": row.name,
        "scopes": row.scopes,
        "state": "active" if refusal is None else "revoked" if row.revoked_at is not None else "expired",
        "created_at": rfc3339(row.created_at),
        "expires_at": rfc3339(row.expires_at),
        "revoked_at": rfc3339(row.revoked_at),
    }
