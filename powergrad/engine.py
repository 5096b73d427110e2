"""The training loop: from a network and a data set to checkpoints and metrics, with the same bits however often it is stopped.

Everything that the next step depends on is in `Progress`, the network, the optimizer, the scaler and torch's generators, and all of
them are in every checkpoint. Data order and augmentation need no state (powergrad.data.draws).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from powergrad import checkpoint
from powergrad.checkpoint import CheckpointBroken, CheckpointError
from powergrad.clip import clip_gradients
from powergrad.data import Batch, Data, Split
from powergrad.evaluate import evaluate
from powergrad.loss import power_grad_cross_entropy
from powergrad.protocol import (
    CheckpointFailed,
    CheckpointSkipped,
    CheckpointWritten,
    Evaluation,
    EvaluationProgress,
    Message,
    Metrics,
    Note,
    Phase,
    ResumePoint,
    Step,
)
from powergrad.schedule import lr_at
from powergrad.spec import TrainSpec

Precision = Literal["fp32", "bf16", "fp16"]
Emit = Callable[[Message], None]
Outcome = Literal["succeeded", "stopped"]

POINTS_PER_EPOCH = 4
LONGEST_SILENCE = 100
"""Steps between two log points at most: a chart and a stall detector want some, and one read in 100 steps costs nothing."""
BEAT_S = 5.0
"""Seconds between two signs of life during an evaluation."""
EVALUATION_BATCH = (64, 1024)
"""Bounds of the evaluation's batch, which is the training's between them."""


class Diverged(Exception):
    """The training loss is no longer finite."""


class PrecisionUnsupported(ValueError):
    """The device does not compute in the precision that was asked for."""


class Orders(Protocol):
    """What the outside wants. `stop` is read exactly once before every step."""

    @property
    def stop(self) -> Literal["checkpoint", "now"] | None:
        """checkpoint: write one and end; now: end."""
        ...


@dataclass(frozen=True)
class Best:
    """The checkpoint with the highest val_top1, the earliest of equals."""

    top1: float
    step: int
    path: str
    """Relative to the run's directory."""


@dataclass
class Progress:
    """How far a run has come; `window_*` sum up the steps since the last log point, on the device."""

    step: int
    window_loss: Tensor
    """() float64."""
    window_correct: Tensor
    """() int64."""
    window_images: int = 0
    best: Best | None = None

    @classmethod
    def fresh(cls, device: torch.device) -> Progress:
        return cls(0, torch.zeros((), dtype=torch.float64, device=device), torch.zeros((), dtype=torch.int64, device=device))

    def count(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Adds one step. Reads nothing from the device."""
        self.window_loss += loss.detach() * len(labels)
        self.window_correct += (logits.detach().argmax(dim=1) == labels).sum()
        self.window_images += len(labels)
        self.step += 1

    def read(self) -> tuple[float, float]:
        """Mean loss and accuracy since the last log point, and begins the next window. Waits for the device."""
        loss, correct = torch.stack((self.window_loss, self.window_correct.double())).tolist()
        images, self.window_images = self.window_images, 0
        self.window_loss.zero_()
        self.window_correct.zero_()
        return loss / images, correct / images

    def to_state(self) -> dict[str, Any]:
        return vars(self) | {"best": None if self.best is None else vars(self.best)}

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> Progress:
        best = None if state["best"] is None else Best(**state["best"])
        loss, correct = state["window_loss"].to(device), state["window_correct"].to(device)
        return cls(state["step"], loss, correct, state["window_images"], best)


@dataclass(frozen=True)
class Run:
    """The parts of one run, set up and ready to step."""

    spec: TrainSpec
    attempt: int
    run_dir: Path
    device: torch.device
    precision: Precision
    data: Data
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    batch_size: int

    @property
    def steps_per_epoch(self) -> int:
        return len(self.data.train) // self.batch_size

    @property
    def steps(self) -> int:
        return self.spec.epochs * self.steps_per_epoch

    @property
    def log_interval(self) -> int:
        """Steps between log points, counted from each epoch's begin."""
        return min(LONGEST_SILENCE, math.ceil(self.steps_per_epoch / POINTS_PER_EPOCH))

    def autocast(self) -> torch.autocast:
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.precision != "fp32")


def train(run: Run, progress: Progress, *, emit: Emit, orders: Orders) -> Outcome:
    """Takes the steps from `progress.step` to the last one, or until `orders.stop`.

    Raises Diverged, CheckpointError (for the last checkpoint and for one that was asked for only), DataUnreadable.
    """
    spec, model, optimizer, scaler = run.spec, run.model, run.optimizer, run.scaler
    clock = _Clock(progress.step, run.steps)
    published_step = progress.step  # a resumed run stands on a checkpoint already, a fresh one needs none at step 0
    batches: Iterator[Batch] = iter(())
    model.train()

    while progress.step < run.steps:
        if (stop := orders.stop) is not None:
            if stop == "checkpoint" and progress.step != published_step:
                _refuse_nonfinite(progress)
                _publish(run, progress, {}, emit=emit)
            return "stopped"
        epoch, batch = divmod(progress.step, run.steps_per_epoch)
        if batch == 0 or clock.steps == 0:
            batches = run.data.train_batches(epoch=epoch, batch_size=run.batch_size, first=batch)
        if clock.steps == 0:
            emit(Phase(name="training"))

        images, labels = next(batches)  # (B, 3, S, S), (B,)
        lr = lr_at(progress.step, spec=spec, steps_per_epoch=run.steps_per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with run.autocast():
            logits = model(images)  # (B, C)
        loss = power_grad_cross_entropy(logits.float(), labels, alpha=spec.loss.alpha, label_smoothing=spec.loss.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if spec.clip is not None:
            scaler.unscale_(optimizer)
            clip_gradients(model, spec.clip)
        scaler.step(optimizer)  # the weights change here
        scaler.update()
        progress.count(loss, logits, labels)
        clock.steps += 1

        batch += 1
        if batch % run.log_interval == 0 or batch == run.steps_per_epoch:
            _say_step(run, progress, lr, clock, emit=emit)
        if batch == run.steps_per_epoch:
            batches = iter(())  # lets the epoch's loader processes go
            metrics = _score(run, model, run.data.val, "val", epoch=epoch + 1, step=progress.step, emit=emit)
            if (epoch + 1) % spec.checkpoint.every_epochs == 0 or progress.step == run.steps:
                published_step = _checkpoint(run, progress, metrics, published_step, emit=emit)
            clock.restart_lap()
    return "succeeded"


def resume(run: Run, points: list[ResumePoint], *, emit: Emit) -> tuple[Progress, ResumePoint | None]:
    """Puts the first checkpoint that verifies into the run's parts; a fresh start, and None, where none does.

    points: newest first.  Raises RuntimeError for a checkpoint of another network.
    """
    for point in points:
        path = run.run_dir / point.path
        try:
            checkpoint.verify(path, sha256=point.sha256)
            loaded = checkpoint.load(path)
        except CheckpointBroken as error:
            emit(CheckpointSkipped(id=point.id, path=point.path, detail=str(error)))
            continue
        run.model.load_state_dict(loaded.weights)
        run.optimizer.load_state_dict(loaded.state["optimizer"])
        run.scaler.load_state_dict(loaded.state["scaler"])
        _set_generators(loaded.state["generators"])
        return Progress.from_state(loaded.state["progress"], run.device), point
    return Progress.fresh(run.device), None


def choose_precision(asked: Literal["auto", "fp32", "bf16", "fp16"], device: torch.device) -> Precision:
    """What to compute in; auto is bf16 where the device has units for it, else fp32. Raises PrecisionUnsupported."""
    if asked == "fp16" and device.type == "cpu":
        raise PrecisionUnsupported("precision='fp16': a CPU has no fast fp16 arithmetic; use bf16, fp32 or auto, or a GPU")
    if asked != "auto":
        return asked
    return "bf16" if computes_in_bf16(device) else "fp32"


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 natively. A ResNet-18 step takes 0.54 of fp32's time with AVX512_BF16 (measured), less with AMX."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # torch has no public name for these; mkldnn's own check also says yes where bf16 is emulated, and slower than fp32
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check is not None and check() for check in checks)


def _say_step(run: Run, progress: Progress, lr: float, clock: _Clock, *, emit: Emit) -> None:
    """Says the metrics since the last log point. Raises Diverged, once they are said, if the loss is not finite."""
    images = progress.window_images
    loss, top1 = progress.read()
    emit(
        Step(
            step=progress.step,
            epoch=progress.step / run.steps_per_epoch,
            metrics=_finite({"train_loss": loss, "train_top1": top1, "lr": lr}),
            images_per_s=clock.lap(images),
            eta_s=clock.eta_s(),
        )
    )
    if not math.isfinite(loss):
        raise Diverged(f"train_loss is {loss} at step {progress.step} (lr {lr:.4g})")


def _refuse_nonfinite(progress: Progress) -> None:
    if not math.isfinite(float(progress.window_loss)):
        raise Diverged(f"train_loss is {float(progress.window_loss)} at step {progress.step}")


def _score(
    run: Run, model: nn.Module, split: Split, name: Literal["val", "test"], *, epoch: int, step: int, emit: Emit
) -> dict[str, float]:
    emit(Phase(name="evaluating" if name == "val" else "testing"))
    smallest, largest = EVALUATION_BATCH
    batches = run.data.held_out_batches(split, batch_size=min(max(run.batch_size, smallest), largest))
    metrics = evaluate(
        model,
        batches,
        split=name,
        classes=len(run.data.class_names),
        device=run.device,
        autocast=run.autocast(),
        beat=_every(BEAT_S, lambda done: emit(EvaluationProgress(done=done, total=len(split)))),
    )
    emit(Evaluation(step=step, epoch=epoch, split=name, metrics=_finite(metrics)))
    return metrics


def _checkpoint(run: Run, progress: Progress, metrics: dict[str, float], published_step: int, *, emit: Emit) -> int:
    """Publishes the checkpoint of an epoch's end; returns the step of the newest one.

    A failure to write is said and outlived, except at the very end. The test split is scored before the last checkpoint is published:
    so every metric point lies in the past of a checkpoint or is cut back with the steps after it, and none is ever said twice.
    """
    last = progress.step == run.steps
    if last and run.data.test is not None:
        _score(
            run, _best_model(run, progress, metrics, emit=emit), run.data.test, "test", epoch=run.spec.epochs, step=progress.step, emit=emit
        )
    try:
        _publish(run, progress, metrics, emit=emit, may_be_best=True)
    except (CheckpointError, OSError) as error:
        if last:
            raise
        emit(CheckpointFailed(step=progress.step, detail=str(error)))
        return published_step
    return progress.step


def _best_model(run: Run, progress: Progress, metrics: dict[str, float], *, emit: Emit) -> nn.Module:
    if progress.best is None or _beats(metrics, progress.best):
        return run.model
    path = run.run_dir / progress.best.path
    try:
        checkpoint.verify(path)
        weights = checkpoint.load(path).weights
    except CheckpointBroken as error:
        emit(Note(detail=f"the best checkpoint is gone, the test split is scored with the last weights ({error})"))
        return run.model
    model = copy.deepcopy(run.model)
    model.load_state_dict(weights)
    return model


def _publish(run: Run, progress: Progress, metrics: dict[str, float], *, emit: Emit, may_be_best: bool = False) -> None:
    """may_be_best: not for a checkpoint that only an order brought about, or the best would depend on when a run was stopped."""
    emit(Phase(name="checkpointing"))
    is_best = may_be_best and _beats(metrics, progress.best)
    path = checkpoint.relative_path(attempt=run.attempt, step=progress.step)
    best = Best(top1=metrics["val_top1"], step=progress.step, path=path) if is_best else progress.best
    epoch = progress.step // run.steps_per_epoch
    published = checkpoint.publish(
        run.run_dir,
        attempt=run.attempt,
        step=progress.step,
        epoch=epoch,
        weights=run.model.state_dict(),
        state={
            "progress": replace(progress, best=best).to_state(),
            "optimizer": run.optimizer.state_dict(),
            "scaler": run.scaler.state_dict(),
            "generators": _generators(run.device),
        },
    )
    progress.best = best
    emit(
        CheckpointWritten(
            id=published.id,
            path=published.path,
            step=progress.step,
            epoch=epoch,
            metrics=_finite(metrics),
            bytes=published.manifest.model.bytes,
            sha256=published.manifest.model.sha256,
            total_bytes=published.manifest.total_bytes,
            is_best=is_best,
        )
    )


def _beats(metrics: dict[str, float], best: Best | None) -> bool:
    return best is None or metrics["val_top1"] > best.top1


def _finite(metrics: dict[str, float]) -> Metrics:
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _generators(device: torch.device) -> dict[str, Tensor | None]:
    """torch's own random state: dropout and the like draw from it."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}


def _set_generators(state: dict[str, Tensor | None]) -> None:
    cpu, cuda = state["cpu"], state["cuda"]
    assert cpu is not None, "every checkpoint has it"
    torch.set_rng_state(cpu)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)


def _every(seconds: float, say: Callable[[int], None]) -> Callable[[int], None]:
    """`say`, at most once in so many seconds."""
    last = time.monotonic()

    def beat(done: int) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            say(done)

    return beat


@dataclass
class _Clock:
    """Speed of this attempt; tells nothing to the training itself."""

    first_step: int
    last_step: int
    steps: int = 0
    """Taken in this attempt."""
    begun: float = field(default_factory=time.monotonic)
    lap_begun: float = field(default_factory=time.monotonic)

    def lap(self, images: int) -> float:
        """Images a second since the last lap."""
        seconds, self.lap_begun = time.monotonic() - self.lap_begun, time.monotonic()
        return images / max(seconds, 1e-9)

    def restart_lap(self) -> None:
        """What came since is not training."""
        self.lap_begun = time.monotonic()

    def eta_s(self) -> float:
        """Seconds to the last step at this attempt's mean pace, evaluations included."""
        done = self.first_step + self.steps
        return (time.monotonic() - self.begun) / self.steps * (self.last_step - done)
