"""Whatever is logged, and by whom, no line holds a secret; seen in the standard error of real processes."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from powergrad.jobs.logs import masked

KEY_ID, SECRET = "0a1b2c3d4e5f", "S3cret-_" + "x" * 35
KEY = f"pg_{KEY_ID}_{SECRET}"
SESSION = f"pgs_{SECRET}"
WEBHOOK = "whsec_" + "S3cret+/" * 5 + "x="
URL = "postgresql+psycopg://user:S3cret@db.example:5432/jobs"

PROGRAM = """
import logging, sys, threading
import structlog
from powergrad.jobs import logs

logs.configure(sys.argv[1])
logs.catch_unhandled()
key, session, webhook, url = sys.argv[2:]
log, plain = structlog.get_logger("one"), logging.getLogger("uvicorn.error")


def fail():
    local = key
    raise ValueError(f"{key} {session} {webhook} {url}")


log.info(f"in the event {key}", **{"value": key, "nested": {"list": [session, (webhook,)], "bytes": key.encode()}, "url": url})
structlog.contextvars.bind_contextvars(context=key)
plain.warning("in the message %s and %r", key, {"session": session})
try:
    fail()
except ValueError as error:
    log.exception("caught")
    log.warning("as a value", error=error, text=repr(error))
    plain.exception("caught %s", url)
    plain.error("by hand", exc_info=error)
thread = threading.Thread(target=fail)
thread.start()
thread.join()
fail()
"""


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_no_line_of_a_process_holds_a_secret(log_format: str) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, log_format, KEY, SESSION, WEBHOOK, URL],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    said = done.stdout + done.stderr
    assert "S3cret" not in said
    assert said.count(f"pg_{KEY_ID}_***") >= 9, "which key it was can be told"
    for told in ("in the event", "in the message", "caught", "as a value", "by hand", "ValueError", "user:***@db.example:5432"):
        assert told in said
    assert said.count("unhandled") == 2, "of the thread and of the process"
    assert done.returncode == 1
    if log_format == "json":
        assert all(isinstance(json.loads(line), dict) for line in done.stderr.splitlines())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"api_key_{KEY}", f"api_key_pg_{KEY_ID}_***"),
        (f"<{KEY}>", f"<pg_{KEY_ID}_***>"),
        (f"{KEY[:-4]}", f"pg_{KEY_ID}_***"),
        (f"?key={KEY}&q=1", f"?key=pg_{KEY_ID}_***&q=1"),
        ("Authorization: Bearer abc", "Authorization: Bearer ***"),
        (f"authorization: bearer {KEY}", f"authorization: bearer pg_{KEY_ID}_***"),
        ("redis://:S3cret@host", "redis://:***@host"),
        (URL, "postgresql+psycopg://user:***@db.example:5432/jobs"),
        ("http://127.0.0.1:8642/v1/jobs?x=a@b", "http://127.0.0.1:8642/v1/jobs?x=a@b"),
        ("job_01KAQZ5V3N8T4W6Y7C9E1G2H3J pg_dump pg_isready", "job_01KAQZ5V3N8T4W6Y7C9E1G2H3J pg_dump pg_isready"),
    ],
)
def test_what_is_masked_and_what_is_not(text: str, shown: str) -> None:
    assert masked(text) == shown


def test_a_long_line_is_masked_in_no_time() -> None:
    """A line of a megabyte that almost holds secrets, everywhere: no pattern may look at it again and again."""
    nasty = "://a:" * 50_000 + "bearer " * 50_000 + "pg_0a1b2c3d4e5f" * 20_000 + "whsec_" * 20_000
    began = time.process_time()
    masked(nasty)
    assert time.process_time() - began < 5.0, "0.03 s measured; a pattern that backtracks takes minutes"
