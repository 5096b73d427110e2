"""docs/cli.md and docs/python.md say what the code does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from powergrad.cli.console import EXIT_CODES, Code
from powergrad.cli.main import app
from powergrad.cli.stack import Stack
from tests.test_readme import blocks

DOCS = Path(__file__).parents[2] / "docs"
NOT_DATA = {"up", "demo", "train", "init", "logs"}
"""What prints no data: a server, a show, a run in this process; and texts that are their own format."""


def commands() -> Iterator[tuple[str, Any]]:
    group: Any = get_command(app)
    for name, command in group.commands.items():
        inner = getattr(command, "commands", None)
        yield from ((f"{name} {one}", held) for one, held in inner.items()) if inner else [(name, command)]


@pytest.mark.parametrize(("name", "command"), commands(), ids=lambda value: value if isinstance(value, str) else "")
def test_what_prints_data_prints_it_as_json_too(name: str, command: Any) -> None:
    options = {option for parameter in command.params for option in parameter.opts}
    assert ("--json" in options) == (name not in NOT_DATA)


def test_every_exit_code_is_documented() -> None:
    table = re.findall(r"^\| (\d+) \|", (DOCS / "cli.md").read_text(), re.MULTILINE)
    assert [int(code) for code in table] == sorted(Code)
    assert [int(code) for code in re.findall(r"(?:: |· )(\d+) ", EXIT_CODES)] == sorted(Code)


def test_the_python_page_runs_from_top_to_bottom(live: Stack, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marked = [block for block in blocks(DOCS / "python.md") if block.mark == "run"]
    assert len(marked) == 2
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in marked:
        exec(compile(block.text, f"python.md, {block.section}", "exec"), namespace)
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("succeeded 0.")
    assert re.fullmatch(r"1 0\.\d+", told[-1])
