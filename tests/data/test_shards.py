"""Tar shards: what is found in them, in which order, with which bits, and what is refused."""

from __future__ import annotations

import asyncio
import io
import json
import os
import socket
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import uvicorn
from starlette.responses import RedirectResponse
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from powergrad.addresses import AddressRefused, AllowList
from powergrad.data import Data, open_data, shards, web
from powergrad.data.decode import Box, decode
from powergrad.data.errors import DataMissing, DataUnreadable
from powergrad.data.images import FileImages, Parts
from powergrad.data.shards import SCHEMES, Shards, WindowedOrder, shard_urls, webdataset
from powergrad.data.split import with_validation
from powergrad.spec import AugmentNames, WebDatasetData
from tests.data.folders import image

CPU = torch.device("cpu")
VARIABLE = "POWERGRAD_ALLOWED_HOSTS"
EACH = 6


@pytest.fixture(autouse=True)
def _this_machine_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The servers of these tests are here."""
    monkeypatch.setenv(VARIABLE, "127.0.0.1")


def png(seed: int) -> bytes:
    content = io.BytesIO()
    image(seed).save(content, "png")
    return content.getvalue()


def tar(files: Mapping[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, body in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    return content.getvalue()


def shard(number: int, *, each: int = EACH) -> bytes:
    """Samples number * each and on, of 3 classes in turn: an image that its number seeds, and its class."""
    files: dict[str, bytes] = {}
    for i in range(number * each, (number + 1) * each):
        files |= {f"{i:06d}.cls": str(i % 3).encode(), f"{i:06d}.png": png(i)}
    return tar(files)


def lay(folder: Path, *, train: int = 3) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(train):
        (folder / f"train-{number:02d}.tar").write_bytes(shard(number))
    (folder / "val.tar").write_bytes(shard(50))


def opened(data_root: Path, train: str = "set/train-{00..02}.tar", val: str = "set/val.tar", *, schemes: frozenset[str] = SCHEMES) -> Parts:
    return webdataset(train, val, data_root=data_root, schemes=schemes)


def training(data_root: Path, train: str = "set/train-{00..02}.tar") -> Shards:
    part = opened(data_root, train).train
    assert isinstance(part, Shards)
    return part


def pixels(part: Shards, index: list[int], *, workers: int = 0, batch_size: int = 4) -> torch.Tensor:
    images = FileImages(part, size=16, workers=workers, device=CPU)
    return torch.cat(list(images.batches(torch.tensor(index), batch_size)))


@contextmanager
def served(content: Path | ASGIApp, *, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """A folder over HTTP, with ranges and ETags, or an application; its address."""
    app = StaticFiles(directory=content) if isinstance(content, Path) else content
    server = uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started and time.monotonic() < deadline:
        thread.join(0.01)
    assert server.started
    try:
        yield f"http://{host}:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


def test_samples_come_with_their_images_and_classes(tmp_path: Path) -> None:
    lay(tmp_path / "set")
    parts = opened(tmp_path)
    assert parts.class_names == ("0", "1", "2")
    assert isinstance(parts.train, Shards)
    assert parts.train.labels.tolist() == [i % 3 for i in range(3 * EACH)]
    expected = np.stack([decode(png(i), 16, name="") for i in (0, 7, 17)])
    assert np.array_equal(pixels(parts.train, [0, 7, 17]).numpy(), expected)


def test_a_class_may_stand_in_json_and_a_sample_in_a_folder(tmp_path: Path) -> None:
    files = {f"part.1/{i}{ending}": body for i in range(2) for ending, body in
             ((".webp.txt", b"no image"), (".json", json.dumps({"label": i}).encode()), (".PNG", png(i)), (".seg.png", png(9)))}  # fmt: skip
    (tmp_path / "a.tar").write_bytes(tar({"._junk.png": b"", **files}))
    part = opened(tmp_path, "a.tar", "a.tar").train
    assert part.labels.tolist() == [0, 1]
    assert isinstance(part, Shards)
    assert part.name(1) == f"{tmp_path}/a.tar, sample part.1/1"
    assert np.array_equal(pixels(part, [1])[0].numpy(), decode(png(1), 16, name=""))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_any_number_of_workers_gives_the_same_bits_over_http(workers: int, tmp_path: Path) -> None:
    """Indexed in this process first, so that its connections and its loop are there when it forks."""
    lay(tmp_path / "web")
    (tmp_path / "root").mkdir()
    order = torch.randperm(3 * EACH, generator=torch.Generator().manual_seed(1)).tolist()
    with served(tmp_path / "web") as address:
        part = training_at(tmp_path / "root", address)
        pixels(part, [0])
        ours = pixels(part, order, workers=workers)
    assert np.array_equal(ours.numpy(), np.stack([decode(png(i), 16, name="") for i in order]))


def training_at(data_root: Path, address: str) -> Shards:
    part = opened(data_root, address + "/train-{00..02}.tar", address + "/val.tar").train
    assert isinstance(part, Shards)
    return part


def test_a_shard_in_memory_is_read_only_where_its_scheme_is_allowed(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/bucket/t-{i}.tar": shard(i) for i in range(2)})
    try:
        part = opened(tmp_path, "memory://bucket/t-*.tar", "memory://bucket/t-0.tar", schemes=SCHEMES | {"memory"}).train
        assert isinstance(part, Shards)
        assert len(part) == 2 * EACH
        assert np.array_equal(pixels(part, [8])[0].numpy(), decode(png(8), 16, name=""))
        with pytest.raises(DataUnreadable, match=r"memory://bucket/t-\*\.tar: must be a path below the data root"):
            opened(tmp_path, "memory://bucket/t-*.tar", "memory://bucket/t-0.tar")
    finally:
        memory.rm("/bucket", recursive=True)


def test_the_second_opening_reads_no_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(tmp_path / "set")
    first = training(tmp_path)
    monkeypatch.setattr(shards, "read_members", None)
    again = training(tmp_path)
    assert torch.equal(again.labels, first.labels)
    assert torch.equal(pixels(again, [3, 16]), pixels(first, [3, 16]))


def test_a_changed_shard_is_indexed_again(tmp_path: Path) -> None:
    lay(tmp_path / "set")
    assert len(training(tmp_path)) == 3 * EACH
    (tmp_path / "set" / "train-01.tar").write_bytes(shard(1, each=2))
    assert len(training(tmp_path)) == 2 * EACH + 2


def test_a_spoilt_index_is_made_again(tmp_path: Path) -> None:
    lay(tmp_path / "set")
    first = training(tmp_path)
    for kept in (tmp_path / ".index").iterdir():
        kept.write_bytes(kept.read_bytes()[:-40])
    assert torch.equal(training(tmp_path).labels, first.labels)


def test_braces_count_and_keep_their_width(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    urls = shard_urls("s3://bucket/{a}".replace("{a}", "{008..011}/x-{1..2}.tar"), data_root=tmp_path)
    assert urls == tuple(f"s3://bucket/{a:03d}/x-{b}.tar" for a in range(8, 12) for b in (1, 2))
    assert shard_urls("s3://b/{9..10}.tar", data_root=tmp_path) == ("s3://b/9.tar", "s3://b/10.tar")


@pytest.mark.parametrize(
    "pattern", ["s3://b/{a,b}.tar", "s3://b/{0..}.tar", "s3://b/{3..1}.tar", "s3://b/{0..9999}{0..9999}.tar", "s3://b/}.tar"]
)
def test_braces_that_do_not_count_are_refused(pattern: str, tmp_path: Path) -> None:
    with pytest.raises(DataUnreadable, match=r"whole numbers|from the lower number"):
        shard_urls(pattern, data_root=tmp_path)


@pytest.mark.parametrize(
    "pattern",
    ["file:///etc/x.tar", "FILE:///etc/x.tar", "simplecache::s3://b/x.tar", "zip://x.tar::file:///etc/y.zip", "local:///etc/x.tar"],
)
def test_other_ways_to_this_machines_files_are_refused(pattern: str, tmp_path: Path) -> None:
    with pytest.raises(DataUnreadable, match="must be a path below the data root"):
        shard_urls(pattern, data_root=tmp_path)


@pytest.mark.parametrize(
    "pattern", ["/etc/passwd", "../outside/a.tar", "set/../../outside/*.tar", "linked/a.tar", "linked/*.tar", "link.tar", "l*.tar"]
)
def test_nothing_leads_out_of_the_data_root(pattern: str, tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "root"
    for folder in (outside, root / "set"):
        folder.mkdir(parents=True)
    (outside / "a.tar").write_bytes(shard(0))
    (root / "linked").symlink_to(outside)
    (root / "link.tar").symlink_to(outside / "a.tar")
    with pytest.raises(DataUnreadable, match=r"below the data root|out of the data root"):
        shard_urls(pattern, data_root=root)


def test_a_pipe_is_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(DataUnreadable, match=r"a\.tar: not a regular file"):
        shard_urls("a.tar", data_root=tmp_path)


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.zst"])
def test_compressed_shards_are_refused_with_the_way_out(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataUnreadable, match=rf"{name}: compressed tars .* unpack"):
        shard_urls(name, data_root=tmp_path)


def test_absent_shards_are_named(tmp_path: Path) -> None:
    lay(tmp_path / "set")
    with pytest.raises(DataMissing, match=r"train-03\.tar"):
        opened(tmp_path, "set/train-{00..03}.tar")
    with pytest.raises(DataMissing, match=r"set/x\*: no file below"):
        opened(tmp_path, "set/x*")
    with served(tmp_path / "set") as address, pytest.raises(DataMissing, match=rf"{address}/train-7\.tar: not found"):
        opened(tmp_path, f"{address}/train-7.tar?signature=secret")


@pytest.mark.parametrize("cut", [100, 512 * 5, 1024 * 7 + 300, "member", "mark"])
def test_a_shard_cut_short_is_named(cut: int | str, tmp_path: Path) -> None:
    whole = shard(0)
    ends = len(whole.rstrip(b"\0"))
    at = {"member": -(-ends // 512) * 512 - 512, "mark": -(-ends // 512) * 512}.get(str(cut), cut)
    (tmp_path / "a.tar").write_bytes(whole[: int(at)])
    with pytest.raises(DataUnreadable, match=rf"^{tmp_path}/a\.tar: (cut short|not a whole tar)"):
        opened(tmp_path, "a.tar", "a.tar")


def test_a_broken_header_is_not_the_end(tmp_path: Path) -> None:
    """tarfile itself stops there without a word."""
    whole = bytearray(shard(0))
    third = whole.index(b"000002.cls")
    whole[third + 150] ^= 0xFF
    (tmp_path / "a.tar").write_bytes(whole)
    with pytest.raises(DataUnreadable, match=rf"a\.tar: cut short or broken after 000001.png, at byte {third}"):
        opened(tmp_path, "a.tar", "a.tar")


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"a.png": b"x"}, r"sample a: no a\.cls"),
        ({"a.cls": b"1"}, "sample a: 0 images"),
        ({"a.cls": b"1", "a.png": b"x", "a.jpg": b"x"}, "sample a: 2 images"),
        ({"a.cls": b"cat", "a.png": b"x"}, r"a\.cls: holds no class"),
        ({"a.cls": b"-1", "a.png": b"x"}, r"a\.cls: class -1"),
        ({"a.cls": b"100000", "a.png": b"x"}, r"a\.cls: class 100000"),
        ({"a.json": b'{"labels": 1}', "a.png": b"x"}, r"a\.json: holds no class"),
        ({"a.json": b'{"label": true}', "a.png": b"x"}, r"a\.json: class True"),
        ({"a.json": b"\xff", "a.png": b"x"}, r"a\.json: holds no class"),
        ({"a.cls": b"1", "b.png": b"x", "a.png": b"x"}, "sample a: 0 images"),
    ],
)
def test_a_sample_that_makes_no_sense_is_named(files: dict[str, bytes], complaint: str, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar(files))
    with pytest.raises(DataUnreadable, match=rf"^{tmp_path}/a\.tar, {complaint}"):
        opened(tmp_path, "a.tar", "a.tar")


def test_a_validation_class_that_training_does_not_know_is_named(tmp_path: Path) -> None:
    lay(tmp_path / "set")
    (tmp_path / "set" / "val.tar").write_bytes(tar({"k.cls": b"3", "k.png": png(0)}))
    with pytest.raises(DataUnreadable, match=r"val\.tar, sample k: class 3, but the training labels end at 2"):
        opened(tmp_path)


def test_one_class_is_not_enough(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar({"k.cls": b"0", "k.png": png(0)}))
    with pytest.raises(DataMissing, match="at least 2 classes"):
        opened(tmp_path, "a.tar", "a.tar")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_by_shard_and_sample(workers: int, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar({"j.cls": b"0", "j.png": png(0), "k.cls": b"1", "k.png": png(1)[:100]}))
    part = opened(tmp_path, "a.tar", "a.tar").train
    assert isinstance(part, Shards)
    with pytest.raises(DataUnreadable, match=rf"^{tmp_path}/a\.tar, sample k: cannot be decoded"):
        pixels(part, [0, 1], workers=workers)


def test_a_shard_that_shrinks_while_it_is_read_is_named(tmp_path: Path) -> None:
    lay(tmp_path / "set")
    part = training(tmp_path)
    (tmp_path / "set" / "train-02.tar").write_bytes(b"")
    with pytest.raises(DataUnreadable, match=r"train-02\.tar, sample 000014: 0 bytes came instead"):
        pixels(part, [14])


def test_a_dropped_connection_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(tmp_path / "web")
    monkeypatch.setattr(shards, "_FIRST_PAUSE_S", 0.01)
    failing = {"left": 2}

    class Faulty(StaticFiles):
        async def get_response(self, path, scope):  # type: ignore[no-untyped-def]
            if scope["method"] == "GET" and armed and failing["left"] > 0:
                failing["left"] -= 1
                raise ConnectionResetError
            return await super().get_response(path, scope)

    armed = False
    monkeypatch.setitem(globals(), "StaticFiles", Faulty)
    with served(tmp_path / "web") as address:
        part = training_at(tmp_path, address)
        armed = True
        assert np.array_equal(pixels(part, [5])[0].numpy(), decode(png(5), 16, name=""))
    assert failing["left"] == 0


def test_a_query_stays_out_of_what_people_read() -> None:
    assert shards.shown("https://me:pass@host/a.tar?signature=abc") == "https://host/a.tar"
    error = OSError("403, url='https://me:pass@host/a.tar?signature=abc' (x)")
    assert shards._told(error) == "403, url='https://host/a.tar' (x)"


def order_of(sizes: list[int], *, window: int, seed: int = 0, epoch: int = 0) -> list[int]:
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    return WindowedOrder(shard_of, window)(len(shard_of), seed=seed, epoch=epoch, device="cpu").tolist()


def test_an_order_is_a_permutation_that_only_seed_and_epoch_decide() -> None:
    sizes = [50, 0, 70, 1, 30]
    one = order_of(sizes, window=16)
    assert sorted(one) == list(range(151))
    assert one == order_of(sizes, window=16)
    assert len({tuple(order_of(sizes, window=16, seed=s, epoch=e)) for s in range(3) for e in range(3)}) == 9


def test_a_window_of_one_reads_shard_after_shard() -> None:
    sizes = [5, 3, 4]
    bounds = np.cumsum([0, *sizes])
    runs = [list(range(bounds[i], bounds[i + 1])) for i in range(3)]
    seen = set()
    for epoch in range(40):
        order = order_of(sizes, window=1, epoch=epoch)
        turns = sorted(range(3), key=lambda i: order.index(runs[i][0]))
        assert order == [place for i in turns for place in runs[i]]
        seen.add(tuple(turns))
    assert len(seen) == 6


def test_samples_stay_within_the_window_and_use_all_of_it() -> None:
    window, sizes = 64, [1000]
    moved = np.array(order_of(sizes, window=window)) - np.arange(1000)
    assert np.abs(moved).max() < window
    assert np.abs(moved).max() > window / 2
    assert (moved == 0).mean() < 0.1


def test_a_window_as_long_as_the_epoch_mixes_all_of_it() -> None:
    order = np.array(order_of([500, 500], window=100_000))
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1  # 3 standard deviations of 1 / sqrt(1000)


def test_held_out_samples_leave_the_rest_readable(tmp_path: Path) -> None:
    lay(tmp_path / "set")
    whole = training(tmp_path)
    split = with_validation(Parts(("0", "1", "2"), whole, None, None), 0.25)
    assert isinstance(split.train, Shards)
    assert isinstance(split.val, Shards)
    assert len(split.train) + len(split.val) == 3 * EACH
    rest = split.train
    assert sorted(rest.order(len(rest), seed=0, epoch=0, device="cpu").tolist()) == list(range(len(rest)))
    places = [whole.name(i) for i in range(len(whole))]
    for i in range(len(rest)):
        assert torch.equal(pixels(rest, [i]), pixels(whole, [places.index(rest.name(i))]))


def epoch_of(data: Data) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(data.train_batches(epoch=2, batch_size=4))
    return torch.cat([next(iter(batch.parts))[0] for batch in batches]), torch.cat([batch.labels for batch in batches])


@pytest.mark.parametrize("augment", ["none", "imagenet"])
def test_neither_workers_nor_residence_change_a_bit(augment: AugmentNames, tmp_path: Path) -> None:
    lay(tmp_path / "set")
    seen = []
    for workers, resident in ((0, False), (2, False), (0, True)):
        spec = WebDatasetData(dataset="webdataset", train="set/train-*.tar", val="set/val.tar", image_size=16, augment=augment, workers=workers,
                              shuffle_window=5)  # fmt: skip
        data = open_data(spec, data_root=tmp_path, seed=1, device=CPU, resident_bytes=2**30 if resident else 0)
        seen.append(epoch_of(data))
    for images, labels in seen[1:]:
        assert torch.equal(images, seen[0][0])
        assert torch.equal(labels, seen[0][1])


def test_what_shards_are_called_does_not_hang_on_where_they_lie(tmp_path: Path) -> None:
    for root in ("one", "other"):
        lay(tmp_path / root / "set")
    one, other = (list(training(tmp_path / root).names()) for root in ("one", "other"))
    assert one == other
    assert one[7] == "set/train-01.tar, 000007"
    assert len(set(one)) == 3 * EACH


def left_third(index: int, epoch: int, height: int, width: int) -> Box | None:
    return Box(0, 0, width / 3, height) if (index + epoch) % 2 else None


def test_each_image_is_cropped_by_its_place_and_epoch(tmp_path: Path) -> None:
    lay(tmp_path / "set")
    images = FileImages(training(tmp_path), size=16, workers=1, device=CPU)
    (batch,) = images.batches(torch.tensor([2, 5]), 2, epoch=1, crop=left_third)
    assert np.array_equal(batch[0].numpy(), decode(png(2), 16, name="", crop=lambda h, w: Box(0, 0, w / 3, h)))
    assert np.array_equal(batch[1].numpy(), decode(png(5), 16, name=""))


# --- what may be called ----------------------------------------------------------------------------------------------------------


class Counted:
    """An ASGI application that notes each request before the application behind it answers."""

    def __init__(self, behind: ASGIApp) -> None:
        self._behind = behind
        self.requests: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.requests.append(scope["path"])
        await self._behind(scope, receive, send)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "127.1", "[0:0:0:0:0:ffff:7f00:1]", "0.0.0.0", "user@127.0.0.1"])
def test_shards_on_this_machine_are_refused_unless_it_is_listed(host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)
    lay(tmp_path / "set")
    seen = Counted(StaticFiles(directory=tmp_path / "set"))
    with served(seen) as address, pytest.raises(DataUnreadable, match="refused"):
        training_at(tmp_path, address.replace("127.0.0.1", host))
    assert seen.requests == []


def test_the_refusal_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "hooks.corp")
    with pytest.raises(DataUnreadable, match=r"the operator may list 10\.0\.0\.1:80 in POWERGRAD_ALLOWED_HOSTS"):
        opened(tmp_path, "http://10.0.0.1/t.tar", "http://10.0.0.1/v.tar")


def test_a_list_of_hosts_that_makes_no_sense_opens_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "https://hooks.corp")
    with pytest.raises(DataUnreadable, match=r"POWERGRAD_ALLOWED_HOSTS: 'https://hooks\.corp': must be a name"):
        opened(tmp_path, "http://hooks.corp/t.tar", "http://hooks.corp/v.tar")


def resolving(monkeypatch: pytest.MonkeyPatch, *answers: str) -> list[str]:
    """Make every name mean each address in turn, the last one from then on; the names asked for."""
    real, asked, left = socket.getaddrinfo, list[str](), list(answers)

    def resolve(host: str, *more: Any, **named: Any) -> Any:
        if not host.endswith(".test"):
            return real(host, *more, **named)
        asked.append(host)
        return real(left.pop(0) if len(left) > 1 else left[0], *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return asked


def test_a_name_that_leads_to_this_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its port is open to listed networks, so that the address alone decides."""
    monkeypatch.setenv(VARIABLE, "192.168.77.0/24")
    asked = resolving(monkeypatch, "127.0.0.1")
    lay(tmp_path / "set")
    seen = Counted(StaticFiles(directory=tmp_path / "set"))
    with served(seen) as address, pytest.raises(DataUnreadable, match=r"refused .*not a public address"):
        training_at(tmp_path, address.replace("127.0.0.1", "leads-home.test"))
    assert "leads-home.test" in asked
    assert seen.requests == []


def test_a_name_that_changes_its_meaning_is_held_against_the_rule_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """127.0.0.2 stands for the public address that the name has at first."""
    monkeypatch.setenv(VARIABLE, "127.0.0.2")
    resolving(monkeypatch, "127.0.0.2", "127.0.0.1")
    lay(tmp_path / "set")
    bait, victim = (Counted(StaticFiles(directory=tmp_path / "set")) for _ in range(2))
    with served(bait, host="127.0.0.2") as address, served(victim, port=port_of(address)):
        url = address.replace("127.0.0.2", "changes.test")
        assert training_at(tmp_path, url).labels.tolist()
        # a session of its own knows no name any more, as a forked worker's does
        fresh = web.CheckedClient(AllowList.of_environment())
        with pytest.raises(AddressRefused):
            asyncio.run(fetched(fresh, f"{url}/val.tar"))
    assert bait.requests
    assert victim.requests == []


async def fetched(client: web.CheckedClient, url: str) -> bytes:
    async with await client(loop=asyncio.get_running_loop()) as session, session.get(url) as answer:
        return await answer.read()


@pytest.mark.parametrize(
    "where", ["http://127.0.0.1:{port}/val.tar", "http://leads-home.test:{port}/val.tar", "http://[::1]:{port}/val.tar"]
)
def test_a_redirect_to_this_machine_is_refused(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "127.0.0.2")
    resolving(monkeypatch, "127.0.0.1")
    lay(tmp_path / "set")
    victim = Counted(StaticFiles(directory=tmp_path / "set"))
    with served(victim) as address:
        lure = Counted(RedirectResponse(where.format(port=port_of(address))))
        with served(lure, host="127.0.0.2") as elsewhere, pytest.raises(DataUnreadable, match="refused"):
            training_at(tmp_path, elsewhere)
    assert lure.requests
    assert victim.requests == []


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])
