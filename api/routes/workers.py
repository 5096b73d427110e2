"""/v1/workers: who trains."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from starlette.responses import Response

from api.access import WithCaller
from api.documents import WorkerListDocument
from api.openapi import STORED, problems
from api.parts import WithParts
from api.strict import StrictRoute
from powergrad.jobs import fleet
from powergrad.jobs.keys import Scope

router = APIRouter(prefix="/v1/workers", tags=["workers"], route_class=StrictRoute)


@router.get(
    "",
    operation_id="listWorkers",
    summary="The workers that are alive, their devices and what they run",
    response_model=WorkerListDocument,
    responses=problems(*STORED),
)
def workers(parts: WithParts, caller: WithCaller) -> Response:
    with parts.store.read() as tx:
        found = fleet.live_workers(tx, owner=None if Scope.ADMIN in caller.scopes else caller.owner)
    return JSONResponse({"object": "list", "data": found})
