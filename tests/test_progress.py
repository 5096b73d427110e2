"""What a run remembers: its windows, its patience, its past, and when a loss has diverged."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from powergrad.progress import MOST_LOOKS, Best, Diverged, Patience, Progress
from powergrad.spec import EarlyStoppingSpec

CPU = torch.device("cpu")
Metric = Literal["val_top1", "val_loss", "ema_val_top1", "ema_val_loss"]


def last_epoch(values: list[float], spec: EarlyStoppingSpec) -> int | None:
    """The epoch at which early stopping ends a run of these scores; None where it does not."""
    patience = Patience()
    for epoch, value in enumerate(values, start=1):
        if patience.see(value, spec):
            return epoch
    return None


@pytest.mark.parametrize(
    ("metric", "values", "ends"),
    [
        ("val_top1", [0.1, 0.2, 0.3, 0.4], None),
        ("val_top1", [0.1, 0.2, 0.2, 0.2], 4),  # an equal one is none
        ("val_top1", [0.5, 0.4, 0.6, 0.5, 0.5], 5),
        ("ema_val_top1", [0.5, 0.4, 0.3], 3),
        ("val_loss", [2.0, 1.0, 0.5], None),
        ("ema_val_loss", [2.0, 3.0, 2.5], 3),
        ("val_loss", [math.nan, math.nan, 1.0], 2),
        ("val_loss", [math.nan, 1.0, 0.5, 0.6], None),
        ("val_loss", [1.0, math.nan, 0.5, math.inf, 0.4], None),
        ("val_loss", [1.0, -math.inf, math.nan], 3),
    ],
)
def test_patience_ends_two_epochs_after_the_last_improvement(metric: Metric, values: list[float], ends: int | None) -> None:
    assert last_epoch(values, EarlyStoppingSpec(metric=metric, patience_epochs=2)) == ends


def test_an_improvement_must_be_larger_than_the_smallest_that_counts() -> None:
    """And is measured from the best, so that many small ones add up to one."""
    spec = EarlyStoppingSpec(metric="val_loss", patience_epochs=3, min_delta=0.25)
    assert last_epoch([2.0, 1.75, 1.75, 1.75], spec) == 4
    assert last_epoch([2.0, 1.875, 1.75, 1.625, 1.5, 1.375, 1.25], spec) is None


@given(values=st.lists(st.integers(0, 5), max_size=20), patience=st.integers(1, 4), delta=st.integers(0, 2), falls=st.booleans())
def test_patience_against_all_it_has_seen(values: list[int], patience: int, delta: int, falls: bool) -> None:
    """Against the whole list: the last improvement, each over the one before, and the epochs since."""
    spec = EarlyStoppingSpec(metric="val_loss" if falls else "val_top1", patience_epochs=patience, min_delta=float(delta))
    improved: list[int] = []
    expected = None
    for epoch, value in enumerate(values):
        if not improved or (values[improved[-1]] - value) * (1 if falls else -1) > delta:
            improved.append(epoch)
        if epoch - improved[-1] >= patience:
            expected = epoch + 1
            break
    assert last_epoch([float(value) for value in values], spec) == expected


def test_a_window_sums_up_parts_of_batches() -> None:
    """Two batches of six images, the first in two parts: the mean of their losses and the share of hits."""
    progress = Progress.fresh(CPU)
    labels = torch.tensor([0, 1, 2])
    right, wrong = torch.eye(3), torch.eye(3).roll(1, dims=0)
    for loss, logits in ((0.5, right), (0.25, wrong)):
        progress.count(torch.tensor(loss, requires_grad=True), logits, labels, batch_size=6)
    progress.count(torch.tensor(2.25), torch.cat((right, right)), torch.cat((labels, labels)), batch_size=6)
    assert progress.window_loss.item() / 12 == (0.75 + 2.25) / 2
    assert progress.window_correct.item() == 9
    assert not progress.window_loss.requires_grad
    progress.begin_window()
    assert (progress.window_loss.item(), progress.window_correct.item(), progress.window_images) == (0.0, 0, 0)


@pytest.mark.parametrize(
    ("first", "loss", "diverged"),
    [
        (None, 2.0, False),
        (None, math.nan, True),
        (None, math.inf, True),
        (None, 1e6, False),  # without normalisation a network may begin high
        (1e6, 9.9e7, False),
        (1e6, 1.1e8, True),
        (0.01, 200.0, False),  # chance is ln C, however low the first was
        (0.01, 240.0, True),
        (2.3, math.nan, True),
        (2.3, -math.inf, True),
    ],
)
def test_a_loss_has_diverged_at_a_hundred_times_the_first_or_chance(first: float | None, loss: float, diverged: bool) -> None:
    progress = Progress.fresh(CPU)
    progress.step, progress.first_loss = 40, first
    if not diverged:
        progress.refuse_divergence(loss, classes=10, lr=0.5)
        assert progress.first_loss == (loss if first is None else first)
        return
    with pytest.raises(Diverged, match=r"train_loss is .* at step 40 \(lr 0.5\)"):
        progress.refuse_divergence(loss, classes=10, lr=0.5)
    assert progress.first_loss == first


def full() -> Progress:
    progress = Progress.fresh(CPU)
    progress.step, progress.window_images, progress.first_loss = 7, 12, 2.5
    progress.window_loss += 3.5
    progress.window_correct += 4
    progress.best = Best(top1=0.5, step=7, path="checkpoints/a1/step-00000007")
    progress.patience = Patience(best=0.5, epochs_without=2)
    progress.last_window, progress.scores = {"train_loss": 0.5}, [{"step": 7, "val_loss": 1.0}]
    progress.ended_early, progress.lr_scale, progress.rollbacks, progress.test = "why", 0.25, 2, {"test_top1": 0.5}
    progress.remember_look({"grad_norm": 1.5})
    return progress


@pytest.mark.parametrize("make", [full, lambda: Progress.fresh(CPU)], ids=["full", "fresh"])
def test_it_survives_a_checkpoint(make: Any, tmp_path: Path) -> None:
    before: Progress = make()
    torch.save(before.to_state(), tmp_path / "state.pt")
    after = Progress.from_state(torch.load(tmp_path / "state.pt", weights_only=True), CPU)
    assert after == before
    assert {type(value) for value in vars(after).values()} == {type(value) for value in vars(before).values()}


def test_looks_are_thinned_out_and_stay_in_order() -> None:
    """The first and the newest are always among them."""
    progress = Progress.fresh(CPU)
    for step in range(1, 5 * MOST_LOOKS):
        progress.step = step
        progress.remember_look({"grad_norm": float(step)})
        assert len(progress.looks) <= MOST_LOOKS
    steps = [look["step"] for look in progress.looks]
    assert steps == sorted(set(steps))
    assert steps[0] == 1
    assert steps[-1] >= 5 * MOST_LOOKS - 2
    assert len(steps) > MOST_LOOKS / 2 - 1
    assert all(look["grad_norm"] == look["step"] for look in progress.looks)
