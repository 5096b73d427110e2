"""The shapes of answers about experiments, for the OpenAPI document. Routes send the domain's JSON as it is; a test holds the two against each
other."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import AwareDatetime, ConfigDict

from api.documents import Document, Fraction
from powergrad.jobs.experiments.spec import ExperimentSpec

State = Literal["queued", "running", "paused", "cancelling", "cancelled", "succeeded", "failed"]
Settings = dict[str, Any]


class EstimateDocument(Document):
    """Mean and spread over seeds; null with too few values."""

    n: int
    mean: float | None
    sd: float | None
    low: float | None
    """Of the mean's 95 % interval (Student's t)."""
    high: float | None
    boot_low: float | None
    """Of its bootstrap interval."""
    boot_high: float | None


class DifferenceDocument(EstimateDocument):
    """An arm minus the baseline, seed by seed, over the seeds that both finished."""

    p_t: float | None
    """Paired t-test, two-sided."""
    p_wilcoxon: float | None
    """Wilcoxon's signed-rank test, two-sided."""
    p_t_holm: float | None
    """Corrected for the number of arms (Holm)."""
    p_wilcoxon_holm: float | None
    effect_size: float | None
    """Hedges' g of the paired differences."""
    detectable: float | None
    """The smallest true difference that so many seeds find four times in five, given the spread seen."""
    more_seeds: int | None
    """Further seeds that would settle it, were the true difference the one seen; 0 when settled, null when unknown or above 1000."""
    conclusion: Literal["better", "worse", "open", "identical", "too_few"]


class ConvergenceDocument(Document):
    """What it takes to reach the baseline's final score, over the seeds that got there."""

    target: float | None
    reached: int
    of: int
    epochs: EstimateDocument
    seconds: EstimateDocument
    joules: EstimateDocument


class ArmDocument(Document):
    index: int
    label: str
    """What tells it from the other arms, in words."""
    settings: Settings
    tuned: Settings
    """What tuning chose for it."""
    counts: dict[str, int]
    """Its runs of the verdict (or of the search) by state."""
    n: int
    """Runs in the mean."""
    mean: float | None
    """Of the experiment's metric after the last epoch."""
    sd: float | None
    low: float | None
    """Of the mean's 95 % interval."""
    high: float | None
    difference: DifferenceDocument | None
    """Null for the baseline, in a search, and until something has been analysed."""
    convergence: ConvergenceDocument | None


class RungDocument(Document):
    epochs: int
    scores: list[dict[str, Any]]
    """settings, n, mean, sd, kept."""


class TuningDocument(Document):
    arm: int
    seeds: list[int]
    rungs: list[RungDocument]
    chosen: Settings | None
    """Null while it is open."""
    at_edge: list[str]
    """Paths whose chosen value is the lowest or highest that was tried."""


class AnalysisErrorDocument(Document):
    code: str
    detail: str


class AnalysisDocument(Document):
    state: Literal["none", "running", "current", "stale", "failed"]
    """stale: more runs have ended since."""
    error: AnalysisErrorDocument | None


class ExperimentProgressDocument(Document):
    fraction: Fraction
    runs_done: int
    runs: int
    """Made or planned so far, tuning included."""
    eta_s: float | None


class ExperimentDocument(Document):
    model_config = ConfigDict(title="Experiment")

    id: str
    object: Literal["experiment"]
    name: str
    state: State
    stage: Literal["tuning", "verdict", "search"]
    spec: ExperimentSpec
    """What was asked, defaults filled in."""
    counts: dict[str, int]
    """Its jobs by state, of all stages."""
    progress: ExperimentProgressDocument
    arms: list[ArmDocument]
    baseline: int | None
    """Index of the arm that the others are compared with; null in a search."""
    best: int | None
    """Index of the arm with the best mean, where one can be named."""
    verdict: str | None
    """One sentence; null until something has been analysed."""
    warnings: list[str]
    tuning: list[TuningDocument]
    analysis: AnalysisDocument
    files: list[str]
    """Names of what can be fetched below the experiment's path."""
    notes: str
    cloned_from: str | None
    created_at: AwareDatetime
    started_at: AwareDatetime | None
    finished_at: AwareDatetime | None
    version: int
    """Moves with state and user fields."""


class ExperimentListDocument(Document):
    model_config = ConfigDict(title="ExperimentList")

    object: Literal["list"]
    data: list[ExperimentDocument]
    has_more: bool
    first_id: str | None
    last_id: str | None
    """Give it as `after` to get the next page."""


class ExperimentSummaryDocument(Document):
    """An experiment as the line of a table."""

    model_config = ConfigDict(title="ExperimentSummary")

    id: str
    object: Literal["experiment_summary"]
    name: str
    state: State
    stage: Literal["tuning", "verdict", "search"]
    strategy: Literal["grid", "random", "asha"]
    metric: str
    arm_count: int
    """How many there are; of a search the settings drawn so far."""
    counts: dict[str, int]
    """Its jobs by state, of all stages."""
    progress: ExperimentProgressDocument
    verdict: str | None
    """One sentence; null until something has been analysed."""
    analysis: AnalysisDocument
    created_at: AwareDatetime
    started_at: AwareDatetime | None
    finished_at: AwareDatetime | None
    version: int


class ExperimentSummaryListDocument(Document):
    model_config = ConfigDict(title="ExperimentSummaryList")

    object: Literal["list"]
    data: list[ExperimentSummaryDocument]
    has_more: bool
    first_id: str | None
    last_id: str | None
    """Give it as `after` to get the next page."""


class PlannedArmDocument(Document):
    index: int
    label: str
    settings: Settings
    pinned: Settings
    """What settings that move (`best`, `latest`, a data set's newest version) mean now."""


class PlanDocument(Document):
    """What would be run."""

    model_config = ConfigDict(title="ExperimentPlan")

    object: Literal["experiment_plan"]
    spec: ExperimentSpec
    """The question, defaults filled in."""
    arms: list[PlannedArmDocument]
    """Empty where a search is yet to draw them."""
    baseline: int | None
    seeds: list[int]
    tuning_seeds: list[int]
    runs: int
    """Jobs in all, tuning included."""
    epochs: int
    """Epochs of all runs together: what it costs, in the unit that a run's own time gives."""
