"""Looking at jobs, listing, moving, changing, cloning and deleting them."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import httpx2
import pytest

from powergrad.jobs import rows
from powergrad.jobs.states import JobState
from tests.api.conftest import DEADLINE_S, DIGITS, Api
from tests.jobs import builders

ABSENT = "job_00000000000000000000000000"


def problem(answer: httpx2.Response) -> tuple[int, str]:
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    body = answer.json()
    assert body["status"] == answer.status_code
    return answer.status_code, body["code"]


# --- one job


def test_an_unknown_job_is_not_found(any_api: Api) -> None:
    for job_id in (ABSENT, "job_x", "%00", "a" * 500):
        assert problem(any_api.http.get(f"/v1/jobs/{job_id}")) == (404, "job_not_found")


def test_an_unchanged_job_answers_304(any_api: Api) -> None:
    job = any_api.submit()
    etag = any_api.http.get(f"/v1/jobs/{job['id']}").headers["etag"]
    for tags in (etag, f'"other", {etag}', f"W/{etag}"):
        answer = any_api.http.get(f"/v1/jobs/{job['id']}", headers={"If-None-Match": tags})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", etag)


def test_progress_changes_the_etag(any_api: Api) -> None:
    run = builders.running(any_api.store)
    etag = any_api.http.get(f"/v1/jobs/{run.job_id}").headers["etag"]
    builders.record(any_api.store, run, builders.plan(), builders.step(1))
    answer = any_api.http.get(f"/v1/jobs/{run.job_id}", headers={"If-None-Match": etag})
    assert answer.status_code == 200
    assert answer.json()["progress"]["step"] == 1


def test_a_waiting_poll_answers_when_the_job_changes(any_api: Api) -> None:
    run = builders.running(any_api.store)
    etag = any_api.http.get(f"/v1/jobs/{run.job_id}").headers["etag"]
    answers: list[httpx2.Response] = []
    url = f"/v1/jobs/{run.job_id}?wait=60"
    waiting = threading.Thread(target=lambda: answers.append(any_api.http.get(url, headers={"If-None-Match": etag})))
    waiting.start()
    assert _is_watched(any_api, run.job_id)
    assert not answers
    builders.record(any_api.store, run, builders.plan(), builders.step(1))
    waiting.join(timeout=DEADLINE_S)
    assert answers[0].status_code == 200
    assert answers[0].json()["progress"]["step"] == 1


def test_a_waiting_poll_ends_with_304_when_nothing_changes(api: Api) -> None:
    run = builders.running(api.store)
    etag = api.http.get(f"/v1/jobs/{run.job_id}").headers["etag"]
    started = time.monotonic()
    answer = api.http.get(f"/v1/jobs/{run.job_id}", params={"wait": 0.3}, headers={"If-None-Match": etag})
    assert answer.status_code == 304
    assert time.monotonic() - started >= 0.3


def test_a_waiting_poll_with_an_old_etag_answers_at_once(api: Api) -> None:
    job = api.submit()
    answer = api.http.get(f"/v1/jobs/{job['id']}", params={"wait": 60}, headers={"If-None-Match": '"old"'}, timeout=10)
    assert answer.json()["id"] == job["id"]


def test_a_waiting_poll_without_etag_on_a_job_that_is_over_answers_at_once(api: Api) -> None:
    job_id = builders.bring_to(api.store, JobState.SUCCEEDED)
    assert api.http.get(f"/v1/jobs/{job_id}", params={"wait": 60}, timeout=10).json()["state"] == "succeeded"


def test_a_waiting_poll_sees_the_place_in_the_queue_move(api: Api) -> None:
    first, second = builders.submit(api.store), builders.submit(api.store)
    etag = api.http.get(f"/v1/jobs/{second}").headers["etag"]
    api.http.post(f"/v1/jobs/{first}/cancel")
    answer = api.http.get(f"/v1/jobs/{second}", params={"wait": 15}, headers={"If-None-Match": etag})
    assert answer.json()["queue"]["position"] == 1


def test_a_waiting_poll_on_a_deleted_job_says_so(api: Api) -> None:
    job_id = builders.bring_to(api.store, JobState.SUCCEEDED)
    etag = api.http.get(f"/v1/jobs/{job_id}").headers["etag"]
    answers: list[httpx2.Response] = []
    url = f"/v1/jobs/{job_id}?wait=60"
    waiting = threading.Thread(target=lambda: answers.append(api.http.get(url, headers={"If-None-Match": etag})))
    waiting.start()
    assert _is_watched(api, job_id)
    api.http.delete(f"/v1/jobs/{job_id}")
    waiting.join(timeout=DEADLINE_S)
    assert problem(answers[0]) == (404, "job_not_found")


@pytest.mark.parametrize("wait", ["-1", "61", "nan", "soon"])
def test_a_wait_out_of_range_is_refused(api: Api, wait: str) -> None:
    job = api.submit()
    answer = api.http.get(f"/v1/jobs/{job['id']}", params={"wait": wait})
    assert problem(answer) == (422, "invalid_request")
    assert answer.json()["errors"][0]["parameter"] == "wait"


def _is_watched(api: Api, job_id: str) -> bool:
    tailer = api.parts.tailer
    assert tailer is not None
    deadline = time.monotonic() + DEADLINE_S
    while not tailer.is_watched(job_id):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return True


# --- lists


def ids(answer: httpx2.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [job["id"] for job in answer.json()["data"]]


def test_pages_follow_one_another_newest_first(any_api: Api) -> None:
    made = sorted((any_api.submit()["id"] for _ in range(5)), reverse=True)
    seen: list[str] = []
    more, after = True, None
    while more:
        answer = any_api.http.get("/v1/jobs", params={"limit": 2, **({"after": after} if after else {})})
        body = answer.json()
        assert (body["object"], body["first_id"], body["last_id"]) == ("list", body["data"][0]["id"], body["data"][-1]["id"])
        seen += ids(answer)
        more, after = body["has_more"], body["last_id"]
    assert seen == made


def test_an_empty_list_has_no_ids(api: Api) -> None:
    assert api.http.get("/v1/jobs").json() == {"object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None}


def test_filters_choose(any_api: Api) -> None:
    one = any_api.submit(name="alpha-one", labels={"team": "vision", "kind": "a.b"})["id"]
    two = any_api.submit(name="beta-two", labels={"team": "audio"})["id"]
    any_api.http.post(f"/v1/jobs/{two}/cancel")
    get = any_api.http.get
    assert ids(get("/v1/jobs", params={"label.team": "vision"})) == [one]
    assert ids(get("/v1/jobs", params={"label.team": "vision", "label.kind": "a.b"})) == [one]
    assert ids(get("/v1/jobs", params={"label.team": "audio", "label.kind": "a.b"})) == []
    assert ids(get("/v1/jobs", params={"state": "cancelled"})) == [two]
    assert set(ids(get("/v1/jobs", params={"state": ["cancelled", "queued"]}))) == {one, two}
    assert ids(get("/v1/jobs", params={"q": "BETA"})) == [two]
    assert ids(get("/v1/jobs", params={"q": one})) == [one]
    assert ids(get("/v1/jobs", params={"q": "%"})) == []
    assert ids(get("/v1/jobs", params={"experiment": "exp_1"})) == []
    created = any_api.job(two)["created_at"]
    assert two not in ids(get("/v1/jobs", params={"created_after": created}))
    assert two not in ids(get("/v1/jobs", params={"created_before": created}))
    assert set(ids(get("/v1/jobs", params={"created_after": "2020-01-01T00:00:00+02:00"}))) == {one, two}


def test_jobs_sort_by_a_best_metric(any_api: Api) -> None:
    scored = {}
    for top1 in (0.5, 0.9, 0.7):
        run = builders.running(any_api.store)
        builders.record(any_api.store, run, builders.plan(), builders.evaluation(10, top1))
        scored[top1] = run.job_id
    unscored = any_api.submit()["id"]
    best_first = [scored[0.9], scored[0.7], scored[0.5], unscored]
    assert ids(any_api.http.get("/v1/jobs", params={"sort": "-metrics.val_top1"})) == best_first
    page = any_api.http.get("/v1/jobs", params={"sort": "-metrics.val_top1", "limit": 2, "after": best_first[1]})
    assert ids(page) == best_first[2:]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("limit", "0"),
        ("limit", "101"),
        ("limit", "ten"),
        ("after", "job_x"),
        ("state", "sleeping"),
        ("created_after", "yesterday"),
        ("created_after", "2026-01-01T00:00:00"),
        ("created_after", "2026-02-30T00:00:00Z"),
        ("created_after", "0000-01-01T00:00:00Z"),
        ("created_before", "0.5"),
        ("created_before", "1700000000"),
        ("sort", "name"),
        ("sort", "-metrics.a b"),
        ("q", "a" * 129),
        ("q", "a\x00b"),
        ("experiment", "a\x00b"),
        ("label.team", "a\x00b"),
        ("label.a b", "c"),
        ("label.team\n", "c"),
        ("label.team", "vision\n"),
        ("sate", "failed"),
    ],
)
def test_a_bad_filter_is_refused_by_name(any_api: Api, name: str, value: str) -> None:
    answer = any_api.http.get("/v1/jobs", params={name: value})
    assert problem(answer) == (422, "invalid_request")
    assert answer.json()["errors"][0]["parameter"] == name


def test_32_labels_are_asked_for_and_no_more(any_api: Api) -> None:
    labels = {f"key-{number}": "x" for number in range(32)}
    job = any_api.submit(labels=labels)
    asked = {f"label.{key}": value for key, value in labels.items()}
    assert ids(any_api.http.get("/v1/jobs", params=asked)) == [job["id"]]
    answer = any_api.http.get("/v1/jobs", params=asked | {"label.more": "x"})
    assert problem(answer) == (422, "invalid_request")
    assert "at most 32 labels" in answer.json()["detail"]


def test_a_label_asked_for_twice_is_refused(api: Api) -> None:
    answer = api.http.get("/v1/jobs", params=[("label.team", "vision"), ("label.team", "audio")])
    assert problem(answer) == (422, "invalid_request")
    assert answer.json()["errors"][0]["parameter"] == "label.team"


def test_a_sorted_page_after_an_unknown_job_is_refused(any_api: Api) -> None:
    answer = any_api.http.get("/v1/jobs", params={"sort": "-metrics.val_top1", "after": ABSENT})
    assert problem(answer) == (404, "job_not_found")
    assert ABSENT in answer.json()["detail"]


# --- moves


@pytest.mark.parametrize("state", list(JobState))
@pytest.mark.parametrize("action", ["cancel", "pause", "resume", "retry"])
def test_a_move_is_made_or_refused_with_the_state(api: Api, state: JobState, action: str) -> None:
    legal: dict[str, set[JobState]] = {
        "cancel": {state for state in JobState if state not in (JobState.SUCCEEDED, JobState.FAILED)},
        "pause": {JobState.QUEUED, JobState.RUNNING, JobState.PAUSING, JobState.PAUSED},
        "resume": {JobState.PAUSED, JobState.QUEUED, JobState.RUNNING},
        "retry": {JobState.FAILED, JobState.CANCELLED},
    }
    job_id = builders.bring_to(api.store, state)
    answer = api.http.post(f"/v1/jobs/{job_id}/{action}")
    if state in legal[action]:
        assert answer.status_code == 202
        assert answer.json() == api.job(job_id)
    else:
        assert problem(answer) == (409, "illegal_move")
        assert answer.json()["state"] == state
        assert api.job(job_id)["state"] == state


@pytest.mark.parametrize("action", ["cancel", "pause"])
def test_doing_it_twice_is_no_error(any_api: Api, action: str) -> None:
    run = builders.running(any_api.store)
    answers = [any_api.http.post(f"/v1/jobs/{run.job_id}/{action}") for _ in range(2)]
    assert [answer.status_code for answer in answers] == [202, 202]
    assert answers[0].json() == answers[1].json()


def test_moves_of_an_unknown_job_are_not_found(api: Api) -> None:
    for action in ("cancel", "pause", "resume", "retry", "clone"):
        assert problem(api.http.post(f"/v1/jobs/{ABSENT}/{action}")) == (404, "job_not_found")


def test_a_retry_raises_limits(any_api: Api) -> None:
    job_id = builders.bring_to(any_api.store, JobState.FAILED)
    answer = any_api.http.post(f"/v1/jobs/{job_id}/retry", json={"limits": {"max_attempts": 9, "max_seconds": 60.0}})
    limits = answer.json()["spec"]["limits"]
    assert (limits["max_attempts"], limits["max_seconds"], limits["stall_seconds"]) == (9, 60.0, 600.0)


@pytest.mark.parametrize(
    ("limits", "pointer"),
    [({"max_attempts": 0}, "/limits/max_attempts"), ({"max_seconds": None}, "/limits/max_seconds"), ({"minutes": 1}, "/limits/minutes")],
)
def test_bad_limits_are_named(api: Api, limits: dict[str, Any], pointer: str) -> None:
    job_id = builders.bring_to(api.store, JobState.FAILED)
    answer = api.http.post(f"/v1/jobs/{job_id}/retry", json={"limits": limits})
    assert problem(answer) == (422, "invalid_spec")
    assert answer.json()["errors"][0]["pointer"] == pointer


# --- changes


def test_the_users_fields_change(any_api: Api) -> None:
    job = any_api.submit(labels={"old": "x"})
    change: dict[str, Any] = {"name": "new", "labels": {"a": "b"}, "notes": "two\nlines", "priority": 9, "retention": {"keep_last": 7}}
    answer = any_api.http.patch(f"/v1/jobs/{job['id']}", json=change)
    assert answer.status_code == 200
    shown = answer.json()
    assert {name: shown[name] for name in ("name", "labels", "notes", "priority")} == {
        name: change[name] for name in ("name", "labels", "notes", "priority")
    }
    assert shown["retention"] == {"keep_last": 7, "keep_best": 1, "ttl_seconds": None}
    assert shown["version"] == job["version"] + 1
    assert ids(any_api.http.get("/v1/jobs", params={"label.old": "x"})) == []


def test_if_match_guards_a_change(any_api: Api) -> None:
    job = any_api.submit()
    url = f"/v1/jobs/{job['id']}"
    etag = any_api.http.get(url).headers["etag"]
    assert any_api.http.patch(url, json={"notes": "1"}, headers={"If-Match": f'"{job["version"]}"'}).status_code == 200
    refused = any_api.http.patch(url, json={"notes": "2"}, headers={"If-Match": str(job["version"])})
    assert problem(refused) == (412, "version_mismatch")
    assert refused.json()["version"] == job["version"] + 1
    assert problem(any_api.http.patch(url, json={"notes": "2"}, headers={"If-Match": etag})) == (412, "version_mismatch")
    assert problem(any_api.http.patch(url, json={"notes": "2"}, headers={"If-Match": "mine"})) == (412, "version_mismatch")
    fresh = any_api.http.get(url).headers["etag"]
    assert any_api.http.patch(url, json={"notes": "3"}, headers={"If-Match": fresh}).status_code == 200
    assert any_api.http.patch(url, json={"notes": "4"}, headers={"If-Match": "*"}).json()["notes"] == "4"


def test_progress_does_not_move_the_version(any_api: Api) -> None:
    run = builders.running(any_api.store)
    version = any_api.job(run.job_id)["version"]
    builders.record(any_api.store, run, builders.plan(), builders.step(1))
    answer = any_api.http.patch(f"/v1/jobs/{run.job_id}", json={"notes": "x"}, headers={"If-Match": f'"{version}"'})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"name": None}, "/name"),
        ({"name": "a b"}, "/name"),
        ({"priority": 10}, "/priority"),
        ({"notes": "\x00"}, "/notes"),
        ({"notes": "\ud800"}, "/notes"),
        ({"notes": 3}, "/notes"),
        ({"state": "succeeded"}, "/state"),
        ({"retention": {"keep_last": 0}}, "/retention/keep_last"),
        ({"labels": {"a": "\x00"}}, "/labels/a"),
    ],
)
def test_a_bad_change_is_named(any_api: Api, change: dict[str, Any], pointer: str) -> None:
    job = any_api.submit()
    # json.dumps writes a lone surrogate as an escape, as a client in another language may
    answer = any_api.http.patch(f"/v1/jobs/{job['id']}", content=json.dumps(change), headers={"Content-Type": "application/json"})
    assert problem(answer) == (422, "invalid_spec")
    assert [error["pointer"] for error in answer.json()["errors"]] == [pointer]
    assert any_api.job(job["id"]) == job


def test_an_empty_change_changes_nothing(api: Api) -> None:
    job = api.submit()
    assert api.http.patch(f"/v1/jobs/{job['id']}", json={}).json()["version"] == job["version"]
    assert problem(api.http.patch(f"/v1/jobs/{job['id']}")) == (400, "malformed")


# --- clones


def test_a_clone_is_the_same_spec_with_changes(any_api: Api) -> None:
    origin = any_api.submit(name="first", epochs=30, labels={"team": "vision"})
    answer = any_api.http.post(f"/v1/jobs/{origin['id']}/clone", json={"set": {"loss.alpha": 0.3, "labels.run.no": "2"}, "name": "second"})
    assert answer.status_code == 202
    clone = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{clone['id']}"
    assert clone["id"] != origin["id"]
    changed = {**origin["spec"], "name": "second", "loss": {**origin["spec"]["loss"], "alpha": 0.3}}
    assert clone["spec"] == {**changed, "labels": {"team": "vision", "run.no": "2"}}
    created = any_api.http.get(f"/v1/jobs/{clone['id']}/events").json()["data"][0]
    assert created["data"]["cloned_from"] == origin["id"]


def test_a_clone_without_a_body_is_a_copy(api: Api) -> None:
    origin = api.submit()
    assert api.http.post(f"/v1/jobs/{origin['id']}/clone").json()["spec"] == origin["spec"]


def test_a_dry_run_of_a_clone_gives_the_spec_and_stores_nothing(any_api: Api) -> None:
    origin = any_api.submit()
    url = f"/v1/jobs/{origin['id']}/clone"
    answer = any_api.http.post(url, params={"dry_run": "true"}, json={"set": {"epochs": 3}}, headers={"Idempotency-Key": "free"})
    assert (answer.status_code, answer.json()) == (200, {**origin["spec"], "epochs": 3})
    refused = any_api.http.post(url, params={"dry_run": "true"}, json={"set": {"epochs": 0}})
    assert problem(refused) == (422, "invalid_spec")
    assert ids(any_api.http.get("/v1/jobs")) == [origin["id"]]
    # a dry run keeps no key
    assert any_api.http.post(url, headers={"Idempotency-Key": "free"}).status_code == 202


def test_another_optimizer_starts_from_its_own_defaults(api: Api) -> None:
    origin = api.submit()
    clone = api.http.post(f"/v1/jobs/{origin['id']}/clone", json={"set": {"optimizer.name": "adamw", "optimizer.lr": 0.002}}).json()
    assert (clone["spec"]["optimizer"]["lr"], clone["spec"]["optimizer"]["beta1"]) == (0.002, 0.9)


def test_a_part_that_was_null_can_be_set(api: Api) -> None:
    origin = api.submit()
    clone = api.http.post(f"/v1/jobs/{origin['id']}/clone", json={"set": {"clip.mode": "agc", "clip.value": 0.01}}).json()
    assert clone["spec"]["clip"] == {"mode": "agc", "value": 0.01}


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"set": {"loss.alpha": 1.4}}, "/set/loss.alpha"),
        ({"set": {"loss.beta": 1.4}}, "/set/loss.beta"),
        ({"set": {"epochs.count": 3}}, "/set/epochs.count"),
        ({"set": {"": 3}}, "/set/"),
        ({"set": {"data": {"dataset": "digits", "batch_size": 0}}}, "/set/data/batch_size"),
        ({"set": {"seed~/x": 1}}, "/set/seed~0~1x"),
        ({"set": 3}, "/set"),
        ({"sets": {}}, "/sets"),
    ],
)
def test_a_bad_clone_is_named_where_it_was_written(api: Api, body: dict[str, Any], pointer: str) -> None:
    origin = api.submit()
    answer = api.http.post(f"/v1/jobs/{origin['id']}/clone", json=body)
    assert problem(answer) == (422, "invalid_spec")
    assert [error["pointer"] for error in answer.json()["errors"]] == [pointer]


def test_a_clone_of_a_job_without_a_checkpoint_says_so(api: Api) -> None:
    origin = api.submit()
    answer = api.http.post(f"/v1/jobs/{origin['id']}/clone", json={"from_checkpoint": "best"})
    assert [(error["pointer"], error["code"]) for error in answer.json()["errors"]] == [("/from_checkpoint", "no_checkpoint")]


def test_a_clone_honours_an_idempotency_key(api: Api) -> None:
    origin = api.submit()
    url, key = f"/v1/jobs/{origin['id']}/clone", {"Idempotency-Key": "c"}
    first, again = (api.http.post(url, json={"set": {"seed": 1}}, headers=key) for _ in range(2))
    assert (again.json()["id"], again.headers["idempotency-replayed"]) == (first.json()["id"], "true")
    assert problem(api.http.post(url, json={"set": {"seed": 2}}, headers=key)) == (422, "idempotency_mismatch")
    assert problem(api.http.post("/v1/jobs", json=DIGITS, headers=key)) == (422, "idempotency_mismatch")


# --- deletion


def test_a_job_that_has_ended_is_deleted_with_its_files(any_api: Api) -> None:
    job_id = builders.bring_to(any_api.store, JobState.SUCCEEDED)
    files = any_api.data_dir / rows.job_dir(job_id)
    (files / "logs").mkdir(parents=True)
    (files / "logs" / "a1.log").write_text("x")
    answer = any_api.http.delete(f"/v1/jobs/{job_id}")
    assert (answer.status_code, answer.content) == (204, b"")
    assert not files.exists()
    assert problem(any_api.http.get(f"/v1/jobs/{job_id}")) == (404, "job_not_found")
    assert problem(any_api.http.delete(f"/v1/jobs/{job_id}")) == (404, "job_not_found")


def test_a_job_that_lives_is_not_deleted(api: Api) -> None:
    job = api.submit()
    assert problem(api.http.delete(f"/v1/jobs/{job['id']}")) == (409, "illegal_move")
    assert api.job(job["id"]) == job
