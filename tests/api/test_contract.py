"""The OpenAPI document against the server: real answers fit it, and it tells what a route can say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from pydantic import BaseModel

from api import documents, errors, openapi
from powergrad import presets, protocol
from powergrad.jobs.states import JobState
from tests.api.conftest import DIGITS, Api, register_worker
from tests.jobs import builders

METHODS = ("get", "post", "patch", "delete", "head", "put")


def operations(api: Api) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in api.http.get("/openapi.json").json()["paths"].items():
        for method in METHODS:
            if method in item:
                yield method, path, item[method]


def test_every_operation_has_a_name_a_tag_and_a_summary(api: Api) -> None:
    found = list(operations(api))
    ids = [operation["operationId"] for _, _, operation in found]
    assert len(ids) == len(set(ids)) >= 32
    assert all(operation["tags"] and operation["summary"] for _, _, operation in found)


def test_every_refusal_is_a_problem_document(api: Api) -> None:
    for method, path, operation in operations(api):
        for status, response in operation["responses"].items():
            if int(status) >= 400 and method != "head":
                schema = response["content"][errors.MEDIA_TYPE]["schema"]
                assert schema == {"$ref": "#/components/schemas/Problem"}, (method, path, status)


def test_every_reference_leads_somewhere(api: Api) -> None:
    document = api.http.get("/openapi.json").json()

    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                yield node["$ref"]
            for value in node.values():
                yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    schemas = document["components"]["schemas"]
    missing = {reference for reference in references(document) if reference.rpartition("/")[2] not in schemas}
    assert missing == set()


def test_nothing_is_changed_by_a_call_with_a_parameter_that_is_not_known(api: Api) -> None:
    job = api.submit()
    tried = 0
    for method, path, _ in operations(api):
        if method in ("post", "patch", "delete"):
            url = path.replace("{job_id}", job["id"])
            body = {"json": DIGITS} if path != "/v1/predict/{job_id}" else {"content": b"x", "headers": {"Content-Type": "image/png"}}
            answer = api.http.request(method.upper(), url, params={"dryrun": "true", "dry-run": "1"}, **body)
            assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request"), (method, path)
            assert [one["parameter"] for one in answer.json()["errors"]] == ["dryrun", "dry-run"]
            tried += 1
    assert tried >= 11
    assert [one["id"] for one in api.http.get("/v1/jobs").json()["data"]] == [job["id"]]
    assert api.job(job["id"])["version"] == job["version"]


def test_no_look_ignores_a_parameter_that_it_does_not_know(api: Api) -> None:
    """A misspelt filter that is ignored is a wrong answer."""
    job = api.submit()
    values = {"job_id": job["id"], "name": "x", "checkpoint_id": "best", "task_id": "task_x"}
    looks = [(method, path) for method, path, _ in operations(api) if method in ("get", "head") and path.startswith("/v1/")]
    for method, path in looks:
        url = re.sub(r"{(\w+)}", lambda found: values.get(found[1], "x"), path)
        answer = api.http.request(method, url, params={"limit_": "1"})
        assert answer.status_code == 422, (method, path, answer.text)
        assert method == "head" or [one["parameter"] for one in answer.json()["errors"]] == ["limit_"]
    assert len(looks) >= 17


def test_every_operation_says_what_opens_it(api: Api) -> None:
    for method, path, operation in operations(api):
        needs = operation["security"]
        assert bool(needs) == ((path.startswith("/v1/") or path == "/metrics") and (method, path) != ("post", "/v1/session")), path
        assert {name for way in needs for name in way} <= api.http.get("/openapi.json").json()["components"]["securitySchemes"].keys()
        assert bool(needs) == ("401" in operation["responses"]) or path == "/v1/session"


def test_every_link_leads_to_an_operation_and_gives_what_its_path_asks_for(api: Api) -> None:
    paths = {operation["operationId"]: path for _, path, operation in operations(api)}
    links = [
        link
        for _, _, operation in operations(api)
        for response in operation["responses"].values()
        for link in response.get("links", {}).values()
    ]
    assert {"getJob", "cancelJob", "downloadWeights", "downloadArtifact", "getTask", "getPreset"} <= {link["operationId"] for link in links}
    for link in links:
        assert link["parameters"].keys() == openapi.path_names(paths[link["operationId"]])


def test_the_schema_of_a_spec_comes_as_what_it_is_documented_as(api: Api) -> None:
    documented = api.http.get("/openapi.json").json()["paths"]["/v1/schemas/job"]["get"]["responses"]["200"]["content"]
    assert list(documented) == [api.http.get("/v1/schemas/job").headers["content-type"]] == ["application/schema+json"]


def test_the_routes_are_these(api: Api) -> None:
    found = {(method, path) for method, path, _ in operations(api)}
    job = "/v1/jobs/{job_id}"
    assert {
        ("get", f"{job}/artifacts"),
        ("get", f"{job}/artifacts/{{name}}"),
        ("head", f"{job}/artifacts/{{name}}"),
        ("post", f"{job}/checkpoints/{{checkpoint_id}}/pin"),
        ("post", f"{job}/checkpoints/{{checkpoint_id}}/unpin"),
        ("post", "/v1/predict/{job_id}"),
        ("get", "/v1/tasks/{task_id}"),
        ("get", "/v1/presets"),
        ("get", "/v1/presets/{name}"),
    } <= found


def test_framework_schemas_that_nothing_sends_are_not_there(api: Api) -> None:
    assert "HTTPValidationError" not in api.http.get("/openapi.json").text


def test_every_kind_of_refusal_of_the_domain_is_mapped() -> None:
    from powergrad.jobs import errors as domain

    raised = {kind for kind in vars(domain).values() if isinstance(kind, type) and issubclass(kind, domain.JobError)}
    assert raised - set(errors.KINDS) == {domain.JobError, domain.Fenced}  # fenced is between worker and store


@pytest.mark.parametrize("state", list(JobState))
def test_a_job_in_any_state_fits_its_document(any_api: Api, state: JobState) -> None:
    job_id = builders.bring_to(any_api.store, state)
    fits(documents.JobDocument, any_api.http.get(f"/v1/jobs/{job_id}"))


def test_every_other_answer_fits_its_document(any_api: Api) -> None:
    register_worker(any_api.store, models=["resnet18"])
    run = builders.running(any_api.store)
    builders.record(any_api.store, run, builders.plan(), builders.step(1), builders.evaluation(10, 0.5), builders.checkpoint(10, 0.5))
    written = protocol.ArtifactWritten(name="labels.json", path="labels.json", media_type="application/json", bytes=2, sha256="0" * 64)
    builders.record(any_api.store, run, written)
    url, get = f"/v1/jobs/{run.job_id}", any_api.http.get
    fits(documents.JobDocument, get(url))
    fits(documents.JobListDocument, get("/v1/jobs"))
    fits(documents.JobSummaryListDocument, get("/v1/jobs", params={"view": "summary"}))
    fits(documents.ComparisonDocument, get("/v1/metrics/compare"))
    fits(documents.BulkActionDocument, any_api.http.post("/v1/jobs/pause", json={"ids": [run.job_id]}))
    fits(documents.EventListDocument, get(f"{url}/events"))
    fits(documents.SeriesListDocument, get(f"{url}/metrics"))
    fits(documents.CheckpointListDocument, get(f"{url}/checkpoints"))
    fits(documents.ArtifactListDocument, get(f"{url}/artifacts"))
    fits(documents.WorkerListDocument, get("/v1/workers"))
    fits(documents.CatalogueDocument, get("/v1/models"))
    fits(documents.CatalogueDocument, get("/v1/datasets"))
    fits(documents.PresetListDocument, get("/v1/presets"))
    fits(documents.PresetDocument, get(f"/v1/presets/{presets.all_presets()[0].name}"))
    fits(documents.HealthDocument, get("/healthz"))
    fits(documents.ProblemDocument, get("/readyz"))
    fits(documents.ProblemDocument, any_api.http.post("/v1/jobs", json={**DIGITS, "epochs": 0}))
    fits(documents.ProblemDocument, get("/v1/jobs", params={"limit": 0}))


def fits(document: type[BaseModel], answer: httpx2.Response) -> None:
    document.model_validate_json(answer.content)
