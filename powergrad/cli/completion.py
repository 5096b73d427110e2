"""What the Tab key offers: ids, names and fields. It answers within a second or with nothing, and never with an error."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from powergrad.client import Client

PATIENCE_S = 1.0
OFFERED = 50

Offer = tuple[str, str]
"""A word, and what the shell shows beside it."""


def job_ids(ctx: typer.Context, incomplete: str) -> list[Offer]:
    with _asked(ctx) as client:
        found = [(job.id, f"{job.name or ''} {job.state}".strip()) for job in client.page(limit=OFFERED).data]
        return _fitting([("last", "the newest job"), *found], incomplete)
    return []


def experiment_ids(ctx: typer.Context, incomplete: str) -> list[Offer]:
    with _asked(ctx) as client:
        found = [(view.id, f"{view.name or ''} {view.state}".strip()) for view in client.experiment_page(limit=OFFERED).data]
        return _fitting([("last", "the newest experiment"), *found], incomplete)
    return []


def dataset_names(ctx: typer.Context, incomplete: str) -> list[Offer]:
    with _asked(ctx) as client:
        return _fitting([(str(one["name"]), str(one.get("state") or "built in")) for one in client.datasets()], incomplete)
    return []


def preset_names(ctx: typer.Context, incomplete: str) -> list[Offer]:
    with _asked(ctx) as client:
        return _fitting([(str(one["name"]), str(one["title"])) for one in client.presets()], incomplete)
    return []


def metric_names(ctx: typer.Context, incomplete: str) -> list[Offer]:
    """Those of the newest jobs."""
    return _fitting([(name, "") for name in _metrics(ctx)], incomplete)


def sort_keys(ctx: typer.Context, incomplete: str) -> list[Offer]:
    """A best metric of the newest jobs, the least or the greatest first."""
    keys = [(f"{sign}metrics.{name}", told) for name in _metrics(ctx) for sign, told in (("-", "greatest first"), ("", "least first"))]
    return _fitting([("-created_at", "newest first"), *keys], incomplete)


def artifact_names(ctx: typer.Context, incomplete: str) -> list[Offer]:
    """Those of the job that is named before."""
    from powergrad.cli import console

    job = ctx.params.get("job")
    with _asked(ctx) as client:
        if job:
            return _fitting([(one.name, one.media_type) for one in client.artifacts(console.find(client, job))], incomplete)
    return []


def states(incomplete: str) -> list[Offer]:
    from powergrad.jobs.states import JobState

    return _fitting([(str(state), "") for state in JobState], incomplete)


def settings(incomplete: str) -> list[Offer]:
    """Fields of a job spec, as `--set` and `--vary` take them."""
    return _fitting([(f"{name}=", told) for name, told in _fields()], incomplete)


def question_settings(incomplete: str) -> list[Offer]:
    """The same for an experiment, whose base is such a spec."""
    own = [("seeds=", "runs of each arm"), ("metric=", "what is compared"), ("strategy=", "grid, random or asha"), ("name=", "")]
    fields = _fields()
    based = [(f"spec.{name}=", told) for name, told in fields]
    return _fitting([*own, *based, *((f"grid.{name}=", "values to compare") for name, _ in fields)], incomplete)


def _metrics(ctx: typer.Context) -> list[str]:
    with _asked(ctx) as client:
        page = client.page(limit=10).data
        return sorted(set(itertools.chain.from_iterable(job.metrics.latest.keys() | job.metrics.best.keys() for job in page)))
    return []


def _fitting(offers: Iterable[Offer], incomplete: str) -> list[Offer]:
    return [offer for offer in offers if offer[0].startswith(incomplete)]


def _fields() -> list[Offer]:
    """Every dotted field of a job spec with what it may be, from its schema."""
    from powergrad.jobs.spec import JobSpec

    schema = JobSpec.model_json_schema()
    return list(dict(_leaves(schema, schema.get("$defs", {}), "")).items())


def _leaves(schema: dict[str, Any], definitions: dict[str, Any], above: str) -> Iterator[Offer]:
    """Sections are gone into, all alternatives of them; what may be a plain value or null stands for itself too."""
    for name, field in schema.get("properties", {}).items():
        inner = list(_sections(field, definitions))
        for section in inner:
            yield from _leaves(section, definitions, f"{above}{name}.")
        if not inner or any("type" in one and one["type"] != "object" for one in field.get("anyOf", ())):
            yield f"{above}{name}", _choices(field)


def _sections(field: dict[str, Any], definitions: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for one in (field, *field.get("anyOf", ()), *field.get("oneOf", ())):
        target = definitions.get(str(one.get("$ref", "")).rpartition("/")[2], {})
        if "properties" in target:
            yield target
        elif one is not field and ("oneOf" in one or "anyOf" in one):
            yield from _sections(one, definitions)


def _choices(field: dict[str, Any]) -> str:
    if "enum" in field:
        return ", ".join(map(str, field["enum"]))
    return str(field.get("description", ""))[:60]


@contextmanager
def _asked(ctx: typer.Context) -> Iterator[Client]:
    """The server that the command line so far names; whatever goes wrong ends the block."""
    from powergrad.cli.console import Problem
    from powergrad.client import Client, ClientError

    with (
        contextlib.suppress(ClientError, Problem, ValueError, KeyError),
        Client(ctx.params.get("url"), timeout_s=PATIENCE_S, retries=0) as client,
    ):
        yield client
