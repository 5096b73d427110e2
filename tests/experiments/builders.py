"""Evidence from a table of scores: one row an arm, one column a seed. What is not under test is left plain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from powergrad.experiments.findings import (
    ArmEvidence,
    ArmFindings,
    Difference,
    Direction,
    Evidence,
    Findings,
    Moment,
    RunEvidence,
    Settings,
    Strategy,
)

ALPHAS = (1.0, 0.5, 0.25, 0.05)


def evidence(
    *scores: Sequence[float | None],
    settings: Sequence[Settings] | None = None,
    metric: str = "val_top1",
    direction: Direction = "max",
    strategy: Strategy = "grid",
    baseline: int | None = 0,
    spec: Mapping[str, Any] | None = None,
    runs: Sequence[RunEvidence] | None = None,
) -> Evidence:
    """scores: of each arm, by seed; None is a run that diverged. Arms differ in α unless `settings` says otherwise."""
    chosen = settings if settings is not None else [{"loss.alpha": ALPHAS[i] if i < len(ALPHAS) else i / 1000} for i in range(len(scores))]
    return Evidence(
        experiment="exp_1",
        name="which α",
        metric=metric,
        direction=direction,
        strategy=strategy,
        arms=[ArmEvidence(index=i, settings=one, tuned={}) for i, one in enumerate(chosen)],
        baseline=baseline,
        seeds=list(range(max((len(row) for row in scores), default=0))),
        runs=list(runs)
        if runs is not None
        else [run(arm, seed, value, metric=metric) for arm, row in enumerate(scores) for seed, value in enumerate(row)],
        tuning=[],
        shared=[],
        spec=dict(spec or {"loss": {"alpha": 1.0}, "optimizer": {"name": "sgd", "lr": 0.1}, "clip": None}),
        question={},
        provenance={},
    )


def run(
    arm: int,
    seed: int,
    value: float | None,
    *,
    metric: str = "val_top1",
    state: str | None = None,
    reason: str | None = None,
    curve: Sequence[float | None] = (),
    final: Mapping[str, float | None] | None = None,
) -> RunEvidence:
    """curve: the metric after each epoch, 10 s and 100 J apart."""
    state = state or ("failed" if value is None else "succeeded")
    return RunEvidence(
        job=f"job_{arm}_{seed}",
        arm=arm,
        seed=seed,
        state=state,
        reason=reason or ("diverged" if state == "failed" else None),
        final={metric: value, **(final or {})},
        curve=[
            Moment(step=10 * epoch, epoch=float(epoch), seconds=10.0 * epoch, joules=100.0 * epoch, value=at)
            for epoch, at in enumerate(curve, start=1)
        ],
        seconds=10.0 * len(curve),
        joules=100.0 * len(curve),
    )


def difference(findings: Findings, arm: int = 1) -> Difference:
    found = of(findings, arm)["difference"]
    assert found is not None
    return found


def of(findings: Findings, arm: int) -> ArmFindings:
    return next(one for one in findings["arms"] if one["index"] == arm)
