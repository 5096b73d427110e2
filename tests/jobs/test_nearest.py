"""What was meant by a field that is none."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from powergrad.jobs import nearest
from powergrad.jobs.errors import InvalidSpec
from powergrad.jobs.experiments.spec import ExperimentSpec
from powergrad.jobs.spec import JobSpec, parse

DIGITS: dict[str, Any] = {"data": {"dataset": "digits"}}


@pytest.mark.parametrize(
    ("changes", "pointer", "meant"),
    [
        ({"loss": {"alhpa": 1.0}}, "/loss/alhpa", "alpha"),
        ({"los": {"alpha": 1.0}}, "/los", "loss"),
        ({"lr": 0.1}, "/lr", "optimizer.lr"),
        ({"optimizer": {"alpha": 0.5}}, "/optimizer/alpha", "loss.alpha"),
        ({"optimizer": {"name": "adamw", "bta1": 0.9}}, "/optimizer/bta1", "beta1"),
        ({"loss": {"alpha": {"start": 1.0, "ned": 0.5}}}, "/loss/alpha/ned", "end"),
        ({"data": {"dataset": "digits", "augment": {"policy": {"name": "rand", "num_op": 2}}}}, "/data/augment/policy/num_op", "num_ops"),
        ({"ema": {"deacy": 0.9}}, "/ema/deacy", "decay"),
        ({"limits": {"max_second": 60}}, "/limits/max_second", "max_seconds"),
        ({"retention": {"ttl": 60, "ttl_second": 1}}, "/retention/ttl_second", "ttl_seconds"),
    ],
)
def test_a_misspelt_field_of_a_spec_is_told_with_the_right_one(changes: dict[str, Any], pointer: str, meant: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        parse(DIGITS | changes)
    told = {one.pointer: one.detail for one in caught.value.violations}
    assert told[pointer] == f"no such field; did you mean {meant!r}?"


def test_a_field_that_resembles_none_comes_without_a_guess() -> None:
    with pytest.raises(InvalidSpec, match=r"no such field$"):
        parse({**DIGITS, "xyzzy": 1})


def test_what_was_meant_is_a_field_of_the_kind_that_was_chosen() -> None:
    """momentum is SGD's, and Muon's: nothing of AdamW's is called so."""
    with pytest.raises(InvalidSpec) as caught:
        parse({**DIGITS, "optimizer": {"name": "adamw", "momentun": 0.9}})
    assert "momentum" not in caught.value.violations[0].detail


def _located(model: type[BaseModel], body: dict[str, Any]) -> list[tuple[str | int, ...]]:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    return [item["loc"] for item in caught.value.errors() if item["type"] == "extra_forbidden"]


@pytest.mark.parametrize("path", [path for path in nearest.paths(JobSpec) if "." not in path])
def test_every_field_is_found_by_its_name_less_a_letter(path: str) -> None:
    if len(path) > 3:
        assert nearest.field(JobSpec, [path[:2] + path[3:]]) == path


def test_the_members_of_a_plain_union_are_known() -> None:
    (location,) = (
        one for one in _located(ExperimentSpec, {"spec": {}, "space": {"a.b": {"low": 0.0, "high": 1.0, "setp": 2.0}}}) if "Range" in one
    )
    assert nearest.field(ExperimentSpec, location) == "step"


def test_paths_go_through_every_member_of_a_union() -> None:
    found = nearest.paths(JobSpec)
    assert len(set(found)) == len(found)
    assert {
        "epochs",
        "loss.alpha",
        "loss.alpha.start",
        "optimizer.beta1",
        "optimizer.momentum",
        "data.augment.policy.num_ops",
        "webhook.url",
    } <= set(found)


def test_a_known_name_is_suggested_and_else_all_are_listed() -> None:
    assert nearest.name("resnet81", ["resnet8", "vgg11"]) == "unknown name 'resnet81'; did you mean 'resnet8'?"
    assert nearest.name("zzz", ["resnet8", "vgg11"]) == "unknown name 'zzz'; known: resnet8, vgg11"
