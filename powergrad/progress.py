"""How far a run has come: all that the next step depends on beside weights, optimizer, scaler and generators. It is in every checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from powergrad.spec import EarlyStoppingSpec

EXPLODED = 100.0
"""A training loss this many times what it was in the first window (or of ln C, which is chance, if that is more) has diverged.

High on purpose: PowerGrad raises the loss while accuracy rises too (arXiv 2111.12495, section 5: 0.85 to 2.36), and a bad window passes.
"""


MOST_LOOKS = 1024


class Diverged(Exception):
    """The training loss is no longer finite, or has exploded."""


@dataclass(frozen=True)
class Best:
    """The checkpoint with the highest val_top1, the earliest of equals."""

    top1: float
    step: int
    path: str
    """Relative to the run's directory."""


@dataclass
class Patience:
    """What early stopping remembers. best: None before the first evaluation."""

    best: float | None = None
    epochs_without: int = 0

    def see(self, value: float, spec: EarlyStoppingSpec) -> bool:
        """Counts one evaluation; True when it was the last one that is waited for. A value that is not finite is no improvement."""
        falls = spec.metric.endswith("loss")
        better = self.best is None or (self.best - value if falls else value - self.best) > spec.min_delta
        if better and math.isfinite(value):
            self.best, self.epochs_without = value, 0
        else:
            self.epochs_without += 1
        return self.epochs_without >= spec.patience_epochs


@dataclass
class Progress:
    """`window_*` sum up the steps since the last log point, on the device, over this rank's images."""

    step: int
    window_loss: Tensor
    """() float64."""
    window_correct: Tensor
    """() int64."""
    window_images: int = 0
    """Over all ranks."""
    first_loss: float | None = None
    """Mean of the first window."""
    last_window: dict[str, float] = field(default_factory=dict)
    """train_loss, train_top1 and lr of the last log point."""
    best: Best | None = None
    patience: Patience = field(default_factory=Patience)
    ended_early: str = ""
    """Why no further step will be taken; empty while there are some."""
    lr_scale: float = 1.0
    """What rollbacks have left of the learning rate."""
    rollbacks: int = 0
    way_back: dict[str, Any] | None = None
    """In a checkpoint that an order brought about: the parts of the one that a diverged run goes back to."""
    scores: list[dict[str, float]] = field(default_factory=list)
    """Every evaluation of the validation split with `step`, `epoch` and the last window's training figures, for pictures and cards."""
    looks: list[dict[str, float]] = field(default_factory=list)
    """What telemetry saw of gradients, with `step`; of a long run every second, fourth, …, so that a checkpoint stays small."""
    test: dict[str, float] = field(default_factory=dict)
    """Scores of the best weights on the test split."""

    @classmethod
    def fresh(cls, device: torch.device) -> Progress:
        return cls(0, torch.zeros((), dtype=torch.float64, device=device), torch.zeros((), dtype=torch.int64, device=device))

    def count(self, loss: Tensor, logits: Tensor, labels: Tensor, *, batch_size: int) -> None:
        """Adds a part of a batch, its `loss` a part of the batch's mean. Reads nothing from the device."""
        self.window_loss += loss.detach() * batch_size
        self.window_correct += (logits.detach().argmax(dim=1) == labels).sum()

    def remember_look(self, seen: dict[str, float]) -> None:
        """Keeps what telemetry saw at this step."""
        self.looks.append({"step": self.step, **seen})
        if len(self.looks) > MOST_LOOKS:
            del self.looks[1::2]

    def begin_window(self) -> None:
        self.window_images = 0
        self.window_loss.zero_()
        self.window_correct.zero_()

    def refuse_divergence(self, loss: float, *, classes: int, lr: float) -> None:
        """Raises Diverged for a mean loss, of the window that ends here, that is not finite or has exploded."""
        if self.first_loss is None and math.isfinite(loss):
            self.first_loss = loss
        if not math.isfinite(loss):
            raise Diverged(f"train_loss is {loss} at step {self.step} (lr {lr:.4g})")
        bound = EXPLODED * max(math.log(classes), self.first_loss or 0.0)
        if loss > bound:
            raise Diverged(
                f"train_loss is {loss:.4g} at step {self.step} (lr {lr:.4g}), more than {bound:.4g}: {EXPLODED:g} times the first"
            )

    def to_state(self) -> dict[str, Any]:
        state = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return state | {"best": None if self.best is None else vars(self.best), "patience": vars(self.patience)}

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> Progress:
        best = None if state["best"] is None else Best(**state["best"])
        on_device = {name: state[name].to(device) for name in ("window_loss", "window_correct")}
        return cls(**state | on_device | {"best": best, "patience": Patience(**state["patience"])})
