"""`powergrad compare`: what the specs of jobs differ in, what came of it, and their curves on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from powergrad.cli import completion, console
from powergrad.cli.console import Code, JsonOption, Problem, UrlOption
from powergrad.cli.curves import Curve, Plots, in_colour, mark
from powergrad.experiments.labels import short
from powergrad.experiments.units import NOTHING, unit

if TYPE_CHECKING:
    from powergrad.client import Client, Job

ABSENT = object()
POINTS = 200
MOST = 50
"""Jobs. What more of them show is a question for an experiment."""
SHOWN = ("val_top1", "val_loss")
IRRELEVANT = frozenset({"name", "notes", "labels", "priority", "webhook"})
"""Fields that do not change what is trained."""


def compare(
    job_ids: Annotated[
        list[str],
        typer.Argument(metavar="JOB JOB...", help="Ids, unambiguous parts of ids, or `last`.", autocompletion=completion.job_ids),
    ],
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", "-m", help="Plot and compare this one. Repeatable.", autocompletion=completion.metric_names),
    ] = None,
    plot: Annotated[bool, typer.Option("--plot/--no-plot", help="Draw their curves; on a terminal only.")] = True,
    as_json: JsonOption = False,
    url: UrlOption = None,
) -> None:
    """Compare jobs: what their specs differ in, their best scores, and their curves."""
    metrics = tuple(metric or SHOWN)
    with console.connect(url) as client:
        found = _distinct(client, job_ids)
        series = _series(client, found, metrics) if plot and not as_json and console.stdout().is_terminal else {}
    differing = differences([job.spec for job in found])
    if as_json:
        console.print_json(_document(found, differing, metrics))
        return
    out = console.stdout()
    out.print(_table(found, differing, metrics, colour=in_colour(out) if series else None))
    if series:
        out.print(Plots({name: curves for name, curves in series.items() if any(curve.values for curve in curves)}))
    if not differing:
        console.say("[dim]Their specs are the same in all that is trained.[/]")
    elif all(name != "seed" for name in differing):
        console.say("[dim]One run each says little: powergrad experiment ask runs every alternative on several seeds.[/]")


def _distinct(client: Client, wanted: Sequence[str]) -> list[Job]:
    ids = list(dict.fromkeys(console.find(client, one) for one in wanted))
    if not 2 <= len(ids) <= MOST:
        raise Problem(f"{len(ids)} job{'' if len(ids) == 1 else 's'}: must be from 2 to {MOST} different ones", code=Code.USAGE)
    return [client.get(job_id) for job_id in ids]


def _series(client: Client, found: Sequence[Job], metrics: Sequence[str]) -> dict[str, list[Curve]]:
    series: dict[str, list[Curve]] = {name: [] for name in metrics}
    for job in found:
        answer = {one["name"]: one for one in client.metrics(job.id, names=metrics, points=POINTS)["data"]}
        for name, curves in series.items():
            one = answer.get(name, {"steps": (), "values": ()})
            curves.append(Curve(job.name or job.id, one["steps"], one["values"]))
    return series


def differences(specs: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Dotted field → its value in each spec, for fields that are not the same in all; ABSENT where a spec does not have it."""
    flat = [dict(_leaves(spec)) for spec in specs]
    names = sorted({name for one in flat for name in one} - IRRELEVANT)
    rows = {name: [one.get(name, ABSENT) for one in flat] for name in names if name.partition(".")[0] not in IRRELEVANT}
    return {name: values for name, values in rows.items() if any(value != values[0] for value in values)}


def _leaves(value: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from _leaves(inner, f"{above}{key}.")
        else:
            yield f"{above}{key}", inner


def _table(found: Sequence[Job], differing: dict[str, list[Any]], metrics: Sequence[str], *, colour: bool | None) -> Table:
    """A row per job; its first column is the colour of its curve, where there are curves (`colour` is not None)."""
    table = Table(
        box=None,
        header_style="dim",
        padding=(0, 2, 0, 0),
        title="scores at the best checkpoint of each",
        title_justify="left",
        title_style="dim",
    )
    if colour is not None:
        table.add_column("")
    table.add_column("job", overflow="fold", min_width=8)
    table.add_column("state", no_wrap=True)
    for name in differing:
        table.add_column(escape(name), overflow="fold", min_width=min(8, len(name)))
    for name in metrics:
        table.add_column(escape(name + (" %" if unit(name).name == "%" else "")), justify="right")
    leaders = {name: _leader(found, name) for name in metrics}
    for place, job in enumerate(found):
        table.add_row(
            *([] if colour is None else [mark(place, colour=colour)]),
            escape(job.name or job.id) + f"\n[dim]{job.id[-8:]}[/]",
            console.state(job.state),
            *(Text("(none)" if values[place] is ABSENT else short(values[place])) for values in differing.values()),
            *(_score(job, name, is_best=leaders[name] == place) for name in metrics),
        )
    return table


def _leader(found: Sequence[Job], metric: str) -> int | None:
    """The place of the best value; None where nothing is known, or not of two."""
    known = [(value, place) for place, job in enumerate(found) if (value := score(job, metric)) is not None]
    if len(known) < 2:
        return None
    return (min if metric.endswith(("loss", "ece")) else max)(known)[1]


def score(job: Job, metric: str) -> float | None:
    """At the best checkpoint; of what is not measured there (train_loss), and before there is one, the newest."""
    best = job.metrics.best.get(metric)
    return job.metrics.latest.get(metric) if best is None else best


def _score(job: Job, metric: str, *, is_best: bool) -> str:
    value = score(job, metric)
    text = NOTHING if value is None else unit(metric).value(value)
    return f"[bold]{text}[/]" if is_best else text


def _document(found: Sequence[Job], differing: dict[str, list[Any]], metrics: Sequence[str]) -> dict[str, Any]:
    """`differences` lists a field's values in the order of `jobs`; null where a spec does not have it (or says null)."""
    return {
        "jobs": [
            {"id": job.id, "name": job.name, "state": str(job.state), "scores": {name: score(job, name) for name in metrics}}
            for job in found
        ],
        "differences": {name: [None if value is ABSENT else value for value in values] for name, values in differing.items()},
    }
