"""A network by its name, whoever designed it."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from powergrad.models.catalogue import NORMED, check_name, skeleton
from powergrad.models.initial import drawn_by_name, initialise, seeded
from powergrad.models.libraries import TIMM, refuse_wrong_size, timm_model, torchvision_model
from powergrad.models.norms import NORMS, Norm
from powergrad.models.weights import load_torchvision, pretrained_timm, refuse_unpublished


def build_model(
    name: str,
    *,
    num_classes: int,
    image_size: int,
    norm: Norm | None,
    generator_seed: int,
    pretrained: bool = False,
    weights_dir: Path | None = None,
) -> nn.Module:
    """A network on the CPU in training mode, (N, 3, S, S) -> (N, num_classes).

    image_size: S in pixels; up to 64 the stem of a ResNet is a 3x3 convolution of stride 1 without pooling, beyond it ImageNet's.
    norm: None is the network's own, batch for the ResNets; `group` has 32 groups (or the most of two channels and more that divide the
    channels); `none` has none of the layers and biases in the convolutions.  Only the ResNets have a choice.
    generator_seed: decides every weight, with the tensor's name and in the distribution of the network's library: tensors of equal name and
    shape are equal in any two networks that draw them alike. torch's global generators are neither read nor moved.
    pretrained: the library's published weights, with a new classifier unless it has as many classes; the layers are the same either way.
    weights_dir: where published weights are kept, and put when they are fetched; None is each library's own folder.
    Without normalisation the logits of an untrained net grow with depth: 0.3 to 3 up to 50 layers, 1000 at 101 (measured at 16 px); those of
    the CIFAR networks faster: 3 at 20 layers, 15 at 32, 3000 at 56, 3e7 at 110 (at 32 px).
    Raises ValueError for what the network cannot do, with what it can; PretrainedMissing.
    """
    check_name(name)
    _check(name, num_classes, image_size, norm)
    if pretrained:
        refuse_unpublished(name, norm=norm, image_size=image_size)
    if name in NORMED:
        model = _own(name, num_classes=num_classes, image_size=image_size, norm=norm or "batch", generator_seed=generator_seed)
        if pretrained:
            with seeded(generator_seed):
                load_torchvision(model, name, image_size=image_size, weights_dir=weights_dir)
        return model

    def make(size: int) -> nn.Module:
        if name.startswith(TIMM):
            return timm_model(name.removeprefix(TIMM), num_classes=num_classes, image_size=size)
        return torchvision_model(name, num_classes=num_classes, image_size=size)

    def finished() -> nn.Module:
        if pretrained and name.startswith(TIMM):
            bare = name.removeprefix(TIMM)
            return pretrained_timm(bare, num_classes=num_classes, image_size=image_size, weights_dir=weights_dir)
        return make(image_size)

    refuse_wrong_size(name, make, num_classes=num_classes, image_size=image_size)
    model = drawn_by_name(finished, layout=lambda: make(image_size), seed=generator_seed)
    if pretrained and not name.startswith(TIMM):
        with seeded(generator_seed):
            load_torchvision(model, name, image_size=image_size, weights_dir=weights_dir)
    return model


def _own(name: str, *, num_classes: int, image_size: int, norm: Norm, generator_seed: int) -> nn.Module:
    model = skeleton(name, num_classes=num_classes, image_size=image_size, norm=norm).to_empty(device="cpu")
    initialise(model, seed=generator_seed)
    return model


def _check(name: str, num_classes: int, image_size: int, norm: str | None) -> None:
    if norm is not None and norm not in NORMS:
        raise ValueError(f"norm={norm!r}: must be one of {', '.join(NORMS)}")
    if norm is not None and name not in NORMED:
        raise ValueError(f"norm={norm!r} with model name={name!r}: must be null; it can be chosen for {', '.join(NORMED)} only")
    for label, value in (("num_classes", num_classes), ("image_size", image_size)):
        if value < 1:
            raise ValueError(f"{label}={value}: must be at least 1")
