"""torchvision's ResNets with a choice of normalisation, a stem for small images, and weights that are a function of the seed alone."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable
from typing import Literal, TypedDict, get_args

import torch
import torchvision  # type: ignore[import-untyped]
from torch import nn

Norm = Literal["batch", "group", "none"]

NORMS: tuple[Norm, ...] = get_args(Norm)
FAMILIES = {
    "resnet18": "resnet",
    "resnet34": "resnet",
    "resnet50": "resnet",
    "resnet101": "resnet",
    "resnet152": "resnet",
    "resnext50_32x4d": "resnext",
    "resnext101_32x8d": "resnext",
    "wide_resnet50_2": "wide_resnet",
    "wide_resnet101_2": "wide_resnet",
}
SMALL_IMAGE = 64  # px; ImageNet's stem would leave a 64 px image 2 x 2 at the end, and a 32 px one a single pixel
GROUPS = 32  # Wu and He 2018, arXiv 1803.08494, section 4.1
IMAGENET_CLASSES = 1000
IMAGENET_SIZE = 224  # px


class ModelDescription(TypedDict):
    """A line of the catalogue; parameters are counted for 1000 classes at 224 px with batch normalisation."""

    name: str
    family: str
    parameters: int
    norms: list[str]


def model_names() -> list[str]:
    """The names `build_model` knows."""
    return list(FAMILIES)


def describe_models() -> list[ModelDescription]:
    """The catalogue, computed without making a weight."""
    return [
        {"name": name, "family": family, "parameters": _imagenet_parameters(name), "norms": list(NORMS)}
        for name, family in FAMILIES.items()
    ]


def build_model(name: str, *, num_classes: int, image_size: int, norm: Norm, generator_seed: int) -> nn.Module:
    """A network on the CPU in training mode, (N, 3, H, W) -> (N, num_classes), its classifier named `fc`.

    image_size: side in pixels; up to 64 the stem is a 3x3 convolution of stride 1 without pooling, beyond it ImageNet's.
    norm: `group` has 32 groups (or the most that divide the channels); `none` has none of the layers and biases in the convolutions.
    generator_seed: decides every weight, in torchvision's distributions; torch's global generators are neither read nor moved.
    Without normalisation the logits of an untrained net grow with depth: 0.3 to 3 up to 50 layers, 1000 at 101 (measured at 16 px).
    Raises ValueError for an unknown name or norm, or a size below 1.
    """
    _check(name, num_classes, image_size, norm)
    model = _skeleton(name, num_classes=num_classes, image_size=image_size, norm=norm).to_empty(device="cpu")
    _initialise(model, torch.Generator().manual_seed(generator_seed))
    return model


def _check(name: str, num_classes: int, image_size: int, norm: str) -> None:
    if name not in FAMILIES:
        nearest = difflib.get_close_matches(name, FAMILIES, n=1, cutoff=0.0)[0]
        raise ValueError(f"model name={name!r}: is not known; the nearest is {nearest!r}, all are {', '.join(FAMILIES)}")
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r}: must be one of {', '.join(NORMS)}")
    for label, value in (("num_classes", num_classes), ("image_size", image_size)):
        if value < 1:
            raise ValueError(f"{label}={value}: must be at least 1")


def _skeleton(name: str, *, num_classes: int, image_size: int, norm: Norm) -> nn.Module:
    """The layers without memory (meta device): nothing is allocated, and nothing is drawn only to be overwritten."""
    with torch.device("meta"):
        model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes, norm_layer=_norm_layer(norm))
        if image_size <= SMALL_IMAGE:
            model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
            model.maxpool = nn.Identity()
        if norm == "none":
            for layer in model.modules():
                if isinstance(layer, nn.Conv2d):
                    layer.bias = nn.Parameter(torch.empty(layer.out_channels))
    return model


def _norm_layer(norm: Norm) -> Callable[[int], nn.Module]:
    layers: dict[Norm, Callable[[int], nn.Module]] = {"batch": nn.BatchNorm2d, "group": _group_norm, "none": lambda _: nn.Identity()}
    return layers[norm]


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(next(groups for groups in range(GROUPS, 0, -1) if channels % groups == 0), channels)


def _initialise(model: nn.Module, generator: torch.Generator) -> None:
    """Fill every parameter and buffer, in the order of the layers: He et al. 2015 (arXiv 1502.01852) for convolutions, as torchvision."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu", generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d | nn.GroupNorm):
            layer.reset_parameters()  # ones, zeros and a zeroed running mean: no draw
        elif isinstance(layer, nn.Linear):
            bound = layer.in_features**-0.5  # nn.Linear's own initialisation
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            nn.init.uniform_(layer.bias, -bound, bound, generator=generator)


@functools.cache
def _imagenet_parameters(name: str) -> int:
    model = _skeleton(name, num_classes=IMAGENET_CLASSES, image_size=IMAGENET_SIZE, norm="batch")
    return sum(parameter.numel() for parameter in model.parameters())
