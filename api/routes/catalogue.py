"""What a spec may say: models, presets, and the schema with every default and range."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path
from fastapi.responses import JSONResponse
from starlette.responses import Response

from api import errors
from api.documents import CatalogueDocument, PresetDocument, PresetListDocument
from api.errors import Refused
from api.openapi import STORED, problems
from api.parts import WithParts
from api.strict import StrictRoute
from powergrad import presets
from powergrad.jobs import fleet
from powergrad.jobs.spec import JobSpec
from powergrad.presets import Preset

router = APIRouter(prefix="/v1", tags=["catalogue"], route_class=StrictRoute)


@router.get(
    "/models",
    operation_id="listModels",
    summary="What spec.model.name may be",
    response_model=CatalogueDocument,
    responses=problems(*STORED),
)
def models(parts: WithParts) -> Response:
    with parts.store.read() as tx:
        entries = fleet.published(tx, "models")
    return JSONResponse({"object": "list", "data": entries})


SCHEMA = {"$schema": "https://json-schema.org/draft/2020-12/schema", **JobSpec.model_json_schema()}


class SchemaResponse(JSONResponse):
    media_type = "application/schema+json"


@router.get(
    "/schemas/job",
    operation_id="getJobSchema",
    summary="JSON Schema of a spec",
    response_model=dict[str, Any],
    response_class=SchemaResponse,
    responses=problems(),
)
async def job_schema() -> Response:
    return SchemaResponse(SCHEMA, headers={"Cache-Control": "max-age=300"})


@router.get(
    "/presets",
    operation_id="listPresets",
    summary="The paper's experiments as ready specs",
    response_model=PresetListDocument,
    responses=problems(),
)
async def list_presets() -> Response:
    return JSONResponse({"object": "list", "data": [_shown(one) for one in presets.all_presets()]})


@router.get(
    "/presets/{name}",
    operation_id="getPreset",
    summary="One of the paper's experiments",
    response_model=PresetDocument,
    responses=problems(errors.PRESET_NOT_FOUND),
)
async def get_preset(name: Annotated[str, Path(description="Its name in the list.")]) -> Response:
    try:
        return JSONResponse(_shown(presets.preset(name[:64])))
    except KeyError as error:
        raise Refused(errors.PRESET_NOT_FOUND, str(error.args[0])) from None


def _shown(one: Preset) -> dict[str, Any]:
    paper = {"row": one.row, "train_top1": one.train_top1, "val_top1": one.val_top1, "gain": one.gain}
    return {"name": one.name, "object": "preset", "title": one.title, "spec": one.spec, "paper": paper}
