"""The list of jobs as the dashboard asks for it: as the lines of a table, live, and one move for many."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest

from api.documents import BulkActionDocument, JobListDocument, JobSummaryListDocument
from powergrad.jobs import lifecycle, quotas
from powergrad.jobs.quotas import Quota
from powergrad.jobs.states import JobState
from tests.api.callers import calling, made
from tests.api.conftest import Api, register_worker, until
from tests.jobs import builders

UNKNOWN = "job_00000000000000000000000000"


def summaries(api: Api, **params: Any) -> list[dict[str, Any]]:
    answer = api.http.get("/v1/jobs", params={"view": "summary", **params})
    assert answer.status_code == 200, answer.text
    JobSummaryListDocument.model_validate_json(answer.content)
    data: list[dict[str, Any]] = answer.json()["data"]
    return data


def test_a_line_tells_what_a_table_shows(any_api: Api) -> None:
    run = builders.running(any_api.store, name="one", seed=3, loss={"alpha": 0.25}, labels={"team": "vision"}, optimizer={"lr": 0.5})
    builders.record(any_api.store, run, builders.plan(epochs=2), builders.step(5, 1.5), builders.evaluation(10, 0.5))
    queued = builders.submit(any_api.store)
    second, first = summaries(any_api, field=["optimizer.lr", "optimizer.no", "labels.team"], metric=["val_top1", "nothing"])
    whole = any_api.job(run.job_id)
    assert {name: first[name] for name in ("id", "name", "state", "progress", "labels", "priority", "version", "revision")} == {
        name: whole[name] for name in ("id", "name", "state", "progress", "labels", "priority", "version", "revision")
    }
    assert (first["model"], first["dataset"], first["alpha"], first["seed"]) == ("resnet18", "digits", 0.25, 3)
    assert first["metrics"] == {"latest": {"val_top1": 0.5}, "best": {"val_top1": 0.5}}
    assert first["fields"] == {"optimizer.lr": 0.5, "optimizer.no": None, "labels.team": "vision"}
    assert (first["reason"], first["waiting_for"], first["worker"]) == (None, None, builders.OFFER.worker)
    assert (second["id"], second["waiting_for"]) == (queued, any_api.job(queued)["queue"]["waiting_for"])
    assert set(summaries(any_api)[1]["metrics"]["latest"]) == {"train_loss", "val_loss", "val_top1"}, "unless others are asked for"


@pytest.mark.parametrize("state", list(JobState))
def test_a_job_in_any_state_fits_a_line(any_api: Api, state: JobState) -> None:
    job_id = builders.bring_to(any_api.store, state)
    (line,) = summaries(any_api)
    assert (line["id"], line["state"]) == (job_id, state)
    assert (line["reason"] is not None) == (any_api.job(job_id)["reason"] is not None)


def test_lines_are_filtered_sorted_and_paged_as_whole_jobs_are(any_api: Api) -> None:
    for number in range(5):
        run = builders.running(any_api.store, labels={"odd": str(number % 2)})
        builders.record(any_api.store, run, builders.plan(), builders.evaluation(10, (number * 3 % 5) / 10))
    questions: list[dict[str, str | int]] = [
        {},
        {"label.odd": "1"},
        {"sort": "-metrics.val_top1"},
        {"sort": "metrics.val_top1", "limit": 2},
        {"state": "failed"},
    ]
    for params in questions:
        whole = any_api.http.get("/v1/jobs", params=params).json()
        lines = any_api.http.get("/v1/jobs", params={**params, "view": "summary"}).json()
        assert [one["id"] for one in lines["data"]] == [one["id"] for one in whole["data"]]
        assert {name: lines[name] for name in ("has_more", "first_id", "last_id")} == {
            name: whole[name] for name in ("has_more", "first_id", "last_id")
        }


def test_a_page_of_lines_is_lighter_and_may_be_longer(any_api: Api) -> None:
    for _ in range(120):
        builders.submit(any_api.store)
    whole = any_api.http.get("/v1/jobs", params={"limit": 100}).content
    lines = any_api.http.get("/v1/jobs", params={"limit": 500, "view": "summary"})
    assert len(lines.json()["data"]) == 120
    assert len(lines.content) / 120 < len(whole) / 100 / 2, (
        "a job that waits; one that has run is heavier by its attempts and all its metrics"
    )
    refused = any_api.http.get("/v1/jobs", params={"limit": 101})
    assert (refused.status_code, refused.json()["errors"][0]["parameter"]) == (422, "limit")


def test_a_page_has_a_tag_that_changes_with_what_it_shows(any_api: Api) -> None:
    run = builders.running(any_api.store)
    first = any_api.http.get("/v1/jobs", params={"state": "running"})
    JobListDocument.model_validate_json(first.content)
    tag = {"If-None-Match": first.headers["etag"]}
    assert any_api.http.get("/v1/jobs", params={"state": "running"}, headers=tag).status_code == 304
    builders.submit(any_api.store)
    assert any_api.http.get("/v1/jobs", params={"state": "running"}, headers=tag).status_code == 304, "it is not on this page"
    builders.record(any_api.store, run, builders.plan(), builders.step(1, 1.0))
    assert any_api.http.get("/v1/jobs", params={"state": "running"}, headers=tag).status_code == 200


def test_whoever_waits_for_a_page_hears_of_its_change_and_of_no_other(any_api: Api) -> None:
    run = builders.running(any_api.store)
    params = {"state": "running", "view": "summary"}
    first = any_api.http.get("/v1/jobs", params=params)
    answered = threading.Event()

    def wait() -> httpx2.Response:
        with calling(any_api) as http:
            answer = http.get("/v1/jobs", params={**params, "wait": 15}, headers={"If-None-Match": first.headers["etag"]})
        answered.set()
        return answer

    with ThreadPoolExecutor(1) as pool:
        heard = pool.submit(wait)
        until(lambda: any_api.parts.measures.registry.get_sample_value("powergrad_streams") == 1)
        builders.submit(any_api.store)
        assert not answered.wait(1.5), "a job that is not on the page"
        builders.record(any_api.store, run, builders.plan(), builders.step(7, 1.0))
        answer = heard.result(timeout=15)
    assert answer.status_code == 200
    assert answer.json()["data"][0]["progress"]["step"] == 7
    assert answer.headers["etag"] != first.headers["etag"]


def test_what_a_job_waits_for_is_news_too(any_api: Api) -> None:
    """A worker that comes changes no job's row."""
    builders.submit(any_api.store)
    first = any_api.http.get("/v1/jobs")
    register_worker(any_api.store)
    answer = any_api.http.get("/v1/jobs", params={"wait": 15}, headers={"If-None-Match": first.headers["etag"]})
    assert (answer.status_code, answer.json()["data"][0]["queue"]["waiting_for"]) == (200, "a free slot")


@pytest.mark.parametrize("params", [{}, {"sort": "-metrics.val_top1"}, {"view": "summary", "q": "x"}])
def test_a_page_that_stays_as_it_is_is_waited_for_so_long(api: Api, params: dict[str, str]) -> None:
    tag = api.http.get("/v1/jobs", params=params).headers["etag"]
    started_s = time.monotonic()
    answer = api.http.get("/v1/jobs", params={**params, "wait": 1}, headers={"If-None-Match": tag})
    assert (answer.status_code, answer.headers["etag"]) == (304, tag)
    assert time.monotonic() - started_s >= 1.0


def test_whoever_has_seen_nothing_waits_for_nothing(api: Api) -> None:
    started_s = time.monotonic()
    assert api.http.get("/v1/jobs", params={"wait": 60}).status_code == 200
    assert time.monotonic() - started_s < 30


def moved(api: Api, action: str, ids: list[str]) -> dict[str, Any]:
    answer = api.http.post(f"/v1/jobs/{action}", json={"ids": ids})
    assert answer.status_code == 200, answer.text
    BulkActionDocument.model_validate_json(answer.content)
    document: dict[str, Any] = answer.json()
    assert (document["object"], document["action"]) == ("bulk_action", action)
    return document


def test_each_job_is_moved_by_itself(any_api: Api) -> None:
    store = any_api.store
    over, running = builders.bring_to(store, JobState.SUCCEEDED), builders.bring_to(store, JobState.RUNNING)
    queued = builders.submit(store)
    answer = moved(any_api, "cancel", [running, over, UNKNOWN, queued, running])
    assert answer["done"] == [running, queued]
    assert [(one["id"], one["code"]) for one in answer["refused"]] == [(over, "illegal_move"), (UNKNOWN, "job_not_found")]
    alone = any_api.http.post(f"/v1/jobs/{over}/cancel").json()
    assert answer["refused"][0]["detail"] == alone["detail"]
    assert [any_api.job(one)["state"] for one in (running, queued, over)] == ["cancelling", "cancelled", "succeeded"]
    assert moved(any_api, "cancel", [running, queued])["done"] == [running, queued], "twice is no error"


def test_jobs_are_paused_resumed_and_deleted_together(any_api: Api) -> None:
    ids = [builders.submit(any_api.store) for _ in range(120)]
    assert moved(any_api, "pause", ids)["done"] == ids
    assert moved(any_api, "resume", ids[:60])["done"] == ids[:60]
    states = {one["id"]: one["state"] for one in summaries(any_api, limit=500)}
    assert [states[one] for one in ids] == ["queued"] * 60 + ["paused"] * 60
    answer = moved(any_api, "delete", ids)
    assert (answer["done"], {one["code"] for one in answer["refused"]}) == ([], {"illegal_move"})
    moved(any_api, "cancel", ids)
    assert moved(any_api, "delete", ids)["done"] == ids
    assert summaries(any_api) == []


def test_a_quota_stops_those_that_come_after_it(any_api: Api) -> None:
    store = any_api.store
    ids = [builders.submit(store, owner="ben") for _ in range(3)]
    for job_id in ids:
        builders.do(store, lifecycle.pause, job_id, owner="ben")
    builders.do(store, quotas.grant, "ben", Quota(max_queued=2))
    with calling(any_api, made(any_api, "ben")) as http:
        answer = http.post("/v1/jobs/resume", json={"ids": ids}).json()
    assert answer["done"] == ids[:2]
    assert [(one["id"], one["code"]) for one in answer["refused"]] == [(ids[2], "quota_exceeded")]


@pytest.mark.parametrize(
    "body", [{}, {"ids": []}, {"ids": ["job_1"]}, {"ids": [UNKNOWN] * 501}, {"ids": [UNKNOWN], "force": True}, {"ids": UNKNOWN}]
)
def test_a_wrong_list_of_jobs_is_refused(api: Api, body: dict[str, Any]) -> None:
    answer = api.http.post("/v1/jobs/cancel", json=body)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_spec")
