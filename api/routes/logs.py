"""/v1/jobs/{id}/logs: what the trainers of a job's attempts wrote, one after the other, as plain text."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import structlog
from fastapi import APIRouter, Query
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse

from api import errors
from api.access import WithCaller
from api.errors import parameter_error
from api.openapi import STORED, problems
from api.parts import JobId, Parts, WithParts
from api.strict import StrictRoute
from powergrad.jobs import queries
from powergrad.jobs.artifacts import Artifacts
from powergrad.jobs.rows import job_dir
from powergrad.jobs.states import TERMINAL
from powergrad.jobs.store import Tx, is_unavailable

LOOK_S = 0.3  # how often a follower looks at the file: a log line tells nobody that it was written
READ_AT_ONCE = 1 << 18
LARGEST_OFFSET = 2**63 - 1
MEDIA_TYPE = "text/plain; charset=utf-8"

log = structlog.get_logger(__name__)
router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["logs"], route_class=StrictRoute)


HEADERS = {
    "Log-Offset": {
        "schema": {"type": "integer"},
        "description": "Where the text begins: bytes of all attempts' logs before it. That and the bytes received is the `offset` to go on from.",
    },
    "Log-Complete": {
        "schema": {"type": "string", "enum": ["true", "false"]},
        "description": "Whether the job was over when this was asked for: then this text is the end of it.",
    },
}


@dataclass(frozen=True)
class Place:
    """Where a reader is: which attempt's file, how far into it."""

    attempt: int
    offset: int


@dataclass(frozen=True)
class Start:
    """What a request begins with. offset: of `place` in all the logs; is_over: whether the job is."""

    attempts: list[int]
    place: Place
    offset: int
    is_over: bool


@router.get(
    "/logs",
    operation_id="getLogs",
    summary="What a job's trainers wrote",
    response_class=Response,
    responses={
        200: {"description": "Text, attempt after attempt.", "content": {"text/plain": {"schema": {"type": "string"}}}, "headers": HEADERS},
        **problems(*STORED, errors.JOB_NOT_FOUND),
    },
)
async def logs(
    parts: WithParts,
    caller: WithCaller,
    job_id: JobId,
    tail: Annotated[int | None, Query(ge=0, le=1_000_000, description="Only so many of the last lines.")] = None,
    offset: Annotated[int | None, Query(ge=0, le=LARGEST_OFFSET, description="Only what is behind so many bytes; not with `tail`.")] = None,
    follow: Annotated[bool, Query(description="Go on with what is written until the job ends.")] = False,
) -> Response:
    if tail is not None and offset is not None:
        raise parameter_error("offset", "conflict", "must not be given with tail", offset)
    start = await run_in_threadpool(_start, parts, job_id, caller.owner, tail, offset)
    headers = {
        "Cache-Control": "no-store",
        "X-Accel-Buffering": "no",
        "X-Content-Type-Options": "nosniff",
        "Log-Offset": str(start.offset),
        "Log-Complete": str(start.is_over).lower(),
    }
    if follow:
        return StreamingResponse(_follow(parts, job_id, caller.owner, start.place), media_type=MEDIA_TYPE, headers=headers)
    return StreamingResponse(_written(parts.artifacts, job_id, start.attempts, start.place), media_type=MEDIA_TYPE, headers=headers)


def log_path(job_id: str, attempt: int) -> str:
    return f"{job_dir(job_id)}/logs/a{attempt}.log"


def _start(parts: Parts, job_id: str, owner: str, tail: int | None, offset: int | None) -> Start:
    with parts.store.read() as tx:
        attempts = queries.attempt_numbers(tx, job_id, owner=owner)
        _, is_over = _standing(tx, job_id, owner)
    if tail is None:
        place = place_of_offset(parts.artifacts, job_id, attempts, offset or 0)
    else:
        place = place_of_tail(parts.artifacts, job_id, attempts, tail)
    before = sum(parts.artifacts.size(log_path(job_id, attempt)) or 0 for attempt in attempts if attempt < place.attempt)
    return Start(attempts, place, before + place.offset, is_over)


def place_of_offset(artifacts: Artifacts, job_id: str, attempts: Sequence[int], offset: int) -> Place:
    """Where byte `offset` of all logs is; the end, where they are not that long."""
    place = Place(1, 0)
    for attempt in attempts:
        size = artifacts.size(log_path(job_id, attempt)) or 0
        place = Place(attempt, min(offset, size))
        if offset <= size:
            break
        offset -= size
    return place


def place_of_tail(artifacts: Artifacts, job_id: str, attempts: Sequence[int], lines: int) -> Place:
    """Where the last `lines` lines of all logs begin; read backwards in blocks, so that a long log costs only its end."""
    left, place = lines, Place(attempts[-1] if attempts else 1, 0)
    for attempt in reversed(attempts):
        path = log_path(job_id, attempt)
        size = end = artifacts.size(path) or 0
        if left == 0:
            return place if place.offset else Place(attempt, size)
        while end > 0:
            start = max(0, end - READ_AT_ONCE)
            block = b"".join(artifacts.stream(path, start, end - start))
            at = len(block) - (end == size and block.endswith(b"\n"))  # the last line's own end begins no other
            while (at := block.rfind(b"\n", 0, at)) >= 0:
                left -= 1
                if left == 0:
                    return Place(attempt, start + at + 1)
            end = start
        if size:
            left -= 1
            place = Place(attempt, 0)
            if left == 0:
                return place
    return place


def _written(artifacts: Artifacts, job_id: str, attempts: Sequence[int], start: Place) -> Iterator[bytes]:
    for attempt in attempts:
        if attempt >= start.attempt:
            try:
                yield from artifacts.stream(log_path(job_id, attempt), start.offset if attempt == start.attempt else 0)
            except FileNotFoundError:
                continue  # claimed, and nothing written yet


async def _follow(parts: Parts, job_id: str, owner: str, place: Place) -> AsyncIterator[bytes]:
    tailer = parts.tailer
    assert tailer is not None, "the application has started"
    try:
        with tailer.watch(job_id) as watcher, parts.measures.streams.track_inprogress():
            while not tailer.is_stopping:
                newest, is_over = await tailer.read(lambda tx: _standing(tx, job_id, owner))
                # the state is read before the file: what was written before the end is then surely seen
                while True:
                    block = await tailer.run(_block, parts.artifacts, job_id, place)
                    if block:
                        place = Place(place.attempt, place.offset + len(block))
                        yield block
                    elif place.attempt < newest:
                        place = Place(place.attempt + 1, 0)
                    else:
                        break
                if is_over:
                    return
                await watcher.changed(LOOK_S)
    except Exception as error:  # the head is out: the end of the connection is all that can be said
        if not is_unavailable(error):
            raise
        log.warning("log stream cut: database away", job=job_id)


def _standing(tx: Tx, job_id: str, owner: str) -> tuple[int, bool]:
    """The newest attempt's number, and whether the job is over (or gone)."""
    pulse = queries.pulse(tx, [job_id]).get(job_id)
    if pulse is None:
        return 0, True
    return max(queries.attempt_numbers(tx, job_id, owner=owner), default=0), pulse[2] in TERMINAL


def _block(artifacts: Artifacts, job_id: str, place: Place) -> bytes:
    path = log_path(job_id, place.attempt)
    size = artifacts.size(path) or 0
    if size <= place.offset:
        return b""
    return b"".join(artifacts.stream(path, place.offset, min(READ_AT_ONCE, size - place.offset)))
