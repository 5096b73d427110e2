"""The worker's settings, from the environment (or constructor arguments in tests)."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from powergrad.jobs.logs import LogFormat


class WorkerSettings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="POWERGRAD_", env_ignore_empty=True, populate_by_name=True)

    data_dir: Path = Path.home() / ".powergrad"
    """Jobs' files, data sets and locks."""
    database_url: str = ""
    """SQLAlchemy URL of the job store; default sqlite below data_dir."""
    redis_url: str = Field(default="redis://127.0.0.1:6379/0", validation_alias="REDIS_URL")
    """Broker, as Celery spells it."""
    slots: int | None = Field(default=None, ge=1, le=1024)
    """Trainers at a time; default one a GPU, or 1 on the CPU. With GPUs it must not exceed their number; one that takes parts has up to four."""
    cuda_visible_devices: str | None = Field(default_factory=lambda: os.environ.get("CUDA_VISIBLE_DEVICES"))
    """The GPUs to use, as CUDA reads it; empty is none: train on the CPU."""
    lock_dir: Path = Path(tempfile.gettempdir()) / "powergrad-gpus"
    """Host-wide locks of GPUs: the same folder for every worker of the host."""
    lease_ttl_s: float = Field(default=30.0, ge=2.0, le=3600.0)
    """A run whose lease is not renewed for so long is taken over."""
    lease_margin_s: float = Field(default=3.0, gt=0.0)
    """A trainer ends itself so long before its lease does."""
    heartbeat_s: float = Field(default=5.0, gt=0.0)
    """Lease renewals and the worker's own heartbeat."""
    beat_file: Path | None = None
    """A file to touch at every heartbeat, by which a container's health check knows that this worker lives; default none."""
    look_s: float = Field(default=0.5, gt=0.0)
    """How often a supervisor looks whether the user wants something."""
    poll_s: float = Field(default=2.0, gt=0.0)
    """How often an idle worker looks for work that nobody rang for."""
    sweep_s: float = Field(default=2.0, gt=0.0)
    """Interval of the sweeper."""
    job_ttl_s: float | None = Field(default=None, ge=0.0, le=1e9)
    """Seconds after its end that a job is deleted which does not say so itself; default never. The API must be told the same."""
    stop_grace_s: float = Field(default=60.0, gt=0.0)
    """Time a trainer has to write its checkpoint when it is told to stop."""
    mlflow_url: str = Field(default="", pattern=r"^(https?://[!-~]+)?$")
    """Tracking server to which jobs with `outputs.mlflow` are copied; empty is none. MLFLOW_TRACKING_USERNAME, _PASSWORD and _TOKEN are honoured."""
    mlflow_experiment: str = Field(default="powergrad", min_length=1, max_length=256)
    """The MLflow experiment in which their runs are."""
    log_format: LogFormat = "console"
    """console or json."""

    @model_validator(mode="after")
    def _fill_in(self) -> Self:
        self.data_dir = self.data_dir.expanduser().absolute()
        if not self.database_url:
            self.database_url = f"sqlite:///{self.data_dir / 'powergrad.db'}"
        if self.lease_margin_s + self.heartbeat_s >= self.lease_ttl_s:
            raise ValueError(
                f"lease_ttl_s={self.lease_ttl_s:g} must exceed heartbeat_s + lease_margin_s = {self.heartbeat_s + self.lease_margin_s:g}"
            )
        return self
