"""The learning rate and the alpha of every step as pure functions: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from powergrad.spec import AlphaSchedule, ConstantSpec, CosineSpec, LinearSpec, OneCycleSpec, StepSpec, TrainSpec


def lr_at(step: int, *, spec: TrainSpec, steps_per_epoch: int) -> float:
    """The learning rate of update `step`, the first being 0.

    With w steps of warm-up and n until the cool-down: while step < w it climbs in equal steps from warmup_lr (where that is 0, from
    peak / (w + 1), so that the first update moves) and step w has the peak. From there on cosine and linear go down to min_lr at step n and
    stay; constant is the peak; step is the peak times gamma for every milestone (in epochs) reached, one that lies within the warm-up
    taking effect there. onecycle is `torch.optim.lr_scheduler.OneCycleLR` over n steps (the momentum stays).
    Raises ValueError for a negative step or an epoch without steps.
    """
    _check(step, steps_per_epoch)
    peak, schedule, warmup = spec.optimizer.lr, spec.schedule, spec.warmup_epochs * steps_per_epoch
    cooldown = 0 if isinstance(schedule, ConstantSpec) else schedule.cooldown_epochs
    end = (spec.epochs - cooldown) * steps_per_epoch

    match schedule:
        case OneCycleSpec():
            return _one_cycle(min(step, end - 1), end, peak, schedule)
        case StepSpec(gamma=gamma):
            return _climb(step, warmup, peak, schedule.warmup_lr) * gamma ** sum(
                milestone * steps_per_epoch <= step for milestone in spec.milestones
            )
        case _ if step < warmup or isinstance(schedule, ConstantSpec):
            return _climb(step, warmup, peak, schedule.warmup_lr)
        case CosineSpec(min_lr=low):
            return low + (peak - low) * (1.0 + math.cos(math.pi * _share(step - warmup, end - warmup))) / 2.0
        case LinearSpec(min_lr=low):
            return low + (peak - low) * (1.0 - _share(step - warmup, end - warmup))


def alpha_at(step: int, *, spec: TrainSpec, steps_per_epoch: int) -> float:
    """The alpha of PowerGrad Transform at update `step`, the first being 0.

    A schedule has `start` at step 0 and `end` from the first step after its epochs on; in between it follows a line or half a cosine.
    """
    _check(step, steps_per_epoch)
    alpha = spec.loss.alpha
    if not isinstance(alpha, AlphaSchedule):
        return alpha
    share = _share(step, (alpha.epochs or spec.epochs) * steps_per_epoch)
    if share == 1.0:
        return alpha.end  # the sum below may miss it by a last bit
    if alpha.shape == "cosine":
        share = (1.0 - math.cos(math.pi * share)) / 2.0
    return alpha.start + (alpha.end - alpha.start) * share


def _check(step: int, steps_per_epoch: int) -> None:
    if step < 0 or steps_per_epoch < 1:
        raise ValueError(f"step={step}, steps_per_epoch={steps_per_epoch}: must be at least 0 and at least 1")


def _climb(step: int, warmup: int, peak: float, begin: float) -> float:
    if step >= warmup:
        return peak
    return begin + (peak - begin) * (step / warmup) if begin > 0.0 else peak * ((step + 1) / (warmup + 1))


def _share(step: int, length: int) -> float:
    """Of the way from 0 to `length`, held at both ends."""
    return min(max(step, 0) / length, 1.0)


def _one_cycle(step: int, steps: int, peak: float, schedule: OneCycleSpec) -> float:
    begin = peak / schedule.start_factor
    top = schedule.peak_at * steps - 1  # torch's: a fraction of a step is a fraction of the way
    if step <= top and top > 0:  # else there is no way up to the peak
        return _half_cosine(begin, peak, step / top)
    return _half_cosine(peak, begin / schedule.end_factor, (step - top) / max(steps - 1 - top, 1e-9))


def _half_cosine(begin: float, end: float, share: float) -> float:
    return end + (begin - end) * (1.0 + math.cos(math.pi * share)) / 2.0
