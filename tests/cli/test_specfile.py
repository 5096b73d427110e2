"""Reading specs as people write them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import yaml

from powergrad.cli import specfile
from powergrad.cli.console import Code, Problem
from powergrad.cli.jobs import EXAMPLE
from powergrad.jobs.spec import JobSpec, parse

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-4", 5e-4),
        ("1e3", 1000.0),
        ("0.05", 0.05),
        (".5", 0.5),
        ("-1.5E+2", -150.0),
        ("20", 20),
        ("true", True),
        ("null", None),
        ("none", "none"),
        ("2026-01-01", "2026-01-01"),
        ("1.2.3", "1.2.3"),
        ("'5e-4'", "5e-4"),
        ("[30, 60, 90]", [30, 60, 90]),
        ("{mode: norm, value: 1.0}", {"mode": "norm", "value": 1.0}),
    ],
)
def test_values_are_what_they_look_like(text: str, value: Any) -> None:
    found = specfile.parse(text, "text")
    assert (type(found), found) == (type(value), value)


def test_json_is_read_too(tmp_path: Path) -> None:
    assert specfile.read(written(tmp_path, '{"data": {"dataset": "digits"}}')) == {"data": {"dataset": "digits"}}


def test_standard_input_is_a_dash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("epochs: 3"))
    assert specfile.read("-") == {"epochs": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: 3\nepochs: 4", "line 2, column 1: 'epochs' is given twice"),
        ("a: b: c", "line 1, column 5"),
        ("- 1\n- 2", "must hold one mapping"),
        ("", "must hold one mapping"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
    ],
)
def test_what_is_no_spec_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(Problem, match=message):
        specfile.read(written(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer: {lr: .nan}", r"optimizer\.lr: must be a finite number, not nan"),
        ("epochs: 1e999", "epochs: must be a finite number, not inf"),
        ("name: !!timestamp 2026-01-01", "name: must be text, .* not date"),
        ("name: !!timestamp soon", "holds a value that is not of its type"),
        ("name: !!binary aGFsbG8=", "name: must be text, .* not bytes"),
        ("name: !!set {a, b}", "name: must be text, .* not set"),
        ("epochs: !!int many", "holds a value that is not of its type"),
        ("data: &it {dataset: digits, more: *it}", r"data\.more: refers to itself"),
        ("name: " + 5000 * "[", "nested deeper than 32 levels"),
        ("name: " + 100 * "[" + 100 * "]", "nested deeper than 32 levels"),
        ("? [a, b]\n: 1", "a key must be a single word"),
        ("!!map 3", "expected a mapping node"),
        ("\n".join(["a0: &a0 [1, 2]", *(f"a{n}: &a{n} [{', '.join(10 * [f'*a{n - 1}'])}]" for n in range(1, 12))]), "100,000 values"),
    ],
)
def test_what_json_does_not_know_is_refused_as_a_wrong_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(Problem, match=message) as told:
        specfile.read(written(tmp_path, text))
    assert told.value.code == Code.USAGE


def test_a_missing_file_is_named() -> None:
    with pytest.raises(Problem, match=r"nowhere\.yaml: cannot be read \(No such file or directory\)"):
        specfile.read("nowhere.yaml")


def test_settings_reach_into_sections_and_make_missing_ones() -> None:
    spec = {"loss": {"alpha": 1.0}, "clip": None}
    assert specfile.changed(spec, ["loss.alpha=0.3", "clip.mode=agc", "clip.value=0.01", "labels.team=vision"]) == {
        "loss": {"alpha": 0.3},
        "clip": {"mode": "agc", "value": 0.01},
        "labels": {"team": "vision"},
    }
    assert spec == {"loss": {"alpha": 1.0}, "clip": None}, "the spec given is left as it was"


@pytest.mark.parametrize("setting", ["loss.alpha", "=3", "loss..alpha=1", "epochs.x=1"])
def test_a_setting_that_is_none_is_refused(setting: str) -> None:
    with pytest.raises(Problem, match="--set"):
        specfile.changed({"epochs": 3}, [setting])


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_a_valid_job(path: Path) -> None:
    assert isinstance(parse(specfile.read(str(path))), JobSpec)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 5


def test_the_example_that_init_writes_is_a_valid_job() -> None:
    assert parse(specfile.parse(EXAMPLE, "init")).loss.alpha == 0.25


def test_what_init_comments_out_is_the_default_and_covers_every_field() -> None:
    """Uncommented, the example must still be valid, say what the defaults say, and leave no trainable field unmentioned."""
    lines = [line.replace("# ", "", 1) if line.lstrip().startswith("# ") else line for line in EXAMPLE.splitlines()[2:]]
    lines = [line.replace("#", "", 1) if line.startswith("#") else line for line in lines]
    told = yaml.safe_load("\n".join(lines).replace("5e-4", "5.0e-4"))
    told.pop("labels")
    told.pop("clip")
    spec = parse(told)
    plain = parse(specfile.parse(EXAMPLE, "init"))
    filled = plain.model_dump() | {"resources": spec.resources.model_dump()}
    differing = {key for key, value in spec.model_dump().items() if value != filled[key]}
    assert differing <= {"data", "schedule"}, "augment and warmup_epochs are spelled out where the default is null"
    unmentioned = JobSpec.model_fields.keys() - told.keys() - {"labels", "clip"}
    assert unmentioned == {"compile"}, "it is not available in this release"
