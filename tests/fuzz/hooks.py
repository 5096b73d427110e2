"""What schemathesis is told beside the document: which ids there are, what not to wait for, and a check of its own: each request is sent
by the other owner too, who must learn nothing.

schemathesis loads it by SCHEMATHESIS_HOOKS; the site is in the environment, as FUZZ_SITE.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from functools import cache
from typing import Any

import requests
import schemathesis
from hypothesis import strategies as st
from schemathesis.core.failures import Failure
from schemathesis.core.parameters import ParameterLocation
from schemathesis.generation.meta import TestPhase

from tests.fuzz.expected import is_beyond_the_schema

SITE: dict[str, Any] = json.loads(os.environ["FUZZ_SITE"])
ID = re.compile(r"\b(?:job|task|msg|ds|dataset|webhook|exp)_[0-9A-HJKMNP-TV-Z]{26}\b")
LONGEST_WAIT_S = 0.05
STREAMS = ("true", "1", "on", "t", "y", "yes")

_session = requests.Session()
_session.trust_env = False
of_anna: set[str] = set(SITE["ids"][SITE["anna"]])
of_bert: set[str] = set(SITE["ids"][SITE["bert"]])
said_by_bert: set[str] = set()


@schemathesis.hook
def before_call(_: schemathesis.HookContext, case: schemathesis.Case[Any], __: dict[str, Any]) -> None:
    """Nothing is waited for: `wait` and `follow` are right questions whose answers take a minute, or as long as a job."""
    _lead_somewhere(case)
    _spare_what_all_need(case)
    query = case.query or {}
    if _number(query.get("wait")) > LONGEST_WAIT_S:
        query["wait"] = LONGEST_WAIT_S
    if str(query.get("follow", "")).lower() in STREAMS:
        query["follow"] = "false"


def _lead_somewhere(case: schemathesis.Case[Any]) -> None:
    """Paths of the coverage phase, which no strategy draws, lead to what is there three times in four."""
    is_right = case.meta is not None and not case.meta.is_negative_at(ParameterLocation.PATH)
    turn = zlib.crc32(repr((case.query, case.body, case.method, case.path)).encode(errors="replace"))
    if case.meta is None or case.meta.phase.name != TestPhase.COVERAGE or not is_right or turn % 4 == 0:
        return
    for name in case.path_parameters or {}:
        if known := SITE["known"].get(name):
            case.path_parameters[name] = known[turn // 4 % len(known)]


def _spare_what_all_need(case: schemathesis.Case[Any]) -> None:
    """Nobody deletes what the others of these requests look at, revokes the keys they are sent with, or takes their owners' quotas away."""
    if case.method.upper() not in ("DELETE", "PUT", "PATCH"):
        return
    for name, value in (case.path_parameters or {}).items():
        if value in SITE["kept"]:
            case.path_parameters[name] = "of-nobody"
    if case.operation.label == "DELETE /v1/jobs" and case.meta is not None and case.meta.generation.mode.is_positive:
        case.query = {**(case.query or {}), "created_after": SITE["started_at"]}


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return 0.0


@schemathesis.hook
def flatmap_path_parameters(_: schemathesis.HookContext, found: dict[str, Any] | None) -> st.SearchStrategy[dict[str, Any] | None]:
    """Half of the paths lead to what is there, Bert's jobs among them."""
    given = found or {}
    known = {name: st.sampled_from(SITE["known"][name]) for name in given if name in SITE["known"]}
    return st.one_of(st.just(found), st.fixed_dictionaries(known).map(lambda drawn: given | drawn)) if known else st.just(found)


@schemathesis.hook
def filter_failure(_: schemathesis.HookContext, failure: Failure, case: schemathesis.Case[Any], response: schemathesis.Response) -> bool:
    """Whether it is one: not if a request was refused for what the document cannot say, nor for want of a key that none was shown of."""
    match type(failure).__name__:
        case "RejectedPositiveData" if response.status_code == 422:
            return not is_beyond_the_schema(response.json())
        case "RejectedPositiveData" | "UnsupportedMethodResponse":
            return not (response.status_code == 401 and "Authorization" not in response.request.headers)
    return True


class TellsAnother(Failure):
    """An answer to one owner has something of the other's in it."""

    __slots__ = ()


@schemathesis.check
def owners_are_apart(_: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case[Any]) -> None:
    """Sent with the other's key, the same request tells nothing of the first one's."""
    sent = response.request
    if sent.headers.get("Authorization") != f"Bearer {SITE['key']}":
        return
    if response.status_code < 300:
        of_anna.update(set(ID.findall(response.content.decode(errors="replace"))) - of_bert)
    other = sent.copy()
    other.headers["Authorization"] = f"Bearer {SITE['other_key']}"
    answer = _session.send(other, timeout=30, allow_redirects=False)
    of_bert.update(set(ID.findall(answer.text)) - of_anna)
    _judge(case, answer)


@cache
def _examples(document: str) -> frozenset[str]:
    return frozenset(ID.findall(document))


def _shown_to_all(case: schemathesis.Case[Any]) -> frozenset[str]:
    """Ids that stand in the document as examples."""
    return _examples(json.dumps(case.operation.schema.raw_schema))


def _judge(case: schemathesis.Case[Any], answer: requests.Response) -> None:
    asked = f"{answer.request.url} {answer.request.headers} {answer.request.body!r}"
    named = {one for one in (*of_anna, SITE["anna"]) if one in asked}
    told = ((of_anna - _shown_to_all(case)) & set(ID.findall(answer.text))) | ({SITE["anna"]} if SITE["anna"] in answer.text else set())
    secret = sorted(told - named - said_by_bert)
    reached = answer.status_code < 400 and sorted(of_anna & set(ID.findall((answer.request.url or "").partition("?")[0])))
    if answer.status_code < 300:
        said_by_bert.update(named)  # from now on it may come back: as the name of a job, say
    if secret or reached or answer.status_code >= 500:
        message = f"{answer.status_code} to the other owner; of the first one's: {secret or reached}\n{answer.text[:500]}"
        raise TellsAnother(operation=case.operation.label, title="An answer to the other owner", message=message)
