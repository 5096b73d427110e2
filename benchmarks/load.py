"""The whole service under load for minutes: jobs that train, pollers with ETags, event streams. Does it stay whole, quick and small?

    python -m benchmarks.load [--minutes 5] [--jobs 1000] [--workers 2] [--pollers 50] [--streams 50] [--quick] [--json] [--save]

An embedded stack on a temporary directory with so many tiny jobs queued; one more is submitted for each that ends, so that the queue stays
as long. Every second poller asks with `?wait=`, the others every POLL_S; all with the ETag of the answer before. Each stream follows a job
from its first event to its end, then the next in line; afterwards what it heard is compared with what is stored. Beside them `/healthz`,
which looks at nothing, is asked ten times a second: what that takes is the machine's part of every answer. Exit code 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypedDict
from urllib.parse import urlsplit

import psutil

from benchmarks import report
from benchmarks.report import Neighbours, Origin
from benchmarks.service import READY_S, BenchmarkError
from benchmarks.wire import CUT, Connection, Refused, connected
from powergrad.cli.stack import Stack

PACKAGES = ("fastapi", "uvicorn", "uvloop", "sqlalchemy", "celery", "torch")
SPEC: dict[str, Any] = {
    "data": {"dataset": "digits", "image_size": 8, "batch_size": 256},
    "model": {"name": "resnet20"},
    "epochs": 1,
    "resources": {"cpu_threads": 1},
}
BODY = json.dumps(SPEC).encode()
FLOOR_S = 0.1  # between two looks at /healthz
POLL_S = 0.5  # between the polls of one who does not let the server wait
WAIT_S = 5  # of one who does
LOOKS = 20  # at one job, before a poller turns to another
ANSWER_S = 30.0
SETTLED_S = 2.0  # an event stored so long before the end must have been heard
LIVE = frozenset({"queued", "running", "pausing", "paused", "cancelling"})
SLOTS = 2  # of each worker; workers on the same cores share the slots, so two jobs train at a time
SHOWN = 10
BARS = {"errors": 0, "lost_events": 0, "failed_jobs": 0, "poll_p99_ms": 100.0, "lag_p99_s": 1.0, "growth_mib": 10.0}


class Tail(TypedDict):
    """Percentiles of many measurements."""

    n: int
    p50: float
    p95: float
    p99: float
    max: float


class Result(Origin):
    """One run of the benchmark."""

    peer: str
    minutes: float
    jobs: int
    workers: int
    pollers: int
    streams: int
    errors: int
    faults: list[str]
    lost_events: int
    heard_events: int
    followed_jobs: int
    finished_jobs: int
    finished_per_min: float
    failed_jobs: int
    statuses: dict[str, int]
    poll_ms: Tail
    poll_p99_ms: float
    floor_ms: Tail
    late_ms: Tail
    lag_s: Tail
    lag_p99_s: float
    rss_mib: list[float]
    rss_first_mib: float
    rss_last_mib: float
    growth_mib: float
    api_cpu: float
    generator_cpu: float
    others_share: float
    missed: list[str]


@dataclass
class Load:
    """The jobs in line, and what the pollers and streams saw."""

    port: int
    dice: random.Random
    line: list[str] = field(default_factory=list)
    handed_out: int = 0
    """How many of `line` have been given to a stream."""
    polls_s: list[float] = field(default_factory=list)
    floor_s: list[float] = field(default_factory=list)
    """What an answer takes for which nothing is looked up."""
    late_s: list[float] = field(default_factory=list)
    """How long after its wait a poll was answered that nothing had changed."""
    lags_s: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    heard: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Of each followed job the events, as they came."""
    ended: dict[str, str] = field(default_factory=dict)
    """Of each job whose stream came to its end the state that its last frame told."""

    def next_in_line(self) -> str:
        job_id = self.line[self.handed_out]
        self.handed_out += 1
        return job_id

    def any_near_the_head(self, pollers: int) -> str:
        """A job that runs, will soon, or did just now: so that polls see changes."""
        head = max(0, self.handed_out - pollers)
        return self.dice.choice(self.line[head : head + 2 * pollers])


def main() -> int:
    options = _parser().parse_args()
    if options.quick:
        options.minutes, options.jobs, options.workers, options.pollers, options.streams = 0.25, 20, 1, 6, 6
    result = measure(options)
    report.deliver(result, _table(result), options)
    return 1 if result["missed"] else 0


def measure(options: argparse.Namespace) -> Result:
    neighbours = Neighbours()
    with tempfile.TemporaryDirectory(prefix="powergrad-load-") as folder:
        stack = Stack(Path(folder) / "data", port=0, workers=options.workers, slots=SLOTS)
        with stack:
            stack.ready(READY_S)
            api = psutil.Process(next(part.process.pid for part in stack.parts if part.name == "api" and part.process))
            load = Load(urlsplit(stack.url).port or 0, random.Random(0))
            asyncio.run(_fill(load, options.jobs))
            cpu = _cpu_s(api), _cpu_s(psutil.Process())
            begun = time.monotonic()
            rss_mib = asyncio.run(_story(load, api, options))
            took_s = time.monotonic() - begun
            cpu = _cpu_s(api) - cpu[0], _cpu_s(psutil.Process()) - cpu[1]
            lost, states = asyncio.run(_verdict(load, datetime.now().astimezone().timestamp()))
            dead = [part.name for part in stack.parts if not part.is_alive]
            others = neighbours.share()
    if dead:
        load.errors.append(f"ended by themselves: {', '.join(dead)}")
    window = max(1, min(60, len(rss_mib) // 3))
    first, last = statistics.median(rss_mib[:window]), statistics.median(rss_mib[-window:])
    poll_ms, lag_s = tail([1000 * one for one in load.polls_s]), tail(load.lags_s)
    figures: dict[str, float] = {
        "errors": len(load.errors),
        "lost_events": lost,
        "failed_jobs": states["failed"],
        "poll_p99_ms": poll_ms["p99"],
        "lag_p99_s": lag_s["p99"],
        "growth_mib": last - first,
    }
    return {
        **report.origin("load", packages=PACKAGES),
        "peer": "none: the bars are absolute",
        "minutes": options.minutes,
        "jobs": options.jobs,
        "workers": options.workers,
        "pollers": options.pollers,
        "streams": options.streams,
        "errors": len(load.errors),
        "faults": load.errors[:SHOWN],
        "lost_events": lost,
        "heard_events": sum(map(len, load.heard.values())),
        "followed_jobs": len(load.ended),
        "finished_jobs": states["succeeded"],
        "finished_per_min": 60 * states["succeeded"] / took_s,
        "failed_jobs": states["failed"],
        "statuses": dict(load.statuses),
        "poll_ms": poll_ms,
        "poll_p99_ms": poll_ms["p99"],
        "floor_ms": tail([1000 * one for one in load.floor_s]),
        "late_ms": tail([1000 * one for one in load.late_s]),
        "lag_s": lag_s,
        "lag_p99_s": lag_s["p99"],
        "rss_mib": [round(one, 1) for one in rss_mib[:: max(1, len(rss_mib) // 60)]],
        "rss_first_mib": first,
        "rss_last_mib": last,
        "growth_mib": last - first,
        "api_cpu": cpu[0] / took_s,
        "generator_cpu": cpu[1] / took_s,
        "others_share": others,
        "missed": [name for name, most in BARS.items() if figures[name] > most],
    }


def tail(values: Sequence[float]) -> Tail:
    """Percentiles; zeros of nothing."""
    if len(values) < 2:
        one = values[0] if values else 0.0
        return {"n": len(values), "p50": one, "p95": one, "p99": one, "max": one}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"n": len(values), "p50": cuts[49], "p95": cuts[94], "p99": cuts[98], "max": max(values)}


# --- the load --------------------------------------------------------------------------------------------------------------------


async def _fill(load: Load, jobs: int) -> None:
    async with connected(load.port) as line:
        for _ in range(jobs):
            await _submit(load, line)


async def _story(load: Load, api: psutil.Process, options: argparse.Namespace) -> list[float]:
    """Let pollers and streams loose on the queued jobs; MiB of the API process, once a second."""
    everybody = [asyncio.create_task(_poll(load, options.pollers, waits=number % 2 == 1)) for number in range(options.pollers)]
    everybody += [asyncio.create_task(_stream(load)) for _ in range(options.streams)]
    everybody.append(asyncio.create_task(_floor(load)))
    rss_mib = []
    for _ in range(round(60 * options.minutes)):
        await asyncio.sleep(1.0)
        rss_mib.append(float(api.memory_info().rss) / 2**20)
    for task in everybody:
        task.cancel()
    for failure in await asyncio.gather(*everybody, return_exceptions=True):
        if not isinstance(failure, asyncio.CancelledError):
            load.errors.append(f"the load itself: {failure!r}")
    return rss_mib


async def _submit(load: Load, line: Connection) -> None:
    async with asyncio.timeout(ANSWER_S):
        answer = await line.ask("POST", "/v1/jobs", body=BODY)
    if answer.status != 202:
        raise BenchmarkError(f"a submission was answered by {answer.status}: {answer.body[:500]!r}")
    load.line.append(json.loads(answer.body)["id"])


async def _poll(load: Load, pollers: int, *, waits: bool) -> None:
    """Look at one job after the other, each LOOKS times, over a connection that is kept."""
    await asyncio.sleep(load.dice.uniform(0, POLL_S))
    while True:
        try:
            async with connected(load.port) as line:
                while True:
                    await _watch(load, line, load.any_near_the_head(pollers), waits=waits)
        except (*CUT, TimeoutError) as error:
            load.errors.append(f"a poll: {error!r}")
            await asyncio.sleep(POLL_S)


async def _floor(load: Load) -> None:
    async with connected(load.port) as line:
        while True:
            begun = time.perf_counter()
            await line.ask("GET", "/healthz")
            load.floor_s.append(time.perf_counter() - begun)
            await asyncio.sleep(FLOOR_S)


async def _watch(load: Load, line: Connection, job_id: str, *, waits: bool) -> None:
    path = f"/v1/jobs/{job_id}" + (f"?wait={WAIT_S}" if waits else "")
    etag = None
    for _ in range(LOOKS):
        begun = time.perf_counter()
        async with asyncio.timeout(ANSWER_S):
            answer = await line.ask("GET", path, headers={} if etag is None else {"If-None-Match": etag})
        took_s = time.perf_counter() - begun
        load.statuses[str(answer.status)] += 1
        if answer.status not in {200, 304} or (answer.status == 200) == (answer.headers.get("etag") == etag):
            load.errors.append(f"{path} with the ETag {etag}: {answer.status}, {answer.headers.get('etag')}, {answer.body[:200]!r}")
            return
        etag = answer.headers["etag"]
        if not waits:
            load.polls_s.append(took_s)
            await asyncio.sleep(load.dice.uniform(0.5, 1.5) * POLL_S)
        elif answer.status == 304:
            load.late_s.append(took_s - WAIT_S)
        elif json.loads(answer.body)["state"] not in LIVE:
            return  # it would be answered at once from now on


async def _stream(load: Load) -> None:
    """Follow one job after the other to its end; each that ends makes room for another."""
    while True:
        job_id = load.next_in_line()
        heard = load.heard[job_id] = []
        while job_id not in load.ended:
            try:
                await _listen(load, job_id, heard)
            except (*CUT, Refused) as error:
                load.errors.append(f"the stream of {job_id}: {error!r}")
                await asyncio.sleep(POLL_S)


async def _listen(load: Load, job_id: str, heard: list[dict[str, Any]]) -> None:
    opened_at = time.time()
    async with connected(load.port) as line:
        async for frame in line.frames(job_id, after=len(heard)):
            if frame.id is None:
                load.ended[job_id] = json.loads(frame.data)["state"]
                continue
            event = json.loads(frame.data)
            heard.append(event)
            at = _seconds(event)
            if at >= opened_at:  # what was there before is read as fast as it can be, and says nothing
                load.lags_s.append(time.time() - at)
        await _submit(load, line)


# --- the verdict -----------------------------------------------------------------------------------------------------------------


async def _verdict(load: Load, ended_at: float) -> tuple[int, Counter[str]]:
    """Events that were stored in good time and not heard, or not as stored; and how many jobs are in which state."""
    lost = 0
    async with connected(load.port) as line:
        for job_id, heard in load.heard.items():
            stored = await _stored(line, job_id)
            due = [event for event in stored if job_id in load.ended or _seconds(event) < ended_at - SETTLED_S]
            same = sum(one == other for one, other in zip(heard, stored, strict=False))
            lost += max(0, len(due) - same)
            if same < len(heard):
                load.errors.append(f"{job_id}: {len(heard) - same} events were heard otherwise than they are stored, or twice")
        return lost, await _states(line)


async def _stored(line: Connection, job_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    while True:
        page = await _get(line, f"/v1/jobs/{job_id}/events?limit=1000&after={len(found)}")
        found += page["data"]
        if not page["has_more"]:
            return found


async def _states(line: Connection) -> Counter[str]:
    states: Counter[str] = Counter()
    path = "/v1/jobs?limit=100"
    while True:
        page = await _get(line, path)
        states.update(job["state"] for job in page["data"])
        if not page["has_more"]:
            return states
        path = f"/v1/jobs?limit=100&after={page['last_id']}"


async def _get(line: Connection, path: str) -> dict[str, Any]:
    answer = await line.ask("GET", path)
    if answer.status != 200:
        raise BenchmarkError(f"{path} was answered by {answer.status}: {answer.body[:500]!r}")
    document: dict[str, Any] = json.loads(answer.body)
    return document


def _seconds(event: dict[str, Any]) -> float:
    return datetime.fromisoformat(event["at"]).timestamp()


def _cpu_s(process: psutil.Process) -> float:
    return float(sum(process.cpu_times()[:2]))


def _table(result: Result) -> str:
    polls, late, lag = result["poll_ms"], result["late_ms"], result["lag_s"]

    def three(name: str, values: Tail, unit: str, goal: str = "") -> str:
        figures = "".join(f"{values[part]:>9.3g} {unit}" for part in ("p50", "p95", "p99", "max"))
        return f"{name:<42}{figures}{goal}   ({values['n']})"

    lines = [
        report.heading(result),
        (
            f"{result['minutes']:g} minutes, {result['jobs']} jobs queued, {result['workers']} workers, {result['pollers']} pollers, "
            f"{result['streams']} streams"
        ),
        f"{'jobs finished, a minute':<42}{result['finished_jobs']:>9} {result['finished_per_min']:>9.1f}",
        f"{'errors':<42}{result['errors']:>9}   bar 0",
        f"{'failed jobs':<42}{result['failed_jobs']:>9}   bar 0",
        f"{'events lost, of those heard':<42}{result['lost_events']:>9} {result['heard_events']:>9}   bar 0",
        f"{'':<42}{'median':>9}   {'p95':>9}   {'p99':>9}   {'max':>9}",
        three("polls", polls, "ms", f"   bar p99 <= {BARS['poll_p99_ms']:.0f} ms"),
        three("  /healthz meanwhile", result["floor_ms"], "ms"),
        three(f"beyond ?wait={WAIT_S}", late, "ms"),
        three("an event to its stream", lag, "s ", f"   bar p99 <= {BARS['lag_p99_s']:.0f} s"),
        (
            f"{'memory of the API, first and last minute':<42}{result['rss_first_mib']:>7.0f} MiB {result['rss_last_mib']:>7.0f} MiB"
            f"   bar + {BARS['growth_mib']:.0f} MiB"
        ),
        f"{'CPU of the API, of this load (of a core)':<42}{result['api_cpu']:>9.0%} {result['generator_cpu']:>9.0%}",
        *(f"error: {one}" for one in result["faults"]),
        f"MISSED: {', '.join(result['missed'])}" if result["missed"] else "every bar was held",
    ]
    return "\n".join(lines + report.crowding(result["others_share"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="The whole service under load: pollers, streams and jobs that train")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--jobs", type=int, default=1000, help="queued, at the start and all the time")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pollers", type=int, default=50)
    parser.add_argument("--streams", type=int, default=50)
    parser.add_argument("--quick", action="store_true", help="a quarter of a minute, few of everything: shows that it works")
    report.add_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
