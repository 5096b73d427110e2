"""Files of jobs, sent whole or in part, with a digest to hold them against."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Header
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from api import errors
from api.errors import Kind, Refused
from api.etags import matches
from api.openapi import Responses, problems
from api.ranges import Unsatisfiable, span_of
from powergrad.jobs.artifacts import Artifacts

ANY_BYTES = "application/octet-stream"
HEADERS: dict[str, Any] = {
    "Content-Length": {"schema": {"type": "integer"}},
    "Accept-Ranges": {"schema": {"type": "string", "enum": ["bytes"]}},
    "ETag": {"schema": {"type": "string"}, "description": "The file's sha256."},
    "Repr-Digest": {"schema": {"type": "string"}, "description": "The whole file's sha-256 (RFC 9530)."},
}


@dataclass(frozen=True)
class StoredFile:
    """path: below the artifact root. filename: what a browser is to call it."""

    path: str
    filename: str
    media_type: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Wanted:
    """What a request says of the file it wants."""

    method: str
    range: str | None
    if_range: str | None
    if_none_match: str | None


async def _wanted(
    request: Request,
    range_: Annotated[str | None, Header(alias="Range", description="One range of bytes.")] = None,
    if_range: Annotated[str | None, Header(description="ETag that the range is of; another file is sent whole.")] = None,
    if_none_match: Annotated[str | None, Header(description="ETag of the file that is there.")] = None,
) -> Wanted:
    return Wanted(request.method, range_, if_range, if_none_match)


WithWanted = Annotated[Wanted, Depends(_wanted)]


def responses(*refusals: Kind, media_type: str = ANY_BYTES) -> Responses:
    """The `responses` of a route that sends a file."""
    content: dict[str, Any] = {media_type: {}}  # no schema: OpenAPI 3.1's way to say bytes
    ranged = HEADERS | {"Content-Range": {"schema": {"type": "string"}}}
    return {
        200: {"description": "The file.", "headers": HEADERS, "content": content},
        206: {"description": "The range asked for.", "headers": ranged, "content": content},
        304: {"description": "If-None-Match has it already."},
        **problems(*refusals, errors.BAD_RANGE),
    }


def without_content(said: Responses) -> Responses:
    """The same for HEAD."""
    return {status: {key: value for key, value in response.items() if key != "content"} for status, response in said.items()}


def send(artifacts: Artifacts, file: StoredFile, wanted: Wanted) -> Response:
    """The file, the part of it that is wanted, or 304. Raises Refused (416). The caller has seen that it is there, whole."""
    headers = _headers(file)
    if wanted.if_none_match is not None and matches(wanted.if_none_match, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    try:
        span = span_of(wanted.range if wanted.if_range in (None, headers["ETag"]) else None, file.bytes)
    except Unsatisfiable:
        unsatisfied = {"Content-Range": f"bytes */{file.bytes}"}
        raise Refused(
            errors.BAD_RANGE, f"Range: {(wanted.range or '')[:64]}: the file has {file.bytes} bytes", headers=unsatisfied
        ) from None
    start, length = (0, file.bytes) if span is None else (span.start, span.length)
    headers["Content-Length"] = str(length)
    if span is not None:
        headers["Content-Range"] = f"bytes {start}-{start + length - 1}/{file.bytes}"
    status = 200 if span is None else 206
    if wanted.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=file.media_type)
    return StreamingResponse(artifacts.stream(file.path, start, length), status_code=status, headers=headers, media_type=file.media_type)


def _headers(file: StoredFile) -> dict[str, str]:
    digest = base64.b64encode(bytes.fromhex(file.sha256)).decode()
    return {
        "Accept-Ranges": "bytes",
        "ETag": f'"{file.sha256}"',
        "Repr-Digest": f"sha-256=:{digest}:",
        "Content-Disposition": f'attachment; filename="{file.filename}"',
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",  # best, latest and an artifact's name move; what has not is found unchanged by its ETag
    }
