"""Who asks, and whether they may: every request under /v1 is held against the keys here, before any route hears of it."""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated

import structlog
from fastapi import Depends
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.requests import Request, cookie_parser
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as ASGIScope

from api import errors
from api.errors import Refused
from powergrad.jobs import keys
from powergrad.jobs.keys import LOCAL, Caller, Scope, Session, StoredKey
from powergrad.jobs.store import Store, is_unavailable

KEPT_S = 1.0  # a revoked key opens nothing so long after its revocation at the latest
UNKNOWN_KEPT_S = (
    0.1  # a key that is not known may have been made this moment; who tries keys makes the database look no more often than this
)
MOST_SESSIONS = 4096  # remembered between looks; of more, some are looked up again
MOST_TRIES = 10
TRIES_S = 60.0
MOST_ADDRESSES = 4096
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
SCRAPED = "/metrics"
SESSION = "/v1/session"
GUARDED = ("/v1/", SCRAPED)
OF_ADMINS = ("/v1/keys", "/v1/owners")
OPEN = frozenset({("POST", SESSION)})  # it is how one shows a key
COOKIE = "powergrad_session"
CALLER = "powergrad.caller"
CHALLENGE = {"WWW-Authenticate": 'Bearer realm="powergrad"'}

log = structlog.get_logger(__name__)


class KeyRing:
    """The keys as they are stored, looked at again every KEPT_S.

    is_reachable: whether the server listens beyond this machine; then it opens nothing without a key, whatever the database says.
    """

    def __init__(self, store: Store, *, is_reachable: bool) -> None:
        self._store, self._is_reachable = store, is_reachable
        self._known: dict[str, StoredKey] | None = None
        self._ahead_ms = 0.0
        self._looked_at = -KEPT_S
        self._looking = asyncio.Lock()
        self._sessions: OrderedDict[str, tuple[float, Session]] = OrderedDict()
        self.tries = Tries()

    @property
    def is_locked(self) -> bool:
        """Whether callers must show a key, by the last look."""
        return self._is_reachable or bool(self._known)

    async def look(self, *, kept_s: float = KEPT_S) -> None:
        """Make sure that what is known is no older, or at least known. Raises what the database raises."""
        if time.monotonic() < self._looked_at + kept_s:
            return
        async with self._looking:
            if time.monotonic() >= self._looked_at + kept_s:
                await self._look()

    def forget(self) -> None:
        """What was known has just changed."""
        self._looked_at = -KEPT_S
        self._sessions.clear()

    async def _look(self) -> None:
        began = time.monotonic()
        try:
            self._known, now_ms = await run_in_threadpool(self._read)
        except Exception as error:
            if self._known is None or not is_unavailable(error):
                raise
            log.warning("keys: database away, the last look holds", error=str(error).splitlines()[0])
        else:
            self._ahead_ms = now_ms - time.monotonic() * 1000
        self._looked_at = began  # what changed while it was read may not have been seen

    def _read(self) -> tuple[dict[str, StoredKey], int]:
        with self._store.read() as tx:
            return keys.stored(tx), tx.now_ms

    def now_ms(self) -> int:
        """The database's clock, as of the last look."""
        return int(time.monotonic() * 1000 + self._ahead_ms)

    async def caller(self, method: str, path: str, headers: Headers) -> Caller:
        """Who asks. Raises Refused (401, 403), and what the database raises."""
        await self.look()
        if not self.is_locked:
            return LOCAL
        found = await self._shown(method, headers)
        wanted = scope_of(method, path)
        if wanted not in found.scopes:
            raise Refused(errors.FORBIDDEN_SCOPE, f"{method} {path[:200]} needs a key with the scope {wanted}")
        return found

    async def _shown(self, method: str, headers: Headers) -> Caller:
        given = headers.get("authorization")
        if given is not None:
            kind, _, key = given.partition(" ")
            found = await self.opened_by(key.strip()) if kind.lower() == "bearer" else "Authorization: must be Bearer pg_…"
        elif token := session_token(headers):
            found = await self._signed_in(token)
            if isinstance(found, Caller) and method not in SAFE_METHODS and "origin" not in headers:
                # a browser sends the cookie by itself: the page that made it do so must be one of this server's own
                raise Refused(errors.FORBIDDEN_ORIGIN, "a call with a cookie that changes something must say its Origin, as browsers do")
        else:
            found = "send a key: Authorization: Bearer pg_…"
        if isinstance(found, str):
            raise Refused(errors.UNAUTHENTICATED, found, headers=CHALLENGE)
        return found

    async def opened_by(self, key: str) -> Caller | str:
        """Whose key this is, or why it opens nothing."""
        key_id = keys.id_of(key)
        if key_id is not None and key_id not in (self._known or {}):
            await self.look(kept_s=UNKNOWN_KEPT_S)
        return keys.opened_by(self._known or {}, key, now_ms=self.now_ms())

    async def still_opens(self, caller: Caller) -> bool:
        """Whether who was let in would be let in again; while the database is away, by the last look."""
        try:
            await self.look()
        except Exception as error:
            if not is_unavailable(error):
                raise
        if caller.key_id is None:
            return not self.is_locked
        key = (self._known or {}).get(caller.key_id)
        is_over = caller.expires_at_ms is not None and caller.expires_at_ms <= self.now_ms()  # of the session, where there is one
        return key is not None and not is_over and key.refusal(self.now_ms()) is None

    async def _signed_in(self, token: str) -> Caller | str:
        """Whose session this is, or why it opens nothing."""
        session = await self._session(token)
        if session is None or session.expires_at_ms <= self.now_ms():
            return "the session is over: sign in again"
        key = (self._known or {}).get(session.key_id)
        if key is None:
            return "no such key"
        return key.refusal(self.now_ms()) or replace(key.caller, expires_at_ms=session.expires_at_ms)

    async def _session(self, token: str) -> Session | None:
        name = keys.digest(token)
        looked_at, session = self._sessions.get(name, (0.0, None))
        if session is not None and time.monotonic() < looked_at + KEPT_S:
            return session
        try:
            found = await run_in_threadpool(self._read_session, token)
        except Exception as error:
            if session is None or not is_unavailable(error):
                raise
            return session  # as the keys: the last look holds
        self._sessions.pop(name, None)
        if found is not None:
            self._sessions[name] = (time.monotonic(), found)
        if len(self._sessions) > MOST_SESSIONS:
            self._sessions.popitem(last=False)
        return found

    def _read_session(self, token: str) -> Session | None:
        with self._store.read() as tx:
            return keys.session_of(tx, token)


class Leash:
    """One request of a caller's, whose answer, where it is a stream, ends when the caller's key does.

    The application hears then that its reader has left, which is what every stream waits for anyway. A file is sent to its end.
    """

    def __init__(self, ring: KeyRing, caller: Caller, receive: Receive, send: Send) -> None:
        self._ring, self._caller = ring, caller
        self._receive, self._send = receive, send
        self._has_sent_all = self._is_stream = self._is_cut = False

    async def run(self, app: ASGIApp, scope: ASGIScope) -> None:
        await app(scope, self.receive, self.send)
        if self._is_cut:
            await self._send({"type": "http.response.body", "body": b""})

    async def receive(self) -> Message:
        if not self._has_sent_all:
            message = await self._receive()
            self._has_sent_all = not message.get("more_body", False)
            return message
        leaving = asyncio.ensure_future(self._receive())
        try:
            while not leaving.done():
                await asyncio.wait({leaving}, timeout=KEPT_S)
                if self._is_stream and not leaving.done() and not await self._ring.still_opens(self._caller):
                    self._is_cut = True
                    return {"type": "http.disconnect"}
            return leaving.result()
        finally:
            leaving.cancel()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._is_stream = all(name.lower() != b"content-length" for name, _ in message.get("headers", ()))
        await self._send(message)


class Tries:
    """Wrong keys by the address they came from: MOST_TRIES in TRIES_S. clock: seconds that never go back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._made: OrderedDict[str, deque[float]] = OrderedDict()

    def take(self, address: str) -> None:
        """Count a try before it is known how it ends, so that many at once are many. Raises Refused (429)."""
        made = self._made.setdefault(_network(address), deque(maxlen=MOST_TRIES))
        self._made.move_to_end(_network(address))
        if len(self._made) > MOST_ADDRESSES:
            self._made.popitem(last=False)
        wait_s = made[0] + TRIES_S - self._clock() if len(made) == MOST_TRIES else 0.0
        if wait_s > 0:
            detail = f"{MOST_TRIES} wrong keys came from this address within {TRIES_S:.0f} s: wait"
            raise Refused(errors.TOO_MANY_TRIES, detail, headers={"Retry-After": str(int(wait_s) + 1)})
        made.append(self._clock())

    def forgive(self, address: str) -> None:
        """The try that was counted last was none: the key was right."""
        made = self._made.get(_network(address))
        if made:
            made.pop()


def _network(address: str) -> str:
    """Who stands behind an address: of IPv6 each customer has a whole /64."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address[:64]
    return str(ipaddress.ip_network(f"{address.partition('%')[0]}/64", strict=False)) if found.version == 6 else address


def session_token(headers: Headers) -> str | None:
    """What the browser's cookie holds."""
    return cookie_parser(headers.get("cookie", "")).get(COOKIE)


def is_guarded(path: str) -> bool:
    """Whether a path is for callers with a key only, where there are keys."""
    return path.startswith(GUARDED)


def is_open(method: str, path: str) -> bool:
    """Whether a guarded path takes this method from everybody."""
    return (method, path) in OPEN


def scope_of(method: str, path: str) -> Scope:
    """What a key must be good for."""
    if path == SESSION:  # to sign out changes nothing of anybody's
        return Scope.READ
    if path.startswith(OF_ADMINS):
        return Scope.ADMIN
    return Scope.READ if method in SAFE_METHODS else Scope.SUBMIT


def caller_of(request: Request) -> Caller:
    """Whom the border let in."""
    caller: Caller = request.scope[CALLER]
    return caller


async def _caller(request: Request) -> Caller:  # async: a plain function would be sent to the thread pool
    return caller_of(request)


WithCaller = Annotated[Caller, Depends(_caller)]
