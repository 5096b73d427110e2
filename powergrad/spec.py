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
from typing_extensions import TypeAliasType

NAME_PATTERN = r"^[A-Za-z0-9._-]{1,64}$"
MODEL_PATTERN = r"^(timm/)?[A-Za-z0-9._-]{1,96}$"
RELATIVE_PATH_PATTERN = r"^[A-Za-z0-9._-]{1,64}(/[A-Za-z0-9._-]{1,64}){0,7}$"
SHARDS_PATTERN = r"^[!-~]{1,1024}$"
VERSION_PATTERN = r"^sha256:[0-9a-f]{64}$"
INIT_FROM_PATTERN = r"^job_[0-9A-Za-z]{26}(/(best|latest|step-[0-9]{8}))?$"

IN_MEMORY_DATASETS = ("cifar10", "cifar100", "mnist", "fashion-mnist", "kmnist", "qmnist", "emnist", "usps", "svhn", "stl10")
FILE_DATASETS = (
    "caltech101",
    "caltech256",
    "country211",
    "dtd",
    "eurosat",
    "fgvc-aircraft",
    "flowers102",
    "food101",
    "gtsrb",
    "imagenette",
    "oxford-iiit-pet",
    "pcam",
    "places365",
    "rendered-sst2",
    "stanford-cars",
    "sun397",
)
TORCHVISION_DATASETS = (*IN_MEMORY_DATASETS, *FILE_DATASETS)
CLASS_FOLDER, IMAGENET, WEBDATASET, GLYPHS, DIGITS = "class_folder", "imagenet", "webdataset", "glyphs", "digits"
BUILT_IN_DATASETS = (DIGITS, GLYPHS, *TORCHVISION_DATASETS, CLASS_FOLDER, IMAGENET, WEBDATASET)
NORMED_MODELS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "wide_resnet50_2",
    "wide_resnet101_2",
    "seresnet18",
    "seresnet34",
    "seresnet50",
    "seresnet101",
    "resnet8",
    "resnet14",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
)
"""Networks whose normalisation layers can be chosen."""


class SpecModel(BaseModel):
    """Base of every part of a spec: unknown keys, wrong types, NaN and infinity are errors; values never change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


def either(*cases: dict[str, Any]) -> dict[str, Any]:
    """A rule between fields, as JSON Schema says it: at least one of `cases` holds. What a validator below refuses by `Broken`, the schema
    refuses so too, wherever numbers need not be compared with each other."""
    return {"anyOf": list(cases)}


def absent_or(**fields: dict[str, Any]) -> dict[str, Any]:
    """A case of `either`: each field is left out, or fits its schema."""
    return {"properties": fields}


def present(**fields: dict[str, Any]) -> dict[str, Any]:
    """A case of `either`: each field is there and fits its schema."""
    return {"properties": fields, "required": list(fields)}


def rules(*between_fields: dict[str, Any]) -> ConfigDict:
    """`model_config` that adds these to a model's schema."""
    return ConfigDict(json_schema_extra={"allOf": list(between_fields)})


NULL: dict[str, Any] = {"type": "null"}
NO: dict[str, Any] = {"const": False}
ZERO: dict[str, Any] = {"maximum": 0}
ABOVE_ZERO: dict[str, Any] = {"exclusiveMinimum": 0}


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
        custom_error_type="unknown_value",
        custom_error_message="must be one of: " + ", ".join(known),
        custom_error_context={"tag": "name"},
    )


def _tag_reader(default: str) -> Callable[[Any], str | None]:
    def tag(value: Any) -> str | None:
        found = value.get("name", default) if isinstance(value, dict) else getattr(value, "name", None)
        return f"#{found}" if isinstance(found, str) else None

    return tag


def by_kind(simple: type | tuple[type, ...], message: str) -> Discriminator:
    """Choose between a simple value (`#value`) and an object (`#settings`), so that an error speaks of the one that was meant."""

    def kind(value: Any) -> str | None:
        if isinstance(value, dict | BaseModel):
            return "#settings"
        return "#value" if isinstance(value, simple) and not isinstance(value, bool) else None

    return Discriminator(kind, custom_error_type="wrong_type", custom_error_message=message)


class TrivialAugmentSpec(SpecModel):
    name: Literal["trivial"]
    """TrivialAugment: one random operation of random strength per image."""


class RandAugmentSpec(SpecModel):
    name: Literal["rand"]
    """RandAugment: several random operations of one strength per image."""
    num_ops: int = Field(default=2, ge=1, le=10)
    """Operations applied in a row."""
    magnitude: int = Field(default=9, ge=0, le=30)
    """Their strength, of 30."""


# a named alias: the discriminator of a bare one cannot be hashed, as `| None` needs
PolicySpec = TypeAliasType(
    "PolicySpec",
    Annotated[Annotated[TrivialAugmentSpec, Tag("#trivial")] | Annotated[RandAugmentSpec, Tag("#rand")], by_name("trivial", "rand")],
)


class AugmentSpec(SpecModel):
    """Augmentation part by part; `standard` is crop `pad`, `imagenet` is crop `resized`, both with the data set's own flip."""

    model_config = rules(either(absent_or(crop_scale=NULL), present(crop={"const": "resized"})))

    crop: Literal["none", "pad", "resized"] = "pad"
    """none; pad (padded by an eighth, cropped back at random); resized (a random share of the area, scaled to the image size)."""
    crop_scale: float | None = Field(default=None, gt=0.0, le=1.0)
    """For crop resized: the smallest share of the area that is kept; null is 0.08."""
    flip: bool | None = None
    """Mirror half of the images; null is the data set's own (not where a mirrored class is another class)."""
    policy: PolicySpec | None = None
    """TrivialAugment or RandAugment."""
    erasing: float = Field(default=0.0, ge=0.0, le=1.0)
    """Probability that a random rectangle of an image is erased."""
    mixup: float = Field(default=0.0, ge=0.0, le=100.0)
    """MixUp: parameter of its Beta distribution; 0 is off. With cutmix, each image draws one of the two."""
    cutmix: float = Field(default=0.0, ge=0.0, le=100.0)
    """CutMix: parameter of its Beta distribution; 0 is off."""

    @model_validator(mode="after")
    def _scale_is_for_resized_crops(self) -> Self:
        if self.crop_scale is not None and self.crop != "resized":
            refuse(self, [Broken("crop_scale", "would_be_ignored", "is for crop resized only")])
        return self


AugmentNames = Literal["none", "standard", "imagenet"]
AugmentChoice = Annotated[
    Annotated[AugmentNames, Tag("#value")] | Annotated[AugmentSpec, Tag("#settings")],
    by_kind(str, "must be none, standard, imagenet, or an object of augmentation settings"),
]


class _Data(SpecModel):
    image_size: int | None = Field(default=None, ge=8, le=1024)
    """Side of the square images in pixels; null is the data set's own (digits 16)."""
    batch_size: int = Field(default=128, ge=1, le=65536)
    """Images in one optimizer step, over all GPUs."""
    augment: AugmentChoice | None = None
    """Augmentation of the training images: none, standard (shift or crop, flip where classes allow it), imagenet (random resized crop, \
flip), or its parts; null is the data set's own."""


class _HeldOut(_Data):
    val_fraction: float = Field(default=0.2, gt=0.0, le=0.5)
    """Share of the training images held out, stratified, as the validation split where the data set brings none."""


class DigitsData(_HeldOut):
    dataset: Literal["digits"]
    """scikit-learn's 1,797 hand-written digits: needs no file."""


class GlyphsData(_Data):
    dataset: Literal["glyphs"]
    """Characters of the DejaVu font, deformed, occluded and noisy: needs no file."""
    classes: int = Field(default=100, ge=10, le=2000)
    """Characters to tell apart."""
    train_per_class: int = Field(default=200, ge=1, le=100000)
    """Training images of each class."""
    val_per_class: int = Field(default=20, ge=1, le=100000)
    """Validation images of each class."""
    difficulty: float = Field(default=0.5, ge=0.0, le=1.0)
    """How far the images are from clean print; 1 is very hard."""

    @model_validator(mode="after")
    def _images_fit_in_memory(self) -> Self:
        images, size = self.classes * (self.train_per_class + self.val_per_class), self.image_size or 24
        if images * size * size > 8 * 2**30:
            rule = f"{images:,} images of {size} px are more than 8 GiB: lower classes, train_per_class or image_size"
            refuse(self, [Broken("train_per_class", "out_of_range", rule)])
        return self


class TorchvisionData(_HeldOut):
    model_config = rules(either(absent_or(workers=ZERO), absent_or(dataset={"enum": list(FILE_DATASETS)})))

    dataset: Literal[TORCHVISION_DATASETS]  # type: ignore[valid-type]
    """A data set of torchvision's, below the data root."""
    download: bool = False
    """Fetch it if it is not below the data root yet."""
    workers: int = Field(default=0, ge=0, le=64)
    """Processes that decode images, for a data set that is made of image files; 0 decodes in the trainer."""

    @model_validator(mode="after")
    def _workers_decode_files(self) -> Self:
        if self.workers != 0 and self.dataset in IN_MEMORY_DATASETS:
            refuse(self, [Broken("workers", "would_be_ignored", "is for data sets made of image files only; this one is held in memory")])
        return self


# Rust's regular expressions, which pydantic matches by, cannot say it in the pattern
GOES_DOWN: dict[str, Any] = {"not": {"pattern": r"(^|/)[.]{1,2}(/|$)"}}


class _Folder(_Data):
    path: str = Field(pattern=RELATIVE_PATH_PATTERN, json_schema_extra=GOES_DOWN)
    workers: int = Field(default=0, ge=0, le=64)
    """Processes that decode images; 0 decodes in the trainer. Data sets that are held in memory need none."""

    @model_validator(mode="after")
    def _path_goes_down(self) -> Self:
        if {".", ".."} & set(self.path.split("/")):
            refuse(self, [Broken("path", "invalid_path", "must not contain . or .. as a folder name")])
        return self


class ClassFolderData(_Folder, _HeldOut):
    dataset: Literal["class_folder"]
    """Folders of images, one a class."""
    path: str = Field(pattern=RELATIVE_PATH_PATTERN, json_schema_extra=GOES_DOWN)
    """Folder below the data root: one sub-folder a class, or train/ and val/ with one each."""


class ImageNetData(_Folder):
    dataset: Literal["imagenet"]
    """ImageNet-1K as train/ and val/ with one folder a class."""
    path: str = Field(default="imagenet", pattern=RELATIVE_PATH_PATTERN, json_schema_extra=GOES_DOWN)
    """Folder below the data root."""


class WebDatasetData(_Data):
    dataset: Literal["webdataset"]
    """Tar shards, at a URL or below the data root."""
    train: str = Field(pattern=SHARDS_PATTERN, examples=["s3://bucket/train-{000000..000146}.tar"])
    """Training shards: a URL or a path below the data root; {a..b} counts, * matches."""
    val: str = Field(pattern=SHARDS_PATTERN)
    """Validation shards."""
    test: str | None = Field(default=None, pattern=SHARDS_PATTERN)
    """Test shards, scored once at the end."""
    shuffle_window: int = Field(default=4096, ge=1, le=10_000_000)
    """Samples among which the order is random, on top of the random order of the shards."""
    workers: int = Field(default=0, ge=0, le=64)
    """Processes that read and decode; 0 does it in the trainer."""


class NamedData(_HeldOut):
    dataset: str = Field(
        pattern=NAME_PATTERN,
        json_schema_extra={"not": {"enum": list(BUILT_IN_DATASETS)}},
    )
    """An uploaded or registered data set, as GET /v1/datasets lists it."""
    version: str | None = Field(default=None, pattern=VERSION_PATTERN)
    """Content hash of the very version; null is the newest that is ready, fixed when the job is submitted."""
    workers: int = Field(default=0, ge=0, le=64)
    """Processes that decode images; 0 decodes in the trainer. Data sets that are held in memory need none."""


_DATA_TAGS = {
    DIGITS: "#digits",
    GLYPHS: "#glyphs",
    CLASS_FOLDER: "#class_folder",
    IMAGENET: "#imagenet",
    WEBDATASET: "#webdataset",
    **dict.fromkeys(TORCHVISION_DATASETS, "#torchvision"),
}


def _data_tag(value: Any) -> str | None:
    if isinstance(value, dict):
        name = value.get("dataset")
    elif isinstance(value, BaseModel):
        name = getattr(value, "dataset", None)
    else:
        return None
    # without a name it is the digits' own rule that speaks: dataset is required
    return _DATA_TAGS.get(name, "#named") if isinstance(name, str) else "#named" if name is not None else "#digits"


DataSpec = Annotated[
    Annotated[DigitsData, Tag("#digits")]
    | Annotated[GlyphsData, Tag("#glyphs")]
    | Annotated[TorchvisionData, Tag("#torchvision")]
    | Annotated[ClassFolderData, Tag("#class_folder")]
    | Annotated[ImageNetData, Tag("#imagenet")]
    | Annotated[WebDatasetData, Tag("#webdataset")]
    | Annotated[NamedData, Tag("#named")],
    Discriminator(_data_tag, custom_error_type="wrong_type", custom_error_message="must be an object"),
]


class ModelSpec(SpecModel):
    model_config = rules(
        either(absent_or(norm=NULL), absent_or(name={"enum": list(NORMED_MODELS)})),
        either(absent_or(pretrained=NO), absent_or(norm={"enum": [None, "batch"]}, init_from=NULL)),
        either(absent_or(sync_batch_norm=NO), absent_or(norm={"enum": [None, "batch"]})),
    )

    name: str = Field(default="resnet18", pattern=MODEL_PATTERN)
    """Name of the network, as GET /v1/models lists it; timm's begin with timm/."""
    norm: Literal["batch", "group", "none"] | None = None
    """Normalisation layers of a ResNet: batch, group, or none (the paper's non-BN network: He initialisation, biases on); null is the \
network's own."""
    pretrained: bool = False
    """Start from the library's pretrained weights, a new classifier on top."""
    init_from: str | None = Field(default=None, pattern=INIT_FROM_PATTERN, examples=["job_01JD0000000000000000000000/best"])
    """Start from a checkpoint of an earlier job: its id, or id/best, id/latest, id/step-00000800. A classifier of another size starts fresh."""
    sync_batch_norm: bool = False
    """Batch statistics over all GPUs of the job instead of each one's share."""

    @model_validator(mode="after")
    def _choices_fit_the_network(self) -> Self:
        broken = []
        if self.norm is not None and self.name not in NORMED_MODELS:
            broken.append(Broken("norm", "would_be_ignored", "can be chosen for the ResNets only: " + ", ".join(NORMED_MODELS)))
        if self.pretrained and self.norm in {"group", "none"}:
            broken.append(Broken("pretrained", "conflict", f"there are no pretrained weights for norm {self.norm}"))
        if self.pretrained and self.init_from is not None:
            broken.append(Broken("pretrained", "conflict", "the weights come from init_from: set one of the two"))
        if self.sync_batch_norm and self.norm in {"group", "none"}:
            broken.append(Broken("sync_batch_norm", "would_be_ignored", f"with norm {self.norm} there are no batch statistics"))
        refuse(self, broken)
        return self


class AlphaSchedule(SpecModel):
    """An alpha that moves from `start` to `end` during the first `epochs` and stays there."""

    start: float = Field(ge=0.0, le=1.0)
    """Alpha of the first step."""
    end: float = Field(ge=0.0, le=1.0)
    """Alpha from the end of `epochs` on."""
    epochs: int | None = Field(default=None, ge=1, le=10000)
    """Epochs of the change; null is all of them."""
    shape: Literal["linear", "cosine"] = "linear"
    """How it moves between them."""


AlphaChoice = Annotated[
    Annotated[float, Field(ge=0.0, le=1.0), Tag("#value")] | Annotated[AlphaSchedule, Tag("#settings")],
    by_kind((int, float), "must be a number in [0, 1], or an object with start, end, epochs and shape"),
]
ClassWeights = Annotated[
    Annotated[Literal["balanced"], Tag("#value")]
    | Annotated[list[Annotated[float, Field(ge=0.0, le=1e6)]], Field(min_length=2, max_length=100_000), Tag("#list")],
    Discriminator(
        lambda value: "#list" if isinstance(value, list) else "#value" if isinstance(value, str) else None,
        custom_error_type="wrong_type",
        custom_error_message="must be balanced, or a list with one weight a class",
    ),
]


class LossSpec(SpecModel):
    alpha: AlphaChoice = 1.0
    """Exponent of PowerGrad Transform in the backward pass; 1 is ordinary cross-entropy. Or {start, end, epochs, shape}."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the target mass spread evenly over all classes."""
    class_weights: ClassWeights | None = None
    """Weight of each class in the training loss: a list in the order of the classes, or balanced (by their inverse frequency)."""


class SGDSpec(SpecModel):
    model_config = rules(either(absent_or(momentum=ABOVE_ZERO), present(nesterov=NO)))

    name: Literal["sgd"] = "sgd"
    """Stochastic gradient descent with momentum."""
    lr: float = Field(default=0.1, gt=0.0, le=1000.0)
    """Peak learning rate."""
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Momentum of the gradient average."""
    nesterov: bool = True
    """Nesterov's form of momentum."""
    weight_decay: float = Field(default=5e-4, ge=0.0, le=10.0)
    """L2 penalty."""
    decay_norm_and_bias: bool = True
    """Whether weight decay falls on normalisation layers and biases too."""

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
    decay_norm_and_bias: bool = True
    """Whether weight decay falls on normalisation layers and biases too."""


class LionSpec(SpecModel):
    name: Literal["lion"]
    """Lion: the sign of an averaged gradient (arXiv 2302.06675)."""
    lr: float = Field(default=1e-4, gt=0.0, le=1000.0)
    """Peak learning rate; a third to a tenth of AdamW's."""
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Share of the average in the update."""
    beta2: float = Field(default=0.99, ge=0.0, lt=1.0)
    """Decay of the gradient average."""
    weight_decay: float = Field(default=1e-1, ge=0.0, le=10.0)
    """Decoupled weight decay."""
    decay_norm_and_bias: bool = True
    """Whether weight decay falls on normalisation layers and biases too."""


class MuonSpec(SpecModel):
    name: Literal["muon"]
    """Muon: orthogonalised momentum for weight matrices and convolutions, AdamW (with nesterov, NAdamW) for the rest."""
    lr: float = Field(default=0.02, gt=0.0, le=1000.0)
    """Peak learning rate of the matrices."""
    adamw_lr: float | None = Field(default=None, gt=0.0, le=1000.0)
    """Peak learning rate of everything else; null is lr."""
    momentum: float = Field(default=0.95, ge=0.0, lt=1.0)
    """Momentum of the gradient average."""
    nesterov: bool = True
    """Nesterov's form of momentum."""
    weight_decay: float = Field(default=0.0, ge=0.0, le=10.0)
    """Decoupled weight decay."""
    decay_norm_and_bias: bool = True
    """Whether weight decay falls on normalisation layers and biases too."""


OptimizerSpec = Annotated[
    Annotated[SGDSpec, Tag("#sgd")]
    | Annotated[AdamWSpec, Tag("#adamw")]
    | Annotated[LionSpec, Tag("#lion")]
    | Annotated[MuonSpec, Tag("#muon")],
    by_name("sgd", "adamw", "lion", "muon"),
]


class _Cooldown(SpecModel):
    cooldown_epochs: int = Field(default=0, ge=0, le=10000)
    """Last epochs, at the rate the schedule has come down to by then."""


class _Warmup(SpecModel):
    warmup_epochs: int | None = Field(default=None, ge=0, le=10000)
    """Epochs over which the rate climbs linearly to its peak; null is min(5, epochs // 10)."""
    warmup_lr: float = Field(default=0.0, ge=0.0, le=1000.0)
    """Rate from which the warm-up climbs."""


_COOLS_DOWN_TO_SOMETHING = rules(either(absent_or(cooldown_epochs=ZERO), present(min_lr=ABOVE_ZERO)))


class CosineSpec(_Warmup, _Cooldown):
    model_config = _COOLS_DOWN_TO_SOMETHING

    name: Literal["cosine"] = "cosine"
    """From the peak to min_lr along half a cosine."""
    min_lr: float = Field(default=0.0, ge=0.0, le=1000.0)
    """Rate at the end."""


class LinearSpec(_Warmup, _Cooldown):
    model_config = _COOLS_DOWN_TO_SOMETHING

    name: Literal["linear"]
    """From the peak to min_lr along a straight line."""
    min_lr: float = Field(default=0.0, ge=0.0, le=1000.0)
    """Rate at the end."""


class StepSpec(_Warmup, _Cooldown):
    name: Literal["step"]
    """Multiply the rate by gamma at each milestone."""
    milestones: list[Annotated[int, Field(ge=1, le=10000)]] | None = Field(
        default=None, min_length=1, max_length=100, json_schema_extra={"uniqueItems": True}
    )
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


class OneCycleSpec(_Cooldown):
    name: Literal["onecycle"]
    """Up to the peak and down to almost nothing, along two half cosines (arXiv 1708.07120)."""
    peak_at: float = Field(default=0.3, gt=0.0, lt=1.0)
    """Share of the steps after which the peak is reached."""
    start_factor: float = Field(default=25.0, ge=1.0, le=1e9)
    """The first rate is the peak divided by this."""
    end_factor: float = Field(default=1e4, ge=1.0, le=1e9)
    """The last rate is the first divided by this."""


ScheduleSpec = Annotated[
    Annotated[CosineSpec, Tag("#cosine")]
    | Annotated[LinearSpec, Tag("#linear")]
    | Annotated[StepSpec, Tag("#step")]
    | Annotated[ConstantSpec, Tag("#constant")]
    | Annotated[OneCycleSpec, Tag("#onecycle")],
    by_name("cosine", "linear", "step", "constant", "onecycle"),
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


class EmaSpec(SpecModel):
    decay: float = Field(default=0.9999, gt=0.0, lt=1.0)
    """Share of the average that stays at each step."""
    warmup: bool = True
    """Let the decay rise with the steps, (1 + step) / (10 + step) at most, so that the first weights are soon forgotten."""


class EarlyStoppingSpec(SpecModel):
    metric: Literal["val_top1", "val_loss", "ema_val_top1", "ema_val_loss"] = "val_top1"
    """What must keep improving; ema_… needs ema."""
    patience_epochs: int = Field(default=10, ge=1, le=10000)
    """Epochs without an improvement after which the run ends."""
    min_delta: float = Field(default=0.0, ge=0.0, le=1e6)
    """Smallest change that counts as an improvement."""


class TelemetrySpec(SpecModel):
    every_steps: int = Field(default=100, ge=1, le=1_000_000)
    """Steps between two looks at gradients and weights; logits are looked at in every evaluation."""
    pictures: bool = True
    """Draw the figures at the end."""

    def is_due(self, step: int) -> bool:
        """Whether to look at `step`: the steps done once the update that is about to be made is made, the first being 1."""
        return step % self.every_steps == 0


TRAIN_RULES = (
    either(
        absent_or(schedule=absent_or(warmup_lr=ZERO)),
        present(schedule=present(warmup_epochs=ABOVE_ZERO | {"type": "integer"})),
        absent_or(schedule=absent_or(warmup_epochs=NULL), epochs={"minimum": 10}),
    ),
    either(
        absent_or(early_stopping=NULL),
        absent_or(early_stopping=absent_or(metric={"enum": ["val_top1", "val_loss"]})),
        present(ema={"type": "object"}),
    ),
)


class TrainSpec(SpecModel):
    """Everything that decides the bits of a trained network, and nothing else."""

    model_config = rules(*TRAIN_RULES)

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
    accumulate: int = Field(default=1, ge=1, le=65536)
    """Parts in which a batch is computed, one after the other, to save memory; the update is that of the whole batch."""
    compile: Literal[False] = False
    """torch.compile: not available in this release."""
    ema: EmaSpec | None = None
    """Exponential moving average of the weights, evaluated beside them; null is none."""
    early_stopping: EarlyStoppingSpec | None = None
    """Stop when the validation metric no longer improves; null is never."""
    on_divergence: Literal["stop", "rollback"] = "stop"
    """When the loss is NaN or explodes: stop as `diverged`, or go back to the last checkpoint with half the learning rate, at most 3 times."""
    telemetry: TelemetrySpec | None = None
    """Logit, gradient and weight statistics as metrics and pictures; null is none."""
    export: list[Literal["bundle", "onnx", "torch_export"]] = Field(default=[], max_length=3, json_schema_extra={"uniqueItems": True})
    """What to make of the best weights at the end, beside the checkpoint itself."""
    seed: int = Field(default=0, ge=0, le=2**32 - 1)  # torch's CPU generator looks at no more bits
    """Seed of initial weights, data order and augmentation."""
    deterministic: bool = True
    """Same spec, same machine type and software: same bits."""
    checkpoint: CheckpointSpec = CheckpointSpec()
    """When checkpoints are written and which are kept."""

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        refuse(self, [*self._schedule_rules(), *self._batch_rules()])
        return self

    def _schedule_rules(self) -> list[Broken]:
        schedule, below, broken = self.schedule, f"must be below epochs ({self.epochs})", []
        peak = self.optimizer.lr
        cooldown = schedule.cooldown_epochs if isinstance(schedule, _Cooldown) else 0
        if self.warmup_epochs >= self.epochs:
            broken.append(Broken("schedule/warmup_epochs", "out_of_range", below, against="/epochs"))
        elif self.warmup_epochs + cooldown >= self.epochs:
            rule = f"together with {self.warmup_epochs} epochs of warm-up {below}"
            broken.append(Broken("schedule/cooldown_epochs", "out_of_range", rule, against="/epochs"))
        if isinstance(schedule, StepSpec) and schedule.milestones is not None and schedule.milestones[-1] >= self.epochs:
            broken.append(Broken("schedule/milestones", "would_be_ignored", below, against="/epochs"))
        too_high = [name for name in ("warmup_lr", "min_lr") if getattr(schedule, name, 0.0) > peak]
        rule = f"must be at most optimizer.lr ({peak:g})"
        broken += [Broken(f"schedule/{name}", "out_of_range", rule, against="/optimizer/lr") for name in too_high]
        if isinstance(schedule, _Warmup) and schedule.warmup_lr > 0.0 and self.warmup_epochs == 0:
            broken.append(Broken("schedule/warmup_lr", "would_be_ignored", "there is no warm-up: set warmup_epochs"))
        if isinstance(schedule, CosineSpec | LinearSpec) and cooldown and schedule.min_lr == 0.0:
            broken.append(Broken("schedule/cooldown_epochs", "would_be_ignored", "the rate has come down to 0 by then: set min_lr"))
        alpha = self.loss.alpha
        if isinstance(alpha, AlphaSchedule) and alpha.epochs is not None and alpha.epochs > self.epochs:
            broken.append(Broken("loss/alpha/epochs", "out_of_range", f"must be at most epochs ({self.epochs})", against="/epochs"))
        return broken

    def _batch_rules(self) -> list[Broken]:
        broken = []
        if self.data.batch_size % self.accumulate:
            rule = f"must divide data.batch_size ({self.data.batch_size})"
            broken.append(Broken("accumulate", "conflict", rule, against="/data/batch_size"))
        if self.early_stopping is not None and self.early_stopping.metric.startswith("ema_") and self.ema is None:
            broken.append(Broken("early_stopping/metric", "conflict", "needs ema", against="/ema"))
        if len(set(self.export)) < len(self.export):
            broken.append(Broken("export", "conflict", "must not name a format twice"))
        return broken

    @property
    def warmup_epochs(self) -> int:
        """Epochs of warm-up, with the default filled in: min(5, epochs // 10); 0 for a schedule that brings its own climb."""
        if not isinstance(self.schedule, _Warmup):
            return 0
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
