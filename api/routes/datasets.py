"""Data sets: the built-in ones, uploads and registered folders, with what their check has found."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import quote, urlencode

from fastapi import APIRouter, Path, Query
from fastapi.responses import JSONResponse
from pydantic import Field, model_validator
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from api import downloads, errors, uploads
from api.access import WithCaller
from api.bodies import checked, read_json, required
from api.border import ARCHIVES
from api.documents import DatasetDocument, DatasetListDocument, DatasetSamplesDocument
from api.downloads import StoredFile, WithWanted
from api.errors import RETRY_AFTER_S, Refused, parameter_error
from api.openapi import BODY, CHANGES, STORED, Responses, problems
from api.parts import Parts, WithParts
from api.strict import StrictRoute
from api.uploads import Sent
from powergrad.jobs import datasets, fleet
from powergrad.jobs.errors import DatasetNotFound, InvalidSpec, Violation, refusal
from powergrad.jobs.keys import Caller, Scope
from powergrad.jobs.uploads import Added, register
from powergrad.spec import GOES_DOWN, NAME_PATTERN, RELATIVE_PATH_PATTERN, VERSION_PATTERN, Broken, SpecModel, refuse

router = APIRouter(prefix="/v1", tags=["datasets"], route_class=StrictRoute)

ROOT = "datasets"
"""The data root, below the data directory."""
LOCATION = {"Location": {"schema": {"type": "string"}, "description": "Path of the data set."}}


class RegisterBody(SpecModel):
    name: str = Field(pattern=NAME_PATTERN)
    """What specs will call it."""
    path: str = Field(pattern=RELATIVE_PATH_PATTERN, json_schema_extra=GOES_DOWN)
    """Folder below the data root: one sub-folder a class, or train/ and val/ (and test/) with one each."""

    @model_validator(mode="after")
    def _path_goes_down(self) -> RegisterBody:
        if {".", ".."} & set(self.path.split("/")):
            refuse(self, [Broken("path", "invalid_path", "must not contain . or .. as a folder name")])
        return self


BODIES = [RegisterBody]
_CONTENT: dict[str, Any] = {
    "application/json": {"schema": {"$ref": f"#/components/schemas/{RegisterBody.__name__}"}},
    **{kind: {"schema": {"type": "string", "format": "binary"}} for kind in ARCHIVES},
}
_ADDED: Responses = {
    200: {"description": "The same files are that set's already: nothing was stored.", "model": DatasetDocument, "headers": LOCATION},
    202: {"description": "A worker looks at every file; then the set is ready, or failed.", "model": DatasetDocument, "headers": LOCATION},
}
Name = Annotated[str, Path(description="Its name.", examples=["flowers"])]
Version = Annotated[str | None, Query(pattern=VERSION_PATTERN, description="This version alone.")]


@router.get(
    "/datasets",
    operation_id="listDatasets",
    summary="What spec.data.dataset may be",
    response_model=DatasetListDocument,
    responses=problems(*STORED),
)
def list_datasets(parts: WithParts, caller: WithCaller) -> Response:
    """The built-in sets, then the caller's own by name."""
    with parts.store.read() as tx:
        entries = [*fleet.published(tx, "datasets"), *datasets.listed(tx, caller.owner)]
    return JSONResponse({"object": "list", "data": entries}, headers={"Cache-Control": "no-cache"})


@router.post(
    "/datasets",
    operation_id="createDataset",
    summary="Upload an archive of class folders, or register a folder",
    response_model=DatasetDocument,
    status_code=202,
    responses={
        **_ADDED,
        **problems(
            *STORED,
            *CHANGES,
            *BODY,
            errors.UNKNOWN_REFERENCE,
            errors.NAME_TAKEN,
            errors.BAD_ARCHIVE,
            errors.QUOTA_EXCEEDED,
            errors.UPLOAD_LOST,
            errors.STORAGE_FULL,
        ),
    },
    openapi_extra={"requestBody": {"required": True, "content": _CONTENT}},
)
async def create_dataset(
    parts: WithParts,
    caller: WithCaller,
    request: Request,
    name: Annotated[str | None, Query(pattern=NAME_PATTERN, description="Of an archive: what specs will call the set.")] = None,
    unreadable: Annotated[
        Literal["fail", "skip"] | None,
        Query(description="Of an archive: whether images that cannot be decoded fail the set (the default), or are left out of it."),
    ] = None,
) -> Response:
    """An archive (zip; tar, plain or packed by gzip, bzip2 or xz) holds a folder per class, or train/ and val/ (and test/) with a folder per class
    in each, and may have one folder around these. Its version is a hash of the names and contents of its images; the same files sent
    again are the same version, stored once, and looked at again if they failed.

    A JSON body registers a folder below the data root where it lies. It needs a key with the scope admin where there are keys, because
    all owners share the data root. A job whose folder has changed since then fails.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() in ARCHIVES:
        if name is None:
            raise parameter_error("name", "missing", "is required with an archive")
        added = await uploads.receive(parts, request, Sent(name, caller.owner, skip_unreadable=unreadable == "skip"))
        return await run_in_threadpool(_answer, parts, name, added, caller.owner)
    for parameter, value in (("name", name), ("unreadable", unreadable)):
        if value is not None:
            raise parameter_error(parameter, "not_available", "goes with an archive only", value)
    if caller.key_id is not None and Scope.ADMIN not in caller.scopes:
        raise Refused(errors.FORBIDDEN_SCOPE, f"to register a folder of the data root needs a key with the scope {Scope.ADMIN}")
    body = checked(RegisterBody, required(await read_json(request)))
    return await run_in_threadpool(_register, parts, body, caller)


def _register(parts: Parts, body: RegisterBody, caller: Caller) -> Response:
    root = (parts.settings.data_dir / ROOT).resolve()
    folder = (root / body.path).resolve()
    if not folder.is_relative_to(root):
        raise InvalidSpec([Violation("/path", "invalid_path", "leads out of the data root by a link: copy the files below it", body.path)])
    if not folder.is_dir():
        raise refusal([Violation("/path", "not_found", "there is no such folder below the data root", body.path)])
    with parts.store.write() as tx:
        added = register(tx, body.name, body.path, owner=caller.owner)
    parts.doorbell.ring()
    return _answer(parts, body.name, added, caller.owner)


def _answer(parts: Parts, name: str, added: Added, owner: str) -> Response:
    with parts.store.read() as tx:
        found = datasets.get(tx, name, version=added.version, owner=owner)
    headers = {"Location": f"/v1/datasets/{name}"} | ({"Retry-After": str(RETRY_AFTER_S)} if added.checks else {})
    return JSONResponse(found, status_code=202 if added.checks else 200, headers=headers)


@router.get(
    "/datasets/{name}",
    operation_id="getDataset",
    summary="Look at a data set and its report",
    response_model=DatasetDocument,
    responses=problems(*STORED, errors.DATASET_NOT_FOUND),
)
def get_dataset(parts: WithParts, caller: WithCaller, name: Name, version: Version = None) -> Response:
    """The newest version, or the one that is named, with its report; and all versions in short."""
    with parts.store.read() as tx:
        found = datasets.get(tx, name[:64], version=version, owner=caller.owner)
    return JSONResponse(found, headers={"Cache-Control": "no-cache"})


Split = Annotated[Literal["train", "val", "test"], Query(description="The split.")]
_OF_SAMPLES = (*STORED, errors.DATASET_NOT_FOUND, errors.SAMPLES_NOT_FOUND)


@router.get(
    "/datasets/{name}/samples",
    operation_id="getDatasetSamples",
    summary="Which images of each class there is a picture of",
    response_model=DatasetSamplesDocument,
    responses=problems(*_OF_SAMPLES),
)
def dataset_samples(parts: WithParts, caller: WithCaller, name: Name, split: Split = "train", version: Version = None) -> Response:
    """Of the newest version that is ready, or the one that is named. Made when the set was checked."""
    with parts.store.read() as tx:
        found = datasets.samples(tx, name[:64], split=split, version=version, owner=caller.owner)
    query = urlencode({"split": split, "version": found.shown["version"]})
    image = f"/v1/datasets/{quote(found.shown['dataset'])}/samples.png?{query}"
    return JSONResponse({**found.shown, "image": image}, headers={"Cache-Control": "no-cache"})


@router.get(
    "/datasets/{name}/samples.png",
    operation_id="downloadDatasetSamples",
    summary="The picture: a row of tiles for each class",
    response_class=Response,
    responses=downloads.responses(*_OF_SAMPLES, media_type="image/png"),
)
def dataset_sheet(
    parts: WithParts, caller: WithCaller, name: Name, wanted: WithWanted, split: Split = "train", version: Version = None
) -> Response:
    with parts.store.read() as tx:
        found = datasets.samples(tx, name[:64], split=split, version=version, owner=caller.owner)
    if parts.artifacts.size(found.path) != found.bytes:
        raise Refused(errors.SAMPLES_NOT_FOUND, f"the picture of {name[:64]} is missing")
    file = StoredFile(found.path, f"{found.shown['dataset']}-{split}.png", "image/png", found.bytes, found.sha256)
    return downloads.send(parts.artifacts, file, wanted)


@router.delete(
    "/datasets/{name}",
    operation_id="deleteDataset",
    summary="Delete a data set, or one version",
    status_code=204,
    responses=problems(*STORED, *CHANGES, errors.DATASET_NOT_FOUND, errors.DATASET_IN_USE),
)
def delete_dataset(parts: WithParts, caller: WithCaller, name: Name, version: Version = None) -> Response:
    """Files that were uploaded are freed; a registered folder stays as it is."""
    if len(name) > 64:
        raise DatasetNotFound(name[:64])
    with parts.store.write() as tx:
        datasets.remove(tx, name, version=version, owner=caller.owner)
    return Response(status_code=204)
