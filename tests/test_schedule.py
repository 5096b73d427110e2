"""Learning rates against torch's own schedulers, stepped once an update."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from powergrad.schedule import lr_at
from powergrad.spec import TrainSpec

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


def test_cosine_ends_at_zero_and_stays_there() -> None:
    spec = make_spec(name="cosine")
    end = spec.epochs * STEPS_PER_EPOCH
    assert [lr_at(step, spec=spec, steps_per_epoch=STEPS_PER_EPOCH) for step in (end, end + 100)] == [0.0, 0.0]
    assert 0.0 < lr_at(end - 1, spec=spec, steps_per_epoch=STEPS_PER_EPOCH) < PEAK / 1000


@pytest.mark.parametrize(("step", "steps_per_epoch"), [(-1, 7), (0, 0)])
def test_what_is_out_of_range_is_refused(step: int, steps_per_epoch: int) -> None:
    with pytest.raises(ValueError, match=f"step={step}, steps_per_epoch={steps_per_epoch}: must be"):
        lr_at(step, spec=make_spec(), steps_per_epoch=steps_per_epoch)
