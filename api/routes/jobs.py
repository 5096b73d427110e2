"""/v1/jobs: submit, list, look, move, change, delete."""

from __future__ import annotations

from typing import Annotated, Any

import structlog
from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from api import answers, errors
from api.access import WithCaller, caller_of
from api.answers import JOBS, IdempotencyKey, IfNoneMatch, WaitS
from api.bodies import ABSENT, JsonBody, checked, read_json, required
from api.documents import JobDocument
from api.openapi import CHANGES, NEW_JOB, STORED, json_request, problems
from api.parts import JobId, Parts, WithParts
from api.strict import DirectRoute, StrictRoute
from powergrad.jobs import outbox, submission
from powergrad.jobs.changes import pointing_into_set, with_changes
from powergrad.jobs.errors import InvalidSpec, Violation, refusal
from powergrad.jobs.spec import JobSpec, parse
from powergrad.jobs.submission import Submission
from powergrad.spec import NAME_PATTERN, NamedData, SpecModel

log = structlog.get_logger(__name__)
router = APIRouter(prefix="/v1/jobs", tags=["jobs"], route_class=StrictRoute)
busy = APIRouter(prefix="/v1/jobs", tags=["jobs"], route_class=DirectRoute)
DIGITS = {"data": {"dataset": "digits"}}
DIGITS_PGT = {"name": "digits-pgt", "data": {"dataset": "digits"}, "loss": {"alpha": 0.25}, "epochs": 20, "labels": {"team": "vision"}}
CHECKED: dict[int | str, dict[str, Any]] = {
    200: {"description": "With dry_run: the spec with every default, nothing stored.", "model": JobSpec}
}
DryRun = Annotated[bool, Query(description="Only check and normalise the spec.")]


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
        202: {"description": "Stored and queued: it survives whatever happens next.", "headers": JOBS.new_headers},
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
    spec = parse(body, models=names.models, datasets=names.datasets, outputs=names.outputs)
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
    return answers.submitted(JOBS, stored.job, replayed=stored.replayed)


@router.post(
    "/{job_id}/clone",
    operation_id="cloneJob",
    summary="Submit a job again, with changes",
    status_code=202,
    response_model=JobDocument,
    responses={
        202: {"description": "The new job.", "headers": JOBS.new_headers},
        **CHECKED,
        **problems(*STORED, *CHANGES, *NEW_JOB, errors.JOB_NOT_FOUND),
    },
    openapi_extra=json_request(CloneBody, is_required=False, examples={"another alpha": {"set": {"loss.alpha": 0.3}}}),
)
async def clone(
    parts: WithParts, caller: WithCaller, job_id: JobId, body: JsonBody, idempotency_key: IdempotencyKey = None, dry_run: DryRun = False
) -> Response:
    wanted = checked(CloneBody, {} if body is ABSENT else body)
    origin = await run_in_threadpool(answers.look, parts, JOBS, job_id, caller.owner)
    changed = with_changes(origin["spec"], wanted.set)
    names = await parts.catalogue.names_for(changed, caller.owner)
    if wanted.name is not None:
        changed["name"] = wanted.name
    if wanted.from_checkpoint is not None:
        changed["model"] = _starting_from(f"{job_id}/{wanted.from_checkpoint}", changed["model"], wanted.set)
    try:
        spec = parse(changed, models=names.models, datasets=names.datasets, outputs=names.outputs)
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
    "/{job_id}",
    operation_id="getJob",
    summary="Look at a job",
    response_model=JobDocument,
    responses={
        200: {"description": "The job.", "headers": JOBS.etag_header},
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
    return await answers.got(parts, JOBS, job_id, owner=caller.owner, if_none_match=if_none_match, wait_s=wait)
