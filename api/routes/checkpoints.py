"""/v1/jobs/{id}/checkpoints: which there are, and their weights."""

from __future__ import annotations

import base64
import re
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path
from fastapi.responses import JSONResponse
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from api import errors
from api.documents import CheckpointListDocument
from api.errors import Refused
from api.etags import matches
from api.openapi import STORED, problems
from api.parts import JobId, WithParts
from api.ranges import Unsatisfiable, span_of
from powergrad.jobs import queries
from powergrad.jobs.errors import CheckpointNotFound
from powergrad.jobs.lifecycle import job_dir
from powergrad.jobs.queries import StoredCheckpoint

WEIGHTS = "model.safetensors"
MEDIA_TYPE = "application/octet-stream"
CHECKPOINT_ID = re.compile(r"best|latest|step-\d{8,18}", re.ASCII)

router = APIRouter(prefix="/v1/jobs/{job_id}/checkpoints", tags=["checkpoints"])


@router.get(
    "",
    operation_id="listCheckpoints",
    summary="A job's checkpoints, newest first",
    response_model=CheckpointListDocument,
    responses=problems(*STORED, errors.JOB_NOT_FOUND),
)
def checkpoints(parts: WithParts, job_id: JobId) -> Response:
    with parts.store.read() as tx:
        found = queries.list_checkpoints(tx, job_id)
    return JSONResponse({"object": "list", "data": found})


FILE_HEADERS: dict[str, Any] = {
    "Content-Length": {"schema": {"type": "integer"}},
    "Accept-Ranges": {"schema": {"type": "string", "enum": ["bytes"]}},
    "ETag": {"schema": {"type": "string"}, "description": "The file's sha256."},
    "Repr-Digest": {"schema": {"type": "string"}, "description": "The whole file's sha-256 (RFC 9530)."},
}
FILE: dict[str, Any] = {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}
DOWNLOAD: dict[int | str, dict[str, Any]] = {
    200: {"description": "The file.", "headers": FILE_HEADERS, "content": FILE},
    206: {
        "description": "The range asked for.",
        "headers": FILE_HEADERS | {"Content-Range": {"schema": {"type": "string"}}},
        "content": FILE,
    },
    304: {"description": "If-None-Match has it already."},
    **problems(*STORED, errors.JOB_NOT_FOUND, errors.CHECKPOINT_NOT_FOUND, errors.BAD_RANGE),
}


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
    responses={status: {key: value for key, value in said.items() if key != "content"} for status, said in DOWNLOAD.items()},
)
def weights(
    parts: WithParts,
    request: Request,
    job_id: JobId,
    checkpoint_id: Annotated[str, Path(description="An id, `best` or `latest`.", examples=["best", "step-00000800"])],
    range_: Annotated[str | None, Header(alias="Range", description="One range of bytes.")] = None,
    if_range: Annotated[str | None, Header(description="ETag that the range is of; another file is sent whole.")] = None,
    if_none_match: Annotated[str | None, Header(description="ETag of the file that is there.")] = None,
) -> Response:
    if not CHECKPOINT_ID.fullmatch(checkpoint_id):
        raise CheckpointNotFound(job_id, checkpoint_id[:64])
    with parts.store.read() as tx:
        found = queries.find_checkpoint(tx, job_id, checkpoint_id)
    path = f"{job_dir(job_id)}/{found.path}/{WEIGHTS}"
    if parts.artifacts.size(path) != found.bytes:
        raise Refused(errors.CHECKPOINT_NOT_FOUND, f"the file of {found.id} is missing or cut short: take another checkpoint")
    headers = _headers(job_id, found)
    if if_none_match is not None and matches(if_none_match, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    try:
        span = span_of(range_ if if_range in (None, headers["ETag"]) else None, found.bytes)
    except Unsatisfiable:
        unsatisfied = {"Content-Range": f"bytes */{found.bytes}"}
        raise Refused(errors.BAD_RANGE, f"Range: {(range_ or '')[:64]}: the file has {found.bytes} bytes", headers=unsatisfied) from None
    start, length = (0, found.bytes) if span is None else (span.start, span.length)
    headers["Content-Length"] = str(length)
    if span is not None:
        headers["Content-Range"] = f"bytes {start}-{start + length - 1}/{found.bytes}"
    status = 200 if span is None else 206
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=MEDIA_TYPE)
    return StreamingResponse(parts.artifacts.stream(path, start, length), status_code=status, headers=headers, media_type=MEDIA_TYPE)


def _headers(job_id: str, found: StoredCheckpoint) -> dict[str, str]:
    digest = base64.b64encode(bytes.fromhex(found.sha256)).decode()
    return {
        "Accept-Ranges": "bytes",
        "ETag": f'"{found.sha256}"',
        "Repr-Digest": f"sha-256=:{digest}:",
        "Content-Disposition": f'attachment; filename="{job_id}-{found.id}.safetensors"',
        "Cache-Control": "no-cache",  # best and latest move; a fixed id is found unchanged by its ETag
    }
