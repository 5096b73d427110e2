"""The learning rate of every step as a pure function: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from powergrad.spec import CosineSpec, StepSpec, TrainSpec


def lr_at(step: int, *, spec: TrainSpec, steps_per_epoch: int) -> float:
    """The learning rate of update `step`, the first being 0.

    With w steps of warm-up and n in all: peak * (step + 1) / (w + 1) while step < w, so the first update moves and step w has the peak.
    From there on cosine is peak * (1 + cos(pi * (step - w) / (n - w))) / 2, zero at step n; constant is the peak; step is the peak
    times gamma for every milestone (in epochs) reached, one that lies within the warm-up taking effect there.
    Raises ValueError for a negative step or an epoch without steps.
    """
    if step < 0 or steps_per_epoch < 1:
        raise ValueError(f"step={step}, steps_per_epoch={steps_per_epoch}: must be at least 0 and at least 1")
    warmup_steps = spec.warmup_epochs * steps_per_epoch
    warmup = min(1.0, (step + 1) / (warmup_steps + 1))

    match spec.schedule:
        case CosineSpec():
            decay = _half_cosine(step - warmup_steps, spec.epochs * steps_per_epoch - warmup_steps)
        case StepSpec(gamma=gamma):
            decay = gamma ** sum(milestone * steps_per_epoch <= step for milestone in spec.milestones)
        case _:
            decay = 1.0
    return spec.optimizer.lr * warmup * decay


def _half_cosine(step: int, length: int) -> float:
    """From 1 at step 0 to 0 at `length`, held at both ends."""
    return (1.0 + math.cos(math.pi * min(max(step, 0) / length, 1.0))) / 2.0
