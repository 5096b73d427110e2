"""What a user says about how long things stay, and jobs deleted many at a time, over HTTP."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import insert, update

from powergrad.client import ApiError, Client
from powergrad.jobs import retention, submission
from powergrad.jobs.states import TERMINAL, JobState
from powergrad.jobs.store import Store
from powergrad.jobs.tables import events, jobs
from tests.api.conftest import DIGITS, Api, serving, settings_for, until
from tests.jobs import builders as b


def ended(api: Api, state: JobState = JobState.CANCELLED, **overrides: Any) -> str:
    return b.bring_to(api.store, state, **overrides)


def delete(api: Api, **params: Any) -> httpx2.Response:
    return api.http.delete("/v1/jobs", params={name.replace("label_", "label."): value for name, value in params.items()})


def left(api: Api) -> set[str]:
    return {job["id"] for job in api.http.get("/v1/jobs", params={"limit": 100}).json()["data"]}


# --- a job's own rules -----------------------------------------------------------------------------------------------------------


def test_a_job_tells_what_is_kept_of_it_and_for_how_long(any_api: Api) -> None:
    job = any_api.submit(retention={"ttl_seconds": 3600}, checkpoint={"keep_last": 3})
    assert job["retention"] == {"keep_last": 3, "keep_best": 1, "ttl_seconds": 3600}
    assert (job["bytes"], job["expires_at"]) == (0, None)
    any_api.http.post(f"/v1/jobs/{job['id']}/cancel")
    over = any_api.job(job["id"])
    assert over["finished_at"] < over["expires_at"]


def test_the_time_to_live_is_changed_and_given_back(any_api: Api) -> None:
    job = any_api.submit()
    path = f"/v1/jobs/{job['id']}"
    changed = any_api.http.patch(path, json={"retention": {"ttl_seconds": 60, "keep_best": 2}})
    assert changed.status_code == 200, changed.text
    assert changed.json()["retention"] == {"keep_last": 2, "keep_best": 2, "ttl_seconds": 60}
    assert changed.headers["ETag"] != any_api.http.patch(path, json={"retention": {"ttl_seconds": None}}).headers["ETag"]
    assert any_api.job(job["id"])["retention"]["ttl_seconds"] is None


@pytest.mark.parametrize(
    "retention", [{"ttl_seconds": -1}, {"ttl_seconds": 1e10}, {"ttl_seconds": "1d"}, {"keep_last": None}, {"keep_best": 0}]
)
def test_a_rule_that_cannot_be_kept_is_refused(api: Api, retention: dict[str, Any]) -> None:
    job = api.submit()
    refused = api.http.patch(f"/v1/jobs/{job['id']}", json={"retention": retention})
    assert refused.status_code == 422, refused.text
    assert refused.json()["errors"][0]["pointer"] == f"/retention/{next(iter(retention))}"


def test_what_is_no_longer_kept_of_an_ended_job_is_freed(any_api: Api) -> None:
    run = b.running(any_api.store, checkpoint={"keep_last": 5})
    b.record(any_api.store, run, b.plan(), *(b.checkpoint(number, number / 100) for number in (10, 20, 30)))
    b.finish(any_api.store, run)
    folder = any_api.data_dir / "jobs" / run.job_id / "checkpoints" / "a1"
    for number in (10, 20, 30):
        (folder / retention.checkpoint_id(number)).mkdir(parents=True)
    assert any_api.job(run.job_id)["bytes"] == 600
    assert any_api.http.patch(f"/v1/jobs/{run.job_id}", json={"retention": {"keep_last": 1}}).json()["bytes"] == 200
    until(lambda: [path.name for path in folder.iterdir()] == ["step-00000030"])


def test_the_server_s_own_rule_deletes_jobs_and_their_files(sqlite_url: str, tmp_path: Path) -> None:
    with serving(settings_for(sqlite_url, tmp_path, job_ttl_s=0.0, sweep_s=0.05)) as api:
        api.parts.sweeper.expiry_interval_s = 0.05
        job_id, kept = ended(api), ended(api, retention={"ttl_seconds": 3600})
        log = tmp_path / "jobs" / job_id / "logs" / "a1.log"
        log.parent.mkdir(parents=True)
        log.write_text("something")
        until(lambda: api.http.get(f"/v1/jobs/{job_id}").status_code == 404)
        until(lambda: not log.exists())
        assert api.job(kept)["expires_at"] is not None


# --- many at a time --------------------------------------------------------------------------------------------------------------


def test_the_filters_of_the_list_choose_what_goes(any_api: Api) -> None:
    gone = ended(any_api, JobState.FAILED, labels={"team": "x"})
    stay = {
        ended(any_api, JobState.FAILED, labels={"team": "y"}),
        ended(any_api, JobState.SUCCEEDED, labels={"team": "x"}),
        b.submit(any_api.store, labels={"team": "x"}),
    }
    answer = delete(any_api, state="failed", label_team="x")
    assert answer.status_code == 200, answer.text
    assert answer.json() == {"object": "deletion", "deleted": [gone], "bytes": 0, "has_more": False}
    assert left(any_api) == stay


def test_a_job_that_has_not_ended_never_goes(any_api: Api) -> None:
    states = [state for state in JobState if state not in TERMINAL | {JobState.QUEUED}]
    alive = {b.bring_to(any_api.store, state, name="one") for state in (*states, JobState.QUEUED)}  # last, or it would be claimed
    ended(any_api, name="one")
    assert len(delete(any_api, q="one").json()["deleted"]) == 1
    assert left(any_api) == alive


def test_a_dry_run_deletes_nothing_and_says_what_would_go(any_api: Api) -> None:
    ids = [ended(any_api) for _ in range(3)]
    would = delete(any_api, state="cancelled", limit=2, dry_run="true").json()
    assert left(any_api) == set(ids)
    assert would == {"object": "deletion", "deleted": [ids[2], ids[1]], "bytes": 0, "has_more": True}
    assert delete(any_api, state="cancelled", limit=2).json() == would


def test_bytes_are_those_of_what_went(any_api: Api) -> None:
    run = b.running(any_api.store)
    b.record(any_api.store, run, b.plan(), b.checkpoint(10), b.checkpoint(20))
    b.finish(any_api.store, run)
    assert delete(any_api, state="succeeded").json()["bytes"] == 400


@pytest.mark.parametrize("params", [{}, {"limit": 5}, {"dry_run": "true"}, {"q": ""}])
def test_a_call_without_a_filter_is_refused(api: Api, params: dict[str, Any]) -> None:
    job_id = ended(api)
    refused = delete(api, **params)
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["code"] == "missing_filter"
    assert left(api) == {job_id}


@pytest.mark.parametrize("params", [{"state": "running"}, {"stat": "failed"}, {"q": "a", "limit": 1001}, {"created_before": "yesterday"}])
def test_a_filter_that_is_none_is_refused(api: Api, params: dict[str, Any]) -> None:
    job_id = ended(api)
    assert delete(api, **params).status_code == 422
    assert left(api) == {job_id}


def test_files_follow_the_answer(any_api: Api) -> None:
    ids = [ended(any_api) for _ in range(3)]
    for job_id in ids:
        folder = any_api.data_dir / "jobs" / job_id / "logs"
        folder.mkdir(parents=True)
        (folder / "a1.log").write_text("something")
    assert len(delete(any_api, state="cancelled").json()["deleted"]) == 3
    until(lambda: not any((any_api.data_dir / "jobs" / job_id).exists() for job_id in ids))


def many_ended(store: Store, count: int, *, events_each: int = 20) -> None:
    """As if they had run: with a history of some length."""
    new = [submission.Submission(b.spec(labels={"batch": "1"}))] * count
    with store.write() as tx:
        stored = [result for result in submission.submit_all(tx, new) if isinstance(result, submission.Submitted)]
        tx.run(update(jobs).values(state=JobState.SUCCEEDED, finished_at=tx.now_ms))
        told = {"at": tx.now_ms, "type": "note", "data": {}}
        tx.run(insert(events), [{"job_id": one.job_id, "seq": 2 + i, **told} for one in stored for i in range(events_each)])


def test_five_hundred_jobs_go_in_one_quick_call(any_api: Api) -> None:
    many_ended(any_api.store, 500)
    began = time.monotonic()
    answer = delete(any_api, label_batch="1", limit=500)
    took_s = time.monotonic() - began
    assert len(answer.json()["deleted"]) == 500
    assert took_s < 1.0, "the requirement"
    assert left(any_api) == set()


def test_both_clients_delete_many(any_api: Api) -> None:
    ids = [ended(any_api, labels={"team": "x"}) for _ in range(2)]
    with Client(any_api.url) as client:
        assert client.delete_many(labels={"team": "x"}, dry_run=True).deleted == ids[::-1]
        found = client.delete_many(labels={"team": "x"})
        assert (found.deleted, found.has_more) == (ids[::-1], False)
        with pytest.raises(ApiError, match="without any"):
            client.delete_many()
        assert client.submit(DIGITS).bytes == 0
