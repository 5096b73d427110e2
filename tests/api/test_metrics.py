"""Metric series over HTTP: by name, thinned, after a step, and as CSV."""

from __future__ import annotations

import csv
import io
import math

import pytest

from tests.api.conftest import Api
from tests.jobs import builders


@pytest.fixture
def job_id(any_api: Api) -> str:
    """A job with 2,000 losses (one of them not finite) and two evaluations."""
    run = builders.running(any_api.store)
    steps = [builders.step(number, math.inf if number == 7 else 1 / number) for number in range(1, 2001)]
    builders.record(any_api.store, run, builders.plan(epochs=200), *steps, builders.evaluation(1000, 0.5), builders.evaluation(2000, 0.75))
    return run.job_id


def test_series_come_by_name_and_keep_their_extremes(any_api: Api, job_id: str) -> None:
    answer = any_api.http.get(f"/v1/jobs/{job_id}/metrics").json()
    found = {series["name"]: series for series in answer["data"]}
    assert set(found) == {"images_per_s", "train_loss", "val_loss", "val_top1"}
    loss = found["train_loss"]
    assert (loss["total"], loss["steps"][0], loss["steps"][-1]) == (2000, 1, 2000)
    assert len(loss["steps"]) == len(loss["values"]) <= 500
    finite = [value for value in loss["values"] if value is not None]
    assert (max(finite), min(finite)) == (1.0, 1 / 2000)
    assert found["val_top1"]["values"] == [0.5, 0.75]


def test_names_can_be_chosen_and_one_without_points_is_empty(any_api: Api, job_id: str) -> None:
    answer = any_api.http.get(f"/v1/jobs/{job_id}/metrics", params={"name": ["val_top1", "val_top5"]}).json()
    assert answer["data"] == [
        {"name": "val_top1", "total": 2, "steps": [1000, 2000], "values": [0.5, 0.75]},
        {"name": "val_top5", "total": 0, "steps": [], "values": []},
    ]


def test_points_after_a_step(any_api: Api, job_id: str) -> None:
    params: dict[str, str | int] = {"name": "train_loss", "after": 1990, "points": 100}
    assert any_api.http.get(f"/v1/jobs/{job_id}/metrics", params=params).json()["data"][0]["steps"] == list(range(1991, 2001))


def test_csv_has_every_point_a_row_per_step(any_api: Api, job_id: str) -> None:
    answer = any_api.http.get(f"/v1/jobs/{job_id}/metrics", params={"name": ["train_loss", "val_top1"]}, headers={"Accept": "text/csv"})
    assert answer.headers["content-type"].startswith("text/csv")
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [int(row["step"]) for row in rows] == list(range(1, 2001))
    assert rows[6]["train_loss"] == ""
    assert (float(rows[999]["train_loss"]), rows[999]["val_top1"], rows[998]["val_top1"]) == (1 / 1000, "0.5", "")


def test_csv_can_be_thinned(any_api: Api, job_id: str) -> None:
    params: dict[str, str | int] = {"name": "train_loss", "points": 50}
    answer = any_api.http.get(f"/v1/jobs/{job_id}/metrics", params=params, headers={"Accept": "text/csv"})
    assert 10 <= len(answer.text.splitlines()) - 1 <= 50


@pytest.mark.parametrize(("name", "value"), [("points", "3"), ("points", "100001"), ("after", "-2"), ("name", "a b"), ("name", "\x00")])
def test_a_bad_question_is_refused(any_api: Api, job_id: str, name: str, value: str) -> None:
    answer = any_api.http.get(f"/v1/jobs/{job_id}/metrics", params={name: value})
    assert (answer.status_code, answer.json()["errors"][0]["parameter"]) == (422, name)


def test_metrics_of_an_unknown_job_are_not_found(api: Api) -> None:
    assert api.http.get("/v1/jobs/job_00000000000000000000000000/metrics").status_code == 404
