"""How the long-lived processes log: structlog to stderr, one event a line, job and attempt bound where there are any.

No line holds a secret, whoever logged it and however it came into a value or a traceback: what looks like one is masked in the finished text.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
from typing import Any, Literal

import structlog

LogFormat = Literal["console", "json"]

HIDDEN = "***"
SECRETS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(pg_[0-9a-f]{12}_)[A-Za-z0-9_-]+"), r"\1"),  # its id tells which key it was
    (re.compile(r"(pgs_)[A-Za-z0-9_-]+"), r"\1"),
    (re.compile(r"(whsec_)[A-Za-z0-9+/_=-]+"), r"\1"),
    (re.compile(r"(?i)\b(bearer +)(?!pg_[0-9a-f]{12}_)[^\s'\",;]+"), r"\1"),  # a key with a slip of the pen is still most of a key
    (re.compile(r"(://[^\s:/?#@'\"]*:)[^\s/@'\"]+(?=@)"), r"\1"),  # the password in a URL
)


def masked(text: str) -> str:
    """The text without the API keys, sessions, webhook secrets and passwords of URLs in it."""
    for pattern, kept in SECRETS:
        text = pattern.sub(kept + HIDDEN, text)
    return text


def _masked(_logger: Any, _method: str, rendered: Any) -> Any:
    return masked(rendered) if isinstance(rendered, str) else rendered


def configure(log_format: LogFormat, *, level: int = logging.INFO) -> None:
    """Send structlog and the standard library's loggers through one chain to stderr."""
    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    render: list[structlog.types.Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if log_format == "json"
        # plain: rich's tracebacks show every local variable, and take seconds in which the event loop stands still
        else [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)]
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render, _masked]
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it announces itself at every look at the schema


def catch_unhandled() -> None:
    """Log what nobody caught, in this process from now on: Python itself would write the traceback as it is, secrets and all."""
    sys.excepthook = _told
    threading.excepthook = lambda hooked: _told(hooked.exc_type, hooked.exc_value, hooked.exc_traceback)


def _told(kind: type[BaseException], error: BaseException | None, trace: Any) -> None:
    if not issubclass(kind, SystemExit | KeyboardInterrupt):
        logging.getLogger("powergrad").critical("unhandled", exc_info=None if error is None else (kind, error, trace))
