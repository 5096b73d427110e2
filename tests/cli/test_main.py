"""The command line's manners: exit codes, streams, messages."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from powergrad import __version__

COMMANDS = (
    "up demo doctor workers models init submit jobs show watch cancel pause resume retry logs metrics pull train".split()  # noqa: SIM905
)


def powergrad(*arguments: str, cwd: Path | None = None, given: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a shell would, its output going to pipes."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "powergrad.cli.main", *arguments],
        capture_output=True,
        text=True,
        check=False,
        input=given,
        cwd=cwd,
        env={key: value for key, value in os.environ.items() if not key.startswith("POWERGRAD_")} | environment,
        timeout=60,
    )


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address where nothing listens and nothing will."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_the_version_is_the_package_s() -> None:
    assert powergrad("--version").stdout.strip() == __version__


def test_help_names_every_command_and_the_exit_codes() -> None:
    told = powergrad("--help").stdout
    assert [name for name in COMMANDS if f" {name} " not in told] == []
    assert "130 interrupted" in " ".join(told.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    asked = powergrad(command, "--help")
    assert asked.returncode == 0
    assert "Exit codes" in asked.stdout


@pytest.mark.parametrize("arguments", [["jobs", "--no-such-option"], ["submit"], ["no-such-command"], ["up", "--workers", "0"]])
def test_wrong_usage_is_64_and_not_the_code_of_a_cancelled_job(arguments: list[str]) -> None:
    asked = powergrad(*arguments)
    assert asked.returncode == 64
    assert asked.stdout == ""


@pytest.mark.parametrize("arguments", [["jobs"], ["show", "last"], ["watch", "last"], ["workers"], ["logs", "last", "--follow"]])
def test_a_server_that_is_not_there_is_4_and_says_how_to_start_one(arguments: list[str], nobody: str) -> None:
    asked = powergrad(*arguments, "--url", nobody)
    assert asked.returncode == 4
    assert asked.stdout == ""
    assert f"Nothing answers at {nobody}" in asked.stderr
    assert "powergrad up" in asked.stderr
    assert "Traceback" not in asked.stderr


def test_the_address_may_come_from_the_environment(nobody: str) -> None:
    assert nobody in powergrad("jobs", POWERGRAD_URL=nobody).stderr


def test_an_address_that_is_none_is_wrong_usage() -> None:
    asked = powergrad("jobs", "--url", "localhost:8642")
    assert asked.returncode == 64
    assert "must be an http://" in asked.stderr


def test_no_colour_where_nobody_sees_it(nobody: str) -> None:
    asked = powergrad("jobs", "--url", nobody)
    assert "\x1b" not in asked.stderr + asked.stdout


def test_init_writes_once_and_prints_on_demand(tmp_path: Path) -> None:
    assert powergrad("init", cwd=tmp_path).returncode == 0
    again = powergrad("init", cwd=tmp_path)
    assert again.returncode == 1
    assert "--force" in again.stderr
    assert powergrad("init", "--force", cwd=tmp_path).returncode == 0
    assert powergrad("init", "-").stdout == (tmp_path / "job.yaml").read_text()


def test_an_unreadable_spec_is_told_before_the_server_is_asked(nobody: str) -> None:
    asked = powergrad("submit", "-", "--url", nobody, given="epochs: 3\nepochs: 4\n")
    assert asked.returncode == 1
    assert "standard input, line 2, column 1: 'epochs' is given twice" in asked.stderr


def test_an_address_for_others_is_refused(tmp_path: Path) -> None:
    asked = powergrad("up", "--host", "0.0.0.0", "--data-dir", str(tmp_path))
    assert asked.returncode == 1
    assert "must be a loopback address" in asked.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_commands_load_neither_torch_nor_the_server() -> None:
    program = "import json, sys, powergrad.cli.main; print(json.dumps([*sys.modules]))"
    printed = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True).stdout
    packages = {name.partition(".")[0] for name in json.loads(printed)}
    assert packages.isdisjoint({"torch", "api", "worker", "sqlalchemy", "fastapi", "celery", "httpx2"})
