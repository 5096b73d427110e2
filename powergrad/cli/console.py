"""What every command shares: where text goes, how values read, how to reach the server, and how a command ends."""

from __future__ import annotations

import contextlib
import difflib
import io
import itertools
import json
import math
import os
import re
import socket
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from powergrad.cli import completion

if TYPE_CHECKING:
    from powergrad.client import ApiError, Client, Job

WIDE = 160  # columns for text that goes to a file or a pipe: a table must not lose ids to a guess of 80


UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
SEARCHED = 1000  # jobs, ten pages: half a second at most before a command that names one begins


class Code(IntEnum):
    """Exit codes, the same for every command."""

    OK = 0
    FAILED = 1
    CANCELLED = 2
    REFUSED = 3
    UNREACHABLE = 4
    USAGE = 64  # EX_USAGE of sysexits.h; 2 would read as "cancelled"
    INTERRUPTED = 130


EXIT_CODES = (
    "Exit codes: 0 done (watched jobs succeeded) · 1 a job failed, or the command did · 2 a job was cancelled · 3 the server refused · "
    "4 the server cannot be reached · 64 wrong usage · 130 interrupted"
)


class Problem(Exception):
    """Ends the command with a message; `advice` says what to do."""

    def __init__(self, message: str, *, advice: str = "", code: Code = Code.FAILED) -> None:
        super().__init__(message)
        self.advice = advice
        self.code = code


class Finish(Exception):
    """Ends the command with a code and no message: everything has been said."""

    def __init__(self, code: Code) -> None:
        super().__init__(code)
        self.code = code


UrlOption = Annotated[
    str | None, typer.Option("--url", help="Address of the server.", envvar="POWERGRAD_URL", show_default="http://127.0.0.1:8642")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else there.")]
JobArgument = Annotated[
    str,
    typer.Argument(metavar="JOB", help="A job's id, an unambiguous part of one, or `last`.", autocompletion=completion.job_ids),
]
JobsArgument = Annotated[
    list[str],
    typer.Argument(metavar="JOB...", help="Ids, unambiguous parts of ids, or `last`.", autocompletion=completion.job_ids),
]


def path(text: str) -> Path:
    """A path from the command line. An empty one (a variable that is not set) would be the current folder."""
    if not text:
        raise typer.BadParameter("must not be empty")
    return Path(text)


def path_text(text: str) -> str:
    """The same as text, for which a slash at the end means a folder."""
    path(text)
    return text


class _Closed(io.TextIOBase):
    """Standard output that the caller has closed (`>&-`); Python gives None."""

    def write(self, text: str) -> int:
        del text
        raise Problem("standard output is closed")


def mend_streams() -> None:
    """Stand in for standard streams that the caller has closed, whose numbers the next opened file would take."""
    if None not in {sys.stdin, sys.stdout, sys.stderr}:
        return
    while os.open(os.devnull, os.O_RDWR) < 3:
        pass
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115 - for as long as the process lives
    sys.stdout = sys.stdout or _Closed()
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - the same


def drop_output() -> None:
    """Let what could not be written go, so that the interpreter does not try it again, and complain, at its end."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def stdout() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else WIDE)


def stderr() -> Console:
    return Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else WIDE)


def say(text: str) -> None:
    """A message for people: standard error, so that standard output holds results alone. `text` is rich markup."""
    stderr().print(text, soft_wrap=True)


def print_json(value: Any, *, compact: bool = False) -> None:
    """One JSON document, or with `compact` one line of JSON lines."""
    sys.stdout.write(json.dumps(value, indent=None if compact else 2, ensure_ascii=False, default=str) + "\n")
    sys.stdout.flush()


def print_table(titles: tuple[str, ...], rows: Iterable[Iterable[str]]) -> None:
    """A table on standard output; its cells are plain text."""
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for title in titles:
        table.add_column(escape(title), overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    stdout().print(table)


def as_json(job: Job) -> dict[str, Any]:
    return job.model_dump(mode="json")


# --- the server


def connect(url: str | None) -> Client:
    """A client. Raises Problem at once where nothing listens on this machine's own address, instead of after five retries."""
    from powergrad.client import Client, ClientError

    try:
        client = Client(url)
    except ClientError as error:
        raise Problem(str(error), code=Code.USAGE) from error
    refuse_silence(client.base_url)
    return client


def refuse_silence(url: str) -> None:
    parts = urlsplit(url)
    if parts.hostname not in {"127.0.0.1", "::1", "localhost"}:
        return
    try:
        socket.create_connection((parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)), timeout=2.0).close()
    except OSError as error:
        raise silence(url, error.strerror or "no answer") from error


def silence(url: str, cause: str) -> Problem:
    return Problem(
        f"Nothing answers at {url} ({cause}).",
        advice="Start a server: powergrad up\nOne that runs elsewhere: --url http://HOST:PORT, or set POWERGRAD_URL",
        code=Code.UNREACHABLE,
    )


def find(client: Client, wanted: str) -> str:
    """The id that `wanted` means: an id, `last`, or a part of one that fits no other among the newest SEARCHED jobs.

    A part from an id's beginning is looked for among all jobs.
    """
    if re.fullmatch(r"job_[0-9A-Za-z]{26}", wanted):
        return wanted
    if wanted == "last":
        newest = client.page(limit=1).data
        if not newest:
            raise Problem("There is no job yet.", advice="powergrad init, then powergrad submit job.yaml", code=Code.REFUSED)
        return newest[0].id
    fitting = _fitting(client, wanted)
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        more = ", …" if len(fitting) > 5 else ""
        raise Problem(
            f"{wanted}: {len(fitting)} jobs fit: {', '.join(fitting[:5])}{more}", advice="Give more of the id.", code=Code.REFUSED
        )
    advice = "The ids: powergrad jobs --all -q. An older job: give its whole id or the beginning of it."
    near = nearest(wanted, {job.id: job.name for job in client.page(limit=100).data})
    raise Problem(f"{wanted}: none of the newest {SEARCHED:,} jobs has such an id.{near}", advice=advice, code=Code.REFUSED)


def nearest(wanted: str, named: Mapping[str, str | None], *, kind: str = "job") -> str:
    """ " Did you mean job_… (its name)?": ids whose name is `wanted` or close to it, else ids that are close; empty where none is.

    named: id → name, newest first.
    """
    by_name = [one for one, name in named.items() if name == wanted]
    if not by_name and (names := difflib.get_close_matches(wanted, [name for name in named.values() if name], n=1)):
        by_name = [one for one, name in named.items() if name == names[0]]
    near = by_name or difflib.get_close_matches(wanted, list(named), n=1, cutoff=0.8)
    if not near:
        return ""
    beside = f" ({named[near[0]]})" if named[near[0]] else ""
    newest = f", the newest {kind} of that name" if len(by_name) > 1 else ""
    return f" Did you mean {near[0]}{beside}{newest}?"


def _fitting(client: Client, wanted: str) -> list[str]:
    """Ids with this part, newest first."""
    part = wanted.removeprefix("job_").upper()
    if not re.fullmatch(r"[0-9A-Z]{1,26}", part):
        return []
    looked_at = itertools.chain(itertools.islice(client.list(q=f"job_{part}"), SEARCHED), itertools.islice(client.list(), SEARCHED))
    found = {job.id for job in looked_at if _fits(job.id, part, wanted)}
    return sorted(found, reverse=True)  # a ULID begins with its time


def _fits(job_id: str, part: str, wanted: str) -> bool:
    ulid = job_id.removeprefix("job_").upper()
    return ulid.startswith(part) if wanted.startswith("job_") else part in ulid


# --- how values read

STATE_STYLES = {
    "queued": "cyan",
    "running": "blue",
    "pausing": "yellow",
    "paused": "yellow",
    "cancelling": "magenta",
    "cancelled": "magenta",
    "succeeded": "green",
    "failed": "red",
}


def state(name: str) -> str:
    """A state in its colour, as rich markup."""
    return f"[{STATE_STYLES.get(name, 'default')}]{name}[/]"


def seconds(text: str, *, option: str) -> float:
    """What 45m, 12h, 30d or 8w is in seconds."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)([smhdw])", text.strip())
    if re.fullmatch(r"[0-9]{10,}(\.[0-9]*)?[smhdw]", text.strip()):
        raise Problem(f"{option} {text[:32]}: must be a number below 1,000,000,000 and s, m, h, d or w, such as 30d", code=Code.USAGE)
    if found is None or float(found[1]) == 0:
        raise Problem(f"{option} {text}: must be a number above 0 and s, m, h, d or w, such as 30d", code=Code.USAGE)
    return float(found[1]) * UNITS_S[found[2]]


def duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def ago(moment: datetime | None, now: datetime | None = None) -> str:
    if moment is None:
        return "–"
    return f"{duration(max(0.0, ((now or datetime.now(UTC)) - moment).total_seconds()))} ago"


def size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}f}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.3g}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


# --- errors


UNAUTHENTICATED = 401
KEY_ADVICE = (
    "Set POWERGRAD_API_KEY to a key that works. Whoever runs the server makes one there: powergrad keys create; what became of the old one: "
    "powergrad keys list"
)


def describe(error: ApiError) -> str:
    """A refusal as rich markup: what, then every violation with its place in the spec or the parameter's name, or what to do."""
    head = f"[red]Refused[/] ({error.status}{f' {error.code}' if error.code else ''}): {escape(error.detail or error.title)}"
    width = max((len(violation.place) for violation in error.errors), default=0)
    lines = [
        f"  [bold]{escape(violation.place):{width}}[/]  {escape(violation.detail)}{_got(violation.value)}" for violation in error.errors
    ]
    return "\n".join([head, *lines, *([KEY_ADVICE] if error.status == UNAUTHENTICATED else [])])


def _got(value: Any) -> str:
    return "" if value is None else f" [dim](got {escape(json.dumps(value, ensure_ascii=False, default=str)[:120])})[/]"


def show_problem(problem: Problem) -> None:
    say(f"[red]{escape(str(problem))}[/]")
    if problem.advice:
        say(escape(problem.advice))


def interactive() -> bool:
    """Whether live bars make sense: both streams on a terminal that can move its cursor."""
    return sys.stdout.isatty() and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def lines(values: Iterable[str]) -> None:
    for value in values:
        sys.stdout.write(value + "\n")
