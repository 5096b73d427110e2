"""A short run of `scripts/fuzz` over either database, and proof that it finds what it looks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.fuzzer import fuzz
from tests.fuzz.site import ROOT, Site, serving

SECONDS = 12

# looks at jobs without asking whose they are
BROKEN_SERVER = """
from powergrad.jobs import queries
whole = queries.get
queries.get = lambda tx, job_id, *, owner: whole(tx, job_id, owner=next(iter(tx.one(__import__("sqlalchemy").select(
    queries.jobs.c.owner).where(queries.jobs.c.id == job_id)) or [owner])))
"""


def holds(site: Site, *, seed: int) -> None:
    found = fuzz(site, seconds=SECONDS, seed=seed)
    assert found.is_clean, found.report[-20_000:]
    assert site.defects() == []
    assert site.is_well()


@pytest.mark.timeout(300)
def test_nothing_is_found_over_sqlite(sqlite_site: Site) -> None:
    holds(sqlite_site, seed=1)


@pytest.mark.timeout(300)
def test_nothing_is_found_over_postgresql(postgresql_site: Site) -> None:
    holds(postgresql_site, seed=2)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_server_that_shows_a_job_to_another_owner_is_found_out(sqlite_file: Path, tmp_path: Path, broker_url: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(BROKEN_SERVER)
    copy = tmp_path / "jobs.db"
    copy.write_bytes(sqlite_file.read_bytes())
    with serving(f"sqlite:///{copy}", tmp_path / "data", broker_url, PYTHONPATH=f"{tmp_path}:{ROOT}") as site:
        found = fuzz(site, seconds=SECONDS, seed=1, phases="coverage", more=("--include-operation-id", "getJob"))
    assert not found.is_clean
    assert "An answer to the other owner" in found.report
