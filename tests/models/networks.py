"""Networks and images for the tests of this folder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from powergrad.models import Norm, build_model


def make_model(
    name: str = "resnet18", *, num_classes: int = 10, image_size: int = 16, norm: Norm | None = None, generator_seed: int = 0
) -> nn.Module:
    return build_model(name, num_classes=num_classes, image_size=image_size, norm=norm, generator_seed=generator_seed)


def noise(images: int, *, size: int = 16) -> Tensor:
    """Always the same images."""
    return torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(0))


def state(model: nn.Module) -> dict[str, Tensor]:
    return model.state_dict()


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(value, state(other)[name]) for name, value in state(one).items())
