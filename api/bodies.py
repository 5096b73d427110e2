"""JSON bodies, read under a limit and decoded without ever failing as a server error."""

from __future__ import annotations

import json
from collections import Counter
from typing import Annotated, Any, TypeVar

from fastapi import Depends
from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from api import errors
from api.errors import Refused
from powergrad.jobs.errors import InvalidSpec
from powergrad.jobs.spec import violations_of

M = TypeVar("M", bound=BaseModel)
ABSENT = object()
SHOWN = 64  # characters of a name that an error repeats
DRAINED = 16  # times the limit: so much is read and dropped, because a sender that is cut off never reads the refusal


async def read_json(request: Request) -> Any:
    """The decoded body, `ABSENT` where there is none. Raises Refused (400, 413)."""
    raw = await read_bytes(request, request.app.state.parts.settings.max_body_bytes)
    if not raw:
        return ABSENT
    try:
        return json.loads(raw.decode(), object_pairs_hook=_each_once)  # decoded here: json would take UTF-16 too, and a byte order mark
    except RecursionError:
        raise Refused(errors.MALFORMED, "the body is nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, integers of thousands of digits
        raise Refused(errors.MALFORMED, f"the body is not JSON: {str(error)[:200]}") from None


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, none of whose names is given twice: one of the two would be ignored. Raises ValueError."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise ValueError(f"{twice[:SHOWN]!r} is given twice in one object")
    return found


JsonBody = Annotated[Any, Depends(read_json)]


def required(body: Any) -> Any:
    """The body, which must be there. Raises Refused (400)."""
    if body is ABSENT:
        raise Refused(errors.MALFORMED, "the body is empty: send a JSON object")
    return body


def checked(model: type[M], body: Any) -> M:
    """The body as `model`. Raises InvalidSpec with every violation."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise InvalidSpec(violations_of(error, model)) from None


async def read_bytes(request: Request, limit: int) -> bytes:
    """The body as it is. Raises Refused (413)."""
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit * DRAINED:
            break
        if size <= limit:
            chunks.append(chunk)
    if size > limit:
        raise Refused(errors.TOO_LARGE, f"the body has more than {limit} bytes", headers={"Connection": "close"})
    return b"".join(chunks)
