"""Builders for runs of the real engine that are over in moments: a tiny network on a few small images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from powergrad.data import open_data
from powergrad.ema import Ema
from powergrad.engine import Orders, Outcome, Run, resume, train
from powergrad.optim import build_optimizer
from powergrad.protocol import CheckpointWritten, Evaluation, Message, ResumePoint, Step
from powergrad.spec import TrainSpec

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
    run_dir: Path, train_spec: TrainSpec | None = None, *, attempt: int = 1, data_root: Path = Path("/nowhere"), resident: bool = True
) -> Run:
    """A run with all its parts freshly made, as at the start of an attempt."""
    train_spec = train_spec or spec()
    data = open_data(train_spec.data, data_root=data_root, seed=train_spec.seed, device=CPU, resident_bytes=2**30 if resident else 0)
    model = TinyNet(len(data.class_names), train_spec.seed).to(memory_format=torch.channels_last)
    return Run(
        spec=train_spec,
        attempt=attempt,
        run_dir=run_dir,
        device=CPU,
        precision="bf16" if train_spec.precision == "bf16" else "fp32",
        data=data,
        model=model,
        optimizer=build_optimizer(model, train_spec.optimizer, device=CPU, classifiers=("6",)),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        batch_size=min(train_spec.data.batch_size, len(data.train)),
        classifiers=("6",),
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


@dataclass
class History:
    """What would be in the store: metric points are cut back when an attempt resumes, checkpoints stay."""

    run_dir: Path
    make: Callable[[int], Run]
    """The parts of the attempt of that number."""
    points: list[Step | Evaluation] = field(default_factory=list)
    checkpoints: list[CheckpointWritten] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    attempts: int = 0

    def attempt(self, orders: Orders | None = None) -> Outcome:
        """One attempt, from the newest checkpoint if there is one."""
        self.attempts += 1
        run = self.make(self.attempts)
        points = [ResumePoint(id=c.id, path=c.path, step=c.step, sha256=c.sha256) for c in reversed(self.checkpoints)]
        progress, _ = resume(run, points, emit=self.messages.append)
        self.points = [point for point in self.points if point.step <= progress.step]
        self.checkpoints = [c for c in self.checkpoints if c.step <= progress.step]
        return train(run, progress, emit=self.take, orders=orders or StopAfter(NEVER))

    def take(self, message: Message) -> None:
        self.messages.append(message)
        if isinstance(message, Step | Evaluation):
            self.points.append(message)
        if isinstance(message, CheckpointWritten):
            self.checkpoints.append(message)

    def metrics(self) -> list[tuple[str, int, dict[str, float | None]]]:
        """All points without the times, which no two runs share."""
        return [(point.type, point.step, point.metrics) for point in self.points]

    @property
    def final_sha256(self) -> str:
        return self.checkpoints[-1].sha256
