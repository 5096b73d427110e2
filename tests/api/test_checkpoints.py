"""Checkpoints: listed as they are, downloaded whole and in parts, verified by digest."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass

import pytest

from api.ranges import Span, Unsatisfiable, span_of
from powergrad.jobs import rows
from powergrad.jobs.artifacts import BLOCK_BYTES
from tests.api.conftest import Api
from tests.jobs import builders

WEIGHTS = bytes(range(256)) * (2 * BLOCK_BYTES // 256) + b"tail"  # more than two blocks
SIZE = len(WEIGHTS)


@dataclass(frozen=True)
class Stored:
    job_id: str

    def url(self, checkpoint: str = "best") -> str:
        return f"/v1/jobs/{self.job_id}/checkpoints/{checkpoint}/model.safetensors"


@pytest.fixture
def stored(any_api: Api) -> Stored:
    """Step 10 is the best, step 20 the latest; both files hold WEIGHTS, 20's with one more byte."""
    run = builders.running(any_api.store)
    builders.record(any_api.store, run, builders.plan())
    for step, top1, data in ((10, 0.9, WEIGHTS), (20, 0.5, WEIGHTS + b"!")):
        written = builders.checkpoint(step, top1).model_copy(update={"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
        folder = any_api.data_dir / rows.job_dir(run.job_id) / written.path
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(data)
        builders.record(any_api.store, run, builders.evaluation(step, top1), written)
    return Stored(run.job_id)


def test_checkpoints_are_listed_newest_first(any_api: Api, stored: Stored) -> None:
    found = any_api.http.get(f"/v1/jobs/{stored.job_id}/checkpoints").json()
    assert [(one["id"], one["is_best"], one["is_latest"], one["bytes"]) for one in found["data"]] == [
        ("step-00000020", False, True, SIZE + 1),
        ("step-00000010", True, False, SIZE),
    ]


@pytest.mark.parametrize(("wanted", "data"), [("best", WEIGHTS), ("step-00000010", WEIGHTS), ("latest", WEIGHTS + b"!")])
def test_the_file_comes_whole_with_its_digest(any_api: Api, stored: Stored, wanted: str, data: bytes) -> None:
    answer = any_api.http.get(stored.url(wanted))
    digest = hashlib.sha256(data)
    assert (answer.status_code, answer.content) == (200, data)
    assert int(answer.headers["content-length"]) == len(data)
    assert answer.headers["etag"] == f'"{digest.hexdigest()}"'
    assert answer.headers["repr-digest"] == f"sha-256=:{base64.b64encode(digest.digest()).decode()}:"
    assert answer.headers["accept-ranges"] == "bytes"


def test_head_tells_size_and_digest_without_the_file(any_api: Api, stored: Stored) -> None:
    got, head = any_api.http.get(stored.url()), any_api.http.head(stored.url())
    assert (head.status_code, head.content) == (200, b"")
    for name in ("content-length", "etag", "repr-digest", "content-type"):
        assert head.headers[name] == got.headers[name]


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=100-", 100, SIZE),
        (f"bytes={BLOCK_BYTES - 1}-{BLOCK_BYTES}", BLOCK_BYTES - 1, BLOCK_BYTES + 1),
        ("bytes=-4", SIZE - 4, SIZE),
        (f"bytes=-{10 * SIZE}", 0, SIZE),
        (f"bytes=5-{10 * SIZE}", 5, SIZE),
        (f"bytes=5-{'9' * 40}", 5, SIZE),
        (f"bytes=-{'9' * 40}", 0, SIZE),
        (f"bytes={'0' * 40}5-7", 5, 8),
    ],
)
def test_a_part_of_the_file(any_api: Api, stored: Stored, asked: str, start: int, end: int) -> None:
    answer = any_api.http.get(stored.url(), headers={"Range": asked})
    assert (answer.status_code, answer.content) == (206, WEIGHTS[start:end])
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{SIZE}"
    assert int(answer.headers["content-length"]) == end - start


@pytest.mark.parametrize(
    "asked", [f"bytes={SIZE}-", f"bytes={SIZE}-{SIZE + 5}", "bytes=-0", f"bytes={'9' * 40}-", f"bytes={'9' * 5000}-{'9' * 5000}"]
)
def test_a_part_behind_the_end_is_refused(any_api: Api, stored: Stored, asked: str) -> None:
    answer = any_api.http.get(stored.url(), headers={"Range": asked})
    assert (answer.status_code, answer.json()["code"]) == (416, "range_not_satisfiable")
    assert answer.headers["content-range"] == f"bytes */{SIZE}"


@pytest.mark.parametrize("asked", ["lines=1-2", "bytes=5-4", "bytes=-", "bytes=0-1,5-6", "bytes=a-b"])
def test_what_is_no_single_range_gets_the_whole_file(any_api: Api, stored: Stored, asked: str) -> None:
    assert any_api.http.get(stored.url(), headers={"Range": asked}).status_code == 200


def test_a_resumed_download_of_another_file_starts_again(any_api: Api, stored: Stored) -> None:
    etag = any_api.http.head(stored.url("latest")).headers["etag"]
    headers = {"Range": "bytes=5-", "If-Range": etag}
    assert any_api.http.get(stored.url("latest"), headers=headers).status_code == 206
    assert any_api.http.get(stored.url("best"), headers=headers).status_code == 200


def test_a_file_that_is_there_is_not_sent_again(any_api: Api, stored: Stored) -> None:
    etag = any_api.http.head(stored.url()).headers["etag"]
    for asked in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        answer = any_api.http.get(stored.url(), headers={"If-None-Match": asked})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", etag)
    assert any_api.http.head(stored.url(), headers={"If-None-Match": "*"}).status_code == 304
    assert any_api.http.head(stored.url(), headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize("wanted", ["step-00000030", "newest", "step-1", "%00", "..%2f..%2fjobs.db"])
def test_a_checkpoint_that_is_not_there(any_api: Api, stored: Stored, wanted: str) -> None:
    answer = any_api.http.get(stored.url(wanted))
    assert answer.status_code == 404
    assert answer.json()["code"] in {"checkpoint_not_found", "not_found"}  # an encoded slash is another path


def test_a_job_without_checkpoints_has_no_best(any_api: Api) -> None:
    job = any_api.submit()
    assert any_api.http.get(f"/v1/jobs/{job['id']}/checkpoints").json()["data"] == []
    assert any_api.http.get(Stored(job["id"]).url()).json()["code"] == "checkpoint_not_found"


def test_a_file_cut_short_is_never_sent(any_api: Api, stored: Stored) -> None:
    path = next((any_api.data_dir / rows.job_dir(stored.job_id)).rglob("step-00000010/model.safetensors"))
    path.write_bytes(WEIGHTS[:-1])
    answer = any_api.http.get(stored.url())
    assert (answer.status_code, answer.json()["code"]) == (404, "checkpoint_not_found")
    path.unlink()
    assert any_api.http.get(stored.url()).status_code == 404


def test_a_range_is_the_bytes_python_would_slice() -> None:
    data = bytes(range(10))
    for first in range(12):
        for last in range(first, 12):
            if first >= len(data):
                with pytest.raises(Unsatisfiable):
                    span_of(f"bytes={first}-{last}", len(data))
            else:
                span = span_of(f"bytes={first}-{last}", len(data))
                assert span is not None
                assert data[span.start : span.start + span.length] == data[first : last + 1]
    assert span_of(None, 10) is None
    assert span_of("bytes=-3", 10) == Span(7, 3)


def test_a_checkpoint_is_pinned_and_left_to_retention_again(any_api: Api, stored: Stored) -> None:
    url = f"/v1/jobs/{stored.job_id}/checkpoints"
    for action, pinned in (("pin", True), ("pin", True), ("unpin", False), ("unpin", False)):
        answer = any_api.http.post(f"{url}/latest/{action}")
        assert (answer.status_code, answer.json()["id"], answer.json()["pinned"]) == (200, "step-00000020", pinned)
        assert [one["pinned"] for one in any_api.http.get(url).json()["data"]] == [pinned, False]


def test_a_checkpoint_that_is_not_there_cannot_be_pinned(any_api: Api, stored: Stored) -> None:
    answer = any_api.http.post(f"/v1/jobs/{stored.job_id}/checkpoints/step-00000099/pin")
    assert (answer.status_code, answer.json()["code"]) == (404, "checkpoint_not_found")
