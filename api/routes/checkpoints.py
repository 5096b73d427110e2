"""/v1/jobs/{id}/checkpoints: which there are, and their weights."""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path
from fastapi.responses import JSONResponse
from starlette.responses import Response

from api import downloads, errors
from api.access import WithCaller
from api.documents import CheckpointDocument, CheckpointListDocument
from api.downloads import StoredFile, WithWanted
from api.errors import Refused
from api.openapi import STORED, problems
from api.parts import JobId, Parts, WithParts
from api.strict import StrictRoute
from powergrad.jobs import queries, retention
from powergrad.jobs.errors import CheckpointNotFound
from powergrad.jobs.rows import job_dir

WEIGHTS = "model.safetensors"
CHECKPOINT_ID = re.compile(r"best|latest|step-\d{8,18}", re.ASCII)

router = APIRouter(prefix="/v1/jobs/{job_id}/checkpoints", tags=["checkpoints"], route_class=StrictRoute)


async def _checkpoint_name(
    job_id: JobId,
    checkpoint_id: Annotated[str, Path(description="An id, `best` or `latest`.", examples=["best", "step-00000800"])],
) -> str:
    if not CHECKPOINT_ID.fullmatch(checkpoint_id):
        raise CheckpointNotFound(job_id, checkpoint_id[:64])
    return checkpoint_id


CheckpointName = Annotated[str, Depends(_checkpoint_name)]


@router.get(
    "",
    operation_id="listCheckpoints",
    summary="A job's checkpoints, newest first",
    response_model=CheckpointListDocument,
    responses=problems(*STORED, errors.JOB_NOT_FOUND),
)
def checkpoints(parts: WithParts, caller: WithCaller, job_id: JobId) -> Response:
    with parts.store.read() as tx:
        found = queries.list_checkpoints(tx, job_id, owner=caller.owner)
    return JSONResponse({"object": "list", "data": found})


DOWNLOAD = downloads.responses(*STORED, errors.JOB_NOT_FOUND, errors.CHECKPOINT_NOT_FOUND)


@router.get(
    f"/{{checkpoint_id}}/{WEIGHTS}",
    operation_id="downloadWeights",
    summary="A checkpoint's weights",
    response_class=Response,
    responses=DOWNLOAD,
)
@router.head(
    f"/{{checkpoint_id}}/{WEIGHTS}",
    operation_id="headWeights",
    summary="Size and digest of a checkpoint's weights",
    response_class=Response,
    responses=downloads.without_content(DOWNLOAD),
)
def weights(
    parts: WithParts,
    caller: WithCaller,
    job_id: JobId,
    checkpoint_id: CheckpointName,
    wanted: WithWanted,
) -> Response:
    with parts.store.read() as tx:
        found = queries.find_checkpoint(tx, job_id, checkpoint_id, owner=caller.owner)
    path = f"{job_dir(job_id)}/{found.path}/{WEIGHTS}"
    if parts.artifacts.size(path) != found.bytes:
        raise Refused(errors.CHECKPOINT_NOT_FOUND, f"the file of {found.id} is missing or cut short: take another checkpoint")
    file = StoredFile(path, f"{job_id}-{found.id}.safetensors", downloads.ANY_BYTES, found.bytes, found.sha256)
    return downloads.send(parts.artifacts, file, wanted)


PINNED: dict[int | str, dict[str, Any]] = {
    200: {"description": "The checkpoint as it is now; done before is no error."},
    **problems(*STORED, errors.FORBIDDEN_ORIGIN, errors.UNSUPPORTED_MEDIA, errors.JOB_NOT_FOUND, errors.CHECKPOINT_NOT_FOUND),
}


@router.post(
    "/{checkpoint_id}/pin",
    operation_id="pinCheckpoint",
    summary="Keep a checkpoint, whatever retention says",
    response_model=CheckpointDocument,
    responses=PINNED,
)
def pin(parts: WithParts, caller: WithCaller, job_id: JobId, checkpoint_id: CheckpointName) -> Response:
    return _set_pinned(parts, job_id, checkpoint_id, pinned=True, owner=caller.owner)


@router.post(
    "/{checkpoint_id}/unpin",
    operation_id="unpinCheckpoint",
    summary="Leave a checkpoint to retention again",
    response_model=CheckpointDocument,
    responses=PINNED,
)
def unpin(parts: WithParts, caller: WithCaller, job_id: JobId, checkpoint_id: CheckpointName) -> Response:
    return _set_pinned(parts, job_id, checkpoint_id, pinned=False, owner=caller.owner)


def _set_pinned(parts: Parts, job_id: str, wanted: str, *, pinned: bool, owner: str) -> Response:
    with parts.store.write() as tx:
        found = retention.pin(tx, job_id, wanted, pinned=pinned, owner=owner)
        shown = queries.get_checkpoint(tx, job_id, found, owner=owner)
    return JSONResponse(shown)
