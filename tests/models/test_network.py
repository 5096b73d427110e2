"""Networks of many families, built, run forwards and backwards, and what is refused."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from powergrad.models import build_model, classifiers_of
from tests.models.networks import equal, make_model, noise, state

torch.set_num_threads(1)

TORCHVISION = {
    "densenet121": 32,
    "efficientnet_b0": 32,
    "googlenet": 32,
    "inception_v3": 75,
    "mnasnet0_5": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "regnet_y_400mf": 32,
    "shufflenet_v2_x0_5": 32,
    "squeezenet1_1": 32,
    "swin_t": 32,
    "vit_b_32": 64,
}
TIMM = {
    "timm/convnext_atto": 32,
    "timm/deit_tiny_distilled_patch16_224": 32,
    "timm/edgenext_xx_small": 64,
    "timm/efficientnet_lite0": 32,
    "timm/ghostnet_050": 32,
    "timm/levit_128s": 64,
    "timm/mixer_s32_224": 64,
    "timm/mobilenetv3_small_050": 32,
    "timm/regnetx_002": 32,
    "timm/resnet10t": 32,
    "timm/seresnet50": 32,
    "timm/test_vit.r160_in1k": 48,
    "timm/vit_tiny_patch16_224": 32,
}
SAMPLE = {**TORCHVISION, **TIMM, "seresnet18": 16, "resnet20": 16}
FEW = {name: SAMPLE[name] for name in ("squeezenet1_1", "googlenet", "mobilenet_v3_small", "timm/convnext_atto", "timm/levit_128s")}


@functools.cache
def built(name: str) -> nn.Module:
    """One network for all tests here that leave its weights alone."""
    return make_model(name, image_size=SAMPLE[name])


@pytest.mark.parametrize("name", SAMPLE)
def test_logits_come_out_and_gradients_go_back(name: str) -> None:
    model, size = built(name).train(), SAMPLE[name]
    logits: Tensor = model(noise(3, size=size))
    assert logits.shape == (3, 10)
    assert logits.dtype == torch.float32
    grads = torch.autograd.grad(logits.logsumexp(1).sum(), list(model.parameters()), allow_unused=True)
    arrived = dict(zip((key for key, _ in model.named_parameters()), grads, strict=True))
    assert all(grad.isfinite().all() for grad in grads if grad is not None)
    for layer in classifiers_of(model):
        grad = arrived[f"{layer}.weight"]
        assert grad is not None
        assert grad.count_nonzero() > 0


@pytest.mark.parametrize("name", SAMPLE)
def test_channels_last_computes_the_same(name: str) -> None:
    model, images = built(name).eval(), noise(2, size=SAMPLE[name])
    with torch.no_grad():
        expected = model(images)
        model.to(memory_format=torch.channels_last)
        found = model(images.contiguous(memory_format=torch.channels_last))
    # the same sums in another order, over up to a hundred layers
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("name", FEW)
def test_library_weights_are_a_function_of_the_seed(name: str) -> None:
    again = make_model(name, image_size=FEW[name], generator_seed=5)
    assert equal(again, make_model(name, image_size=FEW[name], generator_seed=5))
    assert not equal(again, make_model(name, image_size=FEW[name], generator_seed=6))


@pytest.mark.parametrize("name", FEW)
def test_the_global_generator_is_neither_read_nor_moved(name: str) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = make_model(name, image_size=FEW[name])
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert equal(first, make_model(name, image_size=FEW[name]))


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_classifiers_are_off(name: str) -> None:
    assert not [key for key in state(built(name)) if "aux" in key.lower()]


def test_no_norm_given_is_batch_for_the_resnets() -> None:
    assert equal(make_model("seresnet18"), make_model("seresnet18", norm="batch"))


@pytest.mark.parametrize("name", ["vit_b_16", "resnext101_64x4d", "timm/resnet18"])
def test_a_norm_is_refused_for_a_network_without_the_choice(name: str) -> None:
    with pytest.raises(ValueError, match=rf"norm='batch' with model name='{name}': must be null; it can be chosen for resnet18, "):
        make_model(name, norm="batch")


@pytest.mark.parametrize(
    ("name", "image_size", "words"),
    [
        ("vit_b_16", 30, "image_size=30: vit_b_16 takes 32 px or 224 px, for instance, not this"),
        ("inception_v3", 32, "image_size=32: inception_v3 takes 299 px, for instance, not this"),
        ("maxvit_t", 100, "image_size=100: maxvit_t takes 224 px, for instance, not this"),
        ("alexnet", 32, "image_size=32: alexnet takes 64 px or 224 px, for instance, not this"),
        ("timm/mixer_s32_224", 16, "image_size=16: timm/mixer_s32_224 takes 32 px or 224 px, for instance, not this"),
    ],
)
def test_a_size_the_network_cannot_take_is_answered_with_sizes_it_can(name: str, image_size: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_model(name, image_size=image_size)


@pytest.mark.parametrize(("name", "size"), [("vit_b_32", 64), ("timm/vit_tiny_patch16_224", 32)])
def test_a_transformer_has_a_position_for_every_patch_of_the_size_asked_for(name: str, size: int) -> None:
    positions = next(value for key, value in state(built(name)).items() if "pos_embed" in key)
    patch = 32 if name == "vit_b_32" else 16
    assert positions.shape[1] == 1 + (size // patch) ** 2


def test_what_is_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="norm='layer': must be one of batch, group, none"):
        make_model(norm="layer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_classes=0: must be at least 1"):
        make_model(num_classes=0)
    with pytest.raises(ValueError, match="image_size=0: must be at least 1"):
        build_model("timm/resnet10t", num_classes=2, image_size=0, norm=None, generator_seed=0)
