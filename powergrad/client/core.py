"""What both clients share: settings, the judgement of an outcome, the place in an event stream, the shape of a poll."""

from __future__ import annotations

import codecs
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2

from powergrad.client import calls
from powergrad.client.calls import LONGEST_POLL_S, Call
from powergrad.client.errors import ApiError, ClientError, Unreachable, refusal
from powergrad.client.models import Artifact, Checkpoint, Event, Prediction, Task
from powergrad.client.retries import Retries

T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:8642"
PING_EVERY_S = 15.0  # the server says ": ping" on a quiet stream this often, so three missed ones are a dead connection
QUIET_STREAM_S = 3 * PING_EVERY_S
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(frozen=True)
class Core:
    """Where the server is, how patient to be with it, and what to show it."""

    base_url: str
    timeout_s: float
    retries: Retries
    api_key: str | None = field(default=None, repr=False)
    """None: a server without keys, on this machine."""

    def settings(self) -> dict[str, Any]:
        """Arguments of httpx2.Client. A proxy from the environment is not asked for this machine's own server.

        Redirects are not followed: the API sends none, and a key must not reach another host.
        """
        from powergrad import __version__

        shown = {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}
        return {
            "base_url": self.base_url,
            "timeout": httpx2.Timeout(self.timeout_s, connect=min(5.0, self.timeout_s)),
            "trust_env": urlsplit(self.base_url).hostname not in LOOPBACK,
            "headers": {"User-Agent": f"powergrad/{__version__}", "Accept": "application/json", **shown},
            "follow_redirects": False,
        }

    def arguments(self, call: Call[Any]) -> dict[str, Any]:
        """Arguments of httpx2.Client.build_request."""
        return {
            "method": call.method,
            "url": call.path,
            "params": {key: str(value).lower() if isinstance(value, bool) else value for key, value in call.params.items()},
            "headers": call.headers,
            "json": call.json,
            "content": call.content if call.stream is None else call.stream(),
            "timeout": httpx2.Timeout(self.timeout_s + call.extra_wait_s, connect=min(5.0, self.timeout_s)),
        }

    def wait_s(self, call: Call[Any], outcome: httpx2.Response | httpx2.TransportError, tries: int) -> float | None:
        """Seconds before the next try; None where this outcome stands."""
        if isinstance(outcome, httpx2.Response) and (outcome.status_code < 400 or outcome.status_code in call.fine):
            return None
        return self.retries.wait_after(outcome, tries=tries, repeatable=call.repeatable)

    def settle(self, call: Call[T], outcome: httpx2.Response | httpx2.TransportError, tries: int) -> T:
        """The answer in an outcome that stands. Raises ApiError, Unreachable, or ClientError for an answer nobody can read."""
        response = self.response(call, outcome, tries)
        try:
            return call.read(response)
        except (ValueError, KeyError, TypeError) as error:
            raise ClientError(f"{response.url}: the answer is not one of PowerGrad's API ({type(error).__name__}: {error})") from error

    def response(self, call: Call[Any], outcome: httpx2.Response | httpx2.TransportError, tries: int) -> httpx2.Response:
        """The response, if there is one that is no refusal. Its body must have been read where it is one."""
        if isinstance(outcome, httpx2.TransportError):
            raise self.unreachable(outcome) from outcome
        accepted = outcome.is_success or outcome.status_code == 304 or outcome.status_code in call.fine
        if not accepted and not (tries > 1 and outcome.status_code in call.done_before):
            raise refusal(outcome)
        return outcome

    def unreachable(self, error: httpx2.TransportError) -> Unreachable:
        cause = str(error) or type(error).__name__
        return Unreachable(self.base_url, cause, refused=isinstance(error, httpx2.ConnectError))


KEY = re.compile(r"[\x21-\x7e]+")  # the server knows what a key looks like; here only that a header can hold it


def core(base_url: str | None, timeout_s: float, retries: int | Retries, api_key: str | None = None) -> Core:
    """Settings with the defaults filled in: POWERGRAD_URL, else the address that `powergrad up` listens on; POWERGRAD_API_KEY."""
    url = (base_url or os.environ.get("POWERGRAD_URL") or DEFAULT_URL).rstrip("/")
    if not _is_address(url):
        raise ClientError(f"{url}: must be an http:// or https:// address, such as {DEFAULT_URL}")
    key = (api_key or os.environ.get("POWERGRAD_API_KEY") or "").strip()
    if key and not KEY.fullmatch(key):
        raise ClientError("the API key (api_key, or POWERGRAD_API_KEY) has characters that no key has: pg_<id>_<secret> is one")
    return Core(url, timeout_s, retries if isinstance(retries, Retries) else Retries(count=retries), key or None)


def _is_address(url: str) -> bool:
    try:
        parts, read = urlsplit(url), httpx2.URL(url)
        return parts.scheme in {"http", "https"} and bool(parts.hostname and read.host) and parts.port != 0
    except (ValueError, httpx2.InvalidURL):
        return False


class Patience:
    """How long a caller waits for a job to end; None: for as long as it takes."""

    def __init__(self, timeout_s: float | None) -> None:
        self._timeout_s = timeout_s
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s

    def next_wait_s(self, job_id: str) -> float:
        """Seconds to let the server wait for a change. Raises TimeoutError when none are left."""
        if self._deadline is None:
            return LONGEST_POLL_S
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError(f"{job_id}: not finished after {self._timeout_s} s")
        return min(LONGEST_POLL_S, left_s)


class Place:
    """Where a reader is in a job's event stream: what to ask for next, and what it has had already."""

    def __init__(self, after: int) -> None:
        self.seq = after
        self.ended = False

    def take(self, frame: httpx2.ServerSentEvent) -> Event | None:
        """The event in a frame; None for the end frame and for what was seen before."""
        if frame.event == "end":
            self.ended = True
            return None
        event = Event.model_validate_json(frame.data)
        if event.seq <= self.seq:
            return None
        self.seq = event.seq
        return event


class LogPlace:
    """Where a reader is in a job's log, and the text of what it gets: a character may come in two pieces."""

    def __init__(self, job_id: str, tail: int | None) -> None:
        self._job_id, self._tail = job_id, tail
        self._offset: int | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.is_complete = False
        """Whether the answer that was begun last holds the end of the log."""

    def call(self) -> Call[None]:
        """What to ask for next."""
        return calls.follow_logs(self._job_id, tail=self._tail if self._offset is None else None, offset=self._offset)

    def begin(self, response: httpx2.Response) -> None:
        self._offset = int(response.headers["log-offset"])
        self.is_complete = response.headers["log-complete"] == "true"

    def take(self, block: bytes) -> str:
        assert self._offset is not None, "an answer was begun"
        self._offset += len(block)
        return self._decoder.decode(block)

    def rest(self) -> str:
        """What stands for half a character at the end."""
        return self._decoder.decode(b"", final=True)


CUT = httpx2.RemoteProtocolError("the stream ended before its end frame")


def chosen(found: list[Checkpoint], wanted: str, job_id: str) -> Checkpoint:
    """The checkpoint called `wanted`: best, latest or an id. Raises ApiError (404) naming those there are."""
    for checkpoint in found:
        if wanted == checkpoint.id or (wanted == "best" and checkpoint.is_best) or (wanted == "latest" and checkpoint.is_latest):
            return checkpoint
    there = ", ".join(checkpoint.id for checkpoint in found) or "none yet"
    problem: Mapping[str, Any] = {
        "title": "Not Found",
        "code": "checkpoint_not_found",
        "detail": f"{job_id} has no checkpoint {wanted!r}; it has: {there}",
    }
    raise ApiError(404, dict(problem))


def named(found: list[Artifact], wanted: str, job_id: str) -> Artifact:
    """The artifact called `wanted`. Raises ApiError (404) naming those there are."""
    for artifact in found:
        if artifact.name == wanted:
            return artifact
    there = ", ".join(artifact.name for artifact in found) or "none yet"
    problem = {"title": "Not Found", "code": "artifact_not_found", "detail": f"{job_id} has no artifact {wanted!r}; it has: {there}"}
    raise ApiError(404, problem)


TASK_LOOK_S = 1.0
DATASET_LOOK_S = 0.5


def predicted(task: Task) -> Prediction | None:
    """The prediction of a task that has ended; None while it has not. Raises ApiError for one that failed."""
    if task.error is not None:
        raise ApiError(500, {"title": "The task failed", "code": "task_failed", "detail": f"{task.error['code']}: {task.error['detail']}"})
    return None if task.result is None else Prediction.model_validate(task.result)
