"""/v1/jobs/{id}/events: what has happened to a job, as a list or as it happens."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated

import structlog
from fastapi import APIRouter, Header, Query
from fastapi.responses import JSONResponse
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from api import errors
from api.access import WithCaller
from api.documents import EventListDocument
from api.errors import parameter_error
from api.openapi import STORED, problems
from api.parts import JobId, Parts, WithParts
from api.strict import StrictRoute
from api.tailer import follow
from powergrad.jobs import queries
from powergrad.jobs.store import is_unavailable

LARGEST_SEQ = 2**63 - 1
EVENT_STREAM = "text/event-stream"

log = structlog.get_logger(__name__)
router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["events"], route_class=StrictRoute)

STREAM_EXAMPLE = (
    "id: 3\nevent: state\n"
    'data: {"seq":3,"at":"2026-11-23T09:10:32.120Z","type":"state","data":{"from":"queued","to":"running","attempt":1}}\n\n'
    ': ping\n\nevent: end\ndata: {"state":"succeeded"}\n\n'
)


@router.get(
    "/events",
    operation_id="listEvents",
    summary="What happened to a job",
    response_model=EventListDocument,
    responses={
        200: {
            "description": "With `Accept: text/event-stream` a stream: `id` is the event's number, which `Last-Event-ID` goes on from; it "
            "ends, after the job's last event, with a frame `event: end` that carries no id.",
            "content": {EVENT_STREAM: {"schema": {"type": "string"}, "example": STREAM_EXAMPLE}},
        },
        **problems(*STORED, errors.JOB_NOT_FOUND),
    },
)
async def events(
    parts: WithParts,
    caller: WithCaller,
    job_id: JobId,
    accept: Annotated[str, Header(include_in_schema=False)] = "",
    after: Annotated[int, Query(ge=0, le=LARGEST_SEQ, description="Number of the last event seen.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000, description="Of a list; a stream has no end but the job's.")] = 100,
    last_event_id: Annotated[
        str | None, Header(description="Of a stream: the same as `after`, and stronger.", json_schema_extra={"pattern": "^[0-9]{0,18}$"})
    ] = None,
) -> Response:
    seen = _number(last_event_id) if last_event_id else after  # looked at first: a wrong one is wrong for a list too
    if EVENT_STREAM not in accept:
        return await run_in_threadpool(_list, parts, job_id, caller.owner, after, limit)
    await run_in_threadpool(_check, parts, job_id, caller.owner)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", "Vary": "Accept"}
    return EventSourceResponse(_stream(parts, job_id, seen), headers=headers)


def _list(parts: Parts, job_id: str, owner: str, after: int, limit: int) -> Response:
    with parts.store.read() as tx:
        queries.exists(tx, job_id, owner=owner)
        found = queries.events_after(tx, job_id, after, limit=limit + 1)
    return JSONResponse({"object": "list", "data": found[:limit], "has_more": len(found) > limit}, headers={"Vary": "Accept"})


def _check(parts: Parts, job_id: str, owner: str) -> None:
    with parts.store.read() as tx:
        queries.exists(tx, job_id, owner=owner)


def _number(last_event_id: str) -> int:
    if not last_event_id.isascii() or not last_event_id.isdigit() or len(last_event_id) > 18:
        raise parameter_error("Last-Event-ID", "bad_format", "must be the number of an event", last_event_id[:64])
    return int(last_event_id)


async def _stream(parts: Parts, job_id: str, after: int) -> AsyncIterator[bytes]:
    tailer = parts.tailer
    assert tailer is not None, "the application has started"
    try:
        with tailer.watch(job_id, events=True) as watcher, parts.measures.streams.track_inprogress():
            async for frames in follow(tailer, watcher, after=after, quiet_s=parts.settings.ping_s):
                yield KEEPALIVE_COMMENT if frames is None else b"".join(frame.data for frame in frames)
            if not tailer.is_stopping and watcher.pulse is not None:
                yield format_sse_event(data_str=json.dumps({"state": watcher.pulse.state or "deleted"}), event="end")
    except Exception as error:  # the head is out: all that can be said is the end of the connection, and the reader comes again
        if not is_unavailable(error):
            raise
        log.warning("event stream cut: database away", job=job_id)
