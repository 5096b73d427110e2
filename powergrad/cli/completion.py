"""What the Tab key offers: ids, names and fields. It answers within a second or with nothing, and never with an error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from powergrad.client import Client

PATIENCE_S = 1.0
OFFERED = 50

Offer = tuple[str, str]
"""A word, and what the shell shows beside it."""


def job_ids(ctx: typer.Context, incomplete: str) -> list[Offer]:
    found = _ask(ctx, lambda client: ((job.id, f"{job.name or ''} {job.state}".strip()) for job in client.page(limit=OFFERED).data))
    return _fitting([("last", "the newest job"), *found], incomplete)


def experiment_ids(ctx: typer.Context, incomplete: str) -> list[Offer]:
    def newest(client: Client) -> Iterator[Offer]:
        return ((view.id, f"{view.name or ''} {view.state}".strip()) for view in client.experiment_page(limit=OFFERED).data)

    return _fitting([("last", "the newest experiment"), *_ask(ctx, newest)], incomplete)


def dataset_names(ctx: typer.Context, incomplete: str) -> list[Offer]:
    found = _ask(ctx, lambda client: ((str(one["name"]), str(one.get("state") or "built in")) for one in client.datasets()))
    return _fitting(found, incomplete)


def preset_names(ctx: typer.Context, incomplete: str) -> list[Offer]:
    return _fitting(_ask(ctx, lambda client: ((str(one["name"]), str(one["title"])) for one in client.presets())), incomplete)


def metric_names(ctx: typer.Context, incomplete: str) -> list[Offer]:
    """Those of the newest jobs."""
    return _fitting(_ask(ctx, _metrics), incomplete)


def sort_keys(ctx: typer.Context, incomplete: str) -> list[Offer]:
    """A best metric of the newest jobs, the least or the greatest first."""
    names = [name for name, _ in _ask(ctx, _metrics)]
    keys = [(f"{sign}metrics.{name}", told) for name in names for sign, told in (("-", "greatest first"), ("", "least first"))]
    return _fitting([("-created_at", "newest first"), *keys], incomplete)


def artifact_names(ctx: typer.Context, incomplete: str) -> list[Offer]:
    """Those of the job that is named before."""
    from powergrad.cli import console

    job = ctx.params.get("job") or next(iter(ctx.args), None)  # an option that still waits for its value ends the parsing before
    if not job:
        return []
    return _fitting(
        _ask(ctx, lambda client: ((one.name, one.media_type) for one in client.artifacts(console.find(client, job)))), incomplete
    )


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


def _metrics(client: Client) -> list[Offer]:
    page = client.page(limit=10).data
    return [(name, "") for name in sorted({name for job in page for name in job.metrics.latest.keys() | job.metrics.best.keys()})]


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
        if not inner or any(one.get("type", "object") != "object" for one in (*field.get("anyOf", ()), *field.get("oneOf", ()))):
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


def _ask(ctx: typer.Context, question: Callable[[Client], Iterable[Offer]]) -> list[Offer]:
    """What the server that the command line so far names answers; nothing, whatever goes wrong."""
    from powergrad.cli.console import Problem
    from powergrad.client import Client, ClientError

    try:
        with Client(ctx.params.get("url"), timeout_s=PATIENCE_S, retries=0) as client:
            return list(question(client))
    except (ClientError, Problem, ValueError, KeyError):
        return []
