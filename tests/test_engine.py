"""The loop: plain training where nothing special is asked, the same bits however often it is stopped, and its few ways to end."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it

from powergrad import checkpoint, determinism
from powergrad.engine import PrecisionUnsupported, Run, choose_precision, computes_in_bf16, train
from powergrad.evaluate import evaluate
from powergrad.progress import Diverged, Progress
from powergrad.protocol import CheckpointFailed, CheckpointWritten, Evaluation, Message, Note, Phase, Step
from powergrad.schedule import lr_at
from powergrad.spec import TrainSpec
from tests.data.folders import class_folder
from tests.training import CPU, NEVER, History, StopAfter, make_run, spec


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


def test_an_order_to_stop_is_obeyed_at_the_next_step_with_a_checkpoint_there(tmp_path: Path) -> None:
    stopped = history(tmp_path)
    assert stopped.attempt(StopAfter(5)) == "stopped"
    assert [c.step for c in stopped.checkpoints] == [5]
    assert not stopped.checkpoints[0].is_best


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
    }
    assert found == pytest.approx(expected, rel=1e-5)  # float32 sums of 359 images


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
