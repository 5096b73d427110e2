"""Which runs there are to be, and what tuning decides from those that have ended. Pure: no clock, no database.

Each arm goes its own way through the stages: tuning-0, tuning-1, … and then the verdict; a search has one stage. What was decided stays
decided: a job that is retried after its rung was compared changes nothing there.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from powergrad.experiments.findings import Rung as RungEvidence
from powergrad.experiments.findings import Settings, TuningEvidence
from powergrad.jobs.changes import with_changes
from powergrad.jobs.experiments.plan import OWN_LABELS, Question
from powergrad.jobs.spec import JobSpec

VERDICT, SEARCH, TUNING = "verdict", "search", "tuning"
LONGEST_NAME = 64


@dataclass(frozen=True, order=True)
class Place:
    """What makes a run this one and no other: the primary key of its row, beside the experiment."""

    stage: str
    arm: int
    candidate: int
    seed: int


@dataclass(frozen=True)
class Wanted:
    """A run that there is to be."""

    place: Place
    settings: Settings
    epochs: int
    hold_epoch: int | None = None


@dataclass(frozen=True)
class Score:
    """One candidate in one rung. n: runs that ended well, of which mean and sd are."""

    candidate: int
    n: int
    mean: float | None
    sd: float | None
    kept: bool


@dataclass(frozen=True)
class Tuned:
    """What an arm's tuning has come to so far: the scores of every rung that is over."""

    rungs: tuple[tuple[Score, ...], ...] = ()

    def kept(self, rung: int) -> tuple[int, ...]:
        return tuple(score.candidate for score in self.rungs[rung] if score.kept)

    def is_over(self, rungs: int) -> bool:
        return len(self.rungs) == rungs or (bool(self.rungs) and not self.kept(-1))

    def chosen(self, rungs: int) -> int | None:
        """None while it is open, and where every candidate failed."""
        return self.kept(-1)[0] if rungs and len(self.rungs) == rungs and self.kept(-1) else None


@dataclass(frozen=True)
class Trial:
    """A setting that a search has drawn. hold_epoch: where its job pauses itself next; None: at no rung.

    rungs: the metric at each rung it has come to, by its epochs. refused: why no job can be made of it.
    """

    settings: Settings
    hold_epoch: int | None = None
    rungs: dict[str, float | None] = field(default_factory=dict)
    refused: str | None = None


@dataclass(frozen=True)
class Plan:
    """What is decided of an experiment beyond its question, as the row stores it.

    seeds: of the verdict, those added later too. pinned: by arm, what moving references meant when the experiment was made.
    """

    seeds: tuple[int, ...]
    pinned: tuple[Settings, ...] = ()
    tuned: tuple[Tuned, ...] = ()
    trials: tuple[Trial, ...] = field(default=())

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Plan:
        tuned = tuple(Tuned(tuple(tuple(Score(**score) for score in rung) for rung in one)) for one in stored["tuned"])
        return cls(tuple(stored["seeds"]), tuple(stored["pinned"]), tuned, tuple(Trial(**trial) for trial in stored["trials"]))

    def as_json(self) -> dict[str, Any]:
        return {
            "seeds": list(self.seeds),
            "pinned": list(self.pinned),
            "tuned": [[[vars(score) for score in rung] for rung in one.rungs] for one in self.tuned],
            "trials": [vars(trial) for trial in self.trials],
        }


def tuning_stage(rung: int) -> str:
    return f"{TUNING}-{rung}"


def with_decisions(question: Question, plan: Plan, ended: Mapping[Place, float | None]) -> tuple[Tuned, ...]:
    """The tuning of each arm, taken as far as the runs that have ended allow.

    ended: the metric of each such run; None where it failed, was cancelled or deleted, or has no finite value.
    """
    return tuple(_decided(question, arm.index, plan.tuned[arm.index], ended) for arm in question.arms) if question.candidates else ()


def _decided(question: Question, arm: int, tuned: Tuned, ended: Mapping[Place, float | None]) -> Tuned:
    while not tuned.is_over(len(question.rungs)):
        places = {candidate: _places(question, arm, tuned, candidate) for candidate in entrants(question, tuned)}
        if any(place not in ended for of_one in places.values() for place in of_one):
            return tuned
        values = {candidate: [ended[place] for place in of_one] for candidate, of_one in places.items()}
        tuned = Tuned((*tuned.rungs, _compared(question, len(tuned.rungs), values)))
    return tuned


def entrants(question: Question, tuned: Tuned) -> tuple[int, ...]:
    """The candidates of the next rung."""
    return tuned.kept(-1) if tuned.rungs else tuple(range(len(question.candidates)))


def _places(question: Question, arm: int, tuned: Tuned, candidate: int) -> list[Place]:
    return [Place(tuning_stage(len(tuned.rungs)), arm, candidate, seed) for seed in question.tuning_seeds]


def _compared(question: Question, rung: int, values: Mapping[int, Sequence[float | None]]) -> tuple[Score, ...]:
    """A failed run counts as worse than any value: fewer failures come first, then the better mean, then the earlier candidate."""
    sign = 1.0 if question.direction == "min" else -1.0
    found = {candidate: [value for value in of_one if value is not None] for candidate, of_one in values.items()}
    means = {candidate: statistics.fmean(known) for candidate, known in found.items() if known}
    ranked = sorted(means, key=lambda one: (len(values[one]) - len(found[one]), sign * means[one], one))
    keep = 1 if rung == len(question.rungs) - 1 else question.rungs[rung + 1].candidates
    return tuple(
        Score(
            candidate=candidate,
            n=len(known),
            mean=means.get(candidate),
            sd=statistics.stdev(known) if len(known) > 1 else None,
            kept=candidate in ranked[:keep],
        )
        for candidate, known in found.items()
    )


def wanted(question: Question, plan: Plan) -> list[Wanted]:
    """Every run that there is to be as far as is decided, in the order in which they are to start: seed by seed, so that pairs come early."""
    if question.spec.strategy != "grid":
        seed, epochs = plan.seeds[0], question.base.epochs
        return [
            Wanted(Place(SEARCH, number, 0, seed), dict(trial.settings), int(trial.settings.get("epochs", epochs)), trial.hold_epoch)
            for number, trial in enumerate(plan.trials)
            if trial.refused is None
        ]
    return [*_tuning_runs(question, plan), *_verdict_runs(question, plan)]


def _tuning_runs(question: Question, plan: Plan) -> Iterator[Wanted]:
    for rung, budget in enumerate(question.rungs):
        for seed in question.tuning_seeds:
            for arm in question.arms:
                tuned = plan.tuned[arm.index]
                if len(tuned.rungs) >= rung:
                    for candidate in entrants(question, Tuned(tuned.rungs[:rung])):
                        settings = {**arm.settings, **question.candidates[candidate], **plan.pinned[arm.index], "epochs": budget.epochs}
                        yield Wanted(Place(tuning_stage(rung), arm.index, candidate, seed), settings, budget.epochs)


def _verdict_runs(question: Question, plan: Plan) -> Iterator[Wanted]:
    for seed in plan.seeds:
        for arm in question.arms:
            chosen = chosen_settings(question, plan, arm.index)
            if chosen is not None:
                settings = {**arm.settings, **chosen, **plan.pinned[arm.index]}
                yield Wanted(Place(VERDICT, arm.index, 0, seed), settings, int(settings.get("epochs", question.base.epochs)))


def chosen_settings(question: Question, plan: Plan, arm: int) -> Settings | None:
    """What tuning gave an arm, nothing where nothing is tuned; None while that is open, and for ever where every candidate failed."""
    if not question.candidates:
        return {}
    chosen = plan.tuned[arm].chosen(len(question.rungs))
    return None if chosen is None else question.candidates[chosen]


def all_epochs(question: Question, plan: Plan) -> dict[str, tuple[int, int]]:
    """By stage, (runs, epochs of all of them together) that there will be, as far as can be known."""
    if question.spec.strategy != "grid":
        trials = sum(trial.refused is None for trial in plan.trials) if plan.trials else question.spec.search.trials
        return {SEARCH: (trials, trials * question.base.epochs)}
    totals: dict[str, tuple[int, int]] = {}
    for rung, budget in enumerate(question.rungs):
        arms = sum(1 for tuned in plan.tuned if len(tuned.rungs) >= rung or not tuned.is_over(len(question.rungs)))
        runs = arms * budget.candidates * len(question.tuning_seeds)
        totals[tuning_stage(rung)] = (runs, runs * budget.epochs)
    arms_left = [arm for arm in question.arms if not question.candidates or _may_have_verdict(question, plan.tuned[arm.index])]
    epochs = sum(int(arm.settings.get("epochs", question.base.epochs)) for arm in arms_left)
    totals[VERDICT] = (len(arms_left) * len(plan.seeds), epochs * len(plan.seeds))
    return totals


def _may_have_verdict(question: Question, tuned: Tuned) -> bool:
    rungs = len(question.rungs)
    return not tuned.is_over(rungs) or tuned.chosen(rungs) is not None


def failed_arms(question: Question, plan: Plan) -> list[int]:
    """Arms that will have no verdict, as every candidate of their tuning failed."""
    return [arm for arm, tuned in enumerate(plan.tuned) if not _may_have_verdict(question, tuned)]


def stage(question: Question, plan: Plan) -> str:
    """Where the experiment is: in tuning until the last arm is done with it."""
    if question.spec.strategy != "grid":
        return SEARCH
    return TUNING if any(not tuned.is_over(len(question.rungs)) for tuned in plan.tuned) else VERDICT


def job_spec(question: Question, run: Wanted, *, experiment_id: str, name: str) -> JobSpec:
    """What the job of a run is given. Raises pydantic's ValidationError, InvalidSpec."""
    place = run.place
    own = dict(zip(OWN_LABELS, (experiment_id, str(place.arm), str(place.seed), place.stage), strict=True))
    labels = {**question.base.labels, **question.spec.labels, **own}
    changed = with_changes(question.spec.spec, run.settings)
    return JobSpec.model_validate({**changed, "seed": place.seed, "name": _job_name(name, place), "labels": labels})


def _job_name(name: str, place: Place) -> str:
    """`alphas-a0-s3`, `alphas-a0-t1c2-s1000003`, `alphas-n7-s0` for a trial."""
    match place.stage.partition("-"):
        case (stage, _, rung) if stage == TUNING:
            suffix = f"-a{place.arm}-t{rung}c{place.candidate}-s{place.seed}"
        case (stage, _, _) if stage == SEARCH:
            suffix = f"-n{place.arm}-s{place.seed}"
        case _:
            suffix = f"-a{place.arm}-s{place.seed}"
    return name[: LONGEST_NAME - len(suffix)] + suffix


def tuning_evidence(question: Question, plan: Plan) -> list[TuningEvidence]:
    """How each arm's settings were chosen, for a reader."""
    return [_evidence(question, arm.index, plan.tuned[arm.index]) for arm in question.arms] if question.candidates else []


def _evidence(question: Question, arm: int, tuned: Tuned) -> TuningEvidence:
    chosen = tuned.chosen(len(question.rungs))
    settings = None if chosen is None else question.candidates[chosen]
    return TuningEvidence(
        arm=arm,
        seeds=list(question.tuning_seeds),
        rungs=[
            RungEvidence(
                epochs=question.rungs[number].epochs,
                scores=[
                    {"settings": question.candidates[one.candidate], "n": one.n, "mean": one.mean, "sd": one.sd, "kept": one.kept}
                    for one in rung
                ],
            )
            for number, rung in enumerate(tuned.rungs)
        ],
        chosen=settings,
        at_edge=[] if settings is None else [path for path, values in question.spec.tune.items() if _at_edge(settings[path], values)],
    )


def _at_edge(chosen: Any, values: Sequence[Any]) -> bool:
    """Only numbers have a lowest and a highest."""
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < len(values) or len(set(numbers)) < 2:
        return False
    return bool(chosen in (min(numbers), max(numbers)))


def is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
