"""The look at a data set before anything trains on it: what fails it, what is only reported, and that nothing in it is ever run."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from powergrad.archives import Limits, unpack
from powergrad.data import DataMissing, DataUnreadable, open_data
from powergrad.data.check import check
from powergrad.data.decode import decode
from powergrad.spec import NamedData
from tests.pictures import encoded, flowers, png, zipped

ROOT = Path(__file__).parents[2]
MINUTES = float(os.environ.get("POWERGRAD_FUZZ_MINUTES", "0"))


def laid(root: Path, entries: dict[str, bytes]) -> Path:
    for name, content in entries.items():
        path = root / "uploads" / "set" / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root / "uploads" / "set" / "tree"


def checked(root: Path, entries: dict[str, bytes] | None = None, *, skip: bool = False) -> dict[str, Any]:
    if entries is not None:
        laid(root, entries)
    asked = {"path": "uploads/set/tree", "source": "uploaded", "skip_unreadable": skip, "bytes": 1, "files": 1}
    found = check(asked, root)
    json.dumps(found, allow_nan=False)
    return found


def split_set() -> dict[str, bytes]:
    return {
        f"{split}/{name}": content
        for seed, split in ((0, "train"), (500, "val"), (900, "test"))
        for name, content in flowers(seed=seed).items()
    }


def test_classes_splits_and_sides_are_counted(tmp_path: Path) -> None:
    found = checked(tmp_path, split_set() | {"train/rose/large.jpg": encoded(Image.new("L", (300, 200)), "JPEG")})
    report = found["report"]
    assert (found["state"], found["error"], found["files"]) == ("ready", None, 37)
    assert report["splits"] == {"train": 13, "val": 12, "test": 12}
    assert report["class_counts"]["rose"] == {"train": 5, "val": 4, "test": 4}
    assert report["sides"] == {"min": 16, "median": 16, "max": 200}
    assert (report["modes"], report["formats"]) == ({"RGB": 36, "L": 1}, {"PNG": 36, "JPEG": 1})
    assert report["warnings"] == []


def test_what_training_opens_is_what_was_checked(tmp_path: Path) -> None:
    found = checked(tmp_path, split_set())
    data = open_data(
        NamedData(dataset="mine", image_size=8),
        data_root=tmp_path,
        named_dir=tmp_path / "uploads/set/tree",
        seed=0,
        device=torch.device("cpu"),
    )
    assert {name: len(split) for name, split in (("train", data.train), ("val", data.val), ("test", data.test)) if split} == found[
        "report"
    ]["splits"]


def test_the_version_is_that_of_the_archive(tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(zipped(flowers()))
    made = unpack(tmp_path / "archive", tmp_path / "uploads" / "set", Limits())
    assert checked(tmp_path)["version"] == made.version


def test_duplicates_are_told_apart(tmp_path: Path) -> None:
    rose = split_set()["train/rose/0.png"]
    again = dict.fromkeys(("val/rose/leak.png", "train/tulip/other.png", "train/rose/again.png"), rose)
    found = checked(tmp_path, split_set() | again)
    duplicates = found["report"]["duplicates"]
    assert found["state"] == "ready"
    assert (duplicates["across_splits"]["count"], duplicates["across_classes"]["count"], duplicates["within_classes"]) == (1, 1, 1)
    assert "val/rose/leak.png" in duplicates["across_splits"]["first"][0]
    assert len(found["report"]["warnings"]) == 3


BROKEN = {
    "truncated PNG": png(3)[:300],
    "truncated JPEG": encoded(Image.effect_noise((200, 200), 90).convert("RGB"), "JPEG")[:4000],
    "empty": b"",
    "text": b"hello",
    "EPS": encoded(Image.new("RGB", (8, 8)), "EPS"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_an_unreadable_image_fails_the_set_and_is_named(kind: str, tmp_path: Path) -> None:
    found = checked(tmp_path, flowers() | {"rose/broken.png": BROKEN[kind]})
    assert (found["state"], found["error"]["code"]) == ("failed", "data_unreadable")
    assert "rose/broken.png" in found["error"]["detail"]
    assert found["report"]["unreadable"]["count"] == 1
    assert found["report"]["class_counts"]["rose"] == {"train": 4}
    assert str(tmp_path) not in json.dumps(found)


def bomb(width: int, height: int) -> bytes:
    """A PNG of so many pixels in its header, and none behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))

    header = struct.pack(">LLBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9_000, 50_000])
def test_an_image_of_too_many_pixels_is_refused_by_its_header(side: int, tmp_path: Path) -> None:
    found = checked(tmp_path, flowers() | {"rose/huge.png": bomb(side, side)})
    assert (found["state"], "pixels" in found["error"]["detail"]) == ("failed", True)


ODD: dict[str, tuple[str, Callable[[], Image.Image], dict[str, Any]]] = {
    "CMYK": ("JPEG", lambda: Image.new("CMYK", (20, 20), (10, 20, 30, 40)), {}),
    "16 bits": ("PNG", lambda: Image.fromarray(np.full((20, 20), 40_000, np.uint16)), {}),
    "animated": ("GIF", lambda: Image.new("L", (20, 20)), {"save_all": True, "append_images": [Image.new("L", (20, 20), 200)]}),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_images_are_reported_and_train(kind: str, tmp_path: Path) -> None:
    form, make, options = ODD[kind]
    found = checked(tmp_path, flowers() | {f"rose/odd.{form.lower().replace('jpeg', 'jpg')}": encoded(make(), form, **options)})
    assert found["state"] == "ready"
    (odd,) = found["report"]["odd"]["first"]
    assert (odd["name"].startswith("rose/odd"), odd["why"].startswith(kind)) == (True, True)


def test_a_broken_second_page_of_a_tiff_does_not_end_the_check(tmp_path: Path) -> None:
    """Found by fuzzing: counting the pages raises what decoding the first does not."""
    pages = bytearray(encoded(Image.new("L", (20, 20)), "TIFF", save_all=True, append_images=[Image.new("L", (20, 20), 200)]))
    first = struct.unpack_from("<I", pages, 4)[0]
    second = struct.unpack_from("<I", pages, first + 2 + 12 * struct.unpack_from("<H", pages, first)[0])[0]
    struct.pack_into("<H", pages, second + 2, 999)  # its width is no width any more
    found = checked(tmp_path, flowers() | {"rose/pages.tif": bytes(pages)})
    assert (found["state"], found["report"]["odd"]["count"]) == ("ready", 0)


def test_unreadable_images_are_left_out_if_asked_and_told_even_by_a_second_check(tmp_path: Path) -> None:
    entries = flowers() | {"rose/broken.png": b"x", "tulip/broken.png": b"y"}
    first = checked(tmp_path, entries, skip=True)
    assert (first["state"], first["files"]) == ("ready", 12)
    assert not (tmp_path / "uploads/set/tree/rose/broken.png").exists()
    again = checked(tmp_path, skip=True)
    assert again["report"] == first["report"]
    assert [one["name"] for one in again["report"]["skipped"]["first"]] == ["rose/broken.png", "tulip/broken.png"]


def test_a_check_that_died_while_it_left_images_out_is_gone_on_with(tmp_path: Path) -> None:
    tree = laid(tmp_path, flowers() | {"rose/broken.png": b"x", "tulip/broken.png": b"y"})
    (tree.parent / "skipped.json").write_text(json.dumps({"rose/broken.png": "why", "tulip/broken.png": "why"}))
    (tree / "rose/broken.png").unlink()
    found = checked(tmp_path, skip=True)
    assert (found["state"], found["report"]["skipped"]["count"], found["files"]) == ("ready", 2, 12)


def test_a_class_that_is_left_without_images_fails_by_name(tmp_path: Path) -> None:
    found = checked(tmp_path, flowers() | {"weed/1.png": b"x", "weed/2.png": b"y"}, skip=True)
    assert (found["state"], "'weed' is empty" in found["error"]["detail"]) == ("failed", True)


def test_a_folder_that_is_gone_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataMissing, match="there is no folder uploads/set/tree"):
        checked(tmp_path)


def test_a_link_out_of_the_folder_fails(tmp_path: Path) -> None:
    tree = laid(tmp_path / "root", flowers())
    (tmp_path / "secret.png").write_bytes(png(1))
    (tree / "rose" / "link.png").symlink_to(tmp_path / "secret.png")
    found = checked(tmp_path / "root")
    assert (found["state"], "link.png" in found["error"]["detail"]) == ("failed", True)


# --- nothing in a set is ever run


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def armed(mark: Path) -> dict[str, bytes]:
    """The bomb in every wrapping that some loader would open."""
    plain = pickle.dumps(Bomb(mark))
    as_torch, as_numpy = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(as_torch, "w") as archive:
        archive.writestr("archive/data.pkl", plain)
        archive.writestr("archive/version", "3\n")
    np.savez(as_numpy, bomb=np.array([Bomb(mark)], dtype=object), allow_pickle=True)
    return {
        "pt": as_torch.getvalue(),
        "pth": plain,
        "npz": as_numpy.getvalue(),
        "npy": plain,
        "safetensors": plain,
        "pkl": plain,
        "png": plain,
        "tif": as_torch.getvalue(),
    }


def test_the_bombs_are_armed(tmp_path: Path) -> None:
    pickle.loads(armed(tmp_path / "mark")["pth"])
    assert (tmp_path / "mark").exists()


def test_pickles_in_an_archive_are_never_run(tmp_path: Path) -> None:
    bombs = {f"rose/bomb.{suffix}": content for suffix, content in armed(tmp_path / "mark").items()}
    (tmp_path / "archive").write_bytes(zipped({**flowers(), **bombs}))
    unpack(tmp_path / "archive", tmp_path / "uploads" / "set", Limits())
    kept = {path.name for path in (tmp_path / "uploads/set/tree/rose").iterdir() if path.name.startswith("bomb")}
    assert kept == {"bomb.png", "bomb.tif"}, "only what calls itself an image is even stored"
    found = checked(tmp_path)
    assert (found["state"], found["report"]["unreadable"]["count"]) == ("failed", 2)
    assert not (tmp_path / "mark").exists()


def test_pickles_as_weights_or_checkpoints_are_never_run(tmp_path: Path) -> None:
    from powergrad import checkpoint
    from powergrad.models import build_model, load_weights

    model = build_model("resnet20", num_classes=3, image_size=8, norm=None, generator_seed=0)
    for suffix, content in armed(tmp_path / "mark").items():
        path = tmp_path / f"bomb.{suffix}"
        path.write_bytes(content)
        with pytest.raises(Exception, match=r"."):
            load_weights(model, path)
        folder = tmp_path / f"step-{suffix}"
        folder.mkdir()
        (folder / checkpoint.STATE).write_bytes(content)
        with pytest.raises(Exception, match=r"."):
            torch.load(folder / checkpoint.STATE, map_location="cpu", weights_only=True)
    assert not (tmp_path / "mark").exists()


def test_no_code_of_ours_unpickles_what_it_reads() -> None:
    """Every call that could: torch.load only with weights_only, numpy only without pickles, pickle not at all."""
    found: list[str] = []
    for top in ("powergrad", "api", "worker"):
        for path in (ROOT / top).rglob("*.py"):
            text = path.read_text()
            found += [f"{path}: {call}" for call in re.findall(r"torch\.load\([^)]*\)", text) if "weights_only=True" not in call]
            found += [f"{path}: {call}" for call in re.findall(r"(?:np|numpy)\.load\([^)]*\)", text) if "allow_pickle=False" not in call]
            found += [f"{path}: {call}" for call in re.findall(r"(?:pickle|dill|joblib|shelve)\.(?:loads?|Unpickler|open)\(", text)]
    assert found == []


# --- fuzz


PATIENT = pytest.mark.timeout(180 + 600 * MINUTES)
SEEDS = {
    "PNG": png(1),
    "JPEG": encoded(Image.effect_noise((40, 30), 90).convert("RGB"), "JPEG"),
    "GIF": encoded(Image.new("L", (20, 20)), "GIF", save_all=True, append_images=[Image.new("L", (20, 20), 200)]),
    "WEBP": encoded(Image.effect_noise((40, 30), 90).convert("RGB"), "WEBP"),
    "BMP": encoded(Image.effect_noise((16, 16), 90), "BMP"),
    "TIFF": encoded(Image.effect_noise((20, 20), 90), "TIFF", compression="tiff_lzw"),
    "16 bits": encoded(Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20)), "PNG"),
    "CMYK": encoded(Image.new("CMYK", (20, 20)), "JPEG"),
    "PPM": encoded(Image.effect_noise((16, 16), 90).convert("RGB"), "PPM"),
}


@PATIENT
@settings(max_examples=max(100, int(MINUTES * 6000)), derandomize=not MINUTES)
@given(
    kind=st.sampled_from(sorted(SEEDS)),
    changes=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=8),
    cut=st.integers(0, 400),
)
def test_mutated_images_decode_or_are_refused(kind: str, changes: list[tuple[int, int]], cut: int) -> None:
    content = bytearray(SEEDS[kind])
    for place, value in changes:
        content[place % len(content)] = value
    content = content[: len(content) - cut % len(content)] if cut % 3 == 0 else content
    with suppress(DataUnreadable):
        assert decode(bytes(content), 16, name="it").shape == (3, 16, 16)


@PATIENT
@settings(max_examples=max(15, int(MINUTES * 600)), derandomize=not MINUTES)
@given(
    mutated=st.lists(st.tuples(st.sampled_from(sorted(SEEDS)), st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=4),
    skip=st.booleans(),
)
def test_a_set_of_mutated_images_is_ready_or_failed(
    mutated: list[tuple[str, int, int]], skip: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    entries = flowers(each=2)
    for number, (kind, place, value) in enumerate(mutated):
        content = bytearray(SEEDS[kind])
        content[place % len(content)] = value
        entries[f"rose/m{number}.png"] = bytes(content)
    root = tmp_path_factory.mktemp("set")
    found = checked(root, entries, skip=skip)
    assert found["state"] == ("failed" if found["report"]["unreadable"]["count"] else "ready")
    assert not (skip and found["state"] == "failed")
    shutil.rmtree(root)
