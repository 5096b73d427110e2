"""The sheet of a set's images: some of each class, whatever they are called, at the places that are told."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from powergrad.data import samples
from powergrad.data.check import check
from powergrad.data.decode import decode
from tests.pictures import flowers, png

PLACE = "samples/set_1"


def checked(root: Path, entries: dict[str, bytes], **asked: Any) -> dict[str, Any]:
    tree = root / "uploads" / "set" / "tree"
    for name, content in entries.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(content)
    told = {"path": "uploads/set/tree", "source": "uploaded", "skip_unreadable": False, "bytes": 1, "files": 1, "samples": PLACE}
    return check(told | asked, root)


def tiles(path: Path) -> dict[tuple[int, int], bytes]:
    """Each tile's pixels by row and column, without those that are black."""
    with Image.open(path) as image:
        pixels = np.asarray(image)
    cells = {
        (row, column): pixels[64 * row : 64 * row + 64, 64 * column : 64 * column + 64]
        for row in range(len(pixels) // 64)
        for column in range(pixels.shape[1] // 64)
    }
    return {place: cell.tobytes() for place, cell in cells.items() if cell.any()}


def test_each_class_has_a_row_of_its_own_images(tmp_path: Path) -> None:
    made = flowers(each=10) | {"tulip/few/0.png": png(999)}
    found = checked(tmp_path, made)["samples"]
    assert (found["path"], found["tile"], found["columns"], list(found["splits"])) == (PLACE, 64, 8, ["train"])
    sheet = found["splits"]["train"]
    assert sheet["rows"] == [["daisy", 8], ["rose", 8], ["tulip", 8]]
    drawn = (tmp_path / PLACE / "train.png").read_bytes()
    assert (sheet["bytes"], sheet["sha256"]) == (len(drawn), hashlib.sha256(drawn).hexdigest())
    shown = tiles(tmp_path / PLACE / "train.png")
    assert len(shown) == len(set(shown.values())) == 24
    for row, label in enumerate(("daisy", "rose", "tulip")):
        own = {
            decode(tmp_path / "uploads/set/tree" / name, 64).transpose(1, 2, 0).tobytes() for name in made if name.startswith(f"{label}/")
        }
        assert {shown[row, column] for column in range(8)} <= own


def test_names_change_nothing_and_what_is_there_twice_is_shown_once(tmp_path: Path) -> None:
    first = checked(tmp_path / "one", flowers(each=3))["samples"]["splits"]["train"]
    renamed = {f"{name.partition('/')[0]}/x{i}.png": content for i, (name, content) in enumerate(reversed(flowers(each=3).items()))}
    twice = renamed | {"daisy/again.png": flowers(each=3)["daisy/0.png"]}
    second = checked(tmp_path / "two", twice)["samples"]["splits"]["train"]
    assert second == first
    assert second["rows"] == [["daisy", 3], ["rose", 3], ["tulip", 3]]


def test_each_split_has_a_sheet(tmp_path: Path) -> None:
    entries = {f"{split}/{name}": content for seed, split in ((0, "train"), (500, "val")) for name, content in flowers(seed=seed).items()}
    found = checked(tmp_path, entries)["samples"]["splits"]
    assert list(found) == ["train", "val"]
    assert found["train"]["sha256"] != found["val"]["sha256"]
    assert sorted(path.name for path in (tmp_path / PLACE).iterdir()) == ["train.png", "val.png"]


def test_of_many_classes_some_from_the_first_to_the_last_are_shown(tmp_path: Path) -> None:
    entries = {f"c{label:03}/{i}.png": png(2 * label + i) for label in range(100) for i in range(2)}
    rows = checked(tmp_path, entries)["samples"]["splits"]["train"]["rows"]
    labels = [label for label, _ in rows]
    assert (len(rows), labels[0], labels) == (samples.MOST_ROWS, "c000", sorted(labels))
    assert labels[-1] >= "c097"


def test_what_was_left_out_is_not_shown(tmp_path: Path) -> None:
    found = checked(tmp_path, flowers(each=3) | {"rose/broken.png": b"no image"}, skip_unreadable=True)
    assert found["report"]["skipped"]["count"] == 1
    assert found["samples"]["splits"]["train"]["rows"] == [["daisy", 3], ["rose", 3], ["tulip", 3]]


def test_of_a_set_that_fails_nothing_is_shown(tmp_path: Path) -> None:
    found = checked(tmp_path, flowers(each=3) | {"rose/broken.png": b"no image"})
    assert (found["state"], found["samples"]) == ("failed", None)
    assert not (tmp_path / "samples").exists()
