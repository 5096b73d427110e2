"""TrivialAugment and RandAugment: random operations of random strength, another for each image of a batch.

The operations, their strengths and their rounding are torchvision.transforms.v2's, which applies one operation of one strength to a
whole batch. Here every image has its own: the images of one operation are altered together, each by its own row of a table.
Sums and positions that could round either way are computed in integers or element by element, never by matrix products or convolutions
(whose order of additions depends on the batch and the device).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as vision  # type: ignore[import-untyped]

from powergrad.data.draws import Stream, integers, repeated

LEVELS = 31
"""Strengths from none to full, in both policies."""
LOOK_FROM = 2**23
"""Pixels of a batch from which a GPU alters only the images an operation was drawn for. To know them, the host waits for the device, so
smaller batches have every operation computed on all images, where that is cheaper. No bit depends on it."""


class Op(IntEnum):
    """In torchvision's order. The numbers are part of the bits: never renumber."""

    IDENTITY = 0
    SHEAR_X = 1
    SHEAR_Y = 2
    TRANSLATE_X = 3
    TRANSLATE_Y = 4
    ROTATE = 5
    BRIGHTNESS = 6
    COLOR = 7
    CONTRAST = 8
    SHARPNESS = 9
    POSTERIZE = 10
    SOLARIZE = 11
    AUTOCONTRAST = 12
    EQUALIZE = 13


@dataclass(frozen=True)
class Space:
    """The full strength of each kind of operation. Solarize always ends at inverting every pixel."""

    shear: float
    """Pixels per pixel."""
    translate: float
    """Pixels."""
    rotate: float
    """Degrees."""
    enhance: float
    """How far the factor of brightness, color, contrast and sharpness is from 1."""
    posterize: int
    """Bits taken off."""


@dataclass(frozen=True)
class Drawn:
    """What happens to each image: all (N,)."""

    op: Tensor
    level: Tensor
    """In [0, LEVELS)."""
    negative: Tensor
    """0 or 1: whether a strength that has a direction points the other way."""

    def at(self, chosen: Tensor) -> Drawn:
        return Drawn(self.op[chosen], self.level[chosen], self.negative[chosen])


@dataclass(frozen=True)
class TrivialAugment:
    """One operation per image, of any strength: TrivialAugment Wide (Müller & Hutter 2021, arXiv 2103.10158)."""

    def __call__(self, images: Tensor, index: Tensor, *, seed: int, epoch: int) -> Tensor:
        """images: (N, 1 or 3, S, S) uint8; index: (N,) int64. Returns the same shape."""
        drawn = self.drawn(index, seed=seed, epoch=epoch)
        return altered(images, drawn, self.space(images.shape[-1]), look=_looks(images))

    def drawn(self, index: Tensor, *, seed: int, epoch: int) -> Drawn:
        level = integers(index, LEVELS, seed=seed, stream=Stream.POLICY_LEVEL, epoch=epoch)
        return Drawn(_op(index, seed, epoch), level, _negative(index, seed, epoch))

    def space(self, size: int) -> Space:  # noqa: ARG002  # the other policy's depends on it
        return Space(shear=0.99, translate=32.0, rotate=135.0, enhance=0.99, posterize=6)


@dataclass(frozen=True)
class RandAugment:
    """Several operations per image, one after the other, all of one strength (Cubuk et al. 2019, arXiv 1909.13719)."""

    num_ops: int = 2
    magnitude: int = 9
    """In [0, LEVELS)."""

    def __call__(self, images: Tensor, index: Tensor, *, seed: int, epoch: int) -> Tensor:
        """images: (N, 1 or 3, S, S) uint8; index: (N,) int64. Returns the same shape."""
        space = self.space(images.shape[-1])
        for drawn in self.drawn(index, seed=seed, epoch=epoch):
            images = altered(images, drawn, space, look=_looks(images))
        return images

    def drawn(self, index: Tensor, *, seed: int, epoch: int) -> list[Drawn]:
        return [
            Drawn(_op(turn, seed, epoch), torch.full_like(turn, self.magnitude), _negative(turn, seed, epoch))
            for turn in repeated(index, self.num_ops).unbind(-1)
        ]

    def space(self, size: int) -> Space:
        return Space(shear=0.3, translate=150.0 / 331.0 * size, rotate=30.0, enhance=0.9, posterize=4)


def altered(images: Tensor, drawn: Drawn, space: Space, *, look: bool) -> Tensor:
    """Each image after its own operation. images: (N, 1 or 3, S, S) uint8.

    look: read on the host which images an operation is for, and compute it for these; else compute it for all and choose.
    """
    tables = _tables(space, images.shape[-1], images.device)
    out = images.clone() if look else images
    for ops, change in _CHANGES:
        member = (drawn.op >= ops[0]) & (drawn.op <= ops[-1])
        if not look:
            out = torch.where(member[:, None, None, None], change(images, drawn, tables), out)
        elif len(chosen := member.nonzero().squeeze(1)):
            out[chosen] = change(images[chosen], drawn.at(chosen), tables)
    return out


def _looks(images: Tensor) -> bool:
    return images.device.type == "cpu" or images.numel() >= LOOK_FROM


def _op(index: Tensor, seed: int, epoch: int) -> Tensor:
    return integers(index, len(Op), seed=seed, stream=Stream.POLICY_OP, epoch=epoch)


def _negative(index: Tensor, seed: int, epoch: int) -> Tensor:
    return integers(index, 2, seed=seed, stream=Stream.POLICY_SIGN, epoch=epoch)


@dataclass(frozen=True)
class _Tables:
    """The parameter of each operation by level, or by level and direction."""

    places: Tensor
    """(5, LEVELS, 2, 6) float32, for SHEAR_X to ROTATE: where a pixel comes from, x' = a x + b y + c, y' = d x + e y + f, from the centre."""
    own: Tensor
    """(LEVELS, 2) float32: the image's share in its blend with brightness', color's, contrast's or sharpness' opposite, in [0, 2]."""
    other: Tensor
    """(LEVELS, 2) float32: the opposite's share, in [-1, 1]."""
    kept_bits: Tensor
    """(LEVELS,) uint8 mask."""
    threshold: Tensor
    """(LEVELS,) int16: values from here on are inverted."""


@lru_cache(maxsize=16)
def _tables(space: Space, size: int, device: torch.device) -> _Tables:
    # linspace in float32 and the rest in Python's floats, as torchvision has them
    def strengths(full: float) -> list[tuple[float, float]]:
        return [(value, -value) for value in torch.linspace(0.0, full, LEVELS, dtype=torch.float32).tolist()]

    kinds = [
        (_shear_x, space.shear),
        (_shear_y, space.shear),
        (_right, space.translate),
        (_down, space.translate),
        (_rotated, space.rotate),
    ]
    places = [[[place(value, size) for value in pair] for pair in strengths(full)] for place, full in kinds]
    own = [[1.0 + value for value in pair] for pair in strengths(space.enhance)]
    bits = (8 - torch.arange(LEVELS) / ((LEVELS - 1) / space.posterize)).round().int()
    # rounded to float32 before it is rounded up: torchvision compares in that, and some products are whole numbers but for their last bit
    thresholds = torch.tensor(
        [255.0 * value for value in torch.linspace(1.0, 0.0, LEVELS, dtype=torch.float32).tolist()], dtype=torch.float32
    )
    return _Tables(
        places=torch.tensor(places, dtype=torch.float32, device=device),
        own=torch.tensor(own, dtype=torch.float32, device=device),
        other=torch.tensor([[1.0 - share for share in pair] for pair in own], dtype=torch.float32, device=device),
        kept_bits=(256 - (1 << (8 - bits))).to(device, torch.uint8),
        threshold=thresholds.ceil().to(device, torch.int16),
    )


# Where the pixel at (x, y) from the image's centre comes from.  Shears leave the upper left corner where it is.


def _shear_x(by: float, size: int) -> list[float]:
    return [1.0, by, by * size / 2, 0.0, 1.0, 0.0]


def _shear_y(by: float, size: int) -> list[float]:
    return [1.0, 0.0, 0.0, by, 1.0, by * size / 2]


def _right(by: float, _: int) -> list[float]:
    return [1.0, 0.0, -float(int(by)), 0.0, 1.0, 0.0]


def _down(by: float, _: int) -> list[float]:
    return [1.0, 0.0, 0.0, 0.0, 1.0, -float(int(by))]


def _rotated(degrees: float, _: int) -> list[float]:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [cos, -sin, 0.0, sin, cos, 0.0]


def _moved(images: Tensor, drawn: Drawn, tables: _Tables) -> Tensor:
    """The nearest pixel, black from outside."""
    size, middle = images.shape[-1], (images.shape[-1] - 1) / 2
    # other operations' rows, where all images are computed, are clamped into the table and thrown away afterwards
    place = tables.places[(drawn.op - Op.SHEAR_X).clamp(0, len(tables.places) - 1), drawn.level, drawn.negative]
    a, b, c, d, e, f = place[:, :, None, None].unbind(1)  # (N, 1, 1)
    steps = torch.arange(size, device=images.device) - middle
    x, y = steps[None, None, :], steps[None, :, None]
    column = (a * x + b * y + c + middle).round().long()  # (N, S, S)
    row = (d * x + e * y + f + middle).round().long()
    inside = (column >= 0) & (column < size) & (row >= 0) & (row < size)
    source = torch.where(inside, row * size + column, 0)[:, None].expand(images.shape)
    return images.flatten(2).gather(2, source.flatten(2)).view(images.shape) * inside[:, None]


def _brightened(images: Tensor, drawn: Drawn, tables: _Tables) -> Tensor:
    return _levels(images * _rows(tables.own[drawn.level, drawn.negative]))


def _coloured(images: Tensor, drawn: Drawn, tables: _Tables) -> Tensor:
    """A blend with the image's grey, or a distance from it; grey images stay as they are."""
    return images if images.shape[1] == 1 else _blended(images, _grey(images), drawn, tables)


def _contrasted(images: Tensor, drawn: Drawn, tables: _Tables) -> Tensor:
    """A blend with the mean of the image's grey."""
    grey = _grey(images)
    total = grey.sum(dim=(1, 2, 3), dtype=torch.int64)  # whole numbers have the same sum in any order
    return _blended(images, _rows((total / grey[0].numel()).float()), drawn, tables)


def _sharpened(images: Tensor, drawn: Drawn, tables: _Tables) -> Tensor:
    """A blend with the image blurred by a 3×3 kernel of ones around a 5, or a distance from it; the outermost pixels stay."""
    levels = images.short()
    rows = levels[:, :, :-2] + levels[:, :, 1:-1] + levels[:, :, 2:]
    inner = levels[:, :, 1:-1, 1:-1]
    summed = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * inner
    # the nearest whole number to a 13th; no 13th lies half-way between two
    blurred = torch.div(2 * summed + 13, 26, rounding_mode="floor")
    out = images.clone()
    out[:, :, 1:-1, 1:-1] = _levels(inner + (blurred - inner) * _rows(tables.other[drawn.level, drawn.negative]))
    return out


def _posterized(images: Tensor, drawn: Drawn, tables: _Tables) -> Tensor:
    return images & _rows(tables.kept_bits[drawn.level])


def _solarized(images: Tensor, drawn: Drawn, tables: _Tables) -> Tensor:
    return torch.where(images >= _rows(tables.threshold[drawn.level]), ~images, images)


def _autocontrasted(images: Tensor, drawn: Drawn, tables: _Tables) -> Tensor:  # noqa: ARG001  # has no strength
    out: Tensor = vision.autocontrast(images)
    return out


def _equalized(images: Tensor, drawn: Drawn, tables: _Tables) -> Tensor:  # noqa: ARG001  # has no strength
    out: Tensor = vision.equalize(images)
    return out


_CHANGES: tuple[tuple[tuple[Op, ...], Callable[[Tensor, Drawn, _Tables], Tensor]], ...] = (
    ((Op.SHEAR_X, Op.ROTATE), _moved),
    ((Op.BRIGHTNESS,), _brightened),
    ((Op.COLOR,), _coloured),
    ((Op.CONTRAST,), _contrasted),
    ((Op.SHARPNESS,), _sharpened),
    ((Op.POSTERIZE,), _posterized),
    ((Op.SOLARIZE,), _solarized),
    ((Op.AUTOCONTRAST,), _autocontrasted),
    ((Op.EQUALIZE,), _equalized),
)
"""First and last operation, and what it does to images (n, C, S, S)."""


def _blended(images: Tensor, opposite: Tensor, drawn: Drawn, tables: _Tables) -> Tensor:
    own, other = (_rows(share[drawn.level, drawn.negative]) for share in (tables.own, tables.other))
    return _levels(images * own + opposite * other)


def _levels(values: Tensor) -> Tensor:
    """Floats as uint8, cut off below, as torchvision does."""
    return values.clamp(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    """Luma (n, 1, S, S), rounded down, in whole numbers: 0.2989 R + 0.587 G + 0.114 B."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.int().unbind(1)
    return torch.div(2989 * red + 5870 * green + 1140 * blue, 10_000, rounding_mode="floor")[:, None]


def _rows(values: Tensor) -> Tensor:
    """(n,) against images (n, C, S, S)."""
    return values[:, None, None, None]
