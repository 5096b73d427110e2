"""The peer of the API's submissions: a FastAPI server that validates the same spec, stores nothing and calls `apply_async` in the handler.

    python -m benchmarks.inline PORT BROKER_URL

POST /def is a plain function, as FastAPI's documentation wants one that blocks; POST /async blocks the event loop.
"""

from __future__ import annotations

import sys
from typing import Any

import uvicorn
from celery import Celery
from fastapi import FastAPI

from powergrad.jobs.spec import JobSpec


def create_app(broker_url: str) -> FastAPI:
    celery = Celery("inline", broker=broker_url)

    @celery.task(ignore_result=True)
    def train(spec: dict[str, Any]) -> None:
        raise AssertionError(f"there is no worker: {spec}")

    app = FastAPI()

    @app.post("/def", status_code=202)
    def submit(spec: JobSpec) -> dict[str, str]:
        return {"id": train.apply_async(args=(spec.model_dump(mode="json"),), queue="inline").id}

    @app.post("/async", status_code=202)
    async def submit_on_the_loop(spec: JobSpec) -> dict[str, str]:
        return {"id": train.apply_async(args=(spec.model_dump(mode="json"),), queue="inline").id}

    return app


if __name__ == "__main__":
    uvicorn.run(create_app(sys.argv[2]), port=int(sys.argv[1]), log_level="error", access_log=False)
