"""Sweepers, users and workers at the same moment: nobody waits in a circle, and no run is made twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from sqlalchemy import update

from powergrad.jobs import lifecycle as job_moves
from powergrad.jobs import sweeps
from powergrad.jobs.artifacts import Artifacts
from powergrad.jobs.claims import Claim, Offer
from powergrad.jobs.errors import Fenced, IllegalMove
from powergrad.jobs.experiments import lifecycle
from powergrad.jobs.states import JobState
from powergrad.jobs.store import Store
from powergrad.jobs.sweeper import advance_experiments
from powergrad.jobs.tables import experiments
from tests.jobs import builders as b
from tests.jobs.experiments import builders as e


def advancing(store: Store) -> Callable[[], None]:
    def work() -> None:
        for _ in range(10):
            b.do(store, lifecycle.advance)
            b.do(store, sweeps.sweep)

    return work


def test_many_who_look_at_once_make_each_run_once(store: Store) -> None:
    experiment_id = e.submit(store, tune={"optimizer.lr": [0.1, 0.2]})
    e.train_all(store)
    b.at_once([advancing(store) for _ in range(6)])
    e.settle(store)
    assert Counter(e.places(store, experiment_id)).most_common(1)[0][1] == 1
    assert len(e.runs(store, experiment_id)) == 8
    assert e.get(store, experiment_id)["state"] == "succeeded"


def test_one_key_sent_many_times_at_once_is_one_experiment(store: Store) -> None:
    ids = b.at_once([lambda: e.submit(store, key="k", sha="1") for _ in range(6)])
    assert len(set(ids)) == 1
    assert len(e.runs(store, ids[0])) == 4


def test_workers_users_and_sweepers_at_once_leave_it_whole(store: Store) -> None:
    experiment_id = e.submit(store, seeds=6, tune={"optimizer.lr": [0.1, 0.2]})

    def work() -> None:
        for _ in range(8):
            claim = b.claim(store)
            if claim is not None:
                with suppress(Fenced):
                    e.train(store, claim)

    def use() -> None:
        for move in (lifecycle.pause, lifecycle.resume, lifecycle.pause, lifecycle.resume):
            with suppress(IllegalMove):  # the workers may have brought it to its end
                b.do(store, move, experiment_id)
            for run in e.runs(store, experiment_id)[:3]:
                with suppress(IllegalMove):
                    b.do(store, job_moves.pause, run.job_id)
                with suppress(IllegalMove):
                    b.do(store, job_moves.resume, run.job_id)

    b.at_once([work, work, use, advancing(store), advancing(store)])
    with suppress(IllegalMove):
        b.do(store, lifecycle.resume, experiment_id)
    e.settle(store)
    for run in e.runs(store, experiment_id):
        with suppress(IllegalMove):  # paused by its user after the last resume of the whole
            b.do(store, job_moves.resume, run.job_id)
    e.settle(store)
    shown = e.get(store, experiment_id)
    assert (shown["state"], shown["counts"]) == ("succeeded", {"succeeded": 4 + 12})


def test_a_cancel_of_the_whole_and_ends_of_its_jobs_at_once(store: Store) -> None:
    experiment_id = e.submit(store, seeds=5, tune={"optimizer.lr": [0.1, 0.2]})
    claims = [b.claimed(store) for _ in range(4)]

    def end(claim: Claim) -> Callable[[], None]:
        def work() -> None:
            with suppress(Fenced):
                e.train(store, claim)

        return work

    b.at_once([*(end(claim) for claim in claims), lambda: _cancel(store, experiment_id), advancing(store), advancing(store)])
    e.settle(store)
    shown = e.get(store, experiment_id)
    assert shown["state"] in ("cancelled", "cancelling")
    assert e.train_all(store) == 0
    assert set(shown["counts"]) <= {"succeeded", "cancelled"}
    assert sum(shown["counts"].values()) in (4, 9, 14)  # it came before the verdict of both arms, one or none was made


def _cancel(store: Store, experiment_id: str) -> None:
    b.do(store, lifecycle.cancel, experiment_id)


def test_of_workers_that_claim_at_once_one_settles_what_all_compute_with(store: Store) -> None:
    experiment_id = e.submit(store, seeds=4)

    def claiming(threads: int) -> Callable[[], None]:
        def work() -> None:
            for _ in range(4):
                b.claim(store, Offer(worker=f"w{threads}", device="cpu", gpus=0, cpu_threads=threads))

        return work

    b.at_once([claiming(threads) for threads in (1, 2, 3, 4)])
    rows = [b.row(store, run.job_id) for run in e.runs(store, experiment_id)]
    assert len({row.resolved["cpu_threads"] for row in rows if row.state == JobState.RUNNING}) == 1


def test_an_experiment_is_deleted_while_it_is_looked_at(store: Store) -> None:
    experiment_id = e.submit(store)
    e.train_all(store)
    e.advance(store)
    for run in e.runs(store, experiment_id):
        b.do(store, job_moves.amend, run.job_id, job_moves.Amendment(notes="seen"))

    def remove() -> None:
        b.do(store, lifecycle.remove, experiment_id)

    b.at_once([advancing(store), remove, advancing(store)])
    with store.read() as tx:
        assert not lifecycle.needs_advance(tx)


def test_answers_come_while_the_experiment_is_looked_at_and_deleted(store: Store, tmp_path: Path) -> None:
    """A task's end holds the task and waits for the experiment; looking at the experiment waits for no task."""
    artifacts = Artifacts(str(tmp_path))
    ids = [e.submit(store, seeds=2) for _ in range(4)]
    e.train_all(store)

    def sweep() -> None:
        for _ in range(5):
            advance_experiments(store, artifacts, lambda: None)

    def answer() -> None:
        for _ in range(10):
            e.do_tasks_quickly(store)

    def remove() -> None:
        for experiment_id in ids[:2]:
            with suppress(IllegalMove):
                b.do(store, lifecycle.remove, experiment_id)

    advance_experiments(store, artifacts, lambda: None)
    b.at_once([sweep, sweep, answer, answer, remove])
    sweep()
    e.do_tasks_quickly(store)
    sweep()
    assert {e.get(store, one)["analysis"]["state"] for one in ids[2:]} == {"current"}
    with store.read() as tx:
        assert not lifecycle.needs_advance(tx)


def test_an_experiment_that_cannot_be_read_holds_up_no_other(store: Store, tmp_path: Path) -> None:
    broken, whole = e.submit(store), e.submit(store)
    with store.write() as tx:
        tx.run(update(experiments).where(experiments.c.id == broken).values(plan={}))
    e.train_all(store)
    advance_experiments(store, Artifacts(str(tmp_path)), lambda: None)
    assert e.get(store, whole)["state"] == "succeeded"
