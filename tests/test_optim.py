"""The built optimizers against the update rules written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from powergrad.optim import build_optimizer
from powergrad.spec import AdamWSpec, OptimizerSpec, SGDSpec

torch.set_num_threads(1)


def make_model() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4)).double()
    rng = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=rng)
    return model


def gradients(model: nn.Module, step: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(100 + step)
    return [torch.randn(parameter.shape, generator=rng, dtype=parameter.dtype) for parameter in model.parameters()]


def trained(model: nn.Module, spec: OptimizerSpec, *, steps: int = 3) -> list[Tensor]:
    optimizer = build_optimizer(model, spec, device="cpu")
    for step in range(steps):
        for parameter, grad in zip(model.parameters(), gradients(model, step), strict=True):
            parameter.grad = grad
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def by_hand_sgd(model: nn.Module, spec: SGDSpec, *, steps: int = 3) -> list[Tensor]:
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    averages = [torch.zeros_like(weight) for weight in weights]
    for step in range(steps):
        for weight, average, grad in zip(weights, averages, gradients(model, step), strict=True):
            decayed = grad + spec.weight_decay * weight
            average.mul_(spec.momentum).add_(decayed)
            weight.sub_(spec.lr * (decayed + spec.momentum * average if spec.nesterov else average))
    return weights


def by_hand_adamw(model: nn.Module, spec: AdamWSpec, *, steps: int = 3) -> list[Tensor]:
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    first, second = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    for step in range(steps):
        for weight, m, v, grad in zip(weights, first, second, gradients(model, step), strict=True):
            weight.mul_(1 - spec.lr * spec.weight_decay)
            m.mul_(spec.beta1).add_((1 - spec.beta1) * grad)
            v.mul_(spec.beta2).add_((1 - spec.beta2) * grad**2)
            m_hat, v_hat = m / (1 - spec.beta1 ** (step + 1)), v / (1 - spec.beta2 ** (step + 1))
            weight.sub_(spec.lr * m_hat / (v_hat.sqrt() + spec.eps))
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


@pytest.mark.parametrize("spec", [SGDSpec(), AdamWSpec(name="adamw")])
def test_equal_runs_end_with_equal_bits(spec: OptimizerSpec) -> None:
    for one, other in zip(trained(make_model(), spec), trained(make_model(), spec), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("spec", [SGDSpec(), AdamWSpec(name="adamw")])
def test_the_rate_can_be_set_before_every_step(spec: OptimizerSpec) -> None:
    model = make_model()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = build_optimizer(model, spec, device=torch.device("cpu"))
    for group in optimizer.param_groups:
        assert group["lr"] == spec.lr
        group["lr"] = 0.0
    for parameter, grad in zip(model.parameters(), gradients(model, 0), strict=True):
        parameter.grad = grad
    optimizer.step()
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)


def test_the_state_can_be_saved_and_goes_on_with_the_same_bits() -> None:
    whole = trained(make_model(), SGDSpec(), steps=2)
    model = make_model()
    optimizer = build_optimizer(model, SGDSpec(), device="cpu")
    for step in range(2):
        for parameter, grad in zip(model.parameters(), gradients(model, step), strict=True):
            parameter.grad = grad
        optimizer.step()
        saved = optimizer.state_dict()
        optimizer = build_optimizer(model, SGDSpec(), device="cpu")
        optimizer.load_state_dict(saved)
    for parameter, expected in zip(model.parameters(), whole, strict=True):
        assert torch.equal(parameter, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("spec", [SGDSpec(), AdamWSpec(name="adamw")])
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
