"""What a run is to be written down for beside the store: only what some worker can write."""

from __future__ import annotations

from typing import Any

import pytest

from powergrad.jobs import copies, fleet
from tests.api.conftest import DIGITS, Api, register_worker

OUTPUTS = ("tensorboard", "mlflow")


@pytest.mark.parametrize("name", OUTPUTS)
def test_what_no_worker_can_write_is_refused_with_the_way_out(api: Api, name: str) -> None:
    register_worker(api.store, models=["resnet18"])
    spec = {**DIGITS, "outputs": {name: True}}
    way_out = "powergrad[tensorboard]" if name == "tensorboard" else "POWERGRAD_MLFLOW_URL"
    assert_refused(api, "/v1/jobs", spec, f"/outputs/{name}", way_out)
    assert_refused(api, "/v1/experiments", {"spec": spec, "grid": {"loss.alpha": [1.0, 0.5]}}, f"/spec/outputs/{name}", way_out)


@pytest.mark.parametrize("name", OUTPUTS)
def test_what_a_worker_can_write_is_taken_and_shown(api: Api, name: str) -> None:
    register_worker(api.store, models=["resnet18"])
    with api.store.write() as tx:
        fleet.publish(tx, "outputs", [{"name": name}])
    job = api.submit(outputs={name: True})
    assert job["spec"]["outputs"] == {other: other == name for other in OUTPUTS}


def test_before_the_first_worker_anything_passes(api: Api) -> None:
    assert api.submit(outputs={"mlflow": True, "tensorboard": True})["state"] == "queued"


def test_no_spec_names_a_server(api: Api) -> None:
    for value in ("http://169.254.169.254/", {"url": "http://169.254.169.254/"}):
        answer = api.http.post("/v1/jobs", json={**DIGITS, "outputs": {"mlflow": value}})
        assert answer.status_code == 422


def test_a_job_that_is_deleted_leaves_no_copy_to_be_made(any_api: Api) -> None:
    job = any_api.submit(outputs={"mlflow": True})
    any_api.http.post(f"/v1/jobs/{job['id']}/cancel")
    assert any_api.http.delete(f"/v1/jobs/{job['id']}").status_code == 204
    with any_api.store.read() as tx:
        assert copies.due(tx) == []


def assert_refused(api: Api, path: str, body: dict[str, Any], pointer: str, way_out: str) -> None:
    answer = api.http.post(path, json=body)
    assert answer.status_code == 422, answer.text
    (violation,) = answer.json()["errors"]
    assert (violation["pointer"], violation["code"]) == (pointer, "not_available")
    assert way_out in violation["detail"]
