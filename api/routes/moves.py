"""Moves and changes of jobs that are there."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

import structlog
from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse
from pydantic import ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError
from starlette.responses import Response

from api import errors
from api.access import WithCaller
from api.answers import JOBS, IfMatch, changed, version_of
from api.bodies import ABSENT, JsonBody, checked, required
from api.documents import DeletionDocument, JobDocument
from api.errors import parameter_error
from api.filters import BY_LABEL, WithFilter, each_once
from api.openapi import BODY, CHANGES, STORED, json_request, only_what_is_given, problems
from api.parts import JobId, WithParts
from api.strict import StrictRoute
from powergrad.jobs import debts, lifecycle, queries
from powergrad.jobs.errors import InvalidSpec, Violation
from powergrad.jobs.lifecycle import Amendment, RaisedLimits
from powergrad.jobs.spec import ONLY_THESE, LabelName, LabelText, LimitsSpec
from powergrad.jobs.states import JobState
from powergrad.spec import NAME_PATTERN, SpecModel

log = structlog.get_logger(__name__)
router = APIRouter(prefix="/v1/jobs", tags=["jobs"], route_class=StrictRoute)


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


MOVED: dict[int | str, dict[str, Any]] = {
    202: {"description": "Asked for (or done before); `state` says how far it is.", "headers": JOBS.etag_header},
    **problems(*STORED, errors.FORBIDDEN_ORIGIN, errors.UNSUPPORTED_MEDIA, errors.JOB_NOT_FOUND, errors.ILLEGAL_MOVE),
}


@router.post(
    "/{job_id}/cancel", operation_id="cancelJob", summary="End a job", status_code=202, response_model=JobDocument, responses=MOVED
)
def cancel(parts: WithParts, caller: WithCaller, job_id: JobId) -> Response:
    return changed(parts, JOBS, job_id, caller.owner, lambda tx: lifecycle.cancel(tx, job_id, owner=caller.owner))


@router.post(
    "/{job_id}/pause",
    operation_id="pauseJob",
    summary="Write a checkpoint and give the device back",
    status_code=202,
    response_model=JobDocument,
    responses=MOVED,
)
def pause(parts: WithParts, caller: WithCaller, job_id: JobId) -> Response:
    return changed(parts, JOBS, job_id, caller.owner, lambda tx: lifecycle.pause(tx, job_id, owner=caller.owner))


@router.post(
    "/{job_id}/resume",
    operation_id="resumeJob",
    summary="Queue a paused job again",
    status_code=202,
    response_model=JobDocument,
    responses=MOVED | problems(*STORED, *CHANGES, errors.JOB_NOT_FOUND, errors.ILLEGAL_MOVE, errors.QUOTA_EXCEEDED),
)
def resume(parts: WithParts, caller: WithCaller, job_id: JobId) -> Response:
    return changed(parts, JOBS, job_id, caller.owner, lambda tx: lifecycle.resume(tx, job_id, owner=caller.owner), ring=True)


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
    return changed(parts, JOBS, job_id, caller.owner, lambda tx: lifecycle.retry(tx, job_id, limits=limits, owner=caller.owner), ring=True)


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
        200: {"description": "The job, changed.", "headers": JOBS.etag_header},
        **problems(*STORED, *CHANGES, *BODY, errors.JOB_NOT_FOUND, errors.VERSION_MISMATCH),
    },
    openapi_extra=json_request(AmendBody, examples={"rename": {"name": "baseline", "notes": "the one for the report"}}),
)
def amend(
    parts: WithParts,
    caller: WithCaller,
    job_id: JobId,
    body: JsonBody,
    if_match: IfMatch = None,
) -> Response:
    wanted = checked(AmendBody, required(body))
    given = {name: getattr(wanted, name) for name in wanted.model_fields_set}
    if wanted.retention is not None:
        given["retention"] = wanted.retention.model_dump(exclude_unset=True)
    version = version_of(if_match)
    return changed(
        parts,
        JOBS,
        job_id,
        caller.owner,
        lambda tx: lifecycle.amend(tx, job_id, Amendment(**given), expected_version=version, owner=caller.owner),
        status=200,
    )


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
    wanted = replace(wanted, states=each_once(state))
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


BODIES = (RetryBody, AmendBody)
