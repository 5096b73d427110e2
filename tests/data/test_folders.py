"""Class folders: splits, classes, broken images, and the same bits with any number of workers."""

from __future__ import annotations

import os
import select
import signal
import struct
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from powergrad.data import Data, DataMissing, DataUnreadable, open_data
from powergrad.data.decode import decode
from powergrad.spec import ClassFolderData, ImageNetData
from tests.data.folders import class_folder, image

CPU = torch.device("cpu")


def opened(data_root: Path, path: str = "pets", *, workers: int = 0, resident: bool = True, seed: int = 0) -> Data:
    spec = ClassFolderData(dataset="class_folder", path=path, image_size=16, workers=workers)
    return open_data(spec, data_root=data_root, seed=seed, device=CPU, resident_bytes=2**30 if resident else 0)


def epoch_of(data: Data, *, epoch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(data.train_batches(epoch=epoch, batch_size=5))
    return torch.cat([batch.parts[0][0] for batch in batches]), torch.cat([batch.labels for batch in batches])


def test_neither_workers_nor_residence_change_a_bit(tmp_path: Path) -> None:
    class_folder(tmp_path / "pets")
    images, labels = epoch_of(opened(tmp_path))
    for workers, resident in ((0, False), (2, False), (2, True)):
        images_again, labels_again = epoch_of(opened(tmp_path, workers=workers, resident=resident))
        assert torch.equal(images, images_again)
        assert torch.equal(labels, labels_again)


def test_a_loader_leaves_torchs_generator_alone(tmp_path: Path) -> None:
    class_folder(tmp_path / "pets")
    data = opened(tmp_path, resident=False)
    before = torch.get_rng_state()
    epoch_of(data)
    assert torch.equal(before, torch.get_rng_state())


def test_a_share_of_each_class_is_held_out(tmp_path: Path) -> None:
    class_folder(tmp_path / "pets", each=10)
    data = opened(tmp_path)
    assert data.class_names == ("ant", "bee", "cat")
    assert torch.bincount(data.val.labels).tolist() == [2, 2, 2]
    assert torch.bincount(data.train.labels).tolist() == [8, 8, 8]


def test_given_splits_are_used_as_they_are(tmp_path: Path) -> None:
    for part, each in (("train", 6), ("val", 3), ("test", 2)):
        class_folder(tmp_path / "pets" / part, each=each)
    data = opened(tmp_path)
    assert (len(data.train), len(data.val), data.test and len(data.test)) == (18, 9, 6)


def test_a_class_that_training_does_not_know_is_named(tmp_path: Path) -> None:
    class_folder(tmp_path / "pets" / "train")
    class_folder(tmp_path / "pets" / "val", classes=("ant", "dog"))
    with pytest.raises(DataMissing, match="'dog'"):
        opened(tmp_path)


def test_an_absent_folder_is_missing_and_named(tmp_path: Path) -> None:
    with pytest.raises(DataMissing, match=f"{tmp_path}/pets"):
        opened(tmp_path)


def test_an_empty_class_is_named(tmp_path: Path) -> None:
    class_folder(tmp_path / "pets")
    (tmp_path / "pets" / "dog").mkdir()
    with pytest.raises(DataMissing, match="class 'dog' is empty"):
        opened(tmp_path)


def test_one_class_is_not_enough(tmp_path: Path) -> None:
    class_folder(tmp_path / "pets", classes=("ant",))
    with pytest.raises(DataMissing, match="only the class 'ant'"):
        opened(tmp_path)


def test_a_class_of_one_image_cannot_be_split(tmp_path: Path) -> None:
    class_folder(tmp_path / "pets", each=1)
    with pytest.raises(DataMissing, match="class 'ant' has 1 image"):
        opened(tmp_path)


@pytest.mark.parametrize("where", ["pets", "pets/ant", "pets/ant/000.png"])
def test_nothing_leads_out_of_the_data_root(where: str, tmp_path: Path) -> None:
    outside = class_folder(tmp_path / "outside")
    root = tmp_path / "root"
    class_folder(root / "pets")
    place = root / where
    place.rename(tmp_path / "aside")
    place.symlink_to({"pets": outside, "pets/ant": outside / "ant"}.get(where, outside / "ant" / "000.png"))
    with pytest.raises(DataUnreadable, match="out of the data root"):
        opened(root)


def test_a_pipe_among_the_images_is_named_and_never_opened(tmp_path: Path) -> None:
    class_folder(tmp_path / "pets")
    os.mkfifo(tmp_path / "pets" / "bee" / "pipe.png")
    with pytest.raises(DataUnreadable, match=r"pipe\.png: not a regular file"):
        opened(tmp_path)


WNIDS = ("n01440764", "n01443537", "n02102040")


def imagenet_opened(data_root: Path) -> Data:
    return open_data(ImageNetData(dataset="imagenet", image_size=16), data_root=data_root, seed=0, device=CPU)


def test_imagenets_classes_are_its_wnids(tmp_path: Path) -> None:
    for part, each in (("train", 4), ("val", 2)):
        class_folder(tmp_path / "imagenet" / part, classes=WNIDS, each=each)
    (tmp_path / "imagenet" / "test").mkdir()
    image(0).save(tmp_path / "imagenet" / "test" / "ILSVRC2012_test_00000001.png")  # its test images have no public classes
    data = imagenet_opened(tmp_path)
    assert data.class_names == WNIDS
    assert (len(data.train), len(data.val), data.test) == (12, 6, None)


def test_imagenet_still_packed_says_how_to_unpack_it(tmp_path: Path) -> None:
    (tmp_path / "imagenet").mkdir()
    (tmp_path / "imagenet" / "ILSVRC2012_img_train.tar").write_bytes(b"")
    with pytest.raises(DataMissing, match=r"imagenet/train: unpack /.*ILSVRC2012_img_train\.tar, and each tar in it"):
        imagenet_opened(tmp_path)


@pytest.mark.parametrize(("part", "name", "way_out"), [("train", "n01440764.tar", "each tar in it into a folder"),
                                                       ("val", "ILSVRC2012_val_00000001.JPEG", "sort its images into a folder per wnid")])  # fmt: skip
def test_imagenet_half_unpacked_says_what_is_left_to_do(part: str, name: str, way_out: str, tmp_path: Path) -> None:
    for folder in ("train", "val"):
        class_folder(tmp_path / "imagenet" / folder, classes=WNIDS, each=2)
    (tmp_path / "imagenet" / part / name).write_bytes(b"")
    with pytest.raises(DataMissing, match=rf"imagenet/{part}/{name}: must be a folder named by its wnid.*{way_out}"):
        imagenet_opened(tmp_path)


@pytest.mark.parametrize(("workers", "resident"), [(0, True), (0, False), (2, False)])
def test_a_broken_image_is_named(workers: int, resident: bool, tmp_path: Path) -> None:
    class_folder(tmp_path / "pets")
    broken = tmp_path / "pets" / "bee" / "003.png"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(DataUnreadable, match=f"^{broken}: cannot be decoded"):
        data = opened(tmp_path, workers=workers, resident=resident)
        epoch_of(data)
        list(data.held_out_batches(data.val, batch_size=4))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_loader_workers_die_with_a_killed_trainer(tmp_path: Path) -> None:
    class_folder(tmp_path / "pets")
    told, tell = os.pipe()
    trainer = os.fork()
    if trainer == 0:
        batches = opened(tmp_path, workers=2, resident=False).train_batches(epoch=0, batch_size=5)
        next(batches)
        os.write(tell, Path(f"/proc/self/task/{os.getpid()}/children").read_bytes())
        signal.pause()
        os._exit(1)
    workers = [int(pid) for pid in os.read(told, 1000).split()]
    assert len(workers) == 2
    os.kill(trainer, signal.SIGKILL)
    os.waitpid(trainer, 0)
    deadline = time.monotonic() + 3  # torch's own workers notice only after 5 seconds
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        select.select([], [], [], 0.01)
    assert not any(alive(pid) for pid in workers)


def alive(pid: int) -> bool:
    """Not gone, and not merely waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [50_000, 10_000])
def test_a_huge_image_is_refused_from_its_header(side: int, tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    path.write_bytes(png_header(side, side))
    with pytest.raises(DataUnreadable, match=rf"{path}: .*pixels"):
        decode(path, 16)


def test_every_colour_model_becomes_rgb(tmp_path: Path) -> None:
    grey = image(1, width=16, bands=1)
    for name, picture in {
        "grey.png": grey,
        "cmyk.jpg": image(2, width=16).convert("CMYK"),
        "alpha.png": image(3, width=16, bands=4),
        "palette.png": image(4, width=16).quantize(16),
        "bits.png": grey.convert("1"),
    }.items():
        picture.save(tmp_path / name)
        assert decode(tmp_path / name, 16).shape == (3, 16, 16)
    assert (decode(tmp_path / "grey.png", 16) == np.asarray(grey)).all()


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (16, 16), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert (decode(tmp_path / "deep.png", 16)[0] == (deep >> 8)).all()


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert decode(tmp_path / "moving.gif", 16)[:, 0, 0].tolist() == [255, 0, 0]


def test_the_middle_square_is_taken(tmp_path: Path) -> None:
    wide = Image.new("RGB", (48, 16), "black")
    wide.paste("white", (16, 0, 32, 16))
    wide.save(tmp_path / "wide.png")
    assert decode(tmp_path / "wide.png", 16).min() == 255


def test_a_file_that_is_no_image_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(DataUnreadable, match=r"text\.jpg"):
        decode(tmp_path / "text.jpg", 16)
