"""The paper's experiments over HTTP: each can be submitted as it is."""

from __future__ import annotations

from powergrad import presets
from tests.api.conftest import Api


def test_every_preset_is_listed_with_the_papers_figures(api: Api) -> None:
    found = api.http.get("/v1/presets").json()
    assert [one["name"] for one in found["data"]] == [one.name for one in presets.all_presets()]
    assert all(0.0 < one["paper"]["val_top1"] < 1.0 for one in found["data"])


def test_a_preset_is_a_spec_that_is_accepted(api: Api) -> None:
    for one in api.http.get("/v1/presets").json()["data"]:
        shown = api.http.get(f"/v1/presets/{one['name']}").json()
        assert shown == one
        answer = api.http.post("/v1/jobs", json=shown["spec"], params={"dry_run": "true"})
        assert answer.status_code == 200, (one["name"], answer.text)


def test_a_preset_that_is_not_there_is_not_found(api: Api) -> None:
    answer = api.http.get("/v1/presets/paper-99")
    assert (answer.status_code, answer.json()["code"]) == (404, "preset_not_found")
    assert presets.all_presets()[0].name in answer.json()["detail"]
