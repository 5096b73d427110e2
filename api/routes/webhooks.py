"""/v1/webhooks: the secret that signs, and what was sent to whom."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query
from fastapi.responses import JSONResponse
from pydantic import Field
from starlette.responses import Response

from api import errors
from api.access import WithCaller
from api.answers import listed
from api.bodies import JsonBody, checked, required
from api.documents import DeliveryDocument, DeliveryListDocument, WebhookSecretDocument
from api.errors import Refused
from api.openapi import BODY, CHANGES, STORED, json_request, problems
from api.parts import JOB_ID, WithParts
from api.strict import StrictRoute
from powergrad.jobs import outbox
from powergrad.jobs.errors import DeliveryNotFound
from powergrad.jobs.keys import Scope
from powergrad.spec import SpecModel

DELIVERY_ID = re.compile(r"msg_[0-9A-HJKMNP-TV-Z]{26}")
STATES = f"^({outbox.PENDING}|{outbox.DELIVERED}|{outbox.FAILED})$"
EXAMPLE_URL = "https://example.com/hooks/powergrad"

router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"], route_class=StrictRoute)


class TestBody(SpecModel):
    url: str = Field(pattern=r"^https?://[!-~]{1,2000}$", examples=[EXAMPLE_URL])
    """Called as a job's webhook is: https and public addresses only, unless the server allows the host."""


BODIES = (TestBody,)


async def _delivery_id(
    delivery_id: Annotated[str, Path(description="Id of the delivery.", examples=["msg_01KAQZ5V3N8T4W6Y7C9E1G2H3J"])],
) -> str:
    if not DELIVERY_ID.fullmatch(delivery_id):
        raise DeliveryNotFound(delivery_id)
    return delivery_id


DeliveryId = Annotated[str, Depends(_delivery_id)]


@router.get(
    "/secret",
    operation_id="getWebhookSecret",
    summary="The secret that signs your webhooks, made at the first call",
    response_model=WebhookSecretDocument,
    responses=problems(*STORED),
)
def secret(parts: WithParts, caller: WithCaller) -> Response:
    if Scope.SUBMIT not in caller.scopes:  # who has it can speak for the server: to look at jobs is not enough
        raise Refused(errors.FORBIDDEN_SCOPE, "the secret needs a key with the scope submit")
    with parts.store.write() as tx:
        found = outbox.secret(tx, caller.owner)
    return JSONResponse(found, headers={"Cache-Control": "no-store"})


@router.post(
    "/secret/rotate",
    operation_id="rotateWebhookSecret",
    summary="Make a new secret; the old one signs beside it for 24 hours",
    response_model=WebhookSecretDocument,
    responses=problems(*STORED, *CHANGES),
)
def rotate(parts: WithParts, caller: WithCaller) -> Response:
    with parts.store.write() as tx:
        found = outbox.rotate(tx, caller.owner)
    return JSONResponse(found, headers={"Cache-Control": "no-store"})


@router.get(
    "/deliveries",
    operation_id="listDeliveries",
    summary="Deliveries of the last 30 days, newest first",
    response_model=DeliveryListDocument,
    responses=problems(*STORED),
)
def deliveries(
    parts: WithParts,
    caller: WithCaller,
    job: Annotated[str | None, Query(description="Only those of this job.", pattern=f"^{JOB_ID.pattern}$")] = None,
    state: Annotated[str | None, Query(description="Only those in this state.", pattern=STATES)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(description="`last_id` of the page before.", pattern=f"^{DELIVERY_ID.pattern}$")] = None,
) -> Response:
    with parts.store.read() as tx:
        page = outbox.page(tx, owner=caller.owner, job_id=job, state=state, limit=limit, after=after)
    return listed(page)


@router.get(
    "/deliveries/{delivery_id}",
    operation_id="getDelivery",
    summary="Look at a delivery",
    response_model=DeliveryDocument,
    responses=problems(*STORED, errors.DELIVERY_NOT_FOUND),
)
def delivery(parts: WithParts, caller: WithCaller, delivery_id: DeliveryId) -> Response:
    with parts.store.read() as tx:
        return JSONResponse(outbox.get(tx, delivery_id, owner=caller.owner))


@router.post(
    "/deliveries/{delivery_id}/retry",
    operation_id="retryDelivery",
    summary="Send a delivery again, now",
    status_code=202,
    response_model=DeliveryDocument,
    responses={
        202: {"description": "It is due now, with the id that it has; or a try of it is at work."},
        **problems(*STORED, *CHANGES, errors.DELIVERY_NOT_FOUND),
    },
)
def retry(parts: WithParts, caller: WithCaller, delivery_id: DeliveryId) -> Response:
    with parts.store.write() as tx:
        found = outbox.retry(tx, delivery_id, owner=caller.owner)
    parts.deliverer.wake()
    return JSONResponse(found, status_code=202)


@router.post(
    "/test",
    operation_id="testWebhook",
    summary="Send an event `webhook.test` to a URL",
    status_code=202,
    response_model=DeliveryDocument,
    responses={
        202: {
            "description": "The delivery: signed, sent and tried again as those of jobs are.",
            "headers": {"Location": {"schema": {"type": "string"}, "description": "Path of the delivery."}},
        },
        **problems(*STORED, *CHANGES, *BODY),
    },
    openapi_extra=json_request(TestBody, examples={"smallest": {"url": EXAMPLE_URL}}),
)
def test(parts: WithParts, caller: WithCaller, body: JsonBody) -> Response:
    wanted = checked(TestBody, required(body))
    outbox.check_url(wanted.url, allow=parts.settings.allow_list, pointer="/url")
    with parts.store.write() as tx:
        delivery_id = outbox.owe(tx, owner=caller.owner, url=wanted.url, event=outbox.TEST_EVENT, data={"owner": caller.owner})
        found = outbox.get(tx, delivery_id, owner=caller.owner)
    parts.deliverer.wake()
    return JSONResponse(found, status_code=202, headers={"Location": f"/v1/webhooks/deliveries/{delivery_id}"})
