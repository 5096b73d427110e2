"""What one training run is: data, model, loss, optimisation and precision, with defaults and ranges.

Both stacks stand on this file: the training code is told what to do by a `TrainSpec`, the job domain (`powergrad.jobs.spec`) adds
who, where and how long. It imports neither torch nor a database. A setting that would be ignored is refused: what only one
optimizer, schedule or data set knows is a field of that one alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

NAME_PATTERN = r"^[A-Za-z0-9._-]{1,64}$"
RELATIVE_PATH_PATTERN = r"^[A-Za-z0-9._-]{1,64}(/[A-Za-z0-9._-]{1,64}){0,7}$"

TORCHVISION_DATASETS = ("cifar10", "cifar100", "mnist", "fashion-mnist")
CLASS_FOLDER = "class_folder"


class SpecModel(BaseModel):
    """Base of every part of a spec: unknown keys, wrong types, NaN and infinity are errors; values never change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


@dataclass(frozen=True)
class Broken:
    """A rule between fields that does not hold. field: `/`-separated, below the model. against: pointer of the other field it was held to."""

    field: str
    code: str
    message: str
    against: str | None = None


def refuse(model: BaseModel, broken: list[Broken]) -> None:
    """Raise the broken rules of a model, each at its own field; nothing when there are none. For its `after` validator."""
    if broken:
        raise ValidationError.from_exception_data(type(model).__name__, [_error_details(model, rule) for rule in broken])


def _error_details(model: BaseModel, rule: Broken) -> InitErrorDetails:
    path = rule.field.split("/")
    value: Any = model
    for name in path:
        value = getattr(value, name)
    context = {"against": rule.against} if rule.against else {}
    return InitErrorDetails(type=PydanticCustomError(rule.code, rule.message, context), loc=tuple(path), input=value)


def by_name(*known: str) -> Discriminator:
    """Choose a union's member by `name`, taking the first of the known ones where it is absent: `{"lr": 0.05}` is an SGD optimizer."""
    return Discriminator(
        _tag_reader(known[0]),
        custom_error_type="unknown_name",
        custom_error_message="must be one of: " + ", ".join(known),
        custom_error_context={"tag": "name"},
    )


def _tag_reader(default: str) -> Callable[[Any], str | None]:
    def tag(value: Any) -> str | None:
        found = value.get("name", default) if isinstance(value, dict) else getattr(value, "name", None)
        return f"#{found}" if isinstance(found, str) else None

    return tag


class DataSpec(SpecModel):
    dataset: str = Field(pattern=NAME_PATTERN, examples=["digits", "cifar10"])
    """Name of the data set: digits, cifar10, cifar100, mnist, fashion-mnist, or class_folder with `path`."""
    path: str | None = Field(default=None, pattern=RELATIVE_PATH_PATTERN)
    """Folder below the data root, for class_folder: one sub-folder a class, or train/ and val/ with one each."""
    download: bool = False
    """Fetch a torchvision data set that is not below the data root yet."""
    image_size: int | None = Field(default=None, ge=8, le=1024)
    """Side of the square images in pixels; null is the data set's own (digits 16)."""
    batch_size: int = Field(default=128, ge=1, le=65536)
    """Images in one optimizer step."""
    augment: Literal["none", "standard"] | None = None
    """Augmentation of the training images: none, standard (shift or crop, flip where classes allow it); null is the data set's own."""
    val_fraction: float = Field(default=0.2, gt=0.0, le=0.5)
    """Share of the training images held out, stratified, as the validation split where the data set brings none."""
    workers: int = Field(default=0, ge=0, le=64)
    """Processes that decode class-folder images; 0 decodes in the trainer. Data sets that are held in memory need none."""

    @model_validator(mode="after")
    def _fields_fit_the_data_set(self) -> Self:
        folders, in_folder = (self.path or "").split("/"), self.dataset == CLASS_FOLDER
        broken = []
        if "." in folders or ".." in folders:
            broken.append(Broken("path", "invalid_path", "must not contain . or .. as a folder name"))
        elif in_folder and self.path is None:
            broken.append(Broken("path", "missing", "class_folder needs path: the folder below the data root"))
        elif not in_folder and self.path is not None:
            broken.append(Broken("path", "would_be_ignored", "is for dataset class_folder only"))
        if not in_folder and self.workers != 0:
            broken.append(Broken("workers", "would_be_ignored", "is for dataset class_folder only"))
        if self.download and self.dataset not in TORCHVISION_DATASETS:
            broken.append(Broken("download", "would_be_ignored", "is for " + ", ".join(TORCHVISION_DATASETS) + " only"))
        refuse(self, broken)
        return self


class ModelSpec(SpecModel):
    name: str = Field(default="resnet18", pattern=NAME_PATTERN)
    """Name of the network, as GET /v1/models lists it."""
    norm: Literal["batch", "group", "none"] = "batch"
    """Normalisation layers: batch, group, or none (the paper's non-BN network: He initialisation, biases on)."""
    pretrained: Literal[False] = False
    """Start from pretrained weights: not available in this release."""
    init_from: None = None
    """Start from another job's checkpoint: not available in this release."""


class LossSpec(SpecModel):
    alpha: float = Field(default=1.0, ge=0.0, le=1.0)
    """Exponent of PowerGrad Transform in the backward pass; 1 is ordinary cross-entropy."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the target mass spread evenly over all classes."""


class SGDSpec(SpecModel):
    name: Literal["sgd"] = "sgd"
    """Stochastic gradient descent with momentum."""
    lr: float = Field(default=0.1, gt=0.0, le=1000.0)
    """Peak learning rate."""
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Momentum of the gradient average."""
    nesterov: bool = True
    """Nesterov's form of momentum."""
    weight_decay: float = Field(default=5e-4, ge=0.0, le=10.0)
    """L2 penalty on every parameter."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.nesterov and self.momentum == 0.0:
            refuse(self, [Broken("nesterov", "conflict", "needs momentum > 0; set nesterov to false")])
        return self


class AdamWSpec(SpecModel):
    name: Literal["adamw"]
    """Adam with decoupled weight decay."""
    lr: float = Field(default=1e-3, gt=0.0, le=1000.0)
    """Peak learning rate."""
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Decay of the gradient average."""
    beta2: float = Field(default=0.999, ge=0.0, lt=1.0)
    """Decay of the squared-gradient average."""
    eps: float = Field(default=1e-8, gt=0.0, le=1.0)
    """Added to the denominator."""
    weight_decay: float = Field(default=1e-2, ge=0.0, le=10.0)
    """Decoupled weight decay."""


OptimizerSpec = Annotated[Annotated[SGDSpec, Tag("#sgd")] | Annotated[AdamWSpec, Tag("#adamw")], by_name("sgd", "adamw")]


class _Warmup(SpecModel):
    warmup_epochs: int | None = Field(default=None, ge=0, le=10000)
    """Epochs over which the rate climbs linearly to its peak; null is min(5, epochs // 10)."""


class CosineSpec(_Warmup):
    name: Literal["cosine"] = "cosine"
    """From the peak to zero along half a cosine."""


class StepSpec(_Warmup):
    name: Literal["step"]
    """Multiply the rate by gamma at each milestone."""
    milestones: list[Annotated[int, Field(ge=1, le=10000)]] | None = Field(default=None, min_length=1, max_length=100)
    """Epochs at which the rate drops; null is 30, 60 and 90 % of the epochs."""
    gamma: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Factor of each drop."""

    @model_validator(mode="after")
    def _milestones_rise(self) -> Self:
        if self.milestones is not None and any(b <= a for a, b in zip(self.milestones, self.milestones[1:], strict=False)):
            refuse(self, [Broken("milestones", "not_increasing", "must rise strictly")])
        return self


class ConstantSpec(_Warmup):
    name: Literal["constant"]
    """The peak rate from the end of the warm-up on."""


ScheduleSpec = Annotated[
    Annotated[CosineSpec, Tag("#cosine")] | Annotated[StepSpec, Tag("#step")] | Annotated[ConstantSpec, Tag("#constant")],
    by_name("cosine", "step", "constant"),
]


class ClipSpec(SpecModel):
    mode: Literal["norm", "value", "agc"]
    """Gradient clipping: norm (global L2 norm), value (each entry), agc (adaptive, per unit, classifier excluded)."""
    value: float = Field(gt=0.0, le=1e6)
    """The bound: the norm, the absolute entry, or agc's clip factor (0.01 in the paper)."""


class CheckpointSpec(SpecModel):
    every_epochs: int = Field(default=1, ge=1, le=10000)
    """Epochs between checkpoints; the last epoch always writes one."""
    keep_last: int = Field(default=2, ge=1, le=1000)
    """Newest checkpoints kept."""
    keep_best: int = Field(default=1, ge=1, le=1000)
    """Best checkpoints (by val_top1) kept."""


class TrainSpec(SpecModel):
    """Everything that decides the bits of a trained network, and nothing else."""

    data: DataSpec
    """What to train on."""
    model: ModelSpec = ModelSpec()
    """Which network."""
    loss: LossSpec = LossSpec()
    """The loss and its backward pass."""
    optimizer: OptimizerSpec = SGDSpec()
    """How weights are updated."""
    schedule: ScheduleSpec = CosineSpec()
    """How the learning rate moves, updated every step."""
    clip: ClipSpec | None = None
    """Gradient clipping; null is none."""
    epochs: int = Field(default=20, ge=1, le=10000)
    """Passes over the training images."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the forward and backward pass; auto is bf16 where the device computes in it, else fp32."""
    compile: Literal[False] = False
    """torch.compile: not available in this release."""
    ema: None = None
    """Exponential moving average of the weights: not available in this release."""
    early_stopping: None = None
    """Stop when the validation metric no longer improves: not available in this release."""
    seed: int = Field(default=0, ge=0, le=2**32 - 1)  # torch's CPU generator looks at no more bits
    """Seed of initial weights, data order and augmentation."""
    deterministic: bool = True
    """Same spec, same machine type and software: same bits."""
    checkpoint: CheckpointSpec = CheckpointSpec()
    """When checkpoints are written and which are kept."""

    @model_validator(mode="after")
    def _schedule_fits_the_epochs(self) -> Self:
        below, broken = f"must be below epochs ({self.epochs})", []
        if self.warmup_epochs >= self.epochs:
            broken.append(Broken("schedule/warmup_epochs", "out_of_range", below, against="/epochs"))
        if isinstance(self.schedule, StepSpec) and self.schedule.milestones is not None and self.schedule.milestones[-1] >= self.epochs:
            broken.append(Broken("schedule/milestones", "would_be_ignored", below, against="/epochs"))
        refuse(self, broken)
        return self

    @property
    def warmup_epochs(self) -> int:
        """Epochs of warm-up, with the default filled in: min(5, epochs // 10)."""
        given = self.schedule.warmup_epochs
        return min(5, self.epochs // 10) if given is None else given

    @property
    def milestones(self) -> list[int]:
        """Epochs at which a step schedule drops the rate; empty for the other schedules."""
        if not isinstance(self.schedule, StepSpec):
            return []
        if self.schedule.milestones is not None:
            return list(self.schedule.milestones)
        return sorted({max(1, math.floor(self.epochs * share)) for share in (0.3, 0.6, 0.9)})
