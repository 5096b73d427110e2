"""The loss against torch itself: its value is F.cross_entropy's, its gradient that of CE(alpha z, q) / alpha, found by autograd."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from powergrad.loss import PowerGradCrossEntropyLoss, Reduction, power_grad_cross_entropy, power_softmax

ALPHAS = [0.0, 0.05, 0.3, 0.92, 1.0]
INF = float("inf")

torch.set_num_threads(1)


class Case(NamedTuple):
    """One way to call a cross-entropy."""

    logits: Tensor
    target: Tensor
    options: dict[str, Any]


def make_case(
    seed: int = 0,
    *,
    shape: tuple[int, ...] = (6, 5),
    dtype: torch.dtype = torch.float64,
    target: Literal["index", "soft"] = "index",
    spread: float = 3.0,
    weighted: bool = False,
    ignored: float = 0.0,
    masked: float = 0.0,
    **options: Any,
) -> Case:
    """Random logits and target; `ignored` and `masked` are the shares of targets ignored and of logits that are -inf."""
    rng = torch.Generator().manual_seed(seed)
    class_dim = min(1, len(shape) - 1)
    classes = shape[class_dim]
    places = shape[:class_dim] + shape[class_dim + 1 :]
    logits = torch.randn(shape, generator=rng, dtype=torch.float64) * spread
    indices = torch.randint(classes, places, generator=rng)
    if masked:
        one_hot = F.one_hot(indices, classes).movedim(-1, class_dim).bool()
        logits = logits.masked_fill((torch.rand(shape, generator=rng) < masked) & ~one_hot, -INF)
    if weighted:
        options["weight"] = (torch.rand(classes, generator=rng, dtype=torch.float64) * 2 + 0.1).to(dtype)
    if target == "soft":
        return Case(logits.to(dtype), torch.rand(shape, generator=rng, dtype=torch.float64).to(dtype), options)
    if ignored:
        ignore_index = options.setdefault("ignore_index", -100)
        indices = indices.masked_fill(torch.rand(places, generator=rng) < ignored, ignore_index)
    return Case(logits.to(dtype), indices, options)


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    upstream = torch.linspace(0.5, 1.5, max(1, loss.numel()), dtype=loss.dtype)[: loss.numel()].reshape(loss.shape)
    return torch.autograd.grad(loss, logits, upstream)[0]


def pgt(case: Case, alpha: float) -> tuple[Tensor, Tensor]:
    logits = case.logits.clone().requires_grad_()
    loss = power_grad_cross_entropy(logits, case.target, alpha=alpha, **case.options)
    return loss.detach(), gradient(loss, logits)


def oracle(case: Case, alpha: float) -> tuple[Tensor, Tensor]:
    """The value of F.cross_entropy and, by autograd, the gradient of CE(alpha z, q) / alpha, for alpha > 0."""
    logits = case.logits.clone().requires_grad_()
    value = F.cross_entropy(case.logits, case.target, **case.options)
    return value, gradient(F.cross_entropy(alpha * logits, case.target, **case.options) / alpha, logits)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, *, least: float = 0.0) -> None:
    """Equal to `tolerance` of the largest entry (or of `least`, if that is more), NaN and infinities in the same places."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape  # else isclose would broadcast
    scale = max(least, expected.abs().nan_to_num(posinf=0.0).max().item() if expected.numel() else 1.0)
    near = torch.isclose(actual, expected, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
    assert near.all(), f"{actual} is not {expected}"


# --- the value and the gradient over every option --------------------------------------------------------------------------------

SHAPES = [(4,), (1, 1), (1, 7), (5, 2), (3, 11), (0, 3), (2, 3, 4), (2, 4, 3, 2), (2, 3, 1, 2, 2)]
# 1e-6 of the largest entry is the promise in fp32: some ten roundings; fp64 shows that the formula itself is exact
TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-13}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    soft = draw(st.booleans())
    smoothing = draw(st.sampled_from([0.0, 0.0, 0.1, 0.9]))
    shape = draw(st.sampled_from(SHAPES))
    return make_case(
        draw(st.integers(0, 2**31)),
        shape=shape,
        dtype=draw(st.sampled_from(list(TOLERANCES))),
        target="soft" if soft else "index",
        spread=draw(st.sampled_from([0.0, 1.0, 10.0])),
        weighted=draw(st.booleans()),
        ignored=0.0 if soft else draw(st.sampled_from([0.0, 0.3, 1.0])),
        masked=0.0 if soft or smoothing else draw(st.sampled_from([0.0, 0.5])),
        reduction=draw(st.sampled_from(["mean", "sum", "none"])),
        label_smoothing=smoothing,
        **({} if soft else {"ignore_index": draw(st.sampled_from([-100, -1, 0]))}),
    )


def mean_target_mass(case: Case) -> float:
    """Mean over places of the gradient's parts, W p' and q: CE of zero logits is W log C."""
    classes = case.logits.shape[min(1, case.logits.dim() - 1)]
    loss = F.cross_entropy(torch.zeros_like(case.logits), case.target, **case.options).nan_to_num()
    return 0.5 * loss.sum().item() / math.log(max(2, classes)) / max(1, case.logits.numel() // classes)


@settings(max_examples=2000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases(), alpha=st.sampled_from([0.01, 0.05, 0.3, 0.7, 0.92, 1.0]))
def test_value_and_gradient_are_the_oracles_for_every_option(case: Case, alpha: float) -> None:
    value, grad = pgt(case, alpha)
    expected_value, expected_grad = oracle(case, alpha)

    assert_close(value, expected_value, 1e-15 if case.logits.dtype == torch.float64 else 3e-7)
    # what is rounded are p' and q, whose difference may be small; and the oracle divides by alpha
    assert_close(grad, expected_grad, TOLERANCES[case.logits.dtype] / min(1.0, 10 * alpha), least=mean_target_mass(case))


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_alpha_0_is_the_limit_of_small_alpha(case: Case) -> None:
    assert_close(pgt(case, 0.0)[1], pgt(case, 1e-12)[1], max(1e-10, TOLERANCES[case.logits.dtype]), least=mean_target_mass(case))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignored", [0.5, 1.0])
def test_ignored_places_count_as_torch_counts_them(ignored: float, weighted: bool, smoothing: float, reduction: str) -> None:
    """All of them ignored, torch's mean is NaN and its gradient 0."""
    case = make_case(ignored=ignored, weighted=weighted, label_smoothing=smoothing, reduction=reduction)
    for actual, expected in zip(pgt(case, 0.3), oracle(case, 0.3), strict=True):
        assert_close(actual, expected, 1e-13)


def test_alpha_0_takes_uniform_probabilities() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    torch.autograd.backward(power_grad_cross_entropy(logits, torch.tensor([0, 1, 2]), alpha=0.0, reduction="sum"))
    assert logits.grad is not None
    assert torch.equal(logits.grad, 0.25 - F.one_hot(torch.tensor([0, 1, 2]), 4))


def test_alpha_0_leaves_masked_classes_out() -> None:
    logits = torch.tensor([[0.0, -INF, 5.0]], requires_grad=True)
    torch.autograd.backward(power_grad_cross_entropy(logits, torch.tensor([0]), alpha=0.0))
    assert logits.grad is not None
    assert logits.grad.tolist() == [[-0.5, 0.0, 0.5]]


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_logit_of_minus_infinity_makes_no_nan(alpha: float, label_smoothing: float) -> None:
    logits = torch.tensor([[1.0, -INF, 0.0], [-INF, 2.0, 3.0]], requires_grad=True)
    loss = power_grad_cross_entropy(logits, torch.tensor([0, 0]), alpha=alpha, label_smoothing=label_smoothing)
    torch.autograd.backward(loss)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_nan_logit_is_not_hidden(alpha: float) -> None:
    """Loss scalers notice an overflow by the gradient."""
    logits = torch.tensor([[1.0, float("nan"), 0.0]], requires_grad=True)
    torch.autograd.backward(power_grad_cross_entropy(logits, torch.tensor([0]), alpha=alpha))
    assert logits.grad is not None
    assert logits.grad.isnan().any()


@pytest.mark.parametrize("target", ["index", "soft"])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_value_does_not_depend_on_alpha(alpha: float, target: Literal["index", "soft"]) -> None:
    case = make_case(shape=(64, 10), dtype=torch.float32, target=target)
    assert torch.equal(pgt(case, alpha)[0], pgt(case, 0.5)[0])


@pytest.mark.parametrize("target", ["index", "soft"])
def test_alpha_1_has_the_bits_of_cross_entropy(target: Literal["index", "soft"]) -> None:
    case = make_case(shape=(64, 10), dtype=torch.float32, target=target, label_smoothing=0.1, weighted=True)
    for actual, expected in zip(pgt(case, 1.0), oracle(case, 1.0), strict=True):
        assert torch.equal(actual, expected)


def test_ten_times_sharper_logits_stay_exact() -> None:
    """Powers of probabilities below fp32's smallest number are right: they are never formed."""
    case = make_case(shape=(32, 20), dtype=torch.float32, spread=300.0)
    exact = oracle(Case(case.logits.double(), case.target, {}), 0.05)[1]
    assert_close(pgt(case, 0.05)[1].double(), exact, 2e-5)  # fp32 logits of 1000 times alpha carry an error of 1e-5


# --- dimensions, layouts, sizes ---------------------------------------------------------------------------------------------------


def test_non_contiguous_logits_give_the_same_gradient() -> None:
    case = make_case(shape=(4, 6, 3, 5))
    strided = case.logits.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2).requires_grad_()
    grad = gradient(power_grad_cross_entropy(strided, case.target, alpha=0.3), strided)
    assert_close(grad, pgt(case, 0.3)[1], 1e-13)


@pytest.mark.parametrize("shape", [(300, 1000), (3, 70001), (70, 3, 33, 31)])
def test_large_batches_give_the_oracles_gradient(shape: tuple[int, ...]) -> None:
    case = make_case(shape=shape, dtype=torch.float32, ignored=0.1)
    assert_close(pgt(case, 0.3)[1], oracle(case, 0.3)[1], 1e-6)


def test_byte_targets_are_indices() -> None:
    case = make_case(shape=(8, 3))
    assert torch.equal(pgt(case, 0.3)[1], pgt(Case(case.logits, case.target.byte(), {}), 0.3)[1])


def test_the_callers_tensors_are_left_alone() -> None:
    for case in (make_case(ignored=0.3), make_case(weighted=True, label_smoothing=0.1), make_case(target="soft")):
        before = [case.logits.clone(), case.target.clone()]
        logits = case.logits.requires_grad_()
        torch.autograd.backward(power_grad_cross_entropy(logits, case.target, alpha=0.3, **case.options))
        assert torch.equal(logits, before[0])
        assert torch.equal(case.target, before[1])


# --- autograd: linear, repeatable, twice differentiable ----------------------------------------------------------------------------

ROADS: list[dict[str, Any]] = [
    {},
    {"ignored": 0.3},
    {"reduction": "none"},
    {"reduction": "sum", "shape": (2, 3, 2)},
    {"shape": (4,)},
    {"weighted": True, "label_smoothing": 0.1},
    {"target": "soft", "label_smoothing": 0.1},
]


@pytest.mark.parametrize("road", ROADS, ids=str)
@pytest.mark.parametrize("scale", [65536.0, 2.0**-20])
def test_gradient_is_linear_in_the_loss_scale(scale: float, road: dict[str, Any]) -> None:
    """A power of two scales every bit: GradScaler's factor comes out as it went in."""
    case = make_case(dtype=torch.float32, **road)
    logits = case.logits.clone().requires_grad_()
    scaled = gradient(power_grad_cross_entropy(logits, case.target, alpha=0.3, **case.options) * scale, logits)
    assert torch.equal(scaled, pgt(case, 0.3)[1] * scale)


def test_micro_batches_add_up_to_the_batch() -> None:
    case = make_case(shape=(8, 5))
    logits = case.logits.clone().requires_grad_()
    for half in (slice(0, 4), slice(4, 8)):
        torch.autograd.backward(power_grad_cross_entropy(logits[half], case.target[half], alpha=0.3) / 2)
    assert logits.grad is not None
    (whole,) = torch.autograd.grad(power_grad_cross_entropy(logits, case.target, alpha=0.3), logits)
    assert_close(logits.grad, whole, 1e-13)


@pytest.mark.parametrize("road", ROADS, ids=str)
def test_second_backward_of_a_retained_graph_gives_the_same_again(road: dict[str, Any]) -> None:
    case = make_case(**road)
    logits = case.logits.clone().requires_grad_()
    loss = power_grad_cross_entropy(logits, case.target, alpha=0.3, **case.options).sum()
    first, second, third = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(3))
    kept = first.clone()
    first.zero_()  # whoever was given the first may do with it as they like
    assert_close(second, kept, 1e-14)
    assert_close(third, kept, 1e-14)


@pytest.mark.parametrize("road", ROADS, ids=str)
def test_backward_through_a_freed_graph_is_refused(road: dict[str, Any]) -> None:
    case = make_case(**road)
    loss = power_grad_cross_entropy(case.logits.clone().requires_grad_(), case.target, alpha=0.3, **case.options).sum()
    torch.autograd.backward(loss)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.backward(loss)


def test_plain_backward_after_one_with_create_graph_gives_the_same() -> None:
    case = make_case()
    logits = case.logits.clone().requires_grad_()
    loss = power_grad_cross_entropy(logits, case.target, alpha=0.3)
    (first,) = torch.autograd.grad(loss, logits, create_graph=True)
    assert first.requires_grad
    assert_close(torch.autograd.grad(loss, logits)[0], first.detach(), 1e-14)


@pytest.mark.parametrize("road", ROADS, ids=str)
@pytest.mark.parametrize("alpha", [0.05, 0.3, 1.0])
def test_second_derivative_is_the_oracles(alpha: float, road: dict[str, Any]) -> None:
    """Both by autograd: the product of the gradient's Jacobian with a fixed vector, and the gradient by the incoming gradient."""
    case = make_case(**road)

    def hessian_product(power: bool) -> tuple[Tensor, ...]:
        logits = case.logits.clone().requires_grad_()
        if power:
            loss = power_grad_cross_entropy(logits, case.target, alpha=alpha, **case.options)
        else:
            loss = F.cross_entropy(alpha * logits, case.target, **case.options) / alpha
        upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape).requires_grad_()
        (grad,) = torch.autograd.grad(loss, logits, upstream, create_graph=True)
        vector = torch.linspace(-1.0, 2.0, grad.numel(), dtype=grad.dtype).reshape(grad.shape)
        return torch.autograd.grad(grad, (logits, upstream), vector)

    for actual, expected in zip(hessian_product(power=True), hessian_product(power=False), strict=True):
        assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize("road", ROADS, ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_the_gradient_is_differentiable_by_finite_differences(alpha: float, road: dict[str, Any]) -> None:
    """The gradient as a function of logits and incoming gradient, its own derivative checked numerically."""
    case = make_case(**road)

    def gradient_of(logits: Tensor, upstream: Tensor) -> Tensor:
        loss = power_grad_cross_entropy(logits, case.target, alpha=alpha, **case.options)
        return torch.autograd.grad(loss, logits, upstream, create_graph=True)[0]

    upstream = torch.ones_like(F.cross_entropy(case.logits, case.target, **case.options)).requires_grad_()
    assert torch.autograd.gradcheck(gradient_of, (case.logits.clone().requires_grad_(), upstream))


def test_alpha_1_passes_gradcheck() -> None:
    case = make_case()
    assert torch.autograd.gradcheck(lambda z: power_grad_cross_entropy(z, case.target, alpha=1.0), (case.logits.requires_grad_(),))


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "weighted": True}, {"reduction": "none"}], ids=str)
def test_soft_targets_get_the_gradient_of_cross_entropy(options: dict[str, Any]) -> None:
    case = make_case(target="soft", **options)

    def target_gradient(power: bool) -> Tensor:
        target = case.target.clone().requires_grad_()
        logits = case.logits.clone().requires_grad_()
        loss = power_grad_cross_entropy if power else F.cross_entropy
        extra: dict[str, Any] = {"alpha": 0.3} if power else {}
        return torch.autograd.grad(loss(logits, target, **case.options, **extra).sum(), target)[0]

    assert_close(target_gradient(power=True), target_gradient(power=False), 1e-14)


def test_without_grad_only_the_value_is_made() -> None:
    case = make_case()
    with torch.no_grad():
        loss = power_grad_cross_entropy(case.logits.requires_grad_(), case.target, alpha=0.3)
    assert not loss.requires_grad
    assert torch.equal(loss, F.cross_entropy(case.logits.detach(), case.target))


def test_gradient_reaches_the_weights_of_a_network() -> None:
    case = make_case(shape=(6, 5), dtype=torch.float32)
    features = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    layer = torch.nn.Linear(3, 5)
    torch.autograd.backward(power_grad_cross_entropy(layer(features), case.target, alpha=0.3))
    logit_grad = pgt(Case(layer(features).detach(), case.target, {}), 0.3)[1] / 0.5  # gradient() starts at 0.5
    assert layer.weight.grad is not None
    assert_close(layer.weight.grad, logit_grad.T @ features, 1e-6)


# --- precision -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("road", [{}, {"label_smoothing": 0.1}, {"target": "soft"}, {"weighted": True}], ids=str)
def test_half_precision_is_no_worse_than_torchs_own(dtype: torch.dtype, road: dict[str, Any]) -> None:
    case = make_case(shape=(64, 100), dtype=dtype, **road)
    wide_options = {k: v.float() if isinstance(v, Tensor) else v for k, v in case.options.items()}
    target = case.target.float() if case.target.is_floating_point() else case.target
    truth = oracle(Case(case.logits.float(), target, wide_options), 0.3)

    for ours, theirs, exact in zip(pgt(case, 0.3), oracle(case, 0.3), truth, strict=True):
        assert ours.dtype == theirs.dtype
        allowed = (theirs.float() - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max() / 2
        assert (ours.float() - exact).abs().max() <= allowed


@pytest.mark.parametrize("road", [{}, {"label_smoothing": 0.1}, {"target": "soft"}, {"weighted": True}], ids=str)
def test_autocast_returns_fp32_from_bf16_logits(road: dict[str, Any]) -> None:
    case = make_case(shape=(64, 100), dtype=torch.bfloat16, **road)
    if "weight" in case.options:
        case.options["weight"] = case.options["weight"].float()
    wide = Case(case.logits.float(), case.target.float() if case.target.is_floating_point() else case.target, case.options)
    with torch.autocast("cpu", torch.bfloat16):
        loss, grad = pgt(case, 0.3)
        assert loss.dtype == F.cross_entropy(case.logits, case.target, **case.options).dtype == torch.float32
    truth, exact = oracle(wide, 0.3)
    assert_close(loss, truth, 1e-6)
    assert grad.dtype == torch.bfloat16
    assert_close(grad.float(), exact, torch.finfo(torch.bfloat16).eps)  # one rounding, at the end


def test_a_bf16_layer_under_autocast_trains_with_the_fp32_gradient() -> None:
    features = torch.randn(32, 8, generator=torch.Generator().manual_seed(2))
    target = torch.randint(10, (32,), generator=torch.Generator().manual_seed(3))
    layer = torch.nn.Linear(8, 10)
    with torch.autocast("cpu", torch.bfloat16):
        loss = power_grad_cross_entropy(layer(features), target, alpha=0.3)
    torch.autograd.backward(loss)
    wide = layer(features)
    (exact,) = torch.autograd.grad(F.cross_entropy(0.3 * wide, target) / 0.3, layer.weight)
    assert layer.weight.grad is not None
    assert_close(layer.weight.grad, exact, 2e-2)  # inputs, weights and gradient each rounded to 8 bits


def test_fp16_gradients_below_its_smallest_number_survive_a_loss_scale() -> None:
    """1/N of a small entry must not be formed in fp16 before the scale arrives."""
    logits = torch.zeros(4096, 1000, dtype=torch.float16, requires_grad=True)
    target = torch.zeros(4096, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        torch.autograd.backward(power_grad_cross_entropy(logits, target, alpha=0.3) * 65536.0)
    assert logits.grad is not None
    assert logits.grad[0, 1].item() == pytest.approx(65536.0 / 4096 / 1000, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("road", ROADS, ids=str)
def test_cuda_gives_the_gradient_of_the_cpu(road: dict[str, Any]) -> None:
    case = make_case(dtype=torch.float32, **road)
    options: dict[str, Any] = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in case.options.items()}
    value, grad = pgt(case, 0.3)
    logits = case.logits.cuda().requires_grad_()
    loss = power_grad_cross_entropy(logits, case.target.cuda(), alpha=0.3, **options)
    assert_close(loss.detach().cpu(), value, 1e-6)
    upstream = torch.linspace(0.5, 1.5, max(1, loss.numel()), device="cuda").reshape(loss.shape)
    assert_close(torch.autograd.grad(loss, logits, upstream)[0].cpu(), grad, 1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_autocast_in_fp16_keeps_the_loss_in_fp32_and_bears_a_loss_scale() -> None:
    case = make_case(shape=(256, 1000), dtype=torch.float16)
    exact = oracle(Case(case.logits.float(), case.target, {}), 0.3)[1] / 0.5  # gradient() starts at 0.5
    logits = case.logits.cuda().requires_grad_()
    with torch.autocast("cuda", torch.float16):
        loss = power_grad_cross_entropy(logits, case.target.cuda(), alpha=0.3)
    assert loss.dtype == torch.float32
    (grad,) = torch.autograd.grad(loss * 65536.0, logits)
    assert_close(grad.cpu().float() / 65536.0, exact, torch.finfo(torch.float16).eps)


# --- what the paper proves ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.05, 0.3, 0.92])
def test_the_transform_keeps_order_and_moves_entries_towards_its_threshold(alpha: float) -> None:
    """Section 3: above the stationary threshold (sum p^alpha)^(1 / (alpha - 1)) entries shrink, below it they grow."""
    logits = torch.randn(200, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    p = torch.softmax(logits, 1)
    q = power_softmax(logits, alpha, dim=1)
    threshold = (p**alpha).sum(1, keepdim=True) ** (1 / (alpha - 1))

    torch.testing.assert_close(q, p**alpha / (p**alpha).sum(1, keepdim=True))
    ordered = q.gather(1, p.argsort(1))
    assert (ordered.diff(dim=1) >= 0).all()
    assert torch.equal(q < p, p > threshold)


def test_the_threshold_rises_with_alpha_from_one_over_c() -> None:
    p = torch.softmax(torch.randn(50, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 1)
    thresholds = torch.stack([(p**alpha).sum(1) ** (1 / (alpha - 1)) for alpha in (0.0, 0.05, 0.3, 0.6, 0.92)])
    torch.testing.assert_close(thresholds[0], torch.full((50,), 0.1, dtype=torch.float64))
    assert (thresholds.diff(dim=0) > 0).all()


# --- the module and the errors -------------------------------------------------------------------------------------------------------


def test_the_module_is_the_function() -> None:
    case = make_case(weighted=True, label_smoothing=0.1, ignored=0.3)
    module = PowerGradCrossEntropyLoss(alpha=0.3, **case.options)
    logits = case.logits.clone().requires_grad_()
    value, grad = pgt(case, 0.3)
    loss = module(logits, case.target)
    assert torch.equal(loss.detach(), value)
    assert torch.equal(gradient(loss, logits), grad)


def test_the_modules_weight_moves_with_it() -> None:
    assert PowerGradCrossEntropyLoss(weight=torch.ones(3)).double().state_dict()["weight"].dtype == torch.float64


@pytest.mark.parametrize("alpha", [-0.1, 1.4, float("nan"), INF])
def test_alpha_outside_0_to_1_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"alpha=.*: must be in \[0, 1\]"):
        PowerGradCrossEntropyLoss(alpha=alpha)
    with pytest.raises(ValueError, match=r"alpha=.*: must be in \[0, 1\]"):
        power_grad_cross_entropy(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), alpha=alpha)


def bad(logits: tuple[int, ...], target: Tensor, **options: Any) -> Any:
    return pytest.param(torch.zeros(logits), target, options, id=f"{logits} {tuple(target.shape)} {target.dtype} {sorted(options)}")


@pytest.mark.parametrize(
    ("logits", "target", "options"),
    [
        bad((2, 3), torch.zeros(3, dtype=torch.int64)),
        bad((2, 3), torch.zeros(2)),
        bad((2, 3), torch.zeros(2, dtype=torch.int32)),
        bad((2, 3), torch.zeros(2, 3, dtype=torch.int64)),
        bad((2, 3), torch.zeros(2, 3), ignore_index=1),
        bad((2, 3, 4), torch.zeros(2, dtype=torch.int64)),
        bad((3,), torch.zeros(1, dtype=torch.int64)),
        bad((), torch.zeros((), dtype=torch.int64)),
        bad((2, 0), torch.zeros(2, dtype=torch.int64)),
        bad((2, 3), torch.zeros(2, dtype=torch.int64), weight=torch.ones(2)),
        bad((2, 3), torch.zeros(2, dtype=torch.int64), weight=torch.ones(3, 1)),
        bad((2, 3), torch.zeros(2, dtype=torch.int64), reduction="batchmean"),
        bad((2, 3), torch.zeros(2, dtype=torch.int64), label_smoothing=1.1),
        bad((2, 3), torch.zeros(2, dtype=torch.int64), label_smoothing=-0.1),
    ],
)
def test_what_does_not_fit_is_refused_before_any_arithmetic(logits: Tensor, target: Tensor, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be|leave it|convert with"):
        power_grad_cross_entropy(logits, target, alpha=0.3, **options)


def test_integer_logits_are_refused() -> None:
    with pytest.raises(ValueError, match="must be a float tensor"):
        power_grad_cross_entropy(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), alpha=0.3)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_class_beyond_the_last_is_torchs_index_error(reduction: Reduction) -> None:
    with pytest.raises(IndexError, match="out of bounds"):
        power_grad_cross_entropy(torch.zeros(1, 3, requires_grad=True), torch.tensor([3]), alpha=0.3, reduction=reduction)
