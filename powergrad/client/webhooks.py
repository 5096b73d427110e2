"""For the receiver of webhooks: is this call from the server, and of now?

    event = verify_webhook(request.body, request.headers, secret)  # `powergrad webhooks secret` shows it
    if event["type"] == "job.succeeded": ...

The same event may come more than once, and events out of order: a receiver remembers the `webhook-id`s it has had.
"""

from __future__ import annotations

import base64
import hmac
import json
import time
from collections.abc import Mapping
from typing import Any

from powergrad.client.errors import ForgedWebhook

TOLERANCE_S = 300.0


def verify_webhook(
    payload: bytes | str, headers: Mapping[str, str], secret: str, *, tolerance_s: float = TOLERANCE_S, now_s: float | None = None
) -> dict[str, Any]:
    """The event in a call that the server signed with `secret` (whsec_…), as Standard Webhooks says.

    payload: the body as it came, undecoded.  tolerance_s: how far the call's clock may be from this one's, or an overheard call could be
    sent again for ever.  now_s: this clock, in place of the system's.  Raises ForgedWebhook, ValueError for a secret that is none.
    """
    found = {name.lower(): value for name, value in headers.items()}
    try:
        message_id, at, signatures = (found[f"webhook-{part}"] for part in ("id", "timestamp", "signature"))
    except KeyError as missing:
        raise ForgedWebhook(f"the header {missing} is missing") from None
    if not at.isdecimal() or abs(int(at) - (time.time() if now_s is None else now_s)) > tolerance_s:
        raise ForgedWebhook(f"webhook-timestamp {at[:20]!r}: more than {tolerance_s:g} s from now")
    body = payload.encode() if isinstance(payload, str) else payload
    made = hmac.digest(_key(secret), b".".join((message_id.encode(), at.encode(), body)), "sha256")
    expected = b"v1," + base64.b64encode(made)
    if not any(hmac.compare_digest(expected, one.encode()) for one in signatures.split(" ")):
        raise ForgedWebhook("no signature is one of this body, made with this secret")
    event: dict[str, Any] = json.loads(body)
    return event


def _key(secret: str) -> bytes:
    try:
        return base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except ValueError:
        raise ValueError("secret: must be whsec_ and base64, as `powergrad webhooks secret` shows it") from None
