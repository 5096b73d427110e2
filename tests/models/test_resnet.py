"""The catalogue against torchvision's own published figures, and the weights as a function of the seed alone."""

from __future__ import annotations

import pytest
import torch
import torchvision  # type: ignore[import-untyped]
from torch import Tensor, nn

from powergrad.models import NORMS, Norm, build_model, describe_models, model_names

torch.set_num_threads(1)


def make_model(
    name: str = "resnet18", *, num_classes: int = 10, image_size: int = 16, norm: Norm = "batch", generator_seed: int = 0
) -> nn.Module:
    return build_model(name, num_classes=num_classes, image_size=image_size, norm=norm, generator_seed=generator_seed)


def state(model: nn.Module) -> dict[str, Tensor]:
    return model.state_dict()


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(value, state(other)[name]) for name, value in state(one).items())


@pytest.mark.parametrize("description", describe_models(), ids=lambda d: str(d["name"]))
def test_parameter_counts_are_those_torchvision_publishes(description: dict[str, object]) -> None:
    published = torchvision.models.get_model_weights(description["name"]).DEFAULT.meta["num_params"]
    assert description["parameters"] == published


def test_the_catalogue_lists_every_model_once() -> None:
    assert [d["name"] for d in describe_models()] == model_names()
    assert len(set(model_names())) == len(model_names()) == 9


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_gradients_reach_every_parameter(name: str, norm: Norm) -> None:
    model = make_model(name, norm=norm)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    logits = model(images)
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


@pytest.mark.parametrize(("typed", "meant"), [("resnet-18", "resnet18"), ("ResNet50", "resnet50"), ("wide_resnet50", "wide_resnet50_2")])
def test_an_unknown_name_is_answered_with_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"{typed}.*nearest is '{meant}'"):
        make_model(typed)


def test_what_is_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="norm='layer': must be one of batch, group, none"):
        make_model(norm="layer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_classes=0: must be at least 1"):
        make_model(num_classes=0)
    with pytest.raises(ValueError, match="image_size=0: must be at least 1"):
        make_model(image_size=0)
