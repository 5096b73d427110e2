"""One attempt of one run, as a process: told what to do by a `TrainerConfig`, heard through a pipe, held on a short lease.

`run` is the attempt itself, in any process. `main` is the body of a process of its own: it may run until its deadline, which whoever
holds the other end of its control pipe renews; when the deadline passes or the pipe ends, the process ends, so that no trainer outlives
its supervisor. It knows no database and no network.
"""

from __future__ import annotations

import copy
import errno
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from powergrad import checkpoint, determinism, products
from powergrad.checkpoint import CheckpointBroken, CheckpointError, StorageFull
from powergrad.data import Data, DataMissing, DataUnreadable, open_data
from powergrad.distributed import ALONE, Ranks, launch
from powergrad.ema import Ema
from powergrad.engine import Emit, Orders, PrecisionUnsupported, Run, choose_precision, computes_in_bf16, resume, train
from powergrad.loss import power_grad_cross_entropy
from powergrad.models import PretrainedMissing, build_model, classifiers_of, load_weights, preprocessing
from powergrad.optim import build_optimizer
from powergrad.process import DEADLINE_PASSED, ORPHANED
from powergrad.progress import Diverged, Progress
from powergrad.protocol import (
    ArtifactWritten,
    CheckpointFailed,
    CheckpointSkipped,
    CheckpointWritten,
    Control,
    Done,
    Evaluation,
    Failure,
    FailureCode,
    InitialWeights,
    Message,
    Note,
    Phase,
    Plan,
    ResumePoint,
    RolledBack,
    Step,
    TrainerConfig,
    boottime_s,
    decode_control,
    encode,
)
from powergrad.schedule import alpha_at
from powergrad.spec import TorchvisionData, TrainSpec
from powergrad.telemetry import Telemetry

log = logging.getLogger(__name__)

BEAT_S = 5.0
"""Seconds between two signs of life while data load."""

PRELOAD = [
    "powergrad.trainer",
    "powergrad.preload",
]
"""Modules that a template process imports so that its forks need not: all that a run would otherwise import on its way to the first step."""


CONTEXT_BYTES = 512 << 20
"""About what CUDA, cuBLAS and cuDNN take of a GPU for a process before it has a tensor; torch's allocator does not count it."""

WEIGHTS = "weights"
"""Folder of pretrained weights below the data root."""


class SpecUnfit(ValueError):
    """The spec does not fit what the data turned out to be."""


class StandingOrders:
    """Orders that may change at any time, from any thread."""

    def __init__(self) -> None:
        self._stop: Literal["checkpoint", "now"] | None = None

    @property
    def stop(self) -> Literal["checkpoint", "now"] | None:
        return self._stop

    def give(self, stop: Literal["checkpoint", "now"]) -> None:
        """A later `now` overrules `checkpoint`, never the other way round."""
        if self._stop != "now":
            self._stop = stop


def run(config: TrainerConfig, *, emit: Emit, orders: Orders) -> Done | Failure:
    """Trains until all epochs are done, an order or a hold stops it, or it fails; says everything through `emit`, the end included.

    With several ranks this process becomes their agent: it must have touched neither CUDA nor a parallel region.
    """
    say = _logged(emit)
    say(Phase(name="starting"))
    try:
        end = _attempt(config, ALONE, say, orders) if config.ranks == 1 else launch(config, body=_attempt, emit=say, orders=orders)
    except Exception as error:  # noqa: BLE001 # the agent's own: no port, no memory for another process
        end = failure_of(error)
    if isinstance(end, Done):
        say(Phase(name="finished"))
    say(end)
    return end


def _attempt(config: TrainerConfig, ranks: Ranks, emit: Emit, orders: Orders) -> Done | Failure:
    """The attempt as one rank takes part in it; its end is returned, not said."""

    def statistical(op: str) -> None:
        emit(Note(detail=f"{op} has no deterministic form on {config.device}: the run is statistical"))

    try:
        with determinism.settings(deterministic=config.spec.deterministic, threads=config.cpu_threads), determinism.watched(statistical):
            return _train(config, ranks, emit=emit, orders=orders)
    except Exception as error:  # noqa: BLE001 # this is where every error becomes a word of the protocol
        return _on_its_part(failure_of(error), config.gpu_share)


def _on_its_part(failure: Failure, share: float) -> Failure:
    """Of the memory of a part of a GPU there is an easy way to have more."""
    if failure.code != "out_of_memory_gpu" or share == 1:
        return failure
    return failure.model_copy(update={"hint": f"ask for a larger part of a GPU than resources.gpus = {share:g}, or {failure.hint}"})


def _keep_to_its_part(device: torch.device, share: float) -> None:
    """Make an allocation beyond the part fail here, instead of one of whoever works beside it."""
    if device.type == "cuda" and share < 1:
        total_bytes = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(allocator_fraction(share, total_bytes), device)


def allocator_fraction(share: float, total_bytes: int) -> float:
    """Of a GPU's memory, what torch may allocate where a run may take `share` of it in all; of a small part half is left at least."""
    return max(share / 2, share - CONTEXT_BYTES / total_bytes)


def _train(config: TrainerConfig, ranks: Ranks, *, emit: Emit, orders: Orders) -> Done:
    device = torch.device(config.device)
    _keep_to_its_part(device, config.gpu_share)
    checkpoint.discard_unfinished(Path(config.run_dir), attempt=config.attempt)
    attempt, missing = _set_up(config, device, ranks, emit=emit)
    progress, point = resume(attempt, config.resume, emit=emit)
    if point is None and missing is not None:
        raise missing
    attempt = with_telemetry(attempt, progress)
    plan = _plan(config, attempt, progress, point)
    emit(plan)
    if ranks.is_first:
        products.describe(attempt, emit=emit)
    outcome = train(attempt, progress, emit=emit, orders=orders)
    if outcome == "succeeded" and ranks.is_first:
        products.finish(attempt, progress, plan, emit=emit)
    return Done(outcome=outcome, detail=progress.ended_early if outcome == "succeeded" else "")


def _set_up(config: TrainerConfig, device: torch.device, ranks: Ranks, *, emit: Emit) -> tuple[Run, Exception | None]:
    """The parts of the attempt, and what its first weights lack, which a run that resumes does not need."""
    spec = config.spec
    precision = choose_precision(spec.precision, device)
    if precision == "bf16" and not computes_in_bf16(device):
        emit(Note(detail=f"bf16 on {device}: there are no units for it here, fp32 would be faster"))
    torch.manual_seed(spec.seed)

    emit(Phase(name="loading_data"))
    downloads = isinstance(spec.data, TorchvisionData) and spec.data.download
    if downloads and not ranks.is_first:
        ranks.barrier()  # the first one fetches the files, the others find them
    named_dir = None if config.dataset_dir is None else Path(config.dataset_dir)
    data = open_data(spec.data, data_root=Path(config.data_root), named_dir=named_dir, seed=spec.seed, device=device, beat=_beat(emit))
    if downloads and ranks.is_first:
        ranks.barrier()
    if spec.model.pretrained:
        data = _normalised_as_pretrained(data, spec.model.name)
    batch_size = _batch_size(spec, len(data.train), ranks, emit=emit)

    emit(Phase(name="building_model"))
    model, missing = _network(config, data, emit=emit)
    model = model.to(device).to(memory_format=torch.channels_last)
    if spec.model.sync_batch_norm:
        model = _with_shared_statistics(model, ranks)
    classifiers = classifiers_of(model)
    run = Run(
        spec=spec,
        attempt=config.attempt,
        run_dir=Path(config.run_dir),
        device=device,
        precision=precision,
        data=data,
        model=model,
        optimizer=build_optimizer(model, spec.optimizer, device=device, classifiers=classifiers),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        batch_size=batch_size,
        classifiers=classifiers,
        class_weights=_class_weights(spec, data),
        ema=None if spec.ema is None else Ema(model, spec.ema),
        ranks=ranks,
        net=None if ranks.size == 1 else ranks.wrap(model, device=device),
        hold_epoch=config.hold_epoch,
    )
    return run, missing


def _network(config: TrainerConfig, data: Data, *, emit: Emit) -> tuple[nn.Module, Exception | None]:
    """The network with the weights it begins with, on the CPU. If those are gone, and there are checkpoints of the run's own: why.

    Raises SpecUnfit, PretrainedMissing, DataMissing (for the checkpoint to start from).
    """
    try:
        return _begun(config, data, emit=emit), None
    except (PretrainedMissing, DataMissing) as error:
        if not config.resume:
            raise
        return _built(config, data, pretrained=False), error


def _begun(config: TrainerConfig, data: Data, *, emit: Emit) -> nn.Module:
    model, wanted = _built(config, data, pretrained=config.spec.model.pretrained), config.spec.model.init_from
    if config.init_from is not None:
        if fresh := _load_initial(model, config.init_from):
            emit(Note(detail=f"model.init_from: the classifier has another size and starts fresh ({', '.join(fresh)})"))
    elif wanted is not None:
        raise DataMissing(f"model.init_from={wanted}: its weights are gone")
    return model


def _built(config: TrainerConfig, data: Data, *, pretrained: bool) -> nn.Module:
    wanted = config.spec.model
    try:
        return build_model(
            wanted.name,
            num_classes=len(data.class_names),
            image_size=data.image_size,
            norm=wanted.norm,
            generator_seed=config.spec.seed,
            pretrained=pretrained,
            weights_dir=Path(config.data_root) / WEIGHTS,
        )
    except ValueError as error:
        raise SpecUnfit(str(error)) from error


def _with_shared_statistics(model: nn.Module, ranks: Ranks) -> nn.Module:
    try:
        return ranks.convert_sync_bn(model)
    except ValueError as error:
        raise SpecUnfit(str(error)) from error


def _load_initial(model: nn.Module, weights: InitialWeights) -> tuple[str, ...]:
    """Names of the tensors that it did not give."""
    path = Path(weights.path)
    try:
        checkpoint.verify(path.parent, sha256=weights.sha256)
    except CheckpointBroken as error:
        raise DataMissing(f"model.init_from: the checkpoint is gone or changed: {error}") from error
    try:
        return load_weights(model, path).fresh
    except ValueError as error:  # of another network
        raise SpecUnfit(str(error)) from error


def _normalised_as_pretrained(data: Data, model_name: str) -> Data:
    """The data, normalised as the published weights expect it."""
    mean, std = (255 * torch.tensor(values, device=data.mean.device)[None, :, None, None] for values in preprocessing(model_name))
    return replace(data, mean=mean, std=std)


def _batch_size(spec: TrainSpec, images: int, ranks: Ranks, *, emit: Emit) -> int:
    """Images of one step: what was asked for, or as many as there are, shared out evenly. Raises SpecUnfit."""
    wanted, shares = spec.data.batch_size, spec.accumulate * ranks.size
    batch_size = min(wanted, images) // shares * shares
    if batch_size == 0:
        raise SpecUnfit(
            f"data.batch_size={wanted}: {min(wanted, images)} images cannot be shared out to {shares} parts (accumulate × GPUs)"
        )
    if batch_size < wanted:
        emit(Note(detail=f"batch_size={wanted}: {batch_size} is used; there are {images} training images and {shares} part(s)"))
    return batch_size


def _class_weights(spec: TrainSpec, data: Data) -> torch.Tensor | None:
    """(C,) on the device; balanced is n / (C n_c), so that the mean weight of an image is 1. Raises SpecUnfit."""
    asked, classes, labels = spec.loss.class_weights, len(data.class_names), data.train.labels
    if asked is None:
        return None
    if asked == "balanced":
        return len(labels) / (classes * torch.bincount(labels, minlength=classes).clamp(min=1).float())
    if len(asked) != classes:
        raise SpecUnfit(f"loss.class_weights has {len(asked)} entries: the data set has {classes} classes, one weight each")
    return torch.tensor(asked, device=labels.device)


def with_telemetry(attempt: Run, progress: Progress) -> Run:
    """The attempt with the looks that its spec asks for, from `progress` on; only the first rank looks."""
    if attempt.spec.telemetry is None or not attempt.ranks.is_first:
        return attempt
    telemetry = Telemetry(
        attempt.model,
        classifier=attempt.classifiers[0],
        run_dir=attempt.run_dir,
        attempt=attempt.attempt,
        resumed_step=progress.step,
        epochs=attempt.spec.epochs,
        device=attempt.device,
    )
    return replace(attempt, telemetry=telemetry)


def _plan(config: TrainerConfig, attempt: Run, progress: Progress, point: ResumePoint | None) -> Plan:
    kind, reason = _determinism(config, attempt)
    data: Data = attempt.data
    return Plan(
        steps=attempt.steps,
        epochs=attempt.spec.epochs,
        steps_per_epoch=attempt.steps_per_epoch,
        train_images=len(data.train),
        val_images=len(data.val),
        test_images=0 if data.test is None else len(data.test),
        classes=len(data.class_names),
        parameters=sum(parameter.numel() for parameter in attempt.model.parameters()),
        precision=attempt.precision,
        device=str(attempt.device),
        cpu_threads=config.cpu_threads,
        ranks=attempt.ranks.size,
        determinism=kind,
        determinism_reason=reason,
        resumed_from=None if point is None else point.id,
        resumed_step=progress.step,
    )


def _determinism(config: TrainerConfig, attempt: Run) -> tuple[Literal["bitwise", "statistical"], str]:
    if not attempt.spec.deterministic:
        return "statistical", "deterministic is false"
    ops = _ops_without_deterministic_form(attempt) if attempt.device.type == "cuda" else []
    if ops:
        return "statistical", f"no deterministic form on {config.device}: {', '.join(ops)}"
    ranks = attempt.ranks.size
    if ranks > 2 and attempt.device.type == "cuda":
        return "statistical", f"the sums over {ranks} GPUs are NCCL's, which promises no order; with two there is only one"
    shared = "" if ranks == 1 else f" {ranks} ranks,"
    return "bitwise", f"same spec,{shared} {config.cpu_threads} CPU thread(s), machine type and software: same bits"


def _ops_without_deterministic_form(attempt: Run) -> list[str]:
    """Named by trying one forward and backward pass of a copy on two images: only a GPU has such ops."""
    model = copy.deepcopy(attempt.model)
    size = attempt.data.image_size
    images = torch.zeros(2, 3, size, size, device=attempt.device).contiguous(memory_format=torch.channels_last)
    found: list[str] = []
    with determinism.watched(found.append):
        with attempt.autocast():
            logits = model(images)
        target = torch.zeros(2, dtype=torch.int64, device=attempt.device)
        power_grad_cross_entropy(logits.float(), target, alpha=alpha_at(0, spec=attempt.spec, steps_per_epoch=1)).backward()  # type: ignore[no-untyped-call]
    return found


def _beat(emit: Emit) -> Callable[[], None]:
    last = time.monotonic()

    def beat() -> None:
        nonlocal last
        if time.monotonic() - last >= BEAT_S:
            last = time.monotonic()
            emit(Phase(name="loading_data"))

    return beat


# what the driver says when the device, and not the program, is at fault (CUDA runtime errors 3, 46, 100, 214, 220, 802, 999)
_LOST_DEVICE = (
    "initialization error",
    "busy or unavailable",
    "no CUDA-capable device",
    "uncorrectable ECC",
    "uncorrectable NVLink",
    "system not yet initialized",
    "GPU is lost",
    "CUDA error: unknown error",
)


def failure_of(error: BaseException) -> Failure:
    """The protocol's word for an exception, with what to try."""
    code, hint = _classified(error)
    detail = str(error) if code != "crashed" else f"{type(error).__name__}: {error}"
    return Failure(code=code, detail=detail, hint=hint, traceback="".join(traceback.format_exception(error)))


def _classified(error: BaseException) -> tuple[FailureCode, str]:
    text = str(error)
    match error:
        case torch.OutOfMemoryError():
            return "out_of_memory_gpu", "lower data.batch_size or data.image_size, or use a smaller model or bf16"
        case MemoryError():
            return "out_of_memory_host", _LESS_MEMORY
        case RuntimeError() if "DefaultCPUAllocator" in text:
            return "out_of_memory_host", _LESS_MEMORY
        case Diverged():
            return (
                "diverged",
                "lower optimizer.lr, lengthen schedule.warmup_epochs, or set clip; without normalisation layers try all three",
            )
        case DataMissing():
            return "data_missing", "put the data where the message says, or correct the field that it names"
        case DataUnreadable():
            return "data_unreadable", "replace or remove the file that the message names"
        case StorageFull():
            return "storage", "free some space, then retry: the run goes on from its last checkpoint"
        case CheckpointError():
            return "storage", "check the disk: what was written does not read back"
        case OSError(errno=errno.ENOSPC | errno.EDQUOT | errno.EIO | errno.EROFS):
            return "storage", "check the disk and its free space, then retry: the run goes on from its last checkpoint"
        case RuntimeError() if any(sign in text for sign in _LOST_DEVICE):
            return "device_lost", "the GPU is gone or unhealthy: look at its driver's log; the run can go on elsewhere"
        case PrecisionUnsupported():
            return "crashed", "set precision to auto, bf16 or fp32"
        case SpecUnfit():
            return "crashed", "correct the field that the message names"
        case PretrainedMissing():
            return "data_missing", "put the weights where the message says, or set model.pretrained to false"
        case _:
            return "crashed", "the traceback says where"


_LESS_MEMORY = "lower data.batch_size, data.image_size or data.workers, or give the run more memory"


def main(config_json: bytes | str, *, events_fd: int, control_fd: int) -> int:
    """The body of a forked trainer: messages go to `events_fd`, orders come from `control_fd`. Returns the exit status, 0 or 1.

    The caller has made the process group, asked to die with its parent, and put stdout and stderr where the log is. Ends the process
    itself with DEADLINE_PASSED, or with ORPHANED when either pipe has lost its other end.
    """
    config = TrainerConfig.model_validate_json(config_json)
    if config.cpus and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, config.cpus)  # before any thread is made: they inherit it
    torch.set_num_threads(config.cpu_threads)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    whose = f"{config.run_id} attempt {config.attempt}".replace("%", "%%")  # it becomes a part of a %-format
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format=f"%(asctime)s {whose}: %(message)s", force=True)

    lease, orders = _Lease(config.deadline_s), StandingOrders()
    threading.Thread(target=lease.watch, name="watchdog", daemon=True).start()
    threading.Thread(target=_obey, args=(control_fd, lease, orders), name="control", daemon=True).start()
    emit = _emit_to(events_fd, before_the_end=lease.end)
    return 0 if isinstance(run(config, emit=emit, orders=orders), Done) else 1


class _Lease:
    """The right to run, until a deadline on the clock of `boottime_s`."""

    LOOK_S = 1.0  # waiting does not count the time the machine sleeps, the deadline does: look again now and then

    def __init__(self, deadline_s: float | None) -> None:
        self.deadline_s = deadline_s
        self.ended = False
        """The run has said its last word: the pipes may be closed from here on."""

    def watch(self) -> None:
        while self.deadline_s is None or (left := self.deadline_s - boottime_s()) > 0:
            time.sleep(self.LOOK_S if self.deadline_s is None else min(left, self.LOOK_S))
        os._exit(DEADLINE_PASSED)

    def end(self) -> None:
        self.ended = True


def _obey(control_fd: int, lease: _Lease, orders: StandingOrders) -> None:
    with os.fdopen(control_fd, "rb") as lines:
        for line in lines:
            try:
                control: Control = decode_control(line)
            except ValueError as error:
                log.warning("an order that is none: %s", error)
                continue
            if control.deadline_s is not None:
                lease.deadline_s = control.deadline_s
            if control.stop is not None:
                log.info("told to stop: %s", control.stop)
                orders.give(control.stop)
    if not lease.ended:
        os._exit(ORPHANED)


def _emit_to(events_fd: int, *, before_the_end: Callable[[], None]) -> Emit:
    def emit(message: Message) -> None:
        if isinstance(message, Done | Failure):
            before_the_end()
        line = encode(message)
        try:
            while line:
                line = line[os.write(events_fd, line) :]
        except BrokenPipeError:
            os._exit(ORPHANED)

    return emit


def _logged(emit: Emit) -> Emit:
    def say(message: Message) -> None:
        if (line := _line(message)) is not None:
            log.info("%s", line)
        emit(message)

    return say


def _line(message: Message) -> str | None:
    match message:
        case Plan():
            resumed = "" if message.resumed_from is None else f", from {message.resumed_from}"
            return (
                f"{message.epochs} epochs of {message.steps_per_epoch} steps{resumed}: {message.train_images} training images, "
                f"{message.classes} classes, {message.parameters:,} parameters, {message.precision} on {message.device}, "
                f"{message.cpu_threads} CPU thread(s), {message.determinism}"
            )
        case Step():
            eta = "" if message.eta_s is None else f", {message.eta_s:.0f} s left"
            return f"epoch {message.epoch:.2f} step {message.step}: {_figures(message.metrics)} {message.images_per_s:.0f} images/s{eta}"
        case Evaluation():
            return f"epoch {message.epoch}: {_figures(message.metrics)}"
        case CheckpointWritten():
            return f"checkpoint {message.path}, {message.total_bytes:,} bytes{', the best so far' if message.is_best else ''}"
        case CheckpointSkipped():
            return f"checkpoint {message.path} skipped: {message.detail}"
        case CheckpointFailed():
            return f"checkpoint at step {message.step} failed: {message.detail}"
        case RolledBack() | Note():
            return message.detail
        case ArtifactWritten():
            return f"{message.path}, {message.bytes:,} bytes"
        case Done():
            return f"{message.outcome} {message.detail}".strip()
        case Failure():
            return f"failed ({message.code}): {message.detail}\n{message.traceback}{message.hint}"
        case _:
            return None


def _figures(metrics: dict[str, float | None]) -> str:
    return " ".join(f"{name} {'not finite' if value is None else format(value, '.4g')}" for name, value in metrics.items())
