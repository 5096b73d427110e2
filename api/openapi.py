"""The OpenAPI document: what FastAPI cannot see in the signatures (problems, bodies read by hand) put into it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from api import access, errors
from api.documents import ProblemDocument
from api.errors import Kind
from powergrad.jobs import gpus
from powergrad.jobs.experiments.spec import ExperimentSpec
from powergrad.jobs.spec import JobSpec

Responses = dict[int | str, dict[str, Any]]
REFERENCE = "#/components/schemas/{model}"
SECURITY = {
    "key": {"type": "http", "scheme": "bearer", "bearerFormat": "pg_<id>_<secret>", "description": "An API key."},
    "session": {
        "type": "apiKey",
        "in": "cookie",
        "name": access.COOKIE,
        "description": "The dashboard's, for a while after a key was shown.",
    },
}
METHODS = frozenset({"get", "head", "post", "put", "patch", "delete"})
# operation, status: where its answer has the value of a path parameter of others
GIVES = {
    ("createJob", "202"): {"job_id": "$response.body#/id"},
    ("cloneJob", "202"): {"job_id": "$response.body#/id"},
    ("listJobs", "200"): {"job_id": "$response.body#/data/0/id"},
    ("createExperiment", "202"): {"experiment_id": "$response.body#/id"},
    ("cloneExperiment", "202"): {"experiment_id": "$response.body#/id"},
    ("listExperiments", "200"): {"experiment_id": "$response.body#/data/0/id"},
    ("listCheckpoints", "200"): {"job_id": "$request.path.job_id", "checkpoint_id": "$response.body#/data/0/id"},
    ("listArtifacts", "200"): {"job_id": "$request.path.job_id", "name": "$response.body#/data/0/name"},
    ("createDataset", "202"): {"name": "$response.body#/name"},
    ("createKey", "201"): {"key_id": "$response.body#/id"},
    ("listKeys", "200"): {"key_id": "$response.body#/data/0/id"},
    ("testWebhook", "202"): {"delivery_id": "$response.body#/id"},
    ("listDeliveries", "200"): {"delivery_id": "$response.body#/data/0/id"},
    ("listPresets", "200"): {"name": "$response.body#/data/0/name"},
    ("predict", "202"): {"task_id": "$response.body#/id"},
}
GPUS = [{"type": "integer", "minimum": 0, "maximum": gpus.MOST}, {"type": "number", "enum": list(gpus.PARTS)}]
ONE_NUMBER = {
    "type": "number",
    "minimum": 0,
    "maximum": gpus.MOST,
    "multipleOf": min(gpus.PARTS),
    "if": {"exclusiveMinimum": 1},
    "then": {"multipleOf": 1},
}
"""The same numbers as GPUS: generators know no choice between a whole number and fractions."""
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


def only_what_is_given(schema: dict[str, Any]) -> None:
    """`json_schema_extra` of a body of changes: a field left out stays, so that none has a default and null stands for nothing."""
    for field in schema["properties"].values():
        field.pop("default", None)
        _never_null(field)


def _never_null(schema: dict[str, Any]) -> None:
    kinds = [kind for kind in schema.get("anyOf", []) if kind != {"type": "null"}]
    if len(kinds) == 1:
        del schema["anyOf"]
        schema.update(kinds[0])


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
    # to pydantic any object, so that its violations are told by the rules of specs, with their places
    schemas[ExperimentSpec.__name__]["properties"]["spec"] = {"$ref": REFERENCE.format(model=JobSpec.__name__)}
    schemas[errors.SCHEMA_NAME] = schemas.pop(ProblemDocument.__name__)
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own, which nothing here sends
        schemas.pop(name, None)
    _for_generators(schemas)
    found["components"]["securitySchemes"] = SECURITY
    for method, path, operation in operations(found):
        operation["security"] = _security(method.upper(), path)
        for parameter in operation.get("parameters", []):
            _never_null(parameter["schema"])  # what is sent is text: an absent parameter is what Python calls None
    _link(found)
    return found


def _for_generators(schemas: dict[str, Any]) -> None:
    """Say the same so that a generator of clients can take it: unions with a default by a name of their own, a number as one kind."""
    for name, schema in list(schemas.items()):
        for title, field in schema.get("properties", {}).items():
            union = {key: field[key] for key in ("oneOf", "anyOf", "discriminator") if key in field}
            if union and isinstance(field.get("default"), dict):
                named = name + field.get("title", title.title())
                schemas[named] = union
                for key in union:
                    del field[key]
                field["$ref"] = REFERENCE.format(model=named)
            if field.get("anyOf", [])[: len(GPUS)] == GPUS:
                field["anyOf"][: len(GPUS)] = [ONE_NUMBER]


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Method (lower case), path and operation of all there are in an OpenAPI document."""
    for path, item in document["paths"].items():
        for method, operation in item.items():
            if method in METHODS:
                yield method, path, operation


def _security(method: str, path: str) -> list[dict[str, list[str]]]:
    """What opens an operation: nothing is needed, or any one of these with the scope."""
    if not access.is_guarded(path) or (method, path) in access.OPEN:
        return []
    return [{name: [access.scope_of(method, path)]} for name in SECURITY]


def _link(document: dict[str, Any]) -> None:
    """Say which answers give what which operations ask for."""
    known = {operation["operationId"]: (path, operation) for _, path, operation in operations(document)}
    for (giver, status), values in GIVES.items():
        if giver in known:
            path, operation = known[giver]
            takers = {name: path_names(there) for name, (there, _) in known.items() if there != path}
            fresh = {one for one, where in values.items() if where.startswith("$response")}
            operation["responses"][status]["links"] = {
                name: {"operationId": name, "parameters": {one: values[one] for one in sorted(names)}}
                for name, names in takers.items()
                if names & fresh and names <= values.keys() and _same_noun(path, known[name][0])
            }


def path_names(path: str) -> frozenset[str]:
    """The parameters in a path's template."""
    return frozenset(re.findall(r"{(\w+)}", path))


def _same_noun(giver: str, taker: str) -> bool:
    """Whether a name in one path means the same in the other: `name` is an artifact's, a preset's or a data set's."""
    return "{name}" not in taker or taker.startswith(giver)
