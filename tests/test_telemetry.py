"""Telemetry against formulas written out and against autograd, its history against interruptions, and the training against its absence."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from powergrad import determinism
from powergrad.engine import Orders, Outcome, resume, train
from powergrad.loss import power_grad_cross_entropy
from powergrad.protocol import ResumePoint
from powergrad.spec import TelemetrySpec
from powergrad.telemetry import (
    MACHINE_METRICS,
    SNAPSHOTS,
    ZERO_NORM,
    EnergyMeter,
    History,
    Telemetry,
    nvml_energy_counter,
    peak_memory_gib,
    read_history,
)
from tests import training
from tests.training import CPU, NEVER, StopAfter, make_run, spec

CLASSIFIER = "6"  # of tests.training.TinyNet
ALPHA = 0.3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with determinism.settings(deterministic=True, threads=1):
        yield


class SmallNet(nn.Module):
    """Two convolutions, features that can die, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, bias=False)
        self.second = nn.Conv2d(4, 6, 1)
        self.head = nn.Linear(6, 5)
        rng = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=rng)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.second(self.first(images)).relu().mean(dim=(2, 3)))
        return logits


def images(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def telemetry_of(model: nn.Module, run_dir: Path, **overrides: Any) -> Telemetry:
    settings: dict[str, Any] = {
        "classifier": "head",
        "run_dir": run_dir,
        "attempt": 1,
        "resumed_step": 0,
        "epochs": 3,
        "device": CPU,
    }
    return Telemetry(model, **(settings | overrides))


def looked_at(
    tmp_path: Path, *, alpha: float = ALPHA, targets: Tensor | None = None, smoothing: float = 0.0
) -> tuple[SmallNet, dict[str, float], Tensor]:
    """A network after one backward pass, what a look at it said, and the logits with their gradient."""
    model = SmallNet()
    targets = torch.tensor([0, 3, 4, 1]) if targets is None else targets
    logits = model(images(4))
    logits.retain_grad()
    power_grad_cross_entropy(logits, targets, alpha=alpha, label_smoothing=smoothing, reduction="sum").backward()  # type: ignore[no-untyped-call]
    said = telemetry_of(model, tmp_path).look(100, logits=logits, targets=targets, alpha=alpha, label_smoothing=smoothing)
    return model, said, logits


def logit_gradient(logits: Tensor, targets: Tensor, *, alpha: float, smoothing: float) -> Tensor:
    """By autograd through the loss itself; the sum of the losses keeps the images' gradients apart."""
    leaf = logits.detach().double().requires_grad_()
    power_grad_cross_entropy(leaf, targets, alpha=alpha, label_smoothing=smoothing, reduction="sum").backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("alpha", [0.0, ALPHA, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True])
def test_logit_metrics_are_those_of_the_losss_own_gradient(tmp_path: Path, alpha: float, smoothing: float, soft: bool) -> None:
    index = torch.tensor([0, 3, 4, 1])
    mixed = torch.tensor([0.7, 0.3, 0.0, 0.0, 0.0]).repeat(4, 1)
    targets = mixed if soft else index
    _, said, logits = looked_at(tmp_path, alpha=alpha, targets=targets, smoothing=smoothing)
    ours = logit_gradient(logits, targets.double() if soft else targets, alpha=alpha, smoothing=smoothing)
    plain = logit_gradient(logits, targets.double() if soft else targets, alpha=1.0, smoothing=smoothing)

    true_class = torch.zeros(4, dtype=torch.int64) if soft else index
    share = sum(float(g[t] ** 2 / (g * g).sum()) for g, t in zip(ours, true_class, strict=True)) / 4
    cosine = sum(float(torch.dot(a, b) / (a.norm() * b.norm())) for a, b in zip(ours, plain, strict=True)) / 4
    # what is said is rounded to fp32
    assert said["grad_true_share"] == pytest.approx(share, rel=1e-6)
    assert said["grad_cosine"] == pytest.approx(cosine, rel=1e-6)
    assert said["grad_gain"] == pytest.approx(float(ours.norm(dim=1).sum() / plain.norm(dim=1).sum()), rel=1e-6)
    if alpha == 1.0:
        assert said["grad_cosine"] == said["grad_gain"] == pytest.approx(1.0)


@given(z=st.lists(st.lists(st.floats(-60, 60), min_size=3, max_size=3), min_size=1, max_size=4), alpha=st.floats(0, 1))
def test_logit_metrics_stay_in_their_bounds(tmp_path_factory: pytest.TempPathFactory, z: list[list[float]], alpha: float) -> None:
    model = SmallNet()
    model(images(1)).sum().backward()
    telemetry = telemetry_of(model, tmp_path_factory.mktemp("bounds"))
    said = telemetry.look(100, logits=torch.tensor(z), targets=torch.zeros(len(z), dtype=torch.int64), alpha=alpha)
    # one class against at least one other: between all of the rest in one class and the rest spread over two; rounding of fp32
    assert math.isnan(said["grad_true_share"]) or 0.5 - 1e-6 <= said["grad_true_share"] <= 2 / 3 + 1e-6
    assert math.isnan(said["grad_cosine"]) or 0 < said["grad_cosine"] <= 1 + 1e-6


def test_an_image_without_a_gradient_counts_in_no_direction(tmp_path: Path) -> None:
    model = SmallNet()
    model(images(1)).sum().backward()
    z = torch.tensor([[0.0, 0.0, 0.0], [2000.0, 0.0, 0.0]])  # exp(-2000) is 0 in any dtype: p is the target itself
    both = telemetry_of(model, tmp_path).look(1, logits=z, targets=torch.tensor([0, 0]), alpha=1.0)
    alone = telemetry_of(model, tmp_path).look(1, logits=z[:1], targets=torch.tensor([0]), alpha=1.0)
    assert both == alone


def test_gradient_norms_are_kept_for_every_trained_parameter(tmp_path: Path) -> None:
    model, said, _ = looked_at(tmp_path)
    (kept,) = read_history(tmp_path).gradients
    assert kept.step == 100
    squares = 0.0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        exact = math.sqrt(sum(g * g for g in parameter.grad.flatten().tolist()))
        assert kept.norms.pop(name) == pytest.approx(exact, rel=5e-6)  # six digits
        squares += exact**2
    assert not kept.norms
    assert said["grad_norm"] == pytest.approx(math.sqrt(squares), rel=1e-6)


def test_a_gradient_that_overflowed_or_is_missing_is_kept_as_not_a_number(tmp_path: Path) -> None:
    model = SmallNet()
    model(images(1)).sum().backward()
    assert model.head.bias.grad is not None
    model.head.bias.grad[0], model.first.weight.grad = math.inf, None
    said = telemetry_of(model, tmp_path).look(7, logits=torch.zeros(1, 5), targets=torch.tensor([0]), alpha=ALPHA)
    assert math.isinf(said["grad_norm"])
    (kept,) = read_history(tmp_path).gradients
    assert [name for name, norm in kept.norms.items() if math.isnan(norm)] == ["first.weight", "head.bias"]


def test_frozen_parameters_are_left_out(tmp_path: Path) -> None:
    model = SmallNet()
    model.first.requires_grad_(requires_grad=False)
    model(images(1)).sum().backward()
    telemetry_of(model, tmp_path).look(1, logits=torch.zeros(1, 5), targets=torch.tensor([0]), alpha=ALPHA)
    assert list(read_history(tmp_path).gradients[0].norms) == ["second.weight", "second.bias", "head.weight", "head.bias"]


class ScalarReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the reads of single values, each a wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_look_reads_no_single_value_from_the_device(tmp_path: Path) -> None:
    """Its one read is that of the list of all values."""
    model = SmallNet()
    logits = model(images(4))
    logits.sum().backward()
    telemetry = telemetry_of(model, tmp_path)
    with ScalarReads() as reads, telemetry.watch_features():  # type: ignore[no-untyped-call]
        model(images(4))
        telemetry.look(1, logits=logits, targets=torch.tensor([0, 1, 2, 3]), alpha=ALPHA)
        telemetry.at_evaluation(1, 1, metrics={"val_top1": 0.5}, train_top1=0.75)
        assert reads.count == 0
        torch.ones(()).item()
        assert reads.count == 1


def test_zeroed_filters_are_counted_and_kept(tmp_path: Path) -> None:
    model = SmallNet()
    with torch.no_grad():
        model.first.weight[1] = 0.0
        model.second.weight[:, :, 0, 0] = torch.eye(6, 4)
        model.second.weight[4:] = ZERO_NORM * 0.4  # two filters of norm 0.8 thresholds
        model.second.weight[3] = ZERO_NORM * 0.6  # of 1.2
    said = telemetry_of(model, tmp_path, epochs=1).at_evaluation(9, 1, metrics={}, train_top1=None)
    assert (said["zero_filters"], said["zero_filter_share"]) == (3.0, 0.3)
    (kept,) = read_history(tmp_path).filters
    assert (kept.step, kept.epoch) == (9, 1)
    exact = [math.sqrt(sum(w * w for w in unit.flatten().tolist())) for unit in model.first.weight]
    assert kept.norms["first"] == pytest.approx(exact, rel=5e-6)  # six digits
    assert kept.norms["second"] == pytest.approx([1, 1, 1, 1.2e-6, 0.8e-6, 0.8e-6], rel=5e-6)
    whole = math.sqrt(sum(w * w for parameter in model.parameters() for w in parameter.flatten().tolist()))
    assert said["weight_norm"] == pytest.approx(whole, rel=1e-6)


def test_a_network_without_convolutions_has_no_filters(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    said = telemetry_of(model, tmp_path, classifier="0", epochs=1).at_evaluation(1, 1, metrics={}, train_top1=None)
    assert set(said) == {"weight_norm", "memory_gib"}
    assert read_history(tmp_path) == History()


def test_features_count_as_zero_only_if_every_image_of_the_evaluation_leaves_them_so(tmp_path: Path) -> None:
    model, telemetry = nn.Sequential(nn.Identity(), nn.Linear(4, 2)), None
    telemetry = telemetry_of(model, tmp_path, classifier="1")
    with telemetry.watch_features():
        model(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
        model(torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, -2.0, 0.0]]))
    model(torch.ones(1, 4))  # outside an evaluation
    assert telemetry.at_evaluation(1, 1, metrics={}, train_top1=None)["zero_features"] == 2
    assert "zero_features" not in telemetry.at_evaluation(2, 2, metrics={}, train_top1=None)


def test_features_before_a_convolution_are_its_input_channels(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1))
    telemetry = telemetry_of(model, tmp_path, classifier="0")
    seen = torch.zeros(2, 3, 5, 5)
    seen[1, 2, 4, 4] = 1.0
    with telemetry.watch_features():
        model(seen)
    assert telemetry.at_evaluation(1, 1, metrics={}, train_top1=None)["zero_features"] == 2


def test_the_features_of_a_copy_can_be_watched(tmp_path: Path) -> None:
    model, averaged = nn.Sequential(nn.Linear(3, 2)), nn.Sequential(nn.Linear(3, 2))
    telemetry = telemetry_of(model, tmp_path, classifier="0")
    with telemetry.watch_features(averaged):
        averaged(torch.tensor([[0.0, 1.0, 1.0]]))
    assert telemetry.at_evaluation(1, 1, metrics={}, train_top1=None)["zero_features"] == 1


def test_the_gap_needs_both_accuracies(tmp_path: Path) -> None:
    telemetry = telemetry_of(SmallNet(), tmp_path)
    assert telemetry.at_evaluation(1, 1, metrics={"val_top1": 0.5}, train_top1=0.75)["generalisation_gap"] == 0.25
    assert "generalisation_gap" not in telemetry.at_evaluation(2, 2, metrics={"val_top1": 0.5}, train_top1=None)
    assert "generalisation_gap" not in telemetry.at_evaluation(3, 3, metrics={}, train_top1=0.75)


@pytest.mark.parametrize("epochs", [1, 63, 64, 65, 100, 129, 1000])
def test_snapshots_of_filters_are_few_even_and_end_with_the_last_epoch(tmp_path: Path, epochs: int) -> None:
    telemetry = telemetry_of(nn.Sequential(nn.Conv1d(1, 1, 1)), tmp_path, classifier="0", epochs=epochs)
    for epoch in range(1, epochs + 1):
        telemetry.at_evaluation(epoch * 10, epoch, metrics={}, train_top1=None)
    kept = [record.epoch for record in read_history(tmp_path).filters]
    assert SNAPSHOTS / 2 < len(kept) <= SNAPSHOTS or len(kept) == epochs
    assert kept[-1] == epochs
    assert len({later - earlier for earlier, later in pairwise(kept)}) <= 1


def test_looks_are_due_at_multiples_of_every_steps() -> None:
    spec = TelemetrySpec(every_steps=3)
    assert [step for step in range(1, 10) if spec.is_due(step)] == [3, 6, 9]


def test_memory_is_the_process_own_peak_on_a_cpu() -> None:
    before = peak_memory_gib(CPU)
    held = torch.ones(2**26)  # a quarter of a GiB, written to
    assert peak_memory_gib(CPU) >= max(before, held.nbytes / 2**30)


def test_energy_is_counted_from_the_begin_and_power_since_the_last_reading() -> None:
    counted, times = iter([5_000, 65_000, 66_000, None]), iter([10.0, 40.0, 42.0, 43.0])
    meter = EnergyMeter(lambda: next(counted), lambda: next(times))
    assert meter.read() == {"gpu_energy_j": 60.0, "gpu_power_w": 2.0}
    assert meter.read() == {"gpu_energy_j": 61.0, "gpu_power_w": 0.5}
    assert meter.read() == {}


def test_no_gpu_is_no_energy() -> None:
    assert nvml_energy_counter(CPU) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_energy_only_grows() -> None:
    counter = nvml_energy_counter(torch.device("cuda", 0))
    if counter is None:
        pytest.skip("this GPU does not count its energy")
    first = counter()
    torch.randn(4096, 4096, device="cuda").matmul(torch.randn(4096, 4096, device="cuda")).sum().item()
    second = counter()
    assert first is not None
    assert second is not None
    assert 0 < first <= second


# the history, without a training


def note(telemetry: Telemetry, step: int, gradient: float = 1.0) -> None:
    """A look at `step` at a gradient of norm `gradient`."""
    model = telemetry._model
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    weight = model.get_parameter("weight")
    assert weight.grad is not None
    weight.grad[0, 0] = gradient
    telemetry.look(step, logits=torch.zeros(1, 2), targets=torch.tensor([0]), alpha=1.0)


def journal(run_dir: Path, **overrides: Any) -> Telemetry:
    model = nn.Linear(2, 2)
    model.get_submodule("")  # the classifier is the whole network
    return telemetry_of(model, run_dir, classifier="", **overrides)


def norms(run_dir: Path) -> list[tuple[int, float]]:
    return [(record.step, record.norms["weight"]) for record in read_history(run_dir).gradients]


def test_a_run_without_telemetry_has_an_empty_history(tmp_path: Path) -> None:
    assert read_history(tmp_path) == History()


def test_a_later_attempt_cuts_back_what_an_earlier_one_wrote_after_its_begin(tmp_path: Path) -> None:
    first = journal(tmp_path)
    for step in (10, 20, 30):
        note(first, step, 1.0)
    second = journal(tmp_path, attempt=2, resumed_step=20)
    note(second, 30, 2.0)
    note(first, 40, 1.0)  # a thawed first attempt that does not know it is over
    assert norms(tmp_path) == [(10, 1.0), (20, 1.0), (30, 2.0)]


def test_attempts_are_joined_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for attempt in range(1, 12):
        note(journal(tmp_path, attempt=attempt, resumed_step=attempt - 1), attempt, attempt)
    assert norms(tmp_path) == [(attempt, attempt) for attempt in range(1, 12)]


def test_a_rollback_cuts_back_within_an_attempt(tmp_path: Path) -> None:
    telemetry = journal(tmp_path)
    note(telemetry, 10, 1.0)
    note(telemetry, 20, 1.0)
    telemetry.rolled_back(15)
    note(telemetry, 20, 2.0)
    assert norms(tmp_path) == [(10, 1.0), (20, 2.0)]


def test_going_back_voids_filters_too(tmp_path: Path) -> None:
    """Before the run has come to the same evaluation again."""
    telemetry = telemetry_of(SmallNet(), tmp_path)
    for epoch in (1, 2, 3):
        telemetry.at_evaluation(epoch * 10, epoch, metrics={}, train_top1=None)
    telemetry.rolled_back(20)
    assert [record.step for record in read_history(tmp_path).filters] == [10, 20]
    telemetry_of(SmallNet(), tmp_path, attempt=2, resumed_step=10)
    assert [record.step for record in read_history(tmp_path).filters] == [10]


def test_a_torn_last_line_is_dropped_wherever_it_was_torn(tmp_path: Path) -> None:
    telemetry = journal(tmp_path)
    note(telemetry, 10)
    path = tmp_path / "telemetry" / "a1.jsonl"
    whole = len(path.read_bytes())
    note(telemetry, 20)
    content = path.read_bytes()
    for length in range(whole, len(content)):
        path.write_bytes(content[:length])
        assert norms(tmp_path) == [(10, 1.0)]
    path.write_bytes(content)
    assert norms(tmp_path) == [(10, 1.0), (20, 1.0)]


def test_an_attempt_that_begins_again_removes_its_torn_line(tmp_path: Path) -> None:
    note(journal(tmp_path), 10)
    path = tmp_path / "telemetry" / "a1.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    note(journal(tmp_path, resumed_step=5), 10, 3.0)
    assert norms(tmp_path) == [(10, 3.0)]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    note(journal(tmp_path), 10)
    path = tmp_path / "telemetry" / "a1.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"step"', b'"step', 1))
    with pytest.raises(ValueError, match=r"a1\.jsonl, line 2: must be a JSON object"):
        read_history(tmp_path)


def test_a_history_that_cannot_be_written_does_not_stop_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "telemetry").write_text("in the way")
    telemetry = journal(tmp_path)
    note(telemetry, 10)
    note(telemetry, 20)
    assert [record.message.split(":")[0] for record in caplog.records] == ["no more telemetry is kept in this attempt"]


def test_a_telemetry_that_keeps_nothing_says_the_same(tmp_path: Path) -> None:
    """As the ranks do that share a run with the one that keeps the history."""
    model = SmallNet()
    model(images(1)).sum().backward()
    how: dict[str, Any] = {"logits": torch.zeros(1, 5), "targets": torch.tensor([0]), "alpha": ALPHA}
    keeping, silent = telemetry_of(model, tmp_path / "kept"), telemetry_of(model, tmp_path / "silent", keeps_history=False)
    assert silent.look(1, **how) == keeping.look(1, **how)
    silent.rolled_back(0)
    assert not (tmp_path / "silent").exists()


def test_the_file_begins_with_the_resumed_step_and_keeps_six_digits(tmp_path: Path) -> None:
    note(journal(tmp_path, resumed_step=7), 10, 1 / 3)
    first, second = map(json.loads, (tmp_path / "telemetry" / "a1.jsonl").read_text().splitlines())
    assert first["resumed_step"] == 7
    assert second == {"step": 10, "gradients": [0.333333, 0.0]}


# a training of the real engine


@dataclass
class Watched(training.History):
    """Attempts with telemetry looking on."""

    def attempt(self, orders: Orders | None = None, *, hold_epoch: int | None = None) -> Outcome:
        assert hold_epoch is None, "nothing here is held"
        self.attempts += 1
        run = self.make(self.attempts)
        points = [ResumePoint(id=c.id, path=c.path, step=c.step, sha256=c.sha256) for c in reversed(self.checkpoints)]
        progress, _ = resume(run, points, emit=self.messages.append)
        self.points = [point for point in self.points if point.step <= progress.step]
        self.checkpoints = [c for c in self.checkpoints if c.step <= progress.step]
        assert run.spec.telemetry is not None
        telemetry = Telemetry(
            run.model,
            classifier=CLASSIFIER,
            run_dir=run.run_dir,
            attempt=self.attempts,
            resumed_step=progress.step,
            epochs=run.spec.epochs,
            device=run.device,
        )
        return train(replace(run, telemetry=telemetry), progress, emit=self.take, orders=orders or StopAfter(NEVER))

    def said(self) -> list[tuple[int, dict[str, float | None]]]:
        """All metrics but those that no two runs share."""
        return [
            (step, {name: value for name, value in metrics.items() if name not in MACHINE_METRICS}) for _, step, metrics in self.metrics()
        ]


EVERY_STEPS = 2
PGT = spec(loss={"alpha": ALPHA})
WATCHED = spec(loss={"alpha": ALPHA}, telemetry={"every_steps": EVERY_STEPS})


def watched(run_dir: Path) -> Watched:
    return Watched(run_dir, lambda attempt: make_run(run_dir, WATCHED, attempt=attempt))


def test_telemetry_changes_no_bit_of_training(tmp_path: Path) -> None:
    plain = training.History(tmp_path / "plain", lambda attempt: make_run(tmp_path / "plain", PGT, attempt=attempt))
    plain.attempt()
    state = torch.get_rng_state()
    looked_on = watched(tmp_path / "watched")
    looked_on.attempt()
    assert torch.equal(torch.get_rng_state(), state)  # dropout has drawn, as often in both
    assert looked_on.final_sha256 == plain.final_sha256
    names = {name for _, metrics in looked_on.said() for name in metrics}
    assert names >= {"grad_norm", "grad_true_share", "grad_cosine", "grad_gain"}
    assert names >= {"weight_norm", "zero_filters", "zero_filter_share", "zero_features", "generalisation_gap"}


@pytest.mark.parametrize("stops", [(7,), (3, 9), (8, 1)])
def test_an_interrupted_run_keeps_the_same_history_and_metrics(tmp_path: Path, stops: tuple[int, ...]) -> None:
    whole, broken = watched(tmp_path / "whole"), watched(tmp_path / "broken")
    whole.attempt()
    for steps in stops:
        assert broken.attempt(StopAfter(steps, how="checkpoint")) == "stopped"
    assert broken.attempt() == "succeeded"
    history = read_history(tmp_path / "whole")
    assert len(history.gradients) == whole.checkpoints[-1].step // EVERY_STEPS
    assert len(history.filters) == WATCHED.epochs
    assert read_history(tmp_path / "broken") == history
    assert broken.said() == whole.said()


def test_a_run_that_was_killed_repeats_what_it_wrote_after_its_last_checkpoint(tmp_path: Path) -> None:
    whole, broken = watched(tmp_path / "whole"), watched(tmp_path / "broken")
    whole.attempt()
    assert broken.attempt(StopAfter(11, how="now")) == "stopped"  # some steps after the first epoch's checkpoint
    abandoned = read_history(tmp_path / "broken").gradients[-1].step
    assert abandoned > broken.checkpoints[-1].step
    assert broken.attempt() == "succeeded"
    assert read_history(tmp_path / "broken") == read_history(tmp_path / "whole")
    assert broken.said() == whole.said()
