"""Each of torchvision's sets, read from small files in its own format."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from powergrad.data import DATASETS, DataMissing, DataUnreadable
from powergrad.data.folders import Listing
from powergrad.data.images import Encoded, FileImages, Parts, Pixels
from powergrad.data.known import torchvision_set
from powergrad.spec import FILE_DATASETS, TORCHVISION_DATASETS
from tests.data.known_sets import BUILDERS, SIDE, TEST, TRAIN, VAL, picture


def opened(name: str, data_root: Path) -> Parts:
    return torchvision_set(name, data_root=data_root, size=SIDE, download=False)


def classes_seen(part: Pixels | Encoded, split: int) -> list[int]:
    """What the images themselves say."""
    if isinstance(part, Pixels):
        assert part.pixels.shape[2:] == (SIDE, SIDE)
        assert bool((part.pixels == part.pixels[:, :1, :1, :1]).all())
        return [int(level) for level in part.pixels[:, 0, 0, 0]]
    images = FileImages(part, size=SIDE, workers=0, device=torch.device("cpu"))
    (pixels,) = images.batches(torch.arange(len(part)), len(part))
    assert bool((pixels == pixels[:, :, :1, :1]).all())
    assert bool((pixels[:, 2] == split).all())
    return [int(red) * 256 + int(green) for red, green, _ in pixels[:, :, 0, 0]]


@pytest.mark.parametrize("name", BUILDERS)
def test_every_image_of_every_split_has_its_class(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    BUILDERS[name](tmp_path, monkeypatch)
    parts, info = opened(name, tmp_path), DATASETS[name]
    assert len(set(parts.class_names)) == len(parts.class_names) == info.classes
    brought = {split: part for split, part in ((TRAIN, parts.train), (VAL, parts.val), (TEST, parts.test)) if part is not None}
    for split, part in brought.items():
        assert sorted(set(part.labels.tolist())) == list(range(len(parts.class_names)))
        assert classes_seen(part, split) == part.labels.tolist()
    names = {TRAIN: "train", VAL: "val", TEST: "test"}
    assert {"val", *(names[split] for split in brought)} == set(info.splits)  # val is held out of train where there is none


def test_every_name_of_the_spec_is_in_the_catalogue_and_can_be_opened(tmp_path: Path) -> None:
    for name in TORCHVISION_DATASETS:
        assert DATASETS[name].needs_files
        with pytest.raises(DataMissing, match=f"{name} is not at {tmp_path}/.*copy the unpacked files there"):
            opened(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_sets_made_of_files_are_listed_and_the_others_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("usps", "rendered-sst2"):
        BUILDERS[name](tmp_path, monkeypatch)
        assert isinstance(opened(name, tmp_path).train, Listing if name in FILE_DATASETS else Pixels)


def test_emnists_characters_stand_upright(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files hold them column by column."""
    BUILDERS["emnist"](tmp_path, monkeypatch)
    path = tmp_path / "EMNIST/raw/emnist-balanced-train-images-idx3-ubyte"
    content = bytearray(path.read_bytes())
    content[16 + 3 * 28 + 20] = 255  # the fourth column of the first image, in its row 20
    path.write_bytes(content)
    train = torchvision_set("emnist", data_root=tmp_path, size=28, download=False).train
    assert isinstance(train, Pixels)
    assert (train.pixels[0, 0] == 255).nonzero().tolist() == [[20, 3]]


def test_an_absent_class_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes after it would each be taken for the one before."""
    BUILDERS["eurosat"](tmp_path, monkeypatch)
    for image in (tmp_path / "eurosat/2750/Land4").iterdir():
        image.unlink()
    (tmp_path / "eurosat/2750/Land4").rmdir()
    with pytest.raises(DataUnreadable, match=rf"{tmp_path}/eurosat/2750: .*9 classes instead of 10"):
        opened("eurosat", tmp_path)


@pytest.mark.parametrize(
    ("name", "spoilt"), [("svhn", "svhn/test_32x32.mat"), ("food101", "food-101/meta/test.json"), ("usps", "usps/usps.t.bz2")]
)
@pytest.mark.parametrize("absent", [True, False])
def test_a_spoilt_or_absent_file_is_unreadable(
    name: str, spoilt: str, absent: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    BUILDERS[name](tmp_path, monkeypatch)
    path = tmp_path / spoilt
    content = path.read_bytes()
    path.unlink() if absent else path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataUnreadable, match=rf"{tmp_path}/.*incomplete or corrupted .*copy {name} there again"):
        opened(name, tmp_path)


def test_an_image_that_a_list_names_but_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    BUILDERS["dtd"](tmp_path, monkeypatch)
    (tmp_path / "dtd/dtd/images/t03/t03_0.jpg").unlink()
    with pytest.raises(DataUnreadable, match=r"t03_0\.jpg: cannot be decoded"):
        classes_seen(opened("dtd", tmp_path).train, TRAIN)


@pytest.mark.parametrize("by_link", [True, False])
def test_no_list_leads_out_of_the_data_root(by_link: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, secret = tmp_path / "root", picture(tmp_path / "secret.jpg", 0, TRAIN)
    BUILDERS["fgvc-aircraft"](root, monkeypatch)
    data = root / "fgvc-aircraft-2013b/data"
    if by_link:
        (data / "images/0000000.jpg").unlink()
        (data / "images/0000000.jpg").symlink_to(secret)
    else:
        listed = data / "images_variant_train.txt"
        listed.write_text(listed.read_text().replace("0000000 Type 0", "../../../../secret Type 0", 1))
    with pytest.raises(DataUnreadable, match="out of the data root"):
        opened("fgvc-aircraft", root)


def test_a_download_that_is_impossible_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataMissing, match=r"stanford-cars could not be downloaded .*: copy the unpacked files there"):
        torchvision_set("stanford-cars", data_root=tmp_path, size=SIDE, download=True)


def test_a_reader_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pcam").mkdir()
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DataMissing, match=r"pcam: .*pip install h5py"):
        opened("pcam", tmp_path)
