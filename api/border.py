"""What every request passes first: is it meant for this server, who sends it, does it come from a web page, is its body JSON; and it is
counted.

Plain ASGI: it costs microseconds and never stands between a stream and its reader.
"""

from __future__ import annotations

import time
from functools import lru_cache, partial

import structlog
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import access, errors
from api.access import CALLER, SAFE_METHODS, KeyRing, Leash
from api.errors import Kind, Refused, problem
from api.measures import Measures
from api.settings import is_loopback
from powergrad.jobs.store import is_unavailable

TAKES_IMAGES = "/v1/predict/"
IMAGES = ("image/jpeg", "image/png", "image/webp")  # a page of another origin cannot send these either, unless this server allows it
TAKES_ARCHIVES = "/v1/datasets"
ARCHIVES = ("application/zip", "application/x-tar", "application/gzip", "application/x-bzip2", "application/x-xz")  # nor these
PLAIN = "identity"
CLOSED = "the handler is closed"  # uvloop's words
LONGEST_HOST = 255  # of a DNS name; what is remembered of Host headers stays small

log = structlog.get_logger(__name__)


class Border:
    """Refuses what a browser could be tricked into sending, and measures the rest."""

    def __init__(self, app: ASGIApp, measures: Measures, key_ring: KeyRing) -> None:
        self._app, self._measures, self._keys = app, measures, key_ring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = await self._refusal(scope)
        if refusal is not None:
            self._measures.refused(scope["method"], refusal.status_code)
            await refusal(scope, receive, partial(_sent, send))
            return
        await self._measured(scope, receive, send)

    async def _refusal(self, scope: Scope) -> Response | None:
        """The answer to a request that goes no further; one that does has its caller in the scope."""
        method, path, headers = scope["method"], scope["path"], Headers(scope=scope)
        try:
            await self._look(path, headers)  # first: whether there are keys decides what else is asked
            refused = _refusal(method, path, headers, is_locked=self._keys.is_locked)
            if refused is not None:
                return problem(*refused, instance=path)
            if access.is_guarded(path) and not access.is_open(method, path):
                scope[CALLER] = await self._keys.caller(method, path, headers)
        except Refused as error:
            return problem(error.kind, error.detail, instance=path, headers=error.headers)
        except Exception as error:
            if not is_unavailable(error):
                raise
            if path != access.SCRAPED or self._keys.is_locked:  # a scrape is to tell of an outage, not to be part of it
                log.warning("database away", path=path, error=str(error).splitlines()[0])
                return errors.unavailable(path)
        return None

    async def _look(self, path: str, headers: Headers) -> None:
        is_guarded = access.is_guarded(path)
        if not is_guarded and _names_this_machine(headers.get("host", "")[:LONGEST_HOST]):
            return
        try:
            await self._keys.look()
        except Exception as error:
            if is_guarded or not is_unavailable(error):
                raise  # an open path, asked for by another name, goes by the last look: a probe is to hear that the process lives

    async def _measured(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        status = 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                # until the head is out, not the body: a stream is not a slow answer
                self._measures.answered(scope, status, time.perf_counter() - started)
            await _sent(send, message)

        caller = scope.get(CALLER)
        if caller is None:
            await self._app(scope, receive, noting)
        else:
            await Leash(self._keys, caller, receive, noting).run(self._app, scope)


async def _sent(send: Send, message: Message) -> None:
    """Send to whoever is still there. uvicorn drops what nobody reads any more, but for a connection that ended while a further request
    of its waited: there uvloop says so, and it is no error of the server's."""
    try:
        await send(message)
    except RuntimeError as error:
        if CLOSED not in str(error):
            raise
        log.debug("client gone while it was answered")


def _refusal(method: str, path: str, headers: Headers, *, is_locked: bool) -> tuple[Kind, str] | None:
    host = headers.get("host", "")
    # without keys the address is all that keeps a web page out, whose own name may lead here (DNS rebinding)
    if not is_locked and (len(host) > LONGEST_HOST or not _names_this_machine(host)):
        return errors.FORBIDDEN_HOST, f"Host: {host[:200]!r}: must be a loopback name or address, such as 127.0.0.1 or localhost"
    if method in SAFE_METHODS:
        return None
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2].lower() != host.lower():
        return errors.FORBIDDEN_ORIGIN, f"Origin: {origin[:200]!r}: only this server's own pages may change anything"
    has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
    content_type = headers.get("content-type", "")
    kind = content_type.partition(";")[0].strip().lower()
    encoding = headers.get("content-encoding", PLAIN).strip().lower()
    if has_body and encoding != PLAIN:
        return errors.UNSUPPORTED_MEDIA, f"Content-Encoding: {encoding[:200]!r}: must be left out: send the body as it is"
    if not has_body or (kind in IMAGES if path.startswith(TAKES_IMAGES) else _is_json(kind)):
        return None
    if path == TAKES_ARCHIVES and kind in ARCHIVES:
        return None
    files = IMAGES if path.startswith(TAKES_IMAGES) else ("application/json", *ARCHIVES) if path == TAKES_ARCHIVES else ()
    wanted = f"one of {', '.join(files)}" if files else "application/json"
    return errors.UNSUPPORTED_MEDIA, f"Content-Type: {content_type[:200]!r}: must be {wanted}"


@lru_cache(maxsize=256)
def _names_this_machine(host: str) -> bool:
    return is_loopback(host_name(host))


def host_name(host: str) -> str:
    """The name in a Host header, without port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _is_json(kind: str) -> bool:
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
