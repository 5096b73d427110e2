"""/v1/experiments: ask a question that many jobs answer, look at the answer, move the whole, fetch the report."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query
from fastapi.responses import JSONResponse
from pydantic import ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from api import answers, downloads, errors
from api.access import WithCaller
from api.answers import EXPERIMENTS, IdempotencyKey, IfMatch, IfNoneMatch, WaitS, changed, version_of
from api.bodies import ABSENT, JsonBody, checked, required
from api.catalogue import Names
from api.downloads import StoredFile, WithWanted
from api.errors import Refused
from api.experiment_documents import ExperimentDocument, ExperimentListDocument, ExperimentSummaryListDocument, PlanDocument
from api.openapi import BODY, CHANGES, NEW_JOB, STORED, json_request, only_what_is_given, problems
from api.parts import Parts, WithParts
from api.routes.jobs import DryRun
from api.strict import StrictRoute
from powergrad.experiments.labels import labels
from powergrad.jobs import outbox, submission
from powergrad.jobs.errors import ExperimentNotFound, InvalidSpec, Violation, refusal
from powergrad.jobs.experiments import lifecycle, plan, queries
from powergrad.jobs.experiments.changes import pointing_into_set, with_changes
from powergrad.jobs.experiments.lifecycle import NewExperiment
from powergrad.jobs.experiments.plan import Question
from powergrad.jobs.experiments.spec import ExperimentSpec
from powergrad.spec import BUILT_IN_DATASETS, NAME_PATTERN, SpecModel

EXPERIMENT_ID = re.compile(r"exp_[0-9A-HJKMNP-TV-Z]{26}")
MOST_SEEDS = 100

router = APIRouter(prefix="/v1/experiments", tags=["experiments"], route_class=StrictRoute)

ALPHAS = {
    "name": "alphas-on-glyphs",
    "spec": {"data": {"dataset": "glyphs"}, "model": {"name": "resnet8"}, "epochs": 10},
    "grid": {"loss.alpha": [1.0, 0.5, 0.25]},
    "tune": {"optimizer.lr": [0.025, 0.05, 0.1, 0.2]},
    "seeds": 5,
}
SMALLEST = {"spec": {"data": {"dataset": "digits"}}, "grid": {"loss.alpha": [1.0, 0.5]}}
CHECKED: dict[int | str, dict[str, Any]] = {
    200: {"description": "With dry_run: the question with every default, and what would be run; nothing stored.", "model": PlanDocument}
}


class CloneExperimentBody(SpecModel):
    set: dict[str, Any] = Field(default={})
    """Changes of the question by dotted name: {"spec.epochs": 3, "grid.loss.alpha": [1.0, 0.3], "seeds": 7}. Null takes a key of grid,
    tune, space, baseline or labels out."""
    name: str | None = Field(default=None, pattern=NAME_PATTERN)
    """Name of the new experiment; null keeps the old one's."""


class SeedsBody(SpecModel):
    model_config = ConfigDict(json_schema_extra={"required": ["count"]})

    count: int = Field(ge=1, le=MOST_SEEDS)
    """Further runs of every arm."""


class AmendExperimentBody(SpecModel):
    """What is left out stays as it is."""

    model_config = ConfigDict(json_schema_extra=only_what_is_given)

    name: str | None = Field(default=None, pattern=NAME_PATTERN)
    notes: str | None = Field(default=None, max_length=10_000, pattern=r"^[^\x00]*$")


BODIES = (ExperimentSpec, CloneExperimentBody, SeedsBody, AmendExperimentBody)


async def _experiment_id(
    experiment_id: Annotated[str, Path(description="Id of the experiment.", examples=["exp_01KAQZ5V3N8T4W6Y7C9E1G2H3J"])],
) -> str:
    if not EXPERIMENT_ID.fullmatch(experiment_id):
        raise ExperimentNotFound(experiment_id[:64])
    return experiment_id


ExperimentId = Annotated[str, Depends(_experiment_id)]
KNOWN = (errors.EXPERIMENT_NOT_FOUND,)
MORE_JOBS = (errors.ILLEGAL_MOVE, errors.IDEMPOTENCY_MISMATCH, errors.QUOTA_EXCEEDED, errors.STORAGE_FULL)


@router.post(
    "",
    operation_id="createExperiment",
    summary="Ask a question",
    status_code=202,
    response_model=ExperimentDocument,
    responses={
        202: {"description": "Stored, its first runs queued.", "headers": EXPERIMENTS.new_headers},
        **CHECKED,
        **problems(*STORED, *CHANGES, *NEW_JOB),
    },
    openapi_extra=json_request(ExperimentSpec, examples={"smallest": SMALLEST, "tuned": ALPHAS}),
)
async def create(
    parts: WithParts, caller: WithCaller, body: JsonBody, idempotency_key: IdempotencyKey = None, dry_run: DryRun = False
) -> Response:
    """Makes a job per arm and seed. With `tune` every arm first gets its own best values, on seeds of their own."""
    question = await _question(parts, required(body), caller.owner)
    if dry_run:
        return await run_in_threadpool(_planned, parts, question, caller.owner)
    sha256 = submission.body_hash({"experiment": body}) if idempotency_key else ""
    new = NewExperiment(question, owner=caller.owner, idempotency_key=idempotency_key, body_sha256=sha256)
    return await run_in_threadpool(_stored, parts, new)


async def _question(parts: Parts, body: Any, owner: str) -> Question:
    """Raises InvalidSpec."""
    names = await _names(parts, body, owner)
    question = plan.parse(body, models=names.models, datasets=names.datasets, outputs=names.outputs)
    try:
        outbox.check_webhook(question.base, allow=parts.settings.allow_list)
    except InvalidSpec as error:
        raise InvalidSpec([_in_spec(one) for one in error.violations]) from None
    return question


async def _names(parts: Parts, body: Any, owner: str) -> Names:
    """What may be named: the owner's own data sets too, where the body names one that is not built in."""
    own = [name for name in _datasets_named(body) if name not in BUILT_IN_DATASETS]
    return await parts.catalogue.names_for({"data": {"dataset": own[0]}} if own else {}, owner)


def _datasets_named(body: Any) -> list[str]:
    found = [_at(body, "spec", "data", "dataset")]
    for section in ("grid", "tune"):
        values = _at(body, section, "data.dataset")
        found += values if isinstance(values, list) else []
    values = _at(body, "space", "data.dataset", "values")
    found += values if isinstance(values, list) else []
    return [name for name in found if isinstance(name, str)]


def _at(value: Any, *names: str) -> Any:
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _in_spec(violation: Violation) -> Violation:
    return Violation(f"/spec{violation.pointer}", violation.code, violation.detail, violation.value)


def _planned(parts: Parts, question: Question, owner: str) -> Response:
    with parts.store.read() as tx:
        question, fixed = lifecycle.settled(tx, question, owner=owner)
    told = [{"index": arm.index, "settings": arm.settings, "tuned": {}} for arm in question.arms]
    spec = question.spec.model_dump(mode="json")
    names = labels(told, spec["spec"])  # type: ignore[arg-type]  # a TypedDict, made of literals
    return JSONResponse(
        {
            "object": "experiment_plan",
            "spec": spec,
            "arms": [
                {"index": arm.index, "label": label, "settings": arm.settings, "pinned": pinned}
                for arm, label, pinned in zip(question.arms, names, fixed.pinned, strict=True)
            ],
            "baseline": question.baseline,
            "seeds": list(question.seeds),
            "tuning_seeds": list(question.tuning_seeds),
            "runs": question.runs,
            "epochs": question.epochs,
        }
    )


def _stored(parts: Parts, new: NewExperiment) -> Response:
    parts.room.check()
    with parts.store.write() as tx:
        stored = lifecycle.submit(tx, new)
        experiment = queries.get(tx, stored.experiment_id, owner=new.owner)
    parts.doorbell.ring()
    return answers.submitted(EXPERIMENTS, experiment, replayed=stored.replayed)


@router.post(
    "/{experiment_id}/clone",
    operation_id="cloneExperiment",
    summary="Ask a question again, with changes",
    status_code=202,
    response_model=ExperimentDocument,
    responses={
        202: {"description": "The new experiment.", "headers": EXPERIMENTS.new_headers},
        **CHECKED,
        **problems(*STORED, *CHANGES, *NEW_JOB, *KNOWN),
    },
    openapi_extra=json_request(CloneExperimentBody, is_required=False, examples={"longer": {"set": {"spec.epochs": 20}}}),
)
async def clone(
    parts: WithParts,
    caller: WithCaller,
    experiment_id: ExperimentId,
    body: JsonBody,
    idempotency_key: IdempotencyKey = None,
    dry_run: DryRun = False,
) -> Response:
    wanted = checked(CloneExperimentBody, {} if body is ABSENT else body)
    origin = await run_in_threadpool(answers.look, parts, EXPERIMENTS, experiment_id, caller.owner)
    asked = with_changes(origin["spec"], wanted.set)
    if wanted.name is not None:
        asked["name"] = wanted.name
    try:
        question = await _question(parts, asked, caller.owner)
        if dry_run:
            return await run_in_threadpool(_planned, parts, question, caller.owner)
        sent = {"clone": experiment_id, "body": {} if body is ABSENT else body}
        sha256 = submission.body_hash(sent) if idempotency_key else ""
        new = NewExperiment(question, owner=caller.owner, idempotency_key=idempotency_key, body_sha256=sha256, cloned_from=experiment_id)
        return await run_in_threadpool(_stored, parts, new)
    except InvalidSpec as error:
        raise refusal([pointing_into_set(violation, wanted.set) for violation in error.violations]) from None


@router.get(
    "",
    operation_id="listExperiments",
    summary="List experiments, newest first",
    response_model=ExperimentListDocument | ExperimentSummaryListDocument,
    responses={
        200: {"description": "A page of whole experiments, or with `view=summary` of the lines of a table."},
        **problems(*STORED),
    },
)
def list_experiments(
    parts: WithParts,
    caller: WithCaller,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(description="`last_id` of the page before.", pattern=f"^{EXPERIMENT_ID.pattern}$")] = None,
    state: Annotated[
        list[Literal["queued", "running", "paused", "cancelling", "cancelled", "succeeded", "failed"]] | None,
        Query(description="Repeat for several."),
    ] = None,
    view: Annotated[Literal["full", "summary"], Query(description="Whole experiments, or the lines of a table.")] = "full",
) -> Response:
    look = queries.page if view == "full" else queries.summaries
    with parts.store.read() as tx:
        page = look(tx, owner=caller.owner, limit=limit, after=after, state=tuple(dict.fromkeys(state or ())))
    return answers.listed(page)


@router.get(
    "/{experiment_id}",
    operation_id="getExperiment",
    summary="Look at an experiment and its verdict",
    response_model=ExperimentDocument,
    responses={
        200: {"description": "The experiment. Its jobs: GET /v1/jobs?experiment=ID.", "headers": EXPERIMENTS.etag_header},
        304: {"description": "Nothing has changed since If-None-Match."},
        **problems(*STORED, *KNOWN),
    },
)
async def get(
    parts: WithParts, caller: WithCaller, experiment_id: ExperimentId, if_none_match: IfNoneMatch = None, wait: WaitS = None
) -> Response:
    return await answers.got(parts, EXPERIMENTS, experiment_id, owner=caller.owner, if_none_match=if_none_match, wait_s=wait)


# --- moves


MOVED: dict[int | str, dict[str, Any]] = {
    202: {"description": "Asked for (or done before); `state` says how far it is.", "headers": EXPERIMENTS.etag_header},
    **problems(*STORED, *CHANGES, *KNOWN, errors.ILLEGAL_MOVE),
}


@router.post(
    "/{experiment_id}/cancel",
    operation_id="cancelExperiment",
    summary="End all its jobs",
    status_code=202,
    response_model=ExperimentDocument,
    responses=MOVED,
)
def cancel(parts: WithParts, caller: WithCaller, experiment_id: ExperimentId) -> Response:
    return changed(parts, EXPERIMENTS, experiment_id, caller.owner, lambda tx: lifecycle.cancel(tx, experiment_id, owner=caller.owner))


@router.post(
    "/{experiment_id}/pause",
    operation_id="pauseExperiment",
    summary="Pause all its jobs",
    status_code=202,
    response_model=ExperimentDocument,
    responses=MOVED,
)
def pause(parts: WithParts, caller: WithCaller, experiment_id: ExperimentId) -> Response:
    return changed(parts, EXPERIMENTS, experiment_id, caller.owner, lambda tx: lifecycle.pause(tx, experiment_id, owner=caller.owner))


@router.post(
    "/{experiment_id}/resume",
    operation_id="resumeExperiment",
    summary="Queue its paused jobs again",
    status_code=202,
    response_model=ExperimentDocument,
    responses=MOVED | problems(*STORED, *CHANGES, *KNOWN, errors.ILLEGAL_MOVE, errors.QUOTA_EXCEEDED),
)
def resume(parts: WithParts, caller: WithCaller, experiment_id: ExperimentId) -> Response:
    return changed(
        parts, EXPERIMENTS, experiment_id, caller.owner, lambda tx: lifecycle.resume(tx, experiment_id, owner=caller.owner), ring=True
    )


@router.post(
    "/{experiment_id}/seeds",
    operation_id="addSeeds",
    summary="Run every arm on further seeds",
    status_code=202,
    response_model=ExperimentDocument,
    responses={
        202: {
            "description": "The experiment, which runs again if it had ended.",
            "headers": EXPERIMENTS.etag_header | EXPERIMENTS.replayed_header,
        },
        **problems(*STORED, *CHANGES, *BODY, *KNOWN, *MORE_JOBS),
    },
    openapi_extra=json_request(SeedsBody, examples={"five more": {"count": 5}}),
)
def add_seeds(
    parts: WithParts, caller: WithCaller, experiment_id: ExperimentId, body: JsonBody, idempotency_key: IdempotencyKey = None
) -> Response:
    """Arms keep what tuning chose for them. To add seeds until a difference shows makes one show where there is none: the verdict names
    beforehand how many would settle it."""
    count = checked(SeedsBody, required(body)).count
    parts.room.check()
    return changed(
        parts,
        EXPERIMENTS,
        experiment_id,
        caller.owner,
        lambda tx: lifecycle.add_seeds(tx, experiment_id, count, owner=caller.owner, idempotency_key=idempotency_key),
        ring=True,
    )


@router.patch(
    "/{experiment_id}",
    operation_id="updateExperiment",
    summary="Change name or notes",
    response_model=ExperimentDocument,
    responses={
        200: {"description": "The experiment, changed.", "headers": EXPERIMENTS.etag_header},
        **problems(*STORED, *CHANGES, *BODY, *KNOWN, errors.VERSION_MISMATCH),
    },
    openapi_extra=json_request(AmendExperimentBody, examples={"rename": {"name": "alphas", "notes": "for the report"}}),
)
def amend(parts: WithParts, caller: WithCaller, experiment_id: ExperimentId, body: JsonBody, if_match: IfMatch = None) -> Response:
    wanted = checked(AmendExperimentBody, required(body))
    given = {name: getattr(wanted, name) for name in wanted.model_fields_set}
    if nulls := [name for name, value in given.items() if value is None]:
        raise InvalidSpec([Violation(f"/{name}", "wrong_type", "must not be null: leave it out to keep what is there") for name in nulls])
    version = version_of(if_match)
    return changed(
        parts,
        EXPERIMENTS,
        experiment_id,
        caller.owner,
        lambda tx: lifecycle.amend(tx, experiment_id, name=wanted.name, notes=wanted.notes, expected_version=version, owner=caller.owner),
        status=200,
    )


@router.delete(
    "/{experiment_id}",
    operation_id="deleteExperiment",
    summary="Delete an experiment that has ended, with its jobs and files",
    status_code=204,
    responses={
        204: {"description": "It is gone with its jobs; their files go within seconds."},
        **problems(*STORED, *CHANGES, *KNOWN, errors.ILLEGAL_MOVE),
    },
)
def delete(parts: WithParts, caller: WithCaller, experiment_id: ExperimentId) -> Response:
    with parts.store.write() as tx:
        lifecycle.remove(tx, experiment_id, owner=caller.owner)
    return Response(status_code=204)


# --- the report


FILES = {
    "report.html": ("text/html", "The report: one page, complete in itself, to read or to print"),
    "report.md": ("text/markdown", "The report as Markdown"),
    "report.json": ("application/json", "All that was found, as JSON"),
    "plot.svg": ("image/svg+xml", "The differences as a figure"),
    "plot.png": ("image/png", "The same figure as pixels"),
    "runs.csv": ("text/csv", "Every run in a row"),
}
ISOLATED = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; sandbox"
"""Of what a browser may show: names and notes in it are its users' words, so that nothing in it runs, loads or sends."""


def _serve(name: str, media_type: str, summary: str) -> None:
    """A route of its own for each file, so that the document says what type it has."""

    def send(parts: WithParts, caller: WithCaller, experiment_id: ExperimentId, wanted: WithWanted) -> Response:
        with parts.store.read() as tx:
            found = queries.file(tx, experiment_id, name, owner=caller.owner)
        if parts.artifacts.size(found.path) != found.bytes:
            raise Refused(errors.REPORT_NOT_READY, f"{name} is just being written anew: try again")
        file = StoredFile(found.path, f"{experiment_id}-{name}", found.media_type, found.bytes, found.sha256)
        response = downloads.send(parts.artifacts, file, wanted)
        response.headers["Content-Disposition"] = f'inline; filename="{file.filename}"'
        response.headers["Content-Security-Policy"] = ISOLATED
        return response

    stem, _, suffix = name.partition(".")
    said = downloads.responses(*STORED, *KNOWN, errors.ARTIFACT_NOT_FOUND, errors.REPORT_NOT_READY, media_type=media_type)
    operation = f"{stem.capitalize()}{suffix.capitalize()}"
    for method, verb, responses in (("GET", "get", said), ("HEAD", "head", downloads.without_content(said))):
        router.add_api_route(
            f"/{{experiment_id}}/{name}",
            send,
            methods=[method],
            operation_id=f"{verb}Experiment{operation}",
            summary=summary if method == "GET" else f"Size and digest of {name}",
            response_class=Response,
            responses=responses,
        )


for _name, (_media_type, _summary) in FILES.items():
    _serve(_name, _media_type, _summary)
