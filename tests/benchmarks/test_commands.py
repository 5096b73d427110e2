"""Every benchmark runs from the command line and prints a result that holds together: no speed is asserted here beyond all doubt."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import job_start

ROOT = Path(__file__).parents[2]
SECONDS = 400  # a quick run takes half a minute on an idle machine of two cores


def printed(*command: str, exits: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """What `python -m benchmarks...` prints with --json. exits: codes it may end with."""
    done = subprocess.run(
        [sys.executable, "-m", *command, "--json"], cwd=ROOT, capture_output=True, text=True, timeout=SECONDS - 10, check=False
    )
    assert done.returncode in exits, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout)
    assert result["benchmark"] == command[0].removeprefix("benchmarks.")
    assert result["hardware"]
    assert result["peer"]
    assert 0 <= result["others_share"] <= 1
    result["exit"] = done.returncode
    return result


@pytest.mark.timeout(SECONDS)
def test_job_start_beats_a_fresh_process_and_accounts_for_all_its_time() -> None:
    result = printed("benchmarks.job_start", "--quick")
    assert result["ratio"] == pytest.approx(result["fresh_ms"]["median"] / result["client_ms"]["median"])
    assert result["ratio"] > 1  # seconds of imports against a fork: 25 is the goal
    assert list(result["stages_ms"]) == list(job_start.STAGES.values())
    # of two rounds the median is the mean, so the stages add up; the database keeps whole milliseconds
    assert sum(result["stages_ms"].values()) == pytest.approx(result["client_ms"]["median"], abs=1)
    assert result["database_ms"]["median"] < result["client_ms"]["median"]
    assert (result["client_ms"]["n"], result["back_to_back_ms"]["n"]) == (2, 1)
    assert result["back_to_back_ms"]["median"] > 0


@pytest.mark.timeout(SECONDS)
def test_slots_trains_two_jobs_at_a_time_each_on_its_share_of_the_cores() -> None:
    result = printed("benchmarks.slots", "--quick")
    cores = int(next(part for part in result["hardware"].split(", ") if part.endswith(" cores")).split()[0])
    assert result["threads"] == max(1, cores // 2)
    assert result["ratio_to_alone"] == pytest.approx(result["together"]["median"] / result["alone"]["median"])
    assert result["ratio_to_plain"] == pytest.approx(result["together"]["median"] / result["plain"]["median"])


def test_loss_gives_the_geometric_mean_of_its_ratios() -> None:
    result = printed("benchmarks.loss", "--rounds", "1")
    product = 1.0
    for size in result["sizes"]:
        assert size["ratio"] == pytest.approx(size["power_grad_us"] / size["cross_entropy_us"])
        product *= size["ratio"]
    assert result["geometric_mean"] == pytest.approx(product ** (1 / len(result["sizes"])))


@pytest.mark.timeout(SECONDS)
def test_api_serves_its_load() -> None:
    result = printed("benchmarks.api", "--quick")
    assert result["submit_per_s"] > 0
    assert result["inline_per_s"] > 0


@pytest.mark.long
@pytest.mark.timeout(SECONDS)
def test_load_finds_no_error_and_no_lost_event_and_exits_by_its_bars() -> None:
    result = printed("benchmarks.load", "--quick", exits=(0, 1))
    assert (result["errors"], result["lost_events"], result["failed_jobs"]) == (0, 0, 0), result["faults"]
    assert result["heard_events"] > 0
    assert set(result["missed"]) <= {"poll_p99_ms", "lag_p99_s", "growth_mib"}, "times and memory are the machine's affair"
    assert result["exit"] == bool(result["missed"])
    assert result["statuses"].keys() == {"200", "304"}
