"""Clipped gradients against the formulas written out, unit by unit."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn

from powergrad.clip import clip_gradients
from powergrad.spec import ClipSpec

torch.set_num_threads(1)


def make_model(*, gradient_scale: float = 1.0) -> nn.Module:
    model = nn.Sequential(OrderedDict(conv=nn.Conv2d(2, 3, 3), bn=nn.BatchNorm2d(3), fc=nn.Linear(3, 4))).double()
    rng = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=rng)
        parameter.grad = torch.randn(parameter.shape, generator=rng, dtype=torch.float64) * gradient_scale
    return model


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def agc_by_hand(weight: Tensor, grad: Tensor, factor: float) -> Tensor:
    """Brock et al. 2021, equation 3: g_i * factor * max(|w_i|, 1e-3) / |g_i| where |g_i| exceeds factor * max(|w_i|, 1e-3)."""
    if weight.dim() > 1:
        return torch.stack([agc_by_hand(w.flatten(), g.flatten(), factor).reshape(g.shape) for w, g in zip(weight, grad, strict=True)])
    bound = factor * max(math.sqrt(sum(w * w for w in weight.tolist())), 1e-3)
    norm = math.sqrt(sum(g * g for g in grad.tolist()))
    return grad if norm <= bound else grad * (bound / norm)


@pytest.mark.parametrize("gradient_scale", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("factor", [0.01, 0.5])
def test_agc_bounds_every_unit_by_its_weights_but_not_the_classifier(factor: float, gradient_scale: float) -> None:
    model = make_model(gradient_scale=gradient_scale)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    before = grads(model)

    assert clip_gradients(model, ClipSpec(mode="agc", value=factor)) is None

    for name, grad in grads(model).items():
        expected = before[name] if name.startswith("fc.") else agc_by_hand(weights[name], before[name], factor)
        torch.testing.assert_close(grad, expected, rtol=1e-12, atol=0.0)


def test_agc_clips_some_units_and_leaves_others() -> None:
    """Guards the test above: at this factor both branches are taken within one layer."""
    model = make_model(gradient_scale=0.1)
    before = grads(model)["conv.weight"]
    clip_gradients(model, ClipSpec(mode="agc", value=0.1))
    changed = (grads(model)["conv.weight"] != before).flatten(1).any(1)
    assert changed.any()
    assert not changed.all()


def test_agc_lets_zero_weights_move() -> None:
    model = make_model()
    conv = model.get_submodule("conv")
    assert isinstance(conv.weight, nn.Parameter)
    nn.init.zeros_(conv.weight)
    clip_gradients(model, ClipSpec(mode="agc", value=0.01))
    torch.testing.assert_close(grads(model)["conv.weight"].flatten(1).norm(dim=1), torch.full((3,), 1e-5, dtype=torch.float64))


def test_agc_leaves_a_zero_gradient_zero_and_a_missing_one_missing() -> None:
    model = make_model(gradient_scale=0.0)
    model.get_parameter("bn.weight").grad = None
    clip_gradients(model, ClipSpec(mode="agc", value=0.01))
    assert model.get_parameter("bn.weight").grad is None
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads(model).values())


def test_agc_shows_a_gradient_that_is_not_finite() -> None:
    model = make_model()
    bias = model.get_parameter("conv.bias")
    assert bias.grad is not None
    bias.grad[0] = float("inf")
    clip_gradients(model, ClipSpec(mode="agc", value=0.01))
    assert not bias.grad.isfinite().all()


SHAPES = [(8, 4, 3, 3), (8, 1, 3, 3), (5, 7), (1, 1), (3, 4, 5), (16,), (1,), ()]


@st.composite
def models(draw: st.DrawFn) -> tuple[nn.Module, nn.Module]:
    """The same weights and gradients twice: of several shapes, in fp32 or bf16, some zero, infinite or missing."""
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    model = nn.Module()
    for i, shape in enumerate(draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=5))):
        weight, grad = (torch.randn(shape, generator=rng) * 10.0 ** draw(st.integers(-9, 4)) for _ in range(2))
        parameter = nn.Parameter((weight * draw(st.sampled_from([0.0, 1.0]))).to(dtype))
        kind = draw(st.sampled_from(["plain", "plain", "zero", "infinite", "nan", "missing"]))
        if kind != "missing":
            parameter.grad = (grad * (kind != "zero")).to(dtype)
            if kind in {"infinite", "nan"}:
                parameter.grad.view(-1)[0] = math.inf if kind == "infinite" else math.nan
        model.register_parameter(f"weight{i}", parameter)
    other = copy.deepcopy(model)
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        mine.grad = None if theirs.grad is None else theirs.grad.clone()
    return model, other


@settings(max_examples=300)
@given(pair=models(), factor=st.sampled_from([1e-3, 0.01, 0.1, 1.0]))
def test_agc_is_timms_to_the_last_bit(pair: tuple[nn.Module, nn.Module], factor: float) -> None:
    ours, timms = pair
    clip_gradients(ours, ClipSpec(mode="agc", value=factor), classifiers=())
    adaptive_clip_grad(timms.parameters(), clip_factor=factor)  # type: ignore[no-untyped-call]
    for mine, theirs in zip(ours.parameters(), timms.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None and theirs.grad is not None:
            assert mine.grad.dtype == theirs.grad.dtype
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("classifiers", [("fc",), ("bn", "fc"), ("f",)])
def test_agc_leaves_out_the_layers_that_are_named_and_no_namesakes(classifiers: tuple[str, ...]) -> None:
    model = make_model(gradient_scale=10.0)
    before = grads(model)
    clip_gradients(model, ClipSpec(mode="agc", value=0.01), classifiers=classifiers)
    untouched = {name for name, grad in grads(model).items() if torch.equal(grad, before[name])}
    assert untouched == {name for name in before if name.split(".")[0] in classifiers}


@pytest.mark.parametrize("bound", [0.5, 1e6])
def test_norm_scales_all_gradients_to_the_bound_and_returns_the_norm_before(bound: float) -> None:
    model = make_model()
    before = grads(model)
    norm = math.sqrt(sum(float((grad**2).sum()) for grad in before.values()))

    found = clip_gradients(model, ClipSpec(mode="norm", value=bound))

    assert found is not None
    assert found.item() == pytest.approx(norm)
    factor = min(1.0, bound / (norm + 1e-6))  # torch's guard against a zero norm
    for name, grad in grads(model).items():
        torch.testing.assert_close(grad, before[name] * factor)


def test_value_bounds_each_entry() -> None:
    model = make_model()
    before = grads(model)
    assert clip_gradients(model, ClipSpec(mode="value", value=0.3)) is None
    for name, grad in grads(model).items():
        assert torch.equal(grad, before[name].clamp(-0.3, 0.3))
