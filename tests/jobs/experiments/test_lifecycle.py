"""An experiment from its submission to its end, over both databases: every run made once, whatever users and crashes do to it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from sqlalchemy import func, select

from powergrad.jobs import lifecycle as job_moves
from powergrad.jobs import quotas, sweeps
from powergrad.jobs.errors import ExperimentNotFound, IdempotencyMismatch, IllegalMove, InvalidSpec, QuotaExceeded
from powergrad.jobs.experiments import lifecycle
from powergrad.jobs.experiments.lifecycle import NewExperiment
from powergrad.jobs.states import JobState, Outcome
from powergrad.jobs.store import Store
from powergrad.jobs.tables import deletions, experiment_news, experiment_runs, experiments, idempotency_keys, jobs
from tests.jobs import builders as b
from tests.jobs.experiments import builders as e
from tests.stores import FakeClock

TUNED: dict[str, Any] = {"tune": {"optimizer.lr": [0.05, 0.1, 0.2, 0.4]}, "tuning": {"halving": 2}}


def count(store: Store, table: Any) -> int:
    with store.read() as tx:
        return int(tx.run(select(func.count()).select_from(table)).scalar_one())


def test_one_submission_makes_a_run_for_every_arm_and_seed(store: Store) -> None:
    experiment_id = e.submit(store, seeds=3, labels={"team": "vision"}, name="alphas")
    made = e.runs(store, experiment_id)
    assert [(run.arm, run.seed) for run in made] == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]
    assert [run.spec["loss"]["alpha"] for run in made] == [1.0, 0.5] * 3
    assert [run.spec["seed"] for run in made] == [0, 0, 1, 1, 2, 2]
    assert made[3].spec["labels"] == {"team": "vision", "experiment": experiment_id, "arm": "1", "seed": "1", "stage": "verdict"}
    assert made[3].name == "alphas-a1-s1"
    assert {b.row(store, run.job_id).experiment for run in made} == {experiment_id}
    shown = e.get(store, experiment_id)
    assert (shown["state"], shown["counts"], shown["stage"]) == ("queued", {"queued": 6}, "verdict")


def test_runs_are_claimed_in_the_order_in_which_pairs_come_early(store: Store) -> None:
    experiment_id = e.submit(store, seeds=3)
    claimed = [b.claimed(store).run.job_id for _ in range(6)]
    assert claimed == [run.job_id for run in e.runs(store, experiment_id)]


def test_the_same_key_is_the_same_experiment(store: Store) -> None:
    first = e.submit(store, key="k", sha="1")
    again = b.do(store, lifecycle.submit, NewExperiment(e.question(), idempotency_key="k", body_sha256="1"))
    assert again == lifecycle.Submitted(first, replayed=True)
    assert (count(store, experiments), count(store, jobs)) == (1, 4)
    with pytest.raises(IdempotencyMismatch):
        e.submit(store, key="k", sha="2")


def test_the_key_of_a_job_is_no_key_of_an_experiment(store: Store) -> None:
    b.submit(store, key="k", body="1")
    with pytest.raises(IdempotencyMismatch):
        e.submit(store, key="k", sha="1")


def test_a_submission_beyond_the_quota_leaves_nothing_behind(store: Store) -> None:
    b.do(store, quotas.grant, "local", quotas.Quota(max_queued=3))
    with pytest.raises(QuotaExceeded):
        e.submit(store, key="k")
    assert [count(store, table) for table in (experiments, experiment_runs, jobs, idempotency_keys)] == [0, 0, 0, 0]


def test_an_unknown_data_set_is_told_where_it_was_written(store: Store) -> None:
    with pytest.raises(InvalidSpec) as error:
        e.submit(store, spec={"data": {"dataset": "mine"}})
    assert [violation.pointer for violation in error.value.violations] == ["/spec/data/dataset"]
    assert count(store, experiments) == 0


def test_it_succeeds_when_every_run_has_ended_and_one_succeeded(store: Store) -> None:
    experiment_id = e.submit(store)
    assert e.settle(store, lambda labels, _: None if labels["seed"] == "0" else 0.8) == 4
    shown = e.get(store, experiment_id)
    assert (shown["state"], shown["counts"]) == ("succeeded", {"succeeded": 2, "failed": 2})
    assert shown["progress"] == {"fraction": 1.0, "runs_done": 4, "runs": 4, "eta_s": None}
    assert shown["finished_at"] is not None


def test_it_fails_when_no_run_of_the_verdict_succeeded(store: Store) -> None:
    experiment_id = e.submit(store)
    e.settle(store, lambda *_: None)
    assert e.get(store, experiment_id)["state"] == "failed"


def test_its_state_follows_its_jobs(store: Store) -> None:
    experiment_id = e.submit(store)
    claim = b.claimed(store)
    e.advance(store)
    assert e.get(store, experiment_id)["state"] == "running"
    e.train(store, claim)
    e.advance(store)
    assert e.get(store, experiment_id)["state"] == "running"  # between two jobs it has not gone back to the queue
    for run in e.runs(store, experiment_id)[1:]:
        b.do(store, job_moves.pause, run.job_id)
    e.advance(store)
    assert e.get(store, experiment_id)["state"] == "paused"


def test_nothing_has_news_when_nothing_has_moved(store: Store) -> None:
    e.submit(store)
    e.settle(store)
    store._clock.advance(300)  # type: ignore[union-attr]  # past every analysis that nobody does here
    for _ in range(20):
        e.advance(store)
        store._clock.advance(300)  # type: ignore[union-attr]
    with store.read() as tx:
        assert not lifecycle.needs_advance(tx)
    assert count(store, experiment_news) == 0


# --- tuning


def by_rate(labels: dict[str, str], spec: dict[str, Any]) -> float:
    """α = 1 likes 0.1 and α = 0.5 likes 0.2."""
    best = 0.1 if spec["loss"]["alpha"] == 1.0 else 0.2
    return 0.9 - abs(float(spec["optimizer"]["lr"]) - best)


def test_every_arm_is_given_its_own_best_value_before_the_verdict(store: Store) -> None:
    experiment_id = e.submit(store, **TUNED)
    assert e.settle(store, by_rate) == 2 * (4 + 2) + 4
    verdict = [run for run in e.runs(store, experiment_id) if run.stage == "verdict"]
    assert Counter((run.arm, run.spec["optimizer"]["lr"]) for run in verdict) == {(0, 0.1): 2, (1, 0.2): 2}
    tuning = e.get(store, experiment_id)["tuning"]
    assert [one["chosen"] for one in tuning] == [{"optimizer.lr": 0.1}, {"optimizer.lr": 0.2}]
    assert [one["at_edge"] for one in tuning] == [[], []]
    assert [[rung["epochs"] for rung in one["rungs"]] for one in tuning] == [[1, 2], [1, 2]]


def test_tuning_never_sees_a_seed_of_the_verdict(store: Store) -> None:
    experiment_id = e.submit(store, **TUNED)
    e.settle(store, by_rate)
    b.do(store, lifecycle.add_seeds, experiment_id, 100)
    made = e.runs(store, experiment_id)
    seeds = {stage: {run.seed for run in made if run.stage == stage} for stage in ("tuning-0", "tuning-1", "verdict")}
    assert seeds["tuning-0"] == seeds["tuning-1"]
    assert not seeds["tuning-0"] & seeds["verdict"]


def test_rungs_train_anew_with_growing_budgets(store: Store) -> None:
    experiment_id = e.submit(store, **TUNED)
    e.settle(store, by_rate)
    epochs = Counter((run.stage, run.spec["epochs"]) for run in e.runs(store, experiment_id))
    assert epochs == {("tuning-0", 1): 8, ("tuning-1", 2): 4, ("verdict", 2): 4}


def test_an_arm_whose_tuning_is_done_does_not_wait_for_the_others(store: Store) -> None:
    experiment_id = e.submit(store, tune={"optimizer.lr": [0.1, 0.2]})
    claims = [b.claimed(store) for _ in range(4)]
    for claim in claims:
        if claim.spec.labels["arm"] == "1":
            e.train(store, claim, by_rate)
    e.advance(store)
    assert Counter(run.arm for run in e.runs(store, experiment_id) if run.stage == "verdict") == {1: 2}
    assert e.get(store, experiment_id)["stage"] == "tuning"


def test_failed_runs_count_as_worst(store: Store) -> None:
    experiment_id = e.submit(store, tune={"optimizer.lr": [0.1, 0.2]}, tuning={"seeds": 2})

    def score(labels: dict[str, str], spec: dict[str, Any]) -> float | None:
        rate = spec["optimizer"]["lr"]
        return None if rate == 0.2 and labels["seed"] == "1000003" else rate

    e.settle(store, score)
    tuning = e.get(store, experiment_id)["tuning"][0]
    assert tuning["chosen"] == {"optimizer.lr": 0.1}  # the other has the better mean of the runs that it survived
    assert [(one["n"], one["mean"], one["kept"]) for one in tuning["rungs"][0]["scores"]] == [(2, 0.1, True), (1, 0.2, False)]
    assert tuning["at_edge"] == ["optimizer.lr"]


def test_an_arm_whose_candidates_all_failed_has_no_verdict_and_a_warning_says_so(store: Store) -> None:
    experiment_id = e.submit(store, tune={"optimizer.lr": [0.1, 0.2]})
    e.settle(store, lambda labels, _: None if labels["arm"] == "1" else 0.5)
    shown = e.get(store, experiment_id)
    assert Counter(run.arm for run in e.runs(store, experiment_id) if run.stage == "verdict") == {0: 2}
    assert shown["state"] == "succeeded"
    assert shown["warnings"][0].startswith("Arm 1 has no verdict")


def test_an_experiment_whose_tuning_failed_altogether_has_failed(store: Store) -> None:
    experiment_id = e.submit(store, tune={"optimizer.lr": [0.1, 0.2]})
    assert e.settle(store, lambda *_: None) == 4
    assert e.get(store, experiment_id)["state"] == "failed"


def test_a_retried_run_of_a_rung_that_was_compared_changes_no_choice(store: Store) -> None:
    experiment_id = e.submit(store, tune={"optimizer.lr": [0.1, 0.2]})
    e.settle(store, lambda _, spec: None if spec["optimizer"]["lr"] == 0.2 else 0.5)
    failed = next(run for run in e.runs(store, experiment_id) if run.job_state == "failed")
    before = e.places(store, experiment_id)
    b.do(store, job_moves.retry, failed.job_id)
    assert e.settle(store, lambda *_: 0.99) == 1
    assert e.places(store, experiment_id) == before
    assert e.get(store, experiment_id)["tuning"][0]["chosen"] == {"optimizer.lr": 0.1}


# --- moves of the whole


def test_cancel_ends_all_jobs_and_makes_no_more(store: Store) -> None:
    experiment_id = e.submit(store, **TUNED)
    run = b.claimed(store).run
    assert b.do(store, lifecycle.cancel, experiment_id) == "cancelling"
    assert b.do(store, lifecycle.cancel, experiment_id) == "cancelling"
    b.finish(store, run)
    e.advance(store)
    shown = e.get(store, experiment_id)
    assert (shown["state"], shown["counts"]) == ("cancelled", {"cancelled": 8})
    assert e.settle(store) == 0
    assert b.do(store, lifecycle.cancel, experiment_id) == "cancelled"
    for move in (lifecycle.pause, lifecycle.resume):
        with pytest.raises(IllegalMove):
            b.do(store, move, experiment_id)
    with pytest.raises(IllegalMove):
        b.do(store, lifecycle.add_seeds, experiment_id, 1)


def test_a_bulk_move_is_in_every_jobs_history(store: Store) -> None:
    experiment_id = e.submit(store)
    job_id = e.runs(store, experiment_id)[0].job_id
    b.do(store, lifecycle.pause, experiment_id)
    b.do(store, lifecycle.resume, experiment_id)
    b.do(store, lifecycle.cancel, experiment_id)
    told = [(one["from"], one["to"]) for one in b.told(store, job_id, "state")]
    assert told == [("queued", "paused"), ("paused", "queued"), ("queued", "cancelling"), ("cancelling", "cancelled")]
    row = b.row(store, job_id)
    assert b.event_numbers(store, job_id) == list(range(1, row.seq + 1))
    assert row.version == 5
    assert row.finished_at is not None


def test_a_bulk_move_tells_webhooks(store: Store) -> None:
    from powergrad.jobs.tables import deliveries

    webhook = {"url": "https://example.com/hook", "events": ["job.cancelled"]}
    experiment_id = e.submit(store, spec={"webhook": webhook})
    b.do(store, lifecycle.cancel, experiment_id)
    assert count(store, deliveries) == 4


def test_pause_and_resume_of_the_whole(store: Store) -> None:
    experiment_id = e.submit(store)
    claim = b.claimed(store)
    assert b.do(store, lifecycle.pause, experiment_id) == "running"  # it writes its checkpoint
    assert b.claim(store) is None
    b.finish(store, claim.run, Outcome.STOPPED)
    e.advance(store)
    assert e.get(store, experiment_id)["state"] == "paused"
    assert b.do(store, lifecycle.resume, experiment_id) == "running"
    assert e.settle(store) == 4
    assert e.get(store, experiment_id)["state"] == "succeeded"


def test_a_job_that_was_still_pausing_at_the_resume_goes_on(store: Store) -> None:
    experiment_id = e.submit(store)
    claim = b.claimed(store)
    b.do(store, lifecycle.pause, experiment_id)
    b.do(store, lifecycle.resume, experiment_id)
    assert b.state(store, claim.run.job_id) == JobState.PAUSING
    b.finish(store, claim.run, Outcome.STOPPED)
    e.advance(store)
    assert b.state(store, claim.run.job_id) == JobState.QUEUED


def test_a_job_that_a_user_has_paused_stays_so_while_the_others_go_on(store: Store) -> None:
    experiment_id = e.submit(store)
    first = e.runs(store, experiment_id)[0].job_id
    b.do(store, job_moves.pause, first)
    assert e.settle(store) == 3
    assert e.get(store, experiment_id)["state"] == "paused"
    b.do(store, job_moves.resume, first)
    assert e.settle(store) == 1
    assert e.get(store, experiment_id)["state"] == "succeeded"


def test_a_paused_experiment_makes_no_further_runs(store: Store) -> None:
    experiment_id = e.submit(store, tune={"optimizer.lr": [0.1, 0.2]})
    claims = [b.claimed(store) for _ in range(4)]
    b.do(store, lifecycle.pause, experiment_id)
    for claim in claims:
        e.train(store, claim)
    e.advance(store)
    assert (e.get(store, experiment_id)["state"], len(e.runs(store, experiment_id))) == ("paused", 4)
    b.do(store, lifecycle.resume, experiment_id)
    assert len(e.runs(store, experiment_id)) == 8


def test_more_seeds_run_in_every_arm_with_what_tuning_chose(store: Store) -> None:
    experiment_id = e.submit(store, tune={"optimizer.lr": [0.1, 0.2]})
    e.settle(store, by_rate)
    b.do(store, lifecycle.add_seeds, experiment_id, 2)
    shown = e.get(store, experiment_id)
    assert (shown["state"], shown["finished_at"]) == ("running", None)
    assert e.settle(store, by_rate) == 4
    verdict = Counter((run.arm, run.seed, run.spec["optimizer"]["lr"]) for run in e.runs(store, experiment_id) if run.stage == "verdict")
    assert verdict == {(arm, seed, (0.1, 0.2)[arm]): 1 for arm in range(2) for seed in range(4)}
    assert e.get(store, experiment_id)["state"] == "succeeded"


@pytest.mark.parametrize("wrong", [0, -1, 249])
def test_a_count_of_seeds_has_bounds(store: Store, wrong: int) -> None:
    experiment_id = e.submit(store)
    with pytest.raises(InvalidSpec) as error:
        b.do(store, lifecycle.add_seeds, experiment_id, wrong)
    assert error.value.violations[0].pointer == "/count"


def test_an_ended_experiment_goes_with_all_that_is_stored_of_it(store: Store) -> None:
    experiment_id = e.submit(store, key="k")
    other = b.submit(store)
    with pytest.raises(IllegalMove):
        b.do(store, lifecycle.remove, experiment_id)
    b.do(store, lifecycle.cancel, experiment_id)
    b.do(store, lifecycle.remove, experiment_id)
    with pytest.raises(ExperimentNotFound):
        e.get(store, experiment_id)
    tables = (experiments, experiment_runs, experiment_news, idempotency_keys, jobs)
    assert [count(store, table) for table in tables] == [0, 0, 0, 0, 1]
    assert b.state(store, other) == JobState.QUEUED
    with store.read() as tx:
        owed = {row.path for row in tx.all(select(deletions.c.path))}
    assert f"experiments/{experiment_id}" in owed
    assert len([path for path in owed if path.startswith("jobs/")]) == 4


def test_another_owner_finds_nothing(store: Store) -> None:
    experiment_id = e.submit(store, owner="ada")
    for move in (lifecycle.cancel, lifecycle.pause, lifecycle.resume, lifecycle.remove):
        with pytest.raises(ExperimentNotFound):
            b.do(store, move, experiment_id)
    with pytest.raises(ExperimentNotFound):
        e.get(store, experiment_id)


def test_name_and_notes_can_be_changed(store: Store) -> None:
    experiment_id = e.submit(store)
    b.do(store, lifecycle.amend, experiment_id, name="other", notes="why")
    shown = e.get(store, experiment_id)
    assert (shown["name"], shown["notes"], shown["version"]) == ("other", "why", 2)


# --- moves of single jobs


def test_a_retried_jobs_new_result_is_taken_up(store: Store) -> None:
    experiment_id = e.submit(store)
    e.settle(store, lambda labels, _: None if labels["seed"] == "0" else 0.8)
    failed = [run.job_id for run in e.runs(store, experiment_id) if run.job_state == "failed"]
    for job_id in failed:
        b.do(store, job_moves.retry, job_id)
    e.advance(store)
    assert e.get(store, experiment_id)["state"] == "running"
    assert e.settle(store) == 2
    shown = e.get(store, experiment_id)
    assert (shown["state"], shown["counts"]) == ("succeeded", {"succeeded": 4})
    assert all(run.score is not None for run in e.runs(store, experiment_id))


def test_what_a_run_gave_stays_when_its_job_is_deleted_and_it_is_not_made_again(store: Store) -> None:
    experiment_id = e.submit(store)
    e.settle(store)
    before = e.places(store, experiment_id)
    for run in e.runs(store, experiment_id):
        b.do(store, job_moves.remove, run.job_id)
    assert e.settle(store) == 0
    shown = e.get(store, experiment_id)
    assert (shown["state"], shown["counts"]) == ("succeeded", {"succeeded": 4})
    assert e.places(store, experiment_id) == before
    assert {run.score for run in e.runs(store, experiment_id)} == {0.8, 0.9}


def test_a_job_that_is_deleted_before_its_end_was_seen_counts_as_deleted(store: Store) -> None:
    experiment_id = e.submit(store)
    first = e.runs(store, experiment_id)[0].job_id
    b.do(store, job_moves.cancel, first)
    b.do(store, job_moves.remove, first)
    assert e.settle(store) == 3
    shown = e.get(store, experiment_id)
    assert (shown["state"], shown["counts"]) == ("succeeded", {"succeeded": 3, "deleted": 1})


def test_an_experiment_whose_jobs_were_all_cancelled_one_by_one_is_cancelled(store: Store) -> None:
    experiment_id = e.submit(store)
    for run in e.runs(store, experiment_id):
        b.do(store, job_moves.cancel, run.job_id)
    e.advance(store)
    assert e.get(store, experiment_id)["state"] == "cancelled"


def test_jobs_do_not_expire_while_their_experiment_is_at_work(store: Store, clock: FakeClock) -> None:
    experiment_id = e.submit(store, spec={"retention": {"ttl_seconds": 10.0}})
    e.train(store, b.claimed(store))
    clock.advance(100)
    assert b.do(store, sweeps.expire) == []
    e.settle(store)
    clock.advance(100)
    assert len(b.do(store, sweeps.expire)) == 4
    e.advance(store)
    assert e.get(store, experiment_id)["counts"] == {"succeeded": 4}


# --- quotas


def test_a_later_stage_waits_for_the_quota_and_is_made_as_it_allows(store: Store, clock: FakeClock) -> None:
    experiment_id = e.submit(store, seeds=3, tune={"optimizer.lr": [0.1, 0.2]})
    b.do(store, quotas.grant, "local", quotas.Quota(max_queued=4))
    e.train_all(store)
    e.advance(store)
    assert (len(e.runs(store, experiment_id)), e.get(store, experiment_id)["state"]) == (4 + 4, "running")
    assert e.train_all(store) == 4
    e.advance(store)
    clock.advance(lifecycle.QUOTA_WAIT_MS / 1000)
    assert e.settle(store) == 2
    assert e.get(store, experiment_id)["state"] == "succeeded"


def test_a_quota_of_nothing_is_waited_for(store: Store, clock: FakeClock) -> None:
    experiment_id = e.submit(store, tune={"optimizer.lr": [0.1, 0.2]})
    e.train_all(store)
    b.do(store, quotas.grant, "local", quotas.Quota(max_queued=0))
    e.advance(store)
    clock.advance(lifecycle.QUOTA_WAIT_MS / 1000)
    with store.read() as tx:
        assert lifecycle.needs_advance(tx)
    b.do(store, lifecycle.advance)
    assert (len(e.runs(store, experiment_id)), e.get(store, experiment_id)["state"]) == (4, "running")
    b.do(store, quotas.grant, "local", quotas.Quota())
    clock.advance(lifecycle.QUOTA_WAIT_MS / 1000)
    assert e.settle(store) == 4


def test_more_seeds_than_the_quota_allows_are_refused(store: Store) -> None:
    experiment_id = e.submit(store)
    b.do(store, quotas.grant, "local", quotas.Quota(max_queued=5))
    with pytest.raises(QuotaExceeded):
        b.do(store, lifecycle.add_seeds, experiment_id, 1)
    assert len(e.get(store, experiment_id)["arms"]) == 2
    assert e.settle(store) == 4


# --- what the question refers to


def an_origin(store: Store) -> str:
    """A job that has ended with two checkpoints, the first of which is the best so far."""
    run = b.running(store)
    b.record(store, run, b.plan(), b.step(20), b.checkpoint(10, 0.5), b.checkpoint(20, 0.4))
    b.finish(store, run)
    return run.job_id


def test_every_run_starts_from_the_checkpoint_that_was_meant_at_the_submission(store: Store) -> None:
    run = b.running(store)
    b.record(store, run, b.plan(), b.step(10), b.checkpoint(10, 0.5))
    experiment_id = e.submit(
        store, spec={"model": {"name": "resnet8", "init_from": f"{run.job_id}/best"}}, tune={"optimizer.lr": [0.1, 0.2]}
    )
    b.record(store, run, b.step(20), b.checkpoint(20, 0.9))  # the best from here on
    b.finish(store, run)
    e.settle(store)
    assert {one.spec["model"]["init_from"] for one in e.runs(store, experiment_id)} == {f"{run.job_id}/step-00000010"}


def test_an_arms_own_reference_is_fixed_too(store: Store) -> None:
    origin = an_origin(store)
    experiment_id = e.submit(store, grid={"model.init_from": [None, f"{origin}/latest"]}, tune={"optimizer.lr": [0.1, 0.2]})
    e.settle(store)
    found = {(run.arm, run.stage, run.spec["model"]["init_from"]) for run in e.runs(store, experiment_id)}
    assert found == {(0, "tuning-0", None), (0, "verdict", None)} | {
        (1, stage, f"{origin}/step-00000020") for stage in ("tuning-0", "verdict")
    }


def test_runs_that_can_no_longer_be_made_are_told_and_end_it(store: Store) -> None:
    origin = an_origin(store)
    spec = {"model": {"name": "resnet8", "init_from": f"{origin}/best"}}
    experiment_id = e.submit(store, spec=spec, tune={"optimizer.lr": [0.1, 0.2]})
    e.train_all(store)
    b.do(store, job_moves.remove, origin)
    e.advance(store)
    shown = e.get(store, experiment_id)
    assert (shown["state"], len(e.runs(store, experiment_id))) == ("failed", 4)
    assert "4 runs could not be made" in shown["warnings"][0]
    assert origin in shown["warnings"][0]
