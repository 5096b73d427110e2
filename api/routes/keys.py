"""/v1/keys: who may call, for admins."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from fastapi import APIRouter, Path
from fastapi.responses import JSONResponse
from pydantic import Field
from starlette.responses import Response

from api import errors
from api.bodies import ABSENT, JsonBody, checked
from api.documents import KeyDocument, KeyListDocument, NewKeyDocument
from api.openapi import BODY, CHANGES, STORED, json_request, problems
from api.parts import WithParts
from api.strict import StrictRoute
from powergrad.jobs import keys
from powergrad.jobs.errors import KeyNotFound
from powergrad.jobs.keys import LONGEST_TTL_S, Scope
from powergrad.jobs.rows import LOCAL_OWNER
from powergrad.spec import NAME_PATTERN, SpecModel

KEY_ID = re.compile(r"[0-9a-f]{12}")

router = APIRouter(prefix="/v1/keys", tags=["keys"], route_class=StrictRoute)


class NewKeyBody(SpecModel):
    owner: str = Field(default=LOCAL_OWNER, pattern=NAME_PATTERN)
    """Whose jobs the key shows and makes."""
    name: str = Field(default="", pattern=r"^[A-Za-z0-9._-]{0,64}$")
    """A name to know the key by."""
    scopes: list[Literal["read", "submit", "admin"]] = Field(default=["submit"], min_length=1, max_length=3)
    """What it is good for: `read` looks; `submit` makes and changes jobs too; `admin` manages keys and quotas too."""
    ttl_seconds: int | None = Field(default=None, ge=1, le=int(LONGEST_TTL_S))
    """It ends so long from now; null never."""


BODIES = (NewKeyBody,)


@router.get("", operation_id="listKeys", summary="All keys, newest first", response_model=KeyListDocument, responses=problems(*STORED))
def list_keys(parts: WithParts) -> Response:
    with parts.store.read() as tx:
        found = keys.listed(tx)
    return JSONResponse({"object": "list", "data": found})


@router.post(
    "",
    operation_id="createKey",
    summary="Make a key",
    status_code=201,
    response_model=NewKeyDocument,
    responses={
        201: {"description": "The key; `key` is what opens the server, and is shown this once."},
        **problems(*STORED, *CHANGES, *BODY),
    },
    openapi_extra=json_request(
        NewKeyBody, is_required=False, examples={"for a colleague": {"owner": "ada", "name": "laptop", "ttl_seconds": 2_592_000}}
    ),
)
def create_key(parts: WithParts, body: JsonBody) -> Response:
    wanted = checked(NewKeyBody, {} if body is ABSENT else body)
    with parts.store.write() as tx:
        key = keys.create(tx, owner=wanted.owner, name=wanted.name, scopes=frozenset(map(Scope, wanted.scopes)), ttl_s=wanted.ttl_seconds)
        made = keys.get(tx, key)
    parts.key_ring.forget()
    return JSONResponse({**made, "key": key}, status_code=201, headers={"Cache-Control": "no-store"})


@router.delete(
    "/{key_id}",
    operation_id="revokeKey",
    summary="Revoke a key",
    response_model=KeyDocument,
    responses={
        200: {"description": "The key, which opens nothing any more: here at once, in other processes of the server within a second."},
        **problems(*STORED, *CHANGES, errors.KEY_NOT_FOUND),
    },
)
def revoke_key(parts: WithParts, key_id: Annotated[str, Path(description="Id of the key.", examples=["0a1b2c3d4e5f"])]) -> Response:
    if not KEY_ID.fullmatch(key_id):
        raise KeyNotFound(key_id[:16])
    with parts.store.write() as tx:
        revoked = keys.revoke(tx, key_id)
    parts.key_ring.forget()
    return JSONResponse(revoked)
