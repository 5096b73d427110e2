"""Model cards: what is known is in them, what is not is left out, and nothing in a name can become markup."""

from __future__ import annotations

import base64
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from powergrad import card
from powergrad.card import Facts, model_card
from powergrad.export import Preprocessing
from powergrad.markdown import plain
from powergrad.spec import TrainSpec

FACTS = Facts(
    weights="best checkpoint, step-00000800",
    step=800,
    epoch=8,
    parameters=11_173_962,
    metrics={"val_loss": 0.3141, "val_top1": 0.9012, "test_top1": 0.8901},
    train_images=45_000,
    val_images=5_000,
    test_images=10_000,
    attempts=3,
    determinism="bitwise: same bits",
    precision="bf16",
    cpu_threads=2,
    ece=0.0421,
    environment={"torch": "2.15.0", "device": "NVIDIA H200"},
)


def spec(**parts: Any) -> TrainSpec:
    return TrainSpec.model_validate({"data": {"dataset": "cifar10"}} | parts)


def made(train_spec: TrainSpec | None = None, *, classes: tuple[str, ...] = ("ant", "bee"), grey: bool = False, **facts: Any) -> str:
    rules = Preprocessing(32, (0.5,) * (1 if grey else 3), (0.25,) * (1 if grey else 3), 1 if grey else 3)
    return model_card(spec=train_spec or spec(), facts=dataclasses.replace(FACTS, **facts), class_names=classes, preprocessing=rules)


def section(text: str, title: str) -> str:
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_a_card_says_what_the_network_is_and_where_it_comes_from() -> None:
    text = made(data_sha256="ab" * 32)
    assert text.startswith("# resnet18 on cifar10\n")
    assert "11,173,962 parameters, 2 classes" in text
    assert "best checkpoint, step-00000800, after 8 epochs (800 updates)" in text
    data = section(text, "Data")
    assert "45,000 training, 5,000 validation, 10,000 test" in data
    assert "2 classes: ant, bee" in data
    assert "ab" * 32 in data
    provenance = section(text, "Provenance")
    for line in ("- Seed: 0", "- Determinism: bitwise: same bits", "- Attempts: 3", "- CPU threads: 2", "- torch: 2.15.0"):
        assert line in provenance.splitlines()


def test_the_recipe_in_the_card_is_the_spec() -> None:
    wanted = spec(loss={"alpha": 0.3}, clip={"mode": "agc", "value": 0.01}, ema={}, optimizer={"name": "adamw"})
    block = section(made(wanted), "Training").partition("```yaml\n")[2].partition("```")[0]
    assert TrainSpec.model_validate(yaml.safe_load(block)) == wanted


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"loss": {"alpha": 0.3}}, "PowerGrad Transform: α = 0.3 in the backward pass"),
        ({}, "PowerGrad Transform: off (α = 1, ordinary cross-entropy)"),
        ({"loss": {"alpha": {"start": 1.0, "end": 0.25, "epochs": 5}}}, "α from 1 to 0.25 (linear, over 5 epochs)"),
        ({"loss": {"label_smoothing": 0.1, "class_weights": "balanced"}}, "label smoothing 0.1, classes weighted by inverse frequency"),
        ({"loss": {"class_weights": [1.0] * 10}}, "- Cross-entropy, classes weighted\n"),
        ({"optimizer": {"lr": 0.4}}, "SGD, Nesterov momentum 0.9, peak learning rate 0.4, weight decay 0.0005"),
        ({"optimizer": {"name": "adamw", "decay_norm_and_bias": False}}, "weight decay 0.01, not on normalisation layers and biases"),
        ({"optimizer": {"name": "lion"}}, "Lion, betas 0.9 and 0.99"),
        ({"optimizer": {"name": "muon"}}, "Muon, momentum 0.95"),
        ({"epochs": 100}, "Learning rate: cosine from the peak to 0, 5 epochs of warm-up"),
        ({"epochs": 100, "schedule": {"name": "step"}}, "times 0.1 at epochs 30, 60, 90"),
        ({"schedule": {"name": "constant", "warmup_epochs": 0}}, "Learning rate: constant\n"),
        ({"schedule": {"name": "onecycle", "cooldown_epochs": 2}}, "one cycle, its peak after 30% of the steps, 2 epochs of cool-down"),
        ({"clip": {"mode": "norm", "value": 1.0}}, "Gradients clipped (global norm 1)"),
        ({"accumulate": 4}, "batches of 128 images in 4 parts"),
        ({"ema": {"decay": 0.99}}, "Moving average of the weights, decay 0.99"),
        ({"data": {"dataset": "cifar10", "augment": "imagenet"}}, "Augmentation: imagenet"),
        (
            {"data": {"dataset": "cifar10", "augment": {"policy": {"name": "rand"}, "mixup": 0.2}}},
            "crop pad, flips as the data set allows, RandAugment (2 × 9), mixup 0.2",
        ),
        ({"data": {"dataset": "class_folder", "path": "pets/cats"}}, "- Data set: class\\_folder (pets/cats)"),
        ({"model": {"name": "resnet18", "norm": "none"}}, "resnet18 (normalisation: none)"),
        ({"model": {"pretrained": True}}, "Started from the library's pretrained weights"),
    ],
)
def test_every_part_of_the_recipe_has_its_words(parts: dict[str, Any], words: str) -> None:
    assert words in made(spec(**parts))


def test_the_validation_score_is_called_optimistic_and_the_test_score_fair() -> None:
    results = section(made(), "Results")
    assert "| metric | validation | test |" in results
    assert "| top1 (share of images whose likeliest class is right) | 0.9012 | 0.8901 |" in results
    assert "| loss (cross-entropy, nats) | 0.3141 |  |" in results
    assert "optimistic" in results
    assert "scored once" in results


def test_a_run_without_a_test_split_says_so() -> None:
    results = section(made(metrics={"val_top1": 0.9, "ema_val_top1": None}), "Results")
    assert "| metric | validation | validation, averaged weights |" in results
    assert "| 0.9 | not finite |" in results
    assert "There is no test split" in results


def test_weights_that_were_not_evaluated_have_no_table() -> None:
    results = section(made(metrics={}), "Results")
    assert "have not been evaluated" in results
    assert "|" not in results


def test_what_is_not_known_is_left_out() -> None:
    text = made(train_images=None, val_images=None, test_images=None, attempts=None, ece=None, cpu_threads=None, determinism=None)
    for word in ("None", "Images:", "Attempts", "Calibration", "CPU threads", "sha256"):
        assert word not in text
    assert "- Determinism: same spec, same machine type and software: same bits" in text


def test_calibration_names_its_images() -> None:
    assert "on the validation images: 0.0421 (15 bins)" in section(made(), "Calibration")


def test_the_input_is_described() -> None:
    assert "(N, 3, 32, 32)" in section(made(), "Use")
    assert "turned grey" not in made()
    assert "Images are turned grey first" in section(made(grey=True), "Use")


def test_limits_and_licence_are_left_to_the_owner() -> None:
    assert "the owner" in section(made(), "Licence")
    assert "have not been examined" in section(made(), "Limits")


@pytest.mark.parametrize(("name", "media_type"), [("curves.svg", "image/svg+xml"), ("curves.png", "image/png")])
def test_a_picture_is_in_the_card_itself(tmp_path: Path, name: str, media_type: str) -> None:
    (tmp_path / name).write_bytes(b"the picture's bytes")
    data = base64.b64encode(b"the picture's bytes").decode()
    assert f"![Curves of the run](data:{media_type};base64,{data})" in made(curves=tmp_path / name)


def test_a_picture_that_is_too_large_is_named_instead(tmp_path: Path) -> None:
    (tmp_path / "curves.png").write_bytes(bytes(card.PICTURE_BYTES + 1))
    text = made(curves=tmp_path / "curves.png")
    assert "Curves: curves.png" in text
    assert "base64" not in text


def test_of_many_classes_the_first_are_named() -> None:
    text = made(classes=tuple(f"c{i}" for i in range(card.NAMED_CLASSES + 5)))
    assert "c99 and 5 more (labels.json)" in text
    assert "c100" not in text


def test_a_class_name_is_no_markup() -> None:
    text = made(classes=("<script>alert(1)</script>", "a|b\n## Results", "![x](http://elsewhere)", "\udc80"))
    assert "<script>" not in text
    assert "!\\[x\\](http://elsewhere)" in text
    assert text.count("\n## Results\n") == 1
    text.encode()


@given(st.text())
def test_plain_text_stays_on_its_line_and_opens_nothing(text: str) -> None:
    escaped = plain(text)
    assert len(escaped.splitlines()) <= 1
    assert "<" not in escaped
    escaped.encode()
    unescaped = escaped.replace("\\\\", "")
    assert not any(unescaped[i] in "`*_[]|~#" and unescaped[i - 1 : i] != "\\" for i in range(len(unescaped)))
