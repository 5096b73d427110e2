"""What can go wrong in the job domain. It knows no HTTP: the API maps each class to a status once.

JobError
├── InvalidSpec            every violation of a spec at once
│   ├── UnknownReference   all that is wrong is that something it names does not exist
│   └── NotReady           something it names exists, but cannot be used yet
├── JobNotFound
├── CheckpointNotFound
├── ArtifactNotFound
├── TaskNotFound
├── ExperimentNotFound
├── ReportNotReady         nothing of the experiment has been analysed yet
├── DatasetNotFound
├── SamplesNotFound        the set is there, pictures of its images are not
├── DatasetInUse           a job that has not ended pins it
├── NameTaken              a built-in set has the name
├── UploadLost             an upload took so long that its files were given up
├── KeyNotFound
├── DeliveryNotFound
├── QuotaExceeded
├── IllegalMove            the state machine has no such move
├── VersionMismatch        If-Match named another version
├── IdempotencyMismatch    the same key came with another body
├── StorageFull
└── Fenced                 this attempt no longer owns the job: control flow, logged at info
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class JobError(Exception):
    """Base of the domain's errors."""


@dataclass(frozen=True)
class Violation:
    """One broken rule: `pointer` is an RFC 6901 JSON pointer into the spec, `value` what was found there."""

    pointer: str
    code: str
    detail: str
    value: Any = None


class InvalidSpec(JobError):
    """The spec breaks rules; `violations` holds all of them."""

    def __init__(self, violations: list[Violation]) -> None:
        self.violations = violations
        super().__init__("; ".join(f"{v.pointer or '/'}: {v.detail}" for v in violations))


class UnknownReference(InvalidSpec):
    """The spec keeps every rule, but names what is not there: a model, a data set, a job."""


class NotReady(InvalidSpec):
    """The spec names what is not ready yet: a data set that is being checked, a job without a checkpoint."""


UNKNOWN = frozenset({"unknown_name", "not_found"})
UNREADY = frozenset({"not_ready", "no_checkpoint"})


def refusal(violations: list[Violation]) -> InvalidSpec:
    """The error for these violations: by far the most are broken rules; the others only where no rule is broken."""
    codes = {violation.code for violation in violations}
    if codes <= UNKNOWN:
        return UnknownReference(violations)
    return NotReady(violations) if codes <= UNKNOWN | UNREADY else InvalidSpec(violations)


class JobNotFound(JobError):
    """No job has this id (or it belongs to another owner)."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        super().__init__(f"no job {job_id!r}")


class CheckpointNotFound(JobError):
    """The job has no such checkpoint (yet)."""

    def __init__(self, job_id: str, checkpoint_id: str) -> None:
        super().__init__(f"job {job_id} has no checkpoint {checkpoint_id!r}")


class ArtifactNotFound(JobError):
    """The job has no such artifact (yet)."""

    def __init__(self, job_id: str, name: str) -> None:
        super().__init__(f"job {job_id} has no artifact {name!r}")


class TaskNotFound(JobError):
    """No task has this id (or it belongs to another owner, or its day is over)."""

    def __init__(self, task_id: str) -> None:
        super().__init__(f"no task {task_id!r}: tasks are forgotten a day after they were made")


class ExperimentNotFound(JobError):
    """No experiment has this id (or it belongs to another owner)."""

    def __init__(self, experiment_id: str) -> None:
        super().__init__(f"no experiment {experiment_id!r}")


class ReportNotReady(JobError):
    """Nothing of the experiment has been analysed yet."""

    def __init__(self, experiment_id: str) -> None:
        super().__init__(f"{experiment_id} has no report yet: the first one comes once runs have ended and a worker has looked at them")


class DatasetNotFound(JobError):
    """No uploaded or registered set has this name (or it belongs to another owner)."""

    def __init__(self, name: str) -> None:
        super().__init__(f"no data set {name!r}")


class SamplesNotFound(JobError):
    """The set is there, but there are no pictures of its images."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"data set {name!r} has no samples: {why}")


class DatasetInUse(JobError):
    """A set cannot be deleted while a job that has not ended needs it."""

    def __init__(self, name: str, job_id: str) -> None:
        self.job_id = job_id
        super().__init__(f"data set {name!r} is needed by {job_id}, which has not ended: cancel it or wait")


class NameTaken(JobError):
    """An own set must not be called as a built-in one is."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name!r} is the name of a built-in data set: choose another")


class UploadLost(JobError):
    """Nobody vouched for the upload in time, so its files are being freed."""

    def __init__(self, upload_id: str) -> None:
        super().__init__(f"upload {upload_id} was given up, because the server stood still for too long: send it again")


class KeyNotFound(JobError):
    """No API key has this id."""

    def __init__(self, key_id: str) -> None:
        super().__init__(f"no key {key_id!r}: `powergrad keys list` shows them")


class DeliveryNotFound(JobError):
    """No webhook delivery has this id (or it belongs to another owner, or its 30 days are over)."""

    def __init__(self, delivery_id: str) -> None:
        super().__init__(f"no delivery {delivery_id[:64]!r}: deliveries are forgotten 30 days after they were made")


class QuotaExceeded(JobError):
    """The owner has as much as is granted. quota: queued, gpu_seconds or bytes."""

    def __init__(self, quota: str, used: int, granted: int, hint: str) -> None:
        self.quota, self.used, self.granted = quota, used, granted
        super().__init__(f"quota of {quota}: {used:,} of {granted:,} are used: {hint}")


class IllegalMove(JobError):
    """The state of the job, or of what `noun` says, does not allow the action."""

    def __init__(self, action: str, state: str, hint: str = "", *, noun: str = "a job") -> None:
        self.action, self.state = action, state
        super().__init__(f"cannot {action} {noun} that is {state}" + (f": {hint}" if hint else ""))


class VersionMismatch(JobError):
    """The job, or what `noun` says, changed since the caller read it."""

    def __init__(self, expected: int, actual: int, *, noun: str = "the job") -> None:
        self.expected, self.actual = expected, actual
        super().__init__(f"{noun} is at version {actual}, not {expected}: read it again")


class IdempotencyMismatch(JobError):
    """The idempotency key was used before, for another body."""

    def __init__(self, key: str) -> None:
        super().__init__(f"Idempotency-Key {key!r} was used before with another body: use a new key for a new job")


class StorageFull(JobError):
    """The data directory has too little free space to accept more work."""

    def __init__(self, free_bytes: int, needed_bytes: int) -> None:
        super().__init__(f"{free_bytes / 2**20:.0f} MiB free where at least {needed_bytes / 2**20:.0f} MiB are needed: delete jobs or data")


class Fenced(JobError):
    """Another claim, a cancel or a sweep has taken the job from this attempt: kill the trainer, write nothing."""

    def __init__(self, job_id: str, attempt: int) -> None:
        super().__init__(f"attempt {attempt} of {job_id} is over")
