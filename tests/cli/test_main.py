"""The command line's manners: exit codes, streams, messages."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from powergrad import __version__
from powergrad.cli.main import main

COMMANDS = (
    "up demo doctor keys quota workers models init submit jobs show watch cancel pause resume retry logs metrics pull train".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Ended:
    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Ended]


@pytest.fixture
def powergrad(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process, its output captured, without POWERGRAD_ variables but those given."""

    def run(*arguments: str, cwd: Path | None = None, given: str = "", **environment: str) -> Ended:
        with monkeypatch.context() as patch:
            for name in [name for name in os.environ if name.startswith("POWERGRAD_")]:
                patch.delenv(name)
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.chdir(cwd or Path.cwd())
            patch.setattr("sys.stdin", io.StringIO(given))
            code = main(list(arguments))
        captured = capsys.readouterr()
        return Ended(code, captured.out, captured.err)

    return run


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address where nothing listens and nothing will."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_the_version_is_the_package_s(powergrad: Run) -> None:
    assert powergrad("--version").stdout.strip() == __version__


def test_help_names_every_command_and_the_exit_codes(powergrad: Run) -> None:
    told = powergrad("--help").stdout
    assert [name for name in COMMANDS if f" {name} " not in told] == []
    assert "130 interrupted" in " ".join(told.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(powergrad: Run, command: str) -> None:
    asked = powergrad(command, "--help")
    assert asked.returncode == 0
    assert "Exit codes" in asked.stdout


@pytest.mark.parametrize("arguments", [["jobs", "--no-such-option"], ["submit"], ["no-such-command"], ["up", "--workers", "0"]])
def test_wrong_usage_is_64_and_not_the_code_of_a_cancelled_job(powergrad: Run, arguments: list[str]) -> None:
    asked = powergrad(*arguments)
    assert asked.returncode == 64
    assert asked.stdout == ""


@pytest.mark.parametrize("arguments", [["jobs"], ["show", "last"], ["watch", "last"], ["workers"], ["logs", "last", "--follow"]])
def test_a_server_that_is_not_there_is_4_and_says_how_to_start_one(powergrad: Run, arguments: list[str], nobody: str) -> None:
    asked = powergrad(*arguments, "--url", nobody)
    assert asked.returncode == 4
    assert asked.stdout == ""
    assert f"Nothing answers at {nobody}" in asked.stderr
    assert "powergrad up" in asked.stderr
    assert "Traceback" not in asked.stderr


def test_the_address_may_come_from_the_environment(powergrad: Run, nobody: str) -> None:
    assert nobody in powergrad("jobs", POWERGRAD_URL=nobody).stderr


def test_an_address_that_is_none_is_wrong_usage(powergrad: Run) -> None:
    asked = powergrad("jobs", "--url", "localhost:8642")
    assert asked.returncode == 64
    assert "must be an http://" in asked.stderr


@pytest.mark.parametrize("url", ["http://[bad", "http://127.0.0.1:99999", "http://127.0.0.1:port", "http://a\nb"])
def test_an_address_that_cannot_be_read_is_wrong_usage(powergrad: Run, url: str) -> None:
    asked = powergrad("jobs", "--url", url)
    assert asked.returncode == 64
    assert "must be an http://" in asked.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["up", "--data-dir", ""],
        ["doctor", "--data-dir="],
        ["demo", "--data-dir", ""],
        ["train", "-", "--run-dir", ""],
        ["train", "-", "--run-dir", "run", "--data-root", ""],
        ["pull", "last", "-o", ""],
    ],
)
def test_an_empty_path_is_not_the_current_folder(powergrad: Run, tmp_path: Path, arguments: list[str]) -> None:
    asked = powergrad(*arguments, cwd=tmp_path)
    assert asked.returncode == 64
    assert "must not be empty" in " ".join(asked.stderr.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def shell(line: str) -> Ended:
    program = f"{sys.executable} -P -m powergrad.cli.main"
    command = ["bash", "-o", "pipefail", "-c", line.replace("powergrad", program)]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    return Ended(asked.returncode, asked.stdout, asked.stderr)


@pytest.mark.parametrize("command", ["--help", "init -", "--version"])
def test_a_reader_that_has_had_enough_is_no_error(command: str) -> None:
    asked = shell(f"powergrad {command} | true")
    assert (asked.returncode, asked.stderr) == (0, "")


@pytest.mark.parametrize(
    ("target", "message"), [(">/dev/full", "No space left on device"), (">&-", "standard output is closed")], ids=["full", "closed"]
)
@pytest.mark.parametrize("command", ["--help", "init -", "--version"])
def test_output_that_cannot_be_written_is_one_line(command: str, target: str, message: str) -> None:
    asked = shell(f"powergrad {command} {target}")
    assert asked.returncode == 1
    assert message in asked.stderr
    assert len(asked.stderr.splitlines()) == 1


def test_an_interrupted_command_says_so(powergrad: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(source: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("powergrad.cli.specfile.read", interrupted)
    asked = powergrad("train", "job.yaml", "--run-dir", str(tmp_path))
    assert asked.returncode == 130
    assert asked.stderr == "Interrupted.\n"


def test_the_shell_gets_the_exit_code() -> None:
    asked = subprocess.run([sys.executable, "-P", "-m", "powergrad.cli.main", "jobs", "--nope"], capture_output=True, check=False)
    assert asked.returncode == 64


def test_no_colour_where_nobody_sees_it(powergrad: Run, nobody: str) -> None:
    asked = powergrad("jobs", "--url", nobody)
    assert "\x1b" not in asked.stderr + asked.stdout


def test_init_writes_once_and_prints_on_demand(powergrad: Run, tmp_path: Path) -> None:
    assert powergrad("init", cwd=tmp_path).returncode == 0
    again = powergrad("init", cwd=tmp_path)
    assert again.returncode == 1
    assert "--force" in again.stderr
    assert powergrad("init", "--force", cwd=tmp_path).returncode == 0
    assert powergrad("init", "-").stdout == (tmp_path / "job.yaml").read_text()


def test_an_unreadable_spec_is_told_before_the_server_is_asked(powergrad: Run, nobody: str) -> None:
    asked = powergrad("submit", "-", "--url", nobody, given="epochs: 3\nepochs: 4\n")
    assert asked.returncode == 64
    assert "standard input, line 2, column 1: 'epochs' is given twice" in asked.stderr


def test_an_address_for_others_is_refused(powergrad: Run, tmp_path: Path) -> None:
    asked = powergrad("up", "--host", "0.0.0.0", "--data-dir", str(tmp_path))
    assert asked.returncode == 1
    assert "--host 0.0.0.0: other machines can reach this address, and there is no key" in asked.stderr
    assert f"powergrad keys create --data-dir {tmp_path}" in asked.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_commands_load_neither_torch_nor_the_server() -> None:
    program = "import json, sys, powergrad.cli.main; print(json.dumps([*sys.modules]))"
    printed = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True).stdout
    packages = {name.partition(".")[0] for name in json.loads(printed)}
    assert packages.isdisjoint({"torch", "api", "worker", "sqlalchemy", "fastapi", "celery", "httpx2"})
