"""Initial weights by seed and name: what two networks share, what stays the library's own, and that no two draws are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn.modules import module as registration

from powergrad.models.initial import drawn_by_name, seeded
from powergrad.models.libraries import TIMM, timm_model, torchvision_model
from tests.models.networks import make_model, noise, state

torch.set_num_threads(1)

VIT = "timm/vit_tiny_patch16_224"
PAIRS: list[tuple[dict[str, Any], dict[str, Any], int]] = [
    ({"name": "resnet18"}, {"name": "resnet34"}, 22),
    ({"name": "resnet50"}, {"name": "resnet101"}, 55),
    ({"name": "resnet8"}, {"name": "resnet20"}, 9),
    ({"name": "resnet18"}, {"name": "seresnet18"}, 22),
    ({"name": "resnet18", "norm": "batch"}, {"name": "resnet18", "norm": "group"}, 22),
    ({"name": "resnet18", "norm": "batch"}, {"name": "resnet18", "norm": "none"}, 22),
    ({"name": "resnet34", "norm": "group"}, {"name": "resnet18", "norm": "none"}, 22),
    ({"name": "resnet20"}, {"name": "resnet20", "num_classes": 7}, 19),
    ({"name": "resnet18"}, {"name": "resnet18", "image_size": 96}, 21),
    ({"name": "resnet18", "image_size": 96}, {"name": "timm/resnet18", "image_size": 96}, 22),
    ({"name": "timm/resnet10t", "image_size": 32}, {"name": "timm/resnet18d", "image_size": 32}, 14),
    ({"name": "squeezenet1_1", "image_size": 32}, {"name": "squeezenet1_1", "image_size": 32, "num_classes": 7}, 25),
    ({"name": "densenet121", "image_size": 32}, {"name": "densenet169", "image_size": 32}, 103),
    ({"name": "swin_t", "image_size": 32}, {"name": "swin_s", "image_size": 32}, 66),
    ({"name": VIT, "image_size": 32}, {"name": VIT, "image_size": 48, "num_classes": 7}, 51),
]
"""Two networks, and how many tensors that are drawn they have in common, by name and shape."""
DRAWN: dict[str, int] = {
    "resnet18": 96,
    "resnet50": 96,
    "densenet121": 32,
    "googlenet": 32,
    "inception_v3": 75,
    "mobilenet_v3_small": 32,
    "squeezenet1_1": 32,
    "swin_t": 32,
    "vit_b_32": 64,
    "timm/convnext_atto": 32,
    "timm/edgenext_xx_small": 64,
    "timm/levit_128s": 64,
    "timm/mixer_s32_224": 64,
    VIT: 32,
}
MANY = 2000
"""Elements from which on a spread is judged."""


def drawn(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of real numbers that are not all the same."""
    real = {name: value for name, value in state(model).items() if value.is_floating_point()}
    return {name: value for name, value in real.items() if value.numel() > 1 and value.std() > 0}


@pytest.mark.parametrize(("one", "other", "shared"), PAIRS, ids=lambda given: f"{given.get('name')}" if isinstance(given, dict) else "")
def test_tensors_of_equal_name_and_shape_have_equal_bits(one: dict[str, Any], other: dict[str, Any], shared: int) -> None:
    first, second = drawn(make_model(**one, generator_seed=3)), drawn(make_model(**other, generator_seed=3))
    common = [name for name in first if name in second and first[name].shape == second[name].shape]
    assert len(common) == shared
    assert [name for name in common if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("name", ["resnet20", "squeezenet1_1", VIT])
def test_another_seed_draws_every_tensor_anew(name: str) -> None:
    first, second = (drawn(make_model(name, image_size=32, generator_seed=seed)) for seed in (0, 1))
    assert first.keys() == second.keys()
    assert [key for key, value in first.items() if torch.equal(value, second[key])] == []


def test_a_bias_spread_by_more_inputs_is_the_same_draw_on_a_smaller_scale() -> None:
    narrow, wide = (state(make_model(name))["fc.bias"] for name in ("resnet18", "resnet50"))  # 512 and 2048 inputs
    torch.testing.assert_close(narrow, 2 * wide)


@pytest.mark.parametrize("name", DRAWN)
def test_the_distributions_are_the_librarys(name: str) -> None:
    """Against one network of its library as its constructor leaves it: the same tensors are drawn, with the same mean, spread and outskirts."""
    size = DRAWN[name]
    with seeded(1):
        library = (
            timm_model(name.removeprefix(TIMM), num_classes=10, image_size=size) if name.startswith(TIMM) else _torchvisions(name, size)
        )
    ours, theirs = drawn(make_model(name, image_size=size)), drawn(library)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert value.shape == theirs[key].shape
        if value.numel() >= MANY:
            spread = theirs[key].std().item()
            assert value.std().item() == pytest.approx(spread, rel=0.1), key  # 1.6 % is one deviation, for 2000 normal values
            assert abs(value.mean().item() - theirs[key].mean().item()) < 0.2 * spread, key
            assert outskirts(value) == pytest.approx(outskirts(theirs[key]), rel=0.15), key


def outskirts(value: Tensor) -> float:
    """What one value in fifty exceeds: uniform, normal and cut normal draws of one spread differ in it."""
    return value.flatten()[:100_000].abs().quantile(0.98).item()


def _torchvisions(name: str, size: int) -> nn.Module:
    return torchvision_model(name, num_classes=10, image_size=size)


@pytest.mark.parametrize("name", ["resnet20", "vit_b_32", VIT, "timm/mixer_s32_224", "timm/levit_128s"])
def test_no_two_tensors_of_a_network_are_the_same_draw(name: str) -> None:
    """Up to scale and sign: each begins with other values than any other. Where one tensor is several weights, so do they."""
    beginnings: list[Tensor] = []
    for value in drawn(make_model(name, image_size=64)).values():
        flat = value.float().flatten()
        beginnings += [part[:16] / part[:16].norm() for part in flat.chunk(3) if len(part) >= 16]
    stacked = torch.stack(beginnings)
    alike = (stacked @ stacked.T).abs().fill_diagonal_(0)
    assert len(beginnings) > 30
    assert alike.max() < 0.99


class Odd(nn.Module):
    """The ways of a library to draw a weight: into it, into its parts, before it is one, beside it, again and again, and in a copy."""

    def __init__(self, *, blocks: int, extra: bool = False) -> None:
        super().__init__()
        if extra:
            self.extra = nn.Linear(5, 5)
        self.before = nn.Parameter(torch.randn(8, 8) * 0.02)
        self.like = nn.Parameter(torch.randn_like(self.before))
        self.like_too = nn.Parameter(torch.randn_like(self.before))
        self.parts = nn.Parameter(torch.empty(24, 8))
        self.cut = nn.Parameter(torch.empty(8, 8))
        self.register_buffer("table", torch.rand(8, 8) + torch.rand(8, 8))
        self.blocks = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(blocks))
        for part in self.parts.detach().chunk(3):
            nn.init.xavier_uniform_(part)
        nn.init.trunc_normal_(self.cut, std=1.0, a=-1.0, b=1.0)  # a rejected value is drawn again: how often depends on the values
        for block in self.blocks:
            assert isinstance(block, nn.Linear)
            nn.init.orthogonal_(block.weight)


def odd(*, blocks: int, extra: bool = False, seed: int = 0) -> dict[str, Tensor]:
    def make() -> nn.Module:
        return Odd(blocks=blocks, extra=extra)

    return state(drawn_by_name(make, layout=make, seed=seed))


def test_every_way_to_draw_a_weight_is_by_name() -> None:
    small, large = odd(blocks=2), odd(blocks=5, extra=True)
    assert small.keys() < large.keys()
    assert [name for name, value in small.items() if not torch.equal(value, large[name])] == []
    assert [name for name, value in odd(blocks=2, seed=1).items() if torch.equal(value, small[name])] == []


def test_what_is_drawn_in_parts_or_beside_another_is_not_the_same_draw() -> None:
    weights = odd(blocks=3)
    parts = [weights["before"] / 0.02, weights["like"], weights["like_too"], *weights["parts"].chunk(3), weights["cut"], weights["table"]]
    parts += [weights[f"blocks.{block}.weight"] for block in range(3)]
    flat = torch.stack([part.flatten() - part.mean() for part in parts])
    alike = (flat @ flat.T / (flat.norm(dim=1) * flat.norm(dim=1)[:, None])).fill_diagonal_(0)
    assert alike.abs().max() < 0.5  # 64 independent values: a deviation of 0.125
    assert weights["cut"].abs().max() <= 1
    torch.testing.assert_close(weights["blocks.0.weight"] @ weights["blocks.0.weight"].T, torch.eye(8))


def test_a_constructor_that_reads_values_is_named_on_the_cpu() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            width = int(torch.linspace(0, 8, 3)[-1].item())
            self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    class ReadsLess(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Linear(8, 8)

    whole, part = (state(drawn_by_name(make, layout=make, seed=0)) for make in (Reads, ReadsLess))
    assert torch.equal(whole["second.weight"], part["second.weight"])
    assert not torch.equal(whole["first.weight"], part["second.weight"])


def test_a_constructor_that_fails_leaves_nothing_behind() -> None:
    """Neither torch's generator nor its hooks for every module."""

    def fails() -> nn.Module:
        nn.Linear(3, 3)
        raise KeyError("no such layer")

    def layout() -> nn.Module:
        return nn.Linear(3, 3)

    before = torch.random.get_rng_state()
    for make, plan in ((fails, layout), (layout, fails)):
        _refused(make, plan)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not registration._global_parameter_registration_hooks
    assert not registration._global_buffer_registration_hooks


def _refused(make: Callable[[], nn.Module], layout: Callable[[], nn.Module]) -> None:
    with pytest.raises(KeyError, match="no such layer"):
        drawn_by_name(make, layout=layout, seed=0)


def test_a_library_network_of_ours_computes_what_the_librarys_does() -> None:
    """Drawing by name leaves no trace in the network: it runs, is copied and saved as any other."""
    ours = make_model("squeezenet1_1", image_size=32).eval()
    theirs = torchvision.models.squeezenet1_1(weights=None, num_classes=10).eval()
    theirs.load_state_dict(state(ours))
    images = noise(2, size=32)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))
