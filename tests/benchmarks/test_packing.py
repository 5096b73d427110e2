"""The benchmark of runs packed on one GPU: what it says where there is none, and that it measures what it says."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.benchmarks.test_commands import ROOT, SECONDS, printed


def test_without_a_gpu_it_says_so_and_ends_well() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.packing"],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "no CUDA device\n"), done.stderr


@pytest.mark.long
@pytest.mark.timeout(SECONDS)
def test_packed_runs_end_with_the_same_weights_as_runs_alone() -> None:
    result = printed("benchmarks.packing", "--quick", "--device", "cpu")
    assert result["same_weights"]
    assert result["ratio"] == pytest.approx(result["packed_per_hour"]["median"] / result["alone_per_hour"]["median"])
