"""A search's brain: the settings to try, drawn by Optuna, and which trials a successive halving sends on.

`draw` and `decide` are tasks of a worker's child: JSON in, JSON out, a function of their arguments alone.

The promotion rule is that of ASHA (Li et al. 2020, arXiv 1810.05934, algorithm 2): a trial that waits at a rung goes on as soon as it is among
the best 1/reduction of all that have reached it, however long after it came there. Optuna's own pruner of that name cannot decide this: it
judges a trial once, as it arrives, and what it prunes is over ("Optuna does not support suspending or resuming ongoing trials"), so that a
good trial that comes among the first two of its rung is never looked at again, and the best of few goes on though nothing is known of it.
Here a loser is a paused job with its checkpoint. So Optuna draws, and the rule, a few lines, is here.
"""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from powergrad.experiments.findings import Settings

DIGITS, STEPPED_DIGITS = 6, 12
"""Significant digits of a number drawn from a continuous range (a spec is read by people), and of a multiple of a step (0.3, and not 0.1 + 0.2)."""
CROWDED = 0.5
"""Of all settings there are. Who wants more of them is dealt them like cards: drawing would mostly find what was drawn before."""
MOST_MISSES = 100
"""Draws in a row that were there before, after which no more are made: of a range so narrow that it has few values of six digits."""

TrialState = Literal["held", "running", "queued", "succeeded", "failed"]


# --- what to try


def draw(arguments: Mapping[str, Any], root: Path) -> dict[str, Any]:  # noqa: ARG001 # every task is given its files' root
    """All the settings of a search up front, no two alike: `{"trials": [{path: value}], "exist": n}`.

    arguments: space ({path: {low, high, log, integer, step}, inclusive, or {values}}), trials, seed; strategy changes nothing: random and asha
    try the same.  exist: how many different settings there are, None where a range is continuous; fewer than asked for are all there are.

    The points are a scrambled Sobol sequence (Optuna's QMCSampler): each is uniform by itself, as random search has it, and together they leave
    no gaps (a fifth of the discrepancy of independent draws at 20 points in 3 dimensions; Bergstra and Bengio 2012, section 5). Raises ValueError.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a range does not end with a whole step: it ends before it
        axes = {path: _Axis.of(path, place) for path, place in sorted(arguments["space"].items())}
    wanted, seed = int(arguments["trials"]), int(arguments["seed"])
    counts = [axis.count for axis in axes.values()]
    exist = None if None in counts else math.prod(count for count in counts if count is not None)
    crowded = exist is not None and wanted > CROWDED * exist
    trials = _dealt(axes, wanted, seed=seed) if crowded else _sampled(axes, wanted, seed=seed)
    return {"trials": trials, "exist": exist}


@dataclass(frozen=True)
class _Axis:
    """One path's values. distribution: Optuna's; of a choice, over the index, for Optuna keeps scalars only. values: of a choice, no two alike."""

    distribution: FloatDistribution | IntDistribution | CategoricalDistribution
    values: tuple[Any, ...] = ()

    @classmethod
    def of(cls, path: str, place: Mapping[str, Any]) -> _Axis:
        if "values" in place:
            values = tuple({json.dumps(value, sort_keys=True): value for value in place["values"]}.values())
            if not values:
                raise ValueError(f"space.{path}.values is empty: give at least one value")
            return cls(CategoricalDistribution(range(len(values))), values)
        low, high, log, step = place["low"], place["high"], bool(place.get("log")), place.get("step")
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise ValueError(f"space.{path}: low={low:g} must not be above high={high:g}, and both must be finite")
        if log and low <= 0:
            raise ValueError(f"space.{path}.low={low:g}: must be above 0 where log is true")
        if log and step is not None:
            raise ValueError(f"space.{path}.step={step:g}: is not for a logarithmic range; leave out one of step and log")
        if place.get("integer"):
            return cls(_whole(path, low, high, log=log, step=step))
        return cls(FloatDistribution(low, high, log=log, step=step))

    @property
    def count(self) -> int | None:
        """How many values there are; None where they are continuous."""
        match self.distribution:
            case CategoricalDistribution():
                return len(self.values)
            case IntDistribution(low=low, high=high, step=step):
                return (high - low) // step + 1
            case FloatDistribution(low=low, high=high, step=float(step)):
                return round((high - low) / step) + 1
            case FloatDistribution(low=low, high=high):
                return 1 if low == high else None

    def all(self) -> list[Any]:
        """Every value, in order; of a finite axis only."""
        count = self.count
        assert count is not None, "a continuous axis has no list"
        match self.distribution:
            case IntDistribution(low=low, step=step):
                return [low + i * step for i in range(count)]
            case FloatDistribution(low=low, step=step):
                return [self.value(low + i * (step or 0.0)) for i in range(count)]
        return list(self.values)

    def value(self, drawn: Any) -> Any:
        """The setting that what Optuna has drawn stands for."""
        match self.distribution:
            case CategoricalDistribution():
                return self.values[drawn]
            case FloatDistribution(low=low, high=high, step=step):
                return min(max(float(f"{drawn:.{DIGITS if step is None else STEPPED_DIGITS}g}"), low), high)
        return int(drawn)


def _whole(path: str, low: float, high: float, *, log: bool, step: float | None) -> IntDistribution:
    first, last, apart = math.ceil(low), math.floor(high), 1 if step is None else int(step)
    if first > last:
        raise ValueError(f"space.{path}: there is no whole number from {low:g} to {high:g}")
    if step is not None and apart != step:
        raise ValueError(f"space.{path}.step={step:g}: must be a whole number where integer is true")
    return IntDistribution(first, last, log=log, step=apart)


def _dealt(axes: Mapping[str, _Axis], wanted: int, *, seed: int) -> list[Settings]:
    """So many of all combinations, in an order that the seed decides."""
    combinations = list(itertools.product(*(axis.all() for axis in axes.values())))
    order = np.random.default_rng(seed).permutation(len(combinations))[:wanted]
    return [dict(zip(axes, combinations[i], strict=True)) for i in order]


def _sampled(axes: Mapping[str, _Axis], wanted: int, *, seed: int) -> list[Settings]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of QMCSampler: since 3.0, and unchanged in what it draws
        sampler = optuna.samplers.QMCSampler(scramble=True, seed=seed)
    study = optuna.create_study(sampler=sampler)
    space: dict[str, BaseDistribution] = {path: axis.distribution for path, axis in axes.items()}
    found: dict[str, Settings] = {}
    misses = 0
    while len(found) < wanted and misses < MOST_MISSES:
        drawn = study.ask(fixed_distributions=space).params
        settings = {path: axis.value(drawn[path]) for path, axis in axes.items()}
        name = json.dumps(settings, sort_keys=True)
        misses = misses + 1 if name in found else 0
        found[name] = settings
    return list(found.values())


# --- who goes on


def rungs(min_epochs: int, reduction: int, epochs: int) -> tuple[int, ...]:
    """The epochs at which trials wait: min_epochs, each further one `reduction` times as many, all below `epochs`."""
    found = itertools.takewhile(lambda at: at < epochs, (min_epochs * reduction**k for k in itertools.count()))
    return tuple(found)


@dataclass(frozen=True)
class _Trial:
    """values: by index of the rung, as far as it has come; None: not finite, the worst there is."""

    number: int
    state: TrialState
    values: dict[int, float | None]

    @property
    def rung(self) -> int:
        """The highest it has reached; -1 before the first."""
        return max(self.values, default=-1)

    @property
    def waits(self) -> bool:
        return self.state == "held" and self.values.get(self.rung) is not None


def decide(arguments: Mapping[str, Any], root: Path) -> dict[str, Any]:  # noqa: ARG001 # every task is given its files' root
    """The held trials that are sent on now, those of the highest rungs first: `{"go_on": [{"trial": n, "until": epochs or None}]}`.

    arguments: direction (max or min), reduction, min_epochs, epochs, trials ([{number, state, rungs: {epochs: value}}]); state: held (paused at
    the highest of its rungs), running, queued, succeeded, failed; a value that was not finite is None.  until: the next rung; None is the end.

    Held trials that are not named stay where they are, for a later call may name them. When nothing is left to run, nobody has reached the
    end and the rule names nobody, the best of the highest rung goes on: what is left after that are trials that have no finite value.
    """
    at = rungs(int(arguments["min_epochs"]), int(arguments["reduction"]), int(arguments["epochs"]))
    falls = arguments["direction"] == "min"
    trials = [_trial(given, at) for given in arguments["trials"]]
    chosen = _promoted(trials, falls=falls, reduction=int(arguments["reduction"]))
    if not chosen and not any(trial.state in ("running", "queued", "succeeded") for trial in trials):
        chosen = _best_waiting(trials, falls=falls)
    beyond = (*at[1:], None)
    return {"go_on": [{"trial": trial.number, "until": beyond[trial.rung]} for trial in chosen]}


def _trial(given: Mapping[str, Any], at: Sequence[int]) -> _Trial:
    values = {at.index(int(epochs)): value for epochs, value in given["rungs"].items() if int(epochs) in at}
    return _Trial(given["number"], given["state"], values)


def _promoted(trials: Sequence[_Trial], *, falls: bool, reduction: int) -> list[_Trial]:
    """Of each rung, those who wait there and are among the best 1/reduction of all who have reached it, whatever became of them since."""
    found: list[_Trial] = []
    for rung in range(max((trial.rung for trial in trials), default=-1), -1, -1):
        there = _ranked(trials, rung, falls=falls)
        found += [trial for trial in there[: len(there) // reduction] if trial.waits and trial.rung == rung]
    return found


def _best_waiting(trials: Sequence[_Trial], *, falls: bool) -> list[_Trial]:
    waiting = [trial for trial in trials if trial.waits]
    highest = max((trial.rung for trial in waiting), default=-1)
    return _ranked([trial for trial in waiting if trial.rung == highest], highest, falls=falls)[:1]


def _ranked(trials: Sequence[_Trial], rung: int, *, falls: bool) -> list[_Trial]:
    """Those who have reached a rung, the best first; of equals the first drawn."""

    def key(trial: _Trial) -> tuple[bool, float, int]:
        value = trial.values[rung]
        return value is None, 0.0 if value is None else value if falls else -value, trial.number

    return sorted((trial for trial in trials if rung in trial.values), key=key)
