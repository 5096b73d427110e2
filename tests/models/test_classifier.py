"""The layer that gives the logits, found in every kind of network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from powergrad.models import NORMED, classifier_of, classifiers_of
from powergrad.models.catalogue import skeleton
from powergrad.models.libraries import timm_model, torchvision_model, torchvision_names

torch.set_num_threads(1)

READ_VALUES = "regnet_"  # torchvision's cannot be made without memory; the smallest two stand for them, all are one class
ON_META = [name for name in torchvision_names() if name not in NORMED and not name.startswith(READ_VALUES)]


def outputs(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels  # type: ignore[return-value]


@pytest.mark.parametrize("name", NORMED)
def test_it_is_fc_in_every_resnet(name: str) -> None:
    assert classifiers_of(skeleton(name, num_classes=7, image_size=32, norm="batch")) == ("fc",)


@pytest.mark.parametrize("name", [*ON_META, "regnet_x_400mf", "regnet_y_400mf"])
def test_it_has_as_many_outputs_as_there_are_classes_in_every_torchvision_network(name: str) -> None:
    with torch.device("cpu" if name.startswith(READ_VALUES) else "meta"):
        model = torchvision_model(name, num_classes=7, image_size=224)
    (layer,) = classifiers_of(model)
    assert outputs(model.get_submodule(layer)) == 7


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("resnet10t", ("fc",)),
        ("vit_tiny_patch16_224", ("head",)),
        ("convnext_atto", ("head.fc",)),
        ("efficientnet_lite0", ("classifier",)),
        ("mixer_s32_224", ("head",)),
        ("swin_tiny_patch4_window7_224", ("head.fc",)),
        ("levit_128s", ("head.linear", "head_dist.linear")),
        ("deit_tiny_distilled_patch16_224", ("head", "head_dist")),
    ],
)
def test_it_is_what_timm_says(name: str, layers: tuple[str, ...]) -> None:
    with torch.device("meta"):
        model = timm_model(name, num_classes=7, image_size=224)
    assert classifiers_of(model) == layers
    assert classifier_of(model) == layers[0]
    assert {outputs(model.get_submodule(layer)) for layer in layers} == {7}


def test_a_network_without_one_is_refused() -> None:
    with pytest.raises(ValueError, match="Sequential: has no linear or convolution layer"):
        classifier_of(nn.Sequential(nn.Flatten(), nn.ReLU()))
