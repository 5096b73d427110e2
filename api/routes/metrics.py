"""/v1/jobs/{id}/metrics: series of numbers, thinned out for a plot or whole."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Header, Query
from fastapi.responses import JSONResponse
from pydantic import Field
from starlette.responses import Response

from api import errors
from api.access import WithCaller
from api.documents import SeriesListDocument
from api.openapi import STORED, problems
from api.parts import JobId, WithParts
from api.strict import StrictRoute
from powergrad.jobs import metrics, queries
from powergrad.jobs.metrics import Series

DEFAULT_POINTS = 500
LARGEST_STEP = 2**63 - 1
CSV = "text/csv"
MetricName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["metrics"], route_class=StrictRoute)


@router.get(
    "/metrics",
    operation_id="getMetrics",
    summary="A job's metric series",
    response_model=SeriesListDocument,
    responses={
        200: {
            "description": "By name. With `Accept: text/csv` a table: a row per step, a column per series, all points unless `points` is given.",
            "content": {CSV: {"schema": {"type": "string"}, "example": "step,train_loss,val_top1\n1,2.31,\n2,2.27,0.31\n"}},
        },
        **problems(*STORED, errors.JOB_NOT_FOUND),
    },
)
def series(
    parts: WithParts,
    caller: WithCaller,
    job_id: JobId,
    accept: Annotated[str, Header(include_in_schema=False)] = "",
    name: Annotated[list[MetricName] | None, Query(max_length=64, description="Repeat for several; all by default.")] = None,
    points: Annotated[
        int | None, Query(ge=4, le=100_000, description=f"At most about so many of each, extremes kept; {DEFAULT_POINTS} in JSON.")
    ] = None,
    after: Annotated[int, Query(ge=-1, le=LARGEST_STEP, description="Only points at steps above.")] = -1,
) -> Response:
    as_csv = CSV in accept
    wanted = points if as_csv else points or DEFAULT_POINTS
    with parts.store.read() as tx:
        queries.exists(tx, job_id, owner=caller.owner)
        names = list(dict.fromkeys(name)) if name else metrics.names(tx, job_id)
        found = [metrics.read(tx, job_id, one, points=wanted, after=after) for one in names]
    headers = {"Vary": "Accept"}
    if as_csv:
        return Response(table(found), media_type=CSV, headers=headers)
    return JSONResponse({"object": "list", "data": [vars(one) for one in found]}, headers=headers)


def table(found: Sequence[Series]) -> str:
    """CSV: a row per step, a column per series; empty where a series has no (finite) value."""
    rows: dict[int, list[float | None]] = {}
    for column, one in enumerate(found):
        for step, value in zip(one.steps, one.values, strict=True):
            rows.setdefault(step, [None] * len(found))[column] = value
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", *(one.name for one in found)])
    writer.writerows([step, *rows[step]] for step in sorted(rows))
    return text.getvalue()
