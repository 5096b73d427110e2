"""The judge can fail: histories that break one rule each are caught by that very rule, and whole ones are let pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from tests.faults.history import RULES, Asked, Record, Undisturbed, judge, judge_acceptance, judge_experiment
from tests.faults.witness import Sighting, find_overlaps

EPOCHS, STEPS_PER_EPOCH = 3, 5
LAST = EPOCHS * STEPS_PER_EPOCH
JOB = "job_1"

UNDISTURBED = Undisturbed(
    state="succeeded",
    reason=None,
    series={
        "train_loss": [(step, 2.0 / step) for step in range(1, LAST + 1)],
        "val_top1": [(step, step / 100) for step in range(STEPS_PER_EPOCH, LAST + 1, STEPS_PER_EPOCH)],
    },
    weights_sha256="sha-15",
)


class Story:
    """Builds a record event by event, as a stack would write it."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.attempts: list[dict[str, Any]] = []
        self.state = "queued"
        self.say("created", state="queued", name="digits")

    def say(self, kind: str, **data: Any) -> Story:
        self.events.append({"seq": len(self.events) + 1, "at": float(len(self.events)), "type": kind, "data": data})
        return self

    def move(self, to: str, **more: Any) -> Story:
        self.say("state", **{"from": self.state, "to": to, "attempt": len(self.attempts), **more})
        self.state = to
        return self

    def claim(self) -> Story:
        number = len(self.attempts) + 1
        row = {
            "number": number,
            "worker": "w",
            "started_at": len(self.events) * 1000,
            "ended_at": None,
            "outcome": None,
            "resumed_from": None,
        }
        self.attempts.append(row)
        return self.say("claimed", attempt=number, worker="w").move("running")

    def train(self, first_epoch: int, last_epoch: int) -> Story:
        """From the end of one epoch (0 is the beginning) to the end of another."""
        number, begin = len(self.attempts), first_epoch * STEPS_PER_EPOCH
        self.say("plan", attempt=number)
        if begin:
            self.attempts[-1]["resumed_from"] = f"step-{begin:08d}"
            self.say("resumed", attempt=number, from_step=begin)
        for epoch in range(first_epoch, last_epoch):
            step = (epoch + 1) * STEPS_PER_EPOCH
            self.say("metrics", attempt=number, from_step=step - STEPS_PER_EPOCH + 1, to_step=step)
            self.say("evaluation", attempt=number, step=step)
            self.say("checkpoint", attempt=number, step=step)
        return self

    def end(self, outcome: str, to: str, code: str | None = None) -> Story:
        self.attempts[-1] |= {"ended_at": len(self.events) * 1000, "outcome": outcome}
        reason = {} if code is None else {"reason": {"code": code, "detail": ""}}
        return self.say("attempt_ended", attempt=len(self.attempts), outcome=outcome, **reason).move(to)

    def record(self, *, reached: int = LAST, reason: str | None = None, failures: int = 0, max_attempts: int = 3) -> Record:
        series = {name: [point for point in points if point[0] <= reached] for name, points in UNDISTURBED.series.items()}
        steps = [step for step, _ in series["val_top1"]][-2:]
        shown: list[dict[str, Any]] = [
            {"id": f"step-{step:08d}", "step": step, "sha256": f"sha-{step}", "is_latest": step == steps[-1]} for step in steps
        ]
        return Record(
            job={
                "id": JOB,
                "state": self.state,
                "reason": None if reason is None else {"code": reason},
                "attempt": len(self.attempts),
                "failures": failures,
                "finished_at": "2026-11-23T09:10:32Z",
                "progress": {"step": reached},
                "spec": {"limits": {"max_attempts": max_attempts}},
            },
            events=self.events,
            series=series,
            checkpoints=shown,
            attempts=self.attempts,
            lease={"lease_until": None, "worker": None},
            files={one["id"]: one["sha256"] for one in shown},
        )


def quiet() -> Record:
    return Story().claim().train(0, 3).end("succeeded", "succeeded").record()


def taken_over() -> Record:
    """A worker was lost after the first epoch; the second attempt went on from its checkpoint."""
    story = Story().claim().train(0, 1).end("lost", "queued", "worker_lost")
    return story.claim().train(1, 3).end("succeeded", "succeeded").record(failures=1)


def cancelled() -> Record:
    return Story().claim().train(0, 2).move("cancelling").end("stopped", "cancelled").record(reached=10)


def given_up() -> Record:
    story = Story().claim().train(0, 1).end("failed", "queued", "crashed")
    return story.claim().train(1, 2).end("failed", "failed", "crashed").record(reached=10, reason="crashed", failures=2, max_attempts=2)


def retried_after_a_cancel() -> Record:
    story = Story().claim().train(0, 3).move("cancelling").end("succeeded", "cancelled").move("queued", retry=True)
    return story.claim().train(3, 3).end("succeeded", "succeeded").record()


WHOLE: list[tuple[Callable[[], Record], Asked]] = [
    (quiet, Asked()),
    (taken_over, Asked()),
    (cancelled, Asked(cancel="yes")),
    (given_up, Asked()),
    (retried_after_a_cancel, Asked(cancel="no")),
]


@pytest.mark.parametrize(("whole", "asked"), WHOLE, ids=[whole.__name__ for whole, _ in WHOLE])
def test_a_whole_history_breaks_no_rule(whole: Callable[[], Record], asked: Asked) -> None:
    assert judge(whole(), asked, UNDISTURBED) == []


def lose_an_event(record: Record) -> None:
    del record.events[4]


def repeat_a_number(record: Record) -> None:
    record.events[4]["seq"] = record.events[3]["seq"]


def move_from_another_state(record: Record) -> None:
    next(event for event in record.events if event["type"] == "state")["data"]["from"] = "paused"


def make_an_illegal_move(record: Record) -> None:
    record.of_type("state")[-1]["data"]["from"] = "queued"


def leave_an_end_without_a_retry(record: Record) -> None:
    del next(event for event in record.events if event["data"].get("retry"))["data"]["retry"]


def never_end(record: Record) -> None:
    record.job["state"] = "running"
    record.events[:] = record.events[:3]


def stay_held(record: Record) -> None:
    record.lease["worker"] = "w"


def write_after_the_take_over(record: Record) -> None:
    last = next(event for event in reversed(record.events) if event["type"] == "metrics")
    last["data"]["attempt"] = 1


def begin_before_the_other_ended(record: Record) -> None:
    ended = next(event for event in record.events if event["type"] == "attempt_ended")
    ended["type"] = "note"


def skip_an_attempt(record: Record) -> None:
    del record.attempts[0]


def overlap_in_time(record: Record) -> None:
    record.attempts[1]["started_at"] = record.attempts[0]["ended_at"] - 5000


def never_end_an_attempt(record: Record) -> None:
    record.attempts[0] |= {"ended_at": None, "outcome": None}


def tell_of_another_outcome(record: Record) -> None:
    record.attempts[0]["outcome"] = "stopped"


def let_an_earlier_attempt_write_the_result(record: Record) -> None:
    for event in record.events:
        if event["type"] == "checkpoint" and event["data"]["step"] == LAST:
            event["data"]["attempt"] = 1


def go_on_after_a_success(record: Record) -> None:
    ended = next(event for event in record.events if event["type"] == "attempt_ended")
    ended["data"] = {"attempt": 1, "outcome": "succeeded"}
    record.attempts[0]["outcome"] = "succeeded"


def lose_the_last_checkpoint(record: Record) -> None:
    record.checkpoints[-1]["is_latest"], record.checkpoints[0]["is_latest"] = False, True


def lose_a_point(record: Record) -> None:
    del record.series["train_loss"][7]


def repeat_a_point(record: Record) -> None:
    record.series["train_loss"].insert(7, record.series["train_loss"][6])


def lose_the_last_point(record: Record) -> None:
    del record.series["val_top1"][-1]


def lose_a_series(record: Record) -> None:
    del record.series["val_top1"]


def change_a_value(record: Record) -> None:
    step, value = record.series["train_loss"][7]
    assert value is not None
    record.series["train_loss"][7] = (step, value * (1 + 1e-9))


def announce_a_stretch_twice(record: Record) -> None:
    last = next(event for event in reversed(record.events) if event["type"] == "metrics")
    last["data"]["from_step"] = 3


def resume_from_what_was_never_reached(record: Record) -> None:
    next(event for event in record.events if event["type"] == "resumed")["data"]["from_step"] = 9


def end_with_other_weights(record: Record) -> None:
    record.checkpoints[-1]["sha256"] = record.files["step-00000015"] = "sha-other"


def change_a_file(record: Record) -> None:
    record.files["step-00000010"] = "sha-other"


def lose_a_file(record: Record) -> None:
    record.files["step-00000010"] = None


def fail_for_no_reason(record: Record) -> None:
    record.job["reason"] = None


def fail_for_another_reason(record: Record) -> None:
    record.job["reason"] = {"code": "worker_lost"}


def fail_for_what_nobody_did(record: Record) -> None:
    record.job["reason"] = {"code": "data_missing"}
    record.of_type("attempt_ended")[-1]["data"]["reason"]["code"] = "data_missing"


def give_up_too_early(record: Record) -> None:
    record.job["spec"]["limits"]["max_attempts"] = 3


def give_up_too_late(record: Record) -> None:
    record.job["spec"]["limits"]["max_attempts"] = 1


def keep_a_reason(record: Record) -> None:
    record.job["reason"] = {"code": "worker_lost"}


def miscount_failures(record: Record) -> None:
    record.job["failures"] = 0


BROKEN: list[tuple[Callable[[], Record], Callable[[Record], None], str]] = [
    (taken_over, lose_an_event, "events_are_numbered_without_a_gap"),
    (taken_over, repeat_a_number, "events_are_numbered_without_a_gap"),
    (taken_over, move_from_another_state, "every_move_is_legal"),
    (quiet, make_an_illegal_move, "every_move_is_legal"),
    (retried_after_a_cancel, leave_an_end_without_a_retry, "every_move_is_legal"),
    (retried_after_a_cancel, leave_an_end_without_a_retry, "it_ends_once"),
    (quiet, never_end, "it_ends_once"),
    (quiet, stay_held, "it_ends_once"),
    (taken_over, write_after_the_take_over, "one_attempt_writes_at_a_time"),
    (taken_over, begin_before_the_other_ended, "one_attempt_writes_at_a_time"),
    (taken_over, skip_an_attempt, "attempts_are_in_order"),
    (taken_over, overlap_in_time, "attempts_are_in_order"),
    (taken_over, never_end_an_attempt, "attempts_are_in_order"),
    (taken_over, tell_of_another_outcome, "attempts_are_in_order"),
    (taken_over, let_an_earlier_attempt_write_the_result, "the_result_is_the_last_attempts"),
    (taken_over, go_on_after_a_success, "the_result_is_the_last_attempts"),
    (quiet, lose_the_last_checkpoint, "the_result_is_the_last_attempts"),
    (taken_over, lose_a_point, "metrics_have_no_gap_and_no_repeat"),
    (taken_over, repeat_a_point, "metrics_have_no_gap_and_no_repeat"),
    (taken_over, lose_the_last_point, "metrics_have_no_gap_and_no_repeat"),
    (taken_over, lose_a_series, "metrics_have_no_gap_and_no_repeat"),
    (taken_over, change_a_value, "metrics_have_no_gap_and_no_repeat"),
    (cancelled, lose_a_point, "metrics_have_no_gap_and_no_repeat"),
    (taken_over, announce_a_stretch_twice, "announcements_follow_each_other"),
    (taken_over, resume_from_what_was_never_reached, "announcements_follow_each_other"),
    (taken_over, end_with_other_weights, "weights_are_the_undisturbed_runs"),
    (quiet, change_a_file, "files_are_what_they_are_said_to_be"),
    (quiet, lose_a_file, "files_are_what_they_are_said_to_be"),
    (given_up, fail_for_no_reason, "the_reason_is_right"),
    (given_up, fail_for_another_reason, "the_reason_is_right"),
    (given_up, fail_for_what_nobody_did, "the_reason_is_right"),
    (given_up, give_up_too_early, "the_reason_is_right"),
    (given_up, give_up_too_late, "attempts_are_bounded"),
    (quiet, keep_a_reason, "the_reason_is_right"),
    (taken_over, miscount_failures, "the_reason_is_right"),
]


@pytest.mark.parametrize(("whole", "damage", "rule"), BROKEN, ids=[f"{damage.__name__}-{rule}" for _, damage, rule in BROKEN])
def test_a_broken_history_is_caught_by_its_rule(whole: Callable[[], Record], damage: Callable[[Record], None], rule: str) -> None:
    record = copy.deepcopy(whole())
    damage(record)
    found = judge(record, Asked(cancel="maybe"), UNDISTURBED)
    assert rule in {violation.rule for violation in found}
    assert all(violation.job == JOB and "created" in violation.evidence for violation in found), "each names its job and tells its history"


def test_every_rule_is_broken_by_some_history() -> None:
    assert {rule.__name__ for rule in RULES} == {rule for _, _, rule in BROKEN} | {"the_user_has_the_last_word"}


@pytest.mark.parametrize(("whole", "cancel"), [(quiet, "yes"), (cancelled, "no")])
def test_the_user_has_the_last_word(whole: Callable[[], Record], cancel: Any) -> None:
    assert [violation.rule for violation in judge(whole(), Asked(cancel=cancel), UNDISTURBED)] == ["the_user_has_the_last_word"]


def test_a_file_that_was_damaged_on_purpose_is_nobodys_fault() -> None:
    record = quiet()
    change_a_file(record)
    assert judge(record, Asked(damaged=frozenset({"step-00000010"})), UNDISTURBED) == []


@pytest.mark.parametrize(
    ("answers", "stored", "rule"),
    [
        ({"a": ["1"], "b": ["2"]}, ["1"], "nothing_accepted_is_lost"),
        ({"a": ["1", "2"]}, ["1", "2"], "one_key_is_one_job"),
        ({"a": ["1"]}, ["1", "2"], "nothing_comes_of_nothing"),
    ],
)
def test_answers_are_held_against_what_is_stored(answers: dict[str, list[str]], stored: list[str], rule: str) -> None:
    assert [violation.rule for violation in judge_acceptance(answers, stored)] == [rule]
    assert judge_acceptance({"a": ["1", "1"], "b": ["2"]}, ["2", "1"]) == []


def sighting(attempt: int, begin: int, end: int, *, stopped: bool = False, job: str = JOB) -> Sighting:
    """Seen every second, busy all the time unless it was stopped."""
    looks = [(float(now), stopped, 0.0 if stopped else float(now)) for now in range(begin, end + 1)]
    return Sighting(pid=attempt, worker=1, job=job, attempt=attempt, first_s=float(begin), last_s=float(end), looks=looks)


def test_two_trainers_of_a_job_at_a_time_are_an_overlap_and_the_stale_ones_work_is_measured() -> None:
    (busy,) = find_overlaps([sighting(1, 0, 10), sighting(2, 6, 20), sighting(3, 21, 30), sighting(1, 0, 30, job="job_2")])
    assert (busy.job, busy.stale, busy.fresh, busy.seconds, busy.stopped_s, busy.cpu_s) == (JOB, 1, 2, 4.0, 0.0, 4.0)
    (frozen,) = find_overlaps([sighting(1, 0, 10, stopped=True), sighting(2, 6, 20)])
    assert (frozen.seconds, frozen.stopped_s, frozen.cpu_s) == (4.0, 4.0, 0.0)


# --- experiments ------------------------------------------------------------------------------------------------------------------


def asked_and_answered() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    experiment = {
        "id": "exp_1",
        "state": "succeeded",
        "arms": [{}, {}],
        "spec": {"seeds": 2, "strategy": "grid"},
        "verdict": "…",
        "analysis": {"state": "current"},
    }
    places = [(arm, seed) for arm in range(2) for seed in range(2)]
    jobs = [{"name": f"q-a{a}-s{s}", "state": "succeeded", "spec": {"seed": s}, "labels": {"stage": "verdict"}} for a, s in places]
    return experiment, jobs


def test_an_experiment_without_fault_passes() -> None:
    assert judge_experiment(*asked_and_answered(), cancelled=False) == []


@pytest.mark.parametrize(
    ("rule", "harm"),
    [
        ("a_run_is_made_once", lambda experiment, jobs: jobs.append(jobs[0])),
        ("every_run_is_made", lambda experiment, jobs: jobs.pop()),
        ("an_experiment_ends_with_its_jobs", lambda experiment, jobs: experiment.update(state="running")),
        ("who_asks_is_answered", lambda experiment, jobs: experiment.update(verdict=None)),
        ("who_asks_is_answered", lambda experiment, jobs: experiment["analysis"].update(state="stale")),
    ],
)
def test_a_broken_experiment_is_caught_by_its_rule(rule: str, harm: Callable[[dict[str, Any], list[dict[str, Any]]], None]) -> None:
    experiment, jobs = asked_and_answered()
    harm(experiment, jobs)
    assert [violation.rule for violation in judge_experiment(experiment, jobs, cancelled=False)] == [rule]


def searched() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """asha over four epochs with rungs after 1 and 2: two trials have lost."""
    experiment, _ = asked_and_answered()
    search = {"trials": 3, "min_epochs": 1, "reduction": 2}
    experiment |= {"arms": [{}, {}, {}], "spec": {"seeds": 5, "strategy": "asha", "search": search, "spec": {"epochs": 4}}}
    reached = [("succeeded", 4), ("paused", 2), ("paused", 1)]
    jobs = [
        {"name": f"q-n{n}-s0", "state": state, "progress": {"epoch": epoch}, "spec": {"seed": 0}, "labels": {"stage": "search"}}
        for n, (state, epoch) in enumerate(reached)
    ]
    return experiment, jobs


def test_a_search_whose_losers_wait_passes() -> None:
    assert judge_experiment(*searched(), cancelled=False) == []


@pytest.mark.parametrize(
    ("rule", "harm"),
    [
        ("no_run_is_cancelled_by_mistake", lambda experiment, jobs: jobs[1].update(state="cancelled")),
        ("who_loses_a_search_waits_at_a_rung", lambda experiment, jobs: jobs[1].update(progress={"epoch": 3})),
        ("who_loses_a_search_waits_at_a_rung", lambda experiment, jobs: experiment["spec"].update(strategy="random")),
        ("every_run_is_made", lambda experiment, jobs: jobs.pop(0)),
        ("no_trial_is_made_beyond_the_plan", lambda experiment, jobs: jobs.append(jobs[0] | {"name": "q-n3-s0"})),
    ],
)
def test_a_broken_search_is_caught_by_its_rule(rule: str, harm: Callable[[dict[str, Any], list[dict[str, Any]]], None]) -> None:
    experiment, jobs = searched()
    harm(experiment, jobs)
    assert rule in {violation.rule for violation in judge_experiment(experiment, jobs, cancelled=False)}
    assert judge_experiment(*searched(), cancelled=False) == []
