"""The loop: plain training where nothing special is asked, the same bits however often it is stopped, and its few ways to end."""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from powergrad import checkpoint, determinism
from powergrad.checkpoint import StorageFull
from powergrad.engine import PrecisionUnsupported, Run, choose_precision, computes_in_bf16, resume, train
from powergrad.evaluate import calibration_error, evaluate
from powergrad.progress import Diverged, Progress
from powergrad.protocol import CheckpointFailed, CheckpointWritten, Evaluation, Message, Note, Phase, RolledBack, Step
from powergrad.schedule import alpha_at, lr_at
from powergrad.spec import TrainSpec
from powergrad.telemetry import read_history
from tests.data.folders import class_folder
from tests.training import CPU, NEVER, NORM_FREE, History, Net, PlainNet, StopAfter, make_run, points_of, spec, without_machine


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with determinism.settings(deterministic=True, threads=1):
        yield


def history(run_dir: Path, train_spec: TrainSpec | None = None, **how: Any) -> History:
    return History(run_dir, lambda attempt: make_run(run_dir, train_spec, attempt=attempt, **how))


def undisturbed(run_dir: Path, train_spec: TrainSpec | None = None, **how: Any) -> History:
    whole = history(run_dir, train_spec, **how)
    assert whole.attempt() == "succeeded"
    return whole


def folder_spec(workers: int) -> TrainSpec:
    data = {"dataset": "class_folder", "path": "pets", "image_size": 8, "batch_size": 4, "workers": workers, "val_fraction": 0.25}
    return spec(data=data, epochs=3)


def test_the_loop_is_plain_sgd(tmp_path: Path) -> None:
    """Against a loop written with torch alone. Tolerance: the fused optimizer rounds its products differently, 7 steps long."""
    plain = spec(epochs=1, schedule={"name": "constant", "warmup_epochs": 0}, optimizer={"lr": 0.05})
    run, oracle = make_run(tmp_path / "ours", plain), make_run(tmp_path / "oracle", plain)
    torch.manual_seed(5)
    sgd = torch.optim.SGD(oracle.model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4, foreach=False, fused=False)
    losses, hits = [], []
    for batch in oracle.data.train_batches(epoch=0, batch_size=200):
        ((images, _, labels),) = batch.parts
        logits = oracle.model(images)
        loss = F.cross_entropy(logits, labels)
        sgd.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        sgd.step()
        losses.append(loss.item())
        hits.append(float((logits.argmax(1) == labels).float().mean()))

    torch.manual_seed(5)
    messages: list[Message] = []
    train(run, Progress.fresh(CPU), emit=messages.append, orders=StopAfter(NEVER))

    for ours, theirs in zip(run.model.state_dict().values(), oracle.model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    said = [message.metrics for message in messages if isinstance(message, Step)]
    windows = [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 7)]
    for metrics, window in zip(said, windows, strict=True):
        assert metrics["train_loss"] == pytest.approx(torch.tensor(losses[window]).mean().item(), rel=1e-4)
        assert metrics["train_top1"] == pytest.approx(torch.tensor(hits[window]).mean().item(), abs=1e-6)


ONE_STEP: dict[str, Any] = {"dataset": "digits", "image_size": 8, "batch_size": 1436}
"""Four times 359 of the 1438 training images: an epoch is one step."""
MIXING = {"mixup": 0.4, "cutmix": 1.0}
UNEVEN = [0.1, 0.5, 1.0, 2.0, 0.0, 3.0, 1.0, 0.25, 1.0, 5.0]
TARGETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "indices": ({}, {}),
    "smoothed": ({"label_smoothing": 0.1}, {}),
    "weighted": ({"class_weights": UNEVEN}, {}),
    "weighted and smoothed": ({"class_weights": UNEVEN, "label_smoothing": 0.1}, {}),
    "mixed": ({}, MIXING),
    "mixed, weighted and smoothed": ({"class_weights": UNEVEN, "label_smoothing": 0.1}, MIXING),
}


def one_step(name: str, *, alpha: float, **overrides: Any) -> TrainSpec:
    """A spec of a single step; the huge bound of its clipping makes a loss scaler leave the gradients unscaled."""
    loss, augment = TARGETS[name]
    parts = {"data": ONE_STEP | {"augment": augment}, "loss": loss | {"alpha": alpha}, "clip": {"mode": "norm", "value": 1e6}}
    return spec(**{"epochs": 1, "schedule": {}} | parts | overrides)


def gradients_of(run: Run) -> tuple[float, list[Tensor]]:
    """The loss and the gradients of a run's only step, by the engine."""
    messages: list[Message] = []
    train(run, Progress.fresh(run.device), emit=messages.append, orders=StopAfter(NEVER))
    (said,) = [message.metrics["train_loss"] for message in messages if isinstance(message, Step)]
    assert said is not None
    return said, [parameter.grad.cpu() for parameter in run.model.parameters() if parameter.grad is not None]


def gradients_by_autograd(run: Run, alpha: float) -> tuple[float, list[Tensor]]:
    """Of the whole batch at once in fp32: the value of F.cross_entropy, the gradient of CE(alpha z) / alpha."""
    ((images, targets, _),) = next(run.data.train_batches(epoch=0, batch_size=run.batch_size)).parts
    loss, logits = run.spec.loss, run.model(images)
    weight = None if loss.class_weights is None else torch.tensor(loss.class_weights)
    value, powered = (
        F.cross_entropy(scale * logits, targets, weight=weight, label_smoothing=loss.label_smoothing) for scale in (1.0, alpha)
    )
    return value.item(), list(torch.autograd.grad(powered / alpha, list(run.model.parameters())))


def assert_near(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Each tensor to a share of its largest entry."""
    for ours, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=0.0, atol=tolerance * exact.abs().max().item())


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("targets", list(TARGETS))
@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_gradients_are_those_of_the_whole_batch_however_it_is_computed(alpha: float, targets: str, accumulate: int, tmp_path: Path) -> None:
    """Tolerance: sums of 1,436 images in another order, a quarter of it going back through 1 / alpha."""
    chosen = one_step(targets, alpha=alpha, accumulate=accumulate)
    loss, found = gradients_of(make_run(tmp_path, chosen, net=PlainNet))
    expected_loss, expected = gradients_by_autograd(make_run(tmp_path, chosen, net=PlainNet), alpha)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_near(found, expected, 1e-5)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("targets", list(TARGETS))
def test_bf16_gradients_are_those_of_the_whole_batch_in_fp32(targets: str, accumulate: int, tmp_path: Path) -> None:
    """Tolerance: images, weights, activations and their gradients are each rounded to 8 bits, 2**-9 of their size."""
    chosen = one_step(targets, alpha=0.25, accumulate=accumulate, precision="bf16")
    loss, found = gradients_of(make_run(tmp_path, chosen, net=PlainNet))
    expected_loss, expected = gradients_by_autograd(make_run(tmp_path, chosen, net=PlainNet), 0.25)
    assert loss == pytest.approx(expected_loss, rel=1e-2)
    assert_near(found, expected, 3e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("targets", list(TARGETS))
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_cuda_gradients_are_those_of_the_whole_batch_in_fp32(precision: str, targets: str, accumulate: int, tmp_path: Path) -> None:
    """Tolerance: TF32 and bf16 round to 2**-9, fp16, behind its loss scale, to 2**-11."""
    chosen = one_step(targets, alpha=0.25, accumulate=accumulate, precision=precision)
    loss, found = gradients_of(make_run(tmp_path, chosen, net=PlainNet, device=torch.device("cuda", 0)))
    expected_loss, expected = gradients_by_autograd(make_run(tmp_path, chosen, net=PlainNet), 0.25)
    assert loss == pytest.approx(expected_loss, rel=1e-2)
    assert_near(found, expected, 3e-2)


@pytest.mark.parametrize("net", [PlainNet, NORM_FREE], ids=["group", "none"])
@pytest.mark.parametrize("targets", ["weighted and smoothed", "mixed"])
def test_the_weights_do_not_depend_on_the_number_of_parts(targets: str, net: Net, tmp_path: Path) -> None:
    """Tolerance: 21 steps carry on what other orders of summation leave."""
    loss, augment = TARGETS[targets]
    parts: dict[str, Any] = {
        "data": {"dataset": "digits", "image_size": 8, "batch_size": 200, "augment": augment},
        "loss": loss | {"alpha": 0.25},
        "clip": {"mode": "agc", "value": 0.05},
        "ema": {"decay": 0.9},
    }
    runs = [undisturbed(tmp_path / str(n), spec(**parts, accumulate=n), net=net) for n in (1, 2, 4)]
    ends = [checkpoint.load(run.run_dir / run.checkpoints[-1].path) for run in runs]
    for run, end in zip(runs[1:], ends[1:], strict=True):
        for name, weight in ends[0].weights.items():
            torch.testing.assert_close(end.weights[name], weight, rtol=1e-4, atol=1e-5)
        for name, average in (ends[0].ema or {}).items():
            torch.testing.assert_close((end.ema or {})[name], average, rtol=1e-4, atol=1e-5)
        for (_, step, ours), (_, expected_step, expected) in zip(run.metrics(), runs[0].metrics(), strict=True):
            assert step == expected_step
            assert ours == pytest.approx(expected, rel=1e-3)


def test_a_batch_of_classes_without_weight_moves_nothing_by_its_loss(tmp_path: Path) -> None:
    """torch's own mean is 0 / 0 there, and the weights would be NaN from then on."""
    without = spec(data=ONE_STEP, epochs=1, loss={"alpha": 0.25, "class_weights": [0.0] * 10}, schedule={})
    loss, found = gradients_of(make_run(tmp_path, without))
    assert loss == 0.0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in found)


def test_alpha_1_has_the_bits_of_no_alpha_given(tmp_path: Path) -> None:
    """Said as a number or as a schedule that does not move."""
    plain = undisturbed(tmp_path / "plain")
    for name, alpha in {"number": 1.0, "schedule": {"start": 1.0, "end": 1.0, "shape": "cosine"}}.items():
        assert undisturbed(tmp_path / name, spec(loss={"alpha": alpha})).final_sha256 == plain.final_sha256


def test_a_moving_alpha_is_said_with_every_step(tmp_path: Path) -> None:
    moving = spec(loss={"alpha": {"start": 1.0, "end": 0.25, "epochs": 2}})
    said = [message for message in undisturbed(tmp_path, moving).messages if isinstance(message, Step)]
    assert [m.metrics["alpha"] for m in said] == [alpha_at(m.step - 1, spec=moving, steps_per_epoch=7) for m in said]
    assert said[-1].metrics["alpha"] == 0.25


def test_alpha_changes_the_weights_and_not_the_loss(tmp_path: Path) -> None:
    """Until the first step the two runs are one: its loss is the same."""
    data = {"dataset": "digits", "image_size": 8, "batch_size": 1438}
    runs = [undisturbed(tmp_path / str(alpha), spec(data=data, epochs=1, loss={"alpha": alpha}, schedule={})) for alpha in (1.0, 0.25)]
    first = [run.metrics()[0][2]["train_loss"] for run in runs]
    assert first[0] == pytest.approx(first[1], rel=1e-6)
    assert runs[0].final_sha256 != runs[1].final_sha256


@pytest.mark.parametrize("how", ["checkpoint", "now"])
@pytest.mark.parametrize("variety", ["digits", "adamw_bf16", "folder_0", "folder_2"])
def test_stopped_anywhere_any_number_of_times_the_bits_are_the_same(
    variety: str, how: Literal["checkpoint", "now"], tmp_path: Path
) -> None:
    class_folder(tmp_path / "pets")
    chosen, resident = {
        "digits": (spec(loss={"alpha": 0.25, "label_smoothing": 0.1}, clip={"mode": "agc", "value": 0.01}), True),
        "adamw_bf16": (spec(optimizer={"name": "adamw"}, precision="bf16", checkpoint={"every_epochs": 2}), True),
        "folder_0": (folder_spec(0), False),
        "folder_2": (folder_spec(2), False),
    }[variety]
    where = {"data_root": tmp_path, "resident": resident}
    whole = undisturbed(tmp_path / "whole", chosen, **where)
    steps = whole.points[-1].step
    chance = random.Random(f"{variety} {how}")
    epoch = steps // chosen.epochs
    # within the first epoch, at its border, and at random places: "now" loses what came after the last checkpoint
    stops = [[1, 1, epoch - 2], [epoch], [epoch + 1, 0, 2], [chance.randrange(steps) for _ in range(2)]]
    for i, after in enumerate(stops[1:3] if variety == "folder_2" else stops):  # loader processes take their time to start
        broken = history(tmp_path / f"broken {i}", chosen, **where)
        for n in after:
            broken.attempt(StopAfter(n, how))
        assert broken.attempt() == "succeeded"
        assert broken.metrics() == whole.metrics()
        assert broken.final_sha256 == whole.final_sha256
        due = [(c.step, c.is_best, c.sha256) for c in broken.checkpoints if c.step in {c.step for c in whole.checkpoints}]
        assert due == [(c.step, c.is_best, c.sha256) for c in whole.checkpoints]


def everything(**overrides: Any) -> TrainSpec:
    """Much of what a run can have at once; it ends after four epochs of six because its averaged loss falls too slowly."""
    augment = {"policy": {"name": "trivial"}, "erasing": 0.3, "mixup": 0.4, "cutmix": 1.0}
    parts: dict[str, Any] = {
        "data": {"dataset": "digits", "image_size": 8, "batch_size": 360, "augment": augment},
        "epochs": 6,
        "loss": {"alpha": {"start": 1.0, "end": 0.2, "epochs": 5, "shape": "cosine"}, "label_smoothing": 0.1},
        "optimizer": {"name": "adamw", "decay_norm_and_bias": False},
        "schedule": {"name": "onecycle", "cooldown_epochs": 1},
        "clip": {"mode": "agc", "value": 0.05},
        "accumulate": 2,
        "ema": {"decay": 0.95},
        "early_stopping": {"metric": "ema_val_loss", "patience_epochs": 3, "min_delta": 0.5},
        "telemetry": {"every_steps": 2},
    }
    return spec(**parts | overrides)


def assert_the_same(broken: History, whole: History) -> None:
    """Metrics, weights, averages and all that a checkpoint remembers of the past."""
    assert broken.metrics() == whole.metrics()
    assert broken.final_sha256 == whole.final_sha256
    ends = [checkpoint.load(run.run_dir / run.checkpoints[-1].path) for run in (broken, whole)]
    assert ends[0].manifest.files.get(checkpoint.AVERAGE) == ends[1].manifest.files.get(checkpoint.AVERAGE)
    states = [end.state["progress"] for end in ends]
    assert [without_machine(score) for score in states[0]["scores"]] == [without_machine(score) for score in states[1]["scores"]]
    for name in ("looks", "patience", "ended_early", "test", "lr_scale", "rollbacks", "first_loss"):
        assert states[0][name] == states[1][name]
    torch.testing.assert_close(ends[0].state["optimizer"], ends[1].state["optimizer"], rtol=0.0, atol=0.0)


@pytest.fixture(scope="module")
def whole_of_everything(tmp_path_factory: pytest.TempPathFactory) -> History:
    with determinism.settings(deterministic=True, threads=1):
        whole = undisturbed(tmp_path_factory.mktemp("everything"), everything())
    assert whole.points[-1].step == 12, "it ends early"
    return whole


@pytest.mark.parametrize("step", range(12))
def test_everything_at_once_can_be_stopped_at_any_step(step: int, whole_of_everything: History, tmp_path: Path) -> None:
    broken = history(tmp_path, everything())
    assert broken.attempt(StopAfter(step)) == "stopped"
    assert broken.attempt() == "succeeded"
    assert_the_same(broken, whole_of_everything)


def test_everything_at_once_can_be_stopped_at_every_step(whole_of_everything: History, tmp_path: Path) -> None:
    broken = history(tmp_path, everything())
    while broken.attempt(StopAfter(1)) == "stopped":
        assert broken.attempts <= 12
    assert_the_same(broken, whole_of_everything)


@settings(max_examples=10)
@given(stops=st.lists(st.tuples(st.integers(0, 11), st.sampled_from(["checkpoint", "now"])), max_size=4))
def test_everything_at_once_can_be_stopped_any_number_of_times(
    whole_of_everything: History, stops: list[tuple[int, Literal["checkpoint", "now"]]]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        broken = history(Path(folder), everything())
        for after, how in stops:
            broken.attempt(StopAfter(after, how))
        assert broken.attempt() == "succeeded"
        assert_the_same(broken, whole_of_everything)


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with all three splits of a class folder."""
    root = tmp_path_factory.mktemp("data")
    for part, each in (("train", 8), ("val", 3), ("test", 4)):
        class_folder(root / "pets" / part, each=each)
    return root


def cropped(workers: int) -> TrainSpec:
    """Three epochs of three steps over random resized crops of the files."""
    data = {"dataset": "class_folder", "path": "pets", "image_size": 8, "batch_size": 8, "workers": workers, "augment": "imagenet"}
    return everything(data=data, epochs=3, loss={"alpha": 0.3}, early_stopping=None, schedule={"warmup_epochs": 1})


@pytest.fixture(scope="module")
def whole_of_cropped(pets: Path, tmp_path_factory: pytest.TempPathFactory) -> History:
    with determinism.settings(deterministic=True, threads=1):
        return undisturbed(tmp_path_factory.mktemp("cropped"), cropped(0), data_root=pets)


@pytest.mark.parametrize(("workers", "stops"), [(0, [n]) for n in range(9)] + [(0, [1, 2, 1]), (2, []), (2, [4]), (2, [3, 2])], ids=str)
def test_resized_crops_of_files_have_the_same_bits_however_they_are_read(
    workers: int, stops: list[int], whole_of_cropped: History, pets: Path, tmp_path: Path
) -> None:
    """With and without loader processes, stopped or not; the test split is scored once and the same."""
    broken = history(tmp_path, cropped(workers), data_root=pets)
    for after in stops:
        assert broken.attempt(StopAfter(after)) == "stopped"
    assert broken.attempt() == "succeeded"
    assert_the_same(broken, whole_of_cropped)
    assert [point.split for point in broken.points if isinstance(point, Evaluation)] == ["val", "val", "val", "test"]


def early(**overrides: Any) -> TrainSpec:
    """Ends after three epochs of nine: none improves by as much as is asked for."""
    data = {"dataset": "class_folder", "path": "pets", "image_size": 8, "batch_size": 8}
    return spec(data=data, epochs=9, early_stopping={"patience_epochs": 2, "min_delta": 2.0}, checkpoint={"every_epochs": 5}, **overrides)


def test_a_run_that_no_longer_improves_ends_like_any_other(pets: Path, tmp_path: Path) -> None:
    """Its last checkpoint is written though none was due, the test split is scored, and why it ended is said."""
    run = undisturbed(tmp_path, early(), data_root=pets)
    assert [(p.split, p.epoch) for p in run.points if isinstance(p, Evaluation)] == [("val", 1), ("val", 2), ("val", 3), ("test", 3)]
    assert [(c.epoch, c.is_best) for c in run.checkpoints] == [(3, True)]
    reason = "val_top1 has not improved for 2 epoch(s): ended after epoch 3"
    assert [message.detail for message in run.messages if isinstance(message, Note)] == [reason]
    progress, _ = resume(run.make(2), points_of(run), emit=lambda _: None)
    assert progress.ended_early == reason
    assert progress.test


def test_a_run_that_has_ended_early_takes_no_further_step(pets: Path, tmp_path: Path) -> None:
    run = undisturbed(tmp_path, early(), data_root=pets)
    before = len(run.messages)
    assert run.attempt() == "succeeded"
    assert run.messages[before:] == []


def test_patience_that_runs_out_with_the_epochs_is_no_early_end(pets: Path, tmp_path: Path) -> None:
    run = undisturbed(tmp_path, early().model_copy(update={"epochs": 3}), data_root=pets)
    assert not any(isinstance(message, Note) for message in run.messages)
    assert checkpoint.load(run.run_dir / run.checkpoints[-1].path).state["progress"]["ended_early"] == ""


WILD: dict[str, Any] = {
    "epochs": 4,
    "optimizer": {"lr": 1.0, "weight_decay": 10.0},
    "schedule": {"name": "constant", "warmup_epochs": 2},
    "on_divergence": "rollback",
    "ema": {"decay": 0.9},
    "telemetry": {"every_steps": 3},
}
"""Its loss explodes at steps 7, 11 and 13, each time at half the rate; at an eighth of the rate it stays."""


@pytest.fixture(scope="module")
def whole_of_wild(tmp_path_factory: pytest.TempPathFactory) -> History:
    with determinism.settings(deterministic=True, threads=1):
        return undisturbed(tmp_path_factory.mktemp("wild"), spec(**WILD))


def rollbacks(run: History) -> list[RolledBack]:
    return [message for message in run.messages if isinstance(message, RolledBack)]


def test_a_diverged_run_goes_back_to_its_newest_checkpoint_at_half_the_rate(whole_of_wild: History) -> None:
    """Before there is one, to its first weights."""
    run = whole_of_wild
    found = rollbacks(run)
    assert [(m.from_step, m.to_step, m.checkpoint, m.lr_scale) for m in found] == [
        (7, 0, "", 0.5),
        (11, 7, "step-00000007", 0.25),
        (13, 7, "step-00000007", 0.125),
    ]
    assert "train_loss is" in found[0].detail
    for point in run.points:
        if isinstance(point, Step):
            scale = 0.5 if point.step <= 7 else 0.125
            assert point.metrics["lr"] == scale * lr_at(point.step - 1, spec=run.make(1).spec, steps_per_epoch=7)
    assert [c.step for c in run.checkpoints] == [7, 14, 21, 28]
    state = checkpoint.load(run.run_dir / run.checkpoints[-1].path).state["progress"]
    assert (state["rollbacks"], state["lr_scale"]) == (3, 0.125)


def test_a_run_that_went_back_to_its_start_is_one_begun_at_that_rate(tmp_path: Path) -> None:
    """Nothing of the abandoned past is left in weights, averages, optimizer or generators. Half of a power of two is exact."""
    back = history(tmp_path / "back", spec(**WILD | {"epochs": 3}))
    back.attempt(StopAfter(14))
    assert [m.to_step for m in rollbacks(back)] == [0]
    begun = history(tmp_path / "begun", spec(**WILD | {"epochs": 3, "optimizer": {"lr": 0.5, "weight_decay": 10.0}}))
    begun.attempt(StopAfter(7))
    assert back.checkpoints[0].sha256 == begun.checkpoints[0].sha256
    assert back.metrics() == begun.metrics()


def test_a_run_gives_up_after_three_ways_back(tmp_path: Path) -> None:
    run = history(tmp_path, spec(**WILD | {"optimizer": {"lr": 1000.0, "weight_decay": 10.0}}))
    with pytest.raises(Diverged, match=r"at step \d+ \(lr "):
        run.attempt()
    assert [m.lr_scale for m in rollbacks(run)] == [0.5, 0.25, 0.125]


def test_what_telemetry_saw_of_an_abandoned_past_is_cut_back(whole_of_wild: History) -> None:
    run = whole_of_wild
    steps = [gradients.step for gradients in read_history(run.run_dir).gradients]
    assert steps == list(range(3, 28, 3))
    looks = checkpoint.load(run.run_dir / run.checkpoints[-1].path).state["progress"]["looks"]
    assert [look["step"] for look in looks] == steps
    lines = (run.run_dir / "telemetry" / "a1.jsonl").read_text().splitlines()
    assert sum("rolled_back_to" in line for line in lines) == 3, "there was something to cut back"


@pytest.mark.parametrize("how", ["checkpoint", "now"])
@pytest.mark.parametrize("stops", [[n] for n in range(1, 47, 4)] + [[3, 3, 3, 3, 3], [9, 4, 4]], ids=str)
def test_a_run_that_goes_back_ends_with_the_same_bits_wherever_it_is_stopped(
    stops: list[int], how: Literal["checkpoint", "now"], whole_of_wild: History, tmp_path: Path
) -> None:
    """Also when what an order had it write is newer than where it goes back to."""
    broken = history(tmp_path, spec(**WILD))
    for after in stops:
        broken.attempt(StopAfter(after, how))
    broken.attempt()
    assert_the_same(broken, whole_of_wild)


def test_an_explosion_is_found_while_the_loss_is_still_a_number(tmp_path: Path) -> None:
    run = history(tmp_path, spec(**WILD | {"on_divergence": "stop"}))
    with pytest.raises(Diverged, match=r"at step 7 \(lr 0.4667\), more than 23\d.*: 100 times the first"):
        run.attempt()
    last = run.metrics()[-1][2]["train_loss"]
    assert last is not None
    assert last > 230.0
    assert not run.checkpoints


def test_an_order_to_stop_is_obeyed_at_the_next_step_with_a_checkpoint_there(tmp_path: Path) -> None:
    stopped = history(tmp_path)
    assert stopped.attempt(StopAfter(5)) == "stopped"
    assert [c.step for c in stopped.checkpoints] == [5]
    assert not stopped.checkpoints[0].is_best


@pytest.mark.parametrize(
    "parts", [{}, {"checkpoint": {"every_epochs": 3}}, {"ema": {"decay": 0.9}, "clip": {"mode": "agc", "value": 0.01}}]
)
def test_a_run_held_at_epochs_ends_with_the_bits_of_one_that_was_not(parts: dict[str, Any], tmp_path: Path) -> None:
    chosen = spec(**parts)
    whole, broken = undisturbed(tmp_path / "whole", chosen), history(tmp_path / "broken", chosen)
    for epoch in (1, 2):
        assert broken.attempt(hold_epoch=epoch) == "held"
        assert [point.step for point in broken.points if isinstance(point, Evaluation)] == [7, 14][:epoch], "its epoch was scored"
        assert broken.checkpoints[-1].step == 7 * epoch, "whatever checkpoint.every_epochs says"
    assert broken.attempt(hold_epoch=3) == "succeeded", "a hold at the last epoch is none"
    assert_the_same(broken, whole)
    due = [(c.step, c.is_best, c.sha256) for c in broken.checkpoints if c.step in {c.step for c in whole.checkpoints}]
    assert due == [(c.step, c.is_best, c.sha256) for c in whole.checkpoints]


def test_a_run_that_resumes_at_its_hold_takes_no_step(tmp_path: Path) -> None:
    held = history(tmp_path)
    held.attempt(hold_epoch=2)
    before = held.metrics(), list(held.checkpoints)
    for epoch in (2, 1):
        assert held.attempt(hold_epoch=epoch) == "held"
        assert (held.metrics(), held.checkpoints) == before


def test_an_order_to_stop_where_a_run_holds_anyway_is_a_hold(tmp_path: Path) -> None:
    held = history(tmp_path, spec(checkpoint={"every_epochs": 3}))
    assert held.attempt(StopAfter(7), hold_epoch=1) == "held"
    assert [c.step for c in held.checkpoints] == [7]


def test_a_run_that_ends_early_at_its_hold_is_at_its_end(pets: Path, tmp_path: Path) -> None:
    run = history(tmp_path, early(), data_root=pets)
    assert run.attempt(hold_epoch=3) == "succeeded"
    assert [c.epoch for c in run.checkpoints] == [3]


def test_a_diverging_run_is_held_with_the_same_bits(whole_of_wild: History, tmp_path: Path) -> None:
    """It goes back once to its first weights, and twice to the checkpoint of its first hold."""
    broken = history(tmp_path, spec(**WILD))
    assert [broken.attempt(hold_epoch=epoch) for epoch in (1, 2, 3, None)] == ["held", "held", "held", "succeeded"]
    assert_the_same(broken, whole_of_wild)


def test_the_checkpoint_of_a_hold_cannot_be_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise StorageFull("no space left")

    monkeypatch.setattr(checkpoint, "publish", full)
    with pytest.raises(StorageFull):
        history(tmp_path).attempt(hold_epoch=1)


def test_stopped_before_the_first_step_there_is_nothing_to_write(tmp_path: Path) -> None:
    stopped = history(tmp_path)
    assert stopped.attempt(StopAfter(0)) == "stopped"
    assert stopped.messages == []


def test_log_points_are_the_quarters_of_an_epoch(tmp_path: Path) -> None:
    steps = [message.step for message in undisturbed(tmp_path).messages if isinstance(message, Step)]
    assert steps == [2, 4, 6, 7, 9, 11, 13, 14, 16, 18, 20, 21]


def test_long_epochs_have_a_log_point_every_hundred_steps(tmp_path: Path) -> None:
    run = make_run(tmp_path, spec(data={"dataset": "digits", "image_size": 8, "batch_size": 2}))
    assert run.steps_per_epoch == 719
    assert run.log_interval == 100


def test_a_step_says_the_rate_it_was_taken_with(tmp_path: Path) -> None:
    for message in undisturbed(tmp_path).messages:
        if isinstance(message, Step):
            assert message.metrics["lr"] == lr_at(message.step - 1, spec=spec(), steps_per_epoch=7)
            assert message.epoch == message.step / 7


def test_checkpoints_come_when_they_are_due_and_at_the_end(tmp_path: Path) -> None:
    run = undisturbed(tmp_path, spec(epochs=5, checkpoint={"every_epochs": 2}))
    assert [(c.epoch, c.step) for c in run.checkpoints] == [(2, 14), (4, 28), (5, 35)]


def test_the_best_is_the_first_of_the_highest(tmp_path: Path) -> None:
    """At this rate the score moves up and down; the last best is the argmax over all due checkpoints."""
    run = undisturbed(tmp_path, spec(epochs=8, optimizer={"lr": 2.0}))
    scores = [c.metrics["val_top1"] or 0.0 for c in run.checkpoints]
    best = [i for i, c in enumerate(run.checkpoints) if c.is_best]
    assert best == [i for i in range(8) if scores[i] > max(scores[:i], default=-1.0)]
    state = checkpoint.load(tmp_path / run.checkpoints[-1].path).state["progress"]["best"]
    assert state["step"] == run.checkpoints[scores.index(max(scores))].step


@pytest.fixture
def noisy(tmp_path: Path) -> TrainSpec:
    """A spec with a test split, labels that mean nothing, and a best epoch that is not the last."""
    for part, each in (("train", 12), ("val", 6), ("test", 7)):
        class_folder(tmp_path / "pets" / part, each=each)
    return folder_spec(0).model_copy(update={"epochs": 6})


def test_the_test_split_is_scored_once_with_the_best_weights(noisy: TrainSpec, tmp_path: Path) -> None:
    run = undisturbed(tmp_path / "run", noisy, data_root=tmp_path)
    scored = [message for message in run.messages if isinstance(message, Evaluation) and message.split == "test"]
    best = [c for c in run.checkpoints if c.is_best][-1]
    assert best is not run.checkpoints[-1], "the last is the best: the test would prove nothing"
    judge = make_run(tmp_path / "judge", noisy, data_root=tmp_path)
    judge.model.load_state_dict(checkpoint.load(tmp_path / "run" / best.path).weights)
    assert [message.metrics for message in scored] == [evaluated(judge, "test")]


def test_a_lost_best_checkpoint_is_told(noisy: TrainSpec, tmp_path: Path) -> None:
    messages: list[Message] = []

    def emit(message: Message) -> None:
        messages.append(message)
        if isinstance(message, CheckpointWritten):
            (tmp_path / message.path / "manifest.json").unlink()

    train(make_run(tmp_path, noisy, data_root=tmp_path), Progress.fresh(CPU), emit=emit, orders=StopAfter(NEVER))
    assert any(isinstance(message, Note) and "best checkpoint is gone" in message.detail for message in messages)
    assert any(isinstance(message, Evaluation) and message.split == "test" for message in messages)


def evaluated(run: Run, split: Literal["val", "test"]) -> dict[str, float]:
    part = run.data.val if split == "val" else run.data.test
    assert part is not None
    batches = run.data.held_out_batches(part, batch_size=64)
    classes = len(run.data.class_names)
    return evaluate(run.model, batches, split=split, classes=classes, device=CPU, autocast=run.autocast(), beat=lambda _: None)


def test_evaluation_is_what_numpy_says(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    found = evaluated(run, "val")
    run.model.eval()
    batches = list(run.data.held_out_batches(run.data.val, batch_size=1000))
    logits = run.model(batches[0][0]).detach().double().numpy()
    labels = batches[0][1].numpy()
    chosen = logits[range(len(labels)), labels]
    shifted = logits - logits.max(axis=1, keepdims=True)
    rank = (logits > chosen[:, None]).sum(axis=1)
    expected = {
        "val_loss": float((-(chosen - logits.max(axis=1)) + _log(_exp(shifted).sum(axis=1))).mean()),
        "val_top1": float((rank == 0).mean()),
        "val_top5": float((rank < 5).mean()),
        "val_logit_norm": float((logits**2).sum(axis=1).__pow__(0.5).mean()),
        "val_logit_mean_abs": float(abs(logits.mean(axis=1)).mean()),
        "val_logit_max_abs": float(abs(logits.max(axis=1)).mean()),
        "val_logit_var": float(logits.var(axis=1).mean()),
        "val_ece": _ece(1 / _exp(shifted).sum(axis=1), rank == 0),
    }
    assert found == pytest.approx(expected, rel=1e-5)  # float32 sums of 359 images


def _ece(confidence: Any, hit: Any) -> float:
    """Guo et al. 2017, equation 3, with 15 bins."""
    bins = [chosen for b in range(15) if (chosen := (confidence * 15).astype(int) == b).any()]
    return float(sum(abs(confidence[chosen].mean() - hit[chosen].mean()) * chosen.mean() for chosen in bins))


def test_a_network_that_is_not_finite_has_no_calibration() -> None:
    hits = [torch.tensor([True, False])]
    assert math.isnan(calibration_error([torch.tensor([0.5, math.nan])], hits))
    assert calibration_error([torch.tensor([0.9, 0.9])], hits) == pytest.approx(0.4)


def _exp(x: Any) -> Any:
    return torch.from_numpy(x).exp().numpy()


def _log(x: Any) -> Any:
    return torch.from_numpy(x).log().numpy()


def test_evaluation_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    run.model.train()
    evaluated(run, "val")
    assert run.model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())


def test_three_classes_have_no_top5(tmp_path: Path) -> None:
    class_folder(tmp_path / "pets")
    found = evaluated(make_run(tmp_path / "run", folder_spec(0), data_root=tmp_path), "val")
    assert "val_top1" in found
    assert "val_top5" not in found


def test_a_diverging_run_says_so_and_keeps_no_checkpoint_of_it(tmp_path: Path) -> None:
    wild = spec(epochs=3, optimizer={"lr": 1000.0, "weight_decay": 10.0}, schedule={"name": "constant", "warmup_epochs": 0})
    run = history(tmp_path, wild)
    with pytest.raises(Diverged, match=r"train_loss is .* at step \d+ \(lr 1000\)"):
        run.attempt()
    assert (run.metrics()[-1][2]["train_loss"] or math.inf) > 1e3
    for written in run.checkpoints:
        weights = checkpoint.load(tmp_path / written.path).weights.values()
        assert all(bool(tensor.isfinite().all()) for tensor in weights)


def test_a_stop_in_the_middle_of_a_divergence_writes_no_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with torch.no_grad():
        next(run.model.parameters()).fill_(float("nan"))
    with pytest.raises(Diverged):
        train(run, Progress.fresh(CPU), emit=lambda _: None, orders=StopAfter(1))
    assert not (tmp_path / "checkpoints").exists()


def test_a_checkpoint_that_cannot_be_written_is_outlived_until_the_last(tmp_path: Path) -> None:
    run = history(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "a1").write_text("in the way")
    with pytest.raises(OSError, match="a1"):
        run.attempt()
    assert [message.step for message in run.messages if isinstance(message, CheckpointFailed)] == [7, 14]
    assert run.points[-1].step == 21


def test_training_is_announced_once_and_work_in_order(tmp_path: Path) -> None:
    phases = [message.name for message in undisturbed(tmp_path, spec(epochs=2, schedule={})).messages if isinstance(message, Phase)]
    assert phases == ["training", "evaluating", "checkpointing", "evaluating", "checkpointing"]


def test_fp16_on_a_cpu_is_refused_with_the_way_out() -> None:
    with pytest.raises(PrecisionUnsupported, match="use bf16, fp32 or auto"):
        choose_precision("fp16", CPU)


def test_auto_is_bf16_where_the_cpu_has_units_for_it() -> None:
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    has_units = "avx512_bf16" in flags or "amx_bf16" in flags
    assert computes_in_bf16(CPU) == has_units
    assert choose_precision("auto", CPU) == ("bf16" if has_units else "fp32")
