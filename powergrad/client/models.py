"""What the server answers, typed. Unknown fields are kept: an older client reads a newer server."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from powergrad.client import notebook
from powergrad.jobs.states import TERMINAL, JobState


class _Answer(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


class Reason(_Answer):
    """Why a job is where it is; `code` is from a closed set, `hint` is what to try."""

    code: str
    detail: str = ""
    evidence: Any = None
    hint: str | None = None


class Attempt(_Answer):
    number: int
    worker: str | None = None
    device: str | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    outcome: str | None = None
    resumed_from: str | None = None


class Progress(_Answer):
    """How far a job is. `fraction` is in [0, 1]; all zero or None before the first step."""

    epoch: float | None = None
    epochs: int | None = None
    step: int | None = None
    steps: int | None = None
    fraction: float | None = None
    eta_s: float | None = None
    images_per_s: float | None = None
    ended_early: str | None = None


class JobMetrics(_Answer):
    """Newest and best values by name; accuracies are fractions in [0, 1]."""

    latest: dict[str, float | None] = {}
    best: dict[str, float | None] = {}


class Queue(_Answer):
    position: int | None = None
    waiting_for: str | None = None


class Job(_Answer):
    """One job as the server knows it. `version` moves with state and user fields, not with progress."""

    id: str
    state: JobState
    name: str | None = None
    reason: Reason | None = None
    spec: dict[str, Any] = {}
    attempt: int = 0
    attempts: list[Attempt] = []
    progress: Progress = Progress()
    metrics: JobMetrics = JobMetrics()
    queue: Queue | None = None
    labels: dict[str, str] = {}
    notes: str | None = None
    priority: int | None = None
    bytes: int = 0
    experiment: str | None = None
    created_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    expires_at: datetime | None = None
    version: int | None = None

    @property
    def is_terminal(self) -> bool:
        return self.state in TERMINAL

    def _repr_html_(self) -> str:
        return notebook.job(self)


class Deletion(_Answer):
    """Ids of jobs that were deleted, or would be, newest first; `bytes` of their checkpoints and artifacts. `has_more`: others fit too."""

    deleted: list[str]
    bytes: int = 0
    has_more: bool = False


class JobPage(_Answer):
    data: list[Job]
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None

    def _repr_html_(self) -> str:
        return notebook.jobs(self.data, has_more=self.has_more)


class Estimate(_Answer):
    """Mean and spread over seeds; None with too few values. `low` and `high` bound the 95 % interval of the mean."""

    n: int = 0
    mean: float | None = None
    sd: float | None = None
    low: float | None = None
    high: float | None = None
    boot_low: float | None = None
    boot_high: float | None = None


class Difference(Estimate):
    """An arm minus the baseline, seed by seed. p_*_holm are corrected for the number of arms."""

    p_t: float | None = None
    p_wilcoxon: float | None = None
    p_t_holm: float | None = None
    p_wilcoxon_holm: float | None = None
    effect_size: float | None = None
    detectable: float | None = None
    more_seeds: int | None = None
    conclusion: str = "open"


class Convergence(_Answer):
    """What it takes to reach the baseline's final score."""

    target: float | None = None
    reached: int = 0
    of: int = 0
    epochs: Estimate = Estimate()
    seconds: Estimate = Estimate()
    joules: Estimate = Estimate()


class Arm(_Answer):
    """One of the settings that are compared. counts: its runs by state; the numbers are of the experiment's metric."""

    index: int
    label: str = ""
    settings: dict[str, Any] = {}
    tuned: dict[str, Any] = {}
    counts: dict[str, int] = {}
    n: int = 0
    mean: float | None = None
    sd: float | None = None
    low: float | None = None
    high: float | None = None
    difference: Difference | None = None
    convergence: Convergence | None = None


class ExperimentProgress(_Answer):
    """`fraction` is in [0, 1]; `runs` are those made or planned so far."""

    fraction: float = 0.0
    runs_done: int = 0
    runs: int = 0
    eta_s: float | None = None


class Analysis(_Answer):
    """none, running, current, stale (more runs have ended since) or failed."""

    state: str = "none"
    error: dict[str, Any] | None = None


class ExperimentView(_Answer):
    """One experiment as an answer showed it."""

    id: str
    state: str
    name: str | None = None
    stage: str = ""
    spec: dict[str, Any] = {}
    counts: dict[str, int] = {}
    progress: ExperimentProgress = ExperimentProgress()
    arms: list[Arm] = []
    baseline: int | None = None
    best: int | None = None
    verdict: str | None = None
    warnings: list[str] = []
    tuning: list[dict[str, Any]] = []
    analysis: Analysis = Analysis()
    files: list[str] = []
    notes: str | None = None
    cloned_from: str | None = None
    created_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    version: int | None = None

    @property
    def is_terminal(self) -> bool:
        return self.state in TERMINAL

    @property
    def is_settled(self) -> bool:
        """It has ended, and what it found has been analysed: nothing will change by itself."""
        done = {"current", "failed"} if self.state == "succeeded" else {"current", "failed", "none"}
        return self.is_terminal and self.analysis.state in done

    def _repr_html_(self) -> str:
        return notebook.experiment(self)


class ExperimentPage(_Answer):
    data: list[ExperimentView]
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None

    def _repr_html_(self) -> str:
        return notebook.experiments(self.data, has_more=self.has_more)


class Event(_Answer):
    """One entry of a job's history; `seq` counts from 1 per job without gaps."""

    seq: int
    type: str
    at: datetime | None = None
    data: dict[str, Any] = {}


class EventPage(_Answer):
    data: list[Event]
    has_more: bool = False


class Checkpoint(_Answer):
    """A published checkpoint; `bytes` and `sha256` are those of its model.safetensors."""

    id: str
    epoch: int | None = None
    step: int | None = None
    metrics: dict[str, float | None] = {}
    bytes: int
    sha256: str
    is_best: bool = False
    is_latest: bool = False
    pinned: bool = False
    created_at: datetime | None = None


class Artifact(_Answer):
    """A file that a job wrote beside its checkpoints."""

    name: str
    attempt: int | None = None
    media_type: str = "application/octet-stream"
    bytes: int
    sha256: str
    created_at: datetime | None = None


class Prediction(_Answer):
    """The likeliest classes of one image, likeliest first."""

    job: str
    checkpoint: str
    predictions: list[ClassProbability]


class ClassProbability(_Answer):
    label: str
    index: int
    probability: float


class Task(_Answer):
    """Short work of a worker's; `result` when it has succeeded, `error` when it has failed."""

    id: str
    state: JobState
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


class WebhookSecret(_Answer):
    """What signs the caller's webhooks; the secret before it does so too until `previous_until`."""

    secret: str
    previous_until: datetime | None = None


class Delivery(_Answer):
    """An event on its way to a receiver: pending, delivered or failed. `id` is the `webhook-id` that the receiver sees."""

    id: str
    event: str
    url: str
    job: str | None = None
    state: str
    attempt: int = 0
    status: int | None = None
    error: str | None = None
    payload: dict[str, Any] = {}
    created_at: datetime | None = None
    next_try_at: datetime | None = None
    ended_at: datetime | None = None


class DeliveryPage(_Answer):
    data: list[Delivery]
    has_more: bool = False


class DatasetVersion(_Answer):
    """One version of a data set; `version` is None while a registered folder is read for the first time."""

    version: str | None = None
    source: str = ""
    path: str | None = None
    state: str
    error: dict[str, Any] | None = None
    classes: int | None = None
    splits: dict[str, int] | None = None
    files: int = 0
    bytes: int = 0
    created_at: datetime | None = None
    checked_at: datetime | None = None

    @property
    def is_checked(self) -> bool:
        return self.state != "checking"


class Dataset(DatasetVersion):
    """A version of an uploaded or registered data set, and what there is beside it. `current` is what a spec without a version means."""

    name: str
    current: str | None = None
    versions: list[DatasetVersion] = []
    report: dict[str, Any] | None = None


class Health(_Answer):
    """What /readyz says; `ready` is its status code put in words."""

    ready: bool = Field(description="every part that a job needs is there")
