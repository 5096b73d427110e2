"""The spec: what it accepts, what it refuses, and how it says so."""

from __future__ import annotations

import json
import math
from typing import Any, get_args

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from powergrad.jobs.errors import InvalidSpec, Violation
from powergrad.jobs.spec import JobSpec, default_name, parse
from powergrad.protocol import FailureCode
from powergrad.spec import TORCHVISION_DATASETS, AdamWSpec, CosineSpec, SGDSpec, StepSpec, TorchvisionData, TrainSpec

DIGITS = {"data": {"dataset": "digits"}}
EVERY_FIELD: dict[str, Any] = {
    "name": "digits-pgt",
    "data": {"dataset": "digits", "image_size": 32, "batch_size": 128, "augment": "standard"},
    "model": {"name": "resnet18", "norm": "batch", "pretrained": False, "init_from": None},
    "loss": {"alpha": 0.25, "label_smoothing": 0.0},
    "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
    "schedule": {"name": "cosine", "warmup_epochs": 5},
    "clip": {"mode": "agc", "value": 0.01},
    "epochs": 20,
    "precision": "bf16",
    "compile": False,
    "ema": None,
    "seed": 0,
    "deterministic": True,
    "resources": {"gpus": 1},
    "checkpoint": {"every_epochs": 1, "keep_last": 2, "keep_best": 1},
    "early_stopping": None,
    "limits": {"max_seconds": None, "max_attempts": 3, "stall_seconds": 600},
    "priority": 5,
    "labels": {"team": "vision"},
    "webhook": None,
}


def body(pointer: str, value: Any, **rest: Any) -> dict[str, Any]:
    """A minimal body with one field set."""
    made: dict[str, Any] = json.loads(json.dumps({**DIGITS, **rest}))
    *sections, field = pointer[1:].split("/")
    part = made
    for section in sections:
        part = part.setdefault(section, {})
    part[field] = value
    return made


def violations(found: Any, **known: Any) -> list[Violation]:
    with pytest.raises(InvalidSpec) as raised:
        parse(found, **known)
    return raised.value.violations


def told(found: Any, **known: Any) -> list[tuple[str, str]]:
    return [(violation.pointer, violation.code) for violation in violations(found, **known)]


# --- what is accepted


def test_a_data_set_alone_is_a_job() -> None:
    spec = parse(DIGITS)
    assert (spec.model.name, spec.loss.alpha, spec.epochs, spec.precision, spec.data.batch_size) == ("resnet18", 1.0, 20, "auto", 128)
    assert spec.optimizer == SGDSpec(lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    assert (spec.schedule, spec.warmup_epochs, spec.clip) == (CosineSpec(), 2, None)


def test_the_example_with_every_field_is_accepted() -> None:
    spec = parse(EVERY_FIELD)
    assert spec.clip is not None
    assert (spec.name, spec.clip.mode, spec.resources.gpus, spec.labels) == ("digits-pgt", "agc", 1, {"team": "vision"})


@pytest.mark.parametrize(("epochs", "warmup"), [(1, 0), (9, 0), (10, 1), (20, 2), (49, 4), (50, 5), (1000, 5)])
def test_the_warm_up_follows_the_epochs(epochs: int, warmup: int) -> None:
    assert parse({**DIGITS, "epochs": epochs}).warmup_epochs == warmup


@pytest.mark.parametrize(
    ("epochs", "given_milestones", "milestones"), [(100, None, [30, 60, 90]), (2, None, [1]), (1, None, [1]), (10, [2, 5], [2, 5])]
)
def test_milestones(epochs: int, given_milestones: list[int] | None, milestones: list[int]) -> None:
    spec = parse({**DIGITS, "epochs": epochs, "schedule": {"name": "step", "milestones": given_milestones}})
    assert spec.milestones == milestones
    assert parse({**DIGITS, "epochs": epochs}).milestones == []


def test_a_kind_left_out_is_the_default_one() -> None:
    spec = parse({**DIGITS, "optimizer": {"lr": 0.5}, "schedule": {"warmup_epochs": 1}})
    assert (spec.optimizer, spec.schedule) == (SGDSpec(lr=0.5), CosineSpec(warmup_epochs=1))
    other = parse({**DIGITS, "optimizer": {"name": "adamw"}, "schedule": {"name": "step"}})
    assert (other.optimizer, other.schedule) == (AdamWSpec(name="adamw"), StepSpec(name="step"))


BOUNDS: list[tuple[str, list[Any], list[Any]]] = [
    ("/data/image_size", [8, 1024], [7, 1025]),
    ("/data/batch_size", [1, 65536], [0, 65537]),
    ("/data/val_fraction", [0.001, 0.5], [0.0, 0.51]),
    ("/loss/alpha", [0, 1, 0.25], [-0.01, 1.01]),
    ("/loss/label_smoothing", [0, 0.99], [-0.1, 1.0]),
    ("/optimizer/lr", [1e-9, 1000], [0, -1, 1001]),
    ("/optimizer/momentum", [0.01, 0.999], [-0.1, 1.0]),
    ("/optimizer/weight_decay", [0, 10], [-1e-9, 10.1]),
    ("/schedule/warmup_epochs", [0, 19], [-1, 10001]),
    ("/epochs", [1, 10000], [0, -1, 10001]),
    ("/seed", [0, 2**32 - 1], [-1, 2**32, 10**300]),
    ("/checkpoint/every_epochs", [1, 10000], [0, 10001]),
    ("/checkpoint/keep_last", [1, 1000], [0, 1001]),
    ("/checkpoint/keep_best", [1, 1000], [0, 1001]),
    ("/accumulate", [1, 2, 128], [0, 65537]),
    ("/schedule/cooldown_epochs", [0], [-1, 10001]),
    ("/schedule/warmup_lr", [0, 0.01], [-0.1, 1001]),
    ("/schedule/min_lr", [0, 0.1], [-0.1, 1001]),
    ("/ema/decay", [0.5, 0.99999], [0, 1]),
    ("/early_stopping/patience_epochs", [1, 10000], [0, 10001]),
    ("/early_stopping/min_delta", [0, 1e6], [-1, 1.1e6]),
    ("/telemetry/every_steps", [1, 1_000_000], [0, 1_000_001]),
    ("/data/augment/erasing", [0, 1], [-0.1, 1.1]),
    ("/data/augment/mixup", [0, 100], [-0.1, 101]),
    ("/data/augment/cutmix", [0, 100], [-0.1, 101]),
    ("/resources/gpus", [None, 0, 1, 64, 0.25, 0.5, 0.75, 2.0], [-1, 65, 0.3, 1.25, 0.1]),
    ("/resources/cpu_threads", [None, 1, 1024], [0, 1025]),
    ("/limits/max_seconds", [None, 0.001, 1e9], [0, -1, 1.1e9]),
    ("/limits/max_attempts", [1, 100], [0, 101]),
    ("/limits/stall_seconds", [1, 1e7], [0.9, 1.1e7]),
    ("/retention/ttl_seconds", [0, 1e9], [-1, 1.1e9]),
    ("/priority", [0, 9], [-1, 10]),
]
IN_ANOTHER: list[tuple[str, list[Any], list[Any], dict[str, Any]]] = [
    ("/data/workers", [0, 64], [-1, 65], {"data": {"dataset": "class_folder", "path": "pets"}}),
    ("/optimizer/beta1", [0, 0.99], [-0.1, 1], {"optimizer": {"name": "adamw"}}),
    ("/optimizer/beta2", [0, 0.99], [-0.1, 1], {"optimizer": {"name": "adamw"}}),
    ("/optimizer/eps", [1e-12, 1], [0, 1.1], {"optimizer": {"name": "adamw"}}),
    ("/optimizer/lr", [1e-12, 1000], [0, 1001], {"optimizer": {"name": "adamw"}}),
    ("/optimizer/weight_decay", [0, 10], [-1, 11], {"optimizer": {"name": "adamw"}}),
    ("/schedule/gamma", [0.01, 0.99], [0, 1], {"schedule": {"name": "step"}}),
    ("/clip/value", [1e-9, 1e6], [0, 1.1e6], {"clip": {"mode": "norm"}}),
    ("/optimizer/adamw_lr", [None, 1e-9, 1000], [0, 1001], {"optimizer": {"name": "muon"}}),
    ("/schedule/peak_at", [0.01, 0.99], [0, 1], {"schedule": {"name": "onecycle"}}),
    ("/schedule/start_factor", [1, 1e9], [0.9, 1.1e9], {"schedule": {"name": "onecycle"}}),
    ("/schedule/end_factor", [1, 1e9], [0.9, 1.1e9], {"schedule": {"name": "onecycle"}}),
    ("/loss/alpha/start", [0, 1], [-0.1, 1.1], {"loss": {"alpha": {"start": 1.0, "end": 0.5}}}),
    ("/loss/alpha/end", [0, 1], [-0.1, 1.1], {"loss": {"alpha": {"start": 1.0, "end": 0.5}}}),
    ("/loss/alpha/epochs", [None, 1, 20], [0, 10001], {"loss": {"alpha": {"start": 1.0, "end": 0.5}}}),
    ("/data/augment/crop_scale", [None, 0.01, 1], [0, 1.1], {"data": {"dataset": "digits", "augment": {"crop": "resized"}}}),
    ("/data/augment/policy/num_ops", [1, 10], [0, 11], {"data": {"dataset": "digits", "augment": {"policy": {"name": "rand"}}}}),
    ("/data/augment/policy/magnitude", [0, 30], [-1, 31], {"data": {"dataset": "digits", "augment": {"policy": {"name": "rand"}}}}),
    ("/data/classes", [10, 2000], [9, 2001], {"data": {"dataset": "glyphs"}}),
    ("/data/train_per_class", [1, 100000], [0, 100001], {"data": {"dataset": "glyphs"}}),
    ("/data/val_per_class", [1, 100000], [0, 100001], {"data": {"dataset": "glyphs"}}),
    ("/data/difficulty", [0, 1], [-0.1, 1.1], {"data": {"dataset": "glyphs"}}),
    ("/data/shuffle_window", [1, 10_000_000], [0, 10_000_001], {"data": {"dataset": "webdataset", "train": "a.tar", "val": "b.tar"}}),
]


@pytest.mark.parametrize(("pointer", "good", "bad", "rest"), [*((*case, {}) for case in BOUNDS), *IN_ANOTHER])
def test_the_bounds_of_a_field(pointer: str, good: list[Any], bad: list[Any], rest: dict[str, Any]) -> None:
    for value in good:
        parse(body(pointer, value, **rest))
    for value in bad:
        (found,) = violations(body(pointer, value, **rest))
        assert (found.pointer, found.code) == (pointer, "out_of_range")
        assert found.detail.startswith("must be ")
        assert found.value == value or found.value == str(value) or "..." in str(found.value)
    for value in (math.nan, math.inf, -math.inf, "1", True, [], {}):
        if not (value == {} and pointer in {"/clip/value", "/loss/alpha"}):  # an object there is wrong in another way
            assert [violation.pointer for violation in violations(body(pointer, value, **rest))] == [pointer]


def test_every_number_of_the_spec_has_its_bounds_tested() -> None:
    tested = {case[0].rsplit("/", 1)[-1] for case in BOUNDS} | {case[0].rsplit("/", 1)[-1] for case in IN_ANOTHER}
    numbers = {
        name
        for part in [JobSpec.model_json_schema(), *JobSpec.model_json_schema()["$defs"].values()]
        for name, field in part.get("properties", {}).items()
        if {"integer", "number"}
        & {field.get("type"), *(choice.get("type") for choice in [*field.get("anyOf", []), *field.get("oneOf", [])])}
    }
    assert numbers == tested


# --- what is refused


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({}, [("/data", "missing")]),
        ([], [("", "wrong_type")]),
        (None, [("", "wrong_type")]),
        ({"data": 5}, [("/data", "wrong_type")]),
        ({"data": {}}, [("/data/dataset", "missing")]),
        ({**DIGITS, "optimizer": 5}, [("/optimizer", "wrong_type")]),
        ({**DIGITS, "optimizer": {"name": "sdg"}}, [("/optimizer/name", "unknown_value")]),
        ({**DIGITS, "optimizer": {"name": None}}, [("/optimizer/name", "unknown_value")]),
        ({**DIGITS, "optimizer": {"beta1": 0.9}}, [("/optimizer/beta1", "unknown_field")]),
        ({**DIGITS, "optimizer": {"name": "adamw", "momentum": 0.9}}, [("/optimizer/momentum", "unknown_field")]),
        ({**DIGITS, "optimizer": {"momentum": 0}}, [("/optimizer/nesterov", "conflict")]),
        ({**DIGITS, "schedule": {"name": "cosine", "gamma": 0.1}}, [("/schedule/gamma", "unknown_field")]),
        ({**DIGITS, "schedule": {"name": "step", "milestones": [3, 2]}}, [("/schedule/milestones", "not_increasing")]),
        ({**DIGITS, "schedule": {"name": "step", "milestones": [3, 20]}}, [("/schedule/milestones", "would_be_ignored")]),
        (
            {**DIGITS, "schedule": {"name": "step", "milestones": [0, "x"]}},
            [("/schedule/milestones/0", "out_of_range"), ("/schedule/milestones/1", "wrong_type")],
        ),
        ({**DIGITS, "schedule": {"warmup_epochs": 20}}, [("/schedule/warmup_epochs", "out_of_range")]),
        ({**DIGITS, "clip": {"mode": "agc"}}, [("/clip/value", "missing")]),
        ({**DIGITS, "compile": True}, [("/compile", "not_available")]),
        ({**DIGITS, "webhook": "https://x"}, [("/webhook", "wrong_type")]),
        ({**DIGITS, "webhook": {"url": "ftp://x"}}, [("/webhook/url", "bad_format")]),
        ({**DIGITS, "webhook": {"url": "https://x", "events": ["job.born"]}}, [("/webhook/events/0", "unknown_value")]),
        ({"data": {"dataset": "mine", "version": "1"}}, [("/data/version", "bad_format")]),
        ({**DIGITS, "model": {"pretrained": True, "norm": "none"}}, [("/model/pretrained", "conflict")]),
        ({**DIGITS, "model": {"name": "vgg11", "norm": "batch"}}, [("/model/norm", "would_be_ignored")]),
        ({**DIGITS, "model": {"name": "timm/../x"}}, [("/model/name", "bad_format")]),
        ({**DIGITS, "model": {"init_from": "/etc/passwd"}}, [("/model/init_from", "bad_format")]),
        ({**DIGITS, "model": {"pretrained": True, "init_from": "job_" + "0" * 26}}, [("/model/pretrained", "conflict")]),
        ({**DIGITS, "model": {"sync_batch_norm": True}}, [("/model/sync_batch_norm", "would_be_ignored")]),
        (
            {**DIGITS, "model": {"sync_batch_norm": True, "norm": "group"}, "resources": {"gpus": 2}},
            [("/model/sync_batch_norm", "would_be_ignored")],
        ),
        ({**DIGITS, "accumulate": 3}, [("/accumulate", "conflict")]),
        ({**DIGITS, "early_stopping": {"metric": "ema_val_top1"}}, [("/early_stopping/metric", "conflict")]),
        ({**DIGITS, "export": ["onnx", "onnx"]}, [("/export", "conflict")]),
        ({**DIGITS, "export": ["tflite"]}, [("/export/0", "unknown_value")]),
        ({**DIGITS, "loss": {"alpha": "high"}}, [("/loss/alpha", "wrong_type")]),
        ({**DIGITS, "loss": {"alpha": {"start": 1}}}, [("/loss/alpha/end", "missing")]),
        ({**DIGITS, "loss": {"alpha": {"start": 1, "end": 0, "epochs": 21}}}, [("/loss/alpha/epochs", "out_of_range")]),
        ({**DIGITS, "loss": {"class_weights": "even"}}, [("/loss/class_weights", "unknown_value")]),
        ({**DIGITS, "loss": {"class_weights": [1, -1]}}, [("/loss/class_weights/1", "out_of_range")]),
        ({**DIGITS, "loss": {"class_weights": 3}}, [("/loss/class_weights", "wrong_type")]),
        ({"data": {"dataset": "digits", "augment": "hard"}}, [("/data/augment", "unknown_value")]),
        ({"data": {"dataset": "digits", "augment": 1}}, [("/data/augment", "wrong_type")]),
        ({"data": {"dataset": "digits", "augment": {"crop_scale": 0.5}}}, [("/data/augment/crop_scale", "would_be_ignored")]),
        ({"data": {"dataset": "digits", "augment": {"policy": {"name": "auto"}}}}, [("/data/augment/policy/name", "unknown_value")]),
        (
            {"data": {"dataset": "digits", "augment": {"policy": {"name": "trivial", "num_ops": 2}}}},
            [("/data/augment/policy/num_ops", "unknown_field")],
        ),
        ({"data": {"dataset": "glyphs", "classes": 2000, "train_per_class": 100000}}, [("/data/train_per_class", "out_of_range")]),
        ({"data": {"dataset": "cifar10", "workers": 2}}, [("/data/workers", "would_be_ignored")]),
        ({"data": {"dataset": "webdataset", "train": "a b", "val": "c"}}, [("/data/train", "bad_format")]),
        ({**DIGITS, "schedule": {"cooldown_epochs": 2}}, [("/schedule/cooldown_epochs", "would_be_ignored")]),
        ({**DIGITS, "schedule": {"min_lr": 0.01, "cooldown_epochs": 18}}, [("/schedule/cooldown_epochs", "out_of_range")]),
        ({**DIGITS, "schedule": {"min_lr": 0.5}}, [("/schedule/min_lr", "out_of_range")]),
        ({**DIGITS, "schedule": {"warmup_epochs": 0, "warmup_lr": 0.01}}, [("/schedule/warmup_lr", "would_be_ignored")]),
        ({**DIGITS, "schedule": {"name": "onecycle", "warmup_epochs": 2}}, [("/schedule/warmup_epochs", "unknown_field")]),
        ({**DIGITS, "labels": {"a b": "x"}}, [("/labels/a b", "bad_format")]),
        ({**DIGITS, "labels": {"a/b~c": "x"}}, [("/labels/a~1b~0c", "bad_format")]),
        ({**DIGITS, "labels": {"a": "x\0"}}, [("/labels/a", "bad_format")]),
        ({**DIGITS, "labels": {"a": "x" * 257}}, [("/labels/a", "string_too_long")]),
        ({**DIGITS, "name": "a\n"}, [("/name", "bad_format")]),
        ({**DIGITS, "name": "\ud800"}, [("/name", "bad_format")]),
        ({"data": {"dataset": "class_folder"}}, [("/data/path", "missing")]),
        ({"data": {"dataset": "class_folder", "path": "a/../b"}}, [("/data/path", "invalid_path")]),
        ({"data": {"dataset": "class_folder", "path": "/etc"}}, [("/data/path", "bad_format")]),
        (
            {"data": {"dataset": "digits", "path": "x", "workers": 2}},
            [("/data/path", "unknown_field"), ("/data/workers", "unknown_field")],
        ),
        ({"data": {"dataset": "digits", "download": True}}, [("/data/download", "unknown_field")]),
        ({**DIGITS, "precision": "fp8"}, [("/precision", "unknown_value")]),
        ({**DIGITS, "epoch": 3}, [("/epoch", "unknown_field")]),
    ],
)
def test_what_is_wrong_is_named_by_pointer_and_code(found: Any, expected: list[tuple[str, str]]) -> None:
    assert sorted(told(found)) == sorted(expected)


def test_a_text_rule_between_fields_does_not_hide_behind_a_wrong_field() -> None:
    found = {
        "data": {"dataset": "digits", "path": "x", "batch_size": 0},
        "epochs": 3,
        "schedule": {"name": "step", "warmup_epochs": 4, "milestones": [1, 9], "gamma": 2},
        "optimizer": {"momentum": 0.0, "lr": -1},
        "loss": {"alpha": 1.4},
        "priorty": 3,
    }
    assert sorted(told(found)) == [
        ("/data/batch_size", "out_of_range"),
        ("/data/path", "unknown_field"),
        ("/loss/alpha", "out_of_range"),
        ("/optimizer/lr", "out_of_range"),
        ("/optimizer/nesterov", "conflict"),
        ("/priorty", "unknown_field"),
        ("/schedule/gamma", "out_of_range"),
        ("/schedule/milestones", "would_be_ignored"),
        ("/schedule/warmup_epochs", "out_of_range"),
    ]


def test_a_field_is_not_held_to_the_default_of_a_wrong_one() -> None:
    assert told({**DIGITS, "epochs": "100", "schedule": {"warmup_epochs": 30}}) == [("/epochs", "wrong_type")]
    assert told({**DIGITS, "optimizer": {"name": "adam", "beta1": 0.9}}) == [("/optimizer/name", "unknown_value")]
    assert told({"data": {"dataset": "class folder"}}) == [("/data/dataset", "bad_format")]


def test_unknown_names_come_with_a_suggestion() -> None:
    known = {"models": ["resnet18", "vgg11"], "datasets": ["digits", "cifar10"]}
    found = violations({"data": {"dataset": "digit"}, "model": {"name": "resnet81"}, "epochs": 0}, **known)
    assert {(violation.pointer, violation.code) for violation in found} == {
        ("/data/dataset", "unknown_name"),
        ("/model/name", "unknown_name"),
        ("/epochs", "out_of_range"),
    }
    details = {violation.pointer: violation.detail for violation in found}
    assert details["/data/dataset"] == "unknown name 'digit'; did you mean 'digits'?"
    assert details["/model/name"] == "unknown name 'resnet81'; did you mean 'resnet18'?"
    assert violations({**DIGITS, "model": {"name": "zzz"}}, **known)[0].detail == "unknown name 'zzz'; known: resnet18, vgg11"
    parse(DIGITS, **known)


def test_a_wrong_value_is_shown_short() -> None:
    deep: Any = []
    for _ in range(900):
        deep = [deep]
    for value in ("x" * 100_000, 10**4000, ["x" * 1000] * 1000, deep, {"k": deep}):
        (found,) = violations({**DIGITS, "epochs": value})
        assert len(json.dumps(found.value)) < 1000


# --- any JSON at all

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just("\ud800"), st.integers().map(lambda n: n * 10**80)
)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=8
)
names = sorted(
    {name for part in [JobSpec.model_json_schema(), *JobSpec.model_json_schema()["$defs"].values()] for name in part.get("properties", {})}
)
words = st.sampled_from(
    [
        "sgd",
        "muon",
        "onecycle",
        "glyphs",
        "imagenet",
        "webdataset",
        "trivial",
        "balanced",
        "resized",
        "adamw",
        "step",
        "digits",
        "class_folder",
        "agc",
        "cifar10",
        "a/b",
        "\ud800",
        "[key]",
        "#sgd",
    ]
)
fields = st.dictionaries(st.sampled_from([*names, "#sgd", "[key]", "\ud800"]), st.one_of(words, anything), max_size=5)
bodies = st.one_of(
    anything,
    st.dictionaries(st.sampled_from([*names, "#sgd", "[key]", "\ud800"]), st.one_of(fields, anything), max_size=6),
    st.fixed_dictionaries(
        {"data": st.just({"dataset": "digits"})}, optional={name: st.one_of(fields, anything) for name in names if name != "data"}
    ),
)


@given(bodies)
@example({"data": {"dataset": "digits"}, "optimizer": {"#sgd": {"lr": 1}}})
@example({"data": {"dataset": "digits"}, "labels": {"[key]": 5}})
def test_any_json_is_a_spec_or_is_refused_in_words_that_can_be_sent(found: Any) -> None:
    refused: list[Violation] = []
    spec = None
    try:
        spec = parse(found, models=["resnet18"], datasets=["digits"])
    except InvalidSpec as error:
        refused = error.violations
    assert (spec is None) == bool(refused)
    for violation in refused:
        answer = json.dumps(vars(violation), allow_nan=False, ensure_ascii=False).encode()  # what an API does with it
        assert len(answer) < 2000
        assert violation.pointer == "" or violation.pointer.startswith("/")
    assert spec is None or parse(spec.model_dump(mode="json")) == spec


HELD_TO_OTHERS = {
    "/epochs",
    "/schedule/warmup_epochs",
    "/schedule/warmup_lr",
    "/schedule/min_lr",
    "/optimizer/lr",
    "/accumulate",
    "/data/batch_size",
}
"""Fields with rules between them: values that are right alone need not be right together."""


@st.composite
def specs(draw: st.DrawFn) -> dict[str, Any]:
    """A right body with any of its fields at any of the values the bounds' test knows to be right."""
    made: dict[str, Any] = dict(DIGITS)
    for pointer, good, _ in draw(st.lists(st.sampled_from(BOUNDS), max_size=8)):
        if pointer not in HELD_TO_OTHERS:
            made = body(pointer, draw(st.sampled_from(good)), **made)
    return made


@given(specs())
def test_a_normalised_spec_is_a_spec_and_itself(found: dict[str, Any]) -> None:
    spec = parse(found)
    normal = spec.model_dump(mode="json")
    assert parse(normal) == spec
    assert parse(json.loads(json.dumps(normal))).model_dump(mode="json") == normal
    assert spec.training() == TrainSpec.model_validate({name: normal[name] for name in TrainSpec.model_fields})


# --- the schema


def test_every_field_has_a_description_and_optional_ones_a_default() -> None:
    schema = JobSpec.model_json_schema()
    for title, part in {"JobSpec": schema, **schema["$defs"]}.items():
        assert "properties" not in part or part["additionalProperties"] is False, title
        for name, field in part.get("properties", {}).items():
            assert field.get("description", "").endswith("."), f"{title}.{name}"
            assert "default" in field or name in part["required"], f"{title}.{name}"


def test_the_default_name_fits_and_says_what_is_trained() -> None:
    assert default_name(parse({**DIGITS, "loss": {"alpha": 0.25}})) == "digits-resnet18-a0.25"
    assert default_name(parse({"data": {"dataset": "class_folder", "path": "pets/small"}})) == "pets-small-resnet18"
    assert default_name(parse({**DIGITS, "model": {"name": "timm/resnet10t"}})) == "digits-resnet10t"
    assert default_name(parse({**DIGITS, "loss": {"alpha": {"start": 1, "end": 0.25}}})) == "digits-resnet18-a1-0.25"
    long = default_name(parse({"data": {"dataset": "d" * 64}, "loss": {"alpha": 0.123456}}))
    assert len(long) == 64
    assert long.endswith("-a0.123456")
    parse({**DIGITS, "name": long})


def test_torchvision_sets_may_be_fetched() -> None:
    for dataset in TORCHVISION_DATASETS:
        data = parse({"data": {"dataset": dataset, "download": True}}).data
        assert isinstance(data, TorchvisionData)
        assert data.download


def test_a_tag_of_weights_names_the_network_it_belongs_to() -> None:
    parse({**DIGITS, "model": {"name": "timm/resnet18.a1_in1k"}}, models=["timm/resnet18"])
    assert told({**DIGITS, "model": {"name": "timm/resnet19.a1_in1k"}}, models=["timm/resnet18"]) == [("/model/name", "unknown_name")]


def test_each_data_set_is_one_kind_of_data_in_the_schema() -> None:
    """A JSON Schema validator takes `oneOf` at its word: no body may fit two kinds."""
    kinds = [kind for name, kind in JobSpec.model_json_schema()["$defs"].items() if name.endswith("Data")]
    for dataset in ("digits", "glyphs", "class_folder", "imagenet", "webdataset", *TORCHVISION_DATASETS, "mine"):
        assert sum(_takes(kind["properties"]["dataset"], dataset) for kind in kinds) == 1, dataset


def _takes(field: dict[str, Any], value: str) -> bool:
    if "const" in field or "enum" in field:
        return value in field.get("enum", [field.get("const")])
    return value not in field["not"]["enum"]


def test_a_trainers_failure_codes_are_reasons() -> None:
    from powergrad.jobs.states import ReasonCode

    assert set(get_args(FailureCode)) <= {code.value for code in ReasonCode}
