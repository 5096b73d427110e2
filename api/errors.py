"""Every refusal of the API: its status, its code, its body (RFC 9457) and its entry in the OpenAPI document, each said once.

The domain raises its own errors; `KINDS` maps each class to a kind. What no one foresaw becomes `internal`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import iter_route_contexts
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from powergrad.jobs import errors as domain
from powergrad.jobs.store import is_full, is_unavailable

MEDIA_TYPE = "application/problem+json"
SCHEMA_NAME = "Problem"
RETRY_AFTER_S = 2
QUOTA_RETRY_S = 120  # longer than a client waits by itself: whoever submits is to hear of the quota
MOST_ERRORS = 100  # more help no one, and a small body can break tens of thousands of rules
CLIENT_GONE = 499  # nginx's number: HTTP has none for an answer that no one waits for

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Kind:
    """One way to be refused. about: when it happens, for the OpenAPI document."""

    status: int
    code: str
    title: str
    about: str


MALFORMED = Kind(400, "malformed", "Malformed request", "The body is not JSON.")
UNAUTHENTICATED = Kind(401, "unauthenticated", "No valid key", "The server has keys, and the request shows none that opens it.")
FORBIDDEN_SCOPE = Kind(403, "forbidden_scope", "Key not good for this", "The key has not the scope that the call needs.")
FORBIDDEN_HOST = Kind(403, "forbidden_host", "Host not served", "The Host header is not a loopback name or address.")
FORBIDDEN_ORIGIN = Kind(403, "forbidden_origin", "Origin not served", "A web page of another origin sent the request.")
NOT_FOUND = Kind(404, "not_found", "Not found", "Nothing is here.")
UNKNOWN_REFERENCE = Kind(404, "unknown_reference", "Not there", "The spec names a model, data set, job or checkpoint that does not exist.")
DATASET_NOT_FOUND = Kind(404, "dataset_not_found", "No such data set", "No uploaded or registered set has this name.")
SAMPLES_NOT_FOUND = Kind(404, "samples_not_found", "No samples", "There are no pictures of this set's images; the detail says why.")
KEY_NOT_FOUND = Kind(404, "key_not_found", "No such key", "No key has this id.")
DELIVERY_NOT_FOUND = Kind(404, "delivery_not_found", "No such delivery", "No webhook delivery has this id: they are kept for 30 days.")
JOB_NOT_FOUND = Kind(404, "job_not_found", "No such job", "No job has this id.")
CHECKPOINT_NOT_FOUND = Kind(404, "checkpoint_not_found", "No such checkpoint", "The job has no such checkpoint (yet).")
ARTIFACT_NOT_FOUND = Kind(404, "artifact_not_found", "No such artifact", "The job has no such artifact (yet).")
TASK_NOT_FOUND = Kind(404, "task_not_found", "No such task", "No task has this id: they are kept for a day.")
EXPERIMENT_NOT_FOUND = Kind(404, "experiment_not_found", "No such experiment", "No experiment has this id.")
PRESET_NOT_FOUND = Kind(404, "preset_not_found", "No such preset", "No preset has this name.")
METHOD_NOT_ALLOWED = Kind(405, "method_not_allowed", "Method not allowed", "The path does not know this method.")
ILLEGAL_MOVE = Kind(409, "illegal_move", "Not in this state", "The state of the job or experiment, given in `state`, does not allow it.")
REFERENCE_NOT_READY = Kind(
    409, "reference_not_ready", "Not ready yet", "The spec names a data set that is being checked, or a job without a checkpoint."
)
REPORT_NOT_READY = Kind(409, "report_not_ready", "No report yet", "Nothing of the experiment has been analysed yet.")
DATASET_IN_USE = Kind(409, "dataset_in_use", "Data set in use", "A job that has not ended needs it.")
NAME_TAKEN = Kind(409, "name_taken", "Name taken", "A built-in data set has the name.")
NO_CHECKPOINT = Kind(409, "no_checkpoint", "No checkpoint yet", "The job has no checkpoint (yet), or has not said what its classes are.")
VERSION_MISMATCH = Kind(412, "version_mismatch", "Version mismatch", "If-Match names another version than it has now.")
TOO_LARGE = Kind(413, "too_large", "Body too large", "The body exceeds the limit.")
UNSUPPORTED_MEDIA = Kind(
    415,
    "unsupported_media_type",
    "Unsupported media type",
    "The body is not sent as application/json (a file: as what it is), or is compressed.",
)
BAD_RANGE = Kind(416, "range_not_satisfiable", "Range not satisfiable", "The range lies behind the end of the file.")
INVALID_SPEC = Kind(422, "invalid_spec", "Invalid spec", "The body breaks rules; `errors` has the first 100.")
INVALID_REQUEST = Kind(422, "invalid_request", "Invalid request", "A parameter breaks a rule; `errors` has the first 100.")
IDEMPOTENCY_MISMATCH = Kind(422, "idempotency_mismatch", "Key used before", "The Idempotency-Key came before with another body.")
BAD_ARCHIVE = Kind(
    422,
    "bad_archive",
    "Bad archive",
    "The archive is broken, breaks a rule or holds no class folders; `entry` and `rule` say where and how.",
)
UNREADABLE_IMAGE = Kind(422, "unreadable_image", "Unreadable image", "The body is no image, or one beyond the limits.")
QUOTA_EXCEEDED = Kind(429, "quota_exceeded", "Quota exceeded", "The owner has as much as is granted; `quota` says of what.")
TOO_MANY_TRIES = Kind(
    429, "too_many_tries", "Too many tries", "Too many wrong keys came from this address: come back after Retry-After seconds."
)
TASK_FAILED = Kind(500, "task_failed", "The task failed", "The child that did the work failed; `task` names it, `error` says how.")
INTERNAL = Kind(500, "internal", "Internal error", "A defect of the server; its log has the traceback.")
UNAVAILABLE = Kind(503, "unavailable", "Temporarily unavailable", "The database is away: come back after Retry-After seconds.")
UPLOAD_LOST = Kind(503, "upload_lost", "Upload lost", "The server stood still for so long that it gave the upload up: send it again.")
NO_WORKER = Kind(503, "no_worker", "No worker", "No worker is alive: come back after Retry-After seconds.")
NOT_READY = Kind(503, "not_ready", "Not ready", "`checks` says which part is missing.")
STORAGE_FULL = Kind(507, "storage_full", "Storage full", "Too little free space to accept a job.")

KINDS: dict[type[domain.JobError], Kind] = {
    domain.InvalidSpec: INVALID_SPEC,
    domain.UnknownReference: UNKNOWN_REFERENCE,
    domain.NotReady: REFERENCE_NOT_READY,
    domain.DatasetNotFound: DATASET_NOT_FOUND,
    domain.SamplesNotFound: SAMPLES_NOT_FOUND,
    domain.DatasetInUse: DATASET_IN_USE,
    domain.NameTaken: NAME_TAKEN,
    domain.UploadLost: UPLOAD_LOST,
    domain.KeyNotFound: KEY_NOT_FOUND,
    domain.DeliveryNotFound: DELIVERY_NOT_FOUND,
    domain.QuotaExceeded: QUOTA_EXCEEDED,
    domain.JobNotFound: JOB_NOT_FOUND,
    domain.CheckpointNotFound: CHECKPOINT_NOT_FOUND,
    domain.ArtifactNotFound: ARTIFACT_NOT_FOUND,
    domain.TaskNotFound: TASK_NOT_FOUND,
    domain.ExperimentNotFound: EXPERIMENT_NOT_FOUND,
    domain.ReportNotReady: REPORT_NOT_READY,
    domain.IllegalMove: ILLEGAL_MOVE,
    domain.VersionMismatch: VERSION_MISMATCH,
    domain.IdempotencyMismatch: IDEMPOTENCY_MISMATCH,
    domain.StorageFull: STORAGE_FULL,
}
_OF_FRAMEWORK = {kind.status: kind for kind in (MALFORMED, NOT_FOUND, METHOD_NOT_ALLOWED, TOO_LARGE, UNSUPPORTED_MEDIA)}


class Refused(Exception):
    """A refusal decided in the API itself."""

    def __init__(
        self, kind: Kind, detail: str, *, errors: Sequence[dict[str, Any]] = (), headers: Mapping[str, str] | None = None, **more: Any
    ) -> None:
        self.kind, self.detail, self.errors, self.headers, self.more = kind, detail, list(errors), dict(headers or {}), more
        super().__init__(detail)


def problem(kind: Kind, detail: str, *, instance: str, headers: Mapping[str, str] | None = None, **more: Any) -> Response:
    """The response that says so; `more` are further members of the problem. Of many `errors` it has the first MOST_ERRORS."""
    broken = more.get("errors") or []
    if len(broken) > MOST_ERRORS:
        detail = f"{len(broken)} rules are broken: the first {MOST_ERRORS} are in errors"
        more["errors"] = broken[:MOST_ERRORS]
    body = {
        "type": f"urn:powergrad:problem:{kind.code}",
        "title": kind.title,
        "status": kind.status,
        "detail": detail,
        "instance": instance,
        "code": kind.code,
        **{name: value for name, value in more.items() if value not in (None, [])},
    }
    return JSONResponse(body, status_code=kind.status, headers=dict(headers or {}), media_type=MEDIA_TYPE)


def parameter_error(name: str, code: str, detail: str, value: Any = None) -> Refused:
    """422 for one query parameter or header."""
    return Refused(INVALID_REQUEST, f"{name}: {detail}", errors=[{"parameter": name, "code": code, "detail": detail, "value": value}])


def install(app: FastAPI) -> None:
    """Make the application answer every error with a problem."""
    for raised, handler in (
        (Refused, _refused),
        (domain.JobError, _domain),
        (RequestValidationError, _parameters),
        (HTTPException, _framework),
        (ClientDisconnect, _gone),
        (SQLAlchemyError, _unforeseen),  # named, or Starlette would raise it again after the answer
        (Exception, _unforeseen),
    ):
        app.add_exception_handler(raised, handler)  # type: ignore[arg-type]  # each handles the class beside it


async def _refused(request: Request, error: Refused) -> Response:
    return problem(error.kind, error.detail, instance=request.url.path, headers=error.headers, errors=error.errors, **error.more)


async def _domain(request: Request, error: domain.JobError) -> Response:
    kind = KINDS.get(type(error))
    if kind is None:
        return await _unforeseen(request, error)
    more: dict[str, Any] = {}
    if isinstance(error, domain.InvalidSpec):
        more["errors"] = [vars(violation) for violation in error.violations]
    if isinstance(error, domain.IllegalMove):
        more["state"] = error.state
    if isinstance(error, domain.VersionMismatch):
        more["version"] = error.actual
    if isinstance(error, domain.UploadLost):
        more["headers"] = {"Retry-After": str(RETRY_AFTER_S)}
    if isinstance(error, domain.DatasetInUse):
        more["job"] = error.job_id
    if isinstance(error, domain.QuotaExceeded):
        more |= {"quota": error.quota, "used": error.used, "granted": error.granted, "headers": {"Retry-After": str(QUOTA_RETRY_S)}}
    return problem(kind, _summary(error), instance=request.url.path, **more)


def _summary(error: domain.JobError) -> str:
    if isinstance(error, domain.InvalidSpec) and len(error.violations) > 1:
        return f"{len(error.violations)} rules are broken: see errors"
    return str(error)


async def _parameters(request: Request, error: RequestValidationError) -> Response:
    found = [_parameter(item) for item in error.errors()]
    detail = "; ".join(f"{item['parameter']}: {item['detail']}" for item in found)
    return problem(INVALID_REQUEST, detail, instance=request.url.path, errors=found)


def _parameter(item: Mapping[str, Any]) -> dict[str, Any]:
    detail = str(item["msg"]).replace("Input should be", "must be", 1).replace("String should", "must", 1)
    value = item.get("input")
    shown = value[:200] if isinstance(value, str) else None
    return {
        "parameter": str(item["loc"][-1] if len(item["loc"]) < 3 else item["loc"][1]),
        "code": item["type"],
        "detail": detail,
        "value": shown,
    }


async def _framework(request: Request, error: HTTPException) -> Response:
    kind = _OF_FRAMEWORK.get(error.status_code) or Kind(error.status_code, "http_error", "Refused", "")
    headers = dict(error.headers or {})
    if error.status_code == METHOD_NOT_ALLOWED.status:
        headers["Allow"] = ", ".join(sorted(_methods(request))) or headers.get("Allow", "")
    detail = {
        404: f"{request.url.path}: nothing is here; /docs lists what is",
        405: f"{request.method} is not for {request.url.path}; allowed: {headers.get('Allow')}",
    }.get(error.status_code, str(error.detail))
    return problem(kind, detail, instance=request.url.path, headers=headers)


def _methods(request: Request) -> set[str]:
    """The methods of every route of the path as the document has it: the framework names those of the first one only.

    Where several paths of the document match, as `/v1/jobs/cancel` and `/v1/jobs/{id}` do, the one with the fewest parameters is meant.
    """
    routes = iter_route_contexts(request.app.routes)
    here = [route for route in routes if route.methods and route.path_regex.match(request.scope["path"])]
    least = min((len(route.param_convertors) for route in here), default=0)
    return {method for route in here if len(route.param_convertors) == least for method in route.methods or ()}


async def _gone(request: Request, _: ClientDisconnect) -> Response:
    """The client went away while it was sending: an expected end. No one reads the answer; its status is for the counters."""
    log.debug("client gone", method=request.method, path=request.url.path)
    return Response(status_code=CLIENT_GONE)


async def _unforeseen(request: Request, error: Exception) -> Response:
    if is_unavailable(error):
        log.warning("database away", path=request.url.path, error=str(error).splitlines()[0])
        return unavailable(request.url.path, why="its disk is full: free some space" if is_full(error) else "it does not answer")
    log.error("unforeseen", method=request.method, path=request.url.path, exc_info=error)
    return problem(INTERNAL, "a defect of the server: its log has the traceback", instance=request.url.path)


def unavailable(instance: str, *, why: str = "it does not answer") -> Response:
    """503: the database is away or has no room, nothing was stored."""
    return problem(
        UNAVAILABLE,
        f"the database is away ({why}); try again in {RETRY_AFTER_S} s",
        instance=instance,
        headers={"Retry-After": str(RETRY_AFTER_S)},
    )
