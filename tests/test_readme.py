"""The documents tell the truth: the README's commands are run against a real stack, its tables compared with the code, every link followed.

`python -m tests.test_readme` writes the spec table into the README anew.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pydantic_settings import BaseSettings

from powergrad.cli.stack import Stack
from powergrad.client import Client
from powergrad.jobs.spec import WEBHOOK_PATTERN, JobSpec
from powergrad.jobs.states import MOVES, RETRY
from powergrad.spec import INIT_FROM_PATTERN, MODEL_PATTERN, NAME_PATTERN, RELATIVE_PATH_PATTERN, SHARDS_PATTERN, VERSION_PATTERN

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
READY_S = 120.0
TOUR_S = 240.0
BETWEEN = "\x1e"  # ASCII's record separator, said between the blocks of the tour


# --- what the documents hold -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block. mark: the comment in the line above it; section: the heading it stands under."""

    language: str
    text: str
    mark: str
    section: str


def blocks(document: Path) -> list[Block]:
    found, section, mark = [], "", ""
    lines = iter(document.read_text().splitlines())
    for line in lines:
        if line.startswith("```"):
            inside = []
            while (inner := next(lines)) != "```":
                inside.append(inner)
            found.append(Block(line[3:], "\n".join(inside) + "\n", mark, section))
        elif line.startswith("#"):
            section = line.lstrip("# ")
        mark = line[4:-3].strip() if line.startswith("<!--") else ""
    return found


@dataclass(frozen=True)
class Stop:
    """One command block of the tour and what the README says it answers; None where it says nothing."""

    section: str
    commands: str
    answer: str | None


def stops() -> list[Stop]:
    padded = [*blocks(README), Block("", "", "", "")]
    return [
        Stop(block.section, block.text, after.text if after.language == "text" else None)
        for block, after in pairwise(padded)
        if block.mark == "tour"
    ]


TOUR = stops()
PYTHON = [block for block in blocks(README) if block.mark == "run"]


# --- the tour, against a real stack ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Two slots, so that each trainer computes with one thread on a shared machine."""
    with Stack(tmp_path_factory.mktemp("readme"), port=0, slots=2) as started:
        started.ready(READY_S)
        with Client(started.url) as client:
            deadline = time.monotonic() + READY_S
            while not client.models():  # told when the template is warm; from then on jobs start at once
                assert time.monotonic() < deadline, "no worker has told what it can train"
                time.sleep(0.1)
        yield started


@pytest.fixture(scope="module")
def answers(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return walked(tmp_path_factory.mktemp("reader"), os.environ | {"POWERGRAD_URL": stack.url, "no_proxy": "127.0.0.1"})


def walked(place: Path, environment: dict[str, str]) -> list[str]:
    """What each stop of the tour printed, all run by one shell, as a reader would paste them; what came after the last at the end."""
    script = "set -eu\n" + "".join(f"{stop.commands}printf '{BETWEEN}'\n" for stop in TOUR)
    with subprocess.Popen(
        ["bash", "-c", script],
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as shell:
        try:
            said, _ = shell.communicate(timeout=TOUR_S)
        except subprocess.TimeoutExpired:
            os.killpg(shell.pid, signal.SIGKILL)
            said, _ = shell.communicate()
    return said.split(BETWEEN)


@pytest.mark.timeout(READY_S + READY_S + TOUR_S)
@pytest.mark.parametrize("number", range(len(TOUR)), ids=[f"{number}-{stop.section}" for number, stop in enumerate(TOUR)])
def test_the_tour_answers_as_the_readme_shows(answers: list[str], number: int) -> None:
    assert len(answers) > number + 1, f"the tour ended before or in this block; its last words:\n{answers[-1]}"
    shown, said = TOUR[number].answer or "", settled(answers[number].replace("\r", "").rstrip("\n"))
    if re.fullmatch(pattern(shown), said) is None:
        pytest.fail(f"shown:\n{settled(shown)}\nsaid:\n{said}", pytrace=False)


def test_the_tour_is_the_whole_tour() -> None:
    commands = "".join(stop.commands for stop in TOUR)
    wanted = [
        "/events",
        "/metrics",
        "/logs",
        "/checkpoints",
        "/artifacts",
        "/predict",
        "/workers",
        "/models",
        "/datasets",
        "/presets",
        "/cancel",
        "/pause",
        "/resume",
        "/retry",
    ]
    for word in [*wanted, "/clone", "If-None-Match", "?wait=", "text/csv", "text/event-stream", "Idempotency-Key", "sha256sum", "DELETE"]:
        assert word in commands


SETTLED = (
    (r"job_[0-9A-Z]{26}", "job_ID"),
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", "TIME"),
    (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}", "TIME"),
    (r"\b\d+-[0-9a-f]{20}\b", "ETAG"),
    (r"\b\d\.\d{6,}\b", "DECIMAL"),  # measured by the run; what was asked for has fewer digits
)


def settled(text: str) -> str:
    """The text with all that differs from run to run replaced by its kind."""
    for found, kind in SETTLED:
        text = re.sub(found, kind, text)
    return text


def pattern(shown: str) -> str:
    """A regular expression for an answer in which `…` stands for anything, and a line of `…` for any number of lines."""
    lines = [
        r"(?:[^\n]*\n)*?" if line == "…" else r"[^\n]*".join(re.escape(part) for part in line.split("…")) + r"\n"
        for line in settled(shown).splitlines()
    ]
    return "".join(lines).removesuffix(r"\n")


@pytest.mark.parametrize(
    ("said", "fits"),
    [
        ("a: 1\nb\nc\nid: job_01M83YDTZ606E2HCX8VXKCEV7Z, loss 9.876543210, more", True),
        ("a: 1\nid: job_01M83YDTZ606E2HCX8VXKCEV7Z, loss 9.876543210", True),
        ("a: 2\nid: job_01M83YDTZ606E2HCX8VXKCEV7Z, loss 9.876543210", False),
        ("a: 1\nid: none, loss 9.876543210", False),
        ("a: 1\nid: job_01M83YDTZ606E2HCX8VXKCEV7Z, loss 9.876543210\nmore", False),
        ("a: 1", False),
        ("", False),
    ],
)
def test_a_wrong_answer_is_noticed(said: str, fits: bool) -> None:
    shown = "a: 1\n…\nid: job_01M83YD5BTFS9QHNXKEARYAD5X, loss 0.123456789…\n"
    assert bool(re.fullmatch(pattern(shown), settled(said))) is fits


@pytest.mark.timeout(READY_S + READY_S + TOUR_S)
def test_the_python_blocks_run_one_after_the_other(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POWERGRAD_URL", stack.url)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for block in PYTHON:
            exec(compile(block.text, f"README.md, {block.section}", "exec"), {"__name__": "__main__"})
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert re.search(r"^2 0\.\d+\nsucceeded None .*digits\.safetensors$", said, re.MULTILINE)
    accuracy = re.search(r"accuracy ([\d.]+)", said)
    assert accuracy is not None
    assert float(accuracy[1]) > 0.8, "the loop learns"


# --- commands and links ----------------------------------------------------------------------------------------------------------


COMMAND = r"(?:\.venv/bin/)?powergrad(?: [^`\n]*)?|(?:\./)?scripts/[^`\n]*"


def command_lines() -> list[tuple[str, list[str]]]:
    """Every `powergrad …` and `./scripts/…` line of a bash block, and those between backticks, as (document, words)."""
    found = []
    for document in DOCUMENTS:
        lines = [line for block in blocks(document) if block.language == "bash" for line in block.text.splitlines()]
        commands = [line for line in lines if re.fullmatch(COMMAND, line)] + re.findall(f"`({COMMAND})`", document.read_text())
        found += [(document.name, shlex.split(re.sub(r"\$\(.*?\)", "ANSWER", command), comments=True)) for command in commands]
    return found


@pytest.mark.parametrize(("document", "words"), command_lines(), ids=lambda value: value if isinstance(value, str) else " ".join(value))
def test_every_command_named_exists_with_its_options(document: str, words: list[str]) -> None:
    if words[0].removeprefix("./").startswith("scripts/"):
        assert os.access(ROOT / words[0], os.X_OK), f"{document}: {words[0]} is no script"
        return
    from typer.main import get_command

    from powergrad.cli.main import app

    group: Any = get_command(app)
    if len(words) == 1:
        return
    name, *arguments = words[1:]
    assert name in group.commands, f"{document}: powergrad {name} is no command"
    if arguments:
        group.commands[name].make_context(name, arguments)  # raises for an option or argument that there is not


def modules() -> list[str]:
    found = {name for document in DOCUMENTS for name in re.findall(r"python (?:-P )?-m ([\w.]+)", document.read_text())}
    return sorted(found)


@pytest.mark.parametrize("name", modules())
def test_every_module_to_be_run_exists(name: str) -> None:
    assert find_spec(name) is not None


def test_every_command_there_is_stands_in_the_readme() -> None:
    from typer.main import get_command

    from powergrad.cli.main import app

    group: Any = get_command(app)
    text = README.read_text()
    assert [name for name in group.commands if f"`powergrad {name}`" not in text] == []


def links() -> list[tuple[Path, str]]:
    found = []
    for document in DOCUMENTS:
        prose = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
        found += [(document, target) for target in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in target]
    return found


@pytest.mark.parametrize(("document", "target"), links(), ids=lambda value: value if isinstance(value, str) else value.name)
def test_every_relative_link_leads_somewhere(document: Path, target: str) -> None:
    path, _, anchor = target.partition("#")
    place = document.parent / path if path else document
    assert place.exists(), f"{document.name} links to {target}"
    if anchor:
        assert anchor in anchors(place), f"{document.name} links to {target}; there are {anchors(place)}"


def anchors(document: Path) -> list[str]:
    """The headings of a document as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


# --- tables against the code -----------------------------------------------------------------------------------------------------


def rows(document: Path, heading: str) -> list[list[str]]:
    """The body cells of the first table under a heading, backticks taken off."""
    _, _, after = document.read_text().partition(f"# {heading}\n")
    table = re.search(r"(?:^\|.*\n)+", after, re.MULTILINE)
    assert table is not None, f"{document.name}: no table under {heading}"
    lines = table[0].splitlines()[2:]
    return [[cell.strip().replace("`", "") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_errors_are_those_the_api_gives() -> None:
    text = README.read_text()
    assert text[text.index(ERRORS_BEGIN) + len(ERRORS_BEGIN) : text.index(ERRORS_END)] == error_table(), "run python -m tests.test_readme"


def error_table() -> str:
    """A line for each way to be refused, by status."""
    from api import errors

    kinds = sorted((kind for kind in vars(errors).values() if isinstance(kind, errors.Kind)), key=lambda kind: kind.status)
    lines = ["| status | code | when |", "|---|---|---|", *(f"| {kind.status} | `{kind.code}` | {kind.about} |" for kind in kinds)]
    return "\n".join(lines) + "\n"


def test_the_states_and_moves_are_those_of_the_code() -> None:
    told = {row[0]: set(row[1].split(", ")) - {"–"} for row in rows(ROOT / "docs/jobs.md", "States")}
    assert told == {str(state): {str(other) for other in others} for state, others in MOVES.items()}


def test_the_reasons_are_those_of_the_code() -> None:
    told = [row[:4] for row in rows(ROOT / "docs/jobs.md", "Reasons")]
    rules = [
        [str(code), "yes" if rule.retried else "no", f"{rule.backoff_s:g} s" if rule.retried else "–", "yes" if rule.costs else "no"]
        for code, rule in RETRY.items()
    ]
    assert told == rules


def test_the_settings_are_those_of_the_processes() -> None:
    from api.settings import ApiSettings
    from worker.settings import WorkerSettings

    told = {row[0]: row[1:3] for row in rows(ROOT / "docs/operations.md", "Settings")}
    there: dict[str, tuple[str, list[str]]] = {}
    kinds: list[tuple[str, type[BaseSettings]]] = [("api", ApiSettings), ("worker", WorkerSettings)]
    for process, kind in kinds:
        for name, field in kind.model_fields.items():
            variable = str(field.validation_alias or f"POWERGRAD_{name.upper()}")
            default = "from the environment" if field.default_factory else shown_default(field.default)
            known, processes = there.setdefault(variable, (default, []))
            processes.append(process)
            assert known == default, f"{variable} differs between api and worker: the table must say so"
    assert told == {variable: [known, ", ".join(processes)] for variable, (known, processes) in there.items()}


def shown_default(value: Any) -> str:
    """As the table shows it: no value as a dash, the home and the temporary folder by their usual names."""
    if value is None or value == "":
        return "–"
    if isinstance(value, Path):
        return str(value).replace(str(Path.home()), "~").replace(tempfile.gettempdir(), "/tmp")
    return f"{value:g}" if isinstance(value, float) else str(value)


def test_the_spec_table_is_that_of_the_schema() -> None:
    text = README.read_text()
    assert spec_table(JobSpec.model_json_schema()) == text[text.index(TABLE_BEGIN) + len(TABLE_BEGIN) : text.index(TABLE_END)], (
        "write it anew: python -m tests.test_readme"
    )


def test_the_spec_table_has_every_field_of_a_spec() -> None:
    fields = {row[0].partition(" ")[0] for row in rows(README, "The spec")}
    spec = JobSpec.model_validate({"data": {"dataset": "digits"}, "clip": {"mode": "agc", "value": 0.01}}).model_dump()
    assert dotted_names(spec) <= fields


def dotted_names(value: dict[str, Any], above: str = "") -> set[str]:
    names: set[str] = set()
    for name, inner in value.items():
        names |= dotted_names(inner, f"{above}{name}.") if isinstance(inner, dict) and inner else {above + name}
    return names


# --- the spec table --------------------------------------------------------------------------------------------------------------

TABLE_BEGIN = "<!-- spec table: python -m tests.test_readme writes it -->\n"
TABLE_END = "<!-- end of spec table -->"
ERRORS_BEGIN = "<!-- error table: python -m tests.test_readme writes it -->\n"
ERRORS_END = "<!-- end of error table -->"
Schema = dict[str, Any]


def spec_table(schema: Schema) -> str:
    """A line a field, from the JSON Schema of a job."""
    lines = ["| field | default | may be | what it is |", "|---|---|---|---|"]
    for name, field in schema["properties"].items():
        lines += _entries(schema, name, field)
    return "\n".join(lines) + "\n"


def _entries(schema: Schema, name: str, field: Schema, only: str = "") -> list[str]:
    """A field's own line, unless it is always an object, and the lines of the fields in it. only: the kinds that have it."""
    choices = list(_alternatives(schema, field))
    objects, values = ([one for one in choices if ("properties" in one) is wanted] for wanted in (True, False))
    lines = []
    if values:
        may_be = " or ".join([*(_range(one) for one in values[:-1]), *["an object"] * bool(objects), _range(values[-1])])
        lines.append(_line(name, _default(field), may_be, field, only=only))
    if len(objects) == 1:
        return lines + [
            line for part, inner in objects[0]["properties"].items() for line in _entries(schema, f"{name}.{part}", inner, only)
        ]
    return lines + (_union(schema, name, objects) if objects else [])


def _alternatives(schema: Schema, field: Schema) -> Iterator[Schema]:
    """What a field may be, its references and unions resolved; null comes last."""
    for choice in field.get("oneOf") or field.get("anyOf") or [field]:
        inner = schema["$defs"][choice["$ref"].rpartition("/")[2]] if "$ref" in choice else choice
        if inner is field:
            yield inner
        else:
            yield from _alternatives(schema, inner)


def _union(schema: Schema, name: str, kinds: list[Schema]) -> list[str]:
    """Fields of a section of several kinds: those that all share alike once, the others a line for the kinds that share it."""
    tag = "dataset" if "dataset" in kinds[0]["properties"] else "name"
    tags = [kind["properties"][tag] for kind in kinds]
    about = " ".join(f"{_kind(one)}: {one['description']}" for one in tags)
    lines = [f"| `{name}.{tag}` | {_default(tags[0])} | {', '.join(map(_range, tags))} | {about} |"]
    for part in dict.fromkeys(part for kind in kinds for part in kind["properties"] if part != tag):
        owners: dict[str, tuple[list[str], Schema]] = {}
        for kind in kinds:
            if part in kind["properties"]:
                field = kind["properties"][part]
                owners.setdefault(repr(field), ([], field))[0].append(_kind(kind["properties"][tag]))
        for who, field in owners.values():
            lines += _entries(schema, f"{name}.{part}", field, only="" if len(who) == len(kinds) else ", ".join(who))
    return lines


def _kind(tag: Schema) -> str:
    return str(tag["const"]) if "const" in tag else "torchvision's" if "enum" in tag else "any other"


def _line(name: str, default: str, may_be: str, field: Schema, *, only: str = "") -> str:
    about = field["description"].replace("|", "\\|")
    return f"| `{name}`{f' ({only})' if only else ''} | {default} | {may_be} | {about} |"


PATTERNS = {
    NAME_PATTERN: "1 to 64 of `A-Z a-z 0-9 . _ -`",
    MODEL_PATTERN: "1 to 96 of `A-Z a-z 0-9 . _ -`, after `timm/` or not",
    RELATIVE_PATH_PATTERN: "folders joined by `/`",
    SHARDS_PATTERN: "a URL or a path",
    INIT_FROM_PATTERN: "`job_…`, `job_…/best`, `job_…/latest` or `job_…/step-…`",
    VERSION_PATTERN: "`sha256:` and 64 hex digits",
    WEBHOOK_PATTERN: "a URL",
}


def _default(field: Schema) -> str:
    if "default" not in field:
        return "required"
    value = field["default"]
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _range(field: Schema) -> str:
    if "anyOf" in field:
        return " or ".join(_range(choice) for choice in field["anyOf"])
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{str(field['const']).lower()}`"
    match field["type"]:
        case "null":
            return "`null`"
        case "boolean":
            return "`true`, `false`"
        case "array":
            each = "numbers, each " if "minimum" in field["items"] else "of "
            return f"{field.get('minItems', 0)} to {field['maxItems']} {each}{_range(field['items'])}"
        case "object":
            return f"up to {field['maxProperties']} names with texts"
        case "string":
            return PATTERNS[field["pattern"]]
        case kind:
            return f"{'whole, ' if kind == 'integer' else ''}{_bounds(field)}"


def _bounds(field: Schema) -> str:
    open_low, open_high = "exclusiveMinimum" in field, "exclusiveMaximum" in field
    low = _plain(field["exclusiveMinimum" if open_low else "minimum"])
    high = _plain(field["exclusiveMaximum" if open_high else "maximum"])
    return f"{'above ' if open_low else ''}{low} to {'below ' if open_high else ''}{high}"


def _plain(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def main() -> None:
    _write(TABLE_BEGIN, TABLE_END, spec_table(JobSpec.model_json_schema()))
    _write(ERRORS_BEGIN, ERRORS_END, error_table())


def _write(begin: str, end: str, table: str) -> None:
    text = README.read_text()
    start, stop = text.index(begin) + len(begin), text.index(end)
    README.write_text(text[:start] + table + text[stop:])


if __name__ == "__main__":
    main()
