"""/v1/metrics/compare: one metric of many jobs, thinned out for one plot."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Annotated

from fastapi import APIRouter, Header, Query
from fastapi.responses import JSONResponse
from pydantic import Field
from starlette.responses import Response

from api import errors
from api.documents import ComparisonDocument
from api.etags import matches
from api.filters import BY_LABEL, WithFilter, each_once
from api.openapi import STORED, problems
from api.parts import JOB_ID, WithParts
from api.routes.metrics import MetricName
from api.strict import StrictRoute
from powergrad.jobs import comparisons
from powergrad.jobs.comparisons import MOST_RUNS, Axis, Chosen
from powergrad.jobs.states import JobState

router = APIRouter(prefix="/v1/metrics", tags=["metrics"], route_class=StrictRoute)


@router.get(
    "/compare",
    operation_id="compareJobs",
    summary="One metric of many jobs",
    response_model=ComparisonDocument,
    responses={
        200: {
            "description": "A series of each job, in the order of `job`, or newest first.",
            "headers": {"ETag": {"schema": {"type": "string"}, "description": "Changes whenever one of the jobs does."}},
        },
        304: {"description": "Nothing has changed since If-None-Match."},
        **problems(*STORED, errors.JOB_NOT_FOUND),
    },
    openapi_extra={"parameters": [BY_LABEL]},
)
def compare(
    parts: WithParts,
    wanted: WithFilter,
    job: Annotated[
        list[Annotated[str, Field(pattern=f"^{JOB_ID.pattern}$")]] | None,
        Query(max_length=MOST_RUNS, description=f"Ids; without them the newest {MOST_RUNS} jobs that fit the filters."),
    ] = None,
    state: Annotated[list[JobState] | None, Query(description="Repeat for several.")] = None,
    name: Annotated[MetricName, Query(description="The metric.")] = "val_top1",
    points: Annotated[int, Query(ge=4, le=2000, description="At most so many of each series, extremes kept.")] = 300,
    x: Annotated[Axis, Query(description="Against steps, epochs, or seconds of training, estimated from its speed.")] = Axis.STEP,
    if_none_match: Annotated[str | None, Header(description="ETag seen last.")] = None,
) -> Response:
    # a GET, though 500 ids make 17 kB of URL: it changes nothing, so that a key which may only look can ask it and a cache keep it
    with parts.store.read() as tx:
        chosen = comparisons.choose(tx, replace(wanted, states=each_once(state)), job_ids=job or ())
        headers = {"ETag": _etag(chosen, name, points, x), "Cache-Control": "no-cache"}
        if if_none_match is not None and matches(if_none_match, headers["ETag"]):
            return Response(status_code=304, headers=headers)
        data = comparisons.compare(tx, chosen, name, points=points, axis=x)
    return JSONResponse({"object": "comparison", "name": name, "x": x, "has_more": chosen.has_more, "data": data}, headers=headers)


def _etag(chosen: Chosen, name: str, points: int, x: Axis) -> str:
    shown = json.dumps([chosen.version(), chosen.has_more, name, points, x])
    return f'"{hashlib.sha256(shown.encode()).hexdigest()[:32]}"'
