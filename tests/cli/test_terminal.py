"""The commands on a terminal (a real pseudo-terminal) and into a pipe: plots and colours here, plain lines there."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from powergrad.cli.main import main
from powergrad.cli.stack import Stack
from powergrad.client import Client, Job
from tests.cli.conftest import TRAINED_S, tiny

Captured = pytest.CaptureFixture[str]
COLOUR = re.compile(r"\x1b\[[0-9;]*(3[0-9]|9[0-7]|38;5;[0-9]+)m")
BRAILLE = re.compile(r"[\u2801-\u28ff]")
FRAME = "┌──────"


def on_a_terminal(live: Stack, *arguments: str, columns: int = 120, rows: int = 40, **environment: str) -> tuple[int, str]:
    """The exit code, and all that the terminal got."""
    main_end, its_end = pty.openpty()
    fcntl.ioctl(its_end, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in {"NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "CI"}}
    command = [sys.executable, "-P", "-m", "powergrad.cli.main", *arguments]
    given = kept | {"POWERGRAD_URL": live.url, "TERM": "xterm-256color", "COLORTERM": ""} | environment
    with subprocess.Popen(command, stdin=its_end, stdout=its_end, stderr=its_end, env=given) as process:
        os.close(its_end)
        told = b""
        while block := _read(main_end):
            told += block
    os.close(main_end)
    return process.returncode, told.decode()


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # EIO: the other end is closed
        return b""


@pytest.fixture(scope="session")
def second(live: Stack) -> Job:
    """Another job, with another alpha and two epochs: something to compare with, and with a curve."""
    with Client(live.url) as client:
        return client.wait(client.submit(tiny(name="second", epochs=2, loss={"alpha": 0.5})).id, TRAINED_S)


def test_watching_on_a_terminal_draws_rows_and_curves(live: Stack, second: Job) -> None:
    code, told = on_a_terminal(live, "watch", second.id)
    assert code == 0
    assert "second" in told
    assert "validation top-1 accuracy (%)" in told
    assert BRAILLE.search(told)
    assert COLOUR.search(told)


def test_no_plot_is_none(live: Stack, second: Job) -> None:
    code, told = on_a_terminal(live, "watch", second.id, "--no-plot")
    assert code == 0
    assert FRAME not in told
    assert "second" in told


def test_a_metric_of_one_s_own_is_plotted(live: Stack, second: Job) -> None:
    _, told = on_a_terminal(live, "watch", second.id, "-m", "val_loss")
    assert "validation loss" in told
    assert "top-1 accuracy" not in told


def test_no_colour_where_it_is_not_wanted(live: Stack, second: Job) -> None:
    code, told = on_a_terminal(live, "watch", second.id, NO_COLOR="1")
    assert code == 0
    assert not COLOUR.search(told)
    assert FRAME in told
    assert not BRAILLE.search(told), "without colours curves are letters"


def test_a_terminal_that_moves_no_cursor_gets_lines(live: Stack, second: Job) -> None:
    code, told = on_a_terminal(live, "watch", second.id, TERM="dumb")
    assert code == 0
    assert "\x1b" not in told
    assert FRAME not in told
    assert "second  succeeded" in told


@pytest.mark.parametrize("rows", [5, 12, 24])
def test_a_low_terminal_is_not_overrun(live: Stack, second: Job, rows: int) -> None:
    code, told = on_a_terminal(live, "watch", second.id, columns=80, rows=rows)
    assert code == 0
    last = told[told.rindex("images/s") :]
    assert last.count("\n") <= rows


@pytest.mark.parametrize("columns", [80, 100, 120])
def test_a_list_of_jobs_keeps_ids_and_states_whole(live: Stack, second: Job, columns: int) -> None:
    code, told = on_a_terminal(live, "jobs", "-n", "100", columns=columns)
    assert code == 0
    (line,) = [line for line in told.splitlines() if second.id in line]
    assert "succeeded" in line
    assert ("ago" in line) == (columns >= 90)


def test_jobs_are_compared_with_their_curves(live: Stack, trained: Job, second: Job) -> None:
    code, told = on_a_terminal(live, "compare", trained.id, second.id)
    assert code == 0
    assert FRAME in told
    assert "loss.alpha" in told


def test_a_comparison_says_what_differs_and_what_came_of_it(here: Path, trained: Job, second: Job, capsys: Captured) -> None:
    assert main(["compare", trained.id, second.id]) == 0
    told = capsys.readouterr().out
    assert "\x1b" not in told
    assert FRAME not in told
    assert all(word in told for word in ("trained", "second", "epochs", "loss.alpha", "0.5"))
    assert "labels" not in told, "what trains nothing is not compared"
    assert main(["compare", trained.id, second.id, "--json", "-m", "val_top1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["differences"] == {"epochs": [1, 2], "loss.alpha": [1.0, 0.5]}
    assert [one["id"] for one in found["jobs"]] == [trained.id, second.id]
    assert found["jobs"][1]["scores"] == {"val_top1": second.metrics.best["val_top1"]}


def test_a_job_is_not_compared_with_itself(here: Path, trained: Job, capsys: Captured) -> None:
    assert main(["compare", trained.id, trained.id]) == 64
    assert "must be from 2 to 50 different ones" in capsys.readouterr().err


def test_into_a_pipe_there_is_neither_colour_nor_cursor(live: Stack, here: Path, trained: Job, second: Job) -> None:
    for command in (["watch", second.id], ["jobs"], ["compare", trained.id, second.id], ["pull", second.id], ["--help"]):
        arguments = [sys.executable, "-P", "-m", "powergrad.cli.main", *command]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "\x1b" not in done.stdout + done.stderr, command
        assert "\r" not in done.stdout + done.stderr, command


def test_a_name_in_place_of_an_id_is_told_its_id(here: Path, second: Job, capsys: Captured) -> None:
    assert main(["show", "second"]) == 3
    assert f"Did you mean {second.id} (second)?" in " ".join(capsys.readouterr().err.split())
    assert main(["show", "secnod"]) == 3
    assert second.id in capsys.readouterr().err


def test_a_command_that_is_none_names_the_nearest(here: Path, capsys: Captured) -> None:
    assert main(["sbmit", "job.yaml"]) == 64
    assert "submit" in capsys.readouterr().err
    assert main(["jobs", "--lable", "a=b"]) == 64
    assert "--label" in capsys.readouterr().err
