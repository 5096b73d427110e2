"""What can be trained, listed and looked up."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
import torchvision  # type: ignore[import-untyped]

import powergrad.models
from powergrad.models import NORMED, NORMS, describe_models, model_names
from powergrad.models.catalogue import check_name
from powergrad.models.libraries import timm_library, timm_model, timm_names, timm_tagged_names
from powergrad.spec import NORMED_MODELS


def test_the_catalogue_lists_every_model_once() -> None:
    assert [line["name"] for line in describe_models()] == model_names()
    assert len(set(model_names())) == len(model_names())


def test_it_has_all_of_both_libraries() -> None:
    names = set(model_names())
    assert names >= set(torchvision.models.list_models(module=torchvision.models))
    left_out = {name for name in timm_library().list_models() if f"timm/{name}" not in names}
    assert left_out == {name for name in timm_library().list_models() if name.endswith("_enc")}


def test_an_encoder_that_is_left_out_gives_no_logits() -> None:
    with torch.device("meta"):
        features = timm_model("qwen3_vit_88m_enc", num_classes=10, image_size=96)(torch.zeros(1, 3, 96, 96))
    assert features.shape != (1, 10)


def test_the_networks_with_a_choice_of_norm_are_those_the_spec_names() -> None:
    assert NORMED == NORMED_MODELS
    assert {line["name"] for line in describe_models() if line["norms"]} == set(NORMED_MODELS)
    assert all(line["norms"] == list(NORMS) for line in describe_models() if line["norms"])


def test_every_name_is_known_and_so_is_every_tag() -> None:
    for name in (*model_names(), *(tagged for bare in timm_names() for tagged in timm_tagged_names(bare))):
        check_name(name)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("resnet-18", "resnet18"),
        ("ResNet50", "resnet50"),
        ("wide_resnet50", "wide_resnet50_2"),
        ("convnext_atto", "timm/convnext_atto"),
        ("timm/convnext_atto.d2", "timm/convnext_atto.d2_in1k"),
        ("timm/vit_tiny_patch16_225", "timm/vit_tiny_patch16_224"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"{typed}.*nearest is '{meant}'"):
        check_name(typed)


def test_lines_say_what_the_libraries_publish() -> None:
    lines = {line["name"]: line for line in describe_models()}
    assert lines["resnet50"] == {
        "name": "resnet50",
        "family": "resnet",
        "parameters": 25_557_032,
        "norms": ["batch", "group", "none"],
        "pretrained": True,
    }
    assert lines["resnet20"]["parameters"] == 269_722
    assert lines["vit_b_16"] == {
        "name": "vit_b_16",
        "family": "vision_transformer",
        "parameters": 86_567_656,
        "norms": [],
        "pretrained": True,
    }
    assert lines["timm/convnext_atto"] == {
        "name": "timm/convnext_atto",
        "family": "convnext",
        "parameters": None,
        "norms": [],
        "pretrained": True,
    }
    assert not lines["seresnet50"]["pretrained"]
    assert not lines["timm/efficientnet_b8"]["pretrained"]


def test_importing_the_package_leaves_timm_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(powergrad, "models", powergrad.models)  # which importing it again would replace
    for name in [name for name in sys.modules if name.split(".")[0] == "timm" or name.startswith("powergrad.models")]:
        monkeypatch.delitem(sys.modules, name)
    importlib.import_module("powergrad.models.network")
    assert "powergrad.models.libraries" in sys.modules
    assert "timm" not in sys.modules
