"""Random choices are functions of (seed, stream, epoch, index) and of nothing else."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from powergrad.data.draws import GOLDEN, MIX_1, MIX_2, WORD, Stream, epoch_order, hashes, integers


def splitmix64(state: int) -> int:
    """The published algorithm in Python's own integers."""
    state = (state + GOLDEN) & WORD
    state = ((state ^ (state >> 30)) * MIX_1) & WORD
    state = ((state ^ (state >> 27)) * MIX_2) & WORD
    return state ^ (state >> 31)


def test_the_oracle_gives_the_published_sequence() -> None:
    """First outputs of splitmix64 from state 0, as in the reference implementation."""
    assert [splitmix64(i * GOLDEN) for i in range(3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10_000), index=st.integers(0, 2**40))
def test_tensor_hashes_equal_integer_arithmetic(seed: int, epoch: int, index: int) -> None:
    def mixed(word: int) -> int:
        return splitmix64(word - GOLDEN)

    key = mixed(mixed(seed * GOLDEN + Stream.FLIP) + epoch * GOLDEN)
    expected = mixed(key + index * GOLDEN)
    found = int(hashes(torch.tensor([index]), seed=seed, stream=Stream.FLIP, epoch=epoch)) & WORD
    assert found == expected


def test_a_hash_does_not_depend_on_how_indices_are_split() -> None:
    index = torch.arange(1000)
    whole = hashes(index, seed=7, stream=Stream.SHIFT_X, epoch=3)
    parts = [hashes(part, seed=7, stream=Stream.SHIFT_X, epoch=3) for part in torch.split(index, 37)]
    assert torch.equal(whole, torch.cat(parts))


def test_an_epoch_visits_every_index_once() -> None:
    assert torch.equal(epoch_order(1000, seed=1, epoch=0).sort().values, torch.arange(1000))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [tuple(epoch_order(50, seed=seed, epoch=epoch).tolist()) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9


def test_small_integers_are_even() -> None:
    """Chi-square of 100,000 draws over 5 values: 18.5 is its 99.9 % point at 4 degrees of freedom."""
    drawn = integers(torch.arange(100_000), 5, seed=0, stream=Stream.SHIFT_Y, epoch=0)
    counts = torch.bincount(drawn, minlength=5).double()
    assert len(counts) == 5
    assert float(((counts - 20_000) ** 2 / 20_000).sum()) < 18.5


def test_streams_are_uncorrelated() -> None:
    """|r| of 100,000 independent pairs stays under 4 standard errors, 4 / sqrt(100,000) = 0.0126."""
    index = torch.arange(100_000)
    pair = torch.stack([integers(index, 1024, seed=0, stream=stream, epoch=5).double() for stream in (Stream.SHIFT_X, Stream.SHIFT_Y)])
    assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.0126
