"""/v1/jobs: submit, list, look, move, change, delete."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import structlog
from fastapi import APIRouter, Depends, Header, Query
from fastapi.responses import JSONResponse
from pydantic import AwareDatetime, BeforeValidator, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from api import errors
from api.access import WithCaller, caller_of
from api.bodies import ABSENT, JsonBody, checked, read_json, required
from api.documents import DeletionDocument, JobDocument, JobListDocument
from api.errors import Refused, parameter_error
from api.etags import matches
from api.openapi import BODY, CHANGES, NEW_JOB, STORED, json_request, only_what_is_given, problems
from api.parts import JOB_ID, JobId, Parts, WithParts
from api.strict import PREFIX, DirectRoute, StrictRoute
from powergrad.jobs import debts, lifecycle, outbox, queries
from powergrad.jobs.errors import InvalidSpec, Violation, refusal
from powergrad.jobs.lifecycle import Amendment, RaisedLimits, Submission
from powergrad.jobs.spec import ONLY_THESE, JobSpec, LabelName, LabelText, LimitsSpec, parse
from powergrad.jobs.states import TERMINAL, JobState
from powergrad.jobs.store import Tx
from powergrad.spec import NAME_PATTERN, NamedData, SpecModel

QUEUE_LOOK_S = 2.0  # a queued job's place moves without its row: so often a waiting poll looks again
POLL_AFTER_S = 1
SORT_PATTERN = r"^(-created_at|-?metrics\.[A-Za-z0-9_]{1,64})$"
RFC3339_PATTERN = r"^(?!0000)\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:[0-5]\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)$"
PLAIN_TEXT = r"^[^\x00-\x1f\x7f]*$"
LABEL = "label."
MOST_LABELS = 32  # a job has no more, so more can match none

log = structlog.get_logger(__name__)
router = APIRouter(prefix="/v1/jobs", tags=["jobs"], route_class=StrictRoute)
busy = APIRouter(prefix="/v1/jobs", tags=["jobs"], route_class=DirectRoute)

DIGITS = {"data": {"dataset": "digits"}}
DIGITS_PGT = {"name": "digits-pgt", "data": {"dataset": "digits"}, "loss": {"alpha": 0.25}, "epochs": 20, "labels": {"team": "vision"}}
NEW_JOB_HEADERS = {
    "Location": {"schema": {"type": "string"}, "description": "Path of the job."},
    "Retry-After": {"schema": {"type": "integer"}, "description": "Seconds after which a look is worth while."},
    "Idempotency-Replayed": {"schema": {"type": "string", "enum": ["true"]}, "description": "The job was there before, under this key."},
}
ETAG_HEADER = {"ETag": {"schema": {"type": "string"}, "description": "Changes whenever the job does, progress included."}}
CHECKED: dict[int | str, dict[str, Any]] = {
    200: {"description": "With dry_run: the spec with every default, nothing stored.", "model": JobSpec}
}

IdempotencyKey = Annotated[
    str | None,
    Header(
        pattern=r"^[\x21-\x7e]{1,255}$",
        description="The same key with the same body gives the same job, within 24 hours.",
        examples=["5f0c1a52-8f1e-4b7e-9a36-0f4a3f1f1d11"],
    ),
]


def _as_rfc3339(value: Any) -> Any:
    if not isinstance(value, str) or not re.fullmatch(RFC3339_PATTERN, value, re.ASCII):
        raise PydanticCustomError("bad_format", "must be a date and time with its offset (RFC 3339), such as 2026-01-31T12:00:00Z")
    return value


# pydantic's own takes 0.5 for a moment of 1970
Moment = Annotated[AwareDatetime, BeforeValidator(_as_rfc3339), Field(json_schema_extra={"pattern": RFC3339_PATTERN})]
DryRun = Annotated[bool, Query(description="Only check and normalise the spec.")]


class CloneBody(SpecModel):
    set: dict[str, Any] = Field(default={})
    """Changes by dotted name: {"loss.alpha": 0.3}. A new optimizer.name or schedule.name starts that part from its defaults."""
    name: str | None = Field(default=None, pattern=NAME_PATTERN)
    """Name of the new job; null keeps the spec's."""
    from_checkpoint: str | None = Field(default=None, pattern=r"^(best|latest|step-[0-9]{8})$")
    """Start from the weights of this checkpoint of the job: best, latest or an id. Null starts as the job itself did."""


class LimitsBody(LimitsSpec):
    model_config = ConfigDict(json_schema_extra=only_what_is_given)


class RetryBody(SpecModel):
    limits: LimitsBody | None = None
    """New limits; what is left out stays."""


def _not_null(value: Any) -> Any:
    if value is None:
        raise PydanticCustomError("wrong_type", "must not be null: leave it out to keep what is there")
    return value


def _only_ttl_may_be_null(schema: dict[str, Any]) -> None:
    ttl = {key: value for key, value in schema["properties"]["ttl_seconds"].items() if key != "default"}
    only_what_is_given(schema)
    schema["properties"]["ttl_seconds"] = ttl


class RetentionBody(SpecModel):
    model_config = ConfigDict(json_schema_extra=_only_ttl_may_be_null)

    keep_last: int | None = Field(default=None, ge=1, le=1000)
    """Newest checkpoints kept."""
    keep_best: int | None = Field(default=None, ge=1, le=1000)
    """Best checkpoints kept."""
    ttl_seconds: float | None = Field(default=None, ge=0.0, le=1e9)
    """Seconds after its end that the job is deleted with all its files, unless a checkpoint is pinned; null is the server's own rule."""

    _no_null = field_validator("keep_last", "keep_best", mode="before")(_not_null)


class AmendBody(SpecModel):
    """What is left out stays as it is."""

    model_config = ConfigDict(json_schema_extra=only_what_is_given)

    name: str | None = Field(default=None, pattern=NAME_PATTERN)
    labels: Annotated[dict[LabelName, LabelText], Field(max_length=32, json_schema_extra=ONLY_THESE)] | None = None
    """All labels: those that are not named go."""
    notes: str | None = Field(default=None, max_length=10_000, pattern=r"^[^\x00]*$")
    priority: int | None = Field(default=None, ge=0, le=9)
    retention: RetentionBody | None = None

    _no_null = field_validator("*", mode="before")(_not_null)


BODIES = (JobSpec, CloneBody, RetryBody, AmendBody)


# --- new jobs --------------------------------------------------------------------------------------------------------------------


@busy.post(
    "",
    operation_id="createJob",
    summary="Submit a job",
    status_code=202,
    response_model=JobDocument,
    responses={
        202: {"description": "Stored and queued: it survives whatever happens next.", "headers": NEW_JOB_HEADERS | ETAG_HEADER},
        **CHECKED,
        **problems(*STORED, *CHANGES, *NEW_JOB),
    },
    openapi_extra=json_request(JobSpec, examples={"smallest": DIGITS, "power-grad": DIGITS_PGT}),
)
async def create(
    request: Request,
    idempotency_key: IdempotencyKey = None,
    dry_run: DryRun = False,
) -> Response:
    parts: Parts = request.app.state.parts  # not by dependencies: two of them cost a tenth of a submission
    owner = caller_of(request).owner
    body = required(await read_json(request))
    names = await parts.catalogue.names_for(body, owner)
    spec = parse(body, models=names.models, datasets=names.datasets)
    outbox.check_webhook(spec, allow=parts.settings.allow_list)
    if dry_run:
        return await _checked_only(parts, spec, owner)
    new = Submission(spec, owner=owner, idempotency_key=idempotency_key, body_sha256=lifecycle.body_hash(body) if idempotency_key else "")
    return await _submitted(parts, new)


async def _checked_only(parts: Parts, spec: JobSpec, owner: str) -> Response:
    if spec.model.init_from is not None or isinstance(spec.data, NamedData):
        spec = await run_in_threadpool(_resolved, parts, spec, owner)
    return JSONResponse(spec.model_dump(mode="json"))


def _resolved(parts: Parts, spec: JobSpec, owner: str) -> JobSpec:
    with parts.store.read() as tx:
        return lifecycle.with_references_resolved(tx, spec, owner=owner)


async def _submitted(parts: Parts, new: Submission) -> Response:
    parts.room.check()
    stored = await parts.submissions.store(new)
    job = stored.job
    headers = {"Location": f"/v1/jobs/{job['id']}", "Retry-After": str(POLL_AFTER_S), "ETag": queries.etag(job)}
    if stored.replayed:
        headers["Idempotency-Replayed"] = "true"
    return JSONResponse(job, status_code=202, headers=headers)


@router.post(
    "/{job_id}/clone",
    operation_id="cloneJob",
    summary="Submit a job again, with changes",
    status_code=202,
    response_model=JobDocument,
    responses={
        202: {"description": "The new job.", "headers": NEW_JOB_HEADERS | ETAG_HEADER},
        **CHECKED,
        **problems(*STORED, *CHANGES, *NEW_JOB, errors.JOB_NOT_FOUND),
    },
    openapi_extra=json_request(CloneBody, is_required=False, examples={"another alpha": {"set": {"loss.alpha": 0.3}}}),
)
async def clone(
    parts: WithParts, caller: WithCaller, job_id: JobId, body: JsonBody, idempotency_key: IdempotencyKey = None, dry_run: DryRun = False
) -> Response:
    wanted = checked(CloneBody, {} if body is ABSENT else body)
    origin = await run_in_threadpool(_look, parts, job_id, caller.owner)
    changed = with_changes(origin["spec"], wanted.set)
    names = await parts.catalogue.names_for(changed, caller.owner)
    if wanted.name is not None:
        changed["name"] = wanted.name
    if wanted.from_checkpoint is not None:
        changed["model"] = _starting_from(f"{job_id}/{wanted.from_checkpoint}", changed["model"], wanted.set)
    try:
        spec = parse(changed, models=names.models, datasets=names.datasets)
        outbox.check_webhook(spec, allow=parts.settings.allow_list)
        if dry_run:
            return await _checked_only(parts, spec, caller.owner)
        sha256 = lifecycle.body_hash({"clone": job_id, "body": {} if body is ABSENT else body}) if idempotency_key else ""
        return await _submitted(
            parts, Submission(spec, owner=caller.owner, idempotency_key=idempotency_key, body_sha256=sha256, cloned_from=job_id)
        )
    except InvalidSpec as error:
        raise refusal([_pointing_into_clone(violation, wanted) for violation in error.violations]) from None


def _starting_from(origin: str, model: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A model's spec that begins with these weights instead of those the job itself began with. Raises InvalidSpec."""
    if "model.init_from" in changes:
        raise InvalidSpec([Violation("/from_checkpoint", "conflict", "model.init_from is set too: give one of the two", origin)])
    own = {} if "model.pretrained" in changes else {"pretrained": False}
    return {**model, **own, "init_from": origin}


def _pointing_into_clone(violation: Violation, wanted: CloneBody) -> Violation:
    if violation.pointer == "/model/init_from" and wanted.from_checkpoint is not None:
        return Violation("/from_checkpoint", violation.code, violation.detail, wanted.from_checkpoint)
    return _pointing_into_set(violation, wanted.set)


def with_changes(spec: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A spec's JSON with values put in by dotted name. Raises InvalidSpec where a name leads through a value that has no parts."""
    changed = {key: dict(value) if isinstance(value, dict) else value for key, value in spec.items()}
    for section in ("optimizer", "schedule"):
        name = changes.get(f"{section}.name")
        if name is not None and name != spec[section]["name"]:
            changed[section] = {}  # the fields of the old kind mean nothing to the new one
    for dotted, value in changes.items():
        *path, last = _parts_of(dotted)
        place = changed
        for part in path:
            if place.get(part) is None:
                place[part] = {}
            place = place[part]
            if not isinstance(place, dict):
                raise InvalidSpec([Violation(_set_pointer(dotted), "unknown_field", f"{part} has no fields", value)])
        place[last] = value
    return changed


def _parts_of(dotted: str) -> list[str]:
    return dotted.split(".", 1) if dotted.startswith("labels.") else dotted.split(".")


def _pointing_into_set(violation: Violation, changes: dict[str, Any]) -> Violation:
    """The same rule broken, found where the caller wrote it: /loss/alpha is /set/loss.alpha."""
    for dotted in changes:
        prefix = "/" + "/".join(_escaped(part) for part in _parts_of(dotted))
        if violation.pointer == prefix or violation.pointer.startswith(prefix + "/"):
            return Violation(_set_pointer(dotted) + violation.pointer[len(prefix) :], violation.code, violation.detail, violation.value)
    return violation


def _set_pointer(dotted: str) -> str:
    return f"/set/{_escaped(dotted)}"


def _escaped(part: str) -> str:
    return part.replace("~", "~0").replace("/", "~1")


# --- looking ---------------------------------------------------------------------------------------------------------------------

BY_LABEL: dict[str, Any] = {
    "name": "label",
    "in": "query",
    "description": "Only jobs with these labels, each given as `label.KEY=VALUE`.",
    "schema": {
        "type": "object",
        "patternProperties": {r"^label\.[A-Za-z0-9._-]{1,64}$": {"type": "string", "pattern": PLAIN_TEXT}},
        "additionalProperties": False,
        "maxProperties": MOST_LABELS,
    },
    "style": "form",
    "explode": True,
    PREFIX: LABEL,
}
"""Of OpenAPI: an object's exploded members are parameters of their own, so that these are called `label.KEY`."""


async def _filter(
    caller: WithCaller,
    request: Request,
    experiment: Annotated[str | None, Query(pattern=NAME_PATTERN)] = None,
    created_after: Annotated[Moment | None, Query()] = None,
    created_before: Annotated[Moment | None, Query()] = None,
    q: Annotated[str | None, Query(max_length=128, pattern=PLAIN_TEXT, description="Part of a name, or the start of an id.")] = None,
) -> queries.Filter:
    """The caller's jobs that were asked for, in whatever state; a route that takes it has BY_LABEL among its parameters."""
    return queries.Filter(
        owner=caller.owner,
        labels=_labels_asked(request),
        experiment=experiment,
        created_after_ms=_milliseconds(created_after),
        created_before_ms=_milliseconds(created_before),
        q=q or None,
    )


WithFilter = Annotated[queries.Filter, Depends(_filter)]


@router.get(
    "",
    operation_id="listJobs",
    summary="List jobs, newest first",
    response_model=JobListDocument,
    responses=problems(*STORED, errors.JOB_NOT_FOUND),
    openapi_extra={"parameters": [BY_LABEL]},
)
def list_jobs(
    parts: WithParts,
    wanted: WithFilter,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(description="`last_id` of the page before.", pattern=f"^{JOB_ID.pattern}$")] = None,
    state: Annotated[list[JobState] | None, Query(description="Repeat for several.")] = None,
    sort: Annotated[
        str | None, Query(pattern=SORT_PATTERN, description="-created_at, or by a best metric: -metrics.val_top1 is best first.")
    ] = None,
) -> Response:
    by = None if sort == "-created_at" else sort
    with parts.store.read() as tx:
        page = queries.page(tx, replace(wanted, states=_each_once(state)), limit=limit, after=after, sort=by)
    ids = [job["id"] for job in page.data]
    return JSONResponse(
        {
            "object": "list",
            "data": page.data,
            "has_more": page.has_more,
            "first_id": ids[0] if ids else None,
            "last_id": ids[-1] if ids else None,
        }
    )


def _each_once(states: Sequence[JobState] | None) -> tuple[JobState, ...]:
    return tuple(dict.fromkeys(states or ()))


def _milliseconds(moment: AwareDatetime | None) -> int | None:
    return None if moment is None else round(moment.timestamp() * 1000)


def _labels_asked(request: Request) -> dict[str, str]:
    """The label.KEY parameters. Raises Refused (422)."""
    labels: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if not name.startswith(LABEL):
            continue
        key = name.removeprefix(LABEL)
        if not re.fullmatch(NAME_PATTERN, key):
            raise parameter_error(name[:64], "bad_format", f"the label's name must match {NAME_PATTERN}")
        if not re.fullmatch(PLAIN_TEXT, value):
            raise parameter_error(name, "bad_format", "must not contain control characters")
        if key in labels:
            raise parameter_error(name, "repeated_parameter", "must be given once: a job has one value of each label")
        if len(labels) == MOST_LABELS:
            raise parameter_error(name, "too_many", f"must be one of at most {MOST_LABELS} labels: a job has no more")
        labels[key] = value
    return labels


@router.get(
    "/{job_id}",
    operation_id="getJob",
    summary="Look at a job",
    response_model=JobDocument,
    responses={
        200: {"description": "The job.", "headers": ETAG_HEADER},
        304: {"description": "Nothing has changed since If-None-Match."},
        **problems(*STORED, errors.JOB_NOT_FOUND),
    },
)
async def get(
    parts: WithParts,
    caller: WithCaller,
    job_id: JobId,
    if_none_match: Annotated[str | None, Header(description="ETag seen last.")] = None,
    wait: Annotated[float | None, Query(ge=0, le=60, allow_inf_nan=False, description="Seconds to wait for the ETag to change.")] = None,
) -> Response:
    if wait:
        return await _get_when_changed(parts, job_id, caller.owner, if_none_match, wait)
    return _shown(await run_in_threadpool(_look, parts, job_id, caller.owner), if_none_match)


async def _get_when_changed(parts: Parts, job_id: str, owner: str, if_none_match: str | None, wait_s: float) -> Response:
    assert parts.tailer is not None, "the application has started"
    now = asyncio.get_running_loop().time
    until = now() + wait_s
    with parts.tailer.watch(job_id) as watcher, parts.measures.streams.track_inprogress():
        job = await parts.tailer.run(_look, parts, job_id, owner)
        seen = if_none_match or queries.etag(job)
        if if_none_match is None and job["state"] in TERMINAL:
            return _shown(job, None)  # it will not change by itself, and the caller has not seen it
        while matches(seen, queries.etag(job)) and now() < until and not parts.tailer.is_stopping:
            longest = QUEUE_LOOK_S if job["state"] == JobState.QUEUED else wait_s
            await watcher.changed(max(0.0, min(until - now(), longest)))
            job = await parts.tailer.run(_look, parts, job_id, owner)
    return _shown(job, if_none_match)


def _look(parts: Parts, job_id: str, owner: str) -> dict[str, Any]:
    with parts.store.read() as tx:
        return queries.get(tx, job_id, owner=owner)


def _shown(job: dict[str, Any], if_none_match: str | None) -> Response:
    headers = {"ETag": queries.etag(job), "Cache-Control": "no-cache"}
    if if_none_match is not None and matches(if_none_match, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    return JSONResponse(job, headers=headers)


# --- moves and changes -----------------------------------------------------------------------------------------------------------

MOVED: dict[int | str, dict[str, Any]] = {
    202: {"description": "Asked for (or done before); `state` says how far it is.", "headers": ETAG_HEADER},
    **problems(*STORED, errors.FORBIDDEN_ORIGIN, errors.UNSUPPORTED_MEDIA, errors.JOB_NOT_FOUND, errors.ILLEGAL_MOVE),
}


@router.post(
    "/{job_id}/cancel", operation_id="cancelJob", summary="End a job", status_code=202, response_model=JobDocument, responses=MOVED
)
def cancel(parts: WithParts, caller: WithCaller, job_id: JobId) -> Response:
    return _changed(parts, job_id, caller.owner, lambda tx: lifecycle.cancel(tx, job_id, owner=caller.owner))


@router.post(
    "/{job_id}/pause",
    operation_id="pauseJob",
    summary="Write a checkpoint and give the device back",
    status_code=202,
    response_model=JobDocument,
    responses=MOVED,
)
def pause(parts: WithParts, caller: WithCaller, job_id: JobId) -> Response:
    return _changed(parts, job_id, caller.owner, lambda tx: lifecycle.pause(tx, job_id, owner=caller.owner))


@router.post(
    "/{job_id}/resume",
    operation_id="resumeJob",
    summary="Queue a paused job again",
    status_code=202,
    response_model=JobDocument,
    responses=MOVED | problems(*STORED, *CHANGES, errors.JOB_NOT_FOUND, errors.ILLEGAL_MOVE, errors.QUOTA_EXCEEDED),
)
def resume(parts: WithParts, caller: WithCaller, job_id: JobId) -> Response:
    return _changed(parts, job_id, caller.owner, lambda tx: lifecycle.resume(tx, job_id, owner=caller.owner), ring=True)


@router.post(
    "/{job_id}/retry",
    operation_id="retryJob",
    summary="Let a failed or cancelled job go on from its last checkpoint",
    status_code=202,
    response_model=JobDocument,
    responses=MOVED | problems(*STORED, *CHANGES, *BODY, errors.JOB_NOT_FOUND, errors.ILLEGAL_MOVE, errors.QUOTA_EXCEEDED),
    openapi_extra=json_request(RetryBody, is_required=False, examples={"more time": {"limits": {"max_seconds": 7200}}}),
)
def retry(parts: WithParts, caller: WithCaller, job_id: JobId, body: JsonBody) -> Response:
    limits = raised_limits(checked(RetryBody, {} if body is ABSENT else body))
    return _changed(parts, job_id, caller.owner, lambda tx: lifecycle.retry(tx, job_id, limits=limits, owner=caller.owner), ring=True)


def raised_limits(body: RetryBody) -> RaisedLimits:
    """The limits that were given. Raises InvalidSpec for a null, which would be taken as "keep"."""
    if body.limits is None:
        return RaisedLimits()
    given = {name: getattr(body.limits, name) for name in body.limits.model_fields_set}
    nulls = [
        Violation(f"/limits/{name}", "wrong_type", "must not be null: leave it out to keep it") for name in given if given[name] is None
    ]
    if nulls:
        raise InvalidSpec(nulls)
    return RaisedLimits(**given)


@router.patch(
    "/{job_id}",
    operation_id="updateJob",
    summary="Change name, labels, notes, priority or retention",
    response_model=JobDocument,
    responses={
        200: {"description": "The job, changed.", "headers": ETAG_HEADER},
        **problems(*STORED, *CHANGES, *BODY, errors.JOB_NOT_FOUND, errors.VERSION_MISMATCH),
    },
    openapi_extra=json_request(AmendBody, examples={"rename": {"name": "baseline", "notes": "the one for the report"}}),
)
def amend(
    parts: WithParts,
    caller: WithCaller,
    job_id: JobId,
    body: JsonBody,
    if_match: Annotated[
        str | None, Header(description="The job's `version` (or an ETag of it): change nothing if it has moved on.")
    ] = None,
) -> Response:
    wanted = checked(AmendBody, required(body))
    given = {name: getattr(wanted, name) for name in wanted.model_fields_set}
    if wanted.retention is not None:
        given["retention"] = wanted.retention.model_dump(exclude_unset=True)
    version = None if if_match is None else version_of(if_match)
    return _changed(
        parts,
        job_id,
        caller.owner,
        lambda tx: lifecycle.amend(tx, job_id, Amendment(**given), expected_version=version, owner=caller.owner),
        status=200,
    )


def version_of(if_match: str) -> int | None:
    """The version in `3`, `"3"` or in one of the job's ETags; None for `*`. Raises Refused (412) for what can match nothing."""
    if if_match.strip() == "*":
        return None
    found = re.fullmatch(r'\s*(?:W/)?"?(\d{1,9})(?:-[\w-]*)?"?\s*', if_match)
    if found is None:
        raise Refused(errors.VERSION_MISMATCH, f"If-Match: {if_match[:64]!r}: must be the job's version, such as 3")
    return int(found[1])


def _changed(parts: Parts, job_id: str, owner: str, change: Callable[[Tx], object], *, status: int = 202, ring: bool = False) -> Response:
    with parts.store.write() as tx:
        change(tx)
        job = queries.get(tx, job_id, owner=owner)
    if ring:
        parts.doorbell.ring()
    return JSONResponse(job, status_code=status, headers={"ETag": queries.etag(job)})


@router.delete(
    "/{job_id}",
    operation_id="deleteJob",
    summary="Delete a job that has ended, with its files",
    status_code=204,
    responses={
        204: {"description": "It is gone, and its files are."},
        **problems(*STORED, errors.FORBIDDEN_ORIGIN, errors.UNSUPPORTED_MEDIA, errors.JOB_NOT_FOUND, errors.ILLEGAL_MOVE),
    },
)
def delete(parts: WithParts, caller: WithCaller, job_id: JobId) -> Response:
    with parts.store.write() as tx:
        directory = lifecycle.remove(tx, job_id, owner=caller.owner)
    try:
        parts.artifacts.delete(directory)
    except OSError as error:
        log.warning("files busy: the sweeper will free them", job=job_id, error=str(error))
    else:
        with parts.store.write() as tx:
            debts.freed(tx, directory)
    return Response(status_code=204)


EndedState = Literal[JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED]
MOST_DELETED = 1000  # rows of so many jobs go in well below a second, for which the other writers wait


@router.delete(
    "",
    operation_id="deleteJobs",
    summary="Delete the jobs that fit and have ended, with their files",
    response_model=DeletionDocument,
    responses={
        200: {"description": "They are gone, and their files within seconds. With dry_run: what would go."},
        **problems(*STORED, *CHANGES),
    },
    openapi_extra={"parameters": [BY_LABEL]},
)
def delete_many(
    parts: WithParts,
    wanted: WithFilter,
    limit: Annotated[int, Query(ge=1, le=MOST_DELETED, description="How many at most in this call.")] = 100,
    state: Annotated[list[EndedState] | None, Query(description="Repeat for several; default all that a job can end in.")] = None,
    dry_run: Annotated[bool, Query(description="Delete nothing: only say what would go.")] = False,
) -> Response:
    if wanted == queries.Filter(owner=wanted.owner) and not state:
        raise parameter_error("state", "missing_filter", "must be given, or another filter: a call without any would delete all jobs")
    wanted = replace(wanted, states=_each_once(state))
    if dry_run:
        with parts.store.read() as tx:
            found = queries.ended(tx, wanted, limit=limit)
        return _deletion(found.ids, found.bytes, has_more=found.has_more)
    with parts.store.write() as tx:
        found = queries.ended(tx, wanted, limit=limit)
        gone = lifecycle.remove_all(tx, found.ids, owner=wanted.owner)
    return _deletion(gone.ids, gone.bytes, has_more=found.has_more)


def _deletion(job_ids: list[str], total_bytes: int, *, has_more: bool) -> Response:
    return JSONResponse({"object": "deletion", "deleted": job_ids, "bytes": total_bytes, "has_more": has_more})
