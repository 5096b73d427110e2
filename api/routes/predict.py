"""/v1/predict and /v1/tasks: short work that a worker's child does, waited for here without a thread."""

from __future__ import annotations

import asyncio
import re
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from api import errors
from api.access import WithCaller
from api.bodies import read_bytes
from api.border import IMAGES, TAKES_IMAGES
from api.documents import PredictionDocument, TaskDocument
from api.errors import RETRY_AFTER_S, Refused, parameter_error
from api.openapi import CHANGES, STORED, binary_request, problems
from api.parts import JobId, Parts, WithParts
from api.routes.checkpoints import CHECKPOINT_ID, WEIGHTS
from api.strict import StrictRoute
from powergrad.jobs import fleet, queries, tasks
from powergrad.jobs.errors import ArtifactNotFound, CheckpointNotFound, TaskNotFound
from powergrad.jobs.rows import job_dir
from powergrad.jobs.states import JobState
from powergrad.jobs.store import Tx
from powergrad.protocol import LABELS, PREPROCESSING, Question

KIND = "predict"
TASK_ID = re.compile(r"task_[0-9A-HJKMNP-TV-Z]{26}")
LOCATION = {"Location": {"schema": {"type": "string"}, "description": "Path of the task."}}

router = APIRouter(prefix="/v1", tags=["predictions"], route_class=StrictRoute)


@router.post(
    f"{TAKES_IMAGES.removeprefix('/v1')}{{job_id}}",
    operation_id="predict",
    summary="What a job's network makes of an image",
    response_model=PredictionDocument,
    responses={
        200: {"description": "The likeliest classes."},
        202: {
            "description": "It takes longer: the task will have the prediction as its `result`.",
            "model": TaskDocument,
            "headers": LOCATION,
        },
        **problems(
            *STORED,
            *CHANGES,
            errors.MALFORMED,
            errors.TOO_LARGE,
            errors.JOB_NOT_FOUND,
            errors.CHECKPOINT_NOT_FOUND,
            errors.NO_CHECKPOINT,
            errors.UNREADABLE_IMAGE,
            errors.TASK_FAILED,
            errors.NO_WORKER,
            errors.STORAGE_FULL,
        ),
    },
    openapi_extra=binary_request(IMAGES),
)
async def predict(
    parts: WithParts,
    caller: WithCaller,
    request: Request,
    job_id: JobId,
    top: Annotated[int, Query(ge=1, le=1000, description="How many classes to name.")] = 5,
    checkpoint: Annotated[
        str, Query(description="An id, `best` or `latest`.", json_schema_extra={"pattern": f"^({CHECKPOINT_ID.pattern})$"})
    ] = "best",
) -> Response:
    if not CHECKPOINT_ID.fullmatch(checkpoint):
        raise parameter_error("checkpoint", "bad_format", "must be best, latest or an id such as step-00000800", checkpoint[:64])
    image = await read_bytes(request, parts.settings.max_image_bytes)
    if not image:
        raise Refused(errors.MALFORMED, "the body is empty: send an image")
    parts.room.check()
    task_id = await run_in_threadpool(_submit, parts, caller.owner, job_id, checkpoint, top, image)
    parts.doorbell.ring()
    return _answered(await _ended(parts, task_id, caller.owner))


def _submit(parts: Parts, owner: str, job_id: str, checkpoint: str, top: int, image: bytes) -> str:
    with parts.store.read() as tx:
        task_id = tasks.new_id(tx)
        question = _question(tx, owner, job_id, checkpoint, top, image=f"{tasks.task_dir(task_id)}/image")
        capacity = fleet.capacity(tx)
    if not capacity.workers + capacity.starting:
        retry = {"Retry-After": str(RETRY_AFTER_S)}
        raise Refused(errors.NO_WORKER, "no worker is alive to look at the image: start one with python -P -m worker", headers=retry)
    parts.artifacts.write(question.image, image)  # before the task: a worker must never meet one without its image
    try:
        with parts.store.write() as tx:
            tasks.submit(tx, task_id, KIND, asdict(question), job_id=job_id, owner=owner)
    except BaseException:
        parts.artifacts.delete(tasks.task_dir(task_id))
        raise
    return task_id


def _question(tx: Tx, owner: str, job_id: str, checkpoint: str, top: int, *, image: str) -> Question:
    spec, home = queries.spec_of(tx, job_id, owner=owner), job_dir(job_id)
    try:
        found = queries.find_checkpoint(tx, job_id, checkpoint, owner=owner)
        labels, preprocessing = (queries.find_artifact(tx, job_id, name, owner=owner) for name in (LABELS, PREPROCESSING))
    except CheckpointNotFound as error:
        if checkpoint.startswith("step-"):
            raise
        raise Refused(errors.NO_CHECKPOINT, f"{error}: it has none yet") from None
    except ArtifactNotFound as error:
        raise Refused(errors.NO_CHECKPOINT, f"{error}, which a prediction needs") from None
    return Question(
        job=job_id,
        checkpoint=found.id,
        spec=spec.training().model_dump(mode="json"),
        weights=f"{home}/{found.path}/{WEIGHTS}",
        sha256=found.sha256,
        labels=f"{home}/{labels.path}",
        preprocessing=f"{home}/{preprocessing.path}",
        image=image,
        top=top,
    )


async def _ended(parts: Parts, task_id: str, owner: str) -> dict[str, Any]:
    """The task when it has ended, or as it is after `predict_wait_s`."""
    assert parts.tailer is not None, "the application has started"
    now = asyncio.get_running_loop().time
    until = now() + parts.settings.predict_wait_s
    with parts.tailer.watch(task_id) as watcher:
        while (watcher.pulse is None or not watcher.pulse.is_over) and now() < until and not parts.tailer.is_stopping:
            await watcher.changed(max(0.0, until - now()))
    return await parts.tailer.read(lambda tx: tasks.get(tx, task_id, owner=owner))


def _answered(task: dict[str, Any]) -> Response:
    location = {"Location": f"/v1/tasks/{task['id']}"}
    if task["state"] == JobState.SUCCEEDED:
        return JSONResponse(task["result"], headers=location)
    if task["state"] != JobState.FAILED:
        return JSONResponse(task, status_code=202, headers=location | {"Retry-After": str(RETRY_AFTER_S)})
    error = task["error"]
    if error["code"] == "data_unreadable":
        raise Refused(errors.UNREADABLE_IMAGE, error["detail"])
    if error["code"] == "data_missing":
        raise Refused(errors.NO_CHECKPOINT, error["detail"])
    raise Refused(errors.TASK_FAILED, f"{error['code']}: {error['detail']}", task=task["id"], error=error)


@router.get(
    "/tasks/{task_id}",
    operation_id="getTask",
    summary="Look at a task",
    response_model=TaskDocument,
    responses=problems(*STORED, errors.TASK_NOT_FOUND),
)
def get_task(
    parts: WithParts,
    caller: WithCaller,
    task_id: Annotated[str, Path(description="Id of the task.", examples=["task_01KAQZ5V3N8T4W6Y7C9E1G2H3J"])],
) -> Response:
    if not TASK_ID.fullmatch(task_id):
        raise TaskNotFound(task_id[:64])
    with parts.store.read() as tx:
        found = tasks.get(tx, task_id, owner=caller.owner)
    return JSONResponse(found, headers={"Cache-Control": "no-cache"})
