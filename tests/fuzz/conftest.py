"""Sites for the fuzzer and for hostile requests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fuzz.site import Site, serving, with_broker


@pytest.fixture(scope="session")
def broker_url() -> Iterator[str]:
    # a socket's path may have 107 bytes, which pytest's folders exceed
    with tempfile.TemporaryDirectory(prefix="pg-", dir=os.environ.get("TMPDIR", "/tmp")) as folder, with_broker(Path(folder)) as broker:
        yield broker.url


@pytest.fixture
def sqlite_site(sqlite_file: Path, tmp_path: Path, broker_url: str) -> Iterator[Site]:
    copy = tmp_path / "jobs.db"
    copy.write_bytes(sqlite_file.read_bytes())
    with serving(f"sqlite:///{copy}", tmp_path / "data", broker_url) as site:
        yield site


@pytest.fixture
def postgresql_site(emptied: Callable[[], str], tmp_path: Path, broker_url: str) -> Iterator[Site]:
    with serving(emptied(), tmp_path / "data", broker_url) as site:
        yield site
