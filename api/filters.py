"""Which jobs are meant: the filters that routes over many jobs share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Depends, Query
from pydantic import AwareDatetime, BeforeValidator, Field
from pydantic_core import PydanticCustomError
from starlette.requests import Request

from api.access import WithCaller
from api.errors import parameter_error
from api.strict import PREFIX
from powergrad.jobs import queries
from powergrad.jobs.states import JobState
from powergrad.spec import NAME_PATTERN

RFC3339_PATTERN = r"^(?!0000)\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:[0-5]\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)$"
PLAIN_TEXT = r"^[^\x00-\x1f\x7f]*$"
LABEL = "label."
MOST_LABELS = 32  # a job has no more, so more can match none


def _as_rfc3339(value: Any) -> Any:
    if not isinstance(value, str) or not re.fullmatch(RFC3339_PATTERN, value, re.ASCII):
        raise PydanticCustomError("bad_format", "must be a date and time with its offset (RFC 3339), such as 2026-01-31T12:00:00Z")
    return value


# pydantic's own takes 0.5 for a moment of 1970
Moment = Annotated[AwareDatetime, BeforeValidator(_as_rfc3339), Field(json_schema_extra={"pattern": RFC3339_PATTERN})]
BY_LABEL: dict[str, Any] = {
    "name": "label",
    "in": "query",
    "description": "Only jobs with these labels, each given as `label.KEY=VALUE`.",
    "schema": {
        "type": "object",
        "patternProperties": {r"^label\.[A-Za-z0-9._-]{1,64}$": {"type": "string", "pattern": PLAIN_TEXT}},
        "additionalProperties": False,
        "maxProperties": MOST_LABELS,
    },
    "style": "form",
    "explode": True,
    PREFIX: LABEL,
}
"""Of OpenAPI: an object's exploded members are parameters of their own, so that these are called `label.KEY`."""


async def _filter(
    caller: WithCaller,
    request: Request,
    experiment: Annotated[str | None, Query(pattern=NAME_PATTERN)] = None,
    created_after: Annotated[Moment | None, Query()] = None,
    created_before: Annotated[Moment | None, Query()] = None,
    q: Annotated[str | None, Query(max_length=128, pattern=PLAIN_TEXT, description="Part of a name, or the start of an id.")] = None,
) -> queries.Filter:
    """The caller's jobs that were asked for, in whatever state; a route that takes it has BY_LABEL among its parameters."""
    return queries.Filter(
        owner=caller.owner,
        labels=_labels_asked(request),
        experiment=experiment,
        created_after_ms=_milliseconds(created_after),
        created_before_ms=_milliseconds(created_before),
        q=q or None,
    )


WithFilter = Annotated[queries.Filter, Depends(_filter)]


def each_once(states: Sequence[JobState] | None) -> tuple[JobState, ...]:
    return tuple(dict.fromkeys(states or ()))


def _milliseconds(moment: AwareDatetime | None) -> int | None:
    return None if moment is None else round(moment.timestamp() * 1000)


def _labels_asked(request: Request) -> dict[str, str]:
    """The label.KEY parameters. Raises Refused (422)."""
    labels: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if not name.startswith(LABEL):
            continue
        key = name.removeprefix(LABEL)
        if not re.fullmatch(NAME_PATTERN, key):
            raise parameter_error(name[:64], "bad_format", f"the label's name must match {NAME_PATTERN}")
        if not re.fullmatch(PLAIN_TEXT, value):
            raise parameter_error(name, "bad_format", "must not contain control characters")
        if key in labels:
            raise parameter_error(name, "repeated_parameter", "must be given once: a job has one value of each label")
        if len(labels) == MOST_LABELS:
            raise parameter_error(name, "too_many", f"must be one of at most {MOST_LABELS} labels: a job has no more")
        labels[key] = value
    return labels
