"""The normalisation of the residual networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import nn

Norm = Literal["batch", "group", "none"]

NORMS: tuple[Norm, ...] = get_args(Norm)
GROUPS = 32  # Wu and He 2018, arXiv 1803.08494, section 4.1
SMALLEST_GROUP = 2  # channels; a single one would be instance normalisation, which the average over the image undoes


def norm_layer(norm: Norm) -> Callable[[int], nn.Module]:
    """What makes the layer for so many channels: as many as 32 groups of at least two channels, or nothing at all for `none`."""
    layers: dict[Norm, Callable[[int], nn.Module]] = {"batch": nn.BatchNorm2d, "group": _group_norm, "none": lambda _: nn.Identity()}
    return layers[norm]


def _group_norm(channels: int) -> nn.GroupNorm:
    most = max(1, min(GROUPS, channels // SMALLEST_GROUP))
    return nn.GroupNorm(next(groups for groups in range(most, 0, -1) if channels % groups == 0), channels)


def add_biases(model: nn.Module) -> None:
    """Gives every convolution of a network on the meta device a bias: without normalisation layers nothing else shifts its output."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.bias = nn.Parameter(torch.empty(layer.out_channels, device="meta"))
