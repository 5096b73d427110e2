"""Data sets through both clients and the command line, against the real service: upload, check, train, delete."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import httpx2
import pytest

from powergrad.cli import main
from powergrad.cli.console import Code
from powergrad.cli.stack import Stack
from powergrad.client import ApiError, AsyncClient, Client, ClientError, Dataset
from tests.cli.conftest import TRAINED_S, tiny
from tests.pictures import digits, flowers, png, zipped

CHECKED_S = 60.0


def laid(folder: Path, entries: dict[str, bytes]) -> Path:
    for name, content in entries.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_digits_as_png_class_folders_are_uploaded_trained_on_and_deleted(live: Stack, client: Client, tmp_path: Path) -> None:
    (tmp_path / "mine.zip").write_bytes(zipped(digits(1000)))
    sent: list[tuple[int, int]] = []
    found = client.upload_dataset(tmp_path / "mine.zip", on_progress=lambda done, total: sent.append((done, total)))
    assert (found.name, found.state) == ("mine", "checking")
    assert sent[-1] == ((size := (tmp_path / "mine.zip").stat().st_size), size)
    ready = client.wait_dataset("mine", CHECKED_S)
    assert (ready.state, ready.classes, ready.splits) == ("ready", 10, {"train": 1000})
    samples = client.dataset_samples("mine")
    assert [(one["label"], one["samples"]) for one in samples["classes"]] == [(str(label), 8) for label in range(10)]
    assert httpx2.get(f"{live.url}{samples['image']}", trust_env=False).headers["content-type"] == "image/png"
    data = {"dataset": "mine", "image_size": 8, "batch_size": 32, "augment": "none", "val_fraction": 0.2}
    job = client.submit(tiny(data=data, optimizer={"lr": 0.02}))
    assert job.spec["data"]["version"] == ready.version
    with pytest.raises(ApiError) as refused:
        client.delete_dataset("mine")
    assert (refused.value.status, refused.value.code) == (409, "dataset_in_use")
    done = client.wait(job.id, TRAINED_S)
    assert done.state == "succeeded", done.reason
    assert (done.metrics.best["val_top1"] or 0.0) > 0.3  # chance is 0.1
    client.delete_dataset("mine")
    with pytest.raises(ApiError, match="dataset_not_found"):
        client.dataset("mine")
    again = client.upload_dataset(tmp_path / "mine.zip")
    assert again.version == ready.version
    client.delete_dataset("mine")


def test_a_folder_packed_on_the_way_is_the_same_version(live: Stack, client: Client, tmp_path: Path) -> None:
    folder = laid(tmp_path / "Blumen öl", {**flowers(), "rose/.hidden.png": b"x", "readme.txt": b"x"})
    (tmp_path / "same.zip").write_bytes(zipped(flowers()))
    first = client.upload_dataset(tmp_path / "same.zip", "packed")

    async def send() -> Dataset:
        async with AsyncClient(live.url) as waiting:
            sent = await waiting.upload_dataset(folder, "packed")
            assert sent.version == first.version
            return await waiting.wait_dataset("packed", CHECKED_S)

    assert asyncio.run(send()).state == "ready"
    assert client.upload_dataset(folder).name == "Blumen--l"
    for name in ("packed", "Blumen--l"):
        client.delete_dataset(name)


def test_a_job_whose_registered_folder_has_changed_fails_and_says_so(live: Stack, client: Client) -> None:
    folder = laid(live.data_dir / "datasets" / "garden", digits(200))
    client.register_dataset("garden", "garden")
    ready = client.wait_dataset("garden", CHECKED_S)
    assert (ready.state, ready.source, ready.path) == ("ready", "registered", "garden")
    spec = tiny(data={"dataset": "garden", "image_size": 8, "batch_size": 32})
    assert client.wait(client.submit(spec).id, TRAINED_S).state == "succeeded"
    (folder / "0" / "new.png").write_bytes(png(1))
    job = client.wait(client.submit(spec).id, TRAINED_S)
    assert (job.state, job.attempt) == ("failed", 1)
    assert job.reason is not None
    assert (job.reason.code, "has changed since it was registered" in job.reason.detail) == ("data_unreadable", True)
    client.delete_dataset("garden")
    assert (folder / "0" / "new.png").exists()


def test_what_cannot_be_sent_is_told_before_anything_is(client: Client, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ClientError, match="must be a folder, or an archive"):
        client.upload_dataset(tmp_path / "notes.txt")
    with pytest.raises(FileNotFoundError):
        client.upload_dataset(tmp_path / "nowhere.zip")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main.main(["datasets", *arguments])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_the_commands_tell_a_sets_life(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    laid(here / "flowers", {**flowers(), "rose/again.png": flowers()["rose/0.png"]})
    code, out, err = run(capsys, "upload", "flowers", "--name", "cli-flowers")
    assert code == Code.OK, err
    assert "ready" in out
    assert "tulip" in out
    assert "1 images are there again" in err
    code, out, _ = run(capsys, "show", "cli-flowers", "--json")
    assert (code, json.loads(out)["report"]["classes"]) == (Code.OK, 3)
    code, out, _ = run(capsys, "list")
    assert "cli-flowers" in out
    assert "digits" in out
    code, out, _ = run(capsys, "upload", "flowers", "--name", "cli-flowers", "--json")
    assert (code, len(json.loads(out)["versions"])) == (Code.OK, 1)
    assert run(capsys, "delete", "cli-flowers")[0] == Code.OK
    code, _, err = run(capsys, "show", "cli-flowers")
    assert (code, "no data set 'cli-flowers'" in err) == (Code.REFUSED, True)


def test_a_set_that_fails_ends_the_command_so_and_names_the_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    laid(here / "broken", {**flowers(), "rose/cut.png": png(3)[:100]})
    code, out, err = run(capsys, "upload", "broken")
    assert code == Code.FAILED
    assert "failed" in out
    assert "rose/cut.png" in out + err
    code, out, err = run(capsys, "upload", "broken", "--skip-unreadable")
    assert (code, "1 skipped" in err) == (Code.OK, True)
    assert run(capsys, "delete", "broken")[0] == Code.OK


def test_a_refused_archive_is_named_with_its_entry(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "evil.zip").write_bytes(zipped({**flowers(), "../up.png": b"x"}))
    code, _, err = run(capsys, "upload", "evil.zip")
    assert code == Code.REFUSED
    assert "../up.png" in err
    code, _, err = run(capsys, "register", "nowhere", "--name", "x")
    assert (code, "no such folder" in err) == (Code.REFUSED, True)
    code, _, err = run(capsys, "upload", "missing.zip")
    assert (code, "cannot be read" in err) == (Code.FAILED, True)
