"""/v1/jobs: submit, list, look, move, change, delete."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Annotated, Any

import structlog
from fastapi import APIRouter, Header, Query
from fastapi.responses import JSONResponse
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from api import errors
from api.access import WithCaller, caller_of
from api.bodies import ABSENT, JsonBody, checked, read_json, required
from api.documents import JobDocument, JobListDocument
from api.etags import matches
from api.filters import BY_LABEL, WithFilter, each_once
from api.openapi import CHANGES, NEW_JOB, STORED, json_request, problems
from api.parts import JOB_ID, JobId, Parts, WithParts
from api.strict import DirectRoute, StrictRoute
from powergrad.jobs import outbox, queries, submission
from powergrad.jobs.changes import pointing_into_set, with_changes
from powergrad.jobs.errors import InvalidSpec, Violation, refusal
from powergrad.jobs.spec import JobSpec, parse
from powergrad.jobs.states import TERMINAL, JobState
from powergrad.jobs.submission import Submission
from powergrad.spec import NAME_PATTERN, NamedData, SpecModel

QUEUE_LOOK_S = 2.0  # a queued job's place moves without its row: so often a waiting poll looks again
POLL_AFTER_S = 1
SORT_PATTERN = r"^(-created_at|-?metrics\.[A-Za-z0-9_]{1,64})$"
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
DryRun = Annotated[bool, Query(description="Only check and normalise the spec.")]
IfNoneMatch = Annotated[str | None, Header(description="ETag seen last.")]
WaitS = Annotated[float | None, Query(ge=0, le=60, allow_inf_nan=False, description="Seconds to wait for the ETag to change.")]


class CloneBody(SpecModel):
    set: dict[str, Any] = Field(default={})
    """Changes by dotted name: {"loss.alpha": 0.3}. A new optimizer.name or schedule.name starts that part from its defaults."""
    name: str | None = Field(default=None, pattern=NAME_PATTERN)
    """Name of the new job; null keeps the spec's."""
    from_checkpoint: str | None = Field(default=None, pattern=r"^(best|latest|step-[0-9]{8})$")
    """Start from the weights of this checkpoint of the job: best, latest or an id. Null starts as the job itself did."""


BODIES = (JobSpec, CloneBody)


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
    new = Submission(spec, owner=owner, idempotency_key=idempotency_key, body_sha256=submission.body_hash(body) if idempotency_key else "")
    return await _submitted(parts, new)


async def _checked_only(parts: Parts, spec: JobSpec, owner: str) -> Response:
    if spec.model.init_from is not None or isinstance(spec.data, NamedData):
        spec = await run_in_threadpool(_resolved, parts, spec, owner)
    return JSONResponse(spec.model_dump(mode="json"))


def _resolved(parts: Parts, spec: JobSpec, owner: str) -> JobSpec:
    with parts.store.read() as tx:
        return submission.with_references_resolved(tx, spec, owner=owner)


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
        sha256 = submission.body_hash({"clone": job_id, "body": {} if body is ABSENT else body}) if idempotency_key else ""
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
    return pointing_into_set(violation, wanted.set)


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
        page = queries.page(tx, replace(wanted, states=each_once(state)), limit=limit, after=after, sort=by)
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
    if_none_match: IfNoneMatch = None,
    wait: WaitS = None,
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
