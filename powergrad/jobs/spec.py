"""A job's spec: what to train (`powergrad.spec.TrainSpec`) and under whose name, where, how long and how urgently.

`parse` turns a decoded JSON body into a `JobSpec` or raises `InvalidSpec` with every violation at once.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Collection
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer, ValidationError, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from powergrad.jobs import gpus, nearest
from powergrad.jobs.errors import Violation, refusal
from powergrad.spec import (
    NAME_PATTERN,
    NO,
    TRAIN_RULES,
    AlphaSchedule,
    Broken,
    ClassFolderData,
    SpecModel,
    TrainSpec,
    absent_or,
    either,
    present,
    refuse,
)

WEBHOOK_PATTERN = r"^https?://[!-~]{1,2000}$"
LabelName = Annotated[str, Field(pattern=NAME_PATTERN)]
LabelText = Annotated[str, Field(max_length=256, pattern=r"^[^\x00-\x1f\x7f]*$")]

BEYOND_THE_SCHEMA = (
    ("/data/train_per_class", "out_of_range", "classes * (train_per_class + val_per_class) * image_size squared is at most 8 GiB"),
    ("/schedule/warmup_epochs", "out_of_range", "below epochs"),
    ("/schedule/cooldown_epochs", "out_of_range", "together with the warm-up below epochs"),
    ("/schedule/milestones", "not_increasing", "each greater than the one before"),
    ("/schedule/milestones", "would_be_ignored", "below epochs"),
    ("/schedule/warmup_lr", "out_of_range", "at most optimizer.lr"),
    ("/schedule/min_lr", "out_of_range", "at most optimizer.lr"),
    ("/loss/alpha/epochs", "out_of_range", "at most epochs"),
    ("/accumulate", "conflict", "a divisor of data.batch_size"),
)
"""Pointer, code and rule of what JSON Schema cannot say, because it compares no two values: a spec that fits the schema may still break
these. The schema lists them as `x-further-rules`."""

ONLY_THESE: dict[str, Any] = {"additionalProperties": False}
"""Of a map whose keys have a pattern: pydantic's schema says what keys of the pattern hold, and lets any other pass."""

HOW_TO_HAVE = {
    "tensorboard": "no worker has the package: the operator installs it by pip install 'powergrad[tensorboard]'",
    "mlflow": "no worker knows an MLflow server: the operator sets POWERGRAD_MLFLOW_URL, with powergrad[mlflow] installed",
}
"""Of outputs that workers can do without: what to do where they cannot write one."""

# where a member of a union is named in pydantic's location, and not in the JSON
_UNIONS = frozenset(
    {
        ("data",),
        ("data", "augment"),
        ("data", "augment", "policy"),
        ("loss", "alpha"),
        ("loss", "class_weights"),
        ("optimizer",),
        ("schedule",),
    }
)
_CODES = {
    "extra_forbidden": "unknown_field",
    "missing": "missing",
    "greater_than_equal": "out_of_range",
    "greater_than": "out_of_range",
    "less_than_equal": "out_of_range",
    "less_than": "out_of_range",
    "finite_number": "not_finite",
    "literal_error": "unknown_value",
    "string_pattern_mismatch": "bad_format",
    "string_unicode": "bad_format",
    "none_required": "not_available",
}
_SHOWN = 200  # characters of an offending value that an error repeats
_LOOKS = 5  # fields, then the rules of a section, of a section that stays wrong, of the whole: a further look finds nothing new


def _whole_or_a_part(wanted: float) -> float:
    try:
        return gpus.amount(wanted)
    except ValueError as error:
        raise PydanticCustomError("out_of_range", gpus.RULE) from error


GpuCount = Annotated[
    float,
    AfterValidator(_whole_or_a_part),
    PlainSerializer(gpus.amount, return_type=int | float),  # a float field would write 1 as 1.0
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0, "maximum": gpus.MOST}, {"type": "number", "enum": list(gpus.PARTS)}]}),
]


class ResourcesSpec(SpecModel):
    gpus: GpuCount | None = None
    """GPUs of one worker: 0 runs on the CPU, below 1 is a part of one, above 1 they share each batch; null is 1 where there are any, else 0."""
    cpu_threads: int | None = Field(default=None, ge=1, le=1024)
    """Compute threads, part of the exact result; null is all cores of the slot, fixed at the first start."""


class LimitsSpec(SpecModel):
    max_seconds: float | None = Field(default=None, gt=0.0, le=1e9)
    """Training time over all attempts after which the job fails with `deadline`; null is no limit."""
    max_attempts: int = Field(default=3, ge=1, le=100)
    """Attempts that may end by the job's own fault or a lost worker before it fails."""
    stall_seconds: float = Field(default=600.0, ge=1.0, le=1e7)
    """Seconds without any sign of progress after which an attempt is ended as `stalled`."""


class RetentionSpec(SpecModel):
    ttl_seconds: float | None = Field(default=None, ge=0.0, le=1e9)
    """Seconds after its end that the job is deleted with all its files, unless a checkpoint is pinned; null is the server's own rule."""


class OutputsSpec(SpecModel):
    tensorboard: bool = False
    """Write the metrics as a TensorBoard event file too, at checkpoints and at the end: one of the artifacts."""
    mlflow: bool = False
    """Copy parameters, metrics, artifacts and state to the MLflow server that the operator has set."""


WebhookEvent = Literal["job.started", "job.paused", "job.succeeded", "job.failed", "job.cancelled"]
ENDS: tuple[WebhookEvent, ...] = ("job.succeeded", "job.failed", "job.cancelled")


class WebhookSpec(SpecModel):
    url: str = Field(pattern=WEBHOOK_PATTERN, examples=["https://example.com/hooks/powergrad"])
    """Called by POST, signed as Standard Webhooks says. https and public addresses only, unless the server allows the host."""
    events: list[WebhookEvent] = Field(default=list(ENDS), min_length=1, max_length=5)
    """Which moves to tell of."""


class JobSpec(TrainSpec):
    """The body of POST /v1/jobs."""

    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [
                *TRAIN_RULES,
                either(absent_or(model=absent_or(sync_batch_norm=NO)), present(resources=present(gpus={"type": "integer", "minimum": 2}))),
            ],
            "x-further-rules": [{"pointer": pointer, "code": code, "rule": rule} for pointer, code, rule in BEYOND_THE_SCHEMA],
        }
    )

    name: str | None = Field(default=None, pattern=NAME_PATTERN)
    """A name to know the job by; it need not be unique. Null is made from the data set and the model."""
    resources: ResourcesSpec = ResourcesSpec()
    """What the trainer runs on."""
    limits: LimitsSpec = LimitsSpec()
    """When to give up."""
    priority: int = Field(default=5, ge=0, le=9)
    """9 starts first, 0 last."""
    labels: dict[LabelName, LabelText] = Field(default={}, max_length=32, json_schema_extra=ONLY_THESE)
    """Free key/value pairs to find and group jobs by."""
    retention: RetentionSpec = RetentionSpec()
    """When the job and its files go."""
    webhook: WebhookSpec | None = None
    """Whom to tell of the job's moves; null tells nobody."""
    outputs: OutputsSpec = OutputsSpec()
    """For which other tools the run is written down too."""

    @model_validator(mode="after")
    def _statistics_are_shared_by_several(self) -> Self:
        if self.model.sync_batch_norm and (self.resources.gpus or 1) < 2:
            refuse(
                self, [Broken("model/sync_batch_norm", "would_be_ignored", "needs resources.gpus of 2 or more", against="/resources/gpus")]
            )
        return self

    def training(self) -> TrainSpec:
        """The part a trainer is given."""
        return TrainSpec.model_validate({name: getattr(self, name) for name in TrainSpec.model_fields})


def default_name(spec: JobSpec) -> str:
    """`digits-resnet18-a0.25`: data set, model and, unless it is 1, alpha; at most 64 characters."""
    data = spec.data.path.replace("/", "-") if isinstance(spec.data, ClassFolderData) else spec.data.dataset
    match spec.loss.alpha:
        case AlphaSchedule(start=start, end=end):
            alpha = f"-a{start:g}-{end:g}"
        case value:
            alpha = "" if value == 1.0 else f"-a{value:g}"
    return f"{data}-{spec.model.name.removeprefix('timm/')}"[: 64 - len(alpha)] + alpha


def parse(body: Any, *, models: Collection[str] = (), datasets: Collection[str] = (), outputs: Collection[str] | None = None) -> JobSpec:
    """The spec in a decoded JSON body, checked against what the workers can do where that is known.

    models, datasets: known names; empty means no worker has told yet, and any well-formed name passes.  outputs: those that workers can
    write; None means the same.
    Raises InvalidSpec with all violations, UnknownReference where the only ones are names that are not known.
    """
    spec, violations = _validated(body)
    for pointer, known in (("/data/dataset", datasets), ("/model/name", models)):
        name = _look_up(body, pointer)
        if known and isinstance(name, str) and _untagged(name) not in known and not any(v.pointer == pointer for v in violations):
            violations.append(Violation(pointer, "unknown_name", nearest.name(name, known), _presentable(name)))
    if spec is not None and outputs is not None:
        asked = [name for name in OutputsSpec.model_fields if getattr(spec.outputs, name)]
        violations += [Violation(f"/outputs/{name}", "not_available", HOW_TO_HAVE[name], True) for name in asked if name not in outputs]
    if violations or spec is None:
        raise refusal(violations)
    return spec


def _untagged(name: str) -> str:
    """`timm/resnet50.a1_in1k` names pretrained weights of timm/resnet50."""
    return name.split(".")[0] if name.startswith("timm/") else name


def _validated(body: Any) -> tuple[JobSpec | None, list[Violation]]:
    """The spec, or every rule it breaks.

    Rules between fields are looked at only when each field is right by itself, so what is wrong is left out and the rest looked at again.
    """
    try:
        return JobSpec.model_validate(body), []
    except ValidationError as error:
        found, wrong = violations_of(error, JobSpec), error
    told: set[str] = set()
    for _ in range(_LOOKS - 1):
        body = _without(body, wrong, told)
        if body is None:
            break
        try:
            JobSpec.model_validate(body)
            break
        except ValidationError as error:
            told = {violation.pointer for violation in found}
            # a default that stands in for a wrong field is nothing to hold other fields to
            found += [
                _violation(item, JobSpec)
                for item in _items(error)
                if _context(item).get("against") not in told and _pointer(item) not in told
            ]
            wrong = error
    return None, found


def _items(error: ValidationError) -> list[dict[str, Any]]:
    return [dict(item) for item in error.errors(include_url=False)]


def _context(item: dict[str, Any]) -> dict[str, Any]:
    return item.get("ctx") or {}


def _without(body: Any, error: ValidationError, told: set[str]) -> dict[str, Any] | None:
    """A copy of the body less the fields that the errors name, or less their section where that did not help; None when it is no object."""
    if not isinstance(body, dict):
        return None
    rest = {key: dict(value) if isinstance(value, dict) else value for key, value in body.items()}
    for item in _items(error):
        path = [part for part in _path(item)[:2] if isinstance(part, str)]
        section = rest.get(path[0]) if path else None
        # of a section of an unknown kind no field is known
        if len(path) > 1 and isinstance(section, dict) and "tag" not in _context(item) and _pointer(item) not in told:
            section.pop(path[1], None)
        elif path[:1] == ["data"]:
            rest["data"] = {"dataset": "digits"}  # the one section that may not be left out
        elif path:
            rest.pop(path[0], None)
    return rest


def _look_up(body: Any, pointer: str) -> Any:
    for name in pointer[1:].split("/"):
        body = body.get(name) if isinstance(body, dict) else None
    return body


def violations_of(error: ValidationError, model: type[BaseModel]) -> list[Violation]:
    """pydantic's errors as pointers into the JSON that was sent. model: what it was to be."""
    return [_violation(item, model) for item in _items(error)]


def _violation(item: dict[str, Any], model: type[BaseModel]) -> Violation:
    context = _context(item)
    value: Any = item.get("input")
    kind, message = item["type"], str(item["msg"])
    if "tag" in context and not isinstance(value, dict):
        kind, message = "dict_type", "must be an object"
    elif "tag" in context:
        value = value[context["tag"]]
    elif kind == "missing":
        value = None
    elif kind == "literal_error" and context["expected"] == "False":
        kind = "none_required"  # both spell a field of a later release
    code = _CODES.get(kind, "wrong_type" if kind.endswith(("_type", "_parsing")) else kind)
    meant = nearest.field(model, item["loc"]) if kind == "extra_forbidden" else None
    hint = "" if meant is None else f"; did you mean {meant!r}?"
    return Violation(_pointer(item), code, _detail(kind, context, message) + hint, _presentable(value))


def _path(item: dict[str, Any]) -> list[str | int]:
    """Where in the JSON an error lies: pydantic's location less its own remarks."""
    path: list[str | int] = []
    at_union = False
    for part in item["loc"]:
        if not (at_union and str(part).startswith("#")):
            path.append(part)
        at_union = not at_union and tuple(path) in _UNIONS
    if len(path) == 3 and path[0] == "labels":
        del path[2]  # "[key]"
    if "tag" in _context(item) and isinstance(item.get("input"), dict):
        path.append(_context(item)["tag"])
    return path


def _pointer(item: dict[str, Any]) -> str:
    return "".join("/" + _printable(str(part)).replace("~", "~0").replace("/", "~1") for part in _path(item))


def _detail(kind: str, context: dict[str, Any], message: str) -> str:
    match kind:
        case "greater_than_equal":
            return f"must be at least {context['ge']}"
        case "greater_than":
            return f"must be greater than {context['gt']}"
        case "less_than_equal":
            return f"must be at most {context['le']}"
        case "less_than":
            return f"must be less than {context['lt']}"
        case "extra_forbidden":
            return "no such field"
        case "missing":
            return message if message != "Field required" else "is required"
        case "finite_number":
            return "must be a finite number"
        case "literal_error":
            return f"must be {context['expected']}"
        case "string_pattern_mismatch":
            return f"must match {context['pattern']}"
        case "string_unicode":
            return "must be text without lone surrogates"
        case "model_type" | "dict_type":
            return "must be an object"
        case "none_required":
            return "is not available in this release: leave it out"
        case _:
            return message.replace("Input should be", "must be", 1).replace("Input must be", "must be", 1)


def _presentable(value: Any) -> Any:
    """The offending value, cut short: an error must not echo a megabyte back, nor what JSON cannot hold."""
    if isinstance(value, bool | None) or (isinstance(value, int) and abs(value) < 2**63):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    text = _printable(value) if isinstance(value, str) else reprlib.repr(value)  # reprlib: neither deep nor long
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def _printable(text: str) -> str:
    return text.encode(errors="replace").decode()  # lone surrogates cannot be sent
