"""The findings in one sentence, and what to keep in mind with them. Pure: both follow from the numbers and never say more than they do."""

from __future__ import annotations

import math
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from powergrad.experiments.findings import SIGNIFICANCE, ArmFindings, Difference, Evidence, Findings, RunEvidence
from powergrad.experiments.labels import differing, short, words
from powergrad.experiments.units import Unit, unit

ENDED = {"succeeded", "failed", "cancelled"}
MOST_NAMED = 3
"""Arms that one part of a sentence names; the others are counted."""
MOST_DECIMALS = 6
"""Beyond these an amount is written with an exponent."""

Compared = tuple[ArmFindings, Difference]


def sentence(findings: Findings) -> str:
    """What the numbers allow to be said, in one sentence.

    An arm is called better or worse only where Holm's p is below SIGNIFICANCE and the interval excludes 0 on that side.
    """
    said = _sentence(findings)
    if findings["finished"] and _is_open(findings):
        return f"So far ({findings['finished']} of {findings['planned']} runs): {said}"
    return _capital(said, [arm["label"] for arm in findings["arms"]])


def _capital(said: str, labels: Sequence[str]) -> str:
    """With a capital at its head; an arm's label there stays as it is: `lr = 0.1` is no word, and `α` not an A."""
    is_name = any(label and said.startswith(label) for label in labels)
    return said if is_name else said[:1].upper() + said[1:]


def cautions(evidence: Evidence, findings: Findings) -> list[str]:
    """What a reader must know to take the numbers for no more than they are. findings: all but warnings and verdict."""
    return [
        *_of_missing_runs(evidence, findings),
        *_of_early_looks(findings),
        *_of_added_seeds(evidence),
        *_of_shared_settings(evidence),
        *_of_grid_edges(evidence, findings),
        *_of_losses(evidence),
        *_of_few_seeds(findings),
        *_of_coarse_steps(findings),
        *_of_searches(findings),
    ]


@dataclass(frozen=True)
class _Amounts:
    """How differences of one metric are said: as gains, positive where the arm is better, in the unit that readers use."""

    unit: Unit
    sign: float
    planned: int
    """Seeds an arm."""

    @classmethod
    def of(cls, findings: Findings) -> _Amounts:
        return cls(unit(findings["metric"]), 1.0 if findings["direction"] == "max" else -1.0, len(findings["seeds"]))

    def seeds(self, n: int) -> str:
        """`5 seeds`, `3 of 5 seeds`."""
        return _seeds(n) if n >= self.planned else f"{n} of {self.planned} seeds"

    def gain(self, stored: float) -> float:
        """Huge values stay finite."""
        return max(-sys.float_info.max, min(sys.float_info.max, self.sign * stored * self.unit.scale))

    def ends(self, low: float, high: float) -> tuple[float, float]:
        """The interval's ends as gains, the worse first."""
        worse, better = sorted((self.gain(low), self.gain(high)))
        return worse, better

    def told(self, gain: float, digits: str) -> str:
        """`1.4 points`, without its direction."""
        return f"{abs(gain):{digits}} {self.unit.of_difference}".rstrip()

    def towards(self, gain: float, digits: str) -> str:
        """`1.4 points better`."""
        return f"{self.told(gain, digits)} {'better' if gain > 0 else 'worse'}"

    def digits(self, half_width: float, *nonzero: float) -> str:
        """A format that shows the first digit in which the interval leaves doubt, and none of `nonzero` as 0."""
        smallest = min((abs(value) for value in (half_width, *nonzero) if value), default=1.0)
        decimals = max(1 if self.unit.of_difference == "points" else 0, -math.floor(math.log10(smallest)))
        return f".{decimals}f" if decimals <= MOST_DECIMALS and abs(half_width) < 1e6 else ".2g"


def _sentence(findings: Findings) -> str:
    if not findings["finished"]:
        return _nothing_finished(findings)
    if findings["baseline"] is None or findings["strategy"] != "grid":
        return _of_a_search(findings)
    compared = [(arm, arm["difference"]) for arm in findings["arms"] if arm["difference"] is not None]
    baseline = next(arm for arm in findings["arms"] if arm["index"] == findings["baseline"])
    if not compared:
        return f"one arm, nothing to compare it with: {_score(baseline, findings['metric'])}"
    amounts = _Amounts.of(findings)
    if all(difference["conclusion"] == "too_few" for _, difference in compared):
        return _too_few(compared, baseline["label"], amounts)
    if len(compared) == 1:
        return _of_one(compared[0], baseline["label"], amounts, findings["metric"])
    return _of_several(compared, baseline["label"], amounts)


def _is_open(findings: Findings) -> bool:
    states = _states(findings)
    ended = ENDED | {"paused"} if findings["strategy"] == "asha" else ENDED  # who is behind is paused for good
    return sum(states.values()) < findings["planned"] or bool(states.keys() - ended)


def _states(findings: Findings) -> Counter[str]:
    total: Counter[str] = Counter()
    for arm in findings["arms"]:
        total.update(arm["counts"])
    return total


def _nothing_finished(findings: Findings) -> str:
    if _is_open(findings):
        return "no run has finished yet"
    ends = ", ".join(f"{count} {state}" for state, count in sorted(_states(findings).items()))
    return f"nothing can be said: no run ended with a finite {findings['metric']}" + (f" ({ends})" if ends else "")


def _of_a_search(findings: Findings) -> str:
    tried = len(findings["arms"])
    best = next((arm for arm in findings["arms"] if arm["index"] == findings["best"]), None)
    if best is None:
        return f"none of {tried} settings is best: the highest scores are equal"
    return (
        f"{best['label']} scored best of {tried} settings, {_score(best, findings['metric'])}; "
        "the same runs chose it and measured it, so only fresh runs can tell how good it is"
    )


def _score(arm: ArmFindings, metric: str) -> str:
    """`val_top1 91.23 % (95 % CI 90.9 to 91.5, 5 seeds)`."""
    estimate, shown = arm["metrics"][metric], unit(metric)
    interval = f"95 % CI {shown.value(estimate['low'])} to {shown.value(estimate['high'])}, " if estimate["low"] is not None else ""
    return f"{metric} {shown.value(estimate['mean'])} {shown.name}".rstrip() + f" ({interval}{_seeds(estimate['n'])})"


def _too_few(compared: Sequence[Compared], baseline: str, amounts: _Amounts) -> str:
    seen = [(arm["label"], amounts.gain(difference["mean"])) for arm, difference in compared if difference["mean"] is not None]
    if not seen:
        other = compared[0][0]["label"] if len(compared) == 1 else "any other arm"
        return f"nothing can be compared: no seed was finished by both {baseline} and {other}"
    told = [
        f"{label} was {amounts.towards(gain, amounts.digits(0.0, gain))}" if gain else f"{label} was no different" for label, gain in seen
    ]
    return f"one seed says nothing about chance: on it, against {baseline}, {_listed(told)}"


def _of_one(one: Compared, baseline: str, amounts: _Amounts, metric: str) -> str:
    arm, difference = one
    if difference["conclusion"] in {"better", "worse"}:
        return f"{arm['label']} is {difference['conclusion']} than {baseline} by {_claim(difference, amounts, 'p')}"
    if difference["conclusion"] == "identical":
        return f"{arm['label']} and {baseline} are identical: the same {metric} on each of {difference['n']} seeds"
    seeds = (
        f"; {_seeds(difference['more_seeds'], 'more')} would probably settle it if the difference is as seen"
        if difference["more_seeds"]
        else ""
    )
    return f"no clear difference between {arm['label']} and {baseline}: {_left_open(difference, amounts)}{seeds}"


def _of_several(compared: Sequence[Compared], baseline: str, amounts: _Amounts) -> str:
    """What is settled first, the clearest gain or loss at the head of each part."""
    groups: dict[str, list[Compared]] = defaultdict(list)
    for one in sorted(compared, key=lambda one: -abs(amounts.gain(one[1]["mean"] or 0.0))):
        groups[one[1]["conclusion"]].append(one)
    claims = {
        name: _listed([f"{arm['label']} by {_claim(difference, amounts, 'Holm p')}" for arm, difference in groups[name]])
        for name in ("better", "worse")
    }
    if len(groups["worse"]) == len(compared):
        return f"{baseline}, the baseline, is best; worse than it: {claims['worse']}"
    parts = [f"{name} than {baseline}: {told}" for name, told in claims.items() if told]
    if groups["open"]:
        parts.append(f"no clear difference to {baseline}: {_listed([_range(one, amounts) for one in groups['open']])}")
    if groups["identical"]:
        parts.append(f"identical to {baseline}: {_listed([arm['label'] for arm, _ in groups['identical']])}")
    if groups["too_few"]:
        parts.append(f"too few seeds to tell: {_listed([arm['label'] for arm, _ in groups['too_few']])}")
    return "; ".join(parts)


def _claim(difference: Difference, amounts: _Amounts, p: str) -> str:
    """`1.4 points (95 % CI 0.7 to 2.1, 5 seeds, p = 0.004)`, all counted towards the side that is claimed."""
    mean, low, high = (_claimed(difference[name]) for name in ("mean", "low", "high"))
    chance = f"{p} {_p(difference['p_t_holm'])}"
    if difference["sd"] == 0:
        return f"exactly {amounts.told(gain := amounts.gain(mean), amounts.digits(0.0, gain))} on each of {difference['n']} seeds ({chance}, by the signs alone)"
    near, far = sorted(abs(end) for end in amounts.ends(low, high))
    digits = amounts.digits(far / 2 - near / 2, near)
    return f"{amounts.told(amounts.gain(mean), digits)} (95 % CI {near:{digits}} to {far:{digits}}, {amounts.seeds(difference['n'])}, {chance})"


def _claimed(value: float | None) -> float:
    assert value is not None  # no claim is made without mean and interval
    return value


def _left_open(difference: Difference, amounts: _Amounts) -> str:
    low, high, n = difference["low"], difference["high"], difference["n"]
    chance = f"p {_p(difference['p_t_holm'])}"
    if low is None or high is None:
        return f"{n} seeds with the same difference are too few to exclude chance ({chance})"
    worse, better = amounts.ends(low, high)
    digits = amounts.digits(better / 2 - worse / 2)
    if f"{-worse:{digits}}" == f"{better:{digits}}":
        return f"up to {amounts.told(better, digits)} either way cannot be excluded (95 % CI, {amounts.seeds(n)}, {chance})"
    return f"from {_span(worse, better, amounts)} cannot be excluded (95 % CI, {amounts.seeds(n)}, {chance})"


def _range(one: Compared, amounts: _Amounts) -> str:
    arm, difference = one
    low, high = difference["low"], difference["high"]
    if low is None or high is None:
        return f"{arm['label']} (the same difference on {difference['n']} seeds)"
    alone = f" if it were the only arm, Holm p {_p(difference['p_t_holm'])}" if not low <= 0 <= high else ""
    more = f", about {_seeds(difference['more_seeds'], 'more')} to tell" if difference["more_seeds"] else ""
    return f"{arm['label']} ({_span(*amounts.ends(low, high), amounts)}{alone}{more})"


def _span(worse: float, better: float, amounts: _Amounts) -> str:
    """`0.3 points worse to 0.5 points better`, `0.1 to 0.9 points better`."""
    digits = amounts.digits(better / 2 - worse / 2, worse, better)
    if worse < 0 < better:
        return f"{amounts.towards(worse, digits)} to {amounts.towards(better, digits)}"
    near, far = sorted((worse, better), key=abs)
    return f"{abs(near):{digits}} to {amounts.towards(far, digits)}"


def _p(p: float | None) -> str:
    """`= 0.004`; enough digits to tell on which side of SIGNIFICANCE it is."""
    if p is None:
        return "unknown"
    if p < 0.001:
        return "< 0.001"
    digits = next(digits for digits in range(3, 18) if p == SIGNIFICANCE or float(f"{p:.{digits}f}") != SIGNIFICANCE)
    return f"= {p:.{digits}f}" if digits > 3 or p < 0.1 else f"= {p:.2f}"


def _seeds(n: int, more: str = "") -> str:
    return f"{n} {more + ' ' if more else ''}seed{'' if n == 1 else 's'}"


def _listed(parts: Sequence[str]) -> str:
    """`a, b and c`, or `a, b, c and 7 more`."""
    named = [*parts] if len(parts) <= MOST_NAMED else [*parts[:MOST_NAMED], f"{len(parts) - MOST_NAMED} more"]
    return " and ".join(part for part in (", ".join(named[:-1]), *named[-1:]) if part)


def _of_missing_runs(evidence: Evidence, findings: Findings) -> list[str]:
    """One caution an arm that lost runs; of a search one for all its settings."""
    if evidence["strategy"] != "grid":
        return _of_lost_settings(evidence, findings)
    told = []
    for arm in findings["arms"]:
        if lost := _lost(evidence, arm["index"]):
            reasons = "; ".join(f"{why} on seed{'' if len(seeds) == 1 else 's'} {_all_of(seeds)}" for why, seeds in lost.items())
            told.append(f"{arm['label']} lacks results: {reasons}. {_effect_of_loss(arm, findings)}")
    return told


def _of_lost_settings(evidence: Evidence, findings: Findings) -> list[str]:
    """With the first jobs of each reason, to look at."""
    lost: dict[str, list[str]] = defaultdict(list)
    for run in evidence["runs"]:
        if reason := _why_lost(run, evidence):
            lost[reason].append(run["job"])
    if not lost:
        return []
    reasons = "; ".join(f"{len(some)} {why} ({_listed(some)})" for why, some in sorted(lost.items(), key=lambda one: -len(one[1])))
    n = sum(map(len, lost.values()))
    return [f"{n} of {len(findings['arms'])} settings gave no result: {reasons}. Nothing can be said of {'it' if n == 1 else 'them'}."]


def _lost(evidence: Evidence, arm: int) -> dict[str, list[int]]:
    """Seeds that ended and do not count, by the reason."""
    why: dict[int, str | None] = {}
    for run in sorted(evidence["runs"], key=lambda run: run["seed"]):
        if run["arm"] == arm and why.get(run["seed"], "") is not None:
            why[run["seed"]] = _why_lost(run, evidence)
    lost: dict[str, list[int]] = defaultdict(list)
    for seed, reason in why.items():
        if reason:
            lost[reason].append(seed)
    return lost


def _why_lost(run: RunEvidence, evidence: Evidence) -> str | None:
    """None: it counts. Empty: it has not ended, or was not needed."""
    value = run["final"].get(evidence["metric"])
    if run["state"] == "succeeded":
        return None if value is not None and math.isfinite(value) else f"no finite {evidence['metric']}"
    if run["state"] == "failed":
        return (run["reason"] or "failed").replace("_", " ")
    return "cancelled" if run["state"] == "cancelled" and evidence["strategy"] == "grid" else ""


def _effect_of_loss(arm: ArmFindings, findings: Findings) -> str:
    if arm["metrics"][findings["metric"]]["n"] == 0:
        return "Nothing can be said of it."
    if arm["index"] == findings["baseline"]:
        return "Every arm is compared only on the seeds that the baseline survived, which flatters the baseline."
    if arm["difference"] is not None:
        return "It is compared only on the seeds that it survived, which flatters it."
    return "Its mean is that of the runs it survived, which flatters it."


def _all_of(seeds: Sequence[int]) -> str:
    return " and ".join(part for part in (", ".join(str(seed) for seed in seeds[:-1]), str(seeds[-1])) if part)


def _of_early_looks(findings: Findings) -> list[str]:
    if not _is_open(findings) or not any(arm["difference"] and arm["difference"]["n"] > 1 for arm in findings["arms"]):
        return []
    return [
        "Runs are still to come. Who looks early and often finds differences that are not there: the verdict counts once all have ended."
    ]


def _of_added_seeds(evidence: Evidence) -> list[str]:
    planned = evidence["question"].get("seeds")
    if evidence["strategy"] != "grid" or not planned or len(evidence["seeds"]) <= planned:
        return []
    why = "Who adds seeds until the answer pleases finds differences that are not there; p-values and intervals do not know of it."
    return [f"Seeds were added to the {planned} that were asked for. {why}"]


def _of_shared_settings(evidence: Evidence) -> list[str]:
    if not evidence["shared"]:
        return []
    names = _listed([words(path) for path in evidence["shared"]])
    rates = any(path.rpartition(".")[2].endswith("lr") for path in evidence["shared"])
    why = "a shared learning rate favours the arm with the larger gradients" if rates else "what suits one loss need not suit another"
    return [f"The arms differ in the loss but share an untuned {names}: {why}. Tune it for each arm to compare them at their best."]


def _of_grid_edges(evidence: Evidence, findings: Findings) -> list[str]:
    names = {arm["index"]: arm["label"] for arm in findings["arms"]}
    return [
        f"{names.get(tuning['arm'], 'An arm')}: the {words(path)} that tuning chose{_chosen(tuning['chosen'], path)} is the lowest or the highest "
        "that was tried; a better one may lie beyond."
        for tuning in evidence["tuning"]
        for path in tuning["at_edge"]
    ]


def _chosen(chosen: dict[str, object] | None, path: str) -> str:
    return f", {short(chosen[path])}," if chosen and path in chosen else ""


def _of_losses(evidence: Evidence) -> list[str]:
    if not differing(evidence["arms"], evidence["spec"]).keys() & {"loss", "loss.alpha"}:
        return []
    measured = "they are measured with the same formula, but PowerGrad Transform does not minimise it"
    return [f"Do not compare losses of different α: {measured}; a smaller α raises it even where accuracy rises."]


def _of_few_seeds(findings: Findings) -> list[str]:
    n = len(findings["seeds"])
    floor = 2.0 ** (1 - n)
    if n < 2 or floor < SIGNIFICANCE or not any(arm["difference"] for arm in findings["arms"]):
        return []
    return [f"With {n} seeds Wilcoxon's p cannot go below {floor:.4g}, whatever the difference: only Student's t can tell here."]


def _of_coarse_steps(findings: Findings) -> list[str]:
    return [
        f"{arm['label']} differs from the baseline by exactly the same on each of {difference['n']} seeds: {findings['metric']} moves in steps "
        "too coarse to show chance. Student's t has no answer then; the p-value counts signs only, and no further seeds can be named."
        for arm in findings["arms"]
        if (difference := arm["difference"]) and difference["n"] > 1 and difference["sd"] == 0 and difference["mean"]
    ]


def _of_searches(findings: Findings) -> list[str]:
    if findings["baseline"] is not None and findings["strategy"] == "grid":
        return []
    return [
        "No p-values and no intervals of differences: in a search the same runs choose and measure, and the best of many looks better than it is."
    ]
