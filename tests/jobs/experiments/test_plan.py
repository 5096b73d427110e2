"""A question is refused with all that is wrong with it, each found where it was written; what is taken can be run."""

from __future__ import annotations

from typing import Any

import pytest

from powergrad.jobs.errors import InvalidSpec, UnknownReference, Violation
from powergrad.jobs.experiments import plan
from powergrad.jobs.experiments.spec import MAX_RUNS
from tests.jobs.experiments.builders import body

LR = {"low": 0.01, "high": 1.0, "log": True}


def violations(**overrides: Any) -> list[Violation]:
    with pytest.raises(InvalidSpec) as error:
        plan.parse(body(**overrides))
    return error.value.violations


def pointers(**overrides: Any) -> list[str]:
    return [violation.pointer for violation in violations(**overrides)]


def test_arms_are_every_combination_in_the_order_of_the_grid() -> None:
    question = plan.parse(body(grid={"loss.alpha": [1.0, 0.5], "epochs": [2, 3]}))
    assert [arm.settings for arm in question.arms] == [
        {"loss.alpha": 1.0, "epochs": 2},
        {"loss.alpha": 1.0, "epochs": 3},
        {"loss.alpha": 0.5, "epochs": 2},
        {"loss.alpha": 0.5, "epochs": 3},
    ]
    assert (question.runs, question.epochs) == (8, 2 * (2 + 3) * 2)


def test_what_is_wrong_is_found_where_it_was_written() -> None:
    assert pointers(grid={"loss.alpha": [1.0, 1.5], "clip": [None, {"mode": "norm", "value": -1.0}]}) == [
        "/grid/loss.alpha/1",
        "/grid/clip/1/value",
    ]
    assert pointers(spec={"epochs": 0, "loss": {"alpha": 2.0}}, grid={"seed": [1]}) == ["/spec/loss/alpha", "/spec/epochs", "/grid/seed"]
    assert pointers(tune={"optimizer.lr": [0.1, -1.0]}) == ["/tune/optimizer.lr/1"]
    assert pointers(seeds=0) == ["/seeds"]
    assert pointers(nonsense=1) == ["/nonsense"]
    assert pointers(metric="val_speed") == ["/metric"]
    assert pointers(baseline={"loss.alpha": 0.3}) == ["/baseline"]


def test_what_arms_break_together_is_told_with_the_arm() -> None:
    (one,) = violations(spec={"schedule": {"name": "cosine", "min_lr": 0.05}, "epochs": 10}, grid={"optimizer.lr": [0.1, 0.01]})
    assert one.pointer == "/spec/schedule/min_lr"
    assert "optimizer.lr=0.01" in one.detail


def test_a_budget_of_tuning_that_the_schedule_does_not_fit_is_refused() -> None:
    schedule = {"name": "cosine", "warmup_epochs": 3}
    assert pointers(spec={"schedule": schedule, "epochs": 8}, tune={"optimizer.lr": [0.1, 0.2]}, tuning={"epochs": 2}) == [
        "/spec/schedule/warmup_epochs"
    ]


@pytest.mark.parametrize("path", ["seed", "name", "labels.team", "priority", "resources.gpus", "resources.cpu_threads", "webhook"])
def test_only_fields_of_training_are_varied_and_the_seed_is_none(path: str) -> None:
    assert pointers(grid={path: [1, 2]}) == [f"/grid/{path}"]


def test_a_value_is_set_once() -> None:
    assert pointers(grid={"loss.alpha": [1.0, 0.5]}, tune={"loss.alpha": [0.1]}) == ["/tune/loss.alpha"]
    assert pointers(grid={"loss": [{"alpha": 0.5}], "loss.alpha": [1.0]}) == ["/grid/loss.alpha"]


def test_arms_that_are_the_same_are_refused() -> None:
    (one,) = violations(grid={"loss.alpha": [1.0, 0.5, 1]})
    assert (one.pointer, one.code) == ("/grid/loss.alpha/2", "duplicate")
    assert pointers(tune={"optimizer.lr": [0.1, 0.1]}) == ["/tune/optimizer.lr/1"]


def test_there_is_a_most_of_runs() -> None:
    assert len(plan.parse(body(seeds=100, grid={"loss.alpha": [0.1, 0.2, 0.3, 0.4, 0.5]})).arms) * 100 == MAX_RUNS
    assert pointers(seeds=100, grid={"loss.alpha": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]}) == ["/grid"]
    assert pointers(seeds=99, tune={"optimizer.lr": [i / 10 for i in range(1, 65)]}, tuning={"seeds": 3}) == ["/seeds"]


def test_names_are_checked_against_what_workers_know() -> None:
    with pytest.raises(UnknownReference) as error:
        plan.parse(body(grid={"model.name": ["resnet8", "resnet9"]}), models=["resnet8"], datasets=["digits"])
    assert [one.pointer for one in error.value.violations] == ["/grid/model.name/1"]


def test_labels_of_the_experiments_own_are_refused() -> None:
    assert pointers(labels={"arm": "x"}) == ["/labels/arm"]
    assert pointers(spec={"labels": {f"l{i}": "" for i in range(29)}}) == ["/labels"]


def test_the_baseline_is_the_arm_without_powergrad_unless_it_is_named() -> None:
    assert plan.parse(body(grid={"loss.alpha": [0.5, 1.0]})).baseline == 1
    assert plan.parse(body(grid={"loss.alpha": [0.5, 0.3]})).baseline == 0
    assert plan.parse(body(grid={"loss.alpha": [0.5, 1.0]}, baseline={"loss.alpha": 0.5})).baseline == 0
    # a value that the base has anyway need not be named
    assert plan.parse(body(grid={"loss.alpha": [0.5, 1.0], "epochs": [3, 2]}, baseline={"loss.alpha": 0.5})).baseline == 1


def test_halving_has_rungs_up_to_the_budget() -> None:
    def rungs(count: int, halving: int | None, budget: int = 20) -> list[tuple[int, int]]:
        rates = [0.1 + i / 100 for i in range(count)]
        question = plan.parse(body(spec={"epochs": budget}, tune={"optimizer.lr": rates}, tuning={"halving": halving}))
        return [(rung.candidates, rung.epochs) for rung in question.rungs]

    assert rungs(4, None) == [(4, 20)]
    assert rungs(4, 2) == [(4, 10), (2, 20)]
    assert rungs(5, 2) == [(5, 5), (3, 10), (2, 20)]
    assert rungs(9, 3) == [(9, 6), (3, 20)]
    assert rungs(2, 2) == [(2, 20)]
    assert rungs(16, 2, budget=4) == [(16, 1), (8, 1), (4, 2), (2, 4)]


def test_a_shared_learning_rate_is_told_where_the_loss_is_varied() -> None:
    assert plan.parse(body()).shared == ["optimizer.lr"]
    assert plan.parse(body(tune={"optimizer.lr": [0.1, 0.2]})).shared == []
    assert plan.parse(body(grid={"epochs": [2, 3]})).shared == []


def test_losses_are_better_lower() -> None:
    assert [plan.parse(body(metric=metric)).direction for metric in ("val_top1", "val_loss", "train_top1")] == ["max", "min", "max"]


def test_a_search_draws_from_a_space_and_compares_nothing() -> None:
    question = plan.parse(body(strategy="asha", space={"optimizer.lr": LR}))
    assert (question.arms, question.baseline, question.seeds, question.runs) == ((), None, (0,), 20)
    assert pointers(strategy="random") == ["/space"]
    assert pointers(strategy="random", space={"optimizer.lr": LR}, grid={"epochs": [1]}, tune={"clip": [None]}) == ["/grid", "/tune"]
    assert pointers(space={"optimizer.lr": LR}) == ["/space"]


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        ({"low": 1.0, "high": 0.5}, "high"),
        ({"low": 0.0, "high": 0.5, "log": True}, "low"),
        ({"low": 0.1, "high": 0.5, "log": True, "step": 0.1}, "step"),
        ({"low": 0.1, "high": 2.0, "integer": True}, "low"),
        ({"low": -1.0, "high": 2.0}, "low"),
        ({"low": 0.1, "height": 2.0}, "high"),
        ({"values": []}, "values"),
        ({"values": [0.1, "x"]}, "values/1"),
    ],
)
def test_a_range_that_is_none_is_refused(wrong: dict[str, Any], where: str) -> None:
    assert f"/space/optimizer.lr/{where}" in pointers(strategy="random", space={"optimizer.lr": wrong})


def test_the_name_says_what_is_varied() -> None:
    assert plan.parse(body(grid={"loss.alpha": [1.0, 0.5], "optimizer.lr": [0.1, 0.2]})).name == "digits-resnet8-alpha-lr"
    assert plan.parse(body(name="mine")).spec.name == "mine"
    assert len(plan.parse(body(spec={"name": "n" * 64})).name) == 64


@pytest.mark.parametrize("nothing", [None, 1, "x", [], {}, {"spec": None}, {"spec": []}, {"spec": {}, "grid": 1}])
def test_nonsense_is_refused(nothing: Any) -> None:
    with pytest.raises(InvalidSpec):
        plan.parse(nothing)
