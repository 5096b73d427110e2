"""The thin ResNets against the figures of He et al. 2016 and a count by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from powergrad.models import NORMS, Norm
from powergrad.models.cifar import DEPTHS, ThinBlock
from tests.models.networks import make_model, noise

torch.set_num_threads(1)

PUBLISHED_MILLIONS = {"resnet20": 0.27, "resnet32": 0.46, "resnet44": 0.66, "resnet56": 0.85, "resnet110": 1.7}  # table 6


def by_hand(layers: int) -> int:
    """Nine weights a pair of channels, two a channel for batch normalisation, a classifier for ten: option A shortcuts have none."""
    blocks, channels, total = (layers - 2) // 6, 3, 0
    for width in (16, 32, 64):
        convolutions = 2 * blocks + (width == 16)
        for _ in range(convolutions):
            total += 9 * channels * width + 2 * width
            channels = width
    return total + 64 * 10 + 10


@pytest.mark.parametrize("name", DEPTHS)
def test_parameters_are_as_many_as_the_paper_says(name: str) -> None:
    parameters = sum(parameter.numel() for parameter in make_model(name).parameters())
    assert parameters == by_hand(int(name.removeprefix("resnet")))
    if name in PUBLISHED_MILLIONS:  # the two smallest are not the paper's
        assert parameters / 1e6 == pytest.approx(PUBLISHED_MILLIONS[name], abs=0.03 if name == "resnet110" else 0.006)


@pytest.mark.parametrize("name", DEPTHS)
def test_layers_with_weights_are_as_many_as_the_name_says(name: str) -> None:
    layers = [layer for layer in make_model(name).modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert len(layers) == DEPTHS[name] == int(name.removeprefix("resnet"))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [16, 17, 32, 64])
def test_gradients_reach_every_parameter(norm: Norm, size: int) -> None:
    model = make_model("resnet20", norm=norm)
    logits = model(noise(4, size=size))
    assert logits.shape == (4, 10)
    grads = torch.autograd.grad(logits.logsumexp(1).sum(), list(model.parameters()))
    assert all(grad.isfinite().all() and grad.count_nonzero() > 0 for grad in grads)


def test_a_shortcut_takes_every_second_pixel_and_zeros_for_new_channels() -> None:
    block = ThinBlock(2, 4, "none")
    for convolution in (block.conv1, block.conv2):
        nn.init.zeros_(convolution.weight)
    images = torch.arange(2 * 5 * 5, dtype=torch.float32).reshape(1, 2, 5, 5)
    expected = torch.zeros(1, 4, 3, 3)
    expected[0, :2] = images[0][:, [0, 2, 4]][:, :, [0, 2, 4]]
    assert torch.equal(block(images), expected)


@pytest.mark.parametrize("size", [16, 32, 64])
def test_the_last_stage_sees_a_quarter_of_the_side(size: int) -> None:
    model = make_model("resnet20")
    sizes: list[tuple[int, ...]] = []
    model.get_submodule("layer3").register_forward_hook(lambda _module, _args, output: sizes.append(tuple(output.shape)))
    model(noise(2, size=size))
    assert sizes == [(2, 64, size // 4, size // 4)]


def test_groups_have_two_channels_at_least() -> None:
    layers = [layer for layer in make_model("resnet20", norm="group").modules() if isinstance(layer, nn.GroupNorm)]
    assert {(layer.num_channels, layer.num_groups) for layer in layers} == {(16, 8), (32, 16), (64, 32)}


def test_norm_none_has_biases_and_no_normalisation() -> None:
    layers = list(make_model("resnet32", norm="none").modules())
    assert not any(isinstance(layer, nn.BatchNorm2d | nn.GroupNorm) for layer in layers)
    assert all(layer.bias is not None for layer in layers if isinstance(layer, nn.Conv2d))
