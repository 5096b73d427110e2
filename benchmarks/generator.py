"""A load generator for a server on loopback, in a process of its own: raw sockets, so that it takes little of the machine.

    python -m benchmarks.generator PLAN

PLAN: a `Plan` as JSON.  Prints a `Load` as JSON.  Every connection sends its next request when it has the answer to the last.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field

from benchmarks.report import Spread, spread

TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Plan:
    """What to send where, over how many connections, for how long (or how often, where `requests` is given)."""

    port: int
    method: str
    path: str
    connections: int = 1
    seconds: float = 3.0
    requests: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: str = ""

    def wire(self) -> bytes:
        lines = [
            f"{self.method} {self.path} HTTP/1.1",
            f"Host: 127.0.0.1:{self.port}",
            *(f"{name}: {value}" for name, value in self.headers.items()),
        ]
        if self.body:
            lines += ["Content-Type: application/json", f"Content-Length: {len(self.body.encode())}"]
        return ("\r\n".join(lines) + "\r\n\r\n" + self.body).encode()


@dataclass(frozen=True)
class Load:
    """What came of it. statuses: how often each was answered."""

    per_s: float
    ms: Spread
    statuses: dict[str, int]


def run(plan: Plan) -> Load:
    """Carry the plan out in a child process."""
    command = [sys.executable, "-m", "benchmarks.generator", json.dumps(asdict(plan))]
    done = subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, check=True)
    return Load(**json.loads(done.stdout))


async def _send(plan: Plan) -> Load:
    begun = time.perf_counter()
    took: list[float] = []
    statuses: Counter[str] = Counter()
    await asyncio.gather(*(_connection(plan, begun + plan.seconds, took, statuses) for _ in range(plan.connections)))
    return Load(len(took) / (time.perf_counter() - begun), spread([second * 1000 for second in took]), dict(statuses))


async def _connection(plan: Plan, until: float, took: list[float], statuses: Counter[str]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", plan.port)
    request = plan.wire()
    while time.perf_counter() < until if plan.requests is None else len(took) < plan.requests:
        sent = time.perf_counter()
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        at = head.lower().find(b"content-length:")
        if at >= 0 and (length := int(head[at + 15 : head.index(b"\r\n", at)])):
            await reader.readexactly(length)
        took.append(time.perf_counter() - sent)
        statuses[head[9:12].decode()] += 1
    writer.close()


if __name__ == "__main__":
    print(json.dumps(asdict(asyncio.run(_send(Plan(**json.loads(sys.argv[1])))))))
