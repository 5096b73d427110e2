"""The REST server as an application: `create_app(settings)`.

It imports neither torch, scipy, matplotlib nor the worker: it validates, stores, rings and shows; others train.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from api import errors, openapi
from api.border import Border
from api.parts import Parts
from api.routes import (
    artifacts,
    catalogue,
    checkpoints,
    comparisons,
    datasets,
    events,
    experiments,
    health,
    jobs,
    keys,
    lists,
    logs,
    metrics,
    moves,
    pages,
    predict,
    session,
    usage,
    webhooks,
    workers,
)
from api.settings import ApiSettings
from powergrad import __version__

DESCRIPTION = """
Train image classifiers over HTTP. POST a spec to `/v1/jobs`; the answer is a job, stored before you hear of it. Follow it by
`GET /v1/jobs/{id}?wait=30`, by its event stream, its metrics and its logs; download its checkpoints. Every refusal is an
`application/problem+json` document (RFC 9457) whose `code` is stable.
"""
TAGS = [
    {"name": "jobs", "description": "Submit, look, move, change, delete."},
    {"name": "experiments", "description": "Questions that many jobs answer: ask, look, move the whole, fetch the report."},
    {"name": "events", "description": "What happened, numbered without gaps, as a list or a stream."},
    {"name": "metrics", "description": "Series of numbers."},
    {"name": "logs", "description": "What the trainers wrote."},
    {"name": "checkpoints", "description": "Weights to download."},
    {"name": "artifacts", "description": "Tables, pictures and exports to download."},
    {"name": "predictions", "description": "Ask a trained network about an image."},
    {"name": "catalogue", "description": "What a spec may say."},
    {"name": "datasets", "description": "Images to train on: built in, uploaded, registered."},
    {"name": "workers", "description": "Who trains."},
    {"name": "keys", "description": "Who may call, and how much."},
    {"name": "webhooks", "description": "Who is told of jobs' moves, and whether they heard."},
    {"name": "health", "description": "Probes and measures."},
]


def create_app(settings: ApiSettings) -> FastAPI:
    """The application. What runs beside the requests (doorbell, sweeper, tailer) starts and ends with its lifespan."""
    parts = Parts.of(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        parts.start()
        try:
            yield
        finally:
            await parts.stop_streams()
            parts.stop()

    app = FastAPI(
        title="PowerGrad",
        version=__version__,
        summary="Train image classifiers over HTTP.",
        description=DESCRIPTION,
        openapi_tags=TAGS,
        docs_url=None,  # both would load from a CDN
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.parts = parts
    app.include_router(jobs.busy)
    for noun in (
        jobs,
        lists,
        moves,
        experiments,
        events,
        metrics,
        comparisons,
        logs,
        checkpoints,
        artifacts,
        predict,
        catalogue,
        datasets,
        workers,
        keys,
        session,
        usage,
        webhooks,
        health,
    ):
        app.include_router(noun.router)
    pages.install(app)
    openapi.install(
        app,
        (
            *jobs.BODIES,
            *lists.BODIES,
            *moves.BODIES,
            *experiments.BODIES,
            *datasets.BODIES,
            *webhooks.BODIES,
            *keys.BODIES,
            *session.BODIES,
            *usage.BODIES,
        ),
    )
    errors.install(app)
    app.add_middleware(Border, measures=parts.measures, key_ring=parts.key_ring)
    return app
