"""What the load makes of what it saw: an event that was not heard, or heard twice, is found."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import load
from benchmarks.load import Load
from powergrad.jobs.states import JobState
from tests.api.conftest import Api, serving, settings_for
from tests.jobs import builders


@pytest.fixture(scope="module")
def api(sqlite_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("api")
    copy = folder / "jobs.db"
    copy.write_bytes(sqlite_file.read_bytes())
    with serving(settings_for(f"sqlite:///{copy}", folder)) as running:
        yield running


@pytest.fixture
def seen(api: Api) -> Load:
    """A load that has followed one job to its end, and heard all."""
    job_id = builders.bring_to(api.store, JobState.SUCCEEDED)
    found = Load(int(api.url.rpartition(":")[2]), random.Random(0), line=[job_id])
    asyncio.run(load._listen(found, job_id, found.heard.setdefault(job_id, [])))
    return found


def verdict(seen: Load) -> int:
    lost, _ = asyncio.run(load._verdict(seen, 0.0))
    return lost


def heard(seen: Load) -> list[dict[str, Any]]:
    return next(iter(seen.heard.values()))


def test_what_was_heard_as_it_is_stored_is_no_loss_and_another_job_was_queued(seen: Load) -> None:
    assert list(seen.ended.values()) == ["succeeded"]
    assert len(seen.line) == 2
    assert (verdict(seen), seen.errors) == (0, [])


@pytest.mark.parametrize("number", [0, 1, -1])
def test_an_event_that_was_not_heard_is_lost(seen: Load, number: int) -> None:
    del heard(seen)[number]
    assert verdict(seen) > 0


def test_an_event_heard_twice_is_an_error(seen: Load) -> None:
    heard(seen).append(heard(seen)[-1])
    assert verdict(seen) == 0
    assert "twice" in seen.errors[0]


def test_an_event_heard_otherwise_than_stored_is_lost(seen: Load) -> None:
    heard(seen)[-1] = heard(seen)[-1] | {"type": "note"}
    assert verdict(seen) == 1


def test_of_a_job_that_is_not_over_only_what_is_stored_for_a_while_must_have_been_heard(seen: Load) -> None:
    seen.ended.clear()
    del heard(seen)[-1]
    assert verdict(seen) == 0  # held against the beginning of time: nothing was due


def test_percentiles_are_those_of_the_numbers() -> None:
    found = load.tail([float(n) for n in range(101)])
    assert (found["n"], found["p50"], found["p95"], found["p99"], found["max"]) == (101, 50.0, 95.0, 99.0, 100.0)
    assert load.tail([])["p99"] == 0.0
