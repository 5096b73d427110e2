"""What a client call can raise.

ClientError
├── ApiError           the server answered, and refused (RFC 9457 problem)
├── Unreachable        no answer: refused, timed out, cut off
├── DownloadCorrupt    the file that came is not the file that was published
└── ForgedWebhook      the call did not come from the server, or not now
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2


class ClientError(Exception):
    """Base of everything this package raises on purpose."""


@dataclass(frozen=True)
class Violation:
    """One thing wrong with a request: where it is (a JSON pointer into the body, or a parameter's name), and the rule it breaks."""

    pointer: str
    code: str
    detail: str
    value: Any = None
    parameter: str = ""

    @property
    def place(self) -> str:
        return self.parameter or self.pointer or "/"


class ApiError(ClientError):
    """The server refused. `code` is the problem's own word, `errors` every violation of a bad spec."""

    def __init__(self, status: int, problem: dict[str, Any], *, retry_after_s: float | None = None) -> None:
        self.status = status
        self.code = str(problem.get("code", ""))
        self.title = str(problem.get("title", ""))
        self.detail = str(problem.get("detail") or "")
        self.instance = str(problem.get("instance") or "")
        self.errors = [_violation(entry) for entry in problem.get("errors") or [] if isinstance(entry, dict)]
        self.problem = problem
        self.retry_after_s = retry_after_s
        super().__init__(self._message())

    def _message(self) -> str:
        said = self.detail or self.title or "no reason given"
        broken = [f"{violation.place}: {violation.detail}" for violation in self.errors]
        return "; ".join([f"{self.status} {self.code}: {said}" if self.code else f"{self.status}: {said}", *broken])


class Unreachable(ClientError):
    """No complete answer came: the connection was refused, timed out or broke."""

    def __init__(self, url: str, cause: str, *, refused: bool = False) -> None:
        self.url = url
        self.refused = refused
        super().__init__(f"{url}: {cause}")


class ForgedWebhook(ClientError):
    """A webhook that the server did not sign, or that is older (or newer) than is tolerated: answer 401 and do nothing."""


class DownloadCorrupt(ClientError):
    """A downloaded file's sha256 or size differs from the published one; the partial file is gone, so call again."""


def refusal(response: httpx2.Response) -> ApiError:
    """The error in a response of status 400 or more; a body that is no problem document is quoted."""
    problem: Any = None
    with contextlib.suppress(ValueError):
        problem = response.json()
    if not isinstance(problem, dict):
        problem = {"title": response.reason_phrase, "detail": response.text[:500].strip()}
    return ApiError(response.status_code, problem, retry_after_s=retry_after_s(response))


def retry_after_s(response: httpx2.Response) -> float | None:
    """Seconds the server asks to be left alone, which a proxy before it may say as a date; None where neither says it, or nobody can read it."""
    said = response.headers.get("retry-after", "")
    try:
        return max(0.0, float(said))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # no date, or one without a zone
        return None


def _violation(entry: dict[str, Any]) -> Violation:
    pointer, code, detail, parameter = (str(entry.get(name) or "") for name in ("pointer", "code", "detail", "parameter"))
    return Violation(pointer, code, detail, entry.get("value"), parameter)
