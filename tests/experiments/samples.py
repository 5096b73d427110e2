"""Experiments of many shapes: evidence drawn from a seed, and findings that are computed from it with scipy's plainest calls."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

from powergrad.experiments.findings import (
    ArmEvidence,
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
    Settings,
    TuningEvidence,
)

PAYLOAD = '<script>alert("1")</script>'
MARKDOWN = "[click](javascript:alert(1)) **bold** `code` | cell\n# head ~~gone~~ $x^2$ \\frac"
LONG = "a name that somebody made far too long, because a name is where all that is known of a run seems to belong " * 3

BASE_SPEC: dict[str, Any] = {
    "model": {"name": "resnet18", "norm": None},
    "data": {"dataset": "digits", "batch_size": 128},
    "loss": {"alpha": 1.0, "label_smoothing": 0.1},
    "optimizer": {"name": "sgd", "lr": 0.4},
    "epochs": 30,
}
SUCCEEDED: Callable[[int, int], str] = lambda arm, seed: "succeeded"  # noqa: E731  # a table of one line


def evidence(
    settings: Sequence[Settings],
    *,
    seeds: int = 3,
    evaluations: int = 12,
    gain: float = 0.012,
    spread: float = 0.004,
    metric: str = "val_top1",
    direction: Direction = "max",
    search: bool = False,
    state: Callable[[int, int], str] = SUCCEEDED,
    name: str = "alpha on the digits",
    tuning: Sequence[TuningEvidence] = (),
) -> Evidence:
    """Runs of every arm and seed (in a search one seed an arm): arm k is about k × gain better than the first."""
    draw = np.random.default_rng(len(settings) * 1000 + seeds)
    arms = [ArmEvidence(index=i, settings=dict(one), tuned={}) for i, one in enumerate(settings)]
    for open_tuning in tuning:
        arms[open_tuning["arm"]]["tuned"] = dict(open_tuning["chosen"] or {})
    of_arm = [0] if search else list(range(seeds))
    easy = draw.normal(0, spread, size=seeds)  # a seed that is lucky is lucky in all arms
    runs = [
        _run(
            arm,
            seed,
            state(arm, seed),
            metric,
            evaluations,
            float(0.91 + gain * arm * (1 - arm / 12) + easy[seed] + draw.normal(0, spread)),
        )
        for arm in range(len(settings))
        for seed in of_arm
    ]
    return Evidence(
        experiment="exp_01KB0000000000000000000000",
        name=name,
        metric=metric,
        direction=direction,
        strategy="asha" if search else "grid",
        arms=arms,
        baseline=None if search else 0,
        seeds=of_arm,
        runs=runs,
        tuning=list(tuning),
        shared=[] if tuning or search else ["optimizer.lr"],
        spec=BASE_SPEC,
        question={"name": name, "grid": {"loss.alpha": [1.0, 0.5]}, "seeds": seeds, "metric": metric},
        provenance={
            "created_at": "2026-03-01T09:00:00Z",
            "versions": {"powergrad": "0.1.0", "torch": "2.15.0"},
            "devices": ["CPU, 2 cores"],
            "data": {"dataset": "digits", "sha256": "7d1a0bb5"},
            "determinism": "bitwise",
        },
    )


def _run(arm: int, seed: int, state: str, metric: str, evaluations: int, score: float) -> RunEvidence:
    score = min(score, 0.9991)
    done = {"succeeded": evaluations, "running": evaluations // 2, "failed": evaluations // 3, "cancelled": evaluations // 4}.get(state, 0)
    shares = [score - 0.6 * math.exp(-4 * (i + 1) / evaluations) + 0.6 * math.exp(-4) for i in range(done)]
    values = [4 * (1 - share) for share in shares] if metric.endswith("loss") else shares
    curve = [
        Moment(step=15 * (i + 1), epoch=30.0 * (i + 1) / evaluations, seconds=2.5 * (i + 1), joules=160.0 * (i + 1), value=value)
        for i, value in enumerate(values)
    ]
    final: dict[str, float | None] = {}
    if shares:
        final = {
            "val_top1": shares[-1],
            "val_loss": 4 * (1 - shares[-1]),
            "train_top1": shares[-1] + 0.03,
            "train_loss": 3 * (1 - shares[-1]),
            "val_ece": 0.02 + 0.001 * arm,
            "images_per_s": 5321.0 + seed,
        }
    return RunEvidence(
        job=f"job_01KB{arm:04d}{seed:04d}",
        arm=arm,
        seed=seed,
        state=state,
        reason="out_of_memory" if state == "failed" else None,
        final=final,
        curve=curve,
        seconds=2.5 * done,
        joules=160.0 * done,
    )


def findings(of: Evidence, *, warnings: Sequence[str] = (), verdict: str = "") -> Findings:
    """What follows from the evidence, computed without any product code."""
    metric, baseline, sign = of["metric"], of["baseline"], 1.0 if of["direction"] == "max" else -1.0
    scores = [_scores(of, arm["index"], metric) for arm in of["arms"]]
    pairs = {} if baseline is None else {i: _paired(scores[i], scores[baseline]) for i in range(len(scores)) if i != baseline}
    p_holm = _holm({i: _p(values) for i, values in pairs.items()})
    arms = [
        ArmFindings(
            index=arm["index"],
            label=label(arm),
            settings=arm["settings"],
            tuned=arm["tuned"],
            counts=dict(Counter(run["state"] for run in of["runs"] if run["arm"] == arm["index"])),
            metrics=_metrics(of, arm["index"]),
            difference=_difference(pairs[arm["index"]], p_holm[arm["index"]], sign) if arm["index"] in pairs else None,
            convergence=None if baseline is None else _convergence(of, arm["index"], scores[baseline]),
            curve=_curve([run for run in of["runs"] if run["arm"] == arm["index"]]),
        )
        for arm in of["arms"]
    ]
    means = {arm["index"]: sign * mean for arm in arms if (mean := arm["metrics"][metric]["mean"]) is not None}
    best = max(means, key=lambda arm: means[arm]) if means and len(set(means.values())) == len(means) else None
    return Findings(
        metric=metric,
        direction=of["direction"],
        strategy=of["strategy"],
        seeds=of["seeds"],
        finished=sum(run["state"] == "succeeded" for run in of["runs"]),
        planned=len(of["runs"]),
        arms=arms,
        baseline=baseline,
        best=best,
        verdict=verdict or f"{arms[best]['label'] if best is not None else 'No arm'} has the best mean.",
        warnings=list(warnings),
        tuning=of["tuning"],
    )


def label(arm: ArmEvidence) -> str:
    return (
        ", ".join(f"{path.removeprefix('loss.').replace('alpha', 'α')} = {value}" for path, value in arm["settings"].items()) or "as given"
    )


def _scores(of: Evidence, arm: int, metric: str) -> dict[int, float]:
    return {
        run["seed"]: value
        for run in of["runs"]
        if run["arm"] == arm and run["state"] == "succeeded" and (value := run["final"].get(metric)) is not None
    }


def _paired(arm: Mapping[int, float], baseline: Mapping[int, float]) -> list[float]:
    return [arm[seed] - baseline[seed] for seed in sorted(arm.keys() & baseline.keys())]


def _estimate(values: Sequence[float]) -> Estimate:
    n = len(values)
    mean = float(np.mean(values)) if n else None
    if n < 2:
        return Estimate(n=n, mean=mean, sd=None, low=None, high=None, boot_low=None, boot_high=None)
    sd = float(np.std(values, ddof=1))
    half = float(stats.t.ppf(0.975, n - 1)) * sd / math.sqrt(n)
    assert mean is not None
    return Estimate(n=n, mean=mean, sd=sd, low=mean - half, high=mean + half, boot_low=mean - half / 2, boot_high=mean + half / 2)


def _p(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    return float(stats.ttest_1samp(values, 0.0).pvalue) if np.ptp(values) > 0 else float(not any(values))


def _holm(by_arm: Mapping[int, float | None]) -> dict[int, float | None]:
    known = sorted((p, arm) for arm, p in by_arm.items() if p is not None)
    adjusted: dict[int, float | None] = dict.fromkeys(by_arm)
    running = 0.0
    for rank, (p, arm) in enumerate(known):
        running = max(running, min(1.0, p * (len(known) - rank)))
        adjusted[arm] = running
    return adjusted


def _difference(values: Sequence[float], p_holm: float | None, sign: float) -> Difference:
    estimate, p = _estimate(values), _p(values)
    mean, sd = estimate["mean"], estimate["sd"]
    conclusion: Any = "open"
    if p is None or p_holm is None:
        conclusion = "too_few"
    elif not any(values):
        conclusion = "identical"
    elif p_holm < 0.05 and mean is not None:
        conclusion = "better" if sign * mean > 0 else "worse"
    return Difference(
        **estimate,
        p_t=p,
        p_wilcoxon=p,
        p_t_holm=p_holm,
        p_wilcoxon_holm=p_holm,
        effect_size=mean / sd if mean is not None and sd else None,
        detectable=2.8 * sd / math.sqrt(len(values)) if sd else None,
        more_seeds={"better": 0, "worse": 0, "identical": None, "too_few": None}.get(conclusion, 7),
        conclusion=conclusion,
    )


def _metrics(of: Evidence, arm: int) -> dict[str, Estimate]:
    names = dict.fromkeys([of["metric"], *(name for run in of["runs"] for name in run["final"])])
    found = {name: _estimate(list(_scores(of, arm, name).values())) for name in names}
    train, val = _scores(of, arm, "train_top1"), _scores(of, arm, "val_top1")
    return found | {"gap": _estimate([train[seed] - val[seed] for seed in train])}


def _convergence(of: Evidence, arm: int, baseline: Mapping[int, float]) -> Convergence:
    sign = 1.0 if of["direction"] == "max" else -1.0
    arrivals = [
        next((at for at in run["curve"] if at["value"] is not None and sign * at["value"] >= sign * baseline[run["seed"]] - 1e-12), None)
        for run in of["runs"]
        if run["arm"] == arm and run["state"] == "succeeded" and run["seed"] in baseline
    ]
    there = [at for at in arrivals if at is not None]
    return Convergence(
        target=float(np.mean(list(baseline.values()))) if baseline else None,
        reached=len(there),
        of=len(arrivals),
        epochs=_estimate([at["epoch"] for at in there]),
        seconds=_estimate([at["seconds"] or 0.0 for at in there]),
        joules=_estimate([at["joules"] or 0.0 for at in there]),
    )


def _curve(runs: Sequence[RunEvidence]) -> Curve:
    started = [run["curve"] for run in runs if run["curve"]]
    if not started:
        return Curve(epochs=[], mean=[], low=[], high=[])
    columns = list(zip(*started, strict=False))
    values = [[at["value"] for at in column if at["value"] is not None] for column in columns]
    return Curve(
        epochs=[column[0]["epoch"] for column in columns],
        mean=[float(np.mean(of_epoch)) for of_epoch in values],
        low=[min(of_epoch) for of_epoch in values],
        high=[max(of_epoch) for of_epoch in values],
    )


def tuned(arm: int, rates: Sequence[float]) -> TuningEvidence:
    """Halving over learning rates in two rungs; the highest wins, at the edge of what was tried."""
    kept = list(rates)[len(rates) // 2 :]
    return TuningEvidence(
        arm=arm,
        seeds=[1000, 1001],
        rungs=[
            {"epochs": 10, "scores": [_score(rate, arm, rate in kept) for rate in rates]},
            {"epochs": 30, "scores": [_score(rate, arm, rate == kept[-1]) for rate in kept]},
        ],
        chosen={"optimizer.lr": kept[-1]},
        at_edge=["optimizer.lr"] if arm == 0 else [],
    )


def _score(rate: float, arm: int, kept: bool) -> dict[str, Any]:
    return {"settings": {"optimizer.lr": rate}, "n": 2, "mean": 0.8 + rate / 8 + arm / 100, "sd": 0.01, "kept": kept}


def two_arms() -> Evidence:
    return evidence([{"loss.alpha": 1.0}, {"loss.alpha": 0.5}])


def six_tuned() -> Evidence:
    alphas = (1.0, 0.92, 0.5, 0.3, 0.25, 0.05)
    tuning = [tuned(arm, (0.05, 0.1, 0.2, 0.4)) for arm in range(len(alphas))]
    return evidence([{"loss.alpha": alpha} for alpha in alphas], seeds=5, tuning=tuning, gain=0.004)


def search(trials: int = 40) -> Evidence:
    draw = np.random.default_rng(7)
    settings: list[Settings] = [
        {
            "loss.alpha": round(float(draw.uniform(0.05, 1)), 3),
            "optimizer.lr": float(f"{10 ** draw.uniform(-4, 0):.3g}"),
            "optimizer.name": str(draw.choice(["sgd", "adamw", "lion"])),
            "clip": [None, {"mode": "agc", "value": 0.01}, {"mode": "norm", "value": 1.0}][int(draw.integers(3))],
        }
        for _ in range(trials)
    ]
    states = ["succeeded", "succeeded", "cancelled", "succeeded", "failed"]
    return evidence(settings, search=True, state=lambda arm, _: states[arm % 5], spread=0.02, gain=0.001)


def one_arm() -> Evidence:
    return evidence([{}], seeds=4)


def nothing_finished() -> Evidence:
    return evidence([{"loss.alpha": 1.0}, {"loss.alpha": 0.5}], state=lambda *_: "queued")


def nothing_searched() -> Evidence:
    return evidence([{"loss.alpha": 1.0, "epochs": 3}, {"loss.alpha": 0.5, "epochs": 4}], search=True, state=lambda *_: "queued")


def identical() -> Evidence:
    found = evidence([{"loss.alpha": 1.0}, {"data.workers": 0}, {"data.workers": 2}], seeds=4)
    for run in found["runs"]:
        twin = found["runs"][run["seed"]]
        run["final"], run["curve"] = dict(twin["final"]), list(twin["curve"])
    return found


def with_failures() -> Evidence:
    states = {(1, 0): "failed", (1, 2): "running", (2, 0): "failed", (2, 1): "failed", (2, 2): "failed", (0, 1): "cancelled"}
    return evidence([{"loss.alpha": alpha} for alpha in (1.0, 0.5, 0.0)], state=lambda arm, seed: states.get((arm, seed), "succeeded"))


def hostile() -> Evidence:
    """Names that a page, a table, a formula or a typesetter would act on."""
    found = evidence(
        [{"data.dataset": "=1+1"}, {"data.dataset": PAYLOAD}, {"data.dataset": MARKDOWN}, {"data.dataset": LONG}],
        name=PAYLOAD + MARKDOWN,
        state=lambda arm, seed: "failed" if (arm, seed) == (1, 1) else "succeeded",
    )
    found["spec"] = {"note": "```\n" + PAYLOAD, "data": {"dataset": "</pre><script>"}}
    found["provenance"]["devices"] = [PAYLOAD, "| a | b |"]
    found["runs"][4]["reason"] = PAYLOAD
    return found


def lower_is_better() -> Evidence:
    return evidence([{"loss.alpha": 1.0}, {"loss.label_smoothing": 0.1}], metric="val_loss", direction="min", seeds=5)


def many(arms: int, *, seeds: int = 3, evaluations: int = 12) -> Evidence:
    settings: list[Settings] = [{"loss.alpha": round(1 - arm / arms, 4), "optimizer.lr": 0.1} for arm in range(arms)]
    return evidence(settings, seeds=seeds, evaluations=evaluations, gain=0.001)


SHAPES: dict[str, Callable[[], Evidence]] = {
    shape.__name__: shape
    for shape in (
        two_arms,
        six_tuned,
        search,
        one_arm,
        nothing_finished,
        nothing_searched,
        identical,
        with_failures,
        hostile,
        lower_is_better,
    )
}
WARNINGS = (
    "optimizer.lr is the same for all arms although the loss differs: an arm may lose only because it wants another one.",
    f"2 of 6 runs have failed. {PAYLOAD}",
)
