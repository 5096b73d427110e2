"""/v1/jobs as a list: whole or as lines of a table, filtered, sorted, live; and one move for many."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from api import answers, errors
from api.access import WithCaller
from api.answers import IfNoneMatch, WaitS
from api.bodies import JsonBody, checked, required
from api.documents import BulkActionDocument, JobListDocument, JobSummaryListDocument
from api.errors import KINDS, parameter_error
from api.etags import matches
from api.filters import BY_LABEL, WithFilter, each_once
from api.openapi import BODY, CHANGES, STORED, json_request, problems
from api.parts import JOB_ID, Parts, WithParts
from api.routes.metrics import MetricName
from api.strict import StrictRoute
from powergrad.jobs import bulk, queries
from powergrad.jobs.bulk import Action
from powergrad.jobs.errors import JobError
from powergrad.jobs.states import JobState
from powergrad.jobs.store import Tx
from powergrad.spec import SpecModel

SORT_PATTERN = r"^(-created_at|-?metrics\.[A-Za-z0-9_]{1,64})$"
FIELD_PATTERN = r"^[a-z_]{1,40}(\.[A-Za-z0-9_-]{1,64}){0,3}$"
MOST_WHOLE, MOST_LINES, MOST_MOVED = 100, 500, 500
LOOK_S = 0.5
"""Between looks at a list that is waited for: by the index of its owner's jobs, some milliseconds."""
LOOK_FURTHER_S = 2.0
"""Between looks that read all of an owner's jobs, to sort or to search them, and between whole looks while some wait in the queue:
what they wait for moves without their rows."""
MANY = {"id": "job_01KAQZ5V3N8T4W6Y7C9E1G2H3J"}

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], route_class=StrictRoute)
JobIdText = Annotated[str, Field(pattern=f"^{JOB_ID.pattern}$")]


@dataclass(frozen=True)
class Question:
    """What a list is asked for."""

    wanted: queries.Filter
    limit: int
    after: str | None
    sort: str | None
    view: Literal["full", "summary"]
    metrics: list[str]
    fields: list[str]

    def answer(self, tx: Tx) -> queries.Page:
        if self.view == "full":
            return queries.page(tx, self.wanted, limit=self.limit, after=self.after, sort=self.sort)
        told = {"metrics": self.metrics, "fields": self.fields}
        return queries.summaries(tx, self.wanted, limit=self.limit, after=self.after, sort=self.sort, **told)

    def pulse(self, tx: Tx) -> list[tuple[str, int]]:
        return queries.page_pulse(tx, self.wanted, limit=self.limit, after=self.after, sort=self.sort)

    @property
    def look_s(self) -> float:
        return LOOK_FURTHER_S if self.sort or self.wanted.q else LOOK_S


@router.get(
    "",
    operation_id="listJobs",
    summary="List jobs, newest first",
    response_model=JobListDocument | JobSummaryListDocument,
    responses={
        200: {
            "description": "A page of whole jobs, or with `view=summary` of the lines of a table.",
            "headers": {"ETag": {"schema": {"type": "string"}, "description": "Changes whenever this very page does."}},
        },
        304: {"description": "Nothing has changed since If-None-Match."},
        **problems(*STORED, errors.JOB_NOT_FOUND),
    },
    openapi_extra={"parameters": [BY_LABEL]},
)
async def list_jobs(
    parts: WithParts,
    wanted: WithFilter,
    limit: Annotated[int, Query(ge=1, le=MOST_LINES, description=f"At most {MOST_WHOLE} of whole jobs.")] = 20,
    after: Annotated[str | None, Query(description="`last_id` of the page before.", pattern=f"^{JOB_ID.pattern}$")] = None,
    state: Annotated[list[JobState] | None, Query(description="Repeat for several.")] = None,
    sort: Annotated[
        str | None, Query(pattern=SORT_PATTERN, description="-created_at, or by a best metric: -metrics.val_top1 is best first.")
    ] = None,
    view: Annotated[Literal["full", "summary"], Query(description="Whole jobs, or the lines of a table.")] = "full",
    metric: Annotated[list[MetricName] | None, Query(max_length=16, description="Of a summary: the metrics to tell.")] = None,
    field: Annotated[
        list[Annotated[str, Field(pattern=FIELD_PATTERN)]] | None,
        Query(max_length=16, description="Of a summary: values of the spec to tell, by dotted name, such as optimizer.lr."),
    ] = None,
    if_none_match: IfNoneMatch = None,
    wait: WaitS = None,
) -> Response:
    """A page that is live: ask with the ETag seen last and `wait`, and the answer comes as soon as the page looks different."""
    if view == "full" and limit > MOST_WHOLE:
        raise parameter_error("limit", "out_of_range", f"must be at most {MOST_WHOLE}, or with view=summary {MOST_LINES}", str(limit))
    question = Question(
        replace(wanted, states=each_once(state)),
        limit=limit,
        after=after,
        sort=None if sort == "-created_at" else sort,
        view=view,
        metrics=list(metric or ("train_loss", "val_loss", "val_top1", "test_top1")),
        fields=list(field or ()),
    )
    if wait and if_none_match is not None:
        return await _when_changed(parts, question, seen=if_none_match, wait_s=wait)
    return (await run_in_threadpool(_look, parts, question)).unless(if_none_match)


@dataclass(frozen=True)
class Seen:
    """A page as an answer, the pulse of what it was made from, and when to look again though that has not moved."""

    response: Response
    pulse: list[tuple[str, int]]
    good_for_s: float

    @property
    def tag(self) -> str:
        return self.response.headers["ETag"]

    def unless(self, if_none_match: str | None) -> Response:
        if if_none_match is not None and matches(if_none_match, self.tag):
            return Response(status_code=304, headers={"ETag": self.tag, "Cache-Control": "no-cache"})
        return self.response


def _look(parts: Parts, question: Question) -> Seen:
    with parts.store.read() as tx:
        pulse, page = question.pulse(tx), question.answer(tx)
    in_line = any(job["state"] == JobState.QUEUED for job in page.data)
    return Seen(answers.tagged(answers.listed(page)), pulse, LOOK_FURTHER_S if in_line else math.inf)


async def _when_changed(parts: Parts, question: Question, *, seen: str, wait_s: float) -> Response:
    tailer = parts.tailer
    assert tailer is not None, "the application has started"
    now = asyncio.get_running_loop().time
    until = now() + wait_s
    with parts.measures.streams.track_inprogress():
        found, looked_at = await tailer.run(_look, parts, question), now()
        while matches(seen, found.tag) and now() < until and not tailer.is_stopping:
            await asyncio.sleep(max(0.0, min(question.look_s, until - now())))
            if now() - looked_at > found.good_for_s or await tailer.read(question.pulse) != found.pulse:
                found, looked_at = await tailer.run(_look, parts, question), now()
    return found.unless(seen)


class IdsBody(SpecModel):
    ids: Annotated[list[JobIdText], Field(min_length=1, max_length=MOST_MOVED)]
    """Each is moved by itself; one that is named twice is moved once."""


def _movable(action: Action, summary: str) -> Callable[[Callable[..., Response]], Callable[..., Response]]:
    return router.post(
        f"/{action}",
        operation_id=f"{action}Jobs" if action != "delete" else "deleteJobsById",
        summary=summary,
        response_model=BulkActionDocument,
        responses={
            200: {"description": "What could be done is done; `refused` tells of each other job what the call for it alone would answer."},
            **problems(*STORED, *CHANGES, *BODY),
        },
        openapi_extra=json_request(IdsBody, examples={"one": {"ids": [MANY["id"]]}}),
    )


@_movable("cancel", "End many jobs")
def cancel(parts: WithParts, caller: WithCaller, body: JsonBody) -> Response:
    return _moved(parts, "cancel", body, owner=caller.owner)


@_movable("pause", "Pause many jobs")
def pause(parts: WithParts, caller: WithCaller, body: JsonBody) -> Response:
    return _moved(parts, "pause", body, owner=caller.owner)


@_movable("resume", "Queue many paused jobs again")
def resume(parts: WithParts, caller: WithCaller, body: JsonBody) -> Response:
    return _moved(parts, "resume", body, owner=caller.owner)


@_movable("delete", "Delete many jobs that have ended, with their files")
def delete(parts: WithParts, caller: WithCaller, body: JsonBody) -> Response:
    return _moved(parts, "delete", body, owner=caller.owner)


def _moved(parts: Parts, action: Action, body: Any, *, owner: str) -> Response:
    moved = bulk.move(parts.store, action, checked(IdsBody, required(body)).ids, owner=owner)
    if action == "resume" and moved.done:
        parts.doorbell.ring()
    refused = [_refusal(job_id, error) for job_id, error in moved.refused.items()]
    return JSONResponse({"object": "bulk_action", "action": action, "done": moved.done, "refused": refused})


def _refusal(job_id: str, error: JobError) -> dict[str, str]:
    kind = KINDS.get(type(error), errors.INTERNAL)
    return {"id": job_id, "code": kind.code, "detail": str(error)}


BODIES = (IdsBody,)
