"""The networks that can be trained, by name."""

from __future__ import annotations

import difflib
import functools
from typing import TypedDict

import torchvision  # type: ignore[import-untyped]
from torch import nn

from powergrad.models import cifar, resnet
from powergrad.models.libraries import (
    IMAGENET_SIZE,
    TIMM,
    timm_library,
    timm_names,
    timm_tagged_names,
    torchvision_family,
    torchvision_names,
)
from powergrad.models.norms import NORMS, Norm

NORMED = (*resnet.PLAIN, *resnet.SQUEEZED, *cifar.DEPTHS)
"""The networks whose normalisation can be chosen."""
IMAGENET_CLASSES = 1000
CIFAR_CLASSES = 10


class ModelDescription(TypedDict):
    """A line of the catalogue.

    parameters: with batch normalisation, for 1000 classes at the size the library trained it at (the CIFAR networks for 10 at 32 px);
    None where only building it would tell.  norms: what `norm` may be, the first being the network's own; empty where it has no choice.
    pretrained: whether its library publishes weights.
    """

    name: str
    family: str
    parameters: int | None
    norms: list[str]
    pretrained: bool


def model_names() -> list[str]:
    """The names `build_model` knows; timm's are also known with the tag of their weights: `timm/resnet50.a1_in1k`. Imports timm."""
    return [*NORMED, *_torchvision_only(), *timm_names()]


def describe_models() -> list[ModelDescription]:
    """The catalogue, computed without making a weight. Imports timm: a second, unless it is imported."""
    return [*map(_describe_own, NORMED), *map(_describe_torchvision, _torchvision_only()), *_describe_timm()]


def check_name(name: str) -> None:
    """Raises ValueError with the nearest name for one that is not known. Imports timm unless the name is known without it."""
    if name in NORMED or name in torchvision_names():
        return
    bare = name.split(".")[0]
    if bare in timm_names() and (name == bare or name in timm_tagged_names(bare)):
        return
    raise ValueError(f"model name={name!r}: is not known; the nearest is {_nearest(name)!r}, describe_models() lists all")


def skeleton(name: str, *, num_classes: int, image_size: int, norm: Norm) -> nn.Module:
    """The layers, without memory, of one of the NORMED networks."""
    if name in cifar.DEPTHS:
        return cifar.skeleton(name, num_classes=num_classes, norm=norm)
    return resnet.skeleton(name, num_classes=num_classes, image_size=image_size, norm=norm)


def _nearest(name: str) -> str:
    if TIMM + name in timm_names():
        return TIMM + name
    bare = name.split(".")[0]
    known = timm_tagged_names(bare) if bare in timm_names() else model_names()
    nearest: list[str] = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return nearest[0]


def _torchvision_only() -> list[str]:
    return [name for name in torchvision_names() if name not in NORMED]


def _describe_own(name: str) -> ModelDescription:
    if name in resnet.PLAIN:
        return _describe_torchvision(name) | {"family": resnet.PLAIN[name], "norms": list(NORMS)}
    family = "cifar_resnet" if name in cifar.DEPTHS else "seresnet"
    return {"name": name, "family": family, "parameters": _parameters(name), "norms": list(NORMS), "pretrained": False}


@functools.cache
def _parameters(name: str) -> int:
    classes = CIFAR_CLASSES if name in cifar.DEPTHS else IMAGENET_CLASSES
    model = skeleton(name, num_classes=classes, image_size=IMAGENET_SIZE, norm="batch")
    return sum(parameter.numel() for parameter in model.parameters())


def _describe_torchvision(name: str) -> ModelDescription:
    weights = torchvision.models.get_model_weights(name)
    parameters = weights.DEFAULT.meta["num_params"] if len(weights) else None
    return {"name": name, "family": torchvision_family(name), "parameters": parameters, "norms": [], "pretrained": len(weights) > 0}


def _describe_timm() -> list[ModelDescription]:
    timm = timm_library()
    families = {name: family for family in timm.list_modules() for name in timm.list_models(module=family)}
    return [
        {
            "name": name,
            "family": families[name.removeprefix(TIMM)],
            "parameters": None,
            "norms": [],
            "pretrained": timm.is_model_pretrained(name.removeprefix(TIMM)),
        }
        for name in timm_names()
    ]
