"""The ResNets against torchvision's own, the squeezed ones against timm's, and the weights as a function of the seed alone."""

from __future__ import annotations

import hashlib

import pytest
import torch
import torchvision  # type: ignore[import-untyped]
from torch import nn

from powergrad.models import NORMS, Norm
from powergrad.models.libraries import timm_library
from powergrad.models.resnet import PLAIN, skeleton
from tests.models.networks import equal, make_model, noise, state

torch.set_num_threads(1)

# sha256 of names, shapes and values for seed 3 and 10 classes: as first released, with torch 2.10 to 2.15 on a CPU with AVX2
FIRST_RELEASE = {
    ("resnet18", "batch", 16): "1db03e938f221b32ff01c18399b8ce99dac2f43b9f905f5bf7d67b62997c4b2f",
    ("resnet18", "group", 16): "56cca447ee4ff6e808558566c1f802da2610c359a62d17def56bac50b67a082a",
    ("resnet18", "none", 16): "1786b95688ac1d4edec44ca5201d471abb58b336360a74df579a664118e8eae1",
    ("resnet18", "batch", 224): "b0905e2ea5e8f69e1b725b334d1ccd69263273c58b0c325ee079fee6e8ef3176",
    ("resnet18", "none", 224): "b9a15cb93ba8a1f2650f3fc2848dc3d4e1943479263ab60acf63aecf1ec03ef9",
    ("resnet34", "batch", 32): "323b70adcf7f5f9cd832c7730e105b2c350bb8a9363c127f843fa2081135d2e3",
    ("resnet50", "batch", 32): "e9bbde6e9d9891646c50de7e68a56e122811824b0c1f9c9e7e47faf2c24d718e",
    ("resnet50", "group", 224): "b77f75162137e46fa2260cc36dd6713535a93143fb924f8c8f869d1ebdc3d999",
    ("resnet50", "none", 32): "b116288fddadd43fe14b7e6319e687375398c50c96052df67d9680e1b3e648a1",
    ("resnext50_32x4d", "batch", 32): "5c42bfe7ae931505b622e524e97525d76b584a3ae5c0030199c259df3c090dec",
    ("resnet101", "none", 16): "ed475f8260b51be39a40c82e87f5f6a4987c0cbaf651b1dede9802f7617d5aec",
    ("resnet152", "group", 65): "e386ad62c07671be0d8fa832ffaaea470b3db91890779146e520ae81d8a9998f",
    ("wide_resnet50_2", "batch", 16): "e9acf2e8397271885eb74077e3cea7825ef68a01c689c170ea7fd4fb2b1feffa",
}


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="without AVX2 torch's normal draws differ in the last bit")
@pytest.mark.parametrize(("name", "norm", "image_size"), FIRST_RELEASE)
def test_initial_weights_have_the_bits_of_the_first_release(name: str, norm: Norm, image_size: int) -> None:
    digest = hashlib.sha256()
    for key, value in state(make_model(name, norm=norm, image_size=image_size, generator_seed=3)).items():
        digest.update(key.encode() + str(tuple(value.shape)).encode() + value.numpy().tobytes())
    assert digest.hexdigest() == FIRST_RELEASE[name, norm, image_size]


@pytest.mark.parametrize("name", PLAIN)
def test_parameter_counts_are_those_torchvision_publishes(name: str) -> None:
    published = torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"]
    assert count(skeleton(name, num_classes=1000, image_size=224, norm="batch")) == published


@pytest.mark.parametrize("name", ["seresnet18", "seresnet34", "seresnet50"])
def test_squeezed_parameter_counts_are_timms(name: str) -> None:
    """timm rounds the 64 / 16 = 4 channels inside the first stage's gates of ResNet-18 and -34 up to 8; the paper does not."""
    with torch.device("meta"):
        theirs = count(timm_library().create_model(name))
    rounded_blocks = {"seresnet18": 2, "seresnet34": 3}.get(name, 0)
    ours = count(skeleton(name, num_classes=1000, image_size=224, norm="batch"))
    assert ours == theirs - rounded_blocks * (2 * 64 * 4 + 4)


@pytest.mark.parametrize(("name", "blocks"), [("seresnet18", 8), ("seresnet50", 16)])
def test_every_residual_is_rescaled_before_it_is_added(name: str, blocks: int) -> None:
    """With the gates closed the residuals are gone: what is left of each stage is its shortcut."""
    model = make_model(name).eval()
    gates = [module for module in model.modules() if type(module).__name__ == "SqueezeExcitation"]
    assert len(gates) == blocks
    for gate in gates:
        state(gate)["fc2.bias"].fill_(-1e4)  # a sigmoid of 0
    features: list[torch.Tensor] = []
    layer = model.get_submodule("layer1")
    layer.register_forward_hook(lambda _module, args, output: features.extend((args[0], output)))
    with torch.no_grad():
        model(noise(2))
        shortcut = layer.get_submodule("0.downsample")(features[0]) if name == "seresnet50" else features[0]
    assert torch.equal(features[1], shortcut.relu())


def test_open_gates_leave_the_plain_network() -> None:
    model, plain = make_model("seresnet18").eval(), make_model("resnet18").eval()
    plain.load_state_dict({key: value for key, value in state(model).items() if ".se." not in key})
    for key, value in state(model).items():
        if ".se.fc2" in key:
            value.fill_(100.0 if key.endswith("bias") else 0.0)  # a sigmoid of 1
    with torch.no_grad():
        assert torch.equal(model(noise(2)), plain(noise(2)))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "seresnet18", "seresnet50"])
def test_gradients_reach_every_parameter(name: str, norm: Norm) -> None:
    model = make_model(name, norm=norm)
    logits = model(noise(2))
    assert logits.shape == (2, 10)
    grads = torch.autograd.grad(logits.logsumexp(1).sum(), list(model.parameters()))
    assert all(grad.isfinite().all() for grad in grads)
    assert sum(int(grad.count_nonzero() == 0) for grad in grads) == 0


def test_state_has_torchvisions_names_and_shapes_at_imagenet_size() -> None:
    """Published weights of the same network can be loaded."""
    ours = state(make_model("resnet50", num_classes=1000, image_size=224))
    theirs = torchvision.models.resnet50(weights=None).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_batch_norm_at_imagenet_size_computes_what_torchvision_computes() -> None:
    ours = make_model("resnet18", num_classes=7, image_size=96).eval()
    theirs = torchvision.models.resnet18(weights=None, num_classes=7).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize(("image_size", "expected"), [(64, (8, 8)), (65, (3, 3))])
def test_small_images_keep_their_resolution_in_the_stem(image_size: int, expected: tuple[int, int]) -> None:
    model = make_model(image_size=image_size)
    sizes: list[tuple[int, ...]] = []
    last = model.get_submodule("layer4")
    last.register_forward_hook(lambda _module, _args, output: sizes.append(tuple(output.shape[2:])))
    with torch.no_grad():
        model(torch.zeros(1, 3, image_size, image_size).expand(2, -1, -1, -1))
    assert sizes == [expected]


@pytest.mark.parametrize("norm", NORMS)
def test_weights_are_a_function_of_the_seed(norm: Norm) -> None:
    assert equal(make_model(norm=norm, generator_seed=5), make_model(norm=norm, generator_seed=5))
    assert not equal(make_model(norm=norm, generator_seed=5), make_model(norm=norm, generator_seed=6))


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = make_model()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert equal(first, make_model())


def test_no_memory_is_left_as_it_was_found() -> None:
    """Every parameter and buffer is set: what is not drawn holds zeros or ones, what is drawn has the spread it was asked for."""
    for norm in NORMS:
        model = make_model(norm=norm)
        for name, value in state(model).items():
            if name.endswith("running_var") or (value.dim() == 1 and name.endswith("weight")):
                assert torch.equal(value, torch.ones_like(value)), name
            elif value.dim() <= 1 and not name.startswith("fc."):
                assert torch.equal(value, torch.zeros_like(value)), name
            elif value.dim() == 4:
                he = (2 / (value.shape[0] * value.shape[2] * value.shape[3])) ** 0.5
                assert value.std().item() == pytest.approx(he, rel=0.05), name
        bound = 512**-0.5
        assert 0.99 * bound < state(model)["fc.weight"].abs().max().item() <= bound


def test_norm_none_has_biases_and_no_normalisation() -> None:
    layers = list(make_model("resnet50", norm="none").modules())
    assert not any(isinstance(layer, nn.BatchNorm2d | nn.GroupNorm) for layer in layers)
    assert all(layer.bias is not None for layer in layers if isinstance(layer, nn.Conv2d))


def test_norm_group_replaces_every_batch_norm() -> None:
    layers = list(make_model("resnet18", norm="group").modules())
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in layers)
    assert {layer.num_groups for layer in layers if isinstance(layer, nn.GroupNorm)} == {32}


def test_a_net_without_normalisation_learns_a_small_batch() -> None:
    model = make_model(norm="none")
    rng = torch.Generator().manual_seed(0)
    images, target = torch.randn(16, 3, 8, 8, generator=rng), torch.randint(10, (16,), generator=rng)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), target)
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(2.3, abs=0.5)  # log 10: He initialisation neither blows up nor dies over 18 layers
    assert losses[-1] < 0.5 * losses[0]


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
