"""PowerGrad over HTTP: `Client`, and `AsyncClient` with the same methods. Needs the `client` extra; imports neither torch nor a database.

with Client() as client:
    job = client.submit({"data": {"dataset": "digits"}, "loss": {"alpha": 0.25}})
    job = client.wait(job.id)
    client.download(job.id, "best", "digits.safetensors")
"""

from powergrad.client.aio import AsyncClient
from powergrad.client.errors import ApiError, ClientError, DownloadCorrupt, ForgedWebhook, Unreachable, Violation
from powergrad.client.experiments import AsyncExperiment, Experiment
from powergrad.client.models import (
    Arm,
    Artifact,
    Attempt,
    Checkpoint,
    Dataset,
    DatasetVersion,
    Deletion,
    Delivery,
    Difference,
    Event,
    EventPage,
    ExperimentPage,
    ExperimentView,
    Health,
    Job,
    JobMetrics,
    JobPage,
    Prediction,
    Progress,
    Reason,
    WebhookSecret,
)
from powergrad.client.retries import Retries
from powergrad.client.series import MetricsTable
from powergrad.client.sync import Client
from powergrad.client.webhooks import verify_webhook
from powergrad.jobs.states import JobState

__all__ = [
    "ApiError",
    "Arm",
    "Artifact",
    "AsyncClient",
    "AsyncExperiment",
    "Attempt",
    "Checkpoint",
    "Client",
    "ClientError",
    "Dataset",
    "DatasetVersion",
    "Deletion",
    "Delivery",
    "Difference",
    "DownloadCorrupt",
    "Event",
    "EventPage",
    "Experiment",
    "ExperimentPage",
    "ExperimentView",
    "ForgedWebhook",
    "Health",
    "Job",
    "JobMetrics",
    "JobPage",
    "JobState",
    "MetricsTable",
    "Prediction",
    "Progress",
    "Reason",
    "Retries",
    "Unreachable",
    "Violation",
    "WebhookSecret",
    "verify_webhook",
]
