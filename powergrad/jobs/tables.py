"""The tables of the job store. Times are integer milliseconds since 1970 UTC by the database's clock.

The migrations in `migrations/` make them; a test holds the two against each other.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    literal_column,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from powergrad.jobs.states import OWNED, JobState

metadata = MetaData(naming_convention={"ix": "ix_%(column_0_label)s", "pk": "pk_%(table_name)s"})

Json = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")

Gpus = Float().with_variant(Integer(), "sqlite")  # whose columns hold what they are given, and whose types cannot be altered

_QUEUED = text(f"state = '{JobState.QUEUED}'")
_OWNED = text("state IN (" + ", ".join(f"'{state}'" for state in JobState if state in OWNED) + ")")

_HAS_ENDED = text("finished_at IS NOT NULL")
_NAMES_A_SET = text("dataset_id IS NOT NULL")

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("name", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("reason", Json),
    Column("spec", Json, nullable=False),
    Column("resolved", Json, nullable=False),  # what the first claim fixed: cpu_threads, gpus, precision
    Column("gpus", Gpus),  # NULL: one where there are any; below 1 a part of one
    Column("priority", Integer, nullable=False),
    Column("labels", Json, nullable=False),
    Column("notes", Text, nullable=False),
    Column("retention", Json, nullable=False),
    Column("ttl_s", BigInteger),  # deleted so long after its end; NULL: the server's own
    Column("bytes", BigInteger, nullable=False, server_default=text("0")),  # of its checkpoints and artifacts
    Column("dataset_id", String(40)),  # the uploaded or registered set that its spec pins
    Column("experiment", String(40)),
    Column("attempt", Integer, nullable=False),  # counts claims: the fencing token
    Column("failures", Integer, nullable=False),
    Column("max_attempts", Integer, nullable=False),
    Column("version", Integer, nullable=False),  # moves with state and user fields
    Column("revision", BigInteger, nullable=False),  # moves with every change: the ETag
    Column("seq", BigInteger, nullable=False),  # number of the newest event
    Column("worker", String(128)),
    Column("lease_until", BigInteger),
    Column("not_before", BigInteger),  # back-off
    Column("cancel_requested_at", BigInteger),
    Column("hold_epoch", Integer),  # paused by its own trainer after so many epochs; NULL: not before the end
    Column("heard", BigInteger, nullable=False, server_default=text("0")),  # messages of this attempt's trainer written down so far
    Column("trained_ms", BigInteger, nullable=False),
    Column("progress", Json, nullable=False),
    Column("latest", Json, nullable=False),
    Column("best", Json, nullable=False),
    Column("best_step", BigInteger),
    Column("created_at", BigInteger, nullable=False),
    Column("queued_at", BigInteger, nullable=False),
    Column("started_at", BigInteger),
    Column("finished_at", BigInteger),
    Index("ix_jobs_queue", text("priority DESC"), "queued_at", "id", sqlite_where=_QUEUED, postgresql_where=_QUEUED),
    Index("ix_jobs_owner_queue", "owner", text("priority DESC"), "queued_at", "id", sqlite_where=_QUEUED, postgresql_where=_QUEUED),
    Index("ix_jobs_lease", "lease_until", sqlite_where=_OWNED, postgresql_where=_OWNED),
    Index("ix_jobs_owner", "owner", "id"),
    Index("ix_jobs_owner_state", "owner", "state", "id"),
    Index("ix_jobs_experiment", "experiment", "id"),
    Index("ix_jobs_finished", "finished_at", sqlite_where=_HAS_ENDED, postgresql_where=_HAS_ENDED),
    Index("ix_jobs_dataset", "dataset_id", sqlite_where=_NAMES_A_SET, postgresql_where=_NAMES_A_SET),
)

# spelled out, not bound: a planner uses a partial index only where it can see that the condition is the index's own
IS_QUEUED: ColumnElement[bool] = jobs.c.state == literal_column(f"'{JobState.QUEUED}'")
IS_OWNED: ColumnElement[bool] = jobs.c.state.in_([literal_column(f"'{state}'") for state in JobState if state in OWNED])

job_labels = Table(
    "job_labels",
    metadata,
    Column("job_id", String(40), primary_key=True),
    Column("key", String(64), primary_key=True),
    Column("value", String(256), nullable=False),
    Index("ix_job_labels_pair", "key", "value", "job_id"),
)

attempts = Table(
    "attempts",
    metadata,
    Column("job_id", String(40), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("worker", String(128), nullable=False),
    Column("device", String(128), nullable=False),
    Column("started_at", BigInteger, nullable=False),
    Column("ended_at", BigInteger),
    Column("outcome", String(16)),
    Column("reason", Json),
    Column("resumed_from", String(32)),
)

events = Table(
    "events",
    metadata,
    Column("job_id", String(40), primary_key=True),
    Column("seq", BigInteger, primary_key=True),
    Column("at", BigInteger, nullable=False),
    Column("type", String(32), nullable=False),
    Column("data", Json, nullable=False),
)

metric_chunks = Table(
    "metric_chunks",
    metadata,
    Column("job_id", String(40), primary_key=True),
    Column("name", String(64), primary_key=True),
    Column("level", Integer, primary_key=True),
    Column("ordinal", Integer, primary_key=True),
    Column("count", Integer, nullable=False),
    Column("last_step", BigInteger, nullable=False),
    Column("points", LargeBinary, nullable=False),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("job_id", String(40), primary_key=True),
    Column("step", BigInteger, primary_key=True),
    Column("attempt", Integer, nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("path", String(256), nullable=False),  # relative to the job's directory
    Column("metrics", Json, nullable=False),
    Column("score", Float),  # val_top1
    Column("bytes", BigInteger, nullable=False),
    Column("total_bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("pinned", Boolean, nullable=False),
    Column("broken", Boolean, nullable=False),
    Column("created_at", BigInteger, nullable=False),
)

artifacts = Table(
    "artifacts",
    metadata,
    Column("job_id", String(40), primary_key=True),
    Column("name", String(64), primary_key=True),
    Column("attempt", Integer, nullable=False),
    Column("path", String(256), nullable=False),  # relative to the job's directory
    Column("media_type", String(128), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("created_at", BigInteger, nullable=False),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("owner", String(64), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("body_sha256", String(64), nullable=False),
    Column("job_id", String(40), nullable=False),
    Column("created_at", BigInteger, nullable=False, index=True),
)

workers = Table(
    "workers",
    metadata,
    Column("id", String(128), primary_key=True),
    Column("host", String(128), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("version", String(32), nullable=False),
    Column("state", String(16), nullable=False),  # ready, draining
    Column("slots", Json, nullable=False),
    Column("devices", Json, nullable=False),
    Column("gpus", Integer, nullable=False),
    Column("started_at", BigInteger, nullable=False),
    Column("heartbeat_at", BigInteger, nullable=False),
)

catalogue = Table(
    "catalogue",
    metadata,
    Column("kind", String(16), primary_key=True),  # models, datasets
    Column("entries", Json, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
)

_TASK_WAITS = text(f"state = '{JobState.QUEUED}'")
_TASK_RUNS = text(f"state = '{JobState.RUNNING}'")

tasks = Table(
    "tasks",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("kind", String(32), nullable=False),
    Column("owner", String(64), nullable=False),
    Column("job_id", String(40)),
    Column("arguments", Json, nullable=False),
    Column("state", String(16), nullable=False),  # queued, running, succeeded, failed: the jobs' words
    Column("attempt", Integer, nullable=False),  # counts claims: the fencing token
    Column("lease_until", BigInteger),
    Column("result", Json),
    Column("error", Json),  # {code, detail}
    Column("created_at", BigInteger, nullable=False, index=True),
    Column("started_at", BigInteger),
    Column("finished_at", BigInteger),
    Index("ix_tasks_queue", "id", sqlite_where=_TASK_WAITS, postgresql_where=_TASK_WAITS),
    Index("ix_tasks_lease", "lease_until", sqlite_where=_TASK_RUNS, postgresql_where=_TASK_RUNS),
    Index("ix_tasks_job", "job_id"),
)

# spelled out as the jobs' are
TASK_WAITS: ColumnElement[bool] = tasks.c.state == literal_column(f"'{JobState.QUEUED}'")
TASK_RUNS: ColumnElement[bool] = tasks.c.state == literal_column(f"'{JobState.RUNNING}'")

deletions = Table(
    "deletions",
    metadata,
    Column("path", String(256), primary_key=True),  # below the artifact root; freed after the commit, again by the sweeper if that fails
    Column("created_at", BigInteger, nullable=False),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("secret_sha256", String(64), nullable=False),
    Column("owner", String(64), nullable=False),
    Column("name", String(64), nullable=False),
    Column("scopes", Json, nullable=False),  # of read, submit, admin
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    Column("revoked_at", BigInteger),
)

sessions = Table(
    "sessions",
    metadata,
    Column("token_sha256", String(64), primary_key=True),
    Column("key_id", String(16), nullable=False, index=True),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False, index=True),
)

owners = Table(
    "owners",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("max_queued", Integer),  # NULL, here and below: no limit
    Column("max_running", Integer),
    Column("max_gpu_ms", BigInteger),
    Column("max_bytes", BigInteger),
    Column("gpu_ms", BigInteger, nullable=False, server_default=text("0")),  # used so far, of jobs deleted since too
)

datasets = Table(
    "datasets",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("name", String(64), nullable=False),
    Column("version", String(71), nullable=False),  # sha256:… of what is in it: the same files are the same version
    Column("source", String(16), nullable=False),  # uploaded, registered
    Column("state", String(16), nullable=False),  # checking, ready, failed
    Column("path", String(256), nullable=False),  # of its folder: uploaded, below the artifact root; registered, below the data root
    Column("files", BigInteger, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("report", Json),
    Column("error", Json),  # {code, detail}
    Column("task_id", String(40)),
    Column("created_at", BigInteger, nullable=False),
    Column("checked_at", BigInteger),
    Index("ix_datasets_version", "owner", "name", "version", unique=True),
)

webhook_secrets = Table(
    "webhook_secrets",
    metadata,
    Column("owner", String(64), primary_key=True),
    Column("secret", String(64), nullable=False),  # whsec_…: it signs, so it cannot be stored as a hash
    Column("previous", String(64)),  # signs beside it until `previous_until`
    Column("previous_until", BigInteger),
)

_IS_DUE = text("state = 'pending'")

deliveries = Table(
    "deliveries",
    metadata,
    Column("id", String(40), primary_key=True),  # the Webhook-Id: the same at every try
    Column("owner", String(64), nullable=False),
    Column("job_id", String(40)),
    Column("url", Text, nullable=False),
    Column("event", String(64), nullable=False),
    Column("body", Text, nullable=False),
    Column("state", String(16), nullable=False),  # pending, delivered, failed
    Column("attempt", Integer, nullable=False),  # counts tries: the fencing token
    Column("due_at", BigInteger, nullable=False),  # the next try, or the end of the lease of the one at work
    Column("status", Integer),  # of the last answer
    Column("error", Text),
    Column("created_at", BigInteger, nullable=False),
    Column("ended_at", BigInteger),
    Index("ix_deliveries_due", "due_at", sqlite_where=_IS_DUE, postgresql_where=_IS_DUE),
    Index("ix_deliveries_owner", "owner", "id"),
    Index("ix_deliveries_job", "job_id"),
)

mlflow_copies = Table(
    "mlflow_copies",
    metadata,
    Column("job_id", String(40), primary_key=True),
    Column("due_at", BigInteger),  # the next round, or the end of the lease of the one at work; NULL: all is copied
    Column("attempt", Integer, nullable=False),  # counts claims: the fencing token
    Column("failures", Integer, nullable=False),  # rounds in a row
    # {run, experiment, revision, seq, steps: {metric: last step}, params, artifacts: {name: sha256}}
    Column("cursor", Json, nullable=False),
    Column("error", Text),  # of the last round
    Index("ix_mlflow_copies_due", "due_at"),
)

experiments = Table(
    "experiments",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("name", String(64), nullable=False),
    Column("state", String(16), nullable=False),  # the jobs' words
    Column("wish", String(16), nullable=False),  # running, paused, cancelled: what the user wants of it as a whole
    Column("spec", Json, nullable=False),  # what was asked, with every default
    Column("plan", Json, nullable=False),  # arms, seeds, and what the stages so far have decided
    Column("notes", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("evidence_key", String(64)),  # of the evidence as it is now
    Column("findings_key", String(64)),  # of the evidence that the findings were computed from
    Column("findings", Json),
    Column("files", Json),  # of the report: {name: {path, media_type, bytes, sha256}}
    Column("error", Json),  # {code, detail}: why the last analysis gave nothing
    Column("task_id", String(40)),  # of the analysis or the search's next draw, under way
    Column("due_at", BigInteger),  # when it is to be looked at again; NULL: when something is done to it
    Column("cloned_from", String(40)),
    Column("created_at", BigInteger, nullable=False),
    Column("started_at", BigInteger),
    Column("finished_at", BigInteger),
    Index("ix_experiments_owner", "owner", "id"),
    Index("ix_experiments_due", "due_at"),
)

experiment_runs = Table(
    "experiment_runs",
    metadata,
    Column("experiment_id", String(40), primary_key=True),
    Column("stage", String(16), primary_key=True),  # tuning-0, tuning-1, …, verdict, search
    Column("arm", Integer, primary_key=True),  # of a search: the trial
    Column("candidate", Integer, primary_key=True),  # of tuning: which of the values; else 0
    Column("seed", BigInteger, primary_key=True),
    Column("settings", Json, nullable=False),
    Column("job_id", String(40), nullable=False),
    # what follows is of the job's last end, as it was seen: it stays when the job is deleted
    Column("state", String(16)),
    Column("attempt", Integer),
    Column("ended_at", BigInteger),
    Column("score", Float),  # the experiment's metric after the last evaluation; NULL where there is none, or it was not finite
    Column("result", Json),  # {reason, final, curve, seconds, joules, provenance}
    Index("ix_experiment_runs_job", "job_id", unique=True),
)

experiment_news = Table(
    "experiment_news",  # a job of the experiment has moved: taken away by whoever looks at the experiment
    metadata,
    Column("job_id", String(40), primary_key=True),
    Column("seq", BigInteger, primary_key=True),  # of the job's newest event: no two moves ever write the same row, or wait for each other
    Column("experiment_id", String(40), nullable=False),
    Index("ix_experiment_news_experiment", "experiment_id"),
)
