"""MixUp and CutMix: images and labels of a batch mixed with those of their neighbours.

The neighbour of the image at one place of the batch is the one at the next place, and the last one's is the first: a part of the batch
is handed one image more than it gives back, so its result does not depend on how the batch was split.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor

from powergrad.data.draws import Stream, integers
from powergrad.spec import AugmentSpec

QUANTILES = 2**14
"""Shares that can be drawn, each the middle of as many equally likely ranges."""


@dataclass(frozen=True)
class Mixing:
    """MixUp (Zhang et al. 2017, arXiv 1710.09412), CutMix (Yun et al. 2019, arXiv 1905.04899), or for each image one of the two.

    The image's own share is drawn from Beta(a, a), for each image its own.
    """

    seed: int
    mixup: float
    """a; 0 is off."""
    cutmix: float
    """a; 0 is off."""
    classes: int

    def __post_init__(self) -> None:
        if not (self.mixup >= 0 and self.cutmix >= 0 and self.mixup + self.cutmix > 0):
            raise ValueError(
                f"mixup={self.mixup}, cutmix={self.cutmix}: must be positive, or 0 for off, and not both off; leave mixing out"
            )

    def __call__(self, images: Tensor, labels: Tensor, index: Tensor, *, epoch: int) -> tuple[Tensor, Tensor]:
        """Mixed images (n, C, S, S) and targets (n, classes) float32, each row of one sum: 1.

        images: (n + 1, C, S, S) float; labels, index: (n + 1,) int64. The last of each is the neighbour of the one before, and no more.
        """
        if not len(images) == len(labels) == len(index) > 1:
            raise ValueError(
                f"{len(images)} images, {len(labels)} labels, {len(index)} indices: must be equally many, two at least; append each batch's next"
            )
        own, draws = images[:-1], index[:-1]
        if not self.cutmix:
            share = self.shares(draws, self.mixup, epoch=epoch)
            mixed = _mean(own, images[1:], share)
        else:
            inside = self.pasted(draws, size=images.shape[-1], epoch=epoch)
            share = 1 - inside.float().mean(dim=(1, 2))
            mixed = torch.where(inside[:, None], images[1:], own)
        if self.cutmix and self.mixup:
            cut = integers(draws, 2, seed=self.seed, stream=Stream.MIX_KIND, epoch=epoch).bool()
            whole = self.shares(draws, self.mixup, epoch=epoch)
            mixed = torch.where(cut[:, None, None, None], mixed, _mean(own, images[1:], whole))
            share = torch.where(cut, share, whole)
        return mixed, self.targets(labels, share)

    def shares(self, index: Tensor, a: float, *, epoch: int) -> Tensor:
        """(n,) float32 in [0, 1], distributed as Beta(a, a)."""
        drawn = integers(index, QUANTILES, seed=self.seed, stream=Stream.MIX_SHARE, epoch=epoch)
        return _quantiles(a, index.device)[drawn]

    def pasted(self, index: Tensor, *, size: int, epoch: int) -> Tensor:
        """(n, size, size) bool: the rectangle that CutMix takes from the neighbour, cut off at the edges."""
        share = self.shares(index, self.cutmix, epoch=epoch).double()
        half = (0.5 * size * (1 - share).sqrt()).long()[:, None]
        steps = torch.arange(size, device=index.device)

        def covered(stream: Stream) -> Tensor:
            centre = integers(index, size, seed=self.seed, stream=stream, epoch=epoch)[:, None]
            return (steps >= centre - half) & (steps < centre + half)  # (n, size)

        return covered(Stream.MIX_ROW)[:, :, None] & covered(Stream.MIX_COLUMN)[:, None, :]

    def targets(self, labels: Tensor, share: Tensor) -> Tensor:
        """Probabilities (n, classes): `share` (n,) for the own label, the rest for the neighbour's. labels: (n + 1,)."""
        sure = F.one_hot(labels, self.classes).float()
        return sure[:-1] * share[:, None] + sure[1:] * (1 - share)[:, None]


def build_mixing(spec: AugmentSpec, *, seed: int, classes: int) -> Mixing | None:
    """What a spec says is done to images and labels together; None where that is nothing."""
    return Mixing(seed, spec.mixup, spec.cutmix, classes) if spec.mixup or spec.cutmix else None


def _mean(own: Tensor, other: Tensor, share: Tensor) -> Tensor:
    # two products and a sum: `lerp` rounds once or twice, depending on where in the batch the element is
    return own * share[:, None, None, None] + other * (1 - share)[:, None, None, None]


@lru_cache(maxsize=8)
def _quantiles(a: float, device: torch.device) -> Tensor:
    """(QUANTILES,) float32: the inverse of Beta(a, a)'s distribution function."""
    from scipy.special import betaincinv  # type: ignore[import-untyped]  # here: half a second that only a run with mixing needs

    middles = (torch.arange(QUANTILES, dtype=torch.float64) + 0.5) / QUANTILES
    return torch.from_numpy(betaincinv(a, a, middles.numpy())).to(device, torch.float32)
