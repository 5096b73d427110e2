"""/v1/session: a browser shows its key once, and holds a cookie that no script can read."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from api import errors
from api.access import CHALLENGE, COOKIE, WithCaller, session_token
from api.bodies import JsonBody, checked, required
from api.documents import SessionDocument
from api.errors import Refused
from api.openapi import BODY, CHANGES, STORED, json_request, problems
from api.parts import Parts, WithParts
from api.strict import StrictRoute
from powergrad.jobs import keys
from powergrad.jobs.errors import KeyNotFound
from powergrad.jobs.keys import Caller, Session
from powergrad.jobs.store import rfc3339
from powergrad.spec import SpecModel

router = APIRouter(prefix="/v1/session", tags=["keys"], route_class=StrictRoute)

COOKIE_SET = {"Set-Cookie": {"schema": {"type": "string"}, "description": f"`{COOKIE}`: httpOnly, SameSite=Strict."}}


class SignInBody(SpecModel):
    key: str = Field(max_length=256)
    """A key: `pg_…`."""


BODIES = (SignInBody,)


@router.post(
    "",
    operation_id="signIn",
    summary="Show a key once, for a cookie",
    response_model=SessionDocument,
    responses={
        200: {"description": "Whose session it is. It ends after 12 hours, or with its key.", "headers": COOKIE_SET},
        **problems(*STORED, *CHANGES, *BODY, errors.UNAUTHENTICATED, errors.TOO_MANY_TRIES, is_open=True),
    },
    openapi_extra=json_request(SignInBody),
)
async def sign_in(parts: WithParts, request: Request, body: JsonBody) -> Response:
    key = checked(SignInBody, required(body)).key.strip()
    address = request.client.host if request.client else ""
    parts.key_ring.tries.take(address)
    caller = await parts.key_ring.opened_by(key)
    if isinstance(caller, str):
        raise Refused(errors.UNAUTHENTICATED, caller, headers=CHALLENGE)
    parts.key_ring.tries.forgive(address)
    token, session = await run_in_threadpool(_begun, parts, caller)
    response = JSONResponse(_shown(caller, session.expires_at_ms), headers={"Cache-Control": "no-store"})
    response.set_cookie(
        COOKIE,
        token,
        max_age=max(0, (session.expires_at_ms - parts.key_ring.now_ms()) // 1000),
        path="/",
        secure=_is_secure(request),
        httponly=True,
        samesite="strict",
    )
    return response


def _begun(parts: Parts, caller: Caller) -> tuple[str, Session]:
    assert caller.key_id is not None, "a key was shown"
    try:
        with parts.store.write() as tx:
            return keys.sign_in(tx, caller.key_id)
    except KeyNotFound:  # revoked since the last look
        raise Refused(errors.UNAUTHENTICATED, "no such key", headers=CHALLENGE) from None


def _is_secure(request: Request) -> bool:
    """Whether the browser came by https; a proxy that ends TLS says so. Who says it falsely only keeps the cookie from himself."""
    return request.url.scheme == "https" or request.headers.get("x-forwarded-proto", "").partition(",")[0].strip().lower() == "https"


@router.get("", operation_id="getSession", summary="Who one is", response_model=SessionDocument, responses=problems(*STORED))
async def who(caller: WithCaller) -> Response:
    return JSONResponse(_shown(caller, caller.expires_at_ms), headers={"Cache-Control": "no-store"})


@router.delete(
    "",
    operation_id="signOut",
    summary="End the session",
    status_code=204,
    response_class=Response,
    responses={204: {"description": "The cookie opens nothing any more; without one nothing was to do."}, **problems(*STORED, *CHANGES)},
)
def sign_out(parts: WithParts, request: Request) -> Response:
    token = session_token(request.headers)
    if token is not None:
        with parts.store.write() as tx:
            keys.sign_out(tx, token)
        parts.key_ring.forget()
    response = Response(status_code=204)
    response.delete_cookie(COOKIE, path="/", secure=_is_secure(request), httponly=True, samesite="strict")
    return response


def _shown(caller: Caller, expires_at_ms: int | None) -> dict[str, Any]:
    return {
        "object": "session",
        "owner": caller.owner,
        "scopes": sorted(caller.scopes),
        "key": caller.key_id,
        "expires_at": rfc3339(expires_at_ms),
    }
