"""A pytest plugin for `scripts/faults`: runs every test N times and ends with a table of the rows of the fault suite.

python -m pytest -p tests.faults.table --repeat 3 -m faults tests/faults
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import pytest

FAULTS = {
    1: "kill -9 trainer",
    2: "kill -9 template",
    3: "kill -9 worker tree",
    4: "SIGSTOP past the lease, SIGCONT",
    5: "broker killed, emptied, deleted, corrupted",
    6: "database restarted, locked",
    7: "API killed between commit and ring",
    8: "20 doorbells, 4 workers",
    9: "segfault, memory, NaN, hung step",
    10: "crash while a checkpoint is published",
    11: "stop at random steps",
    12: "cancel and pause in every state",
    13: "SIGTERM to everything, upgrade",
    14: "two stacks on one directory",
    15: "archives",
    16: "images",
    17: "specs",
    18: "pickle bombs",
    19: "webhooks",
    20: "keys",
    21: "event streams",
}


@dataclass
class Tally:
    tests: set[str] = field(default_factory=set)
    runs: int = 0
    failures: int = 0
    skips: int = 0
    seconds: float = 0.0


_tallies: dict[int, Tally] = defaultdict(Tally)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--repeat", type=int, default=1, metavar="N", help="run every test N times")


@pytest.fixture(autouse=True)
def repetition(request: pytest.FixtureRequest) -> int:
    """Which of the repetitions this is; it is part of the test's name, and so of what its dice show."""
    return int(getattr(request, "param", 0))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    times = metafunc.config.getoption("--repeat")
    if times > 1:
        metafunc.parametrize("repetition", range(times), indirect=True, ids=lambda i: f"repetition{i}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report: pytest.TestReport = yield
    marker = item.get_closest_marker("row")
    if marker is not None:
        report.user_properties.extend(("row", row) for row in marker.args if report.when == "setup")
        _count(report, [int(row) for row in marker.args])
    return report


def _count(report: pytest.TestReport, rows: list[int]) -> None:
    for row in rows:
        tally = _tallies[row]
        tally.seconds += report.duration
        tally.failures += report.failed
        tally.skips += report.skipped
        if report.when == "call":
            tally.runs += 1
            tally.tests.add(report.nodeid.partition("[")[0])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("faults", sep="=")
    terminalreporter.line(f"{'row':>4}  {'fault':<44}{'tests':>6}{'runs':>7}{'failures':>10}{'skipped':>9}{'seconds':>9}")
    for row, tally in sorted(_tallies.items()):
        counts = f"{len(tally.tests):>6}{tally.runs:>7}{tally.failures:>10}{tally.skips:>9}{tally.seconds:>9.0f}"
        terminalreporter.line(f"{row:>4}  {FAULTS.get(row, ''):<44}{counts}")
