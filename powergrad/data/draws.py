"""Every random choice about data, as a pure function of (seed, stream, epoch, index).

A counter hash per sample (splitmix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) in integer
tensor operations: no generator, so nothing depends on what was drawn before, on how a batch is split, or on the device. Resuming in
the middle of an epoch needs no state.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: splitmix64's increment
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
WORD = 2**64 - 1
REPEATS = 1024
"""Most draws of one stream for one index."""


class Stream(IntEnum):
    """Independent sequences of one seed. The numbers are part of the bits: never renumber."""

    ORDER = 1
    SHIFT_X = 2
    SHIFT_Y = 3
    FLIP = 4
    SPLIT = 5
    CROP_AREA = 10
    CROP_RATIO = 11
    CROP_TOP = 12
    CROP_LEFT = 13
    POLICY_OP = 14
    POLICY_LEVEL = 15
    POLICY_SIGN = 16
    ERASE = 17
    ERASE_AREA = 18
    ERASE_RATIO = 19
    ERASE_TOP = 20
    ERASE_LEFT = 21
    MIX_SHARE = 22
    MIX_KIND = 23
    MIX_ROW = 24
    MIX_COLUMN = 25
    GLYPH_POSE = 40
    GLYPH_BEND = 41
    GLYPH_OCCLUSION = 42
    GLYPH_SHADE = 43
    GLYPH_NOISE = 44
    SHARD_ORDER = 60
    SHARD_WINDOW = 61


def hashes(index: Tensor, *, seed: int, stream: Stream, epoch: int = 0) -> Tensor:
    """One 64-bit hash per index, as int64 (all bit patterns occur).

    index: int64, any shape, any device.
    """
    key = _mix_int(_mix_int(seed * GOLDEN + stream) + epoch * GOLDEN)
    word = index * _signed(GOLDEN) + _signed(key)
    word = (word ^ _shift_right(word, 30)) * _signed(MIX_1)
    word = (word ^ _shift_right(word, 27)) * _signed(MIX_2)
    return word ^ _shift_right(word, 31)


def integers(index: Tensor, below: int | Tensor, *, seed: int, stream: Stream, epoch: int = 0) -> Tensor:
    """One integer in [0, below) per index; `below` up to 2**20 keeps the bias of the remainder under 1e-3 of a share.

    below: one bound, or an int64 tensor of one per index.
    """
    return _shift_right(hashes(index, seed=seed, stream=stream, epoch=epoch), 33) % below


def uniforms(index: Tensor, *, seed: int, stream: Stream, epoch: int = 0) -> Tensor:
    """One float64 in [0, 1) per index, a multiple of 2**-53."""
    return _shift_right(hashes(index, seed=seed, stream=stream, epoch=epoch), 11).double() * 2.0**-53


def repeated(index: Tensor, count: int) -> Tensor:
    """Indices (..., count) for `count` draws of one stream per index, at most REPEATS; more of them leave the first ones as they are."""
    assert count <= REPEATS
    return index[..., None] * REPEATS + torch.arange(count, device=index.device)


def epoch_order(count: int, *, seed: int, epoch: int, device: torch.device | str = "cpu") -> Tensor:
    """A permutation of range(count), (count,) int64: indices sorted by their hash, ties by index."""
    index = torch.arange(count, device=device)
    return torch.argsort(hashes(index, seed=seed, stream=Stream.ORDER, epoch=epoch), stable=True)


def _mix_int(word: int) -> int:
    word &= WORD
    word = ((word ^ (word >> 30)) * MIX_1) & WORD
    word = ((word ^ (word >> 27)) * MIX_2) & WORD
    return word ^ (word >> 31)


def _shift_right(word: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically; the mask clears the copies of the sign
    return (word >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    word &= WORD
    return word - 2**64 if word >= 2**63 else word
