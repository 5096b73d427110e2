"""What an experiment's runs say, in numbers: means and intervals over seeds, paired differences to the baseline, what more seeds would settle.

Only runs that succeeded with a finite metric count; the others are missing data, and said so. Two arms are compared seed by seed, on the seeds
both finished. Values are computed on as fractions of the largest among them, rounded to DECIMALS: accuracies move in steps of one image, and what
differs only in a sum's last bit must be a tie.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats  # type: ignore[import-untyped]

from powergrad.experiments.findings import (
    CONFIDENCE,
    POWER,
    SIGNIFICANCE,
    ArmFindings,
    Convergence,
    Curve,
    Difference,
    Direction,
    Estimate,
    Evidence,
    Findings,
    Moment,
    RunEvidence,
)
from powergrad.experiments.labels import labels
from powergrad.experiments.verdict import cautions, sentence

RESAMPLES = 4999
"""Of a bootstrap: the interval's ends are then the 125th values from either side."""
DECIMALS = 12
EXACT_WILCOXON = 50
"""Most seeds for which Wilcoxon's p is exact, as scipy's own limit."""
MOST_FURTHER_SEEDS = 1000

Runs = dict[int, RunEvidence]
"""By seed."""
Key = tuple[int, str, str]
"""(arm, what, name) of one sample."""


def analyse(evidence: Evidence, *, resamples: int = RESAMPLES) -> Findings:
    """The findings of this evidence: the same evidence gives the same bytes. resamples: of each bootstrap; 0 leaves bootstrap intervals out."""
    finished = {arm["index"]: _finished(evidence, arm["index"]) for arm in evidence["arms"]}
    reached = {index: _reached(evidence, finished, index) for index in finished}
    found = _estimates(_samples(evidence, finished, reached), resamples)
    differences = _differences(evidence, finished, resamples)
    names = labels(evidence["arms"], evidence["spec"])
    findings = Findings(
        metric=evidence["metric"],
        direction=evidence["direction"],
        strategy=evidence["strategy"],
        seeds=evidence["seeds"],
        finished=sum(len(runs) for runs in finished.values()),
        planned=_planned(evidence),
        arms=[
            ArmFindings(
                index=arm["index"],
                label=name,
                settings=arm["settings"],
                tuned=arm["tuned"],
                counts=dict(sorted(Counter(run["state"] for run in evidence["runs"] if run["arm"] == arm["index"]).items())),
                metrics={metric: estimate for (of, what, metric), estimate in found.items() if of == arm["index"] and what == "metric"},
                difference=differences.get(arm["index"]),
                convergence=_convergence(evidence, finished, reached[arm["index"]], found, arm["index"]),
                curve=_curve(evidence, finished, arm["index"]),
            )
            for arm, name in zip(evidence["arms"], names, strict=True)
        ],
        baseline=evidence["baseline"],
        best=None,
        verdict="",
        warnings=[],
        tuning=evidence["tuning"],
    )
    findings["best"] = _best(evidence, finished)
    findings["warnings"] = cautions(evidence, findings)
    findings["verdict"] = sentence(findings)
    return findings


def t_interval(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Student's interval of the mean at CONFIDENCE.  values: (..., n), n >= 2, one sample a row."""
    n = values.shape[-1]
    half = special.stdtrit(n - 1, (1 + CONFIDENCE) / 2) * values.std(axis=-1, ddof=1) / math.sqrt(n)
    return values.mean(axis=-1) - half, values.mean(axis=-1) + half


def holm(p: Sequence[float | None]) -> list[float | None]:
    """Adjusted p-values by Holm's step-down (Scandinavian Journal of Statistics 6, 1979, 65-70).

    None, a comparison that cannot be made yet, stays None and counts as one that will come out at 1, so what is settled stays settled.
    """
    adjusted: list[float | None] = [None] * len(p)
    largest = 0.0
    for rank, (value, index) in enumerate(sorted((value, index) for index, value in enumerate(p) if value is not None)):
        largest = max(largest, min(1.0, (len(p) - rank) * value))
        adjusted[index] = largest
    return adjusted


def wilcoxon(differences: NDArray[np.float64]) -> float:
    """Two-sided p of Wilcoxon's signed ranks, zeros left out; exact up to EXACT_WILCOXON seeds.  differences: (n,); 1 where all are 0."""
    left = differences[differences != 0]
    if len(left) == 0:
        return 1.0
    if len(np.unique(np.abs(left))) == len(left) or len(left) > EXACT_WILCOXON:
        return max(float(stats.wilcoxon(left, method="exact" if len(left) <= EXACT_WILCOXON else "asymptotic").pvalue), sys.float_info.min)
    return _wilcoxon_with_ties(left)


def _wilcoxon_with_ties(differences: NDArray[np.float64]) -> float:
    """Exact all the same. scipy tries every sign, 60 ms for 10 seeds and 0.8 s for 13, and approximates from 14 on; summing up rank by rank how
    often each rank sum comes up gives the same numbers at once. Ranks are doubled: those of ties end in a half."""
    ranks = np.rint(2 * stats.rankdata(np.abs(differences))).astype(int)
    ways = np.ones(1)
    for rank in ranks:
        ways = np.convolve(ways, np.bincount([0, rank]))
    seen = int(ranks[differences > 0].sum())
    return float(min(1.0, 2 * min(ways[: seen + 1].sum(), ways[seen:].sum()) / ways.sum()))


def power(effect: float, n: int, level: float) -> float:
    """Chance that the paired t test of `n` seeds finds a true difference of `effect` standard deviations, two-sided at `level`."""
    critical = -special.stdtrit(n - 1, level / 2)
    noncentrality = abs(effect) * math.sqrt(n)
    # the tail on the wrong side is nan where it is too small to be computed
    return float(1 - special.nctdtr(n - 1, noncentrality, critical) + np.nan_to_num(special.nctdtr(n - 1, noncentrality, -critical)))


@lru_cache(maxsize=4096)
def detectable(n: int, level: float = SIGNIFICANCE) -> float:
    """The true difference, in standard deviations, that `n` >= 2 seeds find with POWER."""
    above = 1.0
    while power(above, n, level) < POWER:
        above *= 2
    return float(optimize.brentq(lambda effect: power(effect, n, level) - POWER, 0.0, above))


def seeds_needed(effect: float, level: float = SIGNIFICANCE, *, most: int = MOST_FURTHER_SEEDS) -> int | None:
    """The fewest seeds, at least 2, that find a true difference of `effect` standard deviations with POWER; None when more than `most`."""
    if power(effect, most, level) < POWER:
        return None
    few, enough = 1, most
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if power(effect, middle, level) >= POWER else (middle, enough)
    return enough


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _finished(evidence: Evidence, arm: int) -> Runs:
    """What counts: the arm's runs that succeeded with a finite metric."""
    found: Runs = {}
    for run in evidence["runs"]:
        if run["arm"] == arm and run["state"] == "succeeded" and _finite(run["final"].get(evidence["metric"])) is not None:
            found.setdefault(run["seed"], run)
    return found


def _planned(evidence: Evidence) -> int:
    """Searches make their arms as they go, so there the runs may be more."""
    return max(len(evidence["arms"]) * len(evidence["seeds"]), 0 if evidence["strategy"] == "grid" else len(evidence["runs"]))


def _score(run: RunEvidence, metric: str) -> float:
    value = run["final"][metric]
    assert value is not None  # a finished run's
    return float(value)


def _samples(evidence: Evidence, finished: Mapping[int, Runs], reached: Mapping[int, list[Moment | None]]) -> dict[Key, list[float]]:
    """All numbers whose mean is wanted, so that they can be bootstrapped together."""
    samples: dict[Key, list[float]] = defaultdict(list)
    for arm, runs in finished.items():
        samples[arm, "metric", evidence["metric"]] = []
        for run in runs.values():
            final: dict[str, float | None] = dict(run["final"])
            train, val = _finite(final.get("train_top1")), _finite(final.get("val_top1"))
            if train is not None and val is not None:
                final["gap"] = train - val
            for name, value in final.items():
                if (known := _finite(value)) is not None:
                    samples[arm, "metric", name].append(known)
        for name in ("epochs", "seconds", "joules"):
            measured = [_finite(_measure(moment, name)) for moment in reached[arm] if moment is not None]
            samples[arm, "convergence", name] = [value for value in measured if value is not None]
    return samples


def _measure(moment: Moment, name: str) -> float | None:
    return {"epochs": moment["epoch"], "seconds": moment["seconds"], "joules": moment["joules"]}[name]


def _estimates(samples: Mapping[Key, Sequence[float]], resamples: int) -> dict[Key, Estimate]:
    """An estimate of each sample; those with equally many values are bootstrapped in one call."""
    scaled = {key: _scaled(values) for key, values in samples.items()}
    spread = {key: row for key, (row, _) in scaled.items() if _has_spread(row)}
    boots = _bootstraps(spread, resamples) if resamples else {}
    return {key: _estimate(row, exponent, boots.get(key)) for key, (row, exponent) in scaled.items()}


def _scaled(values: Sequence[float]) -> tuple[NDArray[np.float64], int]:
    """Values as fractions of a power of two, and its exponent: squares of what is left neither overflow nor vanish."""
    exponent = max((math.frexp(value)[1] for value in values if value), default=0)
    return np.array([math.ldexp(value, -exponent) for value in values], dtype=np.float64), exponent


def _unscaled(value: float | None, exponent: int) -> float | None:
    if value is None:
        return None
    try:
        return _finite(math.ldexp(value, exponent))
    except OverflowError:  # the end of an interval beyond what a number holds
        return None


def _estimate(row: NDArray[np.float64], exponent: int, boot: tuple[float, float] | None) -> Estimate:
    n = len(row)
    mean = sd = low = high = None
    if n == 1 or (n and np.ptp(row) == 0):
        mean = float(row[0])
        sd, low, high, boot = (0.0, mean, mean, (mean, mean)) if n > 1 else (None, None, None, None)
    elif n:
        mean, sd = float(row.mean()), float(row.std(ddof=1))
        low, high = (float(end) for end in t_interval(row))
    boot_low, boot_high = boot or (None, None)
    mean, sd, low, high, boot_low, boot_high = (_unscaled(value, exponent) for value in (mean, sd, low, high, boot_low, boot_high))
    return Estimate(n=n, mean=mean, sd=sd, low=low, high=high, boot_low=boot_low, boot_high=boot_high)


def _bootstraps(rows: Mapping[Any, NDArray[np.float64]], resamples: int) -> dict[Any, tuple[float, float]]:
    """BCa intervals of the rows' means, percentile where BCa is degenerate.  rows: of any lengths, not constant."""
    by_length: dict[int, list[Any]] = defaultdict(list)
    for key, row in rows.items():
        by_length[len(row)].append(key)
    found: dict[Any, tuple[float, float]] = {}
    for keys in by_length.values():
        ends = _bootstrap(np.stack([rows[key] for key in keys]), resamples)
        found |= {key: (float(low), float(high)) for key, low, high in zip(keys, *ends, strict=True)}
    return found


def _bootstrap(rows: NDArray[np.float64], resamples: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """rows: (k, n). Every row draws the same indices, which depend on n alone: an arm's interval does not depend on its neighbours."""
    options: dict[str, Any] = {"axis": -1, "confidence_level": CONFIDENCE, "vectorized": True, "batch": 50}
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        bca = stats.bootstrap((rows,), np.mean, n_resamples=resamples, method="BCa", rng=np.random.default_rng(0), **options)
        plain = stats.bootstrap((rows,), np.mean, n_resamples=0, method="percentile", bootstrap_result=bca, **options)
    sound = np.isfinite(bca.confidence_interval.low) & np.isfinite(bca.confidence_interval.high)
    low = np.where(sound, bca.confidence_interval.low, plain.confidence_interval.low)
    high = np.where(sound, bca.confidence_interval.high, plain.confidence_interval.high)
    return low, high


def _differences(evidence: Evidence, finished: Mapping[int, Runs], resamples: int) -> dict[int, Difference]:
    """Of every arm but the baseline, to the baseline; none in a search, where the same runs chose and measured."""
    baseline = evidence["baseline"]
    if baseline is None or evidence["strategy"] != "grid":
        return {}
    others = [index for index in finished if index != baseline]
    rows = {index: _paired(finished[index], finished[baseline], evidence["metric"]) for index in others}
    boots = _bootstraps({index: row for index, (row, _) in rows.items() if _has_spread(row)}, resamples) if resamples else {}
    p_t = [_p_of_t(rows[index][0]) for index in others]
    p_wilcoxon = [wilcoxon(rows[index][0]) if len(rows[index][0]) > 1 else None for index in others]
    p_t_holm, p_wilcoxon_holm = holm(p_t), holm(p_wilcoxon)
    found = {}
    for place, index in enumerate(others):
        row, exponent = rows[index]
        # the level this arm is held to: Holm divides by how many are not clearer than it
        level = SIGNIFICANCE / max(1, sum(p is None or p >= (p_t[place] or 0.0) for p in p_t))
        estimate = _estimate(row, exponent, boots.get(index))
        if _is_constant(row) and 2 ** (1 - len(row)) >= SIGNIFICANCE:
            estimate |= Estimate(n=len(row), mean=estimate["mean"], sd=0.0, low=None, high=None, boot_low=None, boot_high=None)
        conclusion = _conclusion(row, estimate, p_t_holm[place], evidence["direction"])
        found[index] = Difference(
            **estimate,
            p_t=p_t[place],
            p_wilcoxon=p_wilcoxon[place],
            p_t_holm=p_t_holm[place],
            p_wilcoxon_holm=p_wilcoxon_holm[place],
            effect_size=_effect_size(row),
            detectable=_unscaled(detectable(len(row), level) * float(row.std(ddof=1)), exponent) if _has_spread(row) else None,
            more_seeds=_more_seeds(row, level, conclusion),
            conclusion=conclusion,
        )
    return found


def _paired(arm: Runs, baseline: Runs, metric: str) -> tuple[NDArray[np.float64], int]:
    """Scaled differences on the seeds both finished, in the order of the seeds, and the exponent of their scale."""
    seeds = sorted(arm.keys() & baseline.keys())
    values, exponent = _scaled([_score(runs[seed], metric) for runs in (arm, baseline) for seed in seeds])
    return np.array([round(a - b, DECIMALS) for a, b in values.reshape(2, -1).T.tolist()], dtype=np.float64), exponent


def _has_spread(row: NDArray[np.float64]) -> bool:
    return len(row) > 1 and bool(np.ptp(row) > 0)


def _is_constant(row: NDArray[np.float64]) -> bool:
    """The same difference, not 0, on every one of several seeds."""
    return len(row) > 1 and bool(np.ptp(row) == 0) and row[0] != 0


def _p_of_t(row: NDArray[np.float64]) -> float | None:
    """Two-sided p of the paired t test; None below two seeds.

    Differences that are all the same leave t nothing to divide by, and its p of 0 would only say that the metric moves in coarse steps. What is
    left to go by are the signs: by chance all n fall on one side once in 2^(n-1) times. That test's interval is the one value, or, up to five
    seeds, everything.
    """
    if len(row) < 2:
        return None
    if not row.any():
        return 1.0
    if not _has_spread(row):
        return float(2.0 ** (1 - len(row)))
    return max(float(stats.ttest_1samp(row, 0.0).pvalue), sys.float_info.min)


def _effect_size(row: NDArray[np.float64]) -> float | None:
    """Hedges' g with the exact correction (Journal of Educational Statistics 6, 1981, 107-128), which two seeds do not have."""
    if len(row) > 1 and not row.any():
        return 0.0
    if len(row) < 3 or not _has_spread(row):
        return None
    degrees = len(row) - 1
    correction = math.exp(math.lgamma(degrees / 2) - math.lgamma((degrees - 1) / 2)) / math.sqrt(degrees / 2)
    return correction * float(row.mean()) / float(row.std(ddof=1))


Conclusion = Literal["better", "worse", "open", "identical", "too_few"]


def _conclusion(row: NDArray[np.float64], estimate: Estimate, p_holm: float | None, direction: Direction) -> Conclusion:
    if len(row) < 2 or p_holm is None:
        return "too_few"
    if not row.any():
        return "identical"
    low, high = estimate["low"], estimate["high"]
    if p_holm >= SIGNIFICANCE or low is None or high is None or low <= 0 <= high:
        return "open"
    return "better" if (low > 0) == (direction == "max") else "worse"


def _more_seeds(row: NDArray[np.float64], level: float, conclusion: Conclusion) -> int | None:
    if conclusion in {"better", "worse", "identical"}:
        return 0
    if not _has_spread(row) or row.mean() == 0:
        return None
    needed = seeds_needed(float(row.mean() / row.std(ddof=1)), level, most=len(row) + MOST_FURTHER_SEEDS)
    return None if needed is None else max(1, needed - len(row))


def _reached(evidence: Evidence, finished: Mapping[int, Runs], arm: int) -> list[Moment | None]:
    """Per seed that arm and baseline finished: the arm's first evaluation at or beyond the baseline's final score of that seed.

    Nothing is interpolated between evaluations: a score that was not measured was not reached.
    """
    if evidence["baseline"] is None or evidence["strategy"] != "grid":
        return []
    baseline, metric = finished.get(evidence["baseline"], {}), evidence["metric"]
    sign = 1.0 if evidence["direction"] == "max" else -1.0
    found = []
    for seed in sorted(finished[arm].keys() & baseline.keys()):
        target = sign * _score(baseline[seed], metric)
        moments = sorted(finished[arm][seed]["curve"], key=lambda moment: moment["step"])
        found.append(
            next((moment for moment in moments if (value := _finite(moment["value"])) is not None and sign * value >= target), None)
        )
    return found


def _convergence(
    evidence: Evidence, finished: Mapping[int, Runs], reached: Sequence[Moment | None], found: Mapping[Key, Estimate], arm: int
) -> Convergence | None:
    if evidence["baseline"] is None or evidence["strategy"] != "grid":
        return None
    return Convergence(
        target=found[evidence["baseline"], "metric", evidence["metric"]]["mean"] if evidence["baseline"] in finished else None,
        reached=sum(moment is not None for moment in reached),
        of=len(reached),
        epochs=found[arm, "convergence", "epochs"],
        seconds=found[arm, "convergence", "seconds"],
        joules=found[arm, "convergence", "joules"],
    )


def _curve(evidence: Evidence, finished: Mapping[int, Runs], arm: int) -> Curve:
    """Over the runs that count; before there is one, over those under way."""
    runs = list(finished[arm].values()) or [run for run in evidence["runs"] if run["arm"] == arm and run["curve"]]
    values = [{moment["epoch"]: value for moment in run["curve"] if (value := _finite(moment["value"])) is not None} for run in runs]
    epochs = sorted(set.intersection(*(set(of_run) for of_run in values))) if values else []
    columns = [[of_run[epoch] for of_run in values] for epoch in epochs]
    return Curve(
        epochs=epochs,
        mean=[_mean(column) for column in columns],
        low=[min(column) for column in columns],
        high=[max(column) for column in columns],
    )


def _mean(values: Sequence[float]) -> float:
    """Never overflows, and never leaves the values' range."""
    row, exponent = _scaled(values)
    return min(max(math.ldexp(float(row.mean()), exponent), min(values)), max(values))


def _best(evidence: Evidence, finished: Mapping[int, Runs]) -> int | None:
    """Among the arms with the most runs that count: an arm that lost some would be flattered by the rest."""
    counted = {index: [_score(run, evidence["metric"]) for run in _to_the_end(evidence, finished, index)] for index in finished}
    most = max((len(scores) for scores in counted.values()), default=0)
    sign = 1.0 if evidence["direction"] == "max" else -1.0
    means = {index: sign * _mean(scores) for index, scores in counted.items() if scores and len(scores) == most}
    ranked = sorted(means, key=lambda index: means[index], reverse=True)
    if not ranked or (len(ranked) > 1 and means[ranked[0]] == means[ranked[1]]):
        return None
    return ranked[0]


def _to_the_end(evidence: Evidence, finished: Mapping[int, Runs], arm: int) -> list[RunEvidence]:
    """ASHA lets runs end early that are behind: only those that went as far as any are candidates."""
    runs = list(finished[arm].values())
    if evidence["strategy"] != "asha" or evidence["spec"].get("early_stopping") is not None:
        return runs
    end = max((_last_epoch(run) for others in finished.values() for run in others.values()), default=0.0)
    return [run for run in runs if _last_epoch(run) >= end]


def _last_epoch(run: RunEvidence) -> float:
    return max((moment["epoch"] for moment in run["curve"]), default=0.0)
