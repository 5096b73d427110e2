"""The shapes of the answers, for the OpenAPI document. Routes send the domain's JSON as it is; a test holds the two against each other."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from powergrad.jobs.keys import Scope
from powergrad.jobs.spec import JobSpec
from powergrad.jobs.states import JobState, ReasonCode

Values = dict[str, float | None]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Document(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ReasonDocument(Document):
    code: ReasonCode
    """What went wrong, from a closed set."""
    detail: str
    hint: str
    """What to try."""
    evidence: dict[str, Any]
    """exit_code or signal, traceback, log_tail: what there was."""


class AttemptDocument(Document):
    number: int
    worker: str
    device: str
    started_at: AwareDatetime
    ended_at: AwareDatetime | None
    outcome: Literal["succeeded", "stopped", "held", "failed", "lost"] | None
    """Null while it runs."""
    reason: ReasonDocument | None
    resumed_from: str | None
    """Id of the checkpoint it went on from; null started anew."""


class ProgressDocument(Document):
    phase: str | None
    epoch: int
    """Whole epochs done."""
    epochs: int
    step: int
    steps: int | None
    """Null until the data is loaded."""
    fraction: Fraction
    eta_s: float | None
    images_per_s: float | None
    ended_early: str | None
    """Why a job that succeeded did so before its last epoch (early stopping); then `fraction` stays below 1."""


class JobMetricsDocument(Document):
    latest: Values
    """Newest value of every metric; null where it is not finite."""
    best: Values
    """Held-out metrics at the step with the best val_top1; test_* once they are scored."""
    best_step: int | None


class QueueDocument(Document):
    position: int | None
    """1 is next, counted to 1000; null when not queued, and in lists."""
    waiting_for: str | None
    """Why it does not run, in words: of a queued job, and of a paused one that a search holds until it is among the best (to resume it sends it
    on to its end)."""


class RetentionDocument(Document):
    keep_last: int
    keep_best: int
    ttl_seconds: int | None
    """Seconds after its end that the job is deleted; null is the server's own rule."""


class JobDocument(Document):
    model_config = ConfigDict(title="Job")

    id: str
    object: Literal["job"]
    name: str
    state: JobState
    reason: ReasonDocument | None
    """Why it failed."""
    spec: JobSpec
    """What was asked for, defaults filled in."""
    resolved: dict[str, Any]
    """What the first attempt fixed: cpu_threads, gpus, precision, determinism, images of each split."""
    attempt: int
    """Claims so far."""
    failures: int
    """Attempts that ended by the job's own fault or a lost worker."""
    attempts: list[AttemptDocument]
    progress: ProgressDocument
    metrics: JobMetricsDocument
    queue: QueueDocument
    labels: dict[str, str]
    notes: str
    priority: int
    retention: RetentionDocument
    bytes: int
    """Of its checkpoints and artifacts."""
    experiment: str | None
    trained_seconds: float
    """Training time over all attempts."""
    created_at: AwareDatetime
    started_at: AwareDatetime | None
    finished_at: AwareDatetime | None
    expires_at: AwareDatetime | None
    """When it is deleted, by its own rule or the server's, unless a checkpoint is pinned; null while it has not ended, and for ever."""
    version: int
    """Moves with state and user fields: what If-Match compares."""
    revision: int
    """Moves with every change."""


class SummaryMetricsDocument(Document):
    """Of the metrics that were asked for those that are there."""

    latest: Values
    best: Values


class JobListDocument(Document):
    model_config = ConfigDict(title="JobList")

    object: Literal["list"]
    data: list[JobDocument]
    has_more: bool
    first_id: str | None
    last_id: str | None
    """Give it as `after` to get the next page."""


class JobSummaryDocument(Document):
    """A job as the line of a table."""

    model_config = ConfigDict(title="JobSummary")

    id: str
    object: Literal["job_summary"]
    name: str
    state: JobState
    reason: ReasonCode | None
    """Why it failed."""
    progress: ProgressDocument
    metrics: SummaryMetricsDocument
    fields: dict[str, Any]
    """Values of the spec that were asked for, by dotted name; null where it has no such field."""
    model: str
    dataset: str
    alpha: float
    seed: int
    epochs: int
    labels: dict[str, str]
    priority: int
    experiment: str | None
    attempt: int
    worker: str | None
    """On which it runs."""
    trained_seconds: float
    bytes: int
    created_at: AwareDatetime
    started_at: AwareDatetime | None
    finished_at: AwareDatetime | None
    version: int
    revision: int
    waiting_for: str | None
    """Why it does not run yet; null when not queued."""


class JobSummaryListDocument(Document):
    model_config = ConfigDict(title="JobSummaryList")

    object: Literal["list"]
    data: list[JobSummaryDocument]
    has_more: bool
    first_id: str | None
    last_id: str | None
    """Give it as `after` to get the next page."""


class BulkRefusalDocument(Document):
    id: str
    code: str
    """Of the problem that the call for this job alone would answer, such as illegal_move."""
    detail: str


class BulkActionDocument(Document):
    model_config = ConfigDict(title="BulkAction")

    object: Literal["bulk_action"]
    action: Literal["cancel", "pause", "resume", "delete"]
    done: list[str]
    """Ids of the jobs that moved, or had moved before."""
    refused: list[BulkRefusalDocument]


class DeletionDocument(Document):
    model_config = ConfigDict(title="Deletion")

    object: Literal["deletion"]
    deleted: list[str]
    """Ids of the jobs that went, or would go, newest first."""
    bytes: int
    """Of their checkpoints and artifacts."""
    has_more: bool
    """Whether more jobs fit: the same call again takes the next ones."""


class EventDocument(Document):
    model_config = ConfigDict(title="Event")

    seq: int
    """Counts from 1 per job, without gaps."""
    at: AwareDatetime
    type: str
    data: dict[str, Any]


class EventListDocument(Document):
    model_config = ConfigDict(title="EventList")

    object: Literal["list"]
    data: list[EventDocument]
    has_more: bool


class CheckpointDocument(Document):
    model_config = ConfigDict(title="Checkpoint")

    id: str
    object: Literal["checkpoint"]
    epoch: int
    step: int
    attempt: int
    metrics: Values
    bytes: int
    """Of model.safetensors."""
    sha256: str
    """Of model.safetensors."""
    is_best: bool
    is_latest: bool
    pinned: bool
    created_at: AwareDatetime


class CheckpointListDocument(Document):
    model_config = ConfigDict(title="CheckpointList")

    object: Literal["list"]
    data: list[CheckpointDocument]


class ArtifactDocument(Document):
    model_config = ConfigDict(title="Artifact")

    name: str
    object: Literal["artifact"]
    attempt: int
    media_type: str
    bytes: int
    sha256: str
    created_at: AwareDatetime


class ArtifactListDocument(Document):
    model_config = ConfigDict(title="ArtifactList")

    object: Literal["list"]
    data: list[ArtifactDocument]


class ClassDocument(Document):
    label: str
    index: int
    """Of the class among the job's classes."""
    probability: Fraction


class PredictionDocument(Document):
    model_config = ConfigDict(title="Prediction")

    object: Literal["prediction"]
    job: str
    checkpoint: str
    predictions: list[ClassDocument]
    """Likeliest first."""


class TaskErrorDocument(Document):
    code: str
    detail: str


class TaskDocument(Document):
    """Short work of a worker's, kept for a day."""

    model_config = ConfigDict(title="Task")

    id: str
    object: Literal["task"]
    kind: str
    job: str | None
    state: Literal["queued", "running", "succeeded", "failed"]
    attempt: int
    result: dict[str, Any] | None
    """What its kind answers: a Prediction for `predict`."""
    error: TaskErrorDocument | None
    created_at: AwareDatetime
    started_at: AwareDatetime | None
    finished_at: AwareDatetime | None


class SeriesDocument(Document):
    model_config = ConfigDict(title="Series")

    name: str
    total: int
    """Points stored; fewer may be shown."""
    steps: list[int]
    values: list[float | None]
    """Null where the value is not finite."""


class SeriesListDocument(Document):
    model_config = ConfigDict(title="SeriesList")

    object: Literal["list"]
    data: list[SeriesDocument]


class CurveDocument(Document):
    model_config = ConfigDict(title="Curve")

    job: str
    run: str
    """The job's name."""
    state: JobState
    total: int
    """Points stored; fewer may be shown."""
    x: list[float | None]
    """Rising; null where it is not known of a step."""
    values: list[float | None]
    """To seven significant digits; null where the value is not finite."""


class ComparisonDocument(Document):
    model_config = ConfigDict(title="Comparison")

    object: Literal["comparison"]
    name: str
    x: Literal["step", "epoch", "seconds"]
    has_more: bool
    """Whether more jobs fit than are shown."""
    data: list[CurveDocument]


class WorkerDocument(Document):
    model_config = ConfigDict(title="Worker")

    id: str
    object: Literal["worker"]
    host: str
    pid: int
    version: str
    state: Literal["starting", "ready", "draining"]
    slots: list[dict[str, Any]]
    devices: list[dict[str, Any]]
    """The CPU, then each GPU with its memory and, of its four quarters, those that this worker's jobs hold: quarters_in_use."""
    running: list[str]
    """Ids of the caller's jobs that it runs; an admin is told of all."""
    others: int
    """Jobs of others that it runs beside these."""
    started_at: AwareDatetime
    heartbeat_at: AwareDatetime


class WorkerListDocument(Document):
    model_config = ConfigDict(title="WorkerList")

    object: Literal["list"]
    data: list[WorkerDocument]


class CatalogueEntryDocument(BaseModel):
    """What a worker told of it; at least its name."""

    model_config = ConfigDict(title="CatalogueEntry", extra="allow")

    name: str


class CatalogueDocument(Document):
    model_config = ConfigDict(title="Catalogue")

    object: Literal["list"]
    data: list[CatalogueEntryDocument]


class DatasetErrorDocument(Document):
    code: str
    """data_unreadable, data_missing, changed, or what ended the check."""
    detail: str


class DatasetVersionDocument(Document):
    model_config = ConfigDict(title="DatasetVersion")

    version: str | None
    """Content hash; null of a registered folder that has not been read yet."""
    source: Literal["uploaded", "registered"]
    path: str | None
    """Of a registered folder, below the data root."""
    state: Literal["checking", "ready", "failed"]
    error: DatasetErrorDocument | None
    """Why it failed."""
    classes: int | None
    """Null until it has been checked."""
    splits: dict[str, int] | None
    """Images of each split; where there is no val, a share of train is held out."""
    files: int
    bytes: int
    task: str | None
    """Id of the task that checks it."""
    created_at: AwareDatetime
    checked_at: AwareDatetime | None


class DatasetSummaryDocument(DatasetVersionDocument):
    """The newest version, and what there is beside it."""

    model_config = ConfigDict(title="DatasetSummary")

    name: str
    object: Literal["dataset"]
    current: str | None
    """The version that a spec without one means: the newest that is ready."""
    versions: list[DatasetVersionDocument]
    """Newest first."""


class FilesDocument(Document):
    count: int
    first: list[dict[str, str]]
    """name and why, of the first 100."""


class RepeatedDocument(Document):
    count: int
    first: list[list[str]]
    """Names of the same image, of the first 100 that are there more than once."""


class DuplicatesDocument(Document):
    """Images that are there byte for byte more than once."""

    across_splits: RepeatedDocument
    across_classes: RepeatedDocument
    within_classes: int


class DatasetReportDocument(Document):
    model_config = ConfigDict(title="DatasetReport")

    splits: dict[str, int]
    classes: int
    class_counts: dict[str, dict[str, int]]
    """Images by class and split, of the first 2,000 classes."""
    unreadable: FilesDocument
    skipped: FilesDocument
    """Left out because they could not be decoded."""
    odd: FilesDocument
    """Decoded, but not as they are: animated, CMYK, 16 bits a pixel."""
    duplicates: DuplicatesDocument
    modes: dict[str, int]
    formats: dict[str, int]
    sides: dict[str, int] | None
    """min, median, max of the images' shorter sides in pixels."""
    warnings: list[str]
    stamp: str | None
    """What a registered folder looked like: a job whose folder looks otherwise fails."""


class DatasetDocument(DatasetSummaryDocument):
    model_config = ConfigDict(title="Dataset")

    report: DatasetReportDocument | None
    """What the check has found; null until then, and where there was nothing to look at."""


class SampledClassDocument(Document):
    label: str
    count: int | None
    """Images of the class in the split; null beyond the first 2,000 classes."""
    samples: int
    """How many of them are shown, from the left of the row."""
    row: int


class DatasetSamplesDocument(Document):
    model_config = ConfigDict(title="DatasetSamples")

    object: Literal["dataset_samples"]
    dataset: str
    version: str
    split: str
    splits: list[str]
    """Those that there are samples of."""
    image: str
    """Path of the sheet: a row of tiles for each class."""
    tile: int
    """Side of a tile in pixels."""
    columns: int
    classes: list[SampledClassDocument]
    more_classes: int
    """Classes that have no row: of many, 40 are shown, spread evenly over them."""


class DatasetListDocument(Document):
    model_config = ConfigDict(title="DatasetList")

    object: Literal["list"]
    data: list[DatasetSummaryDocument | CatalogueEntryDocument]


class PaperDocument(Document):
    """What the paper got: single runs."""

    row: int
    train_top1: Fraction
    val_top1: Fraction
    gain: float | None
    """Of val_top1 over the baseline's; null is a baseline."""


class PresetDocument(Document):
    model_config = ConfigDict(title="Preset")

    name: str
    object: Literal["preset"]
    title: str
    spec: dict[str, Any]
    """A body for POST /v1/jobs."""
    paper: PaperDocument


class PresetListDocument(Document):
    model_config = ConfigDict(title="PresetList")

    object: Literal["list"]
    data: list[PresetDocument]


class KeyDocument(Document):
    model_config = ConfigDict(title="Key")

    id: str
    object: Literal["key"]
    owner: str
    """Whose jobs it shows and makes."""
    name: str
    scopes: list[Scope]
    state: Literal["active", "expired", "revoked"]
    created_at: AwareDatetime
    expires_at: AwareDatetime | None
    revoked_at: AwareDatetime | None


class NewKeyDocument(KeyDocument):
    model_config = ConfigDict(title="NewKey")

    key: str
    """What opens the server, shown this once: `Authorization: Bearer pg_…`."""


class KeyListDocument(Document):
    model_config = ConfigDict(title="KeyList")

    object: Literal["list"]
    data: list[KeyDocument]


class SessionDocument(Document):
    model_config = ConfigDict(title="Session")

    object: Literal["session"]
    owner: str
    scopes: list[Scope]
    key: str | None
    """Id of the key; null where the server knows no keys, and everybody on its machine is the owner `local`."""
    expires_at: AwareDatetime | None
    """When the session, or the key without one, ends; null never."""


class CountDocument(Document):
    used: int
    granted: int | None
    """Null is no limit."""


class SecondsDocument(Document):
    used: float
    granted: float | None
    """Null is no limit."""


class QuotaDocument(Document):
    model_config = ConfigDict(title="Quota")

    object: Literal["quota"]
    owner: str
    queued: CountDocument
    """Jobs in the queue."""
    running: CountDocument
    """Jobs that run at this moment."""
    gpu_seconds: SecondsDocument
    """Seconds on one GPU over all jobs ever, deleted ones too; on two GPUs each counts twice, on a quarter of one a quarter."""
    bytes: CountDocument
    """Of checkpoints, artifacts and uploaded data sets."""


class UsageDocument(Document):
    model_config = ConfigDict(title="Usage")

    object: Literal["usage"]
    owner: str
    queued: CountDocument
    """Jobs in the queue."""
    running: CountDocument
    """Jobs that run at this moment."""
    gpu_seconds: SecondsDocument
    """Seconds on one GPU over all jobs ever, deleted ones too; on two GPUs each counts twice, on a quarter of one a quarter."""
    bytes: CountDocument
    """Of checkpoints, artifacts and uploaded data sets."""
    key: str | None
    """Id of the key; null where the server knows no keys."""
    scopes: list[Scope]


class WebhookSecretDocument(Document):
    model_config = ConfigDict(title="WebhookSecret")

    object: Literal["webhook_secret"]
    secret: str
    """`whsec_` and the base64 of the key of HMAC-SHA256 (Standard Webhooks)."""
    previous_until: AwareDatetime | None
    """Until when the secret before it signs beside it; null where none does."""


class DeliveryDocument(Document):
    model_config = ConfigDict(title="Delivery")

    id: str
    """The `webhook-id` that the receiver sees, the same at every try: whoever has seen it before has had this one."""
    object: Literal["webhook_delivery"]
    event: str
    url: str
    job: str | None
    """Null for a test."""
    state: Literal["pending", "delivered", "failed"]
    attempt: int
    """Tries begun."""
    status: int | None
    """HTTP status of the last answer."""
    error: str | None
    """Why the last try failed."""
    payload: dict[str, Any]
    """The body that is sent."""
    created_at: AwareDatetime
    next_try_at: AwareDatetime | None
    """Null while a try is at work, and once there will be no more."""
    ended_at: AwareDatetime | None


class DeliveryListDocument(Document):
    model_config = ConfigDict(title="DeliveryList")

    object: Literal["list"]
    data: list[DeliveryDocument]
    has_more: bool
    first_id: str | None
    last_id: str | None
    """Give it as `after` to get the next page."""


class ChecksDocument(Document):
    database: str
    """ok, or what is wrong."""
    broker: str
    """ok, or what is wrong."""
    workers: int
    """Workers alive."""


class HealthDocument(Document):
    model_config = ConfigDict(title="Health")

    status: Literal["ok"]


class ReadinessDocument(Document):
    model_config = ConfigDict(title="Readiness")

    status: Literal["ready"]
    version: str
    checks: ChecksDocument


class ViolationDocument(BaseModel):
    """One broken rule: of the body, where `pointer` is, or of a parameter or header, whose name `parameter` is."""

    model_config = ConfigDict(title="Violation", use_attribute_docstrings=True)

    pointer: str | None = None
    """JSON pointer into the body (RFC 6901)."""
    parameter: str | None = None
    """Name of a query parameter or header."""
    code: str
    detail: str
    value: Any = None
    """What was found there, cut short."""


class ProblemDocument(BaseModel):
    """A refusal (RFC 9457)."""

    model_config = ConfigDict(title="Problem", extra="allow")

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str
    errors: list[ViolationDocument] = []
