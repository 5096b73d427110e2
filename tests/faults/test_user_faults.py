"""Row 12: cancel and pause in every state, once and twice, during a checkpoint, during a take-over, with a worker alive or dead."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import psutil
import pytest

from powergrad.client import ApiError
from tests.faults.conftest import LEASE, Site, gone
from tests.faults.moments import finish, frozen, kill_all, strike, trainer_of, trainers_of, tree_of, unguarded
from tests.worker.conftest import until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400), pytest.mark.row(12)]

Action = Literal["cancel", "pause"]
ENDS: dict[Action, str] = {"cancel": "cancelled", "pause": "paused"}
CANCEL_S = 10.0
TTL_S = float(LEASE["POWERGRAD_LEASE_TTL_S"])
LOST_S = TTL_S + 5.0

actions = pytest.mark.parametrize("action", ["cancel", "pause"])
times = pytest.mark.parametrize("times", [pytest.param(1, marks=pytest.mark.long), 2])


def ask(site: Site, job_id: str, action: Action, times: int = 1) -> None:
    for _ in range(times):
        getattr(site.client, action)(job_id)


def settled(site: Site, job_id: str, action: Action, undisturbed: str, *, within_s: float) -> None:
    """The job is where the action leads, nothing of it runs, and one that was paused goes on to the same bits."""
    state = site.until_state(job_id, "cancelled", "paused", "succeeded", within_s=within_s).state
    assert state in {ENDS[action], "succeeded"}
    until(lambda: not trainers_of(site, job_id), within_s=CANCEL_S)
    if state == "paused":
        site.client.resume(job_id)
    if state != "cancelled":
        finish(site, job_id, undisturbed)
    site.check_history(job_id)


@contextmanager
def all_slots_busy(site: Site) -> Iterator[None]:
    """What is submitted within the block stays queued."""
    busy = [site.submit(epochs=500, priority=9) for _ in range(2)]
    for job_id in busy:
        trainer_of(site, job_id)
    try:
        yield
    finally:
        for job_id in busy:
            site.client.cancel(job_id)
        for job_id in busy:
            site.until_state(job_id, "cancelled")


# --- in every state


@actions
@times
def test_a_running_job(site: Site, undisturbed: str, dice: random.Random, action: Action, times: int) -> None:
    job_id = site.submit()
    strike(site, job_id, dice)
    ask(site, job_id, action, times)
    settled(site, job_id, action, undisturbed, within_s=CANCEL_S if action == "cancel" else 60.0)


def test_jobs_that_wait(site: Site, undisturbed: str) -> None:
    with all_slots_busy(site):
        cancelled, paused, both = (site.submit() for _ in range(3))
        ask(site, cancelled, "cancel", times=2)
        ask(site, paused, "pause", times=2)
        ask(site, both, "pause")
        ask(site, both, "cancel", times=2)
        assert [site.client.get(job_id).state for job_id in (cancelled, paused, both)] == ["cancelled", "paused", "cancelled"]
    settled(site, paused, "pause", undisturbed, within_s=1.0)
    for job_id in (cancelled, both):
        site.check_history(job_id)
        assert not [event for event in site.events(job_id) if event.type == "claimed"]


@times
def test_a_job_that_is_being_paused_is_cancelled(site: Site, undisturbed: str, times: int) -> None:
    job_id = site.submit(epochs=500)
    site.until_step(job_id, 3)
    with frozen(trainer_of(site, job_id)):  # or the pause might be over before the cancel comes
        site.client.pause(job_id)
        assert site.client.get(job_id).state == "pausing"
        ask(site, job_id, "cancel", times)
        settled(site, job_id, "cancel", undisturbed, within_s=CANCEL_S)


def test_what_a_state_does_not_allow_is_refused_and_changes_nothing(site: Site, undisturbed: str) -> None:
    job_id = site.submit(epochs=1)
    site.until_state(job_id, "succeeded")
    before = site.events(job_id)
    for action in ENDS:
        with pytest.raises(ApiError) as refused:
            ask(site, job_id, action)
        assert (refused.value.status, refused.value.problem["state"]) == (409, "succeeded")
    assert site.events(job_id) == before


# --- at bad moments


@actions
def test_during_a_checkpoint(site: Site, undisturbed: str, dice: random.Random, action: Action) -> None:
    job_id = site.submit()
    with frozen(in_a_checkpoint(site, job_id)):
        ask(site, job_id, action, dice.choice([1, 2]))
    settled(site, job_id, action, undisturbed, within_s=CANCEL_S if action == "cancel" else 60.0)


def in_a_checkpoint(site: Site, job_id: str) -> psutil.Process:
    """The job's trainer, stopped while a checkpoint of it is half written."""
    trainer = trainer_of(site, job_id)
    folder = site.data_dir / "jobs" / job_id / "checkpoints" / "a1"

    def is_writing() -> bool:
        return folder.exists() and any(name.startswith(".unfinished") for name in os.listdir(folder))

    def stopped() -> bool:
        if not is_writing():
            return False
        trainer.suspend()
        if is_writing():
            return True
        trainer.resume()  # it was done before the signal came: the next one
        return False

    until(stopped)
    return trainer


@pytest.mark.parametrize("action", [pytest.param("cancel", marks=pytest.mark.long), "pause"])
def test_during_a_take_over(site: Site, undisturbed: str, dice: random.Random, action: Action) -> None:
    """The worker is killed, another one starts; the user acts at some moment until the new attempt trains."""
    job_id = site.submit()
    strike(site, job_id, dice, checkpointed=True)
    kill_all(tree_of(site.the("powergrad: worker")))
    moment = dice.choice(["at once", "requeued", "claimed"])
    print(f"the user acts: {moment}")
    if moment == "requeued":
        site.until_state(job_id, "queued", "running")
    if moment == "claimed":
        until(lambda: site.client.get(job_id).attempt == 2, within_s=120.0)
    ask(site, job_id, action, dice.choice([1, 2]))
    settled(site, job_id, action, undisturbed, within_s=CANCEL_S if action == "cancel" else 120.0)


@pytest.mark.parametrize("action", ["cancel", pytest.param("pause", marks=pytest.mark.long)])
@times
def test_with_a_dead_worker(site: Site, undisturbed: str, action: Action, times: int) -> None:
    job_id = site.submit()
    site.until_step(job_id, 3)
    with unguarded(site):
        kill_all(tree_of(site.the("powergrad: worker")))
        ask(site, job_id, action, times)
        within_s = CANCEL_S if action == "cancel" else LOST_S
        assert site.until_state(job_id, "cancelled", "paused", within_s=within_s).state == ENDS[action]
    settled(site, job_id, action, undisturbed, within_s=1.0)


@pytest.mark.long
def test_a_cancel_with_a_frozen_worker(site: Site, undisturbed: str) -> None:
    job_id = site.submit(epochs=500)
    site.until_step(job_id, 3)
    trainer = trainer_of(site, job_id)
    with frozen(site.the("powergrad: worker")):
        ask(site, job_id, "cancel")
        site.until_state(job_id, "cancelled", within_s=CANCEL_S)
        until(lambda: gone(trainer), within_s=TTL_S)  # its own watchdog: nobody renews its deadline
    site.check_history(job_id)
    finish(site, site.submit(), undisturbed)


# --- on PostgreSQL


@pytest.mark.long
@actions
def test_the_bad_moments_on_postgresql(new_site: Callable[..., Site], undisturbed: str, dice: random.Random, action: Action) -> None:
    site = new_site(database="postgresql")
    for test in (test_during_a_take_over, test_during_a_checkpoint):
        test(site, undisturbed, dice, action)
    for times in (1, 2):
        test_a_running_job(site, undisturbed, dice, action, times)
        test_with_a_dead_worker(site, undisturbed, action, times)
