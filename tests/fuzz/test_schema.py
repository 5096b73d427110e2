"""The schema of a spec against the code that checks one: they refuse the same, but for the rules that are listed as beyond the schema."""

from __future__ import annotations

from typing import Any

import jsonschema_rs
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from api.routes.catalogue import SCHEMA
from powergrad import presets
from powergrad.jobs.errors import InvalidSpec
from powergrad.jobs.spec import BEYOND_THE_SCHEMA, parse
from tests.test_spec import BOUNDS, DIGITS, IN_ANOTHER, body, specs

VALIDATOR = jsonschema_rs.Draft202012Validator(SCHEMA)
BEYOND = {(pointer, code) for pointer, code, _ in BEYOND_THE_SCHEMA}

# per field, values between which the rules lie: each right by itself for some other value of another
FIELDS: dict[str, dict[str, list[Any]]] = {
    "model": {
        "name": ["resnet18", "timm/vit_tiny_patch16_224"],
        "norm": [None, "batch", "group", "none"],
        "pretrained": [True, False],
        "init_from": [None, "job_" + "0" * 26],
        "sync_batch_norm": [True, False],
    },
    "optimizer": {"name": ["sgd", "muon", "adamw"], "momentum": [0, 0.0, 0.9], "nesterov": [True, False], "lr": [1e-3, 0.1]},
    "schedule": {
        "name": ["cosine", "linear", "step", "constant", "onecycle"],
        "warmup_epochs": [None, 0, 3],
        "warmup_lr": [0, 0.01],
        "cooldown_epochs": [0, 2],
        "min_lr": [0, 0.01],
        "milestones": [None, [1, 2], [2, 2], [3, 1], [50]],
    },
    "early_stopping": {"metric": ["val_top1", "ema_val_top1"]},
    "ema": {"decay": [0.9]},
    "resources": {"gpus": [None, 0, 0.25, 0.3, 1, 2]},
    "labels": {"a": ["x", "a\nb"], "a b": ["x"]},
    "webhook": {"url": ["https://example.com/x", "ftp://x"], "events": [[], ["job.failed"]]},
}
WHOLE: dict[str, list[Any]] = {
    "epochs": [2, 9, 10, 100],
    "accumulate": [1, 2, 3],
    "export": [[], ["onnx", "bundle"], ["onnx", "onnx"]],
    "loss": [{"alpha": 0.5}, {"alpha": {"start": 1, "end": 0.5, "epochs": 5}}, {"class_weights": [1]}],
    "compile": [True, False],
    "unknown": [1],
}
DATA: list[dict[str, Any]] = [
    {"dataset": "digits"},
    {"dataset": "digits", "augment": {"crop_scale": 0.5}},
    {"dataset": "digits", "augment": {"crop_scale": 0.5, "crop": "resized"}},
    {"dataset": "digits", "augment": {"crop_scale": None, "crop": "none"}},
    {"dataset": "cifar10", "workers": 0},
    {"dataset": "cifar10", "workers": 2},
    {"dataset": "food101", "workers": 2},
    {"dataset": "glyphs"},
    {"dataset": "glyphs", "classes": 2000, "train_per_class": 100000},
    {"dataset": "class_folder", "path": "a/b"},
    {"dataset": "class_folder", "path": "a/../b"},
    {"dataset": "class_folder", "path": "..a/.b"},
    {"dataset": "imagenet", "path": "."},
    {"dataset": "mine", "version": "sha256:" + "0" * 64},
    {"dataset": "mine", "version": "1"},
    {"dataset": "mine", "path": "x"},
    {"dataset": ""},
    {},
]


@st.composite
def bodies(draw: st.DrawFn) -> dict[str, Any]:
    made: dict[str, Any] = {"data": draw(st.sampled_from(DATA))}
    for name in draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=4, unique=True)):
        fields = draw(st.lists(st.sampled_from(sorted(FIELDS[name])), max_size=5, unique=True))
        made[name] = {field: draw(st.sampled_from(FIELDS[name][field])) for field in fields}
    for name in draw(st.lists(st.sampled_from(sorted(WHOLE)), max_size=2, unique=True)):
        made[name] = draw(st.sampled_from(WHOLE[name]))
    return made


def broken_rules(found: Any) -> set[tuple[str, str]]:
    try:
        parse(found)
    except InvalidSpec as error:
        return {(violation.pointer, violation.code) for violation in error.violations}
    return set()


def holds(found: Any) -> None:
    """The schema and the code are of one mind about it."""
    broken = broken_rules(found)
    if VALIDATOR.is_valid(found):
        assert broken <= BEYOND, "the schema lets it pass"
    else:
        assert broken, f"only the schema refuses it: {next(iter(VALIDATOR.iter_errors(found)))}"


@settings(max_examples=600)
@given(bodies())
@example({"data": {"dataset": "digits"}, "model": {"sync_batch_norm": True}})
@example({"data": {"dataset": "digits"}, "model": {"sync_batch_norm": True}, "resources": {"gpus": 2}})
@example({"data": {"dataset": "digits"}, "schedule": {"warmup_lr": 0.01}, "epochs": 9})
@example({"data": {"dataset": "digits"}, "schedule": {"warmup_lr": 0.01}, "epochs": 10})
def test_the_schema_refuses_what_the_server_refuses_and_nothing_else(found: dict[str, Any]) -> None:
    holds(found)


@given(specs())
def test_the_schema_takes_every_right_spec_and_its_normalised_form(found: dict[str, Any]) -> None:
    assert VALIDATOR.is_valid(found)
    assert VALIDATOR.is_valid(parse(found).model_dump(mode="json"))


@pytest.mark.parametrize(("pointer", "good", "bad", "rest"), [*((*case, {}) for case in BOUNDS), *IN_ANOTHER])
def test_the_schema_has_the_bounds_of_a_field(pointer: str, good: list[Any], bad: list[Any], rest: dict[str, Any]) -> None:
    for value in [*good, *bad, "1", True, [], {}, None]:
        holds(body(pointer, value, **rest))


@pytest.mark.parametrize("spec", [preset.spec for preset in presets.all_presets()])
def test_the_schema_takes_every_preset(spec: dict[str, Any]) -> None:
    assert VALIDATOR.is_valid(spec)


BROKEN_BEYOND: list[dict[str, Any]] = [
    {"data": {"dataset": "glyphs", "classes": 2000, "train_per_class": 100000}},
    {**DIGITS, "schedule": {"warmup_epochs": 20}},
    {**DIGITS, "schedule": {"min_lr": 0.01, "cooldown_epochs": 18}},
    {**DIGITS, "schedule": {"name": "step", "milestones": [3, 2]}},
    {**DIGITS, "schedule": {"name": "step", "milestones": [3, 20]}},
    {**DIGITS, "schedule": {"warmup_lr": 0.5}},
    {**DIGITS, "schedule": {"min_lr": 0.5}},
    {**DIGITS, "loss": {"alpha": {"start": 1, "end": 0, "epochs": 21}}},
    {**DIGITS, "accumulate": 3},
]


def test_every_rule_that_is_listed_as_beyond_the_schema_is_one() -> None:
    told = set()
    for found in BROKEN_BEYOND:
        assert VALIDATOR.is_valid(found)
        told |= broken_rules(found)
    assert told == BEYOND
    assert {(rule["pointer"], rule["code"]) for rule in SCHEMA["x-further-rules"]} == BEYOND
