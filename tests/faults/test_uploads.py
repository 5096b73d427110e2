"""Rows 15, 16 and 18: hostile archives, odd images and pickles, sent to a whole stack. It refuses or reports them, and goes on."""

from __future__ import annotations

import gzip
import io
import socket
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from PIL import Image
from sqlalchemy import select, update

from powergrad.client import ApiError, Dataset
from powergrad.jobs.tables import datasets, deletions
from tests.data.test_check import armed, bomb
from tests.faults.conftest import Site, gone
from tests.pictures import digits, encoded, flowers, png, zipped
from tests.test_archives import claiming
from tests.worker.conftest import until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]

BOUNDED_S = 60.0  # the machine is shared; alone each takes under two seconds
BOUNDED_BYTES = 100 << 20  # what the API may grow by, whatever is sent


def tar(*entries: tuple[str, bytes, bytes, str]) -> bytes:
    """(name, type, content, link target) of each."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, kind, content, target in entries:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, target, len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def mostly_zeros() -> bytes:
    return deflated({"a/1.bmp": bytes(300 << 20), "b/1.png": b"x"})


def deflated(entries: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return out.getvalue()


REGULAR = tarfile.REGTYPE
HOSTILE: dict[str, tuple[str, Callable[[], bytes], int]] = {
    "upwards": ("evil.zip", lambda: zipped({**flowers(), "../../up.png": b"x"}), 422),
    "absolute": ("evil.tar", lambda: tar(("/tmp/pg-up.png", REGULAR, b"x", "")), 422),
    "through a link": ("evil.tar", lambda: tar(("a", tarfile.SYMTYPE, b"", "/tmp"), ("a/pg-up.png", REGULAR, b"x", "")), 422),
    "hard link": ("evil.tar", lambda: tar(("a/1.png", tarfile.LNKTYPE, b"", "../../../powergrad.db")), 422),
    "device": ("evil.tar", lambda: tar(("a/1.png", tarfile.CHRTYPE, b"", "")), 422),
    "pipe": ("evil.tar", lambda: tar(("a/1.png", tarfile.FIFOTYPE, b"", "")), 422),
    "case twins": ("evil.zip", lambda: zipped({**flowers(), "Rose/1.png": b"x"}), 422),
    "Unicode twins": ("evil.zip", lambda: zipped({"é/1.png": b"x", "e\u0301/1.png": b"y"}), 422),
    "zip bomb": ("evil.zip", mostly_zeros, 422),
    "gzip bomb": ("evil.tar.gz", lambda: gzip.compress(tar(("a/1.bmp", REGULAR, bytes(100 << 20), ""))), 422),
    "a million entries": ("evil.zip", lambda: claiming(1_000_001), 413),
    "cut": ("evil.zip", lambda: zipped(flowers())[:-100], 422),
}


def left(site: Site) -> list[Path]:
    folder = site.data_dir / "uploads"
    return list(folder.iterdir()) if folder.exists() else []


@pytest.mark.row(15)
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_archive_is_refused_in_bounded_time_and_memory(site: Site, tmp_path: Path, kind: str) -> None:
    name, make, status = HOSTILE[kind]
    (tmp_path / name).write_bytes(make())
    api = site.the("powergrad: api")
    before, outside = api.memory_info().rss, set(site.data_dir.parent.iterdir())
    started_s = time.monotonic()
    with pytest.raises(ApiError) as refused:
        site.client.upload_dataset(tmp_path / name, "evil")
    assert time.monotonic() - started_s < BOUNDED_S
    assert refused.value.status == status, refused.value
    until(lambda: left(site) == [])
    assert api.is_running()
    assert api.memory_info().rss - before < BOUNDED_BYTES
    assert set(site.data_dir.parent.iterdir()) <= outside | {site.data_dir.parent / "up.log"}
    assert not Path("/tmp/pg-up.png").exists()


def uploaded(site: Site, folder: Path, entries: dict[str, bytes], *, skip: bool = False) -> Dataset:
    (folder / "set.zip").write_bytes(zipped(entries))
    sent = site.client.upload_dataset(folder / "set.zip", "set", skip_unreadable=skip)
    found = site.client.wait_dataset("set", BOUNDED_S, version=sent.version)
    site.client.delete_dataset("set")
    return found


ODD: dict[str, tuple[dict[str, bytes], str, str]] = {
    "truncated": ({"rose/odd.png": png(1)[:200]}, "failed", "rose/odd.png"),
    "50,000²": ({"rose/odd.png": bomb(50_000, 50_000)}, "failed", "rose/odd.png"),
    "CMYK": ({"rose/odd.jpg": encoded(Image.new("CMYK", (20, 20)), "JPEG")}, "ready", "rose/odd.jpg"),
    "16 bit": ({"rose/odd.png": encoded(Image.new("I;16", (20, 20), 40_000))}, "ready", "rose/odd.png"),
    "animated": (
        {"rose/odd.gif": encoded(Image.new("L", (20, 20)), "GIF", save_all=True, append_images=[Image.new("L", (20, 20), 200)])},
        "ready",
        "rose/odd.gif",
    ),
    "empty class": ({"weed/": b""}, "failed", "weed"),
}


@pytest.mark.row(16)
@pytest.mark.parametrize("kind", ODD)
def test_odd_images_are_told_by_name_and_no_worker_dies(site: Site, tmp_path: Path, kind: str) -> None:
    entries, state, named = ODD[kind]
    worker = site.the("powergrad: worker")
    found = uploaded(site, tmp_path, flowers() | entries)
    assert found.state == state
    assert named in str(found.error) + str((found.report or {}).get("odd"))
    assert worker.is_running()
    assert site.client.health().ready


@pytest.mark.row(16)
def test_one_class_is_told_by_name(site: Site, tmp_path: Path) -> None:
    found = uploaded(site, tmp_path, {f"rose/{i}.png": png(i) for i in range(4)})
    assert (found.state, "'rose'" in str(found.error)) == ("failed", True)


@pytest.mark.row(18)
def test_pickles_are_never_run_wherever_they_are_sent(site: Site, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    bombs = {f"rose/bomb.{suffix}": content for suffix, content in armed(mark).items()}
    assert uploaded(site, tmp_path, flowers() | bombs).state == "failed"
    found = uploaded(site, tmp_path, flowers() | bombs, skip=True)
    assert (found.state, found.files) == ("ready", 12)
    job = site.submit(epochs=1)
    site.until_state(job, "succeeded", "failed")
    for content in armed(mark).values():
        with pytest.raises(ApiError) as refused:
            site.client.predict(job, content)
        assert refused.value.status == 422
    assert not mark.exists()


@pytest.mark.row(18)
def test_a_pickle_in_place_of_a_checkpoint_is_never_run(site: Site, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    job = site.submit(epochs=500)
    site.until_checkpoint(job)
    site.client.pause(job)
    site.until_state(job, "paused")
    for path in (site.job_dir(job) / "checkpoints").rglob("*"):
        if path.is_file() and path.suffix != ".json":
            path.write_bytes(armed(mark)["pt"])
    site.client.resume(job)
    site.until_state(job, "running")
    site.until_step(job, 5)
    site.client.cancel(job)
    site.until_state(job, "cancelled")
    assert not mark.exists()


def checking(site: Site) -> psutil.Process | None:
    return next(iter(site.processes("powergrad: check_dataset")), None)


@pytest.mark.long
def test_a_check_whose_worker_was_killed_is_done_by_the_next(site: Site, tmp_path: Path) -> None:
    noise = encoded(Image.effect_noise((2400, 2400), 60).convert("RGB"))  # a tenth of a second each
    entries = {f"{label}/{i}.png": noise + bytes([i]) for label in "ab" for i in range(10)}
    (tmp_path / "large.zip").write_bytes(zipped(entries))
    sent = site.client.upload_dataset(tmp_path / "large.zip", "large")
    child: psutil.Process = until(lambda: checking(site))
    site.the("powergrad: worker").kill()
    until(lambda: gone(child))
    found = site.client.wait_dataset("large", 180.0, version=sent.version)
    assert (found.state, found.splits) == ("ready", {"train": 20})
    site.client.delete_dataset("large")


def test_an_upload_that_is_cut_by_a_killed_server_leaves_nothing(site: Site) -> None:
    content = zipped(digits(200))
    address = urlsplit(site.client.base_url)
    with socket.create_connection((address.hostname or "", address.port or 0), timeout=20) as line:
        head = f"POST /v1/datasets?name=cut HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/zip\r\nContent-Length: {len(content)}\r\n\r\n"
        line.sendall(head.encode() + content[: len(content) // 2])
        until(lambda: left(site))
        api = site.the("powergrad: api")
        api.kill()
        until(lambda: gone(api))
    until(site.is_ready, within_s=60)
    with site.store.write() as tx:
        assert tx.all(select(datasets.c.id).where(datasets.c.name == "cut")) == []
        tx.run(update(deletions).values(created_at=tx.now_ms - 1))  # three minutes later
    until(lambda: left(site) == [])
