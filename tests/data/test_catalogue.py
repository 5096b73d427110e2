"""The list of data sets: what a client reads before it names one."""

from __future__ import annotations

import json

import pytest

from powergrad.data import DATASETS, describe_datasets
from powergrad.spec import CLASS_FOLDER, DIGITS, GLYPHS, IMAGENET, TORCHVISION_DATASETS, WEBDATASET


def test_every_data_set_of_the_spec_is_listed_once() -> None:
    names = [entry["name"] for entry in describe_datasets()]
    assert sorted(names) == sorted([DIGITS, GLYPHS, CLASS_FOLDER, IMAGENET, WEBDATASET, *TORCHVISION_DATASETS])


def test_the_list_is_plain_json() -> None:
    assert json.loads(json.dumps(describe_datasets())) == describe_datasets()


# as their authors give them
@pytest.mark.parametrize(
    ("name", "classes"),
    [("emnist", 47), ("caltech256", 257), ("country211", 211), ("dtd", 47), ("fgvc-aircraft", 100), ("flowers102", 102), ("food101", 101),
     ("gtsrb", 43), ("oxford-iiit-pet", 37), ("places365", 365), ("stanford-cars", 196), ("sun397", 397), ("cifar100", 100)],
)  # fmt: skip
def test_classes_are_counted(name: str, classes: int) -> None:
    assert DATASETS[name].classes == classes


@pytest.mark.parametrize("name", DATASETS)
def test_mean_and_deviation_are_of_one_channel_or_three_in_0_to_1(name: str) -> None:
    info = DATASETS[name]
    assert len(info.mean) == len(info.std) in {1, 3}
    assert all(0 < value < 1 for value in (*info.mean, *info.std))


@pytest.mark.parametrize("name", ["mnist", "svhn", "gtsrb", "rendered-sst2", "glyphs", "digits"])
def test_what_a_mirror_makes_another_class_or_none_is_not_mirrored(name: str) -> None:
    assert not DATASETS[name].flip
