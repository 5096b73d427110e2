"""The training loop: from a network and a data set to checkpoints and metrics, with the same bits however often it is stopped.

Everything that the next step depends on is in `Progress`, the network, the optimizer, the scaler and torch's generators, and all of
them are in every checkpoint. Data order and augmentation need no state (powergrad.data.draws).
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from powergrad import checkpoint
from powergrad.checkpoint import CheckpointBroken, CheckpointError
from powergrad.clip import clip_gradients
from powergrad.data import Batch, Data, Split
from powergrad.distributed import ALONE, Ranks
from powergrad.ema import Ema
from powergrad.evaluate import evaluate
from powergrad.loss import power_grad_cross_entropy
from powergrad.progress import Best, Diverged, Progress
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
    RolledBack,
    Step,
)
from powergrad.schedule import alpha_at, lr_at
from powergrad.spec import AlphaSchedule, TrainSpec
from powergrad.telemetry import Telemetry

Precision = Literal["fp32", "bf16", "fp16"]
Emit = Callable[[Message], None]
Outcome = Literal["succeeded", "stopped", "held"]

POINTS_PER_EPOCH = 4
LONGEST_SILENCE = 100
"""Steps between two log points at most: a chart and a stall detector want some, and one read in 100 steps costs nothing."""
BEAT_S = 5.0
"""Seconds between two signs of life during an evaluation."""
EVALUATION_BATCH = (64, 1024)
"""Bounds of the evaluation's batch, which is the training's between them."""


class PrecisionUnsupported(ValueError):
    """The device does not compute in the precision that was asked for."""


class Orders(Protocol):
    """What the outside wants. `stop` is read exactly once before every step."""

    @property
    def stop(self) -> Literal["checkpoint", "now"] | None:
        """checkpoint: write one and end; now: end."""
        ...


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
    """Images of one step, over all ranks."""
    classifiers: tuple[str, ...] = ("fc",)
    """Dotted names of the layers that give the logits."""
    class_weights: Tensor | None = None
    """(C,) on the device."""
    ema: Ema | None = None
    telemetry: Telemetry | None = None
    ranks: Ranks = ALONE
    net: nn.Module | None = None
    """The model as several ranks share it; None where this process is alone."""
    hold_epoch: int | None = None
    """Epochs after which to end with a checkpoint and take no further step; None: at the last one only."""

    @property
    def steps_per_epoch(self) -> int:
        return len(self.data.train) // self.batch_size

    @property
    def steps(self) -> int:
        return self.spec.epochs * self.steps_per_epoch

    def is_held_at(self, step: int) -> bool:
        """Whether no step is to be taken after so many."""
        return self.hold_epoch is not None and step >= self.hold_epoch * self.steps_per_epoch

    @property
    def log_interval(self) -> int:
        """Steps between log points, counted from each epoch's begin."""
        return min(LONGEST_SILENCE, math.ceil(self.steps_per_epoch / POINTS_PER_EPOCH))

    @property
    def alpha_moves(self) -> bool:
        return isinstance(self.spec.loss.alpha, AlphaSchedule)

    def held_out_batches(self, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of a split, in batches of the training's size within bounds."""
        smallest, largest = EVALUATION_BATCH
        size = min(max(self.batch_size // self.ranks.size, smallest), largest)
        return self.data.held_out_batches(split, batch_size=size, rank=self.ranks.rank, ranks=self.ranks.size)

    def state(self, progress: Progress) -> dict[str, Any]:
        """What a checkpoint holds beside the weights. Collective: the windows are every rank's own."""
        windows = torch.zeros(self.ranks.size, 2, dtype=torch.float64, device=self.device)
        windows[self.ranks.rank] = torch.stack((progress.window_loss, progress.window_correct.double()))
        return {
            "progress": progress.to_state(),
            "windows": self.ranks.sum_(windows),  # of zeros and one value each: exact
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "generators": _generators(self.device),
        }

    def autocast(self) -> torch.autocast:
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.precision != "fp32")


def train(run: Run, progress: Progress, *, emit: Emit, orders: Orders) -> Outcome:
    """Takes the steps from `progress.step` to the last one, or until `orders.stop`, or to the epoch where the run is to hold.

    Raises Diverged, CheckpointError (for the last checkpoint, for one that was asked for and for that of a hold only), DataUnreadable.
    """
    way_back = _WayBack(run, progress) if run.spec.on_divergence == "rollback" else None
    while True:
        try:
            return _advance(run, progress, way_back, emit=emit, orders=orders)
        except Diverged as error:
            if way_back is None or not way_back.is_open:
                raise
            way_back.go(progress, error, emit=emit)


def _advance(run: Run, progress: Progress, way_back: _WayBack | None, *, emit: Emit, orders: Orders) -> Outcome:
    spec, model, optimizer, scaler, ranks = run.spec, run.model, run.optimizer, run.scaler, run.ranks
    clock = _Clock(progress.step, run.steps)
    published_step = progress.step  # a resumed run stands on a checkpoint already, a fresh one needs none at step 0
    batches: Iterator[Batch] = iter(())
    model.train()

    while progress.step < run.steps and not progress.ended_early:
        stop, is_held = _agreed(orders.stop, ranks), run.is_held_at(progress.step)
        if stop is not None or is_held:
            # one that is not due comes of a hold as it does of an order: nothing of what follows may depend on where a run was stopped
            if stop != "now" and progress.step != published_step:
                _refuse_nonfinite(run, progress)
                _publish(run, replace(progress, way_back=None if way_back is None else way_back.parts()), {}, emit=emit)
            return "held" if is_held and stop != "now" else "stopped"
        epoch, step_of_epoch = divmod(progress.step, run.steps_per_epoch)
        if step_of_epoch == 0 or clock.steps == 0:
            batches = run.data.train_batches(
                epoch=epoch, batch_size=run.batch_size, first=step_of_epoch, parts=spec.accumulate, rank=ranks.rank, ranks=ranks.size
            )
        if clock.steps == 0:
            emit(Phase(name="training"))

        lr = progress.lr_scale * lr_at(progress.step, spec=spec, steps_per_epoch=run.steps_per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr
        alpha = alpha_at(progress.step, spec=spec, steps_per_epoch=run.steps_per_epoch)
        optimizer.zero_grad(set_to_none=True)
        batch = next(batches)
        normaliser = _normaliser(run, batch)
        for number, (images, targets, labels) in enumerate(batch.parts, start=1):  # (b, 3, S, S), (b,) or (b, C), (b,)
            with _gathering_gradients(run, last=number == spec.accumulate):
                with run.autocast():
                    logits = (run.net or model)(images)  # (b, C)
                loss = _loss(run, logits, targets, alpha=alpha) / normaliser
                scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            progress.count(loss, logits, labels, batch_size=run.batch_size)

        step = progress.step + 1
        is_point = spec.telemetry is not None and spec.telemetry.is_due(step)  # on all ranks, of which the first one looks
        looks = is_point and run.telemetry is not None
        if looks or spec.clip is not None:
            scaler.unscale_(optimizer)
        seen = _look(run, step, logits, targets, alpha) if looks else {}
        if spec.clip is not None:
            clip_gradients(model, spec.clip, classifiers=run.classifiers)
        scaler.step(optimizer)  # the weights change here
        scaler.update()
        progress.step, progress.window_images = step, progress.window_images + run.batch_size
        if seen:
            progress.remember_look(seen)
        if run.ema is not None:
            run.ema.update(model, step)
        clock.steps += 1

        ends_epoch = step_of_epoch + 1 == run.steps_per_epoch
        if (step_of_epoch + 1) % run.log_interval == 0 or ends_epoch or is_point:
            _say_step(run, progress, {"lr": lr} | ({"alpha": alpha} if run.alpha_moves else {}) | seen, clock, emit=emit)
        if ends_epoch:
            batches = iter(())  # lets the epoch's loader processes go
            metrics = _score_epoch(run, progress, epoch=epoch + 1, emit=emit)
            if (epoch + 1) % spec.checkpoint.every_epochs == 0 or progress.step == run.steps or progress.ended_early:
                published_step = _checkpoint(run, progress, metrics, published_step, epoch=epoch + 1, emit=emit)
                if way_back is not None and published_step == progress.step:
                    way_back.move_to(progress)
            clock.restart_lap()
    return "succeeded"


def _agreed(stop: Literal["checkpoint", "now"] | None, ranks: Ranks) -> Literal["checkpoint", "now"] | None:
    """What the first rank has been told, on all of them at the same step."""
    words: tuple[Literal["checkpoint", "now"] | None, ...] = (None, "checkpoint", "now")
    return words[ranks.agree(words.index(stop))]


def _loss(run: Run, logits: Tensor, targets: Tensor, *, alpha: float) -> Tensor:
    """Summed over the images: parts and ranks add up to the batch."""
    return power_grad_cross_entropy(
        logits.float(), targets, alpha=alpha, weight=run.class_weights, label_smoothing=run.spec.loss.label_smoothing, reduction="sum"
    )


def _normaliser(run: Run, batch: Batch) -> Tensor | int:
    """What the batch's summed loss is divided by: its images or, as `F.cross_entropy` does it for class indices, the weights of their classes."""
    if run.class_weights is None or batch.is_mixed:
        return run.batch_size
    # a batch of classes without weight has a loss of 0, not of 0 / 0
    return run.class_weights[batch.labels].sum().clamp(min=torch.finfo(torch.float32).tiny)


def _look(run: Run, step: int, logits: Tensor, targets: Tensor, alpha: float) -> dict[str, float]:
    assert run.telemetry is not None, "it is due"
    return run.telemetry.look(step, logits=logits.detach(), targets=targets, alpha=alpha, label_smoothing=run.spec.loss.label_smoothing)


def _gathering_gradients(run: Run, *, last: bool) -> AbstractContextManager[None]:
    """Ranks add up their gradients once a step, with the last part."""
    return contextlib.nullcontext() if run.net is None or last else run.ranks.no_sync(run.net)


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
        return _restore(run, loaded.weights, loaded.ema, loaded.state), point
    return Progress.fresh(run.device), None


def _restore(run: Run, weights: Mapping[str, Tensor], ema: Mapping[str, Tensor] | None, state: dict[str, Any]) -> Progress:
    run.model.load_state_dict(weights)
    if run.ema is not None and ema is not None:
        run.ema.model.load_state_dict(ema)
    run.optimizer.load_state_dict(state["optimizer"])
    run.scaler.load_state_dict(state["scaler"])
    _set_generators(state["generators"])
    progress = Progress.from_state(state["progress"], run.device)
    windows: Tensor | None = state.get("windows")  # an earlier release, of one rank, had none
    if windows is not None and (run.ranks.size > 1 or len(windows) > 1):
        loss, correct = _own_window(windows.to(run.device), run.ranks)
        progress.window_loss.copy_(loss)
        progress.window_correct.copy_(correct)
    return progress


def _own_window(windows: Tensor, ranks: Ranks) -> Tensor:
    """(2,): this rank's part of (R, 2); where there were more or fewer ranks, the first one takes it all."""
    if len(windows) == ranks.size:
        return windows[ranks.rank]
    return windows.sum(0) * ranks.is_first


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


def _say_step(run: Run, progress: Progress, values: Mapping[str, float], clock: _Clock, *, emit: Emit) -> None:
    """Says the metrics since the last log point. Raises Diverged, once they are said, if the loss shows it. Waits for the device."""
    images = progress.window_images
    loss, correct = run.ranks.sum_(torch.stack((progress.window_loss, progress.window_correct.double()))).tolist()
    loss, top1 = loss / images, correct / images
    progress.begin_window()
    progress.last_window = {"train_loss": loss, "train_top1": top1, "lr": values["lr"]}
    emit(
        Step(
            step=progress.step,
            epoch=progress.step / run.steps_per_epoch,
            metrics=_finite({"train_loss": loss, "train_top1": top1, **values}),
            images_per_s=clock.lap(images),
            eta_s=clock.eta_s(),
        )
    )
    progress.refuse_divergence(loss, classes=len(run.data.class_names), lr=values["lr"])


def _refuse_nonfinite(run: Run, progress: Progress) -> None:
    """Before a checkpoint that an order brought about."""
    loss = float(run.ranks.sum_(progress.window_loss.clone()))
    if not math.isfinite(loss):
        raise Diverged(f"train_loss is {loss} at step {progress.step}")


def _score_epoch(run: Run, progress: Progress, *, epoch: int, emit: Emit) -> dict[str, float]:
    """Scores the validation split, and decides whether more epochs are worth it."""
    seen = run.telemetry.watch_features() if run.telemetry is not None else contextlib.nullcontext()
    with seen:
        metrics = _score(run, run.model, run.data.val, "val", emit=emit)
    if run.telemetry is not None:
        metrics |= run.telemetry.at_evaluation(progress.step, epoch, metrics=metrics, train_top1=progress.last_window.get("train_top1"))
    if run.ema is not None:
        metrics |= _averaged(_score(run, run.ema.model, run.data.val, "val", emit=emit))
    emit(Evaluation(step=progress.step, epoch=epoch, split="val", metrics=_finite(metrics)))
    progress.scores.append({"step": progress.step, "epoch": epoch, **progress.last_window, **metrics})
    stopping = run.spec.early_stopping
    if stopping is not None and progress.patience.see(metrics[stopping.metric], stopping) and epoch < run.spec.epochs:
        progress.ended_early = f"{stopping.metric} has not improved for {stopping.patience_epochs} epoch(s): ended after epoch {epoch}"
        emit(Note(detail=progress.ended_early))
    return metrics


def _averaged(metrics: Mapping[str, float]) -> dict[str, float]:
    """Loss and accuracies of the averaged weights, by their names."""
    return {f"ema_{name}": value for name, value in metrics.items() if "logit" not in name}


def _score(run: Run, model: nn.Module, split: Split, name: Literal["val", "test"], *, emit: Emit) -> dict[str, float]:
    emit(Phase(name="evaluating" if name == "val" else "testing"))
    run.ranks.broadcast_(model.buffers())  # batch statistics of the first rank's images are the run's
    return evaluate(
        model,
        run.held_out_batches(split),
        split=name,
        classes=len(run.data.class_names),
        device=run.device,
        autocast=run.autocast(),
        beat=_every(BEAT_S, lambda done: emit(EvaluationProgress(done=done * run.ranks.size, total=len(split)))),
    )


def _checkpoint(run: Run, progress: Progress, metrics: dict[str, float], published_step: int, *, epoch: int, emit: Emit) -> int:
    """Publishes the checkpoint of an epoch's end; returns the step of the newest one.

    A failure to write is said and outlived, except at the very end. The test split is scored before the last checkpoint is published:
    so every metric point lies in the past of a checkpoint or is cut back with the steps after it, and none is ever said twice.
    """
    last = progress.step == run.steps or bool(progress.ended_early)
    if last and run.data.test is not None:
        _score_test(run, run.data.test, progress, metrics, epoch=epoch, emit=emit)
    try:
        _publish(run, progress, metrics, emit=emit, may_be_best=True)
    except (CheckpointError, OSError) as error:
        if last:
            raise
        emit(CheckpointFailed(step=progress.step, detail=str(error)))
        return published_step
    return progress.step


def _score_test(run: Run, split: Split, progress: Progress, metrics: dict[str, float], *, epoch: int, emit: Emit) -> None:
    best = None if progress.best is None or _beats(metrics, progress.best) else progress.best
    model, ema = best_models(run, best, emit=emit)
    found = _score(run, model, split, "test", emit=emit)
    if ema is not None:
        found |= _averaged(_score(run, ema, split, "test", emit=emit))
    progress.test = found
    emit(Evaluation(step=progress.step, epoch=epoch, split="test", metrics=_finite(found)))


def best_models(run: Run, best: Best | None, *, emit: Emit) -> tuple[nn.Module, nn.Module | None]:
    """The network with the weights of the best checkpoint, and their average if there is one; best: None is the run's own, as it is now."""
    now = run.model, None if run.ema is None else run.ema.model
    if best is None:
        return now
    path = run.run_dir / best.path
    try:
        checkpoint.verify(path)
        loaded = checkpoint.load(path)
    except CheckpointBroken as error:
        emit(Note(detail=f"the best checkpoint is gone, the last weights stand in for it ({error})"))
        return now
    model = copy.deepcopy(run.model)
    model.load_state_dict(loaded.weights)
    if run.ema is None or loaded.ema is None:
        return model, None
    average = copy.deepcopy(run.ema.model)
    average.load_state_dict(loaded.ema)
    return model, average


def _publish(run: Run, progress: Progress, metrics: dict[str, float], *, emit: Emit, may_be_best: bool = False) -> None:
    """may_be_best: not for a checkpoint that only an order brought about, or the best would depend on when a run was stopped.

    The first rank writes, all of them know whether it could.
    """
    emit(Phase(name="checkpointing"))
    is_best = may_be_best and _beats(metrics, progress.best)
    path = checkpoint.relative_path(attempt=run.attempt, step=progress.step)
    best = Best(top1=metrics["val_top1"], step=progress.step, path=path) if is_best else progress.best
    state = run.state(replace(progress, best=best))
    with run.ranks.first_succeeds() as is_mine:
        if is_mine:
            emit(_written(run, progress.step, state, metrics, is_best=is_best))
    progress.best = best


def _written(run: Run, step: int, state: dict[str, Any], metrics: dict[str, float], *, is_best: bool) -> CheckpointWritten:
    epoch = step // run.steps_per_epoch
    published = checkpoint.publish(
        run.run_dir,
        attempt=run.attempt,
        step=step,
        epoch=epoch,
        weights=run.model.state_dict(),
        ema=None if run.ema is None else run.ema.model.state_dict(),
        state=state,
    )
    return CheckpointWritten(
        id=published.id,
        path=published.path,
        step=step,
        epoch=epoch,
        metrics=_finite(metrics),
        bytes=published.manifest.model.bytes,
        sha256=published.manifest.model.sha256,
        total_bytes=published.manifest.total_bytes,
        is_best=is_best,
    )


class _WayBack:
    """Where a diverged run goes on from, at half the learning rate: the newest checkpoint that was due or, before there is one, its
    first weights. One that an order brought about is none, or the bits would depend on when a run was stopped: it carries the parts of
    the place to go back to instead.
    """

    MOST = 3

    def __init__(self, run: Run, progress: Progress) -> None:
        self._run = run
        self._path: Path | None = None
        self._scale, self._count = progress.lr_scale, progress.rollbacks
        now: dict[str, Any] = {"weights": dict(run.model.state_dict()), "ema": self._average(), "state": run.state(progress)}
        # where a run begins, or resumes, it is kept in memory: a resumed one's checkpoint may be pruned before the next is written
        self._kept = progress.way_back or copy.deepcopy(now)
        self._step: int = self._kept["state"]["progress"]["step"]
        progress.way_back = None

    @property
    def is_open(self) -> bool:
        return self._count < self.MOST

    def move_to(self, progress: Progress) -> None:
        """A newer checkpoint has been published."""
        self._path = self._run.run_dir / checkpoint.relative_path(attempt=self._run.attempt, step=progress.step)
        self._scale, self._count, self._step = progress.lr_scale, progress.rollbacks, progress.step

    def go(self, progress: Progress, error: Diverged, *, emit: Emit) -> None:
        """Puts the run back and `progress` with it."""
        run, from_step = self._run, progress.step
        # copied again: an optimizer works on the very tensors it has loaded
        vars(progress).update(vars(_restore(run, **copy.deepcopy(self.parts()))))
        self._count, self._scale = self._count + 1, self._scale / 2
        progress.rollbacks, progress.lr_scale = self._count, self._scale
        if run.telemetry is not None:
            run.telemetry.rolled_back(progress.step)
        emit(
            RolledBack(
                from_step=from_step,
                to_step=progress.step,
                checkpoint=checkpoint.checkpoint_id(self._step) if self._step else "",
                lr_scale=progress.lr_scale,
                detail=f"{error}: back to step {progress.step}, {progress.lr_scale:g} times the learning rate",
            )
        )

    def parts(self) -> dict[str, Any]:
        """The weights, the ema and the state to go back to."""
        if self._path is None:
            return self._kept
        loaded = checkpoint.load(self._path)
        return {"weights": loaded.weights, "ema": loaded.ema, "state": loaded.state}

    def _average(self) -> dict[str, Tensor] | None:
        return None if self._run.ema is None else dict(self._run.ema.model.state_dict())


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
