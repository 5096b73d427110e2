"""What a user asks: arms made of a grid, seeds, and how each arm comes by the settings that are not in question."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from powergrad.jobs.spec import ONLY_THESE, LabelName, LabelText
from powergrad.spec import NAME_PATTERN, SpecModel

PATH_PATTERN = r"^[a-z0-9_]+(\.[A-Za-z0-9_-]+)*$"
METRIC_PATTERN = r"^(val|test|train)_[a-z0-9_]{1,48}$"
MAX_RUNS = 500
"""Jobs of one experiment, tuning included, at its start."""

Path = Annotated[str, Field(pattern=PATH_PATTERN, examples=["loss.alpha"])]
Values = Annotated[list[Any], Field(min_length=1, max_length=64)]
Grid = dict[Path, Values]


class Range(SpecModel):
    """Numbers to search in."""

    low: float
    high: float
    log: bool = False
    """Drawn uniformly on a logarithmic scale; low must be above 0."""
    integer: bool = False
    """Whole numbers only."""
    step: float | None = Field(default=None, gt=0.0)
    """Multiples of it above low; not together with log."""


class Choice(SpecModel):
    """Values to choose from, without an order."""

    values: Values


Space = dict[Path, Range | Choice]


class TuningSpec(SpecModel):
    """How the values in `tune` are chosen for each arm, before the seeds of the verdict run."""

    seeds: int = Field(default=1, ge=1, le=20)
    """Seeds of its own, none of them a seed of the verdict."""
    epochs: int | None = Field(default=None, ge=1, le=100_000)
    """Budget of a tuning run; null is the spec's own. A shorter one favours what is fast early: the report says so."""
    halving: int | None = Field(default=None, ge=2, le=8)
    """Successive halving: of the values only the best 1/halving go on to runs of halving times as many epochs, until the budget is reached.
    Null runs every value with the whole budget."""


class SearchSpec(SpecModel):
    """Of strategies random and asha."""

    trials: int = Field(default=20, ge=1, le=MAX_RUNS)
    """Settings drawn."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Of the draws."""
    reduction: int = Field(default=3, ge=2, le=8)
    """asha: of those that reach a rung, the best 1/reduction go on at once; the rest are paused, with their checkpoints, until there is room."""
    min_epochs: int = Field(default=1, ge=1, le=100_000)
    """asha: epochs of the first rung; each further one has reduction times as many."""


class ExperimentSpec(SpecModel):
    """The body of POST /v1/experiments."""

    model_config = ConfigDict(json_schema_extra={"required": ["spec"]})

    name: str | None = Field(default=None, pattern=NAME_PATTERN)
    """A name to know the experiment by; null is made from the spec and what is varied."""
    spec: dict[str, Any]
    """A job spec, the base of every run: its seed is the first seed."""
    strategy: Literal["grid", "random", "asha"] = "grid"
    """grid compares every combination of `grid`; random and asha look for the best in `space`, and claim nothing about chance."""
    grid: Grid = Field(default={}, max_length=8, json_schema_extra=ONLY_THESE)
    """Values by dotted path: every combination is an arm. {"loss.alpha": [1.0, 0.5]}"""
    seeds: int = Field(default=5, ge=1, le=100)
    """Runs of each arm: seeds spec.seed, spec.seed + 1, …  A search runs each setting with the first one only."""
    baseline: dict[Path, Any] | None = None
    """The arm that the others are compared with; null is the one with loss.alpha 1 if there is one, else the first."""
    metric: str = Field(default="val_top1", pattern=METRIC_PATTERN)
    """What is compared: its value after the last epoch. Losses and calibration errors are better lower, all else higher."""
    tune: Grid = Field(default={}, max_length=8, json_schema_extra=ONLY_THESE)
    """Values from which every arm is given its own best, before the verdict: {"optimizer.lr": [0.025, 0.05, 0.1, 0.2]}"""
    tuning: TuningSpec = TuningSpec()
    """How."""
    space: Space = Field(default={}, max_length=8, json_schema_extra=ONLY_THESE)
    """Of a search: where values are drawn from."""
    search: SearchSpec = SearchSpec()
    """How a search goes."""
    labels: dict[LabelName, LabelText] = Field(default={}, max_length=16, json_schema_extra=ONLY_THESE)
    """Given to every job, beside those of the spec."""
