"""The evidence: what is run and in which order, what is made of it, and that a study that was cut ends as one that was not."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scipy import stats  # type: ignore[import-untyped]

from benchmarks import evidence, evidence_figure
from benchmarks.evidence import (
    Log,
    Point,
    Run,
    Study,
    Trial,
    chosen_lr,
    difference,
    due,
    estimate,
    fingerprint,
    full_study,
    missing_exponents,
    quick_study,
    table,
)

ROOT = Path(__file__).parents[2]
SECONDS = 400  # the quick study takes some ten seconds on an idle machine of two cores


def one_net(**changes: Any) -> Study:
    study = quick_study()
    return replace(study, specs={"resnet8-none": study.specs["resnet8-none"]}, **changes)


def finished(study: Study, trial: Trial, *, top1: float | None = 0.5, outcome: Any = "finished") -> Run:
    last: Point = {"step": 12, "top1": top1, "loss": 1.0}
    return Run(
        trial=trial,
        fingerprint=fingerprint(study.spec_of(trial)),
        outcome=outcome,
        detail="",
        classes=10,
        steps_per_epoch=6,
        seconds=1.0,
        train=(last,),
        val=(last,),
    )


def tuned(study: Study, scores: dict[int, float | None], *, alpha: float = 1.0) -> dict[Trial, Run]:
    """Tuning runs of the only net; None has diverged."""
    (net,) = study.specs
    trials = {study.tuning(net, alpha, exponent): top1 for exponent, top1 in scores.items()}
    return {trial: finished(study, trial, top1=top1, outcome="diverged" if top1 is None else "finished") for trial, top1 in trials.items()}


# --- what is run -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "missing"),
    [
        ({}, [0, 1, 2]),
        ({0: 0.1, 2: 0.3}, [1]),
        ({0: 0.1, 1: 0.3, 2: 0.2}, []),
        ({0: 0.1, 1: 0.2, 2: 0.3}, [3]),
        ({0: 0.1, 1: 0.2, 2: 0.3, 3: 0.2}, []),
        ({0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4}, [4]),
        ({0: 0.3, 1: 0.2, 2: 0.1}, [-1]),
        ({0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4, 4: 0.5}, []),  # as far as it may go
        ({0: 0.2, 1: 0.3, 2: 0.3}, []),  # of equals the lower rate, which is inside
        ({0: -1.0, 1: -1.0, 2: -1.0}, [-1]),  # all diverged: lower
    ],
)
def test_a_grid_grows_while_its_best_lies_on_the_edge(scores: dict[int, float], missing: list[int]) -> None:
    assert missing_exponents([0, 1, 2], scores, widest=2) == missing


def test_a_verdict_waits_for_its_learning_rate() -> None:
    study = one_net(grid=(-1, 0, 1))
    assert {trial.stage for trial in due(study, {})} == {"tuning"}
    runs = tuned(study, {-1: 0.2, 0: 0.4, 1: 0.3})
    ready = [trial for trial in due(study, runs) if trial.stage == "verdict"]
    middle = study.specs["resnet8-none"].optimizer.lr
    assert [(trial.alpha, trial.lr, trial.seed) for trial in ready] == [(1.0, middle, 0), (1.0, middle, 1)]
    assert {trial.alpha for trial in due(study, runs) if trial.stage == "tuning"} == {0.25}


def test_a_rate_that_diverged_is_not_chosen() -> None:
    study = one_net(grid=(-1, 0, 1), widest=0)
    half = study.specs["resnet8-none"].optimizer.lr / 2
    assert chosen_lr(study, tuned(study, {-1: 0.2, 0: 0.1, 1: None}), "resnet8-none", 1.0) == half


def test_nothing_is_due_once_all_is_run() -> None:
    study = one_net()
    runs: dict[Trial, Run] = {}
    while waiting := due(study, runs):
        runs |= {trial: finished(study, trial) for trial in waiting}
    assert len(runs) == 2 * 2 + 2 * 2  # alphas x rates, alphas x seeds


def test_rates_are_not_chosen_on_the_seeds_of_the_verdict() -> None:
    for study in (full_study(), quick_study()):
        assert study.tuning_seed not in study.seeds


def test_the_specs_differ_in_normalisation_and_the_rates_to_begin_with_alone() -> None:
    study = full_study()
    batch, none = (study.specs[net].model_dump() for net in ("resnet8-batch", "resnet8-none"))
    assert (batch["model"].pop("norm"), none["model"].pop("norm")) == ("batch", "none")
    assert batch["optimizer"].pop("lr") != none["optimizer"].pop("lr")
    assert batch == none
    data = study.specs["resnet8-batch"].data
    assert data.classes * data.train_per_class // data.batch_size * batch["epochs"] == 2000  # type: ignore[union-attr]


def test_a_trial_is_its_nets_spec_at_its_own_alpha_rate_and_seed() -> None:
    study = one_net()
    spec = study.spec_of(Trial("resnet8-none", "tuning", 0.5, 0.3, 7))
    assert (spec.loss.alpha, spec.optimizer.lr, spec.seed, spec.epochs) == (0.5, 0.3, 7, study.tuning_epochs)
    assert study.spec_of(Trial("resnet8-none", "verdict", 0.5, 0.3, 7)).epochs == study.specs["resnet8-none"].epochs


# --- what is kept ----------------------------------------------------------------------------------------------------------------


def test_a_line_that_was_cut_is_done_again_and_swallows_none(tmp_path: Path) -> None:
    study = one_net()
    first, second, third = due(study, {})[:3]
    log = Log(tmp_path / "runs.jsonl", study)
    log.add(finished(study, first))
    log.add(finished(study, second, top1=None, outcome="diverged"))
    log.path.write_bytes(log.path.read_bytes()[:-20])
    log.add(finished(study, third))
    again = Log(log.path, study)
    again.load()
    assert again.runs == {trial: finished(study, trial) for trial in (first, third)}


def test_runs_of_another_spec_are_not_taken_over(tmp_path: Path) -> None:
    study = one_net()
    trial = due(study, {})[0]
    Log(tmp_path / "runs.jsonl", study).add(finished(study, trial))
    other = replace(study, tuning_epochs=study.tuning_epochs + 1, specs=study.specs)
    log = Log(tmp_path / "runs.jsonl", other)
    log.load()
    assert log.runs == {}


# --- what is made of it ----------------------------------------------------------------------------------------------------------


def test_the_interval_is_students() -> None:
    values = [0.61, 0.64, 0.60, 0.66, 0.63]
    found = estimate(values)
    assert found["low"] is not None
    assert found["high"] is not None
    expected = stats.t.interval(0.95, 4, loc=sum(values) / 5, scale=stats.sem(values))
    assert (found["low"], found["high"]) == pytest.approx(expected, rel=1e-12)


def test_one_run_has_a_mean_and_no_interval() -> None:
    assert estimate([0.5]) == {"n": 1, "mean": 0.5, "sd": None, "low": None, "high": None}
    assert estimate([math.nan])["mean"] is None


def test_a_difference_is_taken_seed_by_seed() -> None:
    """The same as a one-sample test of the differences; a pair without a partner is left out."""
    ours, theirs = [0.61, 0.64, math.nan, 0.66], [0.60, 0.62, 0.5, 0.61]
    found = difference(ours, theirs)
    expected = stats.ttest_1samp([0.01, 0.02, 0.05], 0.0)
    assert found["n"] == 3
    assert found["p"] == pytest.approx(float(expected.pvalue), rel=1e-9)
    assert (found["low"], found["high"]) == pytest.approx(tuple(expected.confidence_interval(0.95)), rel=1e-9)


def test_equal_runs_have_no_p_value() -> None:
    assert difference([0.5, 0.5], [0.5, 0.5])["p"] is None


def test_training_accuracy_is_the_mean_over_the_images_of_the_last_epoch() -> None:
    points: tuple[Point, ...] = tuple(
        {"step": step, "top1": top1, "loss": 1.0} for step, top1 in [(4, 0.9), (6, 0.8), (10, 0.3), (12, 0.6)]
    )
    run = replace(finished(one_net(), due(one_net(), {})[0]), train=points)
    assert run.train_top1 == pytest.approx((4 * 0.3 + 2 * 0.6) / 6)


def test_a_run_that_guesses_has_collapsed() -> None:
    study = one_net()
    trial = due(study, {})[0]
    assert finished(study, trial, top1=0.1).collapsed
    assert not finished(study, trial, top1=0.5).collapsed
    assert not finished(study, trial, top1=None, outcome="diverged").collapsed


def test_the_same_figures_give_the_same_picture(tmp_path: Path) -> None:
    curves: list[evidence_figure.Curve] = [
        {"net": net, "alpha": alpha, "steps": [6, 12], "mean": [0.2, 0.5], "low": [0.1, 0.4], "high": [0.3, 0.6]}
        for net in ("with", "without")
        for alpha in (1.0, 0.5)
    ]
    effects: list[evidence_figure.Effect] = [
        {"net": net, "alpha": 0.5, "split": "val", "mean": 0.01, "low": -0.01, "high": 0.03} for net in ("with", "without")
    ]
    for name in ("one.svg", "two.svg"):
        evidence_figure.save(tmp_path / name, curves=curves, effects=effects)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    text = " ".join(ET.parse(tmp_path / "one.svg").getroot().itertext())
    assert "α = 0.5" in text
    assert "without, α = 0.5, val" in text


@pytest.mark.timeout(SECONDS)
def test_a_study_that_was_cut_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    def study() -> dict[str, Any]:
        command = [sys.executable, "-m", "benchmarks.evidence", "--quick", "--json", "--out", str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS - 10, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    whole = study()
    log = tmp_path / "runs.jsonl"
    assert len(log.read_text().splitlines()) == 2 * 2 * (2 + 2)  # nets x alphas x (rates + seeds)
    assert (whole["benchmark"], len(whole["arms"])) == ("evidence", 4)
    assert [arm["val_top1"]["n"] for arm in whole["arms"]] == [2] * 4
    assert whole["arms"][1]["val_top1_difference"]["mean"] == pytest.approx(
        whole["arms"][1]["val_top1"]["mean"] - whole["arms"][0]["val_top1"]["mean"]
    )
    assert table(whole).count("resnet8-none") >= 2  # type: ignore[arg-type]

    log.write_text(log.read_text()[:-50])
    again = study()
    assert again["arms"] == whole["arms"]  # the run that was cut is repeated bit for bit
    assert again["curves"] == whole["curves"]
    assert ET.parse(tmp_path / "evidence.svg").getroot().tag.endswith("svg")
    assert evidence.FIGURE.name == "evidence.svg"
