"""/v1/usage and /v1/owners: what an owner has, and may have."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path
from fastapi.responses import JSONResponse
from pydantic import Field
from starlette.responses import Response

from api.access import WithCaller
from api.bodies import JsonBody, checked, required
from api.documents import QuotaDocument, UsageDocument
from api.openapi import BODY, CHANGES, STORED, json_request, problems
from api.parts import WithParts
from api.strict import StrictRoute
from powergrad.jobs import quotas
from powergrad.jobs.quotas import Quota
from powergrad.spec import NAME_PATTERN, SpecModel

MOST_JOBS = 2**31 - 1  # the column's
MOST_GPU_S = 1e12
MOST_BYTES = 2**53 - 1  # what every JSON reader holds exactly

router = APIRouter(prefix="/v1", tags=["keys"], route_class=StrictRoute)

OwnerName = Annotated[str, Path(pattern=NAME_PATTERN, description="Name of the owner, as keys give it.", examples=["ada"])]


class QuotaBody(SpecModel):
    """All of an owner's limits: what is left out or null is no limit."""

    queued: int | None = Field(default=None, ge=0, le=MOST_JOBS)
    """Jobs in the queue."""
    running: int | None = Field(default=None, ge=0, le=MOST_JOBS)
    """Jobs that run at a time."""
    gpu_seconds: float | None = Field(default=None, ge=0.0, le=MOST_GPU_S)
    """Seconds on one GPU, summed over all jobs ever; on two GPUs each counts twice."""
    bytes: int | None = Field(default=None, ge=0, le=MOST_BYTES)
    """Of checkpoints, artifacts and uploaded data sets."""

    def quota(self) -> Quota:
        return Quota(max_queued=self.queued, max_running=self.running, max_gpu_s=self.gpu_seconds, max_bytes=self.bytes)


BODIES = (QuotaBody,)


@router.get(
    "/usage", operation_id="getUsage", summary="What one has, and may have", response_model=UsageDocument, responses=problems(*STORED)
)
def usage(parts: WithParts, caller: WithCaller) -> Response:
    with parts.store.read() as tx:
        found = quotas.usage(tx, caller.owner)
    return JSONResponse({**found, "key": caller.key_id, "scopes": sorted(caller.scopes)})


@router.get(
    "/owners/{owner}/quota",
    operation_id="getQuota",
    summary="What an owner has, and may have",
    response_model=QuotaDocument,
    responses=problems(*STORED),
)
def get_quota(parts: WithParts, owner: OwnerName) -> Response:
    with parts.store.read() as tx:
        return JSONResponse({**quotas.usage(tx, owner), "object": "quota"})


@router.put(
    "/owners/{owner}/quota",
    operation_id="setQuota",
    summary="Set all of an owner's limits",
    response_model=QuotaDocument,
    responses={200: {"description": "What the owner has, and may have from now on."}, **problems(*STORED, *CHANGES, *BODY)},
    openapi_extra=json_request(QuotaBody, examples={"two at a time": {"queued": 100, "running": 2, "gpu_seconds": 360_000}}),
)
def set_quota(parts: WithParts, owner: OwnerName, body: JsonBody) -> Response:
    wanted = checked(QuotaBody, required(body))
    with parts.store.write() as tx:
        quotas.grant(tx, owner, wanted.quota())
        return JSONResponse({**quotas.usage(tx, owner), "object": "quota"})
