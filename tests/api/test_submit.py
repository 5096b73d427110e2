"""POST /v1/jobs: what is accepted, what is refused, and that nothing is stored twice or half."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.api.conftest import DIGITS, Api, register_worker, serving, settings_for
from tests.jobs import builders

JSON = {"Content-Type": "application/json"}


def post(api: Api, content: bytes | Iterator[bytes], **headers: str) -> httpx2.Response:
    return api.http.post("/v1/jobs", content=content, headers={**JSON, **headers})


def violations(answer: httpx2.Response, status: int = 422) -> dict[str, dict[str, Any]]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    return {error["pointer"]: error for error in answer.json()["errors"]}


def count(api: Api) -> int:
    return len(api.http.get("/v1/jobs", params={"limit": 100}).json()["data"])


def test_a_data_set_alone_is_a_job(any_api: Api) -> None:
    answer = any_api.http.post("/v1/jobs", json=DIGITS)
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert int(answer.headers["retry-after"]) > 0
    assert (job["state"], job["spec"]["optimizer"]["lr"], job["queue"]["position"]) == ("queued", 0.1, 1)


def test_the_answer_is_what_a_get_shows_with_the_same_etag(any_api: Api) -> None:
    any_api.submit(priority=9)
    answer = any_api.http.post("/v1/jobs", json={**DIGITS, "labels": {"team": "vision"}})
    shown = any_api.http.get(answer.headers["location"])
    assert shown.json() == answer.json()
    assert shown.headers["etag"] == answer.headers["etag"]


def test_jobs_stored_in_one_group_have_places_one_after_the_other(any_api: Api) -> None:
    with ThreadPoolExecutor(16) as pool:
        jobs = list(pool.map(lambda number: any_api.submit(priority=number % 2), range(32)))
    by_place = sorted((any_api.job(job["id"]) for job in jobs), key=lambda job: job["queue"]["position"])
    assert [job["queue"]["position"] for job in by_place] == list(range(1, 33))
    assert [job["priority"] for job in by_place] == [1] * 16 + [0] * 16


def test_a_dry_run_gives_the_normalised_spec_and_stores_nothing(api: Api) -> None:
    answer = api.http.post("/v1/jobs", params={"dry_run": "true"}, json=DIGITS)
    assert answer.status_code == 200
    assert answer.json()["model"]["name"] == "resnet18"
    assert count(api) == 0


def test_a_dry_run_reports_violations_too(api: Api) -> None:
    answer = api.http.post("/v1/jobs", params={"dry_run": "true"}, json={**DIGITS, "epochs": 0})
    assert violations(answer)["/epochs"]["code"] == "out_of_range"


# --- idempotency


def test_the_same_key_and_body_give_the_same_job(any_api: Api) -> None:
    first = any_api.http.post("/v1/jobs", json=DIGITS, headers={"Idempotency-Key": "k"})
    reordered = b'{ "data" : {"dataset":"digits"} }'
    again = post(any_api, reordered, **{"Idempotency-Key": "k"})
    assert (again.status_code, again.headers["idempotency-replayed"]) == (202, "true")
    assert "idempotency-replayed" not in first.headers
    assert again.json() == first.json()
    assert count(any_api) == 1


def test_the_same_key_with_another_body_is_refused(any_api: Api) -> None:
    any_api.http.post("/v1/jobs", json=DIGITS, headers={"Idempotency-Key": "k"})
    answer = any_api.http.post("/v1/jobs", json={**DIGITS, "seed": 1}, headers={"Idempotency-Key": "k"})
    assert (answer.status_code, answer.json()["code"]) == (422, "idempotency_mismatch")


def test_one_key_sent_by_many_at_once_makes_one_job(any_api: Api) -> None:
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: any_api.http.post("/v1/jobs", json=DIGITS, headers={"Idempotency-Key": "k"}), range(24)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sum("idempotency-replayed" not in answer.headers for answer in answers) == 1


def test_a_refused_submission_takes_no_other_of_its_group_with_it(any_api: Api) -> None:
    any_api.http.post("/v1/jobs", json=DIGITS, headers={"Idempotency-Key": "k"})

    def send(number: int) -> int:
        key = "k" if number % 3 == 0 else f"k{number}"
        return any_api.http.post("/v1/jobs", json={**DIGITS, "seed": 7}, headers={"Idempotency-Key": key}).status_code

    with ThreadPoolExecutor(15) as pool:
        statuses = list(pool.map(send, range(30)))
    assert statuses == [422 if number % 3 == 0 else 202 for number in range(30)]
    assert count(any_api) == 21


@pytest.mark.parametrize("key", ["", "a" * 256, "with space", "caf\u00e9"])
def test_a_key_that_cannot_be_kept_is_refused(api: Api, key: str) -> None:
    answer = api.http.post("/v1/jobs", json=DIGITS, headers={b"Idempotency-Key": key.encode("latin-1")})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


# --- bodies that break rules


def test_of_very_many_violations_the_first_100_are_told_and_all_are_counted(api: Api) -> None:
    answer = api.http.post("/v1/jobs", json={**DIGITS, **{f"field-{number}": 0 for number in range(30_000)}})
    assert len(violations(answer)) == len(answer.json()["errors"]) == 100
    assert answer.json()["detail"] == "30000 rules are broken: the first 100 are in errors"
    assert len(answer.content) < 20_000


def test_of_very_many_bad_parameters_the_first_100_are_told(api: Api) -> None:
    answer = api.http.get("/v1/jobs?" + "&".join(["state=x"] * 3000))
    assert (answer.status_code, len(answer.json()["errors"])) == (422, 100)
    assert answer.json()["detail"] == "3000 rules are broken: the first 100 are in errors"


def test_every_violation_is_told_at_once(api: Api) -> None:
    body = {"data": {"dataset": "digits", "batch_size": "many"}, "loss": {"alpha": 1.4}, "epoch": 3}
    found = violations(api.http.post("/v1/jobs", json=body))
    assert set(found) == {"/data/batch_size", "/loss/alpha", "/epoch"}
    assert (found["/loss/alpha"]["code"], found["/loss/alpha"]["value"]) == ("out_of_range", 1.4)
    assert "at most 1" in found["/loss/alpha"]["detail"]
    assert found["/epoch"]["code"] == "unknown_field"


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400])
def test_numbers_that_are_none_are_named(api: Api, value: str) -> None:
    found = violations(post(api, b'{"data":{"dataset":"digits"},"loss":{"alpha":%s}}' % value.encode()))
    assert "/loss/alpha" in found


def test_a_nan_where_no_number_belongs_is_named(api: Api) -> None:
    assert "/labels/a" in violations(post(api, b'{"data":{"dataset":"digits"},"labels":{"a":NaN}}'))


def test_a_nan_in_an_unknown_field_is_named(api: Api) -> None:
    assert violations(post(api, b'{"data":{"dataset":"digits"},"x":NaN}'))["/x"]["code"] == "unknown_field"


@pytest.mark.parametrize("text", ["\x00", "a\x00b", "\ud800"])
def test_characters_no_database_takes_are_named(any_api: Api, text: str) -> None:
    body = json.dumps({**DIGITS, "labels": {"a": text}}).encode()
    assert violations(post(any_api, body))


@pytest.mark.parametrize("field", ["seed", "epochs", "priority"])
def test_integers_no_database_holds_are_named(any_api: Api, field: str) -> None:
    assert f"/{field}" in violations(any_api.http.post("/v1/jobs", json={**DIGITS, field: 2**64}))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"{'data': 1}",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"9" * 5000,
    ],
    ids=["empty", "cut short", "not utf-8", "not json", "deep list", "deep object", "5000 digits"],
)
def test_what_is_no_json_is_malformed(api: Api, body: bytes) -> None:
    answer = post(api, body)
    assert (answer.status_code, answer.json()["code"]) == (400, "malformed")


@pytest.mark.parametrize("body", [b"null", b"[]", b"3", b'"digits"', b"[" * 500 + b"]" * 500])
def test_json_that_is_no_object_is_invalid(api: Api, body: bytes) -> None:
    answer = post(api, body)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"] == ""


def test_a_body_over_the_limit_is_refused_and_the_refusal_arrives(api: Api) -> None:
    answer = post(api, b'{"x":"' + b"a" * (10 << 20) + b'"}')
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")


def test_a_chunked_body_over_the_limit_is_refused(api: Api) -> None:
    answer = post(api, (b"a" * 65536 for _ in range(40)))
    assert answer.status_code == 413


def test_a_chunked_body_within_it_is_taken(api: Api) -> None:
    text = json.dumps(DIGITS).encode()
    assert post(api, (text[at : at + 7] for at in range(0, len(text), 7))).status_code == 202


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""])
def test_only_json_is_taken(api: Api, content_type: str) -> None:
    answer = api.http.post("/v1/jobs", content=json.dumps(DIGITS), headers={"Content-Type": content_type})
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")
    assert count(api) == 0


# --- what workers can do


def test_names_no_worker_knows_are_refused_with_the_nearest(any_api: Api) -> None:
    register_worker(any_api.store, models=["resnet18", "mlp"])
    found = violations(any_api.http.post("/v1/jobs", json={"data": {"dataset": "digit"}, "model": {"name": "resnet19"}}), 404)
    assert "did you mean 'resnet18'?" in found["/model/name"]["detail"]
    assert "did you mean 'digits'?" in found["/data/dataset"]["detail"]


def test_before_the_first_worker_any_well_formed_name_passes(api: Api) -> None:
    assert api.submit({"data": {"dataset": "digits"}, "model": {"name": "not-yet-known"}})["state"] == "queued"


def test_a_full_disk_refuses_new_jobs(sqlite_url: str, tmp_path: Path) -> None:
    with serving(settings_for(sqlite_url, tmp_path, min_free_bytes=1 << 60)) as api:
        answer = api.http.post("/v1/jobs", json=DIGITS)
        assert (answer.status_code, answer.json()["code"]) == (507, "storage_full")
        assert "MiB" in answer.json()["detail"]


def test_a_job_begins_with_the_weights_of_another(any_api: Api) -> None:
    origin = with_checkpoint(any_api)
    spec = {**DIGITS, "model": {"init_from": f"{origin}/latest"}}
    checked = any_api.http.post("/v1/jobs", json=spec, params={"dry_run": "true"}).json()
    assert checked["model"]["init_from"] == f"{origin}/step-00000020"
    assert not any(one["pinned"] for one in any_api.http.get(f"/v1/jobs/{origin}/checkpoints").json()["data"])
    assert any_api.submit(spec)["spec"]["model"]["init_from"] == f"{origin}/step-00000020"
    pinned = {one["id"]: one["pinned"] for one in any_api.http.get(f"/v1/jobs/{origin}/checkpoints").json()["data"]}
    assert pinned == {"step-00000020": True, "step-00000010": False}


@pytest.mark.parametrize("dry_run", ["true", "false"])
def test_a_beginning_that_is_not_there_is_refused_at_its_place(any_api: Api, dry_run: str) -> None:
    for wanted, code, refusal in (
        ("job_01KAQZ5V3N8T4W6Y7C9E1G2H3J", "not_found", (404, "unknown_reference")),
        (any_api.submit()["id"], "no_checkpoint", (409, "reference_not_ready")),
    ):
        answer = any_api.http.post("/v1/jobs", json={**DIGITS, "model": {"init_from": wanted}}, params={"dry_run": dry_run})
        assert (answer.status_code, answer.json()["code"]) == refusal
        assert [(one["pointer"], one["code"]) for one in answer.json()["errors"]] == [("/model/init_from", code)]


def test_a_clone_begins_with_a_checkpoint_of_the_original(any_api: Api) -> None:
    origin = with_checkpoint(any_api)
    clone = any_api.http.post(f"/v1/jobs/{origin}/clone", json={"from_checkpoint": "best", "set": {"epochs": 3}})
    assert clone.status_code == 202
    assert clone.json()["spec"]["model"]["init_from"] == f"{origin}/step-00000010"
    assert clone.json()["spec"]["epochs"] == 3


@pytest.mark.parametrize(
    ("body", "code", "status"),
    [
        ({"from_checkpoint": "step-00000099"}, "not_found", 404),
        ({"from_checkpoint": "newest"}, "bad_format", 422),
        ({"from_checkpoint": "best", "set": {"model.init_from": "job_01KAQZ5V3N8T4W6Y7C9E1G2H3J"}}, "conflict", 422),
    ],
)
def test_a_clone_from_no_checkpoint_is_refused_at_its_place(any_api: Api, body: dict[str, Any], code: str, status: int) -> None:
    answer = any_api.http.post(f"/v1/jobs/{with_checkpoint(any_api)}/clone", json=body)
    assert answer.status_code == status
    assert [(one["pointer"], one["code"]) for one in answer.json()["errors"]] == [("/from_checkpoint", code)]


def with_checkpoint(api: Api) -> str:
    """A job whose best checkpoint is step 10 and whose latest is step 20."""
    run = builders.running(api.store)
    builders.record(api.store, run, builders.plan(), builders.checkpoint(10, 0.9), builders.checkpoint(20, 0.5))
    return run.job_id
