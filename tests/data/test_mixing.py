"""Mixing gives each image a share of the next one's pixels and the same share of its label."""

from __future__ import annotations

import pytest
import torch
from scipy import stats  # type: ignore[import-untyped]
from torch import Tensor
from torchvision.transforms import v2  # type: ignore[import-untyped]

from powergrad.data.mixing import Mixing, build_mixing
from powergrad.spec import AugmentSpec

KINDS = {"mixup": (0.4, 0.0), "cutmix": (0.0, 1.0), "both": (0.2, 1.0)}
MANY = torch.arange(50_000)


def mixing(kind: str, *, classes: int = 41, seed: int = 3) -> Mixing:
    mixup, cutmix = KINDS[kind]
    return Mixing(seed, mixup, cutmix, classes)


def noise(count: int, size: int = 12) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_is_the_share_of_each_label_in_the_pixels(kind: str) -> None:
    """Every image is of one grey, its label: the mean of a mixture is then the mean of its target, to float32's 41 × 2**-24."""
    labels = torch.arange(41)
    images = labels.float()[:, None, None, None].expand(-1, 3, 16, 16)
    mixed, targets = mixing(kind)(images, labels, labels + 500, epoch=2)
    assert mixed.shape == (40, 3, 16, 16)
    assert targets.shape == (40, 41)
    torch.testing.assert_close(mixed.double().mean(dim=(1, 2, 3)), targets.double() @ labels.double(), rtol=0, atol=1e-5)
    neighbours = torch.nn.functional.one_hot(labels, 41)
    assert not targets[(neighbours[:-1] + neighbours[1:]) == 0].any()
    assert len(set(targets.max(1).values.tolist())) > 20


@pytest.mark.parametrize("kind", KINDS)
def test_targets_sum_to_one_exactly(kind: str) -> None:
    labels = MANY[:5001] % 2  # neighbours are never of one class
    same = torch.zeros(5001, dtype=torch.int64)
    for each in (labels, same):
        _, targets = mixing(kind, classes=2)(noise(5001, size=4), each, MANY[:5001], epoch=0)
        assert targets.dtype == torch.float32
        assert torch.equal(targets.sum(1), torch.ones(5000))
        assert targets.min() >= 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 7, 20])
def test_the_split_into_parts_changes_no_bit(kind: str, size: int) -> None:
    images, labels, index = noise(41), torch.arange(41) % 10, torch.arange(900, 941)
    whole = mixing(kind)(images, labels, index, epoch=1)
    starts = range(0, 40, size)
    parts = [mixing(kind)(*(t[i : min(i + size, 40) + 1] for t in (images, labels, index)), epoch=1) for i in starts]
    for of_whole, of_parts in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(torch.cat(of_parts), of_whole)


def test_mixup_is_torchvisions_with_the_same_share() -> None:
    images, labels, index = noise(21), torch.arange(21), torch.arange(21)
    mixed, targets = mixing("mixup")(images, labels, index, epoch=0)
    shares = mixing("mixup").shares(index[:-1], 0.4, epoch=0)
    transform = v2.MixUp(alpha=0.4, num_classes=41)
    for place, share in enumerate(shares.tolist()):
        # torchvision's neighbour is the one before
        pair, both = images[[place + 1, place]], labels[[place + 1, place]]
        params = {"lam": share, "labels": both, "batch_size": 2}
        # two products and a sum in float32: a last bit or two apart
        torch.testing.assert_close(mixed[place], transform.transform(pair, params)[1], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(targets[place], transform.transform(both, params)[1], rtol=0, atol=1e-6)


def test_cutmix_takes_one_rectangle_of_the_next_image() -> None:
    images, index = noise(41), torch.arange(41)
    mixed, _ = mixing("cutmix")(images, index, index, epoch=0)
    taken = (mixed == images[1:]).all(1)
    assert torch.equal(mixed, torch.where(taken[:, None], images[1:], images[:-1]))
    assert torch.equal(taken, taken.any(2)[:, :, None] & taken.any(1)[:, None, :])
    # without a gap: an edge is crossed at most twice
    crossed = torch.nn.functional.pad(taken.any(2).int(), (1, 1)).diff(dim=1).abs().sum(1)
    assert crossed.max() == 2


def test_rectangles_cover_what_torchvisions_cover() -> None:
    """Two-sample Kolmogorov-Smirnov over the areas: p under 1e-3 once in a thousand seeds, and this seed is fixed."""
    covered = Mixing(0, 0.0, 1.0, 10).pasted(MANY[:3000], size=24, epoch=0).double().mean(dim=(1, 2))
    transform, image = v2.CutMix(alpha=1.0, num_classes=10), torch.zeros(1, 3, 24, 24)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = [1 - transform.make_params([image])["lam_adjusted"] for _ in range(3000)]
    assert stats.ks_2samp(covered.numpy(), expected).pvalue > 1e-3


@pytest.mark.parametrize("a", [0.1, 0.2, 1.0, 8.0])
def test_shares_are_beta_distributed(a: float) -> None:
    """Mean 1/2 and variance 1 / (4 (2a + 1)) within 5 standard errors; Kolmogorov-Smirnov's p as above."""
    shares = Mixing(7, a, 0.0, 10).shares(MANY, a, epoch=4).double().numpy()
    variance = 1 / (4 * (2 * a + 1))
    fourth = float(stats.beta(a, a).stats(moments="k")) + 3
    assert abs(shares.mean() - 0.5) < 5 * (variance / len(shares)) ** 0.5
    assert abs(shares.var() - variance) < 5 * variance * ((fourth - 1) / len(shares)) ** 0.5
    # below a half only: just under 1, where half of small parameters' shares are, float32 is too coarse for the test
    lower = shares[shares < 0.5]
    # 2**14 quantiles: the steps of 6e-5 are far below the test's own resolution of 0.01
    assert stats.kstest(lower, lambda share: 2 * stats.beta(a, a).cdf(share)).pvalue > 1e-3


def test_with_both_half_of_the_images_are_cut() -> None:
    """20,000 fair draws: 0.5 within 4 standard errors, 0.0141. A rectangle of no pixel looks like MixUp's image of share 1: both untouched."""
    index = MANY[:20_001]
    images = (index % 2).float()[:, None, None, None].expand(-1, 1, 16, 16)
    mixed, _ = mixing("both", classes=2)(images, index % 2, index, epoch=0)
    whole = (mixed == mixed[:, :, :1, :1]).all(dim=(1, 2, 3))
    # the half-sides are cut off to whole pixels, so a share above 1 - (2 / 16)**2 pastes nothing; others that touch all four edges are as rare
    empty = ~mixing("cutmix").pasted(index[:-1], size=16, epoch=0).any(dim=(1, 2))
    full = mixing("cutmix").pasted(index[:-1], size=16, epoch=0).all(dim=2).all(dim=1)
    decided = ~empty & ~full
    assert decided.float().mean() > 0.9
    assert abs(float((~whole)[decided].float().mean()) - 0.5) < 0.0141


def test_epochs_mix_anew() -> None:
    images, index = noise(41), torch.arange(41)
    first, second = (mixing("both")(images, index, index, epoch=epoch)[0] for epoch in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_format_is_kept(kind: str) -> None:
    images, index = noise(9).contiguous(memory_format=torch.channels_last), torch.arange(9)
    assert mixing(kind)(images, index, index, epoch=0)[0].is_contiguous(memory_format=torch.channels_last)


def test_a_batch_without_its_neighbour_is_refused() -> None:
    images, labels = noise(5), torch.arange(4)
    with pytest.raises(ValueError, match="5 images, 4 labels, 4 indices"):
        mixing("mixup")(images, labels, labels, epoch=0)
    with pytest.raises(ValueError, match="two at least"):
        mixing("mixup")(images[:1], labels[:1], labels[:1], epoch=0)


def test_parameters_below_zero_or_all_off_are_refused() -> None:
    for mixup, cutmix in ((0.0, 0.0), (-0.2, 1.0), (1.0, -1.0)):
        with pytest.raises(ValueError, match="must be positive"):
            Mixing(0, mixup, cutmix, 10)


def test_a_spec_without_mixing_builds_none() -> None:
    assert build_mixing(AugmentSpec(), seed=0, classes=10) is None
    assert build_mixing(AugmentSpec(mixup=0.2), seed=1, classes=10) == Mixing(1, 0.2, 0.0, 10)
