"""What an experiment knows: the evidence that is collected from its jobs, and the findings that are computed from it.

Both are plain JSON, for they are stored and sent: no NaN, no infinity; None is what is not known or does not exist. Accuracies are fractions
in [0, 1]. Differences are an arm's value minus the baseline's, seed by seed, whatever direction is better.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict

Direction = Literal["max", "min"]
Strategy = Literal["grid", "random", "asha"]
Settings = dict[str, Any]
"""Spec fields by dotted path, `{"loss.alpha": 0.5}`; a path may name a whole section (`clip`)."""

CONFIDENCE = 0.95
POWER = 0.8
SIGNIFICANCE = 0.05


class Moment(TypedDict):
    """The metric after one evaluation."""

    step: int
    epoch: float
    seconds: float | None
    """Of training up to here, as the device was busy with it."""
    joules: float | None
    value: float | None
    """None: it was not finite."""


class RunEvidence(TypedDict):
    """One job of the verdict (or of a search)."""

    job: str
    arm: int
    seed: int
    state: str
    """The job's."""
    reason: str | None
    """Code of a failure's reason."""
    final: dict[str, float | None]
    """Metrics after the last evaluation: val_top1, val_loss, train_top1, train_loss and, where they were measured, val_top5, val_ece, test_*,
    images_per_s. Empty before the first."""
    curve: list[Moment]
    seconds: float
    joules: float | None


class ArmEvidence(TypedDict):
    """What makes an arm."""

    index: int
    settings: Settings
    tuned: Settings
    """What tuning chose; empty without."""


class Rung(TypedDict):
    """The values that were compared in one round of an arm's tuning."""

    epochs: int
    scores: list[dict[str, Any]]
    """{settings, n, mean, sd, kept}: kept goes on to the next round, or is the choice."""


class TuningEvidence(TypedDict):
    """How one arm's settings were chosen."""

    arm: int
    seeds: list[int]
    rungs: list[Rung]
    chosen: Settings | None
    """None while it is open."""
    at_edge: list[str]
    """Paths whose chosen value is the lowest or highest that was tried: a better one may lie beyond."""


class Evidence(TypedDict):
    """All that the findings are computed from."""

    experiment: str
    name: str
    metric: str
    direction: Direction
    strategy: Strategy
    arms: list[ArmEvidence]
    baseline: int | None
    """Index of the arm that others are compared with; None in a search."""
    seeds: list[int]
    runs: list[RunEvidence]
    tuning: list[TuningEvidence]
    shared: list[str]
    """Tunable paths that all arms share untuned though the arms differ in the loss: `optimizer.lr`."""
    spec: dict[str, Any]
    """The base spec as normalised."""
    question: dict[str, Any]
    """The request as normalised."""
    provenance: dict[str, Any]
    """{created_at, versions, devices, data, determinism, …}: what the report's last section prints."""


class Estimate(TypedDict):
    """Mean and spread over seeds. Intervals are of the mean, at CONFIDENCE; None with fewer than two values."""

    n: int
    mean: float | None
    sd: float | None
    low: float | None
    high: float | None
    """Student's t."""
    boot_low: float | None
    boot_high: float | None
    """BCa bootstrap, percentile where BCa is degenerate. Below ten seeds or so it is narrower than chance is wide: there, go by t."""


class Difference(Estimate):
    """To the baseline, over the seeds that both arms finished.

    Where every difference is the same and not 0, t has no answer: p_t is then that of the signs, 2 / 2^n, and the interval the one that goes with
    it, nothing (None) up to five seeds and the value itself from six on.
    """

    p_t: float | None
    p_wilcoxon: float | None
    """Two-sided, paired, never 0; 1 where all differences are 0."""
    p_t_holm: float | None
    p_wilcoxon_holm: float | None
    """Holm over all arms but the baseline, those without two seeds yet included."""
    effect_size: float | None
    """Hedges' g of the paired differences (mean / sd, corrected for few seeds); None below three seeds or without spread."""
    detectable: float | None
    """The smallest true difference that n seeds find with POWER, given the sd seen, at the level that Holm holds this arm to: SIGNIFICANCE
    over the number of arms that are no clearer than it, so SIGNIFICANCE itself for a single one."""
    more_seeds: int | None
    """How many further seeds would settle it with POWER at that level, were the true difference the one seen; 0 when settled, None when more
    than 1000 or unknown."""
    conclusion: Literal["better", "worse", "open", "identical", "too_few"]
    """better, worse: p_t_holm below SIGNIFICANCE, in the metric's direction. identical: every difference is exactly 0."""


class Convergence(TypedDict):
    """What it takes to reach the baseline's final score (per seed, the first evaluation at or beyond it), over the seeds that got there."""

    target: float | None
    """The mean of the baseline's; each seed is measured against its own."""
    reached: int
    of: int
    epochs: Estimate
    seconds: Estimate
    joules: Estimate


class Curve(TypedDict):
    """The metric over training: at each epoch that all the arm's runs evaluated, mean, lowest and highest over seeds."""

    epochs: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


class ArmFindings(TypedDict):
    """One arm."""

    index: int
    label: str
    """`α = 0.5`, `α = 0.5, clip agc`: what tells it from the others, in a reader's words."""
    settings: Settings
    tuned: Settings
    counts: dict[str, int]
    """Jobs by state."""
    metrics: dict[str, Estimate]
    """By name, the experiment's metric among them; also `gap` (train_top1 - val_top1)."""
    difference: Difference | None
    """None for the baseline, and in a search."""
    convergence: Convergence | None
    curve: Curve


class Findings(TypedDict):
    """The answer."""

    metric: str
    direction: Direction
    strategy: Strategy
    seeds: list[int]
    finished: int
    planned: int
    """Runs of the verdict."""
    arms: list[ArmFindings]
    baseline: int | None
    best: int | None
    """The arm with the best mean of the metric among those with the most finished runs (ASHA: that went as far as any), when one can be named:
    None with no finished run, or where the best are equal."""
    verdict: str
    warnings: list[str]
    tuning: list[TuningEvidence]
