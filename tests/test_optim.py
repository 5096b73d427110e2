"""The built optimizers against the update rules written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from powergrad.optim import build_optimizer
from powergrad.spec import AdamWSpec, LionSpec, MuonSpec, OptimizerSpec, SGDSpec

torch.set_num_threads(1)

CLASSIFIERS = ("3",)
EVERY: list[OptimizerSpec] = [SGDSpec(), AdamWSpec(name="adamw"), LionSpec(name="lion"), MuonSpec(name="muon")]


def make_model() -> nn.Module:
    """Its convolution is large enough for Muon, whose matrices have four rows and columns at least."""
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(24, 4)).double()
    rng = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=rng)
    return model


def gradients(model: nn.Module, step: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(100 + step)
    return [torch.randn(parameter.shape, generator=rng, dtype=parameter.dtype) for parameter in model.parameters()]


def trained(model: nn.Module, spec: OptimizerSpec, *, steps: int = 3) -> list[Tensor]:
    optimizer = build_optimizer(model, spec, device="cpu", classifiers=CLASSIFIERS)
    for step in range(steps):
        take_step(model, optimizer, step)
    return [parameter.detach() for parameter in model.parameters()]


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    for parameter, grad in zip(model.parameters(), gradients(model, step), strict=True):
        parameter.grad = grad
    optimizer.step()


def decay_of(weight: Tensor, spec: OptimizerSpec) -> float:
    return spec.weight_decay if spec.decay_norm_and_bias or weight.dim() > 1 else 0.0


def by_hand_sgd(model: nn.Module, spec: SGDSpec, *, steps: int = 3) -> list[Tensor]:
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    averages = [torch.zeros_like(weight) for weight in weights]
    for step in range(steps):
        for weight, average, grad in zip(weights, averages, gradients(model, step), strict=True):
            decayed = grad + decay_of(weight, spec) * weight
            average.mul_(spec.momentum).add_(decayed)
            weight.sub_(spec.lr * (decayed + spec.momentum * average if spec.nesterov else average))
    return weights


def by_hand_adamw(model: nn.Module, spec: AdamWSpec, *, steps: int = 3) -> list[Tensor]:
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    first, second = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    for step in range(steps):
        for weight, m, v, grad in zip(weights, first, second, gradients(model, step), strict=True):
            weight.mul_(1 - spec.lr * decay_of(weight, spec))
            m.mul_(spec.beta1).add_((1 - spec.beta1) * grad)
            v.mul_(spec.beta2).add_((1 - spec.beta2) * grad**2)
            m_hat, v_hat = m / (1 - spec.beta1 ** (step + 1)), v / (1 - spec.beta2 ** (step + 1))
            weight.sub_(spec.lr * m_hat / (v_hat.sqrt() + spec.eps))
    return weights


def by_hand_lion(model: nn.Module, spec: LionSpec, *, steps: int = 3) -> list[Tensor]:
    """Chen et al. 2023, algorithm 2."""
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    averages = [torch.zeros_like(weight) for weight in weights]
    for step in range(steps):
        for weight, average, grad in zip(weights, averages, gradients(model, step), strict=True):
            update = torch.sign(spec.beta1 * average + (1 - spec.beta1) * grad)
            weight.sub_(spec.lr * (update + decay_of(weight, spec) * weight))
            average.mul_(spec.beta2).add_((1 - spec.beta2) * grad)
    return weights


@pytest.mark.parametrize("spec", [SGDSpec(), SGDSpec(lr=0.01, nesterov=False), SGDSpec(momentum=0.0, nesterov=False, weight_decay=0.1)])
def test_sgd_decays_every_parameter_and_follows_its_rule(spec: SGDSpec) -> None:
    model = make_model()
    expected = by_hand_sgd(model, spec)
    for actual, wanted in zip(trained(model, spec), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spec", [AdamWSpec(name="adamw"), AdamWSpec(name="adamw", beta1=0.5, beta2=0.9, eps=1e-3, weight_decay=0.3)])
def test_adamw_decays_every_parameter_and_follows_its_rule(spec: AdamWSpec) -> None:
    model = make_model()
    expected = by_hand_adamw(model, spec)
    for actual, wanted in zip(trained(model, spec), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("spec", [LionSpec(name="lion"), LionSpec(name="lion", lr=0.01, beta1=0.5, beta2=0.8, weight_decay=0.3)])
def test_lion_follows_its_rule(spec: LionSpec) -> None:
    model = make_model()
    expected = by_hand_lion(model, spec)
    for actual, wanted in zip(trained(model, spec), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


def test_without_decay_of_norm_and_bias_sgd_decays_matrices_only() -> None:
    spec = SGDSpec(weight_decay=0.3, decay_norm_and_bias=False)
    model = make_model()
    expected = by_hand_sgd(model, spec)
    for actual, wanted in zip(trained(model, spec), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


def test_without_decay_of_norm_and_bias_adamw_decays_matrices_only() -> None:
    spec = AdamWSpec(name="adamw", lr=0.1, weight_decay=0.5, decay_norm_and_bias=False)
    model = make_model()
    expected = by_hand_adamw(model, spec)
    for actual, wanted in zip(trained(model, spec), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("spec", EVERY, ids=lambda spec: spec.name)
def test_only_the_decay_of_vectors_depends_on_the_switch(spec: OptimizerSpec) -> None:
    """With gradients of zero, what moves is what decays."""
    decaying = spec.model_copy(update={"weight_decay": 0.3, "decay_norm_and_bias": False})
    model = make_model()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    build_optimizer(model, decaying, device="cpu", classifiers=CLASSIFIERS).step()
    moved = [not torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before, strict=True)]
    assert moved == [parameter.dim() > 1 for parameter in model.parameters()]


def test_muon_leaves_vectors_and_the_classifier_to_adamw() -> None:
    """Without Nesterov's form, which AdamW would take too (timm's NAdamW). Betas and eps are timm's for the rest of a Muon run."""
    spec = MuonSpec(name="muon", lr=0.02, adamw_lr=0.005, nesterov=False, weight_decay=0.1)
    model = make_model()
    expected = by_hand_adamw(model, AdamWSpec(name="adamw", lr=0.005, beta1=0.9, beta2=0.95, eps=1e-7, weight_decay=0.1))
    names = [name for name, _ in model.named_parameters()]
    differs = [
        not torch.allclose(actual, wanted, rtol=1e-9, atol=1e-9) for actual, wanted in zip(trained(model, spec), expected, strict=True)
    ]
    assert dict(zip(names, differs, strict=True)) == {name: name == "0.weight" for name in names}


@pytest.mark.parametrize("gradient_scale", [1e-3, 1.0, 1e3])
def test_muon_moves_a_convolution_by_the_nearest_orthogonal_matrix(gradient_scale: float) -> None:
    """Against the singular value decomposition of the gradient, whatever its size; Newton and Schulz's five steps leave singular values of
    0.7 to 1.2. The factor 0.2 sqrt(max(rows, columns)) gives the update AdamW's root mean square (arXiv 2502.16982, section 2.2)."""
    model = make_model()
    conv = model.get_parameter("0.weight")
    before = conv.detach().flatten(1).clone()
    conv.grad = gradients(model, 0)[0] * gradient_scale
    left, _, right = torch.linalg.svd(conv.grad.flatten(1), full_matrices=False)
    build_optimizer(model, MuonSpec(name="muon", lr=0.5), device="cpu", classifiers=CLASSIFIERS).step()

    update = (before - conv.detach().flatten(1)) / (0.5 * 0.2 * 18**0.5)
    values = torch.linalg.svdvals(update)
    assert values.min() > 0.6
    assert values.max() < 1.3
    in_its_basis = left.T @ update @ right.T
    off_diagonal = in_its_basis - torch.diag(in_its_basis.diagonal())
    assert off_diagonal.abs().max() < 0.05  # its matrix products are in bf16


def test_muon_lets_a_network_learn() -> None:
    model = make_model()
    optimizer = build_optimizer(model, MuonSpec(name="muon"), device="cpu", classifiers=CLASSIFIERS)
    rng = torch.Generator().manual_seed(7)
    images, labels = torch.randn(32, 2, 4, 4, generator=rng, dtype=torch.float64), torch.randint(4, (32,), generator=rng)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("spec", EVERY, ids=lambda spec: spec.name)
def test_equal_runs_end_with_equal_bits(spec: OptimizerSpec) -> None:
    for one, other in zip(trained(make_model(), spec), trained(make_model(), spec), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("spec", EVERY, ids=lambda spec: spec.name)
def test_the_rate_can_be_set_before_every_step(spec: OptimizerSpec) -> None:
    model = make_model()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = build_optimizer(model, spec, device=torch.device("cpu"))
    for group in optimizer.param_groups:
        assert group["lr"] == spec.lr
        group["lr"] = 0.0
    take_step(model, optimizer, 0)
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)


@pytest.mark.parametrize("decay_norm_and_bias", [True, False])
@pytest.mark.parametrize("spec", EVERY, ids=lambda spec: spec.name)
def test_the_state_can_be_saved_and_goes_on_with_the_same_bits(spec: OptimizerSpec, decay_norm_and_bias: bool, tmp_path: Path) -> None:
    spec = spec.model_copy(update={"decay_norm_and_bias": decay_norm_and_bias})
    whole = trained(make_model(), spec)
    model = make_model()
    for step in range(3):
        optimizer = build_optimizer(model, spec, device="cpu", classifiers=CLASSIFIERS)
        if step > 0:
            optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
        take_step(model, optimizer, step)
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    for parameter, expected in zip(model.parameters(), whole, strict=True):
        assert torch.equal(parameter, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("spec", [SGDSpec(), AdamWSpec(name="adamw"), LionSpec(name="lion")])
def test_cuda_updates_are_those_of_the_cpu(spec: OptimizerSpec) -> None:
    expected = trained(make_model(), spec)
    model = make_model().cuda()
    optimizer = build_optimizer(model, spec, device="cuda:0")
    for step in range(3):
        for parameter, grad in zip(model.parameters(), gradients(make_model(), step), strict=True):
            parameter.grad = grad.cuda()
        optimizer.step()
    for parameter, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach().cpu(), wanted, rtol=1e-10, atol=1e-10)
