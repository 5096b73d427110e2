"""An arm is called by what tells it from the others."""

from __future__ import annotations

from typing import Any

import pytest

from powergrad.experiments.findings import ArmEvidence, Settings
from powergrad.experiments.labels import labels

SPEC: dict[str, Any] = {
    "loss": {"alpha": 1.0, "label_smoothing": 0.0, "class_weights": None},
    "optimizer": {"name": "sgd", "lr": 0.1, "nesterov": True},
    "model": {"name": "resnet18", "norm": None},
    "schedule": {"name": "cosine"},
    "clip": None,
    "ema": None,
}


def named(*settings: Settings) -> list[str]:
    return labels([ArmEvidence(index=i, settings=one, tuned={"optimizer.lr": 0.01 * i}) for i, one in enumerate(settings)], SPEC)


AGC, NORM = {"mode": "agc", "value": 0.01}, {"mode": "norm", "value": 1.0}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([{"loss.alpha": 1.0}, {"loss.alpha": 0.5}], ["α = 1", "α = 0.5"]),
        # what an arm leaves out is the base spec's
        ([{}, {"loss.alpha": 0.25}], ["α = 1", "α = 0.25"]),
        # what all share is not said; neither is what is off, where anything else is said
        ([{"loss.alpha": 0.5, "epochs": 9}, {"loss.alpha": 0.5, "clip": AGC, "epochs": 9}], ["no clip", "clip agc"]),
        ([{"loss.alpha": 1.0}, {"loss.alpha": 0.5, "clip": AGC}], ["α = 1", "α = 0.5, clip agc"]),
        ([{"clip": AGC}, {"clip": NORM}, {"clip": AGC | {"value": 0.1}}], ["clip agc 0.01", "clip norm", "clip agc 0.1"]),
        ([{"optimizer.nesterov": True}, {"optimizer.nesterov": False}], ["nesterov on", "nesterov off"]),
        # null is the network's own here, which is not none
        ([{"model.norm": None}, {"model.norm": "none"}], ["norm by default", "norm none"]),
        ([{"model.name": "resnet8"}, {"model.name": "resnet20"}], ["model resnet8", "model resnet20"]),
        ([{"optimizer.lr": 0.1}, {"optimizer.lr": 1e-05}], ["learning rate = 0.1", "learning rate = 1e-05"]),
        (
            [{"loss.alpha": 1.0}, {"loss.alpha": {"start": 1.0, "end": 0.25, "epochs": 5, "shape": "cosine"}}],
            ["α = 1", "α = 1 → 0.25 over 5 epochs, cosine"],
        ),
        ([{"ema": {"decay": 0.99}}, {"ema": {"decay": 0.999}}, {}], ["ema decay 0.99", "ema decay 0.999", "no ema"]),
        ([{"ema": {"decay": 0.99}}, {}], ["ema on", "no ema"]),
        # inside a section that another arm sets whole
        ([{"clip": AGC}, {"clip": AGC, "clip.value": 0.02}], ["clip value = 0.01", "clip value = 0.02"]),
        ([{"loss.alpha": 0.5}], ["α = 0.5"]),
        ([{}], ["the spec as it is"]),
        ([{"loss.alpha": 0.5}, {"loss.alpha": 0.5}], ["α = 0.5 (arm 0)", "α = 0.5 (arm 1)"]),
    ],
)
def test_a_label_says_what_differs(settings: list[Settings], expected: list[str]) -> None:
    assert named(*settings) == expected
