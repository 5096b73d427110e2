"""Commands about what a job leaves: its log, its metrics, its weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from powergrad.cli import completion, console
from powergrad.cli.console import Code, Finish, JobArgument, JsonOption, Problem, UrlOption

if TYPE_CHECKING:
    from powergrad.client import Client

SPARKS = "▁▂▃▄▅▆▇█"
SPARK_POINTS = 32


def logs(
    job: JobArgument,
    tail: Annotated[int | None, typer.Option("--tail", "-n", min=0, max=1_000_000, help="Only the last N lines.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    url: UrlOption = None,
) -> None:
    """Print a job's log."""
    with console.connect(url) as client:
        job_id = console.find(client, job)
        try:
            for text in client.follow_logs(job_id, tail=tail) if follow else [client.logs(job_id, tail=tail)]:
                sys.stdout.write(text)
                sys.stdout.flush()
        except KeyboardInterrupt:
            raise Finish(Code.INTERRUPTED) from None


def metrics(
    job: JobArgument,
    name: Annotated[
        list[str] | None,
        typer.Option("--name", help="Only this metric, such as val_top1. Repeatable.", autocompletion=completion.metric_names),
    ] = None,
    points: Annotated[int | None, typer.Option("--points", min=4, help="At most about so many points a series, extremes kept.")] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    as_json: JsonOption = False,
    url: UrlOption = None,
) -> None:
    """Show a job's metrics: a line each, or all points as CSV or JSON."""
    if csv and as_json:
        raise Problem("--csv and --json: choose one", code=Code.USAGE)
    with console.connect(url) as client:
        job_id = console.find(client, job)
        if csv:
            sys.stdout.write(client.metrics_csv(job_id, names=name or (), points=points))
            return
        found = client.metrics(job_id, names=name or (), points=points)
    if as_json:
        console.print_json(found)
        return
    series = series_of(found)
    if series:
        console.stdout().print(_table(series))
    else:
        console.say("No points yet.")


def series_of(answer: dict[str, Any]) -> dict[str, list[tuple[int, float | None]]]:
    """(step, value) pairs by name, from the API's answer."""
    return {one["name"]: list(zip(one["steps"], one["values"], strict=True)) for one in answer["data"]}


def _table(series: dict[str, list[tuple[int, float | None]]]) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("metric", no_wrap=True)
    for title in ("points", "first", "last", "min", "max"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for name, pairs in sorted(series.items()):
        known = [value for _, value in pairs if value is not None]
        if not known:
            table.add_row(escape(name), str(len(pairs)), *["–"] * 4, "not finite" if pairs else "")
            continue
        shown = (known[0], known[-1], min(known), max(known))
        table.add_row(escape(name), str(len(pairs)), *(console.number(value) for value in shown), spark(known))
    return table


def spark(values: list[float]) -> str:
    """A curve as a line of blocks."""
    low, high = min(values), max(values)
    kept = (
        values
        if len(values) <= SPARK_POINTS
        else [values[index * (len(values) - 1) // (SPARK_POINTS - 1)] for index in range(SPARK_POINTS)]
    )
    top = len(SPARKS) - 1
    return "".join(SPARKS[round((value - low) / (high - low) * top) if high > low else top // 2] for value in kept)


def artifacts(job: JobArgument, as_json: JsonOption = False, url: UrlOption = None) -> None:
    """List the files a job wrote beside its checkpoints: tables, pictures, exports."""
    with console.connect(url) as client:
        job_id = console.find(client, job)
        found = client.artifacts(job_id)
    if as_json:
        console.print_json([one.model_dump(mode="json") for one in found])
    elif not found:
        console.say("No artifacts yet.")
    else:
        table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
        for title in ("artifact", "type", "size", "written"):
            table.add_column(title, no_wrap=True)
        for one in found:
            table.add_row(escape(one.name), escape(one.media_type), console.size(one.bytes), console.ago(one.created_at))
        console.stdout().print(table)
        console.say(f"[dim]Fetch one: powergrad pull {job_id} --artifact NAME[/]")


CheckpointOption = Annotated[str, typer.Option("--checkpoint", "-c", help="best, latest, or a checkpoint's id.")]


def pin(job: JobArgument, checkpoint: CheckpointOption = "best", as_json: JsonOption = False, url: UrlOption = None) -> None:
    """Keep a checkpoint whatever retention says, and its job with it."""
    _set_pinned(job, checkpoint, pinned=True, as_json=as_json, url=url)


def unpin(job: JobArgument, checkpoint: CheckpointOption = "best", as_json: JsonOption = False, url: UrlOption = None) -> None:
    """Leave a checkpoint to retention again."""
    _set_pinned(job, checkpoint, pinned=False, as_json=as_json, url=url)


def _set_pinned(job: str, checkpoint: str, *, pinned: bool, as_json: bool, url: str | None) -> None:
    with console.connect(url) as client:
        job_id = console.find(client, job)
        found = client.pin(job_id, checkpoint, pinned=pinned)
    if as_json:
        console.print_json(found.model_dump(mode="json"))
    else:
        console.stdout().print(f"{job_id}  {found.id}  {'pinned' if found.pinned else 'not pinned'}")


def pull(
    job: JobArgument,
    checkpoint: CheckpointOption = "best",
    artifact: Annotated[
        str | None,
        typer.Option(
            "--artifact", "-a", help="This artifact instead; `powergrad artifacts` lists them.", autocompletion=completion.artifact_names
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            parser=console.path_text,
            metavar="PATH",
            help="File or folder; default: JOB-CHECKPOINT.safetensors, or the artifact's name, here.",
        ),
    ] = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
) -> None:
    """Download a checkpoint's weights (safetensors) or an artifact, its sha256 verified. Run again to go on with a broken download."""
    with console.connect(url) as client:
        job_id = console.find(client, job)
        try:
            path = download(client, job_id, checkpoint, output) if artifact is None else download_artifact(client, job_id, artifact, output)
        except KeyboardInterrupt:
            console.say("[dim]Stopped. The same command goes on from here.[/]")
            raise Finish(Code.INTERRUPTED) from None
        except OSError as error:
            raise Problem(f"{error.filename or output}: cannot be written ({error.strerror})") from error
    if as_json:
        what = {"checkpoint": checkpoint} if artifact is None else {"artifact": artifact}
        console.print_json({"job": job_id, **what, "path": str(path), "bytes": path.stat().st_size})
    else:
        typer.echo(str(path))


def download(client: Client, job_id: str, checkpoint: str, output: Path | str | None) -> Path:
    """`Client.download` with a bar on a terminal."""
    with _bar(checkpoint) as show:
        return client.download(job_id, checkpoint, output, on_progress=show)


def download_artifact(client: Client, job_id: str, name: str, output: Path | str | None) -> Path:
    """`Client.download_artifact` with a bar on a terminal."""
    with _bar(name) as show:
        return client.download_artifact(job_id, name, output, on_progress=show)


@contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console.stderr(), disable=not sys.stderr.isatty(), auto_refresh=False) as progress:
        task = progress.add_task(title, total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)
            progress.refresh()

        yield show


def predict(
    job: JobArgument,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Image files: JPEG, PNG or WebP.")],
    top: Annotated[int, typer.Option("--top", "-n", min=1, max=1000, help="How many classes to name.")] = 5,
    checkpoint: CheckpointOption = "best",
    as_json: JsonOption = False,
    url: UrlOption = None,
) -> None:
    """Ask a trained network what an image shows."""
    found = []
    with console.connect(url) as client:
        job_id = console.find(client, job)
        for image in images:
            try:
                found.append((image, client.predict(job_id, image, top, checkpoint=checkpoint)))
            except OSError as error:
                raise Problem(f"{image}: cannot be read ({error.strerror})") from error
    if as_json:
        console.print_json([{"image": image, **one.model_dump(mode="json")} for image, one in found])
        return
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for title in ("image", "class"):
        table.add_column(title, overflow="fold")
    table.add_column("probability", justify="right", no_wrap=True)
    for image, one in found:
        for place, guess in enumerate(one.predictions):
            table.add_row(escape(image) if place == 0 else "", escape(guess.label), console.percent(guess.probability))
    console.stdout().print(table)
