"""The question as it will be run: arms, seeds, candidates and rungs, every job of it checked before the first is stored. Pure.

`parse` turns a decoded JSON body into a `Question` or raises `InvalidSpec` with every violation at once, found where it was written:
/spec/loss/alpha, /grid/loss.alpha/1.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

from pydantic import ValidationError

from powergrad.jobs import nearest
from powergrad.jobs import spec as job_specs
from powergrad.jobs.changes import with_changes
from powergrad.jobs.errors import InvalidSpec, Violation, refusal
from powergrad.jobs.experiments.spec import MAX_RUNS, Choice, ExperimentSpec, Grid, Range
from powergrad.jobs.spec import JobSpec, default_name
from powergrad.spec import TrainSpec

TUNING_SEEDS_FROM = 1_000_003
"""Added to the first seed: no verdict has so many seeds that it would come to these."""
MOST_SEED = 2**32 - 1
OWN_LABELS = ("experiment", "arm", "seed", "stage")
MOST_LABELS = 32
VARIABLE = frozenset(TrainSpec.model_fields) - {"seed"}
METRICS = (
    *(f"{split}_{name}" for split in ("val", "test") for name in ("top1", "top5", "loss", "ece")),
    *(f"{split}_logit_{name}" for split in ("val", "test") for name in ("norm", "mean_abs", "max_abs", "var")),
    "train_top1",
    "train_loss",
)
"""What a classification job gives after its last epoch (top5 from five classes on, test where there is such a split)."""
LOWER_IS_BETTER = ("_loss", "_ece")

Settings = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One of the alternatives that are compared."""

    index: int
    settings: Settings


@dataclass(frozen=True)
class Rung:
    """A round of tuning: so many candidates of each arm, trained from scratch for so many epochs. A schedule depends on its length, so a
    longer run is not a shorter one gone on with."""

    epochs: int
    candidates: int


@dataclass(frozen=True)
class Question:
    """What was asked, and what it comes to. candidates: settings that tuning tries in each arm; empty without."""

    spec: ExperimentSpec
    base: JobSpec
    arms: tuple[Arm, ...]
    candidates: tuple[Settings, ...]
    baseline: int | None

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the verdict at its start; a search has one."""
        count = self.spec.seeds if self.spec.strategy == "grid" else 1
        return tuple(range(self.base.seed, self.base.seed + count))

    @property
    def tuning_seeds(self) -> tuple[int, ...]:
        first = self.base.seed + TUNING_SEEDS_FROM
        return tuple(range(first, first + self.spec.tuning.seeds)) if self.candidates else ()

    @cached_property
    def rungs(self) -> tuple[Rung, ...]:
        """Rounds of tuning, each with fewer candidates and more epochs than the one before."""
        if not self.candidates:
            return ()
        budget, halving = self.spec.tuning.epochs or self.base.epochs, self.spec.tuning.halving
        sizes = [len(self.candidates)]
        while halving is not None and sizes[-1] > halving:
            sizes.append(math.ceil(sizes[-1] / halving))
        return tuple(Rung(max(1, budget // (halving or 1) ** (len(sizes) - 1 - k)), size) for k, size in enumerate(sizes))

    @property
    def runs(self) -> int:
        """Jobs in all, tuning included."""
        return sum(count for count, _ in self._costs())

    @property
    def epochs(self) -> int:
        """Epochs of all jobs together; of asha the most there can be."""
        return sum(count * epochs for count, epochs in self._costs())

    def _costs(self) -> Iterator[tuple[int, int]]:
        if self.spec.strategy != "grid":
            yield self.spec.search.trials, self.base.epochs
            return
        for rung in self.rungs:
            yield len(self.arms) * rung.candidates * len(self.tuning_seeds), rung.epochs
        for arm in self.arms:
            yield len(self.seeds), int(arm.settings.get("epochs", self.base.epochs))

    @property
    def direction(self) -> str:
        return "min" if self.spec.metric.endswith(LOWER_IS_BETTER) else "max"

    @property
    def shared(self) -> list[str]:
        """Tunable paths that all arms share untuned though they differ in the loss."""
        differ_in_loss = any(path.split(".")[0] == "loss" for path in self.spec.grid)
        chosen = {*self.spec.grid, *self.spec.tune}
        return ["optimizer.lr"] if differ_in_loss and not chosen & {"optimizer.lr", "optimizer"} else []

    @property
    def name(self) -> str:
        return self.spec.name or _default_name(self.base, [*self.spec.grid, *self.spec.space])


def stored(spec: dict[str, Any], *, arms: Sequence[Settings], candidates: Sequence[Settings], baseline: int | None) -> Question:
    """A question as it was stored: JSON objects come back without their order, so what depends on it is stored beside them."""
    asked = ExperimentSpec.model_validate(spec)
    indexed = tuple(Arm(index, dict(settings)) for index, settings in enumerate(arms))
    return Question(asked, JobSpec.model_validate(asked.spec), indexed, tuple(candidates), baseline)


def parse(body: Any, *, models: Collection[str] = (), datasets: Collection[str] = (), outputs: Collection[str] | None = None) -> Question:
    """The question in a decoded JSON body. models, datasets, outputs: known names, as for a job's spec. Raises InvalidSpec, UnknownReference."""
    try:
        asked = ExperimentSpec.model_validate(body)
    except ValidationError as error:
        found = [told for one in job_specs.violations_of(error, ExperimentSpec) if (told := _in_experiment(one, body)) is not None]
        raise refusal([*once(found), *_of_spec(body, models, datasets)]) from None
    try:
        base = job_specs.parse(asked.spec, models=models, datasets=datasets, outputs=outputs)
    except InvalidSpec as error:
        raise refusal([*_prefixed(error), *_rules(asked, None)]) from None
    violations = _rules(asked, base)
    if violations:
        raise refusal(violations)
    return _checked(asked, base, models, datasets)


def _of_spec(body: Any, models: Collection[str], datasets: Collection[str]) -> list[Violation]:
    """What is wrong with the spec inside a body that is wrong itself."""
    if not isinstance(body, dict) or not isinstance(body.get("spec"), dict):
        return []
    try:
        job_specs.parse(body["spec"], models=models, datasets=datasets)
    except InvalidSpec as error:
        return _prefixed(error)
    return []


def _prefixed(error: InvalidSpec) -> list[Violation]:
    return [Violation("/spec" + one.pointer, one.code, one.detail, one.value) for one in error.violations]


def _in_experiment(violation: Violation, body: Any) -> Violation | None:
    """pydantic names keys and the members of a union in a location, and tells of all members; the JSON has no such parts, and is meant to be
    one of them. None: of the other one."""
    parts = [part for part in violation.pointer.split("/") if part != "[key]"]
    if parts[1:2] == ["space"] and parts[3:4] in (["Range"], ["Choice"]):
        value = body["space"].get(parts[2])
        if (parts[3] == "Choice") is not (isinstance(value, dict) and "values" in value):
            return None
        del parts[3]
    return Violation("/".join(parts), violation.code, violation.detail, violation.value)


def once(violations: Sequence[Violation]) -> list[Violation]:
    return list({(one.pointer, one.code): one for one in reversed(violations)}.values())[::-1]


# --- rules between fields --------------------------------------------------------------------------------------------------------


def _rules(asked: ExperimentSpec, base: JobSpec | None) -> list[Violation]:
    """What can be said before any job is looked at. base: None where it is wrong by itself."""
    violations = [*_path_rules(asked), *_strategy_rules(asked), *_label_rules(asked, base)]
    if asked.metric not in METRICS:
        near = difflib.get_close_matches(asked.metric, METRICS, n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        violations.append(Violation("/metric", "unknown_value", f"must be one of: {', '.join(METRICS)}{hint}", asked.metric))
    if base is not None and base.seed + TUNING_SEEDS_FROM + 20 > MOST_SEED:
        detail = f"must be at most {MOST_SEED - TUNING_SEEDS_FROM - 20}: tuning takes its seeds from {TUNING_SEEDS_FROM} further on"
        violations.append(Violation("/spec/seed", "out_of_range", detail, base.seed))
    count = math.prod(len(values) for values in asked.grid.values())
    candidates = math.prod(len(values) for values in asked.tune.values())
    if asked.strategy == "grid" and count * max(asked.seeds, candidates if asked.tune else 0) > MAX_RUNS:
        detail = f"{count} arms, {asked.seeds} seeds and {candidates if asked.tune else 0} candidates each: at most {MAX_RUNS} runs"
        violations.append(Violation("/grid", "out_of_range", detail, count))
    return violations


def _path_rules(asked: ExperimentSpec) -> Iterator[Violation]:
    seen: dict[str, str] = {}
    for section, paths in (("grid", asked.grid), ("tune", asked.tune), ("space", asked.space)):
        for path in paths:
            pointer = f"/{section}/{path}"
            root = path.split(".")[0]
            if root == "seed":
                yield Violation(pointer, "conflict", "seeds are not varied here: `seeds` says how many each arm runs with", path)
            elif root not in VARIABLE:
                meant = nearest.path(TrainSpec, path)
                hint = "" if meant is None else f"; did you mean {meant!r}?"
                detail = f"no field of training: what is varied must be one, as loss.alpha or optimizer.lr is{hint}"
                yield Violation(pointer, "unknown_field", detail, path)
            for other, where in seen.items():
                if other == path or other.startswith(path + ".") or path.startswith(other + "."):
                    yield Violation(pointer, "conflict", f"sets what {where} sets", path)
            seen.setdefault(path, pointer)


def _strategy_rules(asked: ExperimentSpec) -> Iterator[Violation]:
    strategy = asked.strategy
    if strategy == "grid":
        if asked.space:
            yield Violation("/space", "would_be_ignored", "strategy grid searches no space: use grid, or strategy random or asha")
        return
    for name in ("grid", "tune", "baseline"):
        if getattr(asked, name):
            yield Violation(f"/{name}", "would_be_ignored", f"strategy {strategy} draws its settings from space")
    if not asked.space:
        yield Violation("/space", "missing", f"strategy {strategy} needs ranges or choices to draw from")
    for path, one in asked.space.items():
        if isinstance(one, Range):
            yield from _range_rules(f"/space/{path}", one)


def _range_rules(pointer: str, one: Range) -> Iterator[Violation]:
    if one.low >= one.high:
        yield Violation(f"{pointer}/high", "out_of_range", f"must be above low ({one.low:g})", one.high)
    if one.log and one.low <= 0:
        yield Violation(f"{pointer}/low", "out_of_range", "must be above 0 on a logarithmic scale", one.low)
    if one.log and one.step is not None:
        yield Violation(f"{pointer}/step", "conflict", "not together with log", one.step)
    for name in ("low", "high", "step"):
        value = getattr(one, name)
        if one.integer and value is not None and value != int(value):
            yield Violation(f"{pointer}/{name}", "wrong_type", "must be whole, as integer is true", value)


def _label_rules(asked: ExperimentSpec, base: JobSpec | None) -> Iterator[Violation]:
    for section, labels in (("/labels", asked.labels), ("/spec/labels", {} if base is None else base.labels)):
        for name in OWN_LABELS:
            if name in labels:
                yield Violation(f"{section}/{name}", "would_be_ignored", "the experiment gives its jobs this label", labels[name])
    merged = {**({} if base is None else base.labels), **asked.labels}
    if len(merged) + len(OWN_LABELS) > MOST_LABELS:
        detail = f"{len(merged)} with those of the spec: at most {MOST_LABELS - len(OWN_LABELS)}, as the experiment adds {len(OWN_LABELS)}"
        yield Violation("/labels", "out_of_range", detail, len(asked.labels))


# --- every job that there may be -------------------------------------------------------------------------------------------------


def _checked(asked: ExperimentSpec, base: JobSpec, models: Collection[str], datasets: Collection[str]) -> Question:
    """The question, when every job of it is one that the service would take. Raises InvalidSpec."""
    body = base.model_dump(mode="json")
    search = asked.strategy != "grid"
    arms = () if search else tuple(Arm(index, settings) for index, settings in enumerate(combinations(asked.grid)))
    candidates = tuple(combinations(asked.tune)) if asked.tune else ()
    named = asked.model_copy(update={"spec": body})
    question = Question(named, base, arms, candidates, None)
    if question.runs > MAX_RUNS:
        detail = f"{question.runs} runs in all, tuning included: at most {MAX_RUNS}"
        raise refusal([Violation("/seeds", "out_of_range", detail, asked.seeds)])
    check = _Check(body, models, datasets)
    if search:
        _check_space(asked, check)
    else:
        _check_arms(question, check)
    if check.violations:
        raise refusal(once(check.violations))
    baseline = None if search else _baseline(asked, arms, check)
    named = named.model_copy(update={"name": question.name})
    return Question(named, base, arms, candidates, baseline)


class _Check:
    """Looks at specs that are the base with changes, and remembers what is wrong where the changes were written."""

    def __init__(self, base: dict[str, Any], models: Collection[str], datasets: Collection[str]) -> None:
        self.base, self.models, self.datasets = base, models, datasets
        self.violations: list[Violation] = []

    def normalised(self, changes: Settings, written_at: Mapping[str, str]) -> str | None:
        """The spec as comparable text; None when it is no spec. written_at: pointer of each change."""
        try:
            found = job_specs.parse(with_changes(self.base, changes), models=self.models, datasets=self.datasets)
        except InvalidSpec as error:
            self.violations += [found_at(one, changes, written_at) for one in error.violations]
            return None
        return json.dumps(found.model_dump(mode="json"), sort_keys=True)


def found_at(violation: Violation, changes: Settings, written_at: Mapping[str, str]) -> Violation:
    """What is wrong with a spec that was changed, found where the change was written."""
    for path in sorted(written_at, key=len, reverse=True):
        for prefix in ("/" + path.replace(".", "/"), f"/set/{path}"):
            if violation.pointer == prefix and violation.code == "unknown_field":  # whatever the value
                where = written_at[path][: written_at[path].index(path) + len(path)]
                return Violation(where, violation.code, violation.detail, path)
            if violation.pointer == prefix or violation.pointer.startswith(prefix + "/"):
                where = written_at[path] + violation.pointer[len(prefix) :]
                return Violation(where, violation.code, violation.detail, violation.value)
    told = ", ".join(f"{path}={json.dumps(value)[:60]}" for path, value in changes.items())
    return Violation("/spec" + violation.pointer, violation.code, f"{violation.detail} (with {told})", violation.value)


def _check_arms(question: Question, check: _Check) -> None:
    grid, tune = question.spec.grid, question.spec.tune
    seen: dict[str, int] = {}
    for arm, places in zip(question.arms, _places("grid", grid), strict=True):
        text = check.normalised(arm.settings, places)
        if text is not None and seen.setdefault(text, arm.index) != arm.index:
            detail = f"arms {seen[text]} and {arm.index} are the same: leave one of the values out"
            check.violations.append(Violation(list(places.values())[-1], "duplicate", detail, arm.settings))
        tried: dict[str, int] = {}
        for number, (chosen, tune_places) in enumerate(zip(question.candidates, _places("tune", tune), strict=bool(tune))):
            for epochs in [rung.epochs for rung in question.rungs] + [None]:
                budget = {} if epochs is None else {"epochs": epochs}
                at = {**places, **tune_places} | ({} if epochs is None else {"epochs": "/tuning/epochs"})
                text = check.normalised({**arm.settings, **chosen, **budget}, at)
            if text is not None and tried.setdefault(text, number) != number:
                detail = f"candidates {tried[text]} and {number} are the same: leave one of the values out"
                check.violations.append(Violation(list(tune_places.values())[-1], "duplicate", detail, chosen))


def _check_space(asked: ExperimentSpec, check: _Check) -> None:
    """Each path by itself, at its ends: what several of them break together is found when it is drawn."""
    for path, one in asked.space.items():
        if isinstance(one, Choice):
            for index, value in enumerate(one.values):
                check.normalised({path: value}, {path: f"/space/{path}/values/{index}"})
        else:
            for name in ("low", "high"):
                end = getattr(one, name)
                check.normalised({path: int(end) if one.integer else end}, {path: f"/space/{path}/{name}"})


def _baseline(asked: ExperimentSpec, arms: Sequence[Arm], check: _Check) -> int:
    """The arm that is asked for; else the first with an alpha of 1, else the first. Raises InvalidSpec."""
    specs = [check.normalised(arm.settings, {}) for arm in arms]
    if asked.baseline is not None:
        wanted = check.normalised(asked.baseline, {path: f"/baseline/{path}" for path in asked.baseline})
        if check.violations:
            raise refusal(check.violations)
        if wanted not in specs:
            raise refusal([Violation("/baseline", "not_an_arm", "must be one of the arms: values of the grid, one a path", asked.baseline)])
        return specs.index(wanted)
    alphas = [json.loads(text)["loss"]["alpha"] if text is not None else None for text in specs]
    return next((index for index, alpha in enumerate(alphas) if alpha == 1.0), 0)


def variations(question: Question) -> Iterator[tuple[Settings, dict[str, str]]]:
    """What runs may be given beyond the base, each with the place where it was written: every arm, alone and with every candidate of its tuning;
    of a space every choice by itself, as its draws are not known."""
    grid, tune = question.spec.grid, question.spec.tune
    for arm, places in zip(question.arms, _places("grid", grid), strict=bool(question.arms)):
        yield arm.settings, places
        for chosen, tune_places in zip(question.candidates, _places("tune", tune), strict=bool(tune)):
            yield {**arm.settings, **chosen}, {**places, **tune_places}
    for path, one in question.spec.space.items():
        for index, value in enumerate(one.values if isinstance(one, Choice) else ()):
            yield {path: value}, {path: f"/space/{path}/values/{index}"}


def combinations(grid: Grid) -> Iterator[Settings]:
    """Every choice of one value a path, the last path fastest; one empty choice of an empty grid."""
    for values in product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _places(section: str, grid: Grid) -> Iterator[dict[str, str]]:
    """Where the values of each combination were written."""
    for indices in product(*(range(len(values)) for values in grid.values())):
        yield {path: f"/{section}/{path}/{index}" for path, index in zip(grid, indices, strict=True)}


def _default_name(base: JobSpec, paths: Sequence[str]) -> str:
    """`digits-resnet8-alpha-lr`: what the base is called, and what is varied."""
    plain = base.model_copy(update={"loss": base.loss.model_copy(update={"alpha": 1.0})})
    varied = "-".join(path.rpartition(".")[2] for path in paths) or "seeds"
    return re.sub(r"[^A-Za-z0-9._-]", "-", f"{base.name or default_name(plain)}-{varied}")[:64]
