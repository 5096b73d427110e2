"""An exponential moving average of a network's weights, evaluated and kept beside them."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from powergrad.spec import EmaSpec


class Ema:
    """The average as a network of its own, on the same device. Buffers with fractions are averaged too, counters are copied."""

    def __init__(self, model: nn.Module, spec: EmaSpec) -> None:
        self.model = copy.deepcopy(model).requires_grad_(requires_grad=False)
        self._spec = spec

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move a share of 1 - decay towards the weights after `step` updates (the first is 1). Reads nothing from the device."""
        share = 1.0 - self._decay(step)
        for mine, theirs in zip(_tensors(self.model), _tensors(model), strict=True):
            if mine.is_floating_point():
                mine.lerp_(theirs, share)
            else:
                mine.copy_(theirs)

    def _decay(self, step: int) -> float:
        # the rule of TensorFlow's ExponentialMovingAverage with num_updates
        return min(self._spec.decay, (1 + step) / (10 + step)) if self._spec.warmup else self._spec.decay


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
