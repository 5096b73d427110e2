"""What `powergrad doctor` says of machines that we have not: each finding from what the machine would tell."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from powergrad.cli import doctor
from powergrad.cli.doctor import Finding
from powergrad.jobs.migrate import migrate
from powergrad.jobs.store import Store

MODULE = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Fri Jan 10 00:00:00 UTC 2025\nGCC version: gcc 12\n"


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """An empty /dev, and the kernel module's own words."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "version").write_text(MODULE)
    return tmp_path


def only(findings: Iterator[Finding]) -> Finding:
    (found,) = findings
    return found


def test_without_nvidias_driver_nothing_is_said_of_it(tmp_path: Path) -> None:
    assert list(doctor._driver(tmp_path / "version", tmp_path)) == []


def test_a_driver_with_its_gpu_is_well(machine: Path) -> None:
    (machine / "dev" / "nvidia0").touch()
    found = only(doctor._driver(machine / "version", machine / "dev"))
    assert (found.verdict, found.detail) == ("ok", "NVIDIA 570.86.15")


def test_a_container_without_its_gpu_is_told_of_the_toolkit(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(doctor.ROLE, "worker")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = only(doctor._driver(machine / "version", machine / "dev"))
    assert found.verdict == "bad"
    assert "container toolkit" in found.advice


def test_a_worker_that_is_to_use_no_gpu_is_not_blamed(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert only(doctor._driver(machine / "version", machine / "dev")).verdict == "note"


@pytest.mark.parametrize(
    ("limit", "verdict", "total"), [("max", "ok", "32.0 GB"), ("2000000000", "note", "2.0 GB"), (None, "ok", "32.0 GB")]
)
def test_memory_is_that_of_the_container(tmp_path: Path, limit: str | None, verdict: str, total: str) -> None:
    meminfo, limited = tmp_path / "meminfo", tmp_path / "memory.max"
    meminfo.write_text("MemTotal:       31250000 kB\nMemFree: 1 kB\nMemAvailable:   20000000 kB\n")
    if limit is not None:
        limited.write_text(f"{limit}\n")
    found = only(doctor._memory(meminfo, limited))
    assert (found.verdict, found.detail.endswith(f"of {total}")) == (verdict, True), found


def test_too_little_shared_memory_is_said_with_the_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SMALL_SHM_BYTES", 1 << 62)
    found = only(doctor._shared_memory(tmp_path))
    assert found.verdict == "bad"
    assert "shm" in found.advice


def test_a_database_is_current_old_or_away(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/jobs.db"
    assert doctor._database(url).verdict == "bad"
    store = Store(url)
    migrate(store)
    store.close()
    assert doctor._database(url).verdict == "ok"
    away = doctor._database("postgresql+psycopg://nobody:x@127.0.0.1:1/none")
    assert away.verdict == "bad"
    assert "not reached" in away.detail
    assert doctor._database("").verdict == "bad"
    assert doctor._database("mysql://").verdict == "bad"


def test_a_broker_that_is_away_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor._broker("redis://127.0.0.1:1/0")
    assert found.verdict == "bad"
    assert "not reached" in found.detail
    assert doctor._broker("").verdict == "bad"


def test_an_image_is_asked_for_what_it_has_only(tmp_path: Path) -> None:
    subjects = [found.subject for found in doctor.examine(tmp_path, "http://127.0.0.1:1", "api")]
    assert "torch" not in subjects
    assert "Valkey" not in subjects
    assert {"database", "broker", "disk", "memory", "server"} <= set(subjects)
