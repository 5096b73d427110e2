"""Builds each of torchvision's sets in its own format, so small that every class has one image a split.

An image is of one colour that tells its class and split, so that whoever reads it can check both: red * 256 + green is the class, blue
the split (0 train, 1 val, 2 test). Grey ones have the class as their level, and the two in which 16 bits are too many have it too.
"""

from __future__ import annotations

import bz2
import hashlib
import io
import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat  # type: ignore[import-untyped]
from torchvision import datasets  # type: ignore[import-untyped]

SIDE = 8
TRAIN, VAL, TEST = range(3)


def picture(path: Path, label: int, split: int) -> Path:
    """Pillow looks at the content, not at the name: PNG keeps the colour exactly."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    Image.new("RGB", (SIDE + 3, SIDE), (label // 256, label % 256, split)).save(content, "png")
    path.write_bytes(content.getvalue())
    return path


def write(path: Path, lines: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def flat(labels: NDArray[np.int64] | list[int], *shape: int) -> NDArray[np.uint8]:
    """(N, *shape), each of its label's level."""
    return np.broadcast_to(np.asarray(labels, dtype=np.uint8).reshape(-1, *[1] * len(shape)), (len(labels), *shape))


def idx(images: Path, labels: Path, *, classes: int = 10) -> None:
    images.parent.mkdir(parents=True, exist_ok=True)
    images.write_bytes(struct.pack(">IIII", 0x803, classes, 28, 28) + flat(list(range(classes)), 28, 28).tobytes())
    labels.write_bytes(struct.pack(">II", 0x801, classes) + bytes(range(classes)))


def mnist_like(folder: str) -> Callable[[Path, pytest.MonkeyPatch], None]:
    def build(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for part in ("train", "t10k"):
            idx(root / folder / f"raw/{part}-images-idx3-ubyte", root / folder / f"raw/{part}-labels-idx1-ubyte")

    return build


def emnist(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("train", "test"):
        stem = f"EMNIST/raw/emnist-balanced-{part}"
        idx(root / f"{stem}-images-idx3-ubyte", root / f"{stem}-labels-idx1-ubyte", classes=47)


def qmnist(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("train", "test"):
        labels = root / f"QMNIST/raw/qmnist-{part}-labels-idx2-int"
        idx(root / f"QMNIST/raw/qmnist-{part}-images-idx3-ubyte", labels)
        columns = np.array([[label, 4, 2, 7, 1, 0, 0, 9] for label in range(10)], dtype=">i4")
        labels.write_bytes(struct.pack(">III", 0xC02, 10, 8) + columns.tobytes())


def usps(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "usps").mkdir()
    for name in ("usps.bz2", "usps.t.bz2"):
        levels = [2 * (label + 0.5) / 255 - 1 for label in range(10)]
        rows = [f"{label + 1} " + " ".join(f"{i}:{level:.6f}" for i in range(1, 257)) for label, level in enumerate(levels)]
        (root / "usps" / name).write_bytes(bz2.compress("".join(f"{row}\n" for row in rows).encode()))


def svhn(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "svhn").mkdir()
    entries = dict(datasets.SVHN.split_list)
    for part in ("train", "test"):
        path = root / "svhn" / f"{part}_32x32.mat"
        labels = np.array([[label or 10] for label in range(10)], dtype=np.uint8)
        savemat(path, {"X": flat(list(range(10)), 32, 32, 3).transpose(1, 2, 3, 0), "y": labels})
        entries[part] = ["", path.name, md5(path)]
    monkeypatch.setattr(datasets.SVHN, "split_list", entries)


def stl10(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "stl10_binary"
    folder.mkdir()
    for part in ("train", "test"):
        (folder / f"{part}_X.bin").write_bytes(flat(list(range(10)), 3, 96, 96).tobytes())
        (folder / f"{part}_y.bin").write_bytes(bytes(range(1, 11)))
    (folder / "unlabeled_X.bin").write_bytes(flat([99], 3, 96, 96).tobytes())
    for attribute in ("train_list", "test_list"):
        known = [[name, md5(folder / name)] for name, _ in getattr(datasets.STL10, attribute)]
        monkeypatch.setattr(datasets.STL10, attribute, known)


def caltech101(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "caltech101/101_ObjectCategories"
    picture(folder / "BACKGROUND_Google/image_0001.jpg", 999, 9)
    for label in range(101):
        for number in (1, 2):
            picture(folder / f"thing{label:03d}/image_{number:04d}.jpg", label, TRAIN)


def caltech256(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for label in range(257):
        for number in (1, 2):
            picture(root / f"caltech256/256_ObjectCategories/{label + 1:03d}.thing{label}/{label + 1:03d}_{number:04d}.jpg", label, TRAIN)


def country211(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split, part in enumerate(("train", "valid", "test")):
        for label in range(211):
            picture(root / "country211" / part / f"C{label:03d}" / "1.jpg", label, split)


def dtd(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split, part in enumerate(("train", "val", "test")):
        names = [f"t{label:02d}/t{label:02d}_{split}.jpg" for label in range(47)]
        write(root / f"dtd/dtd/labels/{part}1.txt", names)
        for label, name in enumerate(names):
            picture(root / "dtd/dtd/images" / name, label, split)


def eurosat(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for label in range(10):
        for number in range(2):
            picture(root / f"eurosat/2750/Land{label}/{number}.jpg", label, TRAIN)


def fgvc_aircraft(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "fgvc-aircraft-2013b/data"
    write(folder / "variants.txt", [f"Type {label}" for label in range(100)])
    for split, part in enumerate(("train", "val", "test")):
        write(folder / f"images_variant_{part}.txt", [f"{split}{label:06d} Type {label}" for label in range(100)])
        for label in range(100):
            picture(folder / f"images/{split}{label:06d}.jpg", label, split)


def flowers102(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "flowers-102"
    numbers = np.arange(1, 3 * 102 + 1)
    for number in numbers.tolist():
        picture(folder / f"jpg/image_{number:05d}.jpg", (number - 1) % 102, (number - 1) // 102)
    savemat(folder / "imagelabels.mat", {"labels": (numbers - 1) % 102 + 1})
    savemat(folder / "setid.mat", dict(zip(("trnid", "valid", "tstid"), np.split(numbers, 3), strict=True)))
    known = {"label": ("imagelabels.mat", md5(folder / "imagelabels.mat")), "setid": ("setid.mat", md5(folder / "setid.mat"))}
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", known)


def food101(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part, split, each in (("train", TRAIN, 2), ("test", TEST, 1)):
        meta = {f"dish{label:03d}": [f"dish{label:03d}/{split}{number}" for number in range(each)] for label in range(101)}
        write(root / f"food-101/meta/{part}.json", [json.dumps(meta)])
        for label, names in enumerate(meta.values()):
            for name in names:
                picture(root / f"food-101/images/{name}.jpg", label, split)


def gtsrb(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for label in range(43):
        picture(root / f"gtsrb/GTSRB/Training/{label:05d}/1.ppm", label, TRAIN)
        picture(root / f"gtsrb/GTSRB/Training/{label:05d}/2.ppm", label, TRAIN)
        picture(root / f"gtsrb/GTSRB/Final_Test/Images/{label:05d}.ppm", label, TEST)
    write(root / "gtsrb/GT-final_test.csv", ["Filename;ClassId", *(f"{label:05d}.ppm;{label}" for label in range(43))])


def imagenette(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for label, wnid in enumerate(sorted(datasets.Imagenette._WNID_TO_CLASS)):
        for split, part in enumerate(("train", "val")):
            picture(root / "imagenette2" / part / wnid / "1.JPEG", label, split)


def oxford_iiit_pet(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "oxford-iiit-pet"
    for part, split, each in (("trainval", TRAIN, 2), ("test", TEST, 1)):
        names = [(f"breed_{label}_{split}{number}", label) for label in range(37) for number in range(each)]
        write(folder / f"annotations/{part}.txt", [f"{name} {label + 1} 1 1" for name, label in names])
        for name, label in names:
            picture(folder / f"images/{name}.jpg", label, split)


def pcam(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    h5py = pytest.importorskip("h5py", reason="PatchCamelyon's files are HDF5")
    (root / "pcam").mkdir()
    for split, part in enumerate(("train", "valid", "test")):
        pixels = np.zeros((2, 96, 96, 3), dtype=np.uint8)
        pixels[:, :, :, 1], pixels[:, :, :, 2] = np.array([0, 1])[:, None, None], split
        for letter, content in (("x", pixels), ("y", np.array([0, 1], dtype=np.uint8).reshape(2, 1, 1, 1))):
            with h5py.File(root / "pcam" / f"camelyonpatch_level_2_split_{part}_{letter}.h5", "w") as file:
                file[letter] = content


def places365(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "places365"
    names = [f"/s/scene{label:03d}" for label in range(365)]
    categories = write(folder / "categories_places365.txt", [f"{name} {label}" for label, name in enumerate(names)])
    train = write(folder / "places365_train_standard.txt", [f"{name}/1.jpg {label}" for label, name in enumerate(names)])
    val = write(folder / "places365_val.txt", [f"val_{label}.jpg {label}" for label in range(365)])
    for label, name in enumerate(names):
        picture(folder / f"data_256_standard{name}/1.jpg", label, TRAIN)
        picture(folder / f"val_256/val_{label}.jpg", label, VAL)
    monkeypatch.setattr(datasets.Places365, "_CATEGORIES_META", (categories.name, md5(categories)))
    known = {"train-standard": (train.name, md5(train)), "val": (val.name, md5(val))}
    monkeypatch.setattr(datasets.Places365, "_FILE_LIST_META", known)


def rendered_sst2(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split, part in enumerate(("train", "valid", "test")):
        for label, name in enumerate(("negative", "positive")):
            picture(root / "rendered-sst2" / part / name / "1.png", label, split)


def stanford_cars(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    savemat(folder / "devkit/cars_meta.mat", {"class_names": np.array([[f"Car {label}" for label in range(196)]], dtype=object)})
    for part, split, listed in (("train", TRAIN, "devkit/cars_train_annos.mat"), ("test", TEST, "cars_test_annos_withlabels.mat")):
        each = [(f"{label:05d}_{number}.jpg", label) for label in range(196) for number in range(2 if split == TRAIN else 1)]
        rows = np.array([(name, label + 1) for name, label in each], dtype=[("fname", object), ("class", object)])
        savemat(folder / listed, {"annotations": rows})
        for name, label in each:
            picture(folder / f"cars_{part}" / name, label, split)


def sun397(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(root / "SUN397/ClassName.txt", [f"/s/place{label:03d}/outdoor" for label in range(397)])
    for label in range(397):
        for number in range(2):
            picture(root / f"SUN397/s/place{label:03d}/outdoor/sun_{number}.jpg", label, TRAIN)


BUILDERS: dict[str, Callable[[Path, pytest.MonkeyPatch], None]] = {
    "kmnist": mnist_like("KMNIST"),
    "emnist": emnist,
    "qmnist": qmnist,
    "usps": usps,
    "svhn": svhn,
    "stl10": stl10,
    "caltech101": caltech101,
    "caltech256": caltech256,
    "country211": country211,
    "dtd": dtd,
    "eurosat": eurosat,
    "fgvc-aircraft": fgvc_aircraft,
    "flowers102": flowers102,
    "food101": food101,
    "gtsrb": gtsrb,
    "imagenette": imagenette,
    "oxford-iiit-pet": oxford_iiit_pet,
    "pcam": pcam,
    "places365": places365,
    "rendered-sst2": rendered_sst2,
    "stanford-cars": stanford_cars,
    "sun397": sun397,
}
