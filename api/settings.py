"""The API's settings, from the environment (or constructor arguments in tests)."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from redis.connection import parse_url
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from api.doorbell import plain_url
from powergrad.addresses import AllowList
from powergrad.jobs.logs import LogFormat
from powergrad.jobs.spec import violations_of

PREFIX = "POWERGRAD_"
SECRETS = frozenset({"POWERGRAD_DATABASE_URL", "REDIS_URL"})  # they may hold a password
DRIVERS = frozenset({"sqlite", "sqlite+pysqlite", "postgresql+psycopg"})


class ApiSettings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, populate_by_name=True)

    host: str = "127.0.0.1"
    """Address to listen on. One that other machines can reach needs a key in the database at the start."""
    port: int = Field(default=8642, ge=0, le=65535)
    """0 takes a free one."""
    data_dir: Path = Path.home() / ".powergrad"
    """Jobs' files."""
    database_url: str = ""
    """SQLAlchemy URL of the job store; default sqlite below data_dir."""
    redis_url: str = Field(default="redis://127.0.0.1:6379/0", validation_alias="REDIS_URL")
    """Broker, as Celery spells it: redis://host:port/db or redis+socket:///path."""
    sweep_s: float = Field(default=2.0, gt=0.0)
    """Interval of the sweeper."""
    min_free_bytes: int = Field(default=256 << 20, ge=0)
    """Free space below which no job is accepted (507)."""
    job_ttl_s: float | None = Field(default=None, ge=0.0, le=1e9)
    """Seconds after its end that a job is deleted which does not say so itself; default never. The workers must be told the same."""
    max_body_bytes: int = Field(default=1 << 20, ge=1024)
    """Largest request body (413)."""
    max_image_bytes: int = Field(default=20_000_000, ge=1024)
    """Largest image to predict (413)."""
    max_upload_bytes: int = Field(default=20 << 30, ge=1024)
    """Largest archive of a data set (413)."""
    max_unpacked_bytes: int = Field(default=64 << 30, ge=1024)
    """Most that may come out of one (413)."""
    max_upload_entries: int = Field(default=1_000_000, ge=1)
    """Most files and folders in one (413)."""
    predict_wait_s: float = Field(default=30.0, ge=0.0, le=60.0)
    """How long a prediction is waited for before its task is named instead (202)."""
    ping_s: float = Field(default=15.0, gt=0.0)
    """How often a quiet event stream says `: ping`."""
    allowed_hosts: str = ""
    """Private hosts that webhooks may call, http allowed: names, addresses and networks, such as hooks.corp:8080,10.0.0.0/8."""
    stalled_s: float = Field(default=60.0, ge=0.1, le=86_400.0)
    """How long a reader may take nothing of what is sent to it before its connection is cut (Linux)."""
    log_format: LogFormat = "console"
    """console or json."""

    @field_validator("allowed_hosts")
    @classmethod
    def _known_hosts(cls, text: str) -> str:
        AllowList.parse(text)
        return text

    @field_validator("database_url")
    @classmethod
    def _known_database(cls, url: str) -> str:
        try:
            known = not url or make_url(url).drivername in DRIVERS
        except (ArgumentError, ValueError):
            known = False
        if not known:
            raise ValueError("must be sqlite:////ABSOLUTE/PATH.db or postgresql+psycopg://USER:PASSWORD@HOST:PORT/DATABASE")
        return url

    @field_validator("redis_url")
    @classmethod
    def _known_broker(cls, url: str) -> str:
        try:
            parse_url(plain_url(url))  # type: ignore[no-untyped-call]  # redis-py has no types here
        except ValueError:
            raise ValueError("must be redis://HOST:PORT/DB, rediss://HOST:PORT/DB or redis+socket:///PATH") from None
        return url

    @model_validator(mode="after")
    def _fill_in(self) -> Self:
        self.data_dir = self.data_dir.expanduser().absolute()
        if not self.database_url:
            self.database_url = f"sqlite:///{self.data_dir / 'powergrad.db'}"
        return self

    @property
    def allow_list(self) -> AllowList:
        return AllowList.parse(self.allowed_hosts)


def wrong_variables(error: ValidationError) -> list[str]:
    """What is wrong with the environment, a line for each variable: `POWERGRAD_SWEEP_S=abc: must be a valid number`."""
    lines = []
    for violation in violations_of(error, ApiSettings):
        name = violation.pointer.removeprefix("/")
        variable = name if name.isupper() else PREFIX + name.upper()
        shown = "" if variable in SECRETS else f"={violation.value}"
        lines.append(f"{variable}{shown}: {violation.detail.removeprefix('Value error, ')}")
    return lines


def is_loopback(host: str) -> bool:
    """Whether a host name or address (IPv6 without brackets) can only mean this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
