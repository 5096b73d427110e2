"""Whether the process lives, whether jobs can run, and what Prometheus wants to know."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import Response

from api import errors
from api.documents import HealthDocument, ReadinessDocument
from api.errors import RETRY_AFTER_S, Refused
from api.openapi import problems
from api.parts import Parts, WithParts
from powergrad import __version__
from powergrad.jobs import fleet, migrate
from powergrad.jobs.states import JobState
from powergrad.jobs.store import Store
from powergrad.jobs.tables import jobs

OK = "ok"
MIGRATE = "python -P -m powergrad.jobs.migrate"

router = APIRouter(tags=["health"])


@router.get(
    "/healthz", operation_id="isAlive", summary="The process lives", response_model=HealthDocument, responses=problems(is_open=True)
)
async def healthz() -> Response:
    return JSONResponse({"status": OK})


@router.get(
    "/readyz",
    operation_id="isReady",
    summary="Database, broker and at least one worker are there",
    response_model=ReadinessDocument,
    responses=problems(errors.NOT_READY, is_open=True),
)
def readyz(parts: WithParts) -> Response:
    checks = _checks(parts)
    missing = [f"{name}: {said}" for name, said in checks.items() if said not in (OK, checks["workers"])]
    if not checks["workers"]:
        missing.append("workers: none is alive; start one with python -P -m worker")
    if missing:
        raise Refused(errors.NOT_READY, "; ".join(missing), headers={"Retry-After": str(RETRY_AFTER_S)}, checks=checks)
    return JSONResponse({"status": "ready", "version": __version__, "checks": checks})


def _checks(parts: Parts) -> dict[str, Any]:
    broker = OK if parts.doorbell.is_connected() else "does not answer: jobs start later, when workers look by themselves"
    try:
        outdated = schema_problem(parts.store)
        if outdated is not None:
            return {"database": outdated, "broker": broker, "workers": 0}
        with parts.store.read() as tx:
            return {"database": OK, "broker": broker, "workers": fleet.capacity(tx).workers}
    except SQLAlchemyError as error:
        return {"database": f"does not answer: {str(error).splitlines()[0][:200]}", "broker": broker, "workers": 0}


def schema_problem(store: Store) -> str | None:
    """What to do about the database's schema; None when it is this release's. Raises SQLAlchemyError."""
    if migrate.is_current(store):
        return None
    url = store.url.render_as_string(hide_password=True)
    return f"its tables are not those of release {__version__}: run `{MIGRATE} --database-url {url}`"


@router.get(
    "/metrics",
    operation_id="getProcessMetrics",
    summary="Prometheus text",
    response_class=Response,
    responses={200: {"description": "Text exposition format.", "content": {"text/plain": {"schema": {"type": "string"}}}}, **problems()},
)
def prometheus(parts: WithParts) -> Response:
    measures = parts.measures
    try:
        with parts.store.read() as tx:
            counts = {row.state: row.n for row in tx.all(select(jobs.c.state, func.count().label("n")).group_by(jobs.c.state))}
            measures.workers.set(fleet.capacity(tx).workers)
    except SQLAlchemyError:
        measures.database_up.set(0)  # a scrape tells of an outage; it is no part of one
    else:
        measures.database_up.set(1)
        for state in JobState:
            measures.jobs.labels(state.value).set(counts.get(state.value, 0))
    return Response(generate_latest(measures.registry), media_type=CONTENT_TYPE_LATEST)
