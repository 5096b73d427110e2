"""What a search tries, and whom it sends on: against Optuna's own judgement, a literal reading of the paper, and by playing searches to the end."""

from __future__ import annotations

import heapq
import itertools
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import qmc  # type: ignore[import-untyped]

from powergrad.experiments.search import decide, draw, rungs

HERE = Path()

# --- what to try


def drawn(space: dict[str, Any], trials: int = 20, *, seed: int = 0, strategy: str = "random") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = draw({"space": space, "trials": trials, "seed": seed, "strategy": strategy}, HERE)["trials"]
    return found


SPACE: dict[str, Any] = {
    "optimizer.lr": {"low": 1e-3, "high": 1.0, "log": True, "integer": False, "step": None},
    "loss.alpha": {"low": 0, "high": 1, "step": 0.1},
    "schedule.warmup_epochs": {"low": 0, "high": 9, "integer": True, "step": 3},
    "data.batch_size": {"low": 16, "high": 512, "integer": True, "log": True},
    "clip": {"values": [None, {"mode": "agc", "value": 0.01}, "off", 3, [1, 2]]},
}


def test_the_same_seed_draws_the_same_settings_and_another_seed_others() -> None:
    assert drawn(SPACE) == drawn(SPACE, strategy="asha") == drawn(dict(reversed(SPACE.items())))
    assert drawn(SPACE) != drawn(SPACE, seed=1)


def test_what_is_drawn_goes_through_json_and_lies_where_it_may() -> None:
    trials = drawn(SPACE, 200)
    assert json.loads(json.dumps(trials, allow_nan=False)) == trials
    assert len(trials) == 200
    for trial in trials:
        assert set(trial) == set(SPACE)
        assert 1e-3 <= trial["optimizer.lr"] <= 1.0
        assert trial["loss.alpha"] in [round(0.1 * i, 1) for i in range(11)], "a multiple, as people write it"
        assert trial["schedule.warmup_epochs"] in (0, 3, 6, 9)
        assert isinstance(trial["data.batch_size"], int)
        assert 16 <= trial["data.batch_size"] <= 512
        assert trial["clip"] in SPACE["clip"]["values"]
    assert {json.dumps(trial["clip"]) for trial in trials} == {json.dumps(value) for value in SPACE["clip"]["values"]}


def test_a_logarithmic_range_is_drawn_evenly_by_its_logarithm() -> None:
    rates = [trial["optimizer.lr"] for trial in drawn(SPACE, 90)]
    decades = [sum(10.0**k <= rate < 10.0 ** (k + 1) for rate in rates) for k in (-3, -2, -1)]
    assert all(25 <= found <= 35 for found in decades), decades  # 30 each; independent draws would miss by 4.5


def test_the_global_generators_are_left_alone() -> None:
    random.seed(1)
    np.random.seed(1)  # the very state that must not move
    before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    drawn(SPACE)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # type: ignore[index]


@pytest.mark.parametrize(("axes", "trials"), [(2, 20), (3, 20), (4, 60)])
def test_the_draws_leave_smaller_gaps_than_independent_ones(axes: int, trials: int) -> None:
    """Every one of ten seeds is better than the mean of independent draws by half at least; the mean is a fifth of theirs."""
    space = {f"x{i}": {"low": 0.0, "high": 1.0} for i in range(axes)}
    ours = [qmc.discrepancy(np.array([[*trial.values()] for trial in drawn(space, trials, seed=seed)])) for seed in range(10)]
    theirs = np.mean([qmc.discrepancy(np.random.default_rng(seed).random((trials, axes))) for seed in range(100)])
    assert max(ours) < theirs / 2
    assert np.mean(ours) < theirs / 4


SMALL: dict[str, Any] = {
    "a": {"values": [1, 2, 2, {"x": 1}]},
    "b": {"low": 0, "high": 1, "step": 0.3},
    "c": {"low": 0.5, "high": 4.2, "integer": True},
    "d": {"low": 7, "high": 7},
}
"""3 × 4 × 4 × 1 settings: the second 2 is the first, 0.9 is the last multiple, 1 to 4 are whole."""


@pytest.mark.parametrize("trials", [1, 20, 24, 25, 48, 49, 500])
def test_of_a_small_space_no_setting_is_drawn_twice_and_none_is_left_out(trials: int) -> None:
    found = draw({"space": SMALL, "trials": trials, "seed": 3, "strategy": "random"}, HERE)
    assert found["exist"] == 48
    assert len(found["trials"]) == min(trials, 48)
    allowed = [
        dict(zip("abcd", values, strict=True)) for values in itertools.product([1, 2, {"x": 1}], [0.0, 0.3, 0.6, 0.9], [1, 2, 3, 4], [7])
    ]
    assert all(trial in allowed for trial in found["trials"])
    assert len({json.dumps(trial, sort_keys=True) for trial in found["trials"]}) == len(found["trials"])


def test_a_space_dealt_out_is_dealt_in_an_order_that_the_seed_decides() -> None:
    orders = [drawn(SMALL, 48, seed=seed) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_a_range_without_six_digits_of_room_gives_what_it_has() -> None:
    found = draw({"space": {"x": {"low": 1.0, "high": 1.00001}}, "trials": 30, "seed": 0, "strategy": "random"}, HERE)
    assert sorted(trial["x"] for trial in found["trials"]) == [1.0, 1.00001]
    assert found["exist"] is None


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"values": []}, r"space\.x\.values is empty"),
        ({"low": 2, "high": 1}, r"space\.x: low=2 must not be above high=1"),
        ({"low": 0, "high": math.inf}, r"both must be finite"),
        ({"low": 0, "high": 1, "log": True}, r"space\.x\.low=0: must be above 0"),
        ({"low": 0.1, "high": 1, "log": True, "step": 0.1}, r"space\.x\.step=0\.1: is not for a logarithmic range"),
        ({"low": 0.2, "high": 0.8, "integer": True}, r"no whole number from 0\.2 to 0\.8"),
        ({"low": 0, "high": 8, "integer": True, "step": 0.5}, r"space\.x\.step=0\.5: must be a whole number"),
    ],
)
def test_a_place_that_holds_nothing_is_refused(place: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        drawn({"x": place})


# --- who goes on


@pytest.mark.parametrize(
    ("asked", "expected"),
    [((1, 3, 81), (1, 3, 9, 27)), ((1, 3, 82), (1, 3, 9, 27, 81)), ((2, 4, 8), (2,)), ((5, 2, 5), ()), ((3, 2, 20), (3, 6, 12))],
)
def test_rungs_lie_below_the_end(asked: tuple[int, int, int], expected: tuple[int, ...]) -> None:
    assert rungs(*asked) == expected


def trial(number: int, state: str, *values: float | None) -> dict[str, Any]:
    """values: at the rungs, as far as it has come."""
    return {"number": number, "state": state, "values": values}


def sent_on(trials: list[dict[str, Any]], *, direction: str = "max", reduction: int = 3, epochs: int = 27) -> list[tuple[int, int | None]]:
    at = rungs(1, reduction, epochs)
    told = [one | {"rungs": {str(epoch): value for epoch, value in zip(at, one["values"], strict=False)}} for one in trials]
    asked = {"direction": direction, "reduction": reduction, "min_epochs": 1, "epochs": epochs, "trials": told}
    return [(found["trial"], found["until"]) for found in decide(asked, HERE)["go_on"]]


def test_the_worked_example() -> None:
    """Seven have reached epoch 1, so the best two of them, 4 and 0, may go on: 4 has; 0 goes now, though it was the first to come.
    Three have reached epoch 3, so one of them, 2, may: it goes to epoch 9. Trial 5 failed there, and still counts."""
    trials = [
        trial(0, "held", 0.72),
        trial(1, "held", 0.50),
        trial(2, "held", 0.60, 0.81),
        trial(3, "running"),
        trial(4, "held", 0.75, 0.80),
        trial(5, "failed", 0.10, 0.20),
        trial(6, "held", 0.61),
        trial(7, "held", 0.40),
        trial(8, "queued"),
    ]
    assert sent_on(trials) == [(2, 9), (0, 3)]


def test_a_loser_is_sent_on_later_when_others_turn_out_worse() -> None:
    waiting = [
        trial(0, "held", 0.6),
        trial(1, "held", 0.5),
        trial(2, "queued"),
        trial(3, "running"),
        trial(4, "queued"),
        trial(5, "queued"),
    ]
    assert sent_on(waiting) == [], "of two, nobody is among the best third"
    third = [*waiting[:2], trial(2, "held", 0.9), *waiting[3:]]
    assert sent_on(third) == [(2, 3)]
    sixth = [*waiting[:2], trial(2, "running", 0.9), trial(3, "held", 0.1), trial(4, "failed", 0.2), trial(5, "held", 0.3)]
    assert sent_on(sixth) == [(0, 3)]


def test_lower_is_better_where_the_direction_is_min() -> None:
    trials = [trial(0, "held", 0.3), trial(1, "held", 0.1), trial(2, "held", 0.2)]
    assert (sent_on(trials, direction="min"), sent_on(trials)) == ([(1, 3)], [(0, 3)])


def test_of_equals_the_first_drawn_goes_on() -> None:
    assert sent_on([trial(number, "held", 0.5) for number in (2, 0, 1)]) == [(0, 3)]


@pytest.mark.parametrize("direction", ["max", "min"])
def test_a_value_that_was_not_finite_is_the_worst_and_never_goes_on(direction: str) -> None:
    assert sent_on([trial(0, "held", None), trial(1, "held", 0.1), trial(2, "held", None)], direction=direction) == [(1, 3)]
    assert sent_on([trial(n, "held", None) for n in range(9)], direction=direction) == [], "though nothing is left to run"


def test_after_the_last_rung_a_trial_runs_to_its_end() -> None:
    nine = [trial(n, "held", 0.1 * n, 0.1 * n, 0.1 * n) for n in range(3)]
    assert sent_on(nine) == [(2, None)]
    assert sent_on(nine, epochs=10) == [(2, None)]


def test_where_nothing_runs_the_best_of_the_highest_rung_goes_on_until_somebody_has_reached_the_end() -> None:
    two = [trial(0, "held", 0.9), trial(1, "held", 0.5, 0.6), trial(2, "held", 0.4, 0.7)]
    assert sent_on([*two, trial(3, "running"), trial(4, "queued")], reduction=4) == []
    assert sent_on([*two, trial(3, "failed")], reduction=4) == [(2, 16)]
    assert sent_on([*two, trial(3, "succeeded", 0.9, 0.9, 0.9)], reduction=5) == []
    assert sent_on([trial(0, "held", 0.9), trial(1, "failed", 0.9, 0.9), trial(2, "held", None, None)], reduction=4) == [(0, 4)]
    assert sent_on([trial(0, "failed"), trial(1, "failed", 0.1)]) == []
    assert sent_on([]) == []


def test_a_search_without_rungs_sends_nobody_on() -> None:
    assert sent_on([trial(0, "running"), trial(1, "succeeded")], epochs=1) == []


ladders = st.lists(
    st.tuples(
        st.sampled_from(["held", "held", "held", "running", "queued", "succeeded", "failed"]),
        st.lists(st.one_of(st.none(), st.integers(0, 9).map(float)), max_size=3),
    ),
    max_size=14,
)


@given(ladder=ladders, reduction=st.integers(2, 4), direction=st.sampled_from(["max", "min"]))
@settings(max_examples=400, deadline=None)
def test_whoever_goes_on_is_whom_the_papers_algorithm_names(ladder: list[Any], reduction: int, direction: str) -> None:
    """`get_job` of algorithm 2, asked until it names nobody: then it would begin a new trial."""
    trials = [trial(number, state, *values) for number, (state, values) in enumerate(ladder)]
    found = sent_on(trials, direction=direction, reduction=reduction)
    if not found or any(one["state"] in ("running", "queued", "succeeded") for one in trials):
        assert found == by_the_paper(trials, direction=direction, reduction=reduction)


def by_the_paper(trials: list[dict[str, Any]], *, direction: str, reduction: int) -> list[tuple[int, int | None]]:
    promoted = {(one["number"], k) for one in trials for k in range(len(one["values"]) - 1)}
    until = (*rungs(1, reduction, 27)[1:], None)
    found: list[tuple[int, int | None]] = []
    while (job := get_job(trials, promoted, direction=direction, reduction=reduction)) is not None:
        promoted.add(job)
        found.append((job[0], until[job[1]]))
    return found


def get_job(trials: list[dict[str, Any]], promoted: set[tuple[int, int]], *, direction: str, reduction: int) -> tuple[int, int] | None:
    for k in (2, 1, 0):
        rung = [one for one in trials if len(one["values"]) > k]

        def beats(a: dict[str, Any], b: dict[str, Any], k: int = k) -> bool:
            x, y = a["values"][k], b["values"][k]
            if x == y:
                return bool(a["number"] < b["number"])
            return x is not None and (y is None or (x > y if direction == "max" else x < y))

        ahead = {one["number"]: sum(beats(other, one) for other in rung if other is not one) for one in rung}
        candidates = [one for one in rung if ahead[one["number"]] < len(rung) // reduction]
        for candidate in sorted(candidates, key=lambda one: ahead[one["number"]]):
            can_run = candidate["state"] == "held" and candidate["values"][k] is not None
            if can_run and (candidate["number"], k) not in promoted:
                return candidate["number"], k
    return None


@given(values=st.lists(st.integers(0, 1000), min_size=1, max_size=30, unique=True), reduction=st.integers(2, 4))
@settings(max_examples=100, deadline=None)
def test_whom_optunas_pruner_lets_through_goes_on_and_others_may_later(values: list[int], reduction: int) -> None:
    """It judges each as it comes, and lets one of too few through: from `reduction` trials on, the two agree on whoever comes."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=reduction)
    study = optuna.create_study(direction="maximize", pruner=pruner)
    let_through: set[int] = set()
    for number, value in enumerate(values):
        asked = study.ask()
        asked.report(float(value), 1)
        goes_on = not asked.should_prune()
        study.tell(asked, state=optuna.trial.TrialState.PRUNED)
        so_far = [trial(n, "held", float(v)) for n, v in enumerate(values[: number + 1])]
        ours = {n for n, _ in sent_on([*so_far, trial(99, "running")], reduction=reduction)}
        if number + 1 >= reduction:
            assert (number in ours) == goes_on
            let_through |= {number} if goes_on else set()
    if let_through:
        assert max(values) in {values[n] for n in ours}, "the best of all is among them, whenever it came"


# --- searches played to their end


@dataclass
class Study:
    """Workers that train by a curve, and a search that steers them: one epoch takes a trial's own time."""

    curve: Callable[[int, int], float | None]
    """Of a trial at an epoch."""
    trials: int
    epochs: int = 27
    reduction: int = 3
    workers: int = 4
    spent: int = 0
    states: dict[int, str] = field(default_factory=dict)
    rungs: dict[int, dict[str, float | None]] = field(default_factory=dict)

    def play(self) -> None:
        at = rungs(1, self.reduction, self.epochs)
        self.states, self.rungs = dict.fromkeys(range(self.trials), "queued"), {n: {} for n in range(self.trials)}
        waiting: list[tuple[int, int | None]] = [(n, at[0] if at else None) for n in range(self.trials)]
        heapq.heapify(waiting)  # a trial sent on keeps its place: the first drawn comes first
        busy: list[tuple[float, int, int]] = []
        now, reached = 0.0, dict.fromkeys(range(self.trials), 0)
        while waiting or busy:
            while waiting and len(busy) < self.workers:
                number, until = heapq.heappop(waiting)
                self.states[number] = "running"
                epochs = (until or self.epochs) - reached[number]
                self.spent += epochs
                heapq.heappush(busy, (now + epochs * (1 + 0.1 * (number % 7)), number, until or self.epochs))
            now, number, epoch = heapq.heappop(busy)
            reached[number] = epoch
            self.states[number] = "succeeded" if epoch == self.epochs else "held"
            if epoch in at:
                self.rungs[number][str(epoch)] = self.curve(number, epoch)
            for found in self.decided():
                assert self.states[found["trial"]] == "held"
                self.states[found["trial"]] = "queued"
                heapq.heappush(waiting, (found["trial"], found["until"]))

    def decided(self) -> list[dict[str, Any]]:
        trials = [{"number": n, "state": self.states[n], "rungs": self.rungs[n]} for n in self.states]
        asked = {"direction": "max", "reduction": self.reduction, "min_epochs": 1, "epochs": self.epochs, "trials": trials}
        found: list[dict[str, Any]] = decide(json.loads(json.dumps(asked)), HERE)["go_on"]
        return found

    @property
    def finished(self) -> list[int]:
        return [number for number, state in self.states.items() if state == "succeeded"]


@pytest.mark.parametrize("seed", range(6))
def test_a_search_finds_a_near_best_with_a_fifth_of_the_epochs(seed: int) -> None:
    """Accuracy falls with the distance from the best rate and α, noise of a point on top; a high rate is fast at first and worse in the end."""
    tried = drawn({"lr": {"low": 1e-3, "high": 1.0, "log": True}, "alpha": {"low": 0.0, "high": 1.0}}, 60, seed=seed, strategy="asha")
    noise = np.random.default_rng(seed).normal(0.0, 0.01, (60, 28))

    def final(number: int) -> float:
        rate, alpha = math.log10(tried[number]["lr"]) + 1.3, tried[number]["alpha"] - 0.4
        return float(0.9 - 0.08 * rate**2 - 0.25 * alpha**2)

    def curve(number: int, epoch: int) -> float:
        pace = 3.0 - math.log10(tried[number]["lr"])
        return final(number) * (1.0 - math.exp(-2.0 * epoch / pace)) + float(noise[number, epoch])

    study = Study(curve, 60)
    study.play()
    finals = sorted((final(number) for number in range(60)), reverse=True)
    best = max(study.finished, key=final)
    print(
        f"{finals[0] - final(best):.4f} below the best of 60, {study.spent / (60 * 27):.1%} of the epochs, {len(study.finished)} to the end"
    )
    assert finals[0] - final(best) < 0.02, "twice the noise"
    assert study.spent < 0.2 * 60 * 27


@pytest.mark.parametrize("trials", [1, 2, 3, 4, 8, 9, 27, 40])
@pytest.mark.parametrize("workers", [1, 5, 100])
def test_however_few_trials_there_are_one_reaches_the_end(trials: int, workers: int) -> None:
    study = Study(lambda number, epoch: number * 0.01 + epoch * 0.001, trials, workers=workers)
    study.play()
    assert trials - 1 in study.finished
    assert set(study.states.values()) <= {"succeeded", "held"}
    assert study.decided() == [], "and then it rests"


def test_one_worker_and_many_send_on_the_same_trials_where_the_best_come_last() -> None:
    """The rule depends on who has come, not on when: without surprises all orders end alike."""
    ends = []
    for workers in (1, 3, 27):
        study = Study(lambda number, _: float(number), 27, workers=workers)
        study.play()
        ends.append(26 in study.finished and "9" in study.rungs[26])
    assert ends == [True, True, True]
