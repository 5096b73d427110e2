"""Who asks, and whether they may: every request under /v1 is held against the keys here, before any route hears of it."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

import structlog
from fastapi import Depends
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.requests import Request

from api import errors
from api.errors import Refused
from powergrad.jobs import keys
from powergrad.jobs.keys import LOCAL, Caller, Scope, StoredKey
from powergrad.jobs.store import Store, is_unavailable

KEPT_S = 1.0  # a revoked key opens nothing so long after its revocation at the latest
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
SCRAPED = "/metrics"
GUARDED = ("/v1/", SCRAPED)
OF_ADMINS = ("/v1/keys", "/v1/owners")
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
        self._until = 0.0
        self._looking = asyncio.Lock()

    @property
    def is_locked(self) -> bool:
        """Whether callers must show a key, by the last look."""
        return self._is_reachable or bool(self._known)

    async def look(self) -> None:
        """Make sure that what is known is fresh, or at least known. Raises what the database raises."""
        if time.monotonic() < self._until:
            return
        async with self._looking:
            if time.monotonic() >= self._until:
                await self._look()

    async def _look(self) -> None:
        try:
            self._known, now_ms = await run_in_threadpool(self._read)
        except Exception as error:
            if self._known is None or not is_unavailable(error):
                raise
            log.warning("keys: database away, the last look holds", error=str(error).splitlines()[0])
        else:
            self._ahead_ms = now_ms - time.monotonic() * 1000
        self._until = time.monotonic() + KEPT_S

    def _read(self) -> tuple[dict[str, StoredKey], int]:
        with self._store.read() as tx:
            return keys.stored(tx), tx.now_ms

    async def caller(self, method: str, path: str, headers: Headers) -> Caller:
        """Who asks. Raises Refused (401, 403), and what the database raises."""
        await self.look()
        if not self.is_locked:
            return LOCAL
        found = self._shown(headers)
        wanted = scope_of(method, path)
        if wanted not in found.scopes:
            raise Refused(errors.FORBIDDEN_SCOPE, f"{method} {path[:200]} needs a key with the scope {wanted}")
        return found

    def _shown(self, headers: Headers) -> Caller:
        kind, _, key = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            raise Refused(errors.UNAUTHENTICATED, "send a key: Authorization: Bearer pg_…", headers=CHALLENGE)
        found = keys.opened_by(self._known or {}, key.strip(), now_ms=int(time.monotonic() * 1000 + self._ahead_ms))
        if isinstance(found, str):
            raise Refused(errors.UNAUTHENTICATED, found, headers=CHALLENGE)
        return found


def is_guarded(path: str) -> bool:
    """Whether a path is for callers with a key only, where there are keys."""
    return path.startswith(GUARDED)


def scope_of(method: str, path: str) -> Scope:
    """What a key must be good for."""
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
