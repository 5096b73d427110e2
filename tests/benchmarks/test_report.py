"""The figures around the figures: spread, who used the CPU, and the saved row."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import report

BURN = "import time\nwhile time.process_time() < {seconds}: pass"


def test_spread_is_median_and_95th_percentile() -> None:
    assert report.spread([float(n) for n in range(101)]) == {"n": 101, "median": 50.0, "p95": 95.0}


def test_one_measurement_is_its_own_spread() -> None:
    assert report.spread([7.0]) == {"n": 1, "median": 7.0, "p95": 7.0}


def test_work_of_children_that_have_ended_is_ours() -> None:
    before = report._family_s()
    subprocess.run([sys.executable, "-c", BURN.format(seconds=0.5)], check=True)
    assert report._family_s() - before >= 0.45  # the kernel counts in hundredths


def test_work_of_our_children_is_not_the_neighbours() -> None:
    """The machine's time and ours are read by the same clock, so our work cannot raise their share by what it is itself."""
    neighbours = report.Neighbours()
    machine, family = report._machine_s(), report._family_s()
    subprocess.run([sys.executable, "-c", BURN.format(seconds=0.5)], check=True)
    theirs = (report._machine_s() - machine) - (report._family_s() - family)
    assert theirs >= -0.1  # all we did is in the machine's count
    assert 0 <= neighbours.share() <= 1


def test_a_crowded_machine_is_named() -> None:
    assert report.crowding(0.0) == []
    assert "30%" in report.crowding(0.3)[0]


def test_save_appends_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    options = argparse.Namespace(json=False, save=True)
    for number in (1, 2):
        report.deliver({"benchmark": "some", "number": number}, f"table {number}", options)
    rows = [json.loads(line) for line in (tmp_path / "results" / "some.jsonl").read_text().splitlines()]
    assert [row["number"] for row in rows] == [1, 2]
    assert capsys.readouterr().out == "table 1\ntable 2\n"


def test_without_save_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    report.deliver({"benchmark": "some"}, "", argparse.Namespace(json=True, save=False))
    assert not (tmp_path / "results").exists()
