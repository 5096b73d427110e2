"""/v1/datasets: what is taken in and what is refused, with nothing left behind. The worker here is the test, which calls the real check."""

from __future__ import annotations

import io
import os
import shutil
import socket
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image
from sqlalchemy import select

from api import uploads as receiving
from api.documents import DatasetDocument, DatasetSamplesDocument
from powergrad.data.check import check
from powergrad.jobs import keys, quotas, tasks, uploads
from powergrad.jobs.keys import Scope
from powergrad.jobs.store import Store
from powergrad.jobs.sweeper import sweep_once
from powergrad.jobs.tables import api_keys, deletions
from powergrad.jobs.tables import datasets as rows
from tests.api.conftest import Api, register_worker, serving, settings_for, until
from tests.jobs import builders
from tests.pictures import encoded, flowers, png, tarred, zipped

ZIP, TAR, GZIP = "application/zip", "application/x-tar", "application/gzip"


def upload(api: Api, content: Any, name: str = "flowers", kind: str = ZIP, **params: Any) -> httpx2.Response:
    return api.http.post("/v1/datasets", content=content, headers={"Content-Type": kind}, params={"name": name, **params})


def work(api: Api) -> int:
    """Do every check that waits, as a worker's child does it; how many there were."""
    done = 0
    while True:
        with api.store.write() as tx:
            task = tasks.claim(tx, lease_s=60, long=True)
        if task is None:
            return done
        done += 1
        try:
            result = check(task.arguments, api.data_dir)
        except Exception as error:  # noqa: BLE001 - as a child answers
            with api.store.write() as tx:
                tasks.fail(tx, task, "data_missing", str(error))
        else:
            with api.store.write() as tx:
                tasks.finish(tx, task, result)


def shown(api: Api, name: str = "flowers", **params: Any) -> dict[str, Any]:
    answer = api.http.get(f"/v1/datasets/{name}", params=params)
    assert answer.status_code == 200, answer.text
    DatasetDocument.model_validate_json(answer.content)
    found: dict[str, Any] = answer.json()
    return found


def left(api: Api) -> list[str]:
    """What lies below uploads/."""
    folder = api.data_dir / "uploads"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.fixture
def api(api: Api) -> Api:
    return _swept(api)


@pytest.fixture
def any_api(any_api: Api) -> Api:
    return _swept(any_api)


def _swept(running: Api) -> Api:
    """One server serves all tests, over an emptied database: what one has uploaded must not look like the leavings of the next."""
    shutil.rmtree(running.data_dir / "uploads", ignore_errors=True)
    shutil.rmtree(running.data_dir / "datasets", ignore_errors=True)
    shutil.rmtree(running.data_dir / "samples", ignore_errors=True)
    return running


def refused(answer: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    problem: dict[str, Any] = answer.json()
    return problem


def test_an_upload_is_checked_and_then_ready(any_api: Api) -> None:
    answer = upload(any_api, zipped(flowers()))
    assert answer.status_code == 202
    assert answer.headers["Location"] == "/v1/datasets/flowers"
    assert (answer.json()["state"], answer.json()["files"], answer.json()["current"]) == ("checking", 12, None)
    assert work(any_api) == 1
    found = shown(any_api)
    assert (found["state"], found["classes"], found["splits"]) == ("ready", 3, {"train": 12})
    assert found["current"] == found["version"] == answer.json()["version"]
    assert found["report"]["class_counts"]["rose"] == {"train": 4}
    assert found["bytes"] == sum(map(len, flowers().values()))


@pytest.mark.parametrize(
    ("kind", "pack"), [(TAR, lambda e: tarred(e, "w")), (GZIP, tarred), ("application/x-xz", lambda e: tarred(e, "w:xz"))]
)
def test_tars_are_taken_and_the_same_files_are_the_same_version(api: Api, kind: str, pack: Callable[[Any], bytes]) -> None:
    version = upload(api, pack(flowers()), kind=kind).json()["version"]
    again = upload(api, zipped(flowers()))
    assert (again.status_code, again.json()["version"]) == (200, version)
    assert len(again.json()["versions"]) == 1
    until(lambda: len(left(api)) == 1)


def test_other_files_are_another_version_beside_it(api: Api) -> None:
    first = upload(api, zipped(flowers())).json()["version"]
    work(api)
    second = upload(api, zipped(flowers(seed=7))).json()
    assert second["version"] != first
    assert second["current"] == first, "a job gets what is ready"
    work(api)
    found = shown(api)
    assert found["current"] == second["version"]
    assert [one["version"] for one in found["versions"]] == [second["version"], first]
    assert shown(api, version=first)["version"] == first


def test_equal_uploads_at_once_are_stored_once(any_api: Api) -> None:
    content = zipped(flowers())
    answers = builders.at_once([lambda: upload(any_api, content) for _ in range(5)])
    assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 200, 202]
    assert len({answer.json()["version"] for answer in answers}) == 1
    until(lambda: len(left(any_api)) == 1)
    assert work(any_api) == 1


def test_the_list_has_built_in_sets_and_ones_own(api: Api) -> None:
    register_worker(api.store, models=["resnet18"])
    upload(api, zipped(flowers()), name="b")
    upload(api, zipped(flowers()), name="a")
    entries = api.http.get("/v1/datasets").json()["data"]
    assert [entry["name"] for entry in entries] == ["digits", "cifar10", "a", "b"]
    assert [entry.get("state") for entry in entries] == [None, None, "checking", "checking"]


HOSTILE = {
    "../up.png": "leads upwards",
    "/etc/passwd.png": "absolute",
    "ROSE/9.png": "only in case",
}


@pytest.mark.parametrize("entry", HOSTILE)
def test_a_hostile_entry_is_named_and_nothing_is_left(api: Api, entry: str) -> None:
    before = {path for path in api.data_dir.parent.rglob("*.png") if "uploads" not in path.parts}
    problem = refused(upload(api, zipped(flowers() | {entry: png(1)})), 422, "bad_archive")
    assert problem["entry"] == entry
    assert HOSTILE[entry] in problem["rule"]
    until(lambda: left(api) == [])
    assert {path for path in api.data_dir.parent.rglob("*.png") if "uploads" not in path.parts} == before


def test_a_link_is_refused(api: Api) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        info = tarfile.TarInfo("rose/passwd.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    problem = refused(upload(api, out.getvalue(), kind=TAR), 422, "bad_archive")
    assert "is a link" in problem["rule"]


def test_another_layout_is_told_by_what_was_found(api: Api) -> None:
    problem = refused(upload(api, zipped({"1.png": png(1), "2.png": png(2)})), 422, "bad_archive")
    assert (problem["entry"], "lies in no class folder" in problem["rule"]) == ("1.png", True)


@pytest.mark.parametrize("content", [b"no archive at all", b"PK\x03\x04broken"])
def test_what_is_no_archive_is_refused(api: Api, content: bytes) -> None:
    refused(upload(api, content), 422, "bad_archive")
    until(lambda: left(api) == [])


def test_an_empty_body_is_refused(api: Api) -> None:
    answer = api.http.post("/v1/datasets", content=iter([]), headers={"Content-Type": ZIP}, params={"name": "flowers"})
    refused(answer, 400, "malformed")
    until(lambda: left(api) == [])


@pytest.mark.parametrize("name", ["digits", "class_folder", "cifar10"])
def test_names_of_built_in_sets_are_taken(api: Api, name: str) -> None:
    refused(upload(api, zipped(flowers()), name=name), 409, "name_taken")
    refused(api.http.post("/v1/datasets", json={"name": name, "path": "x"}), 404, "unknown_reference")
    assert left(api) == []


@pytest.mark.parametrize("name", ["", "a/b", "ä", "x" * 65, None])
def test_a_bad_name_is_refused(api: Api, name: str | None) -> None:
    params = {} if name is None else {"name": name}
    answer = api.http.post("/v1/datasets", content=zipped(flowers()), headers={"Content-Type": ZIP}, params=params)
    refused(answer, 422, "invalid_request")


@pytest.mark.parametrize("kind", ["text/plain", "application/octet-stream", "multipart/form-data; boundary=x", "application/zstd"])
def test_other_types_are_refused(api: Api, kind: str) -> None:
    problem = refused(upload(api, zipped(flowers()), kind=kind), 415, "unsupported_media_type")
    assert "application/zip" in problem["detail"]


def test_archives_go_to_data_sets_only(api: Api) -> None:
    answer = api.http.post("/v1/jobs", content=zipped(flowers()), headers={"Content-Type": ZIP})
    refused(answer, 415, "unsupported_media_type")


@pytest.fixture
def small(sqlite_url: str, tmp_path: Path) -> Iterator[Api]:
    """A server that takes little."""
    limits = {"max_upload_bytes": 20_000, "max_unpacked_bytes": 30_000, "max_upload_entries": 50}
    with serving(settings_for(sqlite_url, tmp_path / "data", **limits)) as running:
        yield running


def test_limits_on_size_and_count_are_413(small: Api) -> None:
    assert upload(small, zipped(flowers(each=1))).status_code == 202
    many = {f"{label}/{i}.png": b"" for label in "ab" for i in range(40)}
    assert "entries" in refused(upload(small, zipped(many)), 413, "too_large")["rule"]
    large = {f"{label}/{i}.png": bytes(10_000) for label in "ab" for i in range(2)}
    assert "30,000 bytes" in refused(upload(small, tarred(large), kind=GZIP), 413, "too_large")["rule"]
    until(lambda: len(left(small)) == 1)


@pytest.mark.parametrize("is_announced", [True, False])
def test_a_body_that_is_too_large_is_refused_however_it_comes(small: Api, is_announced: bool) -> None:
    content = zipped({"a/1.png": os.urandom(300_000), "b/1.png": b"x"})
    body: Any = content if is_announced else (content[at : at + 5000] for at in range(0, len(content), 5000))
    problem = refused(upload(small, body), 413, "too_large")
    assert "20,000 bytes" in problem["detail"]
    until(lambda: left(small) == [])


def test_a_full_disk_is_507(sqlite_url: str, tmp_path: Path) -> None:
    with serving(settings_for(sqlite_url, tmp_path / "data", min_free_bytes=1 << 60)) as full:
        refused(upload(full, zipped(flowers())), 507, "storage_full")
        assert left(full) == []


def test_what_is_announced_is_held_against_the_free_space(sqlite_url: str, tmp_path: Path) -> None:
    """Sent by hand: nothing of so large a body need ever come."""
    with serving(settings_for(sqlite_url, tmp_path / "data", max_upload_bytes=1 << 50)) as running, _line(running) as line:
        line.sendall(_head(1 << 49))
        assert b" 507 " in line.recv(4096)


def _line(running: Api) -> socket.socket:
    return socket.create_connection((running.http.base_url.host, running.http.base_url.port or 0), timeout=20)


def _head(length: int) -> bytes:
    return f"POST /v1/datasets?name=x HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {ZIP}\r\nContent-Length: {length}\r\n\r\n".encode()


def test_a_quota_of_bytes_is_429(any_api: Api) -> None:
    with any_api.store.write() as tx:
        quotas.grant(tx, "local", quotas.Quota(max_bytes=5_000))
    problem = refused(upload(any_api, zipped(flowers())), 429, "quota_exceeded")
    assert (problem["quota"], problem["granted"]) == ("bytes", 5_000)
    until(lambda: left(any_api) == [])
    packed = tarred({f"{label}/{i}.bmp": encoded(Image.new("RGB", (40, 40)), "BMP") for label in "ab" for i in range(2)})
    assert len(packed) < 5_000
    refused(upload(any_api, packed, kind=GZIP), 429, "quota_exceeded")
    until(lambda: left(any_api) == [])


def test_a_cut_upload_leaves_nothing(api: Api) -> None:
    content = zipped(flowers())
    line = _line(api)
    line.sendall(_head(len(content)) + content[: len(content) // 2])
    until(lambda: len(left(api)) == 1)
    line.close()
    until(lambda: left(api) == [])
    with api.store.read() as tx:
        assert tx.all(select(rows.c.id)) == []
    until(lambda: owed(api.store) == [])


def owed(store: Store) -> list[str]:
    with store.read() as tx:
        return [row.path for row in tx.all(select(deletions.c.path))]


def test_a_sender_who_falls_silent_is_given_up(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiving, "SILENCE_S", 0.3)
    with socket.create_connection((str(api.http.base_url.host), api.http.base_url.port or 0), timeout=20) as line:
        line.sendall(
            f"POST /v1/datasets?name=x HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {ZIP}\r\nContent-Length: 1000\r\n\r\nPK".encode()
        )
        assert b" 400 " in line.recv(4096)
    until(lambda: left(api) == [])


def test_what_a_killed_server_left_falls_due(api: Api) -> None:
    with api.store.write() as tx:
        upload_id = uploads.begin(tx, "flowers", owner="local")
    (api.data_dir / "uploads" / upload_id).mkdir(parents=True)
    (api.data_dir / "uploads" / upload_id / "archive").write_bytes(b"half")
    sweep_once(api.store, api.parts.artifacts, lambda: None)
    assert left(api) == [upload_id], "it is not due yet"
    with api.store.write() as tx:
        tx.run(deletions.update().values(created_at=tx.now_ms - 1))
    until(lambda: left(api) == [])


# --- what a check says


def test_an_unreadable_image_fails_the_set_by_name_or_is_left_out(any_api: Api) -> None:
    content = zipped(flowers() | {"rose/broken.png": png(5)[:200], "tulip/none.jpg": b"hello"})
    version = upload(any_api, content).json()["version"]
    work(any_api)
    found = shown(any_api)
    assert (found["state"], found["error"]["code"], found["current"]) == ("failed", "data_unreadable", None)
    assert [one["name"] for one in found["report"]["unreadable"]["first"]] == ["rose/broken.png", "tulip/none.jpg"]
    again = upload(any_api, content, unreadable="skip")
    assert (again.status_code, again.json()["version"]) == (202, version)
    work(any_api)
    found = shown(any_api)
    assert (found["state"], found["files"], found["splits"]) == ("ready", 12, {"train": 12})
    assert found["report"]["skipped"]["count"] == 2
    assert upload(any_api, content).status_code == 200
    until(lambda: len(left(any_api)) == 1)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"rose/1.png": 1, "rose/2.png": 2}, "only the class 'rose'"),
        ({"rose/1.png": 1, "rose/2.png": 2, "tulip/1.png": 3}, "class 'tulip' has 1 image"),
        ({"rose/1.png": 1, "rose/2.png": 2, "tulip/": None}, "class 'tulip' is empty"),
    ],
)
def test_classes_that_cannot_be_trained_on_are_named(api: Api, entries: dict[str, int | None], said: str) -> None:
    upload(api, zipped({name: b"" if seed is None else png(seed) for name, seed in entries.items()}))
    work(api)
    found = shown(api)
    assert (found["state"], found["error"]["code"]) == ("failed", "data_missing")
    assert said in found["error"]["detail"]
    assert str(api.data_dir) not in found["error"]["detail"]


# --- jobs


def submit(api: Api, **data: Any) -> httpx2.Response:
    return api.http.post("/v1/jobs", json={"data": {"dataset": "flowers", **data}})


def test_a_job_pins_the_version_and_keeps_the_set(any_api: Api) -> None:
    version = upload(any_api, zipped(flowers())).json()["version"]
    refused(submit(any_api), 409, "reference_not_ready")
    work(any_api)
    job = submit(any_api)
    assert (job.status_code, job.json()["spec"]["data"]["version"]) == (202, version)
    problem = refused(any_api.http.delete("/v1/datasets/flowers"), 409, "dataset_in_use")
    assert problem["job"] == job.json()["id"]
    refused(any_api.http.delete("/v1/datasets/flowers", params={"version": version}), 409, "dataset_in_use")
    any_api.http.post(f"/v1/jobs/{job.json()['id']}/cancel")
    assert any_api.http.delete("/v1/datasets/flowers").status_code == 204
    until(lambda: left(any_api) == [])
    refused(any_api.http.get("/v1/datasets/flowers"), 404, "dataset_not_found")
    refused(any_api.http.delete("/v1/datasets/flowers"), 404, "dataset_not_found")
    assert upload(any_api, zipped(flowers())).json()["version"] == version


def test_one_version_can_go_alone(api: Api) -> None:
    first, second = (upload(api, zipped(flowers(seed=seed))).json()["version"] for seed in (0, 7))
    assert api.http.delete("/v1/datasets/flowers", params={"version": first}).status_code == 204
    assert [one["version"] for one in shown(api)["versions"]] == [second]
    refused(api.http.delete("/v1/datasets/flowers", params={"version": first}), 404, "dataset_not_found")
    refused(api.http.delete("/v1/datasets/flowers", params={"version": "newest"}), 422, "invalid_request")


def test_a_set_that_is_being_checked_can_be_deleted(api: Api) -> None:
    upload(api, zipped(flowers()))
    assert api.http.delete("/v1/datasets/flowers").status_code == 204
    assert work(api) == 0
    until(lambda: left(api) == [])


# --- folders


def lay(api: Api, path: str = "garden") -> Path:
    folder = api.data_dir / "datasets" / path
    for name, content in flowers().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def register(api: Api, path: str = "garden", name: str = "flowers") -> httpx2.Response:
    return api.http.post("/v1/datasets", json={"name": name, "path": path})


def test_a_registered_folder_has_the_version_of_the_same_files_uploaded(any_api: Api) -> None:
    folder = lay(any_api, f"garden-{any_api.store.is_sqlite}")
    answer = register(any_api, folder.name)
    assert (answer.status_code, answer.json()["version"], answer.json()["state"]) == (202, None, "checking")
    assert register(any_api, folder.name).status_code == 200
    assert work(any_api) == 1
    found = shown(any_api)
    assert (found["state"], found["files"], found["source"], found["path"]) == ("ready", 12, "registered", folder.name)
    assert upload(any_api, zipped(flowers()), name="other").json()["version"] == found["version"]
    assert register(any_api, folder.name).status_code == 202
    work(any_api)
    assert len(shown(any_api)["versions"]) == 1, "nothing has changed"
    assert any_api.http.delete("/v1/datasets/flowers").status_code == 204
    assert (folder / "rose/1.png").exists(), "what was there before is not ours to delete"


def test_a_folder_that_has_changed_is_another_version_and_the_old_one_is_no_more(api: Api) -> None:
    folder = lay(api, "changing")
    register(api, "changing")
    work(api)
    before = shown(api)["version"]
    (folder / "rose" / "new.png").write_bytes(png(99))
    register(api, "changing")
    work(api)
    found = shown(api)
    assert [one["state"] for one in found["versions"]] == ["ready", "failed"]
    assert found["versions"][1]["error"]["code"] == "changed"
    refused(submit(api, version=before), 409, "reference_not_ready")


def test_links_out_of_the_data_root_are_refused(api: Api, tmp_path: Path) -> None:
    folder = lay(api, "linked")
    (tmp_path / "secret").mkdir()
    (api.data_dir / "datasets" / "away").symlink_to(tmp_path / "secret")
    refused(register(api, "away"), 422, "invalid_spec")
    (tmp_path / "secret" / "1.png").write_bytes(png(1))
    (folder / "rose" / "out.png").symlink_to(tmp_path / "secret" / "1.png")
    register(api, "linked")
    work(api)
    assert (shown(api)["state"], "out of the data root" in shown(api)["error"]["detail"]) == ("failed", True)


@pytest.mark.parametrize(
    "body", [{"name": "x"}, {"name": "x", "path": "../up"}, {"name": "x", "path": "/etc"}, {"name": "x", "path": "a/../b"}]
)
def test_a_bad_registration_is_refused(api: Api, body: dict[str, str]) -> None:
    refused(api.http.post("/v1/datasets", json=body), 422, "invalid_spec")


def test_a_folder_that_is_not_there_is_refused(api: Api) -> None:
    problem = refused(register(api, "nowhere"), 404, "unknown_reference")
    assert problem["errors"][0]["pointer"] == "/path"


def test_parameters_of_archives_are_refused_with_a_folder(api: Api) -> None:
    lay(api)
    for params in ({"name": "x"}, {"unreadable": "skip"}):
        refused(api.http.post("/v1/datasets", json={"name": "flowers", "path": "garden"}, params=params), 422, "invalid_request")


# --- owners


def test_sets_are_their_owners_own_and_folders_the_admins(api: Api) -> None:
    lay(api)
    shown_once = {}
    with api.store.write() as tx:
        for owner, scopes in (("ann", {Scope.READ, Scope.SUBMIT}), ("bob", {Scope.READ, Scope.SUBMIT}), ("root", set(Scope))):
            shown_once[owner] = keys.create(tx, owner=owner, scopes=frozenset(scopes), name=owner)
    ann, bob, root = ({"Authorization": f"Bearer {shown_once[owner]}"} for owner in ("ann", "bob", "root"))
    until(lambda: api.http.get("/v1/datasets").status_code == 401)

    def sent_by(key: dict[str, str]) -> int:
        headers = {"Content-Type": ZIP, **key}
        return api.http.post("/v1/datasets", content=zipped(flowers()), params={"name": "flowers"}, headers=headers).status_code

    assert sent_by(ann) == 202
    work(api)
    refused(api.http.get("/v1/datasets/flowers", headers=bob), 404, "dataset_not_found")
    refused(api.http.delete("/v1/datasets/flowers", headers=bob), 404, "dataset_not_found")
    refused(api.http.post("/v1/jobs", json={"data": {"dataset": "flowers"}}, headers=bob), 404, "unknown_reference")
    assert api.http.get("/v1/datasets", headers=bob).json()["data"] == []
    assert sent_by(bob) == 202, "his own copy"
    body = {"name": "garden", "path": "garden"}
    refused(api.http.post("/v1/datasets", json=body, headers=ann), 403, "forbidden_scope")
    assert api.http.post("/v1/datasets", json=body, headers=root).status_code == 202
    with api.store.write() as tx:
        tx.run(api_keys.delete())
    until(lambda: api.http.get("/v1/datasets").status_code == 200)


def test_a_submission_waits_for_a_deletion_or_the_other_way_round(any_api: Api) -> None:
    """Whoever comes first, no job is left that pins a set which is gone."""
    for round_ in range(5):
        upload(any_api, zipped(flowers(seed=round_)))
        work(any_api)
        submitted, deleted = builders.at_once(
            [lambda: submit(any_api).status_code, lambda: any_api.http.delete("/v1/datasets/flowers").status_code]
        )
        assert (submitted, deleted) in {(202, 409), (404, 204)}
        for job in any_api.http.get("/v1/jobs", params={"state": "queued"}).json()["data"]:
            any_api.http.post(f"/v1/jobs/{job['id']}/cancel")
        any_api.http.delete("/v1/datasets/flowers")


# --- samples


def test_a_set_that_is_ready_shows_images_of_each_class(any_api: Api) -> None:
    upload(any_api, zipped(flowers()))
    refused(any_api.http.get("/v1/datasets/flowers/samples"), 404, "samples_not_found")
    work(any_api)
    answer = any_api.http.get("/v1/datasets/flowers/samples")
    DatasetSamplesDocument.model_validate_json(answer.content)
    found = answer.json()
    assert (found["dataset"], found["split"], found["splits"], found["more_classes"]) == ("flowers", "train", ["train"], 0)
    assert [(one["label"], one["count"], one["samples"], one["row"]) for one in found["classes"]] == [
        ("daisy", 4, 4, 0),
        ("rose", 4, 4, 1),
        ("tulip", 4, 4, 2),
    ]
    picture = any_api.http.get(found["image"])
    assert (picture.status_code, picture.headers["content-type"]) == (200, "image/png")
    with Image.open(io.BytesIO(picture.content)) as image:
        assert image.size == (found["columns"] * found["tile"], 3 * found["tile"])
    again = any_api.http.get(found["image"], headers={"If-None-Match": picture.headers["etag"]})
    assert again.status_code == 304


def test_samples_of_what_is_not_there_are_refused_with_the_reason(api: Api) -> None:
    refused(api.http.get("/v1/datasets/nothing/samples"), 404, "dataset_not_found")
    for path in ("samples", "samples.png"):
        problem = refused(api.http.get(f"/v1/datasets/digits/{path}"), 404, "samples_not_found")
        assert "built-in" in problem["detail"]
    upload(api, zipped(flowers()))
    work(api)
    problem = refused(api.http.get("/v1/datasets/flowers/samples", params={"split": "val"}), 404, "samples_not_found")
    assert "only in train" in problem["detail"]
    assert api.http.get("/v1/datasets/flowers/samples", params={"split": "all"}).status_code == 422


def test_samples_go_with_their_set(any_api: Api) -> None:
    upload(any_api, zipped(flowers()))
    work(any_api)
    assert len(list((any_api.data_dir / "samples").glob("*/train.png"))) == 1
    image = any_api.http.get("/v1/datasets/flowers/samples").json()["image"]
    assert any_api.http.delete("/v1/datasets/flowers").status_code == 204
    refused(any_api.http.get(image), 404, "dataset_not_found")
    until(lambda: not list((any_api.data_dir / "samples").glob("*/train.png")))


def test_a_picture_that_has_gone_from_the_disk_is_not_found(api: Api) -> None:
    upload(api, zipped(flowers()))
    work(api)
    shutil.rmtree(api.data_dir / "samples")
    refused(api.http.get("/v1/datasets/flowers/samples.png"), 404, "samples_not_found")
