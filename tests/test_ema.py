"""The average of a run's weights: by its rule, evaluated, in every checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from powergrad import checkpoint, determinism
from powergrad.checkpoint import CheckpointBroken
from powergrad.ema import Ema
from powergrad.engine import Run, resume, train
from powergrad.evaluate import evaluate
from powergrad.progress import Progress
from powergrad.protocol import CheckpointSkipped, Evaluation, Message, ResumePoint
from powergrad.spec import EmaSpec, TrainSpec
from tests.data.folders import class_folder
from tests.training import CPU, History, TinyNet, make_run, spec

State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with determinism.settings(deterministic=True, threads=1):
        yield


def snapshot(model: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def by_hand(first: State, states: list[State], *, decay: float, warmup: bool) -> State:
    """In fp64, from the weights before the first step and those after each."""
    average = {name: tensor.double() for name, tensor in first.items()}
    for step, state in enumerate(states, start=1):
        kept = min(decay, (1 + step) / (10 + step)) if warmup else decay
        for name, tensor in state.items():
            average[name] = kept * average[name] + (1 - kept) * tensor.double() if tensor.is_floating_point() else tensor
    return average


@dataclass
class Watching:
    """Orders that look at the weights whenever they are asked for, which is before every step."""

    model: nn.Module
    seen: list[State] = field(default_factory=list)

    @property
    def stop(self) -> None:
        self.seen.append(snapshot(self.model))


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("decay", [0.5, 0.9999])
def test_the_average_of_a_run_is_that_of_a_loop_by_hand(decay: float, warmup: bool, tmp_path: Path) -> None:
    """Batch statistics are averaged too, their counter is copied. Tolerance: 21 steps in fp32."""
    run = make_run(tmp_path, spec(ema={"decay": decay, "warmup": warmup}))
    orders = Watching(run.model)
    train(run, Progress.fresh(CPU), emit=lambda _: None, orders=orders)
    first, *rest = [*orders.seen, snapshot(run.model)]
    assert len(rest) == 21
    assert run.ema is not None
    average = run.ema.model.state_dict()
    for name, expected in by_hand(first, rest, decay=decay, warmup=warmup).items():
        torch.testing.assert_close(average[name], expected.to(average[name].dtype), rtol=1e-5, atol=1e-6)
    assert average["1.num_batches_tracked"].item() == 21


def test_the_average_is_a_network_of_its_own_that_is_never_trained() -> None:
    model = TinyNet(3, 0)
    ema = Ema(model, EmaSpec())
    before = snapshot(ema.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ema.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())


def trained(run_dir: Path, chosen: TrainSpec) -> History:
    run = History(run_dir, lambda attempt: make_run(run_dir, chosen, attempt=attempt))
    assert run.attempt() == "succeeded"
    return run


def test_averaging_leaves_the_training_as_it_is(tmp_path: Path) -> None:
    assert trained(tmp_path / "with", spec(ema={})).final_sha256 == trained(tmp_path / "without", spec()).final_sha256


def scores_of_average(run: Run, average: State, split: str) -> dict[str, float]:
    judge = copy.deepcopy(run.model)
    judge.load_state_dict(average)
    part = run.data.val if split == "val" else run.data.test
    assert part is not None
    batches = run.data.held_out_batches(part, batch_size=64)
    found = evaluate(judge, batches, split=split, classes=3, device=CPU, autocast=run.autocast(), beat=lambda _: None)
    return {f"ema_{name}": value for name, value in found.items() if "logit" not in name}


def test_evaluations_score_the_average_beside_the_weights(tmp_path: Path) -> None:
    """The validation split with the average of its epoch, the test split with that of the best checkpoint."""
    for part in ("train", "val", "test"):
        class_folder(tmp_path / "pets" / part)
    data = {"dataset": "class_folder", "path": "pets", "image_size": 8, "batch_size": 8}
    averaged = spec(data=data, ema={"decay": 0.5}, optimizer={"lr": 0.5})
    history = History(tmp_path / "run", lambda attempt: make_run(tmp_path / "run", averaged, attempt=attempt, data_root=tmp_path))
    history.attempt()

    judge = history.make(2)
    averages = {c.path: checkpoint.load(tmp_path / "run" / c.path).ema or {} for c in history.checkpoints}
    said = [message for message in history.messages if isinstance(message, Evaluation)]
    assert [message.split for message in said] == ["val", "val", "val", "test"]
    best = [c for c in history.checkpoints if c.is_best][-1]
    for message, written in zip(said, [*history.checkpoints, best], strict=True):
        expected = scores_of_average(judge, averages[written.path], message.split)
        assert {name: value for name, value in message.metrics.items() if name.startswith("ema_")} == expected
    assert said[-1].metrics["ema_test_loss"] != said[-1].metrics["test_loss"]


def test_a_checkpoint_holds_the_average_and_vouches_for_it(tmp_path: Path) -> None:
    history = trained(tmp_path, spec(ema={}))
    older, newest = history.checkpoints[-2:]
    path = tmp_path / newest.path / checkpoint.AVERAGE
    assert checkpoint.verify(path.parent).files[checkpoint.AVERAGE].bytes == path.stat().st_size
    assert newest.total_bytes == sum((path.parent / name).stat().st_size for name in ("model.safetensors", "ema.safetensors", "state.pt"))

    contents = bytearray(path.read_bytes())
    contents[-1] ^= 1
    path.write_bytes(contents)
    with pytest.raises(CheckpointBroken, match=r"ema\.safetensors"):
        checkpoint.verify(path.parent)
    messages: list[Message] = []
    points = [ResumePoint(id=c.id, path=c.path, step=c.step, sha256=c.sha256) for c in (newest, older)]
    progress, point = resume(history.make(2), points, emit=messages.append)
    assert [message.id for message in messages if isinstance(message, CheckpointSkipped)] == [newest.id]
    assert point == points[1]
    assert progress.step == older.step


def test_an_average_that_is_gone_breaks_its_checkpoint(tmp_path: Path) -> None:
    history = trained(tmp_path, spec(epochs=1, schedule={}, ema={}))
    path = tmp_path / history.checkpoints[-1].path
    (path / checkpoint.AVERAGE).unlink()
    with pytest.raises(CheckpointBroken, match=r"ema\.safetensors"):
        checkpoint.verify(path)
