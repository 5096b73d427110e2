"""/v1/jobs/{id}/artifacts: what a job's trainers wrote beside the checkpoints: tables, pictures, exports."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Path
from fastapi.responses import JSONResponse
from starlette.responses import Response

from api import downloads, errors
from api.access import WithCaller
from api.documents import ArtifactListDocument
from api.downloads import StoredFile, WithWanted
from api.errors import Refused
from api.openapi import STORED, problems
from api.parts import JobId, WithParts
from api.strict import StrictRoute
from powergrad.jobs import queries
from powergrad.jobs.errors import ArtifactNotFound
from powergrad.jobs.rows import job_dir
from powergrad.spec import NAME_PATTERN

router = APIRouter(prefix="/v1/jobs/{job_id}/artifacts", tags=["artifacts"], route_class=StrictRoute)


@router.get(
    "",
    operation_id="listArtifacts",
    summary="What a job wrote beside its checkpoints",
    response_model=ArtifactListDocument,
    responses=problems(*STORED, errors.JOB_NOT_FOUND),
)
def artifacts(parts: WithParts, caller: WithCaller, job_id: JobId) -> Response:
    with parts.store.read() as tx:
        found = queries.list_artifacts(tx, job_id, owner=caller.owner)
    return JSONResponse({"object": "list", "data": found})


DOWNLOAD = downloads.responses(*STORED, errors.JOB_NOT_FOUND, errors.ARTIFACT_NOT_FOUND, media_type="*/*")


@router.get(
    "/{name}",
    operation_id="downloadArtifact",
    summary="One artifact's file",
    response_class=Response,
    responses=DOWNLOAD,
)
@router.head(
    "/{name}",
    operation_id="headArtifact",
    summary="Size and digest of an artifact's file",
    response_class=Response,
    responses=downloads.without_content(DOWNLOAD),
)
def artifact(
    parts: WithParts,
    caller: WithCaller,
    job_id: JobId,
    name: Annotated[str, Path(description="Its name in the list.", examples=["confusion.json", "model.onnx"])],
    wanted: WithWanted,
) -> Response:
    if not re.fullmatch(NAME_PATTERN, name):
        raise ArtifactNotFound(job_id, name[:64])
    with parts.store.read() as tx:
        found = queries.find_artifact(tx, job_id, name, owner=caller.owner)
    path = f"{job_dir(job_id)}/{found.path}"
    if parts.artifacts.size(path) != found.bytes:
        raise Refused(errors.ARTIFACT_NOT_FOUND, f"the file of {name} is missing or just being written anew: try again")
    file = StoredFile(path, f"{job_id}-{found.name}", found.media_type, found.bytes, found.sha256)
    return downloads.send(parts.artifacts, file, wanted)
