"""The named data sets, from scikit-learn and from files in torchvision's formats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from powergrad.data import Data, DataMissing, DataUnreadable, describe_datasets, open_data
from powergrad.data.images import ResidentImages, Split
from powergrad.spec import DigitsData, NamedData, TorchvisionData
from tests.data import folders

CPU = torch.device("cpu")


def opened(spec: DigitsData | TorchvisionData | NamedData, data_root: Path, *, seed: int = 0) -> Data:
    return open_data(spec, data_root=data_root, seed=seed, device=CPU)


def pixels(split: Split) -> torch.Tensor:
    assert isinstance(split.images, ResidentImages)
    return split.images.pixels


def test_digits_at_their_own_size_are_scikit_learns(tmp_path: Path) -> None:
    data = opened(DigitsData(dataset="digits", image_size=8), tmp_path)
    ours = torch.cat([pixels(data.train), pixels(data.val)]).flatten(1)
    theirs = torch.from_numpy(np.rint(load_digits().data * 255 / 16).astype(np.uint8))
    assert sorted(map(tuple, ours.tolist())) == sorted(map(tuple, theirs.tolist()))


def test_digits_are_16_pixels_unless_told() -> None:
    data = opened(DigitsData(dataset="digits"), Path("/nowhere"))
    assert pixels(data.train).shape == (1438, 1, 16, 16)
    assert len(data.val) == 1797 - 1438
    assert data.test is None


def test_every_class_is_held_out_in_proportion(tmp_path: Path) -> None:
    data = opened(DigitsData(dataset="digits", val_fraction=0.25), tmp_path)
    held_out = torch.bincount(data.val.labels, minlength=10)
    everything = held_out + torch.bincount(data.train.labels, minlength=10)
    assert torch.equal(held_out, (everything * 0.25).round().long())


def test_seeds_share_the_validation_images(tmp_path: Path) -> None:
    one, other = (opened(DigitsData(dataset="digits"), tmp_path, seed=seed) for seed in (1, 2))
    assert torch.equal(pixels(one.val), pixels(other.val))


def test_an_epoch_resumed_in_the_middle_gives_the_same_batches(tmp_path: Path) -> None:
    data = opened(DigitsData(dataset="digits"), tmp_path)
    whole = list(data.train_batches(epoch=3, batch_size=100))
    rest = list(data.train_batches(epoch=3, batch_size=100, first=9))
    assert len(whole) == 14
    for batch, again in zip(whole[9:], rest, strict=True):
        assert torch.equal(batch.parts[0][0], again.parts[0][0])
        assert torch.equal(batch.labels, again.labels)


def test_cifar10_keeps_its_pixels_and_its_test_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, labels = folders.cifar10(tmp_path, monkeypatch)
    data = opened(TorchvisionData(dataset="cifar10"), tmp_path)
    assert (len(data.train), len(data.val), data.test and len(data.test)) == (80, 20, 20)
    assert data.class_names[3] == "class 3"
    ours = torch.cat([pixels(data.train), pixels(data.val)]).permute(0, 2, 3, 1).numpy()
    classes = torch.cat([data.train.labels, data.val.labels]).tolist()
    found = {image.tobytes(): label for image, label in zip(ours, classes, strict=True)}
    assert found == {image.tobytes(): label for image, label in zip(given, labels, strict=True)}


def test_cifar100_has_a_hundred_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders.cifar100(tmp_path, monkeypatch)
    data = opened(TorchvisionData(dataset="cifar100", image_size=16), tmp_path)
    assert len(data.class_names) == 100
    assert pixels(data.train).shape == (100, 3, 16, 16)


@pytest.mark.parametrize(("dataset", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_idx_files_are_read(dataset: str, folder: str, tmp_path: Path) -> None:
    folders.mnist(tmp_path, folder=folder)
    data = opened(TorchvisionData(dataset=dataset), tmp_path)
    assert pixels(data.train).shape == (30, 1, 28, 28)
    assert data.test is not None
    assert len(data.test) == 40


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "mnist", "fashion-mnist"])
def test_an_absent_set_is_missing_with_its_place_and_the_way_out(dataset: str, tmp_path: Path) -> None:
    with pytest.raises(DataMissing, match=rf"{tmp_path}/.*data\.download"):
        opened(TorchvisionData(dataset=dataset), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_changed_cifar_pickle_is_refused_unopened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders.cifar10(tmp_path, monkeypatch)
    flag = tmp_path / "executed"
    (tmp_path / "cifar-10-batches-py" / "data_batch_2").write_bytes(f"cos\nsystem\n(S'touch {flag}'\ntR.".encode())
    with pytest.raises(DataUnreadable, match="cifar-10-batches-py"):
        opened(TorchvisionData(dataset="cifar10"), tmp_path)
    assert not flag.exists()


def test_a_truncated_idx_file_is_unreadable(tmp_path: Path) -> None:
    folders.mnist(tmp_path)
    images = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-100])
    with pytest.raises(DataUnreadable, match="MNIST/raw"):
        opened(TorchvisionData(dataset="mnist"), tmp_path)


def test_an_unknown_name_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DataMissing, match=r"'flowers'.*digits, glyphs, cifar10"):
        opened(NamedData(dataset="flowers"), tmp_path)


def test_the_catalogue_tells_what_opening_gives() -> None:
    digits = next(entry for entry in describe_datasets() if entry["name"] == "digits")
    data = opened(DigitsData(dataset="digits"), Path("/nowhere"))
    assert (digits["classes"], digits["image_size"], digits["needs_files"]) == (len(data.class_names), data.image_size, False)
