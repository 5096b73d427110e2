"""What every request passes first: is it meant for this server, does it come from a web page, is its body JSON; and it is counted.

Plain ASGI: it costs microseconds and never stands between a stream and its reader.
"""

from __future__ import annotations

import time
from functools import lru_cache

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import errors
from api.errors import Kind, problem
from api.measures import Measures
from api.settings import is_loopback

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
TAKES_IMAGES = "/v1/predict/"
IMAGES = ("image/jpeg", "image/png", "image/webp")  # a page of another origin cannot send these either, unless this server allows it
LONGEST_HOST = 255  # of a DNS name; what is remembered of Host headers stays small


class Border:
    """Refuses what a browser could be tricked into sending, and measures the rest."""

    def __init__(self, app: ASGIApp, measures: Measures) -> None:
        self._app, self._measures = app, measures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refused = _refusal(scope["method"], scope["path"], Headers(scope=scope))
        if refused is not None:
            kind, detail = refused
            await problem(kind, detail, instance=scope["path"])(scope, receive, send)
            self._measures.refused(scope["method"], kind.status)
            return
        await self._measured(scope, receive, send)

    async def _measured(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        status = 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                # until the head is out, not the body: a stream is not a slow answer
                self._measures.answered(scope, status, time.perf_counter() - started)
            await send(message)

        await self._app(scope, receive, noting)


def _refusal(method: str, path: str, headers: Headers) -> tuple[Kind, str] | None:
    host = headers.get("host", "")
    if len(host) > LONGEST_HOST or not _names_this_machine(host):
        return errors.FORBIDDEN_HOST, f"Host: {host[:200]!r}: must be a loopback name or address, such as 127.0.0.1 or localhost"
    if method in SAFE_METHODS:
        return None
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2].lower() != host.lower():
        return errors.FORBIDDEN_ORIGIN, f"Origin: {origin[:200]!r}: only this server's own pages may change anything"
    has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
    content_type = headers.get("content-type", "")
    kind = content_type.partition(";")[0].strip().lower()
    if not has_body or (kind in IMAGES if path.startswith(TAKES_IMAGES) else _is_json(kind)):
        return None
    wanted = f"one of {', '.join(IMAGES)}" if path.startswith(TAKES_IMAGES) else "application/json"
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
