"""The sentence follows from the numbers, and says no more than they do."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powergrad.experiments.findings import SIGNIFICANCE, Direction, Evidence, TuningEvidence
from powergrad.experiments.labels import labels
from powergrad.experiments.statistics import analyse
from tests.experiments.builders import evidence, run

BASE = [0.900, 0.905, 0.895, 0.910, 0.890]
BETTER = [0.012, 0.018, 0.010, 0.016, 0.014]
UNCLEAR = [0.004, -0.004, 0.002, -0.002, 0.003]
LITTLE = [0.003, -0.003, 0.002, -0.002, 0.000]


def plus(differences: list[float], sign: float = 1.0) -> list[float]:
    return [round(base + sign * d, 6) for base, d in zip(BASE, differences, strict=True)]


def said(*scores: Any, **options: Any) -> str:
    return analyse(evidence(*scores, **options), resamples=0)["verdict"]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([BASE, plus(BETTER)], "α = 0.5 is better than α = 1 by 1.4 points (95 % CI 1.0 to 1.8, 5 seeds, p < 0.001)"),
        ([BASE, plus(BETTER, -1)], "α = 0.5 is worse than α = 1 by 1.4 points (95 % CI 1.0 to 1.8, 5 seeds, p < 0.001)"),
        (
            [BASE, plus(LITTLE)],
            "No clear difference between α = 0.5 and α = 1: up to 0.3 points either way cannot be excluded (95 % CI, 5 seeds, p = 1.00)",
        ),
        (
            [BASE, plus([0.012, -0.004, 0.01, 0.002, 0.004])],
            ("No clear difference between α = 0.5 and α = 1: from 0.3 points worse to 1.3 points better cannot be excluded "
            "(95 % CI, 5 seeds, p = 0.17); 12 more seeds would probably settle it if the difference is as seen"),
        ),
        ([BASE, BASE], "α = 0.5 and α = 1 are identical: the same val_top1 on each of 5 seeds"),
        ([BASE[:1], plus(BETTER)[:1]], "One seed says nothing about chance: on it, against α = 1, α = 0.5 was 1.2 points better"),
        ([BASE[:1], BASE[:1], [0.8]], "One seed says nothing about chance: on it, against α = 1, α = 0.5 was no different and α = 0.25 was 10.0 points worse"),
        ([[0.9, None], [None, 0.9]], "Nothing can be compared: no seed was finished by both α = 1 and α = 0.5"),
        ([[None], [None]], "Nothing can be said: no run ended with a finite val_top1 (2 failed)"),
        ([BASE], "One arm, nothing to compare it with: val_top1 90.00 % (95 % CI 89.02 to 90.98, 5 seeds)"),
        (
            [[0.5] * 4, [0.6] * 4],
            "No clear difference between α = 0.5 and α = 1: 4 seeds with the same difference are too few to exclude chance (p = 0.12)",
        ),
        ([[0.5] * 7, [0.6] * 7], "α = 0.5 is better than α = 1 by exactly 10.0 points on each of 7 seeds (p = 0.016, by the signs alone)"),
        (
            [BASE, [*plus(BETTER)[:4], None]],
            "α = 0.5 is better than α = 1 by 1.4 points (95 % CI 0.8 to 2.0, 4 of 5 seeds, p = 0.005)",
        ),
        (
            [BASE, plus(BETTER), plus(BETTER, -1), plus(UNCLEAR)],
            ("Better than α = 1: α = 0.5 by 1.4 points (95 % CI 1.0 to 1.8, 5 seeds, Holm p = 0.002); "
            "worse than α = 1: α = 0.25 by 1.4 points (95 % CI 1.0 to 1.8, 5 seeds, Holm p = 0.002); "
            "no clear difference to α = 1: α = 0.05 (0.4 points worse to 0.5 points better, about 255 more seeds to tell)"),
        ),
        (
            [BASE, plus(BETTER, -1), plus(BETTER, -2)],
            ("α = 1, the baseline, is best; worse than it: α = 0.25 by 2.8 points (95 % CI 2.0 to 3.6, 5 seeds, Holm p = 0.001) and "
            "α = 0.5 by 1.4 points (95 % CI 1.0 to 1.8, 5 seeds, Holm p = 0.001)"),
        ),
    ],
)  # fmt: skip
def test_the_sentence(scores: list[Any], expected: str) -> None:
    assert said(*scores) == expected


def test_what_is_lower_is_better_for_a_loss_and_counted_in_nats() -> None:
    assert (
        said(BASE, plus(BETTER, -1), metric="val_loss", direction="min")
        == "α = 0.5 is better than α = 1 by 0.014 nats (95 % CI 0.010 to 0.018, 5 seeds, p < 0.001)"
    )


def test_a_lower_loss_is_the_better_side_of_what_is_open_and_of_a_single_seed() -> None:
    lower = plus([0.012, -0.004, 0.01, 0.002, 0.004], -1)
    assert "from 0.003 nats worse to 0.013 nats better cannot be excluded" in said(BASE, lower, metric="val_loss", direction="min")
    assert said([0.5], [0.4], metric="val_loss", direction="min").endswith("α = 0.5 was 0.1 nats better")


def test_nothing_finished_yet() -> None:
    assert said([0], [0], runs=[run(0, 0, None, state="running"), run(1, 0, None, state="queued")]) == "No run has finished yet"


def test_while_runs_are_open_it_is_said_so() -> None:
    runs = [
        run(arm, seed, value, state="running" if seed == 4 else None)
        for arm, row in enumerate((BASE, plus(BETTER)))
        for seed, value in enumerate(row)
    ]
    verdict = said(BASE, BASE, runs=runs)
    assert verdict.startswith("So far (8 of 10 runs): α = 0.5 is better than α = 1 by 1.4 points (")
    assert "4 of 5 seeds" in verdict


def test_a_search_names_the_best_and_what_that_is_worth() -> None:
    verdict = said([0.8], [0.9], [0.7], strategy="random", baseline=None)
    assert verdict.startswith("α = 0.5 scored best of 3 settings, val_top1 90.00 % (1 seed); the same runs chose it and measured it")


def test_of_many_arms_a_few_are_named_and_the_others_counted() -> None:
    verdict = said(BASE, *[plus(BETTER, 1 + i / 10) for i in range(12)])
    assert verdict.count(" by ") == 3
    assert verdict.endswith(" and 9 more")


def test_a_bound_just_off_zero_is_not_shown_as_zero() -> None:
    """0.0 to 2.0 points would contradict the claim."""
    assert "better than α = 1 by 1.00 points (95 % CI 0.02 to 1.98, " in said(BASE, plus([0.00002, 0.02002, 0.01502, 0.00502, 0.01002]))


@given(
    rows=st.lists(st.lists(st.sampled_from([-0.02, -0.01, 0.0, 0.005, 0.01, 0.011, 0.02]), min_size=1, max_size=7), min_size=1, max_size=4),
    shift=st.sampled_from([-0.03, 0.0, 0.02]),
    direction=st.sampled_from(["max", "min"]),
)
@settings(max_examples=200, deadline=None)
def test_better_is_claimed_only_with_an_interval_beyond_0_and_a_small_p(
    rows: list[list[float]], shift: float, direction: Direction
) -> None:
    n = max(len(row) for row in rows)
    base = [0.9] * n
    found = analyse(evidence(base, *[[0.9 + shift + x for x in row] for row in rows], direction=direction), resamples=0)
    sign = 1 if direction == "max" else -1
    settled = {"better": 0, "worse": 0}
    for arm in found["arms"]:
        change = arm["difference"]
        if change is None or change["conclusion"] not in settled:
            continue
        settled[change["conclusion"]] += 1
        side = sign if change["conclusion"] == "better" else -sign
        assert change["low"] is not None
        assert change["high"] is not None
        assert min(side * change["low"], side * change["high"]) > 0
        assert (change["p_t_holm"] or 0) < SIGNIFICANCE
    claims = {"better": r"is better than|[Bb]etter than α = \S+:", "worse": r"is worse than|[Ww]orse than (it|α = \S+):"}
    for conclusion, pattern in claims.items():
        assert bool(re.search(pattern, found["verdict"])) == bool(settled[conclusion]), found["verdict"]


def warned(some: Evidence) -> str:
    return "\n".join(analyse(some, resamples=0)["warnings"])


def test_lost_runs_are_named_with_arm_seed_and_reason() -> None:
    runs = [run(0, s, 0.9 + s / 100) for s in range(5)] + [
        run(1, s, 0.9, state="failed" if s in {1, 3} else None, reason="out_of_memory_gpu" if s in {1, 3} else None) for s in range(5)
    ]
    runs[-1] = run(1, 4, None, state="succeeded")
    assert "α = 0.5 lacks results: out of memory gpu on seeds 1 and 3; no finite val_top1 on seed 4." in warned(
        evidence(BASE, BASE, runs=runs)
    )
    assert "only on the seeds that it survived, which flatters it" in warned(evidence(BASE, BASE, runs=runs))


def test_a_failed_baseline_flatters_the_baseline() -> None:
    assert "flatters the baseline" in warned(evidence([0.9, None, 0.8], [0.9, 0.7, 0.8]))


def test_a_run_that_succeeded_when_it_was_made_again_is_not_lost() -> None:
    runs = [run(0, 0, 0.9), run(1, 0, None), run(1, 0, 0.8)]
    assert "lacks" not in warned(evidence([0], [0], runs=runs))


def test_a_search_that_drops_a_run_has_not_lost_it() -> None:
    runs = [run(0, 0, 0.9), run(1, 0, 0.8, state="cancelled")]
    assert "gave no result" not in warned(evidence([0], [0], runs=runs, strategy="asha", baseline=None))
    assert "No p-values" in warned(evidence([0], [0], runs=runs, strategy="asha", baseline=None))


def test_the_lost_settings_of_a_search_are_told_together_with_the_first_jobs() -> None:
    runs = [
        run(0, 0, 0.9),
        *(run(arm, 0, None, state="failed", reason="diverged") for arm in range(1, 7)),
        run(7, 0, None, state="succeeded"),
    ]
    told = [
        one
        for one in analyse(evidence(*[[0]] * 8, runs=runs, strategy="random", baseline=None), resamples=0)["warnings"]
        if "no result" in one
    ]
    jobs = [one["job"] for one in runs]
    (found,) = told
    assert found == (
        f"7 of 8 settings gave no result: 6 diverged ({jobs[1]}, {jobs[2]}, {jobs[3]} and 3 more); 1 no finite val_top1 ({jobs[7]}). "
        "Nothing can be said of them."
    )


def test_a_label_at_the_head_of_a_sentence_stays_as_it_is() -> None:
    assert said(BASE, plus(BETTER)).startswith("α = 0.5 is better")
    assert said([BASE[0], None], [None, BASE[0]]).startswith("Nothing can be compared")


def test_a_shared_learning_rate_is_warned_of() -> None:
    some = evidence(BASE, plus(BETTER))
    assert "larger gradients" not in warned(some)
    some["shared"] = ["optimizer.lr"]
    assert "untuned learning rate: a shared learning rate favours the arm with the larger gradients" in warned(some)


def test_a_choice_at_the_edge_of_what_was_tried_is_warned_of() -> None:
    some = evidence(BASE, plus(BETTER))
    some["tuning"] = [TuningEvidence(arm=1, seeds=[9], rungs=[], chosen={"optimizer.lr": 0.4}, at_edge=["optimizer.lr"])]
    assert "α = 0.5: the learning rate that tuning chose, 0.4, is the lowest or the highest that was tried" in warned(some)


@pytest.mark.parametrize(("n", "floor"), [(2, "0.5"), (4, "0.125"), (5, "0.0625"), (6, None)])
def test_below_six_seeds_wilcoxon_cannot_tell(n: int, floor: str | None) -> None:
    draw = np.random.default_rng(n)
    warnings = warned(evidence(draw.normal(size=n).tolist(), draw.normal(size=n).tolist()))
    assert (f"With {n} seeds Wilcoxon's p cannot go below {floor}" in warnings) == (floor is not None)


def test_losses_of_different_alphas_are_not_compared() -> None:
    assert "Do not compare losses of different α" in warned(evidence(BASE, plus(BETTER)))
    assert "losses" not in warned(evidence(BASE, plus(BETTER), settings=[{"optimizer.lr": 0.1}, {"optimizer.lr": 0.2}]))


def test_the_same_difference_on_every_seed_is_explained() -> None:
    assert "moves in steps too coarse to show chance" in warned(evidence([0.5] * 4, [0.6] * 4))


def test_an_early_look_is_warned_of() -> None:
    runs = [run(arm, seed, 0.9 + seed * arm / 100, state="running" if seed == 2 else None) for arm in range(2) for seed in range(3)]
    assert "Runs are still to come" in warned(evidence([0] * 3, [0] * 3, runs=runs))


def test_an_interval_beyond_zero_that_holm_does_not_uphold_is_no_claim() -> None:
    row = [0.7, 0.72, 0.71, 0.73, 0.7]
    ends = [0.004, 0.011, 0.002, 0.013, 0.009]
    several = evidence(row, *[[a + sign * b for a, b in zip(row, ends, strict=True)] for sign in (1, 1.01, 0.99, 1.02)])
    found = analyse(several, resamples=0)
    assert {arm["difference"]["conclusion"] for arm in found["arms"] if arm["difference"]} == {"open"}
    assert "if it were the only arm, Holm p = 0.0" in found["verdict"]


def test_seeds_that_were_added_after_a_look_are_warned_of() -> None:
    asked = evidence([0.5, 0.6, 0.7], [0.6, 0.6, 0.8])
    assert "Seeds were added" not in warned({**asked, "question": {"seeds": 3}})
    assert "Seeds were added to the 2 that were asked for" in warned({**asked, "question": {"seeds": 2}})


def test_the_sentence_uses_the_arms_labels() -> None:
    some = evidence(BASE, plus(BETTER), settings=[{"clip": None}, {"clip": {"mode": "agc", "value": 0.01}}])
    assert labels(some["arms"], some["spec"]) == ["no clip", "clip agc"]
    assert analyse(some, resamples=0)["verdict"].startswith("clip agc is better than no clip by 1.4 points")
