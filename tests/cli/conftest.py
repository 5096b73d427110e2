"""A real embedded stack for the tests of client and commands: one start, and one trained job, for all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from powergrad.cli.stack import Stack
from powergrad.client import Client, Job

READY_S = 120.0
TRAINED_S = 120.0


def tiny(**fields: Any) -> dict[str, Any]:
    """A job of a few seconds; fields replace whole sections."""
    spec: dict[str, Any] = {
        "data": {"dataset": "digits", "image_size": 8, "batch_size": 256, "val_fraction": 0.5},
        "resources": {"gpus": 0, "cpu_threads": 1},
        "epochs": 1,
    }
    return spec | fields


def endless(**fields: Any) -> dict[str, Any]:
    """A job that is still running when a test has done with it."""
    return tiny(epochs=10_000, checkpoint={"every_epochs": 10_000}, **fields)


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack that is ready, with two slots."""
    with Stack(tmp_path_factory.mktemp("stack"), port=0, slots=2) as stack:
        stack.ready(READY_S)
        yield stack


@pytest.fixture
def client(live: Stack) -> Iterator[Client]:
    live.tend()
    with Client(live.url) as made:
        yield made


@pytest.fixture(scope="session")
def trained(live: Stack) -> Job:
    """A job that has succeeded; tests only read it."""
    with Client(live.url) as client:
        job = client.submit(tiny(name="trained", labels={"kept": "yes"}))
        return client.wait(job.id, TRAINED_S)


@pytest.fixture
def here(live: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory, with the environment naming the live server."""
    for name in [name for name in os.environ if name.startswith("POWERGRAD_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("POWERGRAD_URL", live.url)
    monkeypatch.chdir(tmp_path)
    return tmp_path
