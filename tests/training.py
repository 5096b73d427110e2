"""Builders for runs of the real engine that are over in moments: a tiny network on a few small images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from powergrad.data import open_data
from powergrad.ema import Ema
from powergrad.engine import Orders, Outcome, Run, resume, train
from powergrad.optim import build_optimizer
from powergrad.protocol import CheckpointWritten, Evaluation, Message, ResumePoint, RolledBack, Step
from powergrad.spec import TrainSpec
from powergrad.telemetry import MACHINE_METRICS
from powergrad.trainer import with_telemetry

CPU = torch.device("cpu")


class TinyNet(nn.Sequential):
    """What a run's state can be made of: convolutions, batch statistics and dropout."""

    def __init__(self, classes: int, seed: int) -> None:
        torch.manual_seed(seed)
        super().__init__(
            nn.Conv2d(3, 8, 3, stride=2, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(32, classes),
        )


class PlainNet(nn.Sequential):
    """A network whose gradient over a batch is the sum of its images' gradients: neither batch statistics nor dropout."""

    def __init__(self, classes: int, seed: int, *, norm: Literal["group", "none"] = "group") -> None:
        torch.manual_seed(seed)
        super().__init__(
            nn.Conv2d(3, 8, 3, stride=2),
            nn.GroupNorm(2, 8) if norm == "group" else nn.Identity(),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Identity(),
            nn.Linear(32, classes),
        )


Net = Callable[[int, int], nn.Module]
"""Of a number of classes and a seed; its classifier is named 6."""
NORM_FREE: Net = partial(PlainNet, norm="none")


def spec(**overrides: Any) -> TrainSpec:
    """A spec of a few epochs on 8-pixel digits; keywords replace whole parts."""
    parts: dict[str, Any] = {
        "data": {"dataset": "digits", "image_size": 8, "batch_size": 200},
        "epochs": 3,
        "precision": "fp32",
        "schedule": {"warmup_epochs": 1},
    }
    return TrainSpec.model_validate(parts | overrides)


def make_run(
    run_dir: Path,
    train_spec: TrainSpec | None = None,
    *,
    attempt: int = 1,
    data_root: Path = Path("/nowhere"),
    resident: bool = True,
    net: Net = TinyNet,
    device: torch.device = CPU,
) -> Run:
    """A run with all its parts freshly made, as at the start of an attempt."""
    train_spec = train_spec or spec()
    data = open_data(train_spec.data, data_root=data_root, seed=train_spec.seed, device=device, resident_bytes=2**30 if resident else 0)
    model = net(len(data.class_names), train_spec.seed).to(device).to(memory_format=torch.channels_last)
    weights = train_spec.loss.class_weights
    return Run(
        spec=train_spec,
        attempt=attempt,
        run_dir=run_dir,
        device=device,
        precision="fp32" if train_spec.precision == "auto" else train_spec.precision,
        data=data,
        model=model,
        optimizer=build_optimizer(model, train_spec.optimizer, device=device, classifiers=("6",)),
        scaler=torch.amp.GradScaler(device.type, enabled=train_spec.precision == "fp16"),
        batch_size=min(train_spec.data.batch_size, len(data.train)),
        classifiers=("6",),
        class_weights=torch.tensor(weights, device=device) if isinstance(weights, list) else None,
        ema=None if train_spec.ema is None else Ema(model, train_spec.ema),
    )


@dataclass
class StopAfter:
    """Orders to stop before the step after `steps` more. The engine reads `stop` once before every step."""

    steps: int
    how: Literal["checkpoint", "now"] = "checkpoint"
    read: int = 0

    @property
    def stop(self) -> Literal["checkpoint", "now"] | None:
        self.read += 1
        return self.how if self.read > self.steps else None


NEVER = 10**9
V = TypeVar("V")


def without_machine(metrics: Mapping[str, V]) -> dict[str, V]:
    """What the training itself decides."""
    return {name: value for name, value in metrics.items() if name not in MACHINE_METRICS}


@dataclass
class History:
    """What would be in the store: metric points are cut back when an attempt resumes or rolls back, checkpoints when it resumes."""

    run_dir: Path
    make: Callable[[int], Run]
    """The parts of the attempt of that number."""
    points: list[Step | Evaluation] = field(default_factory=list)
    checkpoints: list[CheckpointWritten] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    attempts: int = 0

    def attempt(self, orders: Orders | None = None, *, hold_epoch: int | None = None) -> Outcome:
        """One attempt, from the newest checkpoint if there is one."""
        self.attempts += 1
        run = replace(self.make(self.attempts), hold_epoch=hold_epoch)
        progress, _ = resume(run, points_of(self), emit=self.messages.append)
        self.points = [point for point in self.points if point.step <= progress.step]
        self.checkpoints = [c for c in self.checkpoints if c.step <= progress.step]
        return train(with_telemetry(run, progress), progress, emit=self.take, orders=orders or StopAfter(NEVER))

    def take(self, message: Message) -> None:
        self.messages.append(message)
        if isinstance(message, Step | Evaluation):
            self.points.append(message)
        if isinstance(message, CheckpointWritten):
            self.checkpoints.append(message)
        if isinstance(message, RolledBack):
            self.points = [point for point in self.points if point.step <= message.to_step]

    def metrics(self) -> list[tuple[str, int, dict[str, float | None]]]:
        """All points without the times and what the machine shows of itself, which no two runs share."""
        return [(point.type, point.step, without_machine(point.metrics)) for point in self.points]

    @property
    def final_sha256(self) -> str:
        return self.checkpoints[-1].sha256


def points_of(history: History) -> list[ResumePoint]:
    """What its next attempt may go on from, newest first."""
    return [ResumePoint(id=c.id, path=c.path, step=c.step, sha256=c.sha256) for c in reversed(history.checkpoints)]
