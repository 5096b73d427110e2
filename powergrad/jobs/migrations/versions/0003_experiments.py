"""Experiments, holds at an epoch, and parts of a GPU"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")


def upgrade() -> None:
    op.add_column("jobs", sa.Column("hold_epoch", sa.Integer(), nullable=True))
    if op.get_bind().dialect.name == "postgresql":  # SQLite's columns hold what they are given
        op.alter_column("jobs", "gpus", type_=sa.Float(), existing_type=sa.Integer(), existing_nullable=True)
    op.create_table(
        "experiments",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("owner", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("wish", sa.String(length=16), nullable=False),
        sa.Column("spec", JSON, nullable=False),
        sa.Column("plan", JSON, nullable=False),
        sa.Column("notes", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("evidence_key", sa.String(length=64), nullable=True),
        sa.Column("findings_key", sa.String(length=64), nullable=True),
        sa.Column("findings", JSON, nullable=True),
        sa.Column("files", JSON, nullable=True),
        sa.Column("error", JSON, nullable=True),
        sa.Column("task_id", sa.String(length=40), nullable=True),
        sa.Column("due_at", sa.BigInteger(), nullable=True),
        sa.Column("cloned_from", sa.String(length=40), nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("started_at", sa.BigInteger(), nullable=True),
        sa.Column("finished_at", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_experiments")),
    )
    op.create_index("ix_experiments_owner", "experiments", ["owner", "id"])
    op.create_index("ix_experiments_due", "experiments", ["due_at"])
    op.create_table(
        "experiment_runs",
        sa.Column("experiment_id", sa.String(length=40), nullable=False),
        sa.Column("stage", sa.String(length=16), nullable=False),
        sa.Column("arm", sa.Integer(), nullable=False),
        sa.Column("candidate", sa.Integer(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("settings", JSON, nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=True),
        sa.Column("ended_at", sa.BigInteger(), nullable=True),
        sa.Column("score", sa.Float(), nullable=True),
        sa.Column("result", JSON, nullable=True),
        sa.PrimaryKeyConstraint("experiment_id", "stage", "arm", "candidate", "seed", name=op.f("pk_experiment_runs")),
    )
    op.create_index("ix_experiment_runs_job", "experiment_runs", ["job_id"], unique=True)
    op.create_table(
        "experiment_news",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("experiment_id", sa.String(length=40), nullable=False),
        sa.PrimaryKeyConstraint("job_id", "seq", name=op.f("pk_experiment_news")),
    )
    op.create_index("ix_experiment_news_experiment", "experiment_news", ["experiment_id"])


def downgrade() -> None:
    op.drop_table("experiment_news")
    op.drop_table("experiment_runs")
    op.drop_table("experiments")
    if op.get_bind().dialect.name == "postgresql":
        op.alter_column("jobs", "gpus", type_=sa.Integer(), existing_type=sa.Float(), existing_nullable=True)
    op.drop_column("jobs", "hold_epoch")
