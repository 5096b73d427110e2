"""One stack of the real images, built from the real files, for all tests."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.compose.project import Project

FIGURES: list[str] = []
"""What was measured, to be printed at the end."""


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A fresh copy of the files with its images built."""
    made = Project.fresh(tmp_path_factory.mktemp("clone"), "powergrad-under-test")
    began = time.monotonic()
    made.compose("build")
    FIGURES.append(f"images built in {time.monotonic() - began:.0f} s (with what Docker's build cache had)")
    return made


@pytest.fixture(scope="session")
def stack(project: Project) -> Iterator[Project]:
    """The stack, ready, with its CPU worker."""
    project.down()  # what a run before this one left
    try:
        FIGURES.append(f"`up -d` to /readyz: {project.up():.1f} s")
        yield project
    finally:
        project.down()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if FIGURES:
        terminalreporter.section("figures")
        for line in FIGURES:
            terminalreporter.write_line(line)
