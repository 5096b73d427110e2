"""HTTP for shards that calls only what the operator's network may be asked to call: see `powergrad.addresses`.

A job's data URLs are a stranger's as its webhook is, and the trainer sits in the same network. Every request is held against the rule,
redirects too; a name is resolved once, and the connection goes to an address that was checked.
"""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

from powergrad.addresses import PORTS, AllowList, Target, checked, target

SCHEMES = frozenset(PORTS)
"""By http too: a shard is public where it lies, and whoever changes it on its way could have changed it there."""


@dataclass(frozen=True)
class CheckedClient:
    """What fsspec makes its sessions with. Its text is part of the key under which fsspec keeps a file system, so that lists do not mix."""

    allow: AllowList

    async def __call__(self, *, loop: asyncio.AbstractEventLoop, **settings: Any) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(resolver=_CheckedResolver(self.allow), loop=loop)
        return aiohttp.ClientSession(
            loop=loop, connector=connector, middlewares=(self._held_against_the_rule,), trust_env=False, **settings
        )

    async def _held_against_the_rule(self, request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        target(str(request.url), allow=self.allow, schemes=SCHEMES)  # of a redirect too, and an address is never resolved
        return await send(request)


class _CheckedResolver(AbstractResolver):
    def __init__(self, allow: AllowList) -> None:
        self._allow, self._system = allow, ThreadedResolver()

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        found = await self._system.resolve(host, port, family)
        asked = Target(
            "http" if port == PORTS["http"] else "https",
            host.lower().removesuffix("."),
            port,
            "/",
            must_be_listed=port not in PORTS.values(),
        )
        checked(asked, [one["host"] for one in found], allow=self._allow)
        return found

    async def close(self) -> None:
        await self._system.close()
