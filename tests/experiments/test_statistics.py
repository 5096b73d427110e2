"""The numbers are those of independent computations: published examples, enumeration, integration, closed testing."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Sequence
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats  # type: ignore[import-untyped]

from powergrad.experiments.findings import Direction, Evidence, Findings, Strategy, TuningEvidence
from powergrad.experiments.statistics import RESAMPLES, analyse, detectable, holm, power, seeds_needed, wilcoxon
from tests.experiments.builders import difference, evidence, of, run

# Student's sleep data (Biometrika 6, 1908), R's data set `sleep`
FIRST_DRUG = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SECOND_DRUG = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def test_t_is_that_of_r_on_students_sleep_data() -> None:
    """t.test(extra ~ group, data = sleep, paired = TRUE) prints p-value = 0.002833 and the interval -2.4598858 -0.7001142."""
    found = difference(analyse(evidence(SECOND_DRUG, FIRST_DRUG, metric="hours")))
    assert found["mean"] == pytest.approx(-1.58)
    assert found["p_t"] == pytest.approx(0.002833, abs=5e-7)
    assert [found["low"], found["high"]] == pytest.approx([-2.4598858, -0.7001142], abs=5e-8)


def test_wilcoxon_is_that_of_r_on_hollander_and_wolfes_depression_data() -> None:
    """R's example(wilcox.test): V = 40, one-sided p-value = 0.01953."""
    before = [1.83, 0.50, 1.62, 2.48, 1.68, 1.88, 1.55, 3.06, 1.30]
    after = [0.878, 0.647, 0.598, 2.05, 1.06, 1.29, 1.06, 3.14, 1.29]
    assert difference(analyse(evidence(after, before)))["p_wilcoxon"] == pytest.approx(2 * 0.01953, abs=1e-5)


@given(st.lists(st.integers(-4, 4), min_size=2, max_size=8))
@settings(max_examples=60, deadline=None)
def test_wilcoxon_with_ties_and_zeros_is_what_all_signs_enumerate(steps: list[int]) -> None:
    left = np.array([step for step in steps if step])
    ranks = stats.rankdata(np.abs(left))
    seen = ranks[left > 0].sum()
    sums = [sum(rank for rank, up in zip(ranks, signs, strict=True) if up) for signs in itertools.product([False, True], repeat=len(left))]
    either = min(np.mean([total <= seen for total in sums]), np.mean([total >= seen for total in sums]))
    assert wilcoxon(np.array(steps, dtype=float)) == pytest.approx(min(1.0, 2 * either))


def test_wilcoxon_with_ties_is_scipys_permutation_test() -> None:
    tied = np.array([3, 1, -1, 2, 2, -1, 4, 0.0])
    assert wilcoxon(tied) == pytest.approx(stats.wilcoxon(tied, method=stats.PermutationMethod()).pvalue)


def test_differences_that_only_rounding_tells_apart_are_ties() -> None:
    """0.3 - 0.2 and 0.2 - 0.1 differ in the last bit: ranked, they would give another p."""
    rounded, exact = evidence([0.2, 0.1, 0.5, 0.4], [0.3, 0.2, 0.4, 0.7]), evidence([20, 10, 50, 40], [30, 20, 40, 70])
    assert 0.3 - 0.2 != 0.2 - 0.1
    assert difference(analyse(rounded))["p_wilcoxon"] == difference(analyse(exact))["p_wilcoxon"]


def test_holm_is_that_of_a_worked_example() -> None:
    """The example in the documentation of pingouin.multicomp."""
    assert holm([0.50, 0.003, 0.32, 0.054, 0.0003]) == [pytest.approx(p) for p in (0.64, 0.012, 0.64, 0.162, 0.0015)]


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_holm_is_the_closed_test_of_bonferroni(p: list[float]) -> None:
    """A hypothesis falls when every intersection that holds it does (Marcus, Peritz and Gabriel, Biometrika 63, 1976)."""
    for index, adjusted in enumerate(holm(p)):
        others = [i for i in range(len(p)) if i != index]
        families = [(index, *rest) for size in range(len(p)) for rest in itertools.combinations(others, size)]
        assert adjusted == pytest.approx(max(min(1.0, len(family) * min(p[i] for i in family)) for family in families))


def test_a_comparison_that_is_still_to_come_counts_in_holms_family() -> None:
    assert holm([0.01, None, None]) == [pytest.approx(0.03), None, None]


@pytest.mark.parametrize(
    ("effect", "n", "level"), [(0.7, 10, 0.05), (1.5, 5, 0.05), (0.1, 300, 0.01), (3.0, 3, 0.0125), (12.0, 2, 0.05), (0.0, 6, 0.05)]
)
def test_power_is_the_integral_over_the_sds_that_chance_gives(effect: float, n: int, level: float) -> None:
    """Given sd = u, t exceeds its bound with a normal's probability; u² (n-1) is chi-squared."""
    bound, shift = stats.t.isf(level / 2, n - 1), effect * math.sqrt(n)

    def found_given(u: float) -> float:
        exceeds = stats.norm.cdf(shift - bound * u) + stats.norm.cdf(-shift - bound * u)
        return float(exceeds * stats.chi2.pdf((n - 1) * u * u, n - 1) * 2 * (n - 1) * u)

    expected, _ = integrate.quad(found_given, 0, 12, limit=400, points=[0.1, 0.5, 1.0, 2.0])
    assert power(effect, n, level) == pytest.approx(expected, abs=1e-6)


def test_power_is_that_of_r() -> None:
    """power.t.test(delta=10, sd=10*sqrt(2), power=0.85, type="paired") gives n = 19.96892 (Dalgaard, Introductory Statistics with R, 8.3)."""
    assert power(1 / math.sqrt(2), 19, 0.05) < 0.85 < power(1 / math.sqrt(2), 20, 0.05)


@pytest.mark.parametrize("n", [2, 3, 5, 10, 100])
@pytest.mark.parametrize("level", [0.05, 0.05 / 49])
def test_the_detectable_difference_is_found_with_power(n: int, level: float) -> None:
    assert power(detectable(n, level), n, level) == pytest.approx(0.8, abs=1e-6)
    assert seeds_needed(detectable(n, level) * 1.0001, level) == n


def test_a_difference_that_needs_too_many_seeds_has_no_number() -> None:
    assert seeds_needed(0.01) is None


def test_more_seeds_are_those_that_would_find_the_difference_seen() -> None:
    found = difference(analyse(evidence([0.90, 0.91, 0.92, 0.90, 0.91], [0.91, 0.92, 0.91, 0.92, 0.93])))
    assert found["conclusion"] == "open"
    assert found["mean"] is not None
    assert found["sd"] is not None
    assert found["more_seeds"] is not None
    total = 5 + found["more_seeds"]
    assert power(found["mean"] / found["sd"], total - 1, 0.05) < 0.8 <= power(found["mean"] / found["sd"], total, 0.05)


def test_among_several_arms_more_seeds_reckon_with_holm() -> None:
    """Three further arms that show nothing make the first one's level 0.05 / 4."""
    first, nothing = [0.02, 0.01, 0.03, -0.01], [0.01, -0.01, 0.02, -0.02]
    base = [0.9] * 4
    alone = difference(analyse(evidence(base, [0.9 + x for x in first])))
    among = difference(analyse(evidence(base, [0.9 + x for x in first], *[[0.9 + x for x in nothing]] * 3)))
    mean, sd = np.mean(first), np.std(first, ddof=1)
    assert alone["more_seeds"] == seeds_needed(float(mean / sd), 0.05, most=10_000) - 4  # type: ignore[operator]
    assert among["more_seeds"] == seeds_needed(float(mean / sd), 0.05 / 4, most=10_000) - 4  # type: ignore[operator]
    assert among["detectable"] == pytest.approx(detectable(4, 0.05 / 4) * sd)


def test_hedges_correction_is_the_exact_one() -> None:
    """J(2) = 1/√π; at ten degrees of freedom Hedges' approximation 1 - 3 / (4 df - 1) holds to three digits."""
    few, many = [0.1, 0.2, 0.4], [0.1, 0.3, 0.2, 0.5, 0.1, 0.3, 0.3, 0.4, 0.2, 0.1, 0.6]
    for values, correction in ((few, 1 / math.sqrt(math.pi)), (many, pytest.approx(1 - 3 / 39, abs=1e-3))):
        found = difference(analyse(evidence([0.0] * len(values), values)))
        assert found["effect_size"] is not None
        assert found["effect_size"] / (np.mean(values) / np.std(values, ddof=1)) == pytest.approx(correction)


def test_the_bootstrap_is_what_all_resamples_enumerate() -> None:
    """BCa after Efron (JASA 82, 1987) from all 5^5 resamples; ours draws some of them, so its ends may lie at levels that are off by as much
    as 4 standard deviations of a share of RESAMPLES draws."""
    values = np.array([0.02, 0.05, 0.01, 0.11, 0.04])
    means = np.sort(np.array(list(itertools.product(values, repeat=5))).mean(axis=1))
    below = (np.mean(means < values.mean() - 1e-12) + np.mean(means <= values.mean() + 1e-12)) / 2
    left_out = np.array([np.delete(values, i).mean() for i in range(5)])
    skew = ((left_out.mean() - left_out) ** 3).sum() / (6 * ((left_out.mean() - left_out) ** 2).sum() ** 1.5)
    bias = stats.norm.ppf(below)
    found = difference(analyse(evidence([0.0] * 5, values.tolist())))
    for end, tail in ((found["boot_low"], 0.025), (found["boot_high"], 0.975)):
        z = bias + stats.norm.ppf(tail)
        level = stats.norm.cdf(bias + z / (1 - skew * z))
        off = 4 * math.sqrt(level * (1 - level) / RESAMPLES) + 4 * 0.5 / math.sqrt(RESAMPLES) * 0.2  # the bias is estimated too
        assert np.quantile(means, max(0, level - off)) - 1e-9 <= end <= np.quantile(means, min(1, level + off)) + 1e-9


def test_equal_evidence_gives_equal_bytes() -> None:
    one = evidence([0.9, 0.91, 0.93], [0.92, 0.92, 0.91])
    assert json.dumps(analyse(one)) == json.dumps(analyse(json.loads(json.dumps(one))))


def test_an_arms_intervals_do_not_depend_on_its_neighbours() -> None:
    base, arm = [0.9, 0.91, 0.93, 0.9], [0.92, 0.92, 0.91, 0.95]
    alone, among = difference(analyse(evidence(base, arm))), difference(analyse(evidence(base, arm, [0.5, 0.7, 0.1, 0.2])))
    assert [alone[end] for end in ("low", "high", "boot_low", "boot_high")] == [
        among[end] for end in ("low", "high", "boot_low", "boot_high")
    ]


def test_identical_arms_have_finite_numbers_and_no_winner() -> None:
    found = analyse(evidence([0.9, 0.8, 0.7], [0.9, 0.8, 0.7]))
    assert difference(found) == {
        "n": 3, "mean": 0.0, "sd": 0.0, "low": 0.0, "high": 0.0, "boot_low": 0.0, "boot_high": 0.0, "p_t": 1.0, "p_wilcoxon": 1.0, "p_t_holm": 1.0,
        "p_wilcoxon_holm": 1.0, "effect_size": 0.0, "detectable": None, "more_seeds": 0, "conclusion": "identical",
    }  # fmt: skip
    assert found["best"] is None


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_same_difference_on_up_to_five_seeds_settles_nothing(n: int) -> None:
    """An accuracy of a few images moves in steps: t would divide by 0 and give p = 0."""
    found = difference(analyse(evidence([0.1 * i for i in range(n)], [0.1 * i + 0.1 for i in range(n)])))
    assert (found["conclusion"], found["p_t"], found["p_wilcoxon"]) == ("open", 2 / 2**n, 2 / 2**n)
    assert (found["sd"], found["low"], found["high"], found["boot_low"], found["effect_size"]) == (0.0, None, None, None, None)


def test_the_same_difference_on_six_seeds_is_told_by_its_signs() -> None:
    found = difference(analyse(evidence([0.5] * 6, [0.75] * 6)))
    assert (found["conclusion"], found["p_t"], found["low"], found["high"]) == ("better", 2 / 2**6, 0.25, 0.25)


def test_one_seed_gives_means_only() -> None:
    found = difference(analyse(evidence([0.9], [0.95])))
    assert (found["n"], found["conclusion"]) == (1, "too_few")
    assert found["mean"] == pytest.approx(0.05)
    assert {found["sd"], found["low"], found["boot_low"], found["p_t"], found["p_wilcoxon"], found["effect_size"], found["more_seeds"]} == {
        None
    }


def test_two_seeds_give_students_wide_interval() -> None:
    """One degree of freedom: tan(0.475 π) = 12.706 standard errors."""
    found = difference(analyse(evidence([0.9, 0.9], [0.92, 0.93])))
    assert found["high"] == pytest.approx(0.025 + math.tan(0.475 * math.pi) * 0.005)


def test_a_lower_loss_is_better() -> None:
    losses = evidence([0.50, 0.52, 0.51, 0.53], [0.40, 0.41, 0.42, 0.41], metric="val_loss", direction="min")
    found = analyse(losses)
    assert (difference(found)["conclusion"], found["best"]) == ("better", 1)
    assert difference(analyse(losses | {"direction": "max"}))["conclusion"] == "worse"


def test_arms_are_compared_on_the_seeds_both_finished() -> None:
    found = analyse(evidence([0.9, None, 0.8, 0.7], [0.95, 0.99, None, 0.72]))
    assert difference(found)["n"] == 2
    assert difference(found)["mean"] == pytest.approx(0.035)
    assert (found["finished"], found["planned"], of(found, 1)["counts"]) == (6, 8, {"failed": 1, "succeeded": 3})


def test_a_run_without_a_finite_metric_does_not_count() -> None:
    runs = [run(0, 0, 0.9), run(1, 0, None, state="succeeded"), run(1, 1, math.nan, state="succeeded"), run(0, 1, 0.8, state="running")]
    assert analyse(evidence([0, 0], [0, 0], runs=runs))["finished"] == 1


def test_every_final_metric_is_estimated_and_the_gap() -> None:
    runs = [run(0, seed, 0.8, final={"train_top1": 0.9 + seed / 100, "val_loss": None if seed else 0.4}) for seed in range(2)]
    metrics = of(analyse(evidence([0, 0], runs=runs)), 0)["metrics"]
    assert set(metrics) == {"val_top1", "train_top1", "val_loss", "gap"}
    assert metrics["val_loss"]["n"] == 1
    assert metrics["gap"]["mean"] == pytest.approx(0.105)


def test_convergence_is_the_first_evaluation_at_the_baselines_final_score_of_the_seed() -> None:
    runs = [
        run(0, 0, 0.8, curve=[0.5, 0.7, 0.75, 0.8]),
        run(0, 1, 0.6, curve=[0.6, 0.5, 0.6, 0.6]),
        run(1, 0, 0.9, curve=[0.7, 0.8, None, 0.9]),
        run(1, 1, 0.5, curve=[0.3, 0.4, 0.5, 0.5]),
    ]
    found = analyse(evidence([0, 0], [0, 0], runs=runs))
    own, arm = of(found, 0)["convergence"], of(found, 1)["convergence"]
    assert own is not None
    assert arm is not None
    assert (own["reached"], own["epochs"]["mean"]) == (2, 2.5)
    assert own["target"] == pytest.approx(0.7)
    assert (arm["reached"], arm["of"], arm["epochs"]["mean"], arm["seconds"]["mean"], arm["joules"]["mean"]) == (1, 2, 2.0, 20.0, 200.0)


def test_a_score_between_two_evaluations_is_not_reached_in_between() -> None:
    runs = [run(0, 0, 0.5, curve=[0.4, 0.5]), run(1, 0, 0.9, curve=[0.1, 0.9])]
    convergence = of(analyse(evidence([0], [0], runs=runs)), 1)["convergence"]
    assert convergence is not None
    assert convergence["epochs"]["mean"] == 2.0


def test_a_loss_converges_downwards() -> None:
    runs = [run(0, 0, 0.5, metric="val_loss", curve=[0.9, 0.5]), run(1, 0, 0.1, metric="val_loss", curve=[0.6, 0.5, 0.1])]
    convergence = of(analyse(evidence([0], [0], runs=runs, metric="val_loss", direction="min")), 1)["convergence"]
    assert convergence is not None
    assert convergence["epochs"]["mean"] == 2.0


def test_a_curve_covers_the_epochs_that_all_runs_evaluated() -> None:
    runs = [run(0, 0, 0.6, curve=[0.2, 0.4, 0.6]), run(0, 1, 0.8, curve=[0.4, None, 0.8]), run(0, 2, None, curve=[0.1])]
    curve = of(analyse(evidence([0, 0, 0], runs=runs)), 0)["curve"]
    assert (curve["epochs"], curve["low"], curve["high"]) == ([1.0, 3.0], [0.2, 0.6], [0.4, 0.8])
    assert curve["mean"] == [pytest.approx(0.3), pytest.approx(0.7)]


def test_the_best_arm_is_one_of_those_with_the_most_runs() -> None:
    """α = 0.5 looks best only because its bad seed failed."""
    assert analyse(evidence([0.9, 0.7, 0.8], [0.95, None, 0.9]))["best"] == 0
    assert analyse(evidence([0.9, 0.7], [0.7, 0.9]))["best"] is None
    assert analyse(evidence([None], [None]))["best"] is None


def test_a_search_has_a_best_arm_but_no_comparison() -> None:
    found = analyse(evidence([0.7], [0.9], [0.8], strategy="random", baseline=None))
    assert (found["best"], [arm["difference"] for arm in found["arms"]], [arm["convergence"] for arm in found["arms"]]) == (
        1,
        [None] * 3,
        [None] * 3,
    )


def test_asha_names_the_best_of_those_that_went_to_the_end() -> None:
    runs = [run(0, 0, 0.7, curve=[0.5, 0.6, 0.7]), run(1, 0, 0.9, curve=[0.9]), run(2, 0, 0.8, curve=[0.5, 0.7, 0.8], state="cancelled")]
    found = analyse(evidence([0], [0], [0], runs=runs, strategy="asha", baseline=None))
    assert (found["best"], of(found, 2)["counts"]) == (0, {"cancelled": 1})


def test_fifty_arms_of_ten_seeds_take_less_than_a_second() -> None:
    """Of the processor's time. Scores of 360 images tie often, which is Wilcoxon's slow case."""
    draw = np.random.default_rng(0)
    shares = np.round(draw.normal(0.9, 0.01, size=(50, 10)) * 360) / 360
    runs = [
        run(
            arm,
            seed,
            float(value),
            curve=[float(value) * i / 20 for i in range(1, 21)],
            final={f"metric{i}": float(value) / i for i in range(1, 9)},
        )
        for (arm, seed), value in np.ndenumerate(shares)
    ]
    big = evidence(*shares.tolist(), runs=runs)
    analyse(evidence([0.1, 0.2], [0.2, 0.1]))  # what scipy makes ready once
    started = time.process_time()
    analyse(big)
    assert time.process_time() - started < 1


NUMBERS = st.none() | st.floats(allow_nan=True, allow_infinity=True) | st.sampled_from([0.0, 0.5, 0.9, 0.9, 1e308, -1e308, 1e-300])
STATES = st.sampled_from(["queued", "running", "succeeded", "succeeded", "succeeded", "failed", "cancelled", "paused"])


@st.composite
def evidences(draw: st.DrawFn) -> Evidence:
    """Any well-formed evidence: none or many arms and seeds, failed and missing runs, values that no training gives."""
    arms, seeds = draw(st.integers(1, 4)), draw(st.integers(0, 4))
    strategy: Strategy = draw(st.sampled_from(["grid", "random", "asha"]))
    metric = draw(st.sampled_from(["val_top1", "val_loss"]))
    direction: Direction = draw(st.sampled_from(["max", "min"]))
    finite = st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([0.5, 0.5, 0.9, 1.7e308, -1.7e308, 5e-324])
    runs = [
        run(
            arm, seed, draw(finite if draw(st.booleans()) else NUMBERS), metric=metric, state=draw(STATES),
            curve=draw(st.lists(st.none() | finite, max_size=3)), final={"train_top1": draw(NUMBERS)},
        )
        for arm in range(arms) for seed in range(seeds) if draw(st.integers(0, 9))
    ]  # fmt: skip
    found = evidence(
        *[[0.0] * seeds] * arms,
        runs=runs,
        metric=metric,
        direction=direction,
        strategy=strategy,
        baseline=draw(st.integers(0, arms - 1)) if strategy == "grid" else None,
    )
    chosen = draw(st.sampled_from([None, {"optimizer.lr": 0.1}]))
    found["tuning"] = [TuningEvidence(arm=0, seeds=[0], rungs=[], chosen=chosen, at_edge=["optimizer.lr"])] if draw(st.booleans()) else []
    found["shared"] = draw(st.sampled_from([[], ["optimizer.lr"], ["optimizer.weight_decay"]]))
    return found


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is what a type says, TypedDicts and all."""
    if is_typeddict(hint):
        fields = get_type_hints(hint)
        return isinstance(value, dict) and value.keys() == fields.keys() and all(fits(value[name], fields[name]) for name in fields)
    if get_origin(hint) in {Union, UnionType}:
        return any(fits(value, one) for one in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(fits(one, get_args(hint)[0]) for one in value)
    if get_origin(hint) is dict:
        return isinstance(value, dict) and all(fits(key, get_args(hint)[0]) and fits(one, get_args(hint)[1]) for key, one in value.items())
    return hint is Any or type(value) is hint


@given(evidences())
@settings(max_examples=150, deadline=None)
def test_any_evidence_gives_finite_findings_of_the_promised_shape(some: Evidence) -> None:
    found = analyse(some, resamples=99)
    json.dumps(found, allow_nan=False)
    assert fits(found, Findings)
    assert found["verdict"]
    _p_values_are_never_0(found)


def _p_values_are_never_0(found: Findings) -> None:
    all_p: Sequence[float | None] = [
        p for arm in found["arms"] if (d := arm["difference"]) for p in (d["p_t"], d["p_wilcoxon"], d["p_t_holm"], d["p_wilcoxon_holm"])
    ]
    assert all(p is None or 0 < p <= 1 for p in all_p)


def test_no_arm_at_all_is_no_run_finished() -> None:
    assert analyse(evidence(settings=[], baseline=None, strategy="random"))["verdict"]
