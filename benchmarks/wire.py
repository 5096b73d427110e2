"""HTTP/1.1 to a server on loopback by hand, on asyncio: a hundred connections cost a fraction of what a client library takes of the machine."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

CUT = (OSError, asyncio.IncompleteReadError)
"""What a connection that breaks, or cannot be made, raises here."""


@dataclass(frozen=True)
class Answer:
    """A whole answer; header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Frame:
    """One server-sent event. id: None where it carries none, as the last one does."""

    id: int | None
    event: str
    data: bytes


class Refused(Exception):
    """A stream was answered by another status than 200."""


@dataclass(frozen=True)
class Connection:
    """One connection, kept alive; one request at a time."""

    port: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def ask(self, method: str, path: str, *, headers: Mapping[str, str] | None = None, body: bytes = b"") -> Answer:
        """Raises CUT."""
        found = await self._head(method, path, headers or {}, body)
        length = int(found.headers.get("content-length", 0))
        return Answer(found.status, found.headers, await self.reader.readexactly(length) if length else b"")

    async def frames(self, job_id: str, *, after: int = 0) -> AsyncIterator[Frame]:
        """The events of a job above number `after`, pings left out. Raises CUT, Refused."""
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": str(after)} if after else {})
        found = await self._head("GET", f"/v1/jobs/{job_id}/events", headers, b"")
        if found.status != 200:
            raise Refused(f"the event stream of {job_id} was answered by {found.status}")
        rest = b""
        async for block in self._blocks():
            *whole, rest = (rest + block).split(b"\n\n")
            for text in whole:
                if b"data: " in text:
                    yield _frame(text)

    async def _head(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        named = {"Host": f"127.0.0.1:{self.port}"} | dict(headers)
        if body:
            named |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in named.items())]
        self.writer.write(("\r\n".join(lines) + "\r\n\r\n").encode() + body)
        status, *rest = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        return Answer(int(status.split()[1]), {name.lower(): value for name, _, value in (line.partition(": ") for line in rest)}, b"")

    async def _blocks(self) -> AsyncIterator[bytes]:
        """A chunked body's content."""
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            yield (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readexactly(2)


@asynccontextmanager
async def connected(port: int, *, buffer_bytes: int | None = None) -> AsyncIterator[Connection]:
    """A connection for the block's time. Raises CUT.

    buffer_bytes: how much the kernel, and again this process, takes beyond what is read; None for what they take by themselves.
    """
    line = socket.socket()
    line.setblocking(False)
    if buffer_bytes is not None:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)  # before the connection: it is offered in the handshake
    try:
        await asyncio.get_running_loop().sock_connect(line, ("127.0.0.1", port))
        reader, writer = await asyncio.open_connection(sock=line, limit=buffer_bytes or 1 << 20)
    except BaseException:
        line.close()
        raise
    try:
        yield Connection(port, reader, writer)
    finally:
        writer.transport.abort()


def _frame(text: bytes) -> Frame:
    fields = dict(line.split(b": ", 1) for line in text.split(b"\n") if not line.startswith(b":"))
    return Frame(int(fields[b"id"]) if b"id" in fields else None, fields[b"event"].decode(), fields[b"data"])
