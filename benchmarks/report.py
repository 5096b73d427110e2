"""What the benchmarks say alike: the machine and versions, medians and tails, who else had the CPU, and the row that `--save` leaves."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypedDict

import psutil

RESULTS = Path(__file__).parent / "results"
STARVED = 0.05  # share of the machine used by others above which the figures are worth little
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # what decides the speed of torch on a CPU


class Origin(TypedDict):
    """Where and when a result was measured."""

    benchmark: str
    date: str
    hardware: str
    python: str
    versions: dict[str, str]


class Spread(TypedDict):
    """Many measurements of one thing."""

    n: int
    median: float
    p95: float


def origin(benchmark: str, *, packages: Sequence[str]) -> Origin:
    """The heading of a result. packages: those whose versions matter; they are not imported."""
    return {
        "benchmark": benchmark,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def hardware() -> str:
    """The processor, the cores this process may use, and its instruction sets that matter."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    told = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    sets = [name for name in INSTRUCTION_SETS if name in told.get("flags", "").split()]
    return ", ".join([told.get("model name", platform.machine()), f"{cores()} cores", *sets])


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def heading(result: Mapping[str, Any]) -> str:
    """The line above a table: machine and versions."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"{result['hardware']}; Python {result['python']}, {versions}"


def spread(values: Sequence[float]) -> Spread:
    """Median and 95th percentile."""
    tail = statistics.quantiles(values, n=20, method="inclusive")[-1] if len(values) > 1 else values[0]
    return {"n": len(values), "median": statistics.median(values), "p95": tail}


class Neighbours:
    """Measures how much of the machine others use while this process and its children, living and ended, do their work."""

    def __init__(self) -> None:
        self._begun, self._ours = _machine_s(), _family_s()
        self._begun_at = time.monotonic()

    def share(self) -> float:
        """Mean share of all cores used by others since the start, in [0, 1]. To be asked while the children still live."""
        elapsed = (time.monotonic() - self._begun_at) * (psutil.cpu_count() or 1)
        theirs = (_machine_s() - self._begun) - (_family_s() - self._ours)
        return min(1.0, max(0.0, theirs / elapsed))


def _machine_s() -> float:
    """CPU seconds the whole machine has worked, what a hypervisor gave to others included."""
    times = psutil.cpu_times()._asdict()
    return float(sum(times.get(kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq", "steal")))


def _family_s() -> float:
    """CPU seconds of this process and all its descendants; those of the dead are counted by whoever waited for them."""
    me, total = psutil.Process(), 0.0
    for process in [me, *me.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:4])  # user, system, and both of its children
    return total


def crowding(others_share: float) -> list[str]:
    """A warning, as lines of a report, where others took too much of the CPU."""
    if others_share <= STARVED:
        return []
    return [f"warning: other processes used {others_share:.0%} of the machine meanwhile; repeat on an idle one"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options all benchmarks have."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--save", action="store_true", help="append the result as a line below benchmarks/results/")


def deliver(result: Mapping[str, Any], table: str, options: argparse.Namespace) -> None:
    """Print the result as the options want it, and save it if they do."""
    print(json.dumps(result) if options.json else table, flush=True)
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        with (RESULTS / f"{result['benchmark']}.jsonl").open("a") as lines:
            lines.write(json.dumps(result) + "\n")
