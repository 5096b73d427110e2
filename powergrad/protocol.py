"""What a trainer process is told, what it says, and what it obeys; what a prediction is asked. Imports neither torch nor a database.

One `TrainerConfig` in; JSON lines out (`Message`, one object a line, its `type` first); JSON lines in (`Control`). The trainer knows
nothing of jobs, queues or networks: whoever starts it (a supervisor, `powergrad train`, a test) reads the lines.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter

from powergrad.spec import TrainSpec

FailureCode = Literal[
    "out_of_memory_gpu",
    "out_of_memory_host",
    "diverged",
    "data_missing",
    "data_unreadable",
    "storage",
    "device_lost",
    "crashed",
    "internal",
]


def finite_or_none(value: float | None) -> float | None:
    """The value, or None where JSON has no number for it."""
    return value if value is not None and math.isfinite(value) else None


FiniteOrNone = Annotated[float | None, AfterValidator(finite_or_none)]
Metrics = dict[str, FiniteOrNone]
"""Metric values by name; None stands for a value that is not finite."""


def boottime_s() -> float:
    """Seconds since boot, sleep included: what deadlines are counted on, the same in every process of the host."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ResumePoint(_Line):
    """A checkpoint the trainer may go on from; `sha256` is that of its model.safetensors."""

    id: str
    path: str  # relative to run_dir
    step: int
    sha256: str


class InitialWeights(_Line):
    """Another run's weights to begin with: a model.safetensors, absolute, and what it must hold."""

    path: str
    sha256: str


class TrainerConfig(_Line):
    """All that one attempt of one run needs to know."""

    run_id: str
    attempt: int
    spec: TrainSpec
    run_dir: str
    """Absolute; checkpoints go below `checkpoints/a<attempt>/` in it."""
    data_root: str
    """Absolute; data sets are looked for below it."""
    device: str = "cpu"
    """cpu or cuda:0 (the supervisor chooses the GPU by CUDA_VISIBLE_DEVICES)."""
    gpu_share: float = Field(default=1.0, gt=0.0, le=1.0)
    """Of the GPU's memory that the run may take; below 1 others work on it too."""
    cpu_threads: int = 1
    """torch.set_num_threads; part of the bits."""
    cpus: list[int] = []
    """Cores to run on (sched_setaffinity); empty leaves them as they are."""
    ranks: int = Field(default=1, ge=1)
    """Processes that share each batch; with more than one GPU, one each."""
    dataset_dir: str | None = None
    """Absolute: the folder that `spec.data` means where it names an uploaded or registered set."""
    init_from: InitialWeights | None = None
    """What `spec.model.init_from` stands for."""
    resume: list[ResumePoint] = []
    """Newest first; the first that verifies is taken, the others are reported as skipped."""
    hold_epoch: int | None = Field(default=None, ge=1)
    """End, with a checkpoint, after so many epochs, to go on another time; None, or one that is not before the last, is no hold."""
    deadline_s: float | None = None
    """On the clock of `boottime_s`; the process ends itself when it passes unrenewed. None: no watchdog."""


# --- what the trainer says -------------------------------------------------------------------------------------------------------


class Phase(_Line):
    """What the trainer is doing. `training` is said on entering the first step, and again after a roll-back."""

    type: Literal["phase"] = "phase"
    name: Literal[
        "starting", "loading_data", "building_model", "training", "evaluating", "checkpointing", "testing", "exporting", "finished"
    ]


class Plan(_Line):
    """Said once, when everything is set up and before the first step."""

    type: Literal["plan"] = "plan"
    steps: int
    epochs: int
    steps_per_epoch: int
    train_images: int
    val_images: int
    test_images: int
    classes: int
    parameters: int
    precision: Literal["fp32", "bf16", "fp16"]
    device: str
    cpu_threads: int
    ranks: int = 1
    determinism: Literal["bitwise", "statistical"]
    determinism_reason: str
    resumed_from: str | None = None
    """Id of the checkpoint gone on from; None is a fresh start."""
    resumed_step: int = 0
    """Steps already done: metric points after it belong to an abandoned past."""


class Step(_Line):
    """Training metrics at `step` (steps done so far; the first is 1). Points lie at the same steps in every attempt."""

    type: Literal["step"] = "step"
    step: int
    epoch: float
    """Epochs done, with fraction."""
    metrics: Metrics
    images_per_s: float = Field(allow_inf_nan=False)
    eta_s: FiniteOrNone


class Evaluation(_Line):
    """Metrics on a held-out split; names carry the split: val_loss, val_top1, test_top1."""

    type: Literal["evaluation"] = "evaluation"
    step: int
    epoch: int
    split: Literal["val", "test"]
    metrics: Metrics


class EvaluationProgress(_Line):
    """A sign of life during a long evaluation."""

    type: Literal["evaluation_progress"] = "evaluation_progress"
    done: int
    total: int


class CheckpointWritten(_Line):
    """A checkpoint is published: complete, flushed, read back."""

    type: Literal["checkpoint"] = "checkpoint"
    id: str
    path: str  # relative to run_dir
    step: int
    epoch: int
    metrics: Metrics
    bytes: int  # of model.safetensors
    sha256: str  # of model.safetensors
    total_bytes: int
    is_best: bool


class CheckpointSkipped(_Line):
    """A checkpoint offered for resuming did not verify."""

    type: Literal["checkpoint_skipped"] = "checkpoint_skipped"
    id: str
    path: str
    detail: str


class CheckpointFailed(_Line):
    """A checkpoint could not be written (disk full, say); training goes on from the older one's safety."""

    type: Literal["checkpoint_failed"] = "checkpoint_failed"
    step: int
    detail: str


class RolledBack(_Line):
    """The loss diverged and training went back to a checkpoint: points after `to_step` belong to an abandoned past."""

    type: Literal["rolled_back"] = "rolled_back"
    from_step: int
    to_step: int
    checkpoint: str
    """Id of the checkpoint gone back to."""
    lr_scale: float
    """What the schedule's learning rate is multiplied by from here on."""
    detail: str


class ArtifactWritten(_Line):
    """A file beside the checkpoints is complete and flushed: a picture, a table, an export."""

    type: Literal["artifact"] = "artifact"
    name: str
    """What it is asked for by: confusion.json, model.onnx."""
    path: str  # relative to run_dir
    media_type: str
    bytes: int
    sha256: str


class Note(_Line):
    """Something a user will want to read beside the run: an op without a deterministic form, a clipped batch size."""

    type: Literal["note"] = "note"
    detail: str


class Done(_Line):
    """The trainer ends of its own will: all epochs done, told to stop, or at the epoch where it is to hold."""

    type: Literal["done"] = "done"
    outcome: Literal["succeeded", "stopped", "held"]
    detail: str = ""
    """Why it ended before the last epoch, if it did."""


class Failure(_Line):
    """The trainer ends by an error that it can name."""

    type: Literal["failure"] = "failure"
    code: FailureCode
    detail: str
    hint: str
    traceback: str


Message = Annotated[
    Phase
    | Plan
    | Step
    | Evaluation
    | EvaluationProgress
    | CheckpointWritten
    | CheckpointSkipped
    | CheckpointFailed
    | RolledBack
    | ArtifactWritten
    | Note
    | Done
    | Failure,
    Field(discriminator="type"),
]
_messages: TypeAdapter[Message] = TypeAdapter(Message)

# --- what the trainer obeys ------------------------------------------------------------------------------------------------------


class Control(_Line):
    """One order. `deadline_s` renews the right to run; `stop` = checkpoint: write one at the next step and end; now: end at the next step."""

    deadline_s: float | None = None
    stop: Literal["checkpoint", "now"] | None = None


# --- what a prediction is asked --------------------------------------------------------------------------------------------------

LABELS, PREPROCESSING = "labels.json", "preprocessing.json"
"""Artifacts of every run, without which its weights say nothing about an image."""


@dataclass(frozen=True)
class Question:
    """Paths are relative to a root. sha256: of the weights. top: how many classes to name."""

    job: str
    checkpoint: str
    spec: dict[str, Any]
    weights: str
    sha256: str
    labels: str
    preprocessing: str
    image: str
    top: int


def encode(line: BaseModel) -> bytes:
    """One JSON line, newline included."""
    return line.model_dump_json().encode() + b"\n"


def decode_message(line: bytes) -> Message:
    """The message in one line. Raises ValueError (pydantic.ValidationError) for anything else."""
    return _messages.validate_json(line)


def decode_control(line: bytes) -> Control:
    """The order in one line. Raises ValueError."""
    return Control.model_validate(json.loads(line))
