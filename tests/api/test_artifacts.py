"""Artifacts: listed, downloaded with a digest, freed with their job."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass

import pytest

from powergrad import protocol
from powergrad.jobs import rows
from tests.api.conftest import Api
from tests.jobs import builders

LABELS = b'["cat", "dog"]'


@dataclass(frozen=True)
class Written:
    job_id: str
    run: rows.Run

    def url(self, name: str = "") -> str:
        return f"/v1/jobs/{self.job_id}/artifacts" + (f"/{name}" if name else "")


def write(api: Api, run: rows.Run, name: str, data: bytes, media_type: str = "application/json") -> None:
    path = f"artifacts/{name}"
    file = api.data_dir / rows.job_dir(run.job_id) / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()
    builders.record(api.store, run, protocol.ArtifactWritten(name=name, path=path, media_type=media_type, bytes=len(data), sha256=sha256))


@pytest.fixture
def written(any_api: Api) -> Written:
    run = builders.running(any_api.store)
    write(any_api, run, "labels.json", LABELS)
    write(any_api, run, "curves.svg", b"<svg/>", "image/svg+xml")
    return Written(run.job_id, run)


def test_artifacts_are_listed_by_name(any_api: Api, written: Written) -> None:
    found = any_api.http.get(written.url()).json()
    assert found["object"] == "list"
    assert [(one["name"], one["media_type"], one["bytes"]) for one in found["data"]] == [
        ("curves.svg", "image/svg+xml", 6),
        ("labels.json", "application/json", len(LABELS)),
    ]
    assert found["data"][1]["sha256"] == hashlib.sha256(LABELS).hexdigest()


def test_a_file_comes_with_its_type_and_digest(any_api: Api, written: Written) -> None:
    answer = any_api.http.get(written.url("curves.svg"))
    assert (answer.status_code, answer.content, answer.headers["content-type"]) == (200, b"<svg/>", "image/svg+xml")
    digest = base64.b64encode(hashlib.sha256(b"<svg/>").digest()).decode()
    assert answer.headers["repr-digest"] == f"sha-256=:{digest}:"
    # an SVG may hold a script: it is to be saved, never shown as a page of this server
    assert answer.headers["content-disposition"].startswith("attachment")
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_part_of_a_file_goes_on_where_a_download_broke(any_api: Api, written: Written) -> None:
    answer = any_api.http.get(written.url("labels.json"), headers={"Range": "bytes=4-"})
    assert (answer.status_code, answer.content) == (206, LABELS[4:])
    assert answer.headers["content-range"] == f"bytes 4-{len(LABELS) - 1}/{len(LABELS)}"
    beyond = any_api.http.get(written.url("labels.json"), headers={"Range": "bytes=99-"})
    assert (beyond.status_code, beyond.json()["code"]) == (416, "range_not_satisfiable")


def test_head_tells_size_and_etag(any_api: Api, written: Written) -> None:
    head = any_api.http.head(written.url("labels.json"))
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(len(LABELS)))
    again = any_api.http.get(written.url("labels.json"), headers={"If-None-Match": head.headers["etag"]})
    assert again.status_code == 304


@pytest.mark.parametrize("name", ["missing.json", "..%2Fx", "a%2Fb", "x" * 65, "%00"])
def test_what_is_not_there_is_not_found(any_api: Api, written: Written, name: str) -> None:
    answer = any_api.http.get(written.url(name))
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")


def test_a_file_that_is_being_written_anew_is_not_sent(any_api: Api, written: Written) -> None:
    (any_api.data_dir / rows.job_dir(written.job_id) / "artifacts/labels.json").write_bytes(LABELS + b"!")
    answer = any_api.http.get(written.url("labels.json"))
    assert (answer.status_code, answer.json()["code"]) == (404, "artifact_not_found")


def test_deleting_a_job_frees_its_artifacts(any_api: Api, written: Written) -> None:
    builders.finish(any_api.store, written.run)
    assert any_api.http.delete(f"/v1/jobs/{written.job_id}").status_code == 204
    assert not (any_api.data_dir / rows.job_dir(written.job_id)).exists()
    assert any_api.http.get(written.url()).json()["code"] == "job_not_found"
