"""Gradient clipping between the backward pass and the update. With a loss scaler: unscale first."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from powergrad.spec import ClipSpec

AGC_EPS = 1e-3  # Brock et al. 2021, arXiv 2102.06171, section 4.1: lets weights that are zero leave it
SMALLEST_NORM = 1e-6  # keeps a zero gradient from dividing by zero


def clip_gradients(model: nn.Module, spec: ClipSpec, *, classifiers: tuple[str, ...] = ("fc",)) -> Tensor | None:
    """Clip the gradients in place. Returns the global L2 norm found before `norm` clipping, on their device; None for the other modes.

    agc bounds each unit's gradient norm by spec.value times its weight norm (arXiv 2102.06171, equation 3), the classifiers, whose dotted
    names are given, left out as Brock et al. do. Bit for bit timm's `adaptive_clip_grad`.
    """
    match spec.mode:
        case "norm":
            return torch.nn.utils.clip_grad_norm_(model.parameters(), spec.value)
        case "value":
            torch.nn.utils.clip_grad_value_(model.parameters(), spec.value)
        case "agc":
            excluded = tuple(f"{name}." for name in classifiers)
            for name, parameter in model.named_parameters():
                if not name.startswith(excluded):
                    _clip_to_weight_(parameter, spec.value)
    return None


@torch.no_grad()
def _clip_to_weight_(parameter: Tensor, factor: float) -> None:
    if parameter.grad is None:
        return
    bound = _unit_norms(parameter).clamp_(min=AGC_EPS).mul_(factor)
    norms = _unit_norms(parameter.grad)
    scale = torch.where(norms < bound, 1.0, bound / norms.clamp(min=SMALLEST_NORM))
    parameter.grad.mul_(scale)


def _unit_norms(value: Tensor) -> Tensor:
    """L2 norm of each output unit of a weight, kept broadcastable; of the whole of a bias, gain or scalar."""
    units = tuple(range(1, value.dim())) or None
    norms: Tensor = torch.linalg.vector_norm(value, dim=units, keepdim=units is not None)
    return norms
