"""What the routes of jobs and of experiments ask for and answer alike: a page, a document with its tag, one that is waited for, a new one,
one that was just changed."""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from fastapi import Header, Query
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from api import errors
from api.errors import Refused
from api.etags import matches
from api.parts import Parts
from powergrad.jobs import queries
from powergrad.jobs.experiments import queries as experiment_queries
from powergrad.jobs.states import TERMINAL, JobState
from powergrad.jobs.store import Tx

POLL_AFTER_S = 1
QUEUE_LOOK_S = 2.0  # a queued job's place moves without its row: so often a waiting poll looks again

Document = dict[str, Any]
Headers = dict[str, Any]

IdempotencyKey = Annotated[
    str | None,
    Header(
        pattern=r"^[\x21-\x7e]{1,255}$",
        description="The same key with the same body is done once and answered alike, within 24 hours.",
        examples=["5f0c1a52-8f1e-4b7e-9a36-0f4a3f1f1d11"],
    ),
]
IfMatch = Annotated[str | None, Header(description="The `version` that was seen (or an ETag): change nothing if it has moved on.")]
IfNoneMatch = Annotated[str | None, Header(description="ETag seen last.")]
WaitS = Annotated[float | None, Query(ge=0, le=60, allow_inf_nan=False, description="Seconds to wait for the ETag to change.")]


class Get(Protocol):
    def __call__(self, tx: Tx, noun_id: str, /, *, owner: str) -> Document: ...


class Page(Protocol):
    @property
    def data(self) -> list[Document]: ...
    @property
    def has_more(self) -> bool: ...


@dataclass(frozen=True)
class Noun:
    """How documents of one kind are read. etag: changes exactly when the document does.

    is_settled: it will not change by itself any more.  looks_again_s: after so long one that waits looks though nothing moved its rows.
    """

    word: str
    path: str
    get: Get
    etag: Callable[[Document], str]
    is_settled: Callable[[Document], bool]
    looks_again_s: Callable[[Document], float] = lambda _: math.inf

    @property
    def etag_header(self) -> Headers:
        """For the OpenAPI document."""
        return {"ETag": {"schema": {"type": "string"}, "description": f"Changes whenever the {self.word} does, progress included."}}

    @property
    def replayed_header(self) -> Headers:
        told = f"The {self.word} was there before, under this key."
        return {"Idempotency-Replayed": {"schema": {"type": "string", "enum": ["true"]}, "description": told}}

    @property
    def new_headers(self) -> Headers:
        return {
            "Location": {"schema": {"type": "string"}, "description": f"Path of the {self.word}."},
            "Retry-After": {"schema": {"type": "integer"}, "description": "Seconds after which a look is worth while."},
            **self.replayed_header,
            **self.etag_header,
        }


JOBS = Noun(
    "job",
    "/v1/jobs",
    queries.get,
    queries.etag,
    is_settled=lambda job: job["state"] in TERMINAL,
    looks_again_s=lambda job: QUEUE_LOOK_S if job["state"] == JobState.QUEUED else math.inf,
)
EXPERIMENTS = Noun(
    "experiment",
    "/v1/experiments",
    experiment_queries.get,
    experiment_queries.etag,
    is_settled=lambda experiment: experiment["state"] in TERMINAL and experiment["analysis"]["state"] in ("current", "failed"),
)


def listed(page: Page) -> Response:
    """A page of what has ids; `after` of the next one is `last_id`."""
    ids = [one["id"] for one in page.data]
    ends = {"first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None}
    return JSONResponse({"object": "list", "data": page.data, "has_more": page.has_more, **ends})


def look(parts: Parts, noun: Noun, noun_id: str, owner: str) -> Document:
    with parts.store.read() as tx:
        return noun.get(tx, noun_id, owner=owner)


def tagged(response: Response) -> Response:
    """The same, with a tag that is made of what it says."""
    response.headers["ETag"] = f'"{hashlib.sha256(response.body).hexdigest()[:32]}"'
    response.headers["Cache-Control"] = "no-cache"
    return response


async def got(parts: Parts, noun: Noun, noun_id: str, *, owner: str, if_none_match: str | None, wait_s: float | None) -> Response:
    """The document, or 304 where its tag was named; with `wait_s` not before the tag has changed, or so long has passed."""
    if not wait_s:
        return _shown(noun, await run_in_threadpool(look, parts, noun, noun_id, owner), if_none_match)
    assert parts.tailer is not None, "the application has started"
    now = asyncio.get_running_loop().time
    until = now() + wait_s
    with parts.tailer.watch(noun_id) as watcher, parts.measures.streams.track_inprogress():
        document = await parts.tailer.run(look, parts, noun, noun_id, owner)
        seen = if_none_match or noun.etag(document)
        if if_none_match is None and noun.is_settled(document):
            return _shown(noun, document, None)  # it will not change by itself, and the caller has not seen it
        while matches(seen, noun.etag(document)) and now() < until and not parts.tailer.is_stopping:
            await watcher.changed(max(0.0, min(until - now(), noun.looks_again_s(document))))
            document = await parts.tailer.run(look, parts, noun, noun_id, owner)
    return _shown(noun, document, if_none_match)


def _shown(noun: Noun, document: Document, if_none_match: str | None) -> Response:
    headers = {"ETag": noun.etag(document), "Cache-Control": "no-cache"}
    if if_none_match is not None and matches(if_none_match, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    return JSONResponse(document, headers=headers)


def submitted(noun: Noun, document: Document, *, replayed: bool) -> Response:
    """202 with what was stored under an id of its own, or had been before."""
    headers = {"Location": f"{noun.path}/{document['id']}", "Retry-After": str(POLL_AFTER_S), "ETag": noun.etag(document)}
    return JSONResponse(document, status_code=202, headers=headers | _replay(replayed))


def changed(
    parts: Parts, noun: Noun, noun_id: str, owner: str, change: Callable[[Tx], object], *, status: int = 202, ring: bool = False
) -> Response:
    """The document after a change of it, in one transaction. change: gives True where it had been made before, under the same key."""
    with parts.store.write() as tx:
        replayed = change(tx) is True
        document = noun.get(tx, noun_id, owner=owner)
    if ring:
        parts.doorbell.ring()
    return JSONResponse(document, status_code=status, headers={"ETag": noun.etag(document)} | _replay(replayed))


def _replay(replayed: bool) -> dict[str, str]:
    return {"Idempotency-Replayed": "true"} if replayed else {}


def version_of(if_match: str | None) -> int | None:
    """The version in `3`, `"3"` or in an ETag; None for `*`, and for none. Raises Refused (412) for what can match nothing."""
    if if_match is None or if_match.strip() == "*":
        return None
    found = re.fullmatch(r'\s*(?:W/)?"?(\d{1,9})(?:-[\w-]*)?"?\s*', if_match)
    if found is None:
        raise Refused(errors.VERSION_MISMATCH, f"If-Match: {if_match[:64]!r}: must be the version that was seen, such as 3")
    return int(found[1])
