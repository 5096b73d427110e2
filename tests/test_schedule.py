"""Learning rates against torch's own schedulers, stepped once an update."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from powergrad.schedule import alpha_at, lr_at
from powergrad.spec import LossSpec, TrainSpec

STEPS_PER_EPOCH = 7
PEAK = 0.4


def make_spec(epochs: int = 20, **schedule: Any) -> TrainSpec:
    return TrainSpec.model_validate(
        {"data": {"dataset": "digits"}, "epochs": epochs, "optimizer": {"name": "sgd", "lr": PEAK}, "schedule": schedule}
    )


def rates(spec: TrainSpec) -> list[float]:
    return [lr_at(step, spec=spec, steps_per_epoch=STEPS_PER_EPOCH) for step in range(spec.epochs * STEPS_PER_EPOCH)]


def torch_rates(scheduler: lr_scheduler.LRScheduler, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return found


def make_optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)


@pytest.mark.parametrize("warmup_epochs", [1, 5])
def test_cosine_is_torchs_linear_warm_up_then_cosine_annealing(warmup_epochs: int) -> None:
    spec = make_spec(name="cosine", warmup_epochs=warmup_epochs)
    warmup, steps = warmup_epochs * STEPS_PER_EPOCH, spec.epochs * STEPS_PER_EPOCH
    optimizer = make_optimizer()
    scheduler = lr_scheduler.SequentialLR(
        optimizer,
        [
            lr_scheduler.LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup),
            lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps - warmup),
        ],
        milestones=[warmup],
    )
    assert rates(spec) == pytest.approx(torch_rates(scheduler, optimizer, steps), rel=1e-9, abs=1e-12)


def test_cosine_without_warm_up_is_torchs() -> None:
    spec = make_spec(name="cosine", warmup_epochs=0)
    optimizer = make_optimizer()
    steps = spec.epochs * STEPS_PER_EPOCH
    expected = torch_rates(lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps), optimizer, steps)
    assert rates(spec) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("warmup_epochs", [0, 2, 5])
def test_step_is_torchs_warm_up_times_its_multi_step(warmup_epochs: int) -> None:
    spec = make_spec(name="step", milestones=[4, 9, 15], gamma=0.3, warmup_epochs=warmup_epochs)
    warmup, steps = warmup_epochs * STEPS_PER_EPOCH, spec.epochs * STEPS_PER_EPOCH
    optimizer = make_optimizer()
    multi_step = lr_scheduler.MultiStepLR(optimizer, milestones=[m * STEPS_PER_EPOCH for m in (4, 9, 15)], gamma=0.3)
    scheduler: lr_scheduler.LRScheduler = multi_step
    if warmup:
        linear = lr_scheduler.LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
        scheduler = lr_scheduler.ChainedScheduler([linear, multi_step], optimizer=optimizer)
    assert rates(spec) == pytest.approx(torch_rates(scheduler, optimizer, steps), rel=1e-9)


def test_step_drops_at_30_60_and_90_percent_by_default() -> None:
    found = rates(make_spec(name="step", warmup_epochs=0))
    drops = [step / STEPS_PER_EPOCH for step in range(1, len(found)) if found[step] < found[step - 1]]
    assert drops == [6, 12, 18]
    assert found[-1] == pytest.approx(PEAK * 1e-3)


def test_constant_stays_at_the_peak_once_warm() -> None:
    found = rates(make_spec(name="constant", warmup_epochs=2))
    assert set(found[2 * STEPS_PER_EPOCH :]) == {PEAK}


@pytest.mark.parametrize("name", ["cosine", "step", "constant"])
def test_warm_up_climbs_in_equal_steps_from_near_zero_to_exactly_the_peak(name: str) -> None:
    warmup = 3 * STEPS_PER_EPOCH
    found = rates(make_spec(name=name, warmup_epochs=3))[: warmup + 1]
    assert found[0] == pytest.approx(PEAK / (warmup + 1))
    assert [b - a for a, b in itertools.pairwise(found)] == pytest.approx([PEAK / (warmup + 1)] * warmup)
    assert found[warmup] == PEAK


def test_the_default_warms_up_for_a_tenth_of_the_epochs() -> None:
    found = rates(make_spec(epochs=20))
    assert found.index(max(found)) == 2 * STEPS_PER_EPOCH


@pytest.mark.parametrize("warmup_epochs", [0, 3])
def test_linear_is_torchs_warm_up_then_linear_decay(warmup_epochs: int) -> None:
    spec = make_spec(name="linear", warmup_epochs=warmup_epochs, min_lr=0.05)
    warmup, steps = warmup_epochs * STEPS_PER_EPOCH, spec.epochs * STEPS_PER_EPOCH
    optimizer = make_optimizer()
    # made before the warm-up, which sets the rate when it is made
    down = lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.05 / PEAK, total_iters=steps - warmup)
    scheduler: lr_scheduler.LRScheduler = down
    if warmup:
        up = lr_scheduler.LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
        scheduler = lr_scheduler.SequentialLR(optimizer, [up, down], milestones=[warmup])
    assert rates(spec) == pytest.approx(torch_rates(scheduler, optimizer, steps), rel=1e-9)


@pytest.mark.parametrize(
    ("epochs", "peak_at", "start_factor", "end_factor"), [(20, 0.3, 25.0, 1e4), (5, 0.5, 10.0, 100.0), (2, 0.1, 1.0, 1.0)]
)
def test_one_cycle_is_torchs(epochs: int, peak_at: float, start_factor: float, end_factor: float) -> None:
    spec = make_spec(epochs, name="onecycle", peak_at=peak_at, start_factor=start_factor, end_factor=end_factor)
    optimizer, steps = make_optimizer(), epochs * STEPS_PER_EPOCH
    scheduler = lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=PEAK,
        total_steps=steps,
        pct_start=peak_at,
        div_factor=start_factor,
        final_div_factor=end_factor,
        anneal_strategy="cos",
        cycle_momentum=False,
    )
    assert rates(spec) == pytest.approx(torch_rates(scheduler, optimizer, steps), rel=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 4, 10, 12, 20])
@pytest.mark.parametrize("peak_at", [0.05, 0.1, 0.25, 0.5, 0.999])
def test_one_cycle_has_a_rate_for_every_step_of_the_shortest_run(steps: int, peak_at: float) -> None:
    """Where the peak is on the first step or before it there is no way up to it."""
    spec = make_spec(1, name="onecycle", peak_at=peak_at)
    found = [lr_at(step, spec=spec, steps_per_epoch=steps) for step in range(steps + 1)]
    assert all(0.0 < rate <= PEAK for rate in found)
    assert found[-1] == found[-2] == pytest.approx(PEAK / 25.0 / 1e4) or peak_at == 0.999


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_a_cool_down_holds_the_rate_that_has_been_come_down_to(name: str) -> None:
    """Until then the schedule is that of a run which ends there."""
    found = rates(make_spec(20, name=name, warmup_epochs=2, min_lr=0.01, cooldown_epochs=5))
    end = 15 * STEPS_PER_EPOCH
    assert found[:end] == rates(make_spec(15, name=name, warmup_epochs=2, min_lr=0.01))
    assert set(found[end:]) == {0.01}


def test_a_cool_down_of_steps_holds_the_last_of_them() -> None:
    found = rates(make_spec(20, name="step", warmup_epochs=0, milestones=[4, 12], cooldown_epochs=5))
    assert found[15 * STEPS_PER_EPOCH :] == [pytest.approx(PEAK * 0.01)] * (5 * STEPS_PER_EPOCH)


def test_a_cool_down_of_one_cycle_holds_its_last_rate() -> None:
    found = rates(make_spec(20, name="onecycle", cooldown_epochs=5))
    end = 15 * STEPS_PER_EPOCH
    assert found[:end] == rates(make_spec(15, name="onecycle"))
    assert set(found[end:]) == {found[end - 1]}


@pytest.mark.parametrize("name", ["cosine", "linear", "step", "constant"])
def test_a_warm_up_begins_at_its_rate_exactly(name: str) -> None:
    warmup = 3 * STEPS_PER_EPOCH
    found = rates(make_spec(name=name, warmup_epochs=3, warmup_lr=0.02))[: warmup + 1]
    assert found[0] == 0.02
    assert [b - a for a, b in itertools.pairwise(found)] == pytest.approx([(PEAK - 0.02) / warmup] * warmup)
    assert found[warmup] == PEAK


def alphas(run_epochs: int, **alpha: Any) -> list[float]:
    spec = make_spec(run_epochs).model_copy(update={"loss": LossSpec.model_validate({"alpha": alpha})})
    return [alpha_at(step, spec=spec, steps_per_epoch=STEPS_PER_EPOCH) for step in range(run_epochs * STEPS_PER_EPOCH + 3)]


def test_a_given_alpha_is_that_of_every_step() -> None:
    spec = make_spec().model_copy(update={"loss": LossSpec(alpha=0.3)})
    assert {alpha_at(step, spec=spec, steps_per_epoch=STEPS_PER_EPOCH) for step in (0, 1, 139, 1000)} == {0.3}


@pytest.mark.parametrize(("start", "end"), [(1.0, 0.25), (0.0, 1.0), (0.5, 0.5)])
def test_a_linear_alpha_moves_in_equal_steps_and_stays_at_its_end(start: float, end: float) -> None:
    found = alphas(4, start=start, end=end)
    steps = 4 * STEPS_PER_EPOCH
    assert found[0] == start
    assert [b - a for a, b in itertools.pairwise(found[: steps + 1])] == pytest.approx([(end - start) / steps] * steps)
    assert found[steps:] == [end] * 3


def test_a_cosine_alpha_follows_half_a_cosine() -> None:
    found = alphas(4, start=1.0, end=0.2, shape="cosine")
    steps = 4 * STEPS_PER_EPOCH
    assert found[0] == 1.0
    assert found[:steps] == pytest.approx([0.6 + 0.4 * math.cos(math.pi * step / steps) for step in range(steps)])
    assert found[steps:] == [0.2] * 3


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_an_alpha_may_arrive_before_the_run_ends(shape: str) -> None:
    found = alphas(9, start=1.0, end=0.2, epochs=4, shape=shape)
    steps = 4 * STEPS_PER_EPOCH
    assert found[:steps] == alphas(4, start=1.0, end=0.2, shape=shape)[:steps]
    assert set(found[steps:]) == {0.2}
    assert found[steps - 1] > 0.2


@settings(max_examples=200)
@given(start=st.floats(0.0, 1.0), end=st.floats(0.0, 1.0), epochs=st.integers(1, 5), shape=st.sampled_from(["linear", "cosine"]))
def test_an_alpha_never_leaves_its_bounds(start: float, end: float, epochs: int, shape: str) -> None:
    """The loss refuses an alpha that rounding has pushed beyond [0, 1]."""
    found = alphas(5, start=start, end=end, epochs=epochs, shape=shape)
    assert all(0.0 <= alpha <= 1.0 for alpha in found)
    assert (found[0], found[-1]) == (start, end)


@pytest.mark.parametrize(("step", "steps_per_epoch"), [(-1, 7), (0, 0)])
def test_an_alpha_out_of_range_is_refused(step: int, steps_per_epoch: int) -> None:
    with pytest.raises(ValueError, match=f"step={step}, steps_per_epoch={steps_per_epoch}: must be"):
        alpha_at(step, spec=make_spec(), steps_per_epoch=steps_per_epoch)


def test_cosine_ends_at_zero_and_stays_there() -> None:
    spec = make_spec(name="cosine")
    end = spec.epochs * STEPS_PER_EPOCH
    assert [lr_at(step, spec=spec, steps_per_epoch=STEPS_PER_EPOCH) for step in (end, end + 100)] == [0.0, 0.0]
    assert 0.0 < lr_at(end - 1, spec=spec, steps_per_epoch=STEPS_PER_EPOCH) < PEAK / 1000


@pytest.mark.parametrize(("step", "steps_per_epoch"), [(-1, 7), (0, 0)])
def test_what_is_out_of_range_is_refused(step: int, steps_per_epoch: int) -> None:
    with pytest.raises(ValueError, match=f"step={step}, steps_per_epoch={steps_per_epoch}: must be"):
        lr_at(step, spec=make_spec(), steps_per_epoch=steps_per_epoch)
