"""The OpenAPI document: what FastAPI cannot see in the signatures (problems, bodies read by hand) put into it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from api import errors
from api.documents import ProblemDocument
from api.errors import Kind

Responses = dict[int | str, dict[str, Any]]
REFERENCE = "#/components/schemas/{model}"
EVERYWHERE = (errors.FORBIDDEN_HOST, errors.INVALID_REQUEST, errors.INTERNAL)
GUARDED = (errors.UNAUTHENTICATED, errors.FORBIDDEN_SCOPE, errors.UNAVAILABLE)  # the keys are in the database
STORED = (errors.UNAVAILABLE,)  # of every route that asks the database
CHANGES = (errors.FORBIDDEN_ORIGIN, errors.UNSUPPORTED_MEDIA)
BODY = (errors.MALFORMED, errors.TOO_LARGE, errors.INVALID_SPEC)
REFERENCES = (errors.UNKNOWN_REFERENCE, errors.REFERENCE_NOT_READY)
NEW_JOB = (*BODY, *REFERENCES, errors.IDEMPOTENCY_MISMATCH, errors.QUOTA_EXCEEDED, errors.STORAGE_FULL)


def problems(*kinds: Kind, is_open: bool = False) -> Responses:
    """The `responses` of a route that can refuse so. is_open: it asks for no key."""
    by_status: dict[int, list[Kind]] = {}
    for kind in dict.fromkeys((*EVERYWHERE, *(() if is_open else GUARDED), *kinds)):
        by_status.setdefault(kind.status, []).append(kind)
    return {status: _response(found) for status, found in sorted(by_status.items())}


def _response(kinds: list[Kind]) -> dict[str, Any]:
    examples = {
        kind.code: {
            "summary": kind.title,
            "value": {
                "type": f"urn:powergrad:problem:{kind.code}",
                "title": kind.title,
                "status": kind.status,
                "detail": kind.about,
                "instance": "/v1/jobs",
                "code": kind.code,
            },
        }
        for kind in kinds
    }
    described: dict[str, Any] = {"description": " ".join(f"`{kind.code}`: {kind.about}" for kind in kinds)}
    described["content"] = {errors.MEDIA_TYPE: {"schema": {"$ref": REFERENCE.format(model=errors.SCHEMA_NAME)}, "examples": examples}}
    if kinds[0].status == 503:
        described["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds to wait."}}
    return described


def json_request(model: type[BaseModel], *, is_required: bool = True, examples: dict[str, Any] | None = None) -> dict[str, Any]:
    """`openapi_extra` of a route that reads its body itself."""
    media: dict[str, Any] = {"schema": {"$ref": REFERENCE.format(model=model.__name__)}}
    if examples:
        media["examples"] = {name: {"value": value} for name, value in examples.items()}
    return {"requestBody": {"required": is_required, "content": {"application/json": media}}}


def binary_request(media_types: Iterable[str]) -> dict[str, Any]:
    """`openapi_extra` of a route whose body is a file."""
    return {"requestBody": {"required": True, "content": {one: {"schema": {"type": "string", "format": "binary"}} for one in media_types}}}


def install(app: FastAPI, bodies: Iterable[type[BaseModel]]) -> None:
    """Serve a document that holds the schemas of `bodies` and of the problem too."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, list(bodies))
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's documented way


def _document(app: FastAPI, bodies: list[type[BaseModel]]) -> dict[str, Any]:
    found = get_openapi(
        title=app.title, version=app.version, summary=app.summary, description=app.description, routes=app.routes, tags=app.openapi_tags
    )
    shown: list[type[BaseModel]] = [*bodies, ProblemDocument]
    _, extra = models_json_schema([(model, "validation") for model in shown], ref_template=REFERENCE)
    schemas = found.setdefault("components", {}).setdefault("schemas", {})
    for name, schema in extra["$defs"].items():
        schemas.setdefault(name, schema)
    schemas[errors.SCHEMA_NAME] = schemas.pop(ProblemDocument.__name__)
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own, which nothing here sends
        schemas.pop(name, None)
    return found
