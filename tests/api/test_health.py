"""Probes, measures, the catalogue, workers, and the pages a browser opens."""

from __future__ import annotations

import re
from pathlib import Path

from powergrad.jobs.states import JobState
from powergrad.jobs.store import Store
from tests.api.conftest import Api, Broker, register_worker, serving, settings_for
from tests.jobs import builders


def test_ready_names_every_part_that_is_missing(any_api: Api) -> None:
    answer = any_api.http.get("/readyz")
    body = answer.json()
    assert (answer.status_code, body["code"]) == (503, "not_ready")
    assert int(answer.headers["retry-after"]) > 0
    assert body["checks"]["database"] == "ok"
    assert body["checks"]["workers"] == 0
    assert "broker" in body["detail"]
    assert "workers" in body["detail"]


def test_ready_when_database_broker_and_a_worker_are_there(sqlite_url: str, tmp_path: Path, broker: Broker) -> None:
    with serving(settings_for(sqlite_url, tmp_path, redis_url=broker.url)) as api:
        assert api.http.get("/readyz").json()["checks"]["broker"] == "ok"
        register_worker(api.store)
        answer = api.http.get("/readyz")
        assert (answer.status_code, answer.json()["checks"]) == (200, {"database": "ok", "broker": "ok", "workers": 1})
        broker.stop()
        assert "broker" in api.http.get("/readyz").json()["detail"]
        broker.start()
        assert api.http.get("/readyz").status_code == 200


def test_ready_says_how_to_migrate(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/empty.db"
    Store(url).close()
    with serving(settings_for(url, tmp_path)) as api:
        answer = api.http.get("/readyz")
        assert answer.status_code == 503
        assert "python -P -m powergrad.jobs.migrate" in answer.json()["checks"]["database"]
        assert api.http.get("/healthz").json() == {"status": "ok"}


def test_workers_are_listed_with_what_they_run(any_api: Api) -> None:
    assert any_api.http.get("/v1/workers").json() == {"object": "list", "data": []}
    register_worker(any_api.store)
    (worker,) = any_api.http.get("/v1/workers").json()["data"]
    assert (worker["id"], worker["state"], worker["running"]) == ("host:1", "ready", [])
    assert worker["devices"][0]["name"] == "cpu"


def test_the_catalogue_is_what_workers_published(any_api: Api) -> None:
    assert any_api.http.get("/v1/models").json()["data"] == []
    register_worker(any_api.store, models=["resnet18"])
    assert [entry["name"] for entry in any_api.http.get("/v1/models").json()["data"]] == ["resnet18"]
    assert [entry["name"] for entry in any_api.http.get("/v1/datasets").json()["data"]] == ["digits", "cifar10"]


def test_the_schema_of_a_spec_tells_defaults_ranges_and_meaning(api: Api) -> None:
    schema = api.http.get("/v1/schemas/job").json()
    alpha = schema["$defs"]["LossSpec"]["properties"]["alpha"]
    number = next(one for one in alpha["oneOf"] if one.get("type") == "number")
    assert (alpha["default"], number["minimum"], number["maximum"]) == (1.0, 0.0, 1.0)
    assert schema["required"] == ["data"]
    parts = [schema, *schema["$defs"].values()]
    undescribed = [name for part in parts for name, field in part.get("properties", {}).items() if "description" not in field]
    assert undescribed == []


def test_prometheus_sees_jobs_by_state_and_requests_by_route(any_api: Api) -> None:
    for state in (JobState.QUEUED, JobState.SUCCEEDED):
        any_api.job(builders.bring_to(any_api.store, state))
    text = any_api.http.get("/metrics").text
    assert 'powergrad_jobs{state="queued"} 1.0' in text
    assert 'powergrad_jobs{state="succeeded"} 1.0' in text
    assert 'powergrad_jobs{state="failed"} 0.0' in text
    assert "powergrad_database_up 1.0" in text
    found = re.search(r'powergrad_http_requests_total\{method="GET",route="/v1/jobs/\{job_id\}",status="200"\} (\d+)', text)
    assert found is not None
    assert int(found[1]) >= 2


def test_no_id_becomes_a_label(api: Api) -> None:
    job = api.submit()
    api.job(job["id"])
    api.http.get("/v1/nothing/here")
    text = api.http.get("/metrics").text
    assert job["id"] not in text
    assert "/v1/nothing/here" not in text


def test_the_pages_fetch_nothing_from_elsewhere(api: Api) -> None:
    for path in ("/", "/docs"):
        page = api.http.get(path)
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'self'" in page.headers["content-security-policy"]
        fetched = re.findall(r'(?:src|href)="([^"]+)"', page.text)
        assert fetched
        assert all(target.startswith(("/", "data:")) for target in fetched)
        for target in fetched:
            if target.startswith("/"):
                assert api.http.get(target).status_code == 200, target


def test_swagger_ui_knows_openapi_3_1(api: Api) -> None:
    script = api.http.get("/docs/assets/swagger-ui-bundle.js").text
    version = re.search(r'VERSION:"(\d+)\.', script)
    assert version is not None
    assert int(version[1]) >= 5
    assert api.http.get("/openapi.json").json()["openapi"].startswith("3.1")
