"""The optimizer of a run, from its spec."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from powergrad.spec import AdamWSpec, LionSpec, MuonSpec, OptimizerSpec, SGDSpec

# One kernel over all parameters. On one core a ResNet-18's SGD step takes 5 ms instead of 14 (AdamW 6 instead of 22), with equal bits
# from run to run; elsewhere torch chooses.
FUSED_DEVICES = ("cpu", "cuda")


def build_optimizer(
    model: nn.Module, spec: OptimizerSpec, *, device: torch.device | str, classifiers: tuple[str, ...] = ("fc",)
) -> torch.optim.Optimizer:
    """The optimizer over every parameter that is trained, which is on `device`, the `lr` of each group the peak rate.

    Weight decay falls on all of them, biases and normalisation included, as in the recipe of arXiv 2111.12495, section 4, unless
    `decay_norm_and_bias` is false.  classifiers: dotted names of the last layers, which Muon leaves to AdamW, as it does
    vectors (arXiv 2502.16982, section 2.2); with Nesterov's momentum, to AdamW with it (NAdamW).
    """
    fused = True if torch.device(device).type in FUSED_DEVICES else None
    groups = _groups(model, spec, apart=classifiers if isinstance(spec, MuonSpec) else ())
    match spec:
        case SGDSpec():
            return torch.optim.SGD(groups, lr=spec.lr, momentum=spec.momentum, nesterov=spec.nesterov, fused=fused)
        case AdamWSpec():
            return torch.optim.AdamW(groups, lr=spec.lr, betas=(spec.beta1, spec.beta2), eps=spec.eps, fused=fused)
        case LionSpec():
            from timm.optim.lion import Lion  # here, because timm takes seconds to import

            return Lion(groups, lr=spec.lr, betas=(spec.beta1, spec.beta2))
        case MuonSpec():
            from timm.optim.muon import Muon

            scale = 1.0 if spec.adamw_lr is None else spec.adamw_lr / spec.lr
            return Muon(groups, lr=spec.lr, momentum=spec.momentum, nesterov=spec.nesterov, fallback_lr_scale=scale)


def _groups(model: nn.Module, spec: OptimizerSpec, *, apart: tuple[str, ...]) -> list[dict[str, Any]]:
    """Parameters by their weight decay and by whether they belong to a module that `apart` names; in the model's order."""
    prefixes = tuple(f"{name}." for name in apart)
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = spec.weight_decay if spec.decay_norm_and_bias or parameter.dim() > 1 else 0.0
            is_apart = name.startswith(prefixes)
            groups.setdefault((decay, is_apart), []).append(parameter)
    fallback = {"use_fallback": True}
    return [{"params": members, "weight_decay": decay} | (fallback if is_apart else {}) for (decay, is_apart), members in groups.items()]
