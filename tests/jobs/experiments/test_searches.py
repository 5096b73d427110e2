"""Searches: settings drawn by a task, losers of ASHA paused with their checkpoints, and an end."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from powergrad.jobs import lifecycle as job_moves
from powergrad.jobs import tasks
from powergrad.jobs.experiments import lifecycle, searches
from powergrad.jobs.states import JobState
from powergrad.jobs.store import Store
from tests.jobs import builders as b
from tests.jobs.experiments import builders as e
from tests.stores import FakeClock

SPACE = {"optimizer.lr": {"low": 0.001, "high": 1.0, "log": True}, "loss.alpha": {"values": [1.0, 0.5]}}


def search(store: Store, strategy: str = "asha", *, trials: int = 9, epochs: int = 9, **overrides: Any) -> str:
    spec = {"epochs": epochs, **overrides.pop("spec", {})}
    return e.submit(store, strategy=strategy, space=SPACE, search={"trials": trials}, spec=spec, **overrides)


def by_rate(_labels: dict[str, str], spec: dict[str, Any]) -> float:
    """The larger the rate the better: no two are equal."""
    return 0.5 + float(spec["optimizer"]["lr"]) / 10


def settle(store: Store, root: Path, score: e.Score = by_rate) -> Counter[str]:
    """Until nothing more happens; the kinds of tasks that were done, and how many jobs were trained."""
    done: Counter[str] = Counter()
    while True:
        e.advance(store)
        kinds, trained = e.do_tasks(store, root), e.train_all(store, score)
        done.update(kinds)
        done["trained"] += trained
        if not kinds and not trained:
            return done


def test_random_search_runs_every_setting_once_with_the_first_seed(store: Store, tmp_path: Path) -> None:
    experiment_id = search(store, "random", trials=5)
    assert e.get(store, experiment_id)["state"] == "queued"
    assert e.runs(store, experiment_id) == []
    done = settle(store, tmp_path)
    assert (done["search_draw"], done["search_decide"], done["trained"]) == (1, 0, 5)
    made = e.runs(store, experiment_id)
    assert {(run.stage, run.arm, run.seed) for run in made} == {("search", number, 0) for number in range(5)}
    assert len({run.spec["optimizer"]["lr"] for run in made}) == 5
    shown = e.get(store, experiment_id)
    assert (shown["state"], shown["stage"], shown["counts"]) == ("succeeded", "search", {"succeeded": 5})
    assert [arm["settings"]["optimizer.lr"] for arm in shown["arms"]] == [run.spec["optimizer"]["lr"] for run in made]


def test_asha_sends_the_best_on_and_leaves_the_others_paused_with_their_checkpoints(store: Store, tmp_path: Path) -> None:
    experiment_id = search(store)
    settle(store, tmp_path)
    made = sorted(e.runs(store, experiment_id), key=lambda run: -float(run.spec["optimizer"]["lr"]))
    reached = [b.row(store, run.job_id).progress["epoch"] for run in made]
    assert reached[0] == 9
    assert reached == sorted(reached, reverse=True)
    assert set(reached) == {1, 3, 9}
    shown = e.get(store, experiment_id)
    assert (shown["state"], shown["counts"]["succeeded"] + shown["counts"]["paused"]) == ("succeeded", 9)
    for run in made:
        with store.read() as tx:
            from powergrad.jobs.retention import whole_checkpoints

            assert whole_checkpoints(tx, run.job_id)


def test_nothing_has_news_when_a_search_is_over(store: Store, tmp_path: Path, clock: FakeClock) -> None:
    search(store)
    settle(store, tmp_path)
    for _ in range(20):
        e.advance(store)
        clock.advance(300)
    assert settle(store, tmp_path)["trained"] == 0
    with store.read() as tx:
        assert not tasks.has_work(tx)
        assert not lifecycle.needs_advance(tx)


def test_the_first_rung_is_held_from_the_start(store: Store, tmp_path: Path) -> None:
    experiment_id = search(store)
    e.advance(store)
    assert e.do_tasks(store, tmp_path) == ["search_draw"]
    e.advance(store)
    assert {b.row(store, run.job_id).hold_epoch for run in e.runs(store, experiment_id)} == {1}


def test_a_job_that_its_user_sends_on_runs_to_its_end(store: Store, tmp_path: Path) -> None:
    experiment_id = search(store)
    settle(store, tmp_path)
    loser = next(run.job_id for run in e.runs(store, experiment_id) if run.job_state == "paused")
    b.do(store, job_moves.resume, loser)
    e.advance(store)
    assert e.get(store, experiment_id)["state"] == "running"
    settle(store, tmp_path)
    assert b.state(store, loser) == JobState.SUCCEEDED
    assert e.get(store, experiment_id)["state"] == "succeeded"


def test_a_paused_search_sends_nobody_on_until_it_is_resumed(store: Store, tmp_path: Path) -> None:
    experiment_id = search(store)
    e.advance(store)
    e.do_tasks(store, tmp_path)
    e.advance(store)
    assert e.train_all(store, by_rate, most=6) == 6
    e.advance(store)
    b.do(store, lifecycle.pause, experiment_id)
    assert settle(store, tmp_path)["trained"] == 0
    assert e.get(store, experiment_id)["state"] == "paused"
    b.do(store, lifecycle.resume, experiment_id)
    settle(store, tmp_path)
    assert e.get(store, experiment_id)["state"] == "succeeded"


def test_a_cancelled_search_ends_with_its_held_jobs(store: Store, tmp_path: Path) -> None:
    experiment_id = search(store)
    e.advance(store)
    e.do_tasks(store, tmp_path)
    e.advance(store)
    e.train_all(store, by_rate, most=4)
    e.advance(store)
    assert b.do(store, lifecycle.cancel, experiment_id) == "cancelled"
    settle(store, tmp_path)
    assert e.get(store, experiment_id)["counts"] == {"cancelled": 9}


def test_a_search_that_is_over_goes_with_the_jobs_it_left_paused(store: Store, tmp_path: Path) -> None:
    experiment_id = search(store)
    settle(store, tmp_path)
    jobs = [run.job_id for run in e.runs(store, experiment_id)]
    b.do(store, lifecycle.remove, experiment_id)
    with pytest.raises(AssertionError):
        b.row(store, jobs[0])


def test_a_search_whose_runs_all_fail_has_failed(store: Store, tmp_path: Path) -> None:
    experiment_id = search(store)
    settle(store, tmp_path, lambda *_: None)
    assert e.get(store, experiment_id)["state"] == "failed"


def test_a_draw_that_fails_is_tried_again_and_then_told(store: Store, clock: FakeClock) -> None:
    experiment_id = search(store)
    tries = 0
    while tries < 20:
        e.advance(store)
        task = b.do(store, tasks.claim, lease_s=60.0)
        if task is None and e.get(store, experiment_id)["state"] == "failed":
            break
        if task is not None:
            tries += 1
            b.do(store, tasks.fail, task, "crashed", "no memory")
        clock.advance(searches.RETRY_MS / 1000)
    assert tries == searches.MOST_TRIES
    assert "no memory" in e.get(store, experiment_id)["warnings"][0]


def test_settings_that_break_a_rule_together_are_told_and_not_run(store: Store, tmp_path: Path) -> None:
    space = {"schedule.warmup_epochs": {"values": [1, 5]}, "epochs": {"values": [9, 6, 4]}}
    experiment_id = e.submit(store, strategy="random", space=space, search={"trials": 6}, spec={"epochs": 9})
    settle(store, tmp_path)
    shown = e.get(store, experiment_id)
    assert (shown["state"], shown["counts"]) == ("succeeded", {"succeeded": 5})
    assert shown["warnings"][0].startswith("1 of 6 settings drawn break a rule together")


def test_the_evidence_of_a_search_has_no_baseline_and_an_arm_for_each_setting(store: Store, tmp_path: Path) -> None:
    from powergrad.experiments import statistics
    from powergrad.jobs.experiments import queries

    experiment_id = search(store)
    settle(store, tmp_path)
    with store.read() as tx:
        found = queries.evidence(tx, experiment_id)
    assert (found["baseline"], found["strategy"], len(found["arms"]), len(found["runs"])) == (None, "asha", 9, 9)
    assert {len(run["curve"]) for run in found["runs"]} == {1, 3, 9}
    findings = statistics.analyse(found, resamples=0)
    best = max(found["arms"], key=lambda arm: arm["settings"]["optimizer.lr"])["index"]
    assert findings["best"] == best
