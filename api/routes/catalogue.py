"""What a spec may say: models, data sets, and the schema with every default and range."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from starlette.responses import Response

from api.documents import CatalogueDocument
from api.openapi import STORED, problems
from api.parts import Parts, WithParts
from powergrad.jobs import fleet
from powergrad.jobs.spec import JobSpec

router = APIRouter(prefix="/v1", tags=["catalogue"])


@router.get(
    "/models",
    operation_id="listModels",
    summary="What spec.model.name may be",
    response_model=CatalogueDocument,
    responses=problems(*STORED),
)
def models(parts: WithParts) -> Response:
    return _published(parts, "models")


@router.get(
    "/datasets",
    operation_id="listDatasets",
    summary="What spec.data.dataset may be",
    response_model=CatalogueDocument,
    responses=problems(*STORED),
)
def datasets(parts: WithParts) -> Response:
    return _published(parts, "datasets")


def _published(parts: Parts, kind: str) -> Response:
    with parts.store.read() as tx:
        entries = fleet.published(tx, kind)
    return JSONResponse({"object": "list", "data": entries})


SCHEMA = {"$schema": "https://json-schema.org/draft/2020-12/schema", **JobSpec.model_json_schema()}


@router.get(
    "/schemas/job",
    operation_id="getJobSchema",
    summary="JSON Schema of a spec",
    response_model=dict[str, Any],
    responses=problems(),
)
async def job_schema() -> Response:
    return JSONResponse(SCHEMA, headers={"Cache-Control": "max-age=300"}, media_type="application/schema+json")
