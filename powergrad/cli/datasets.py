"""`powergrad datasets`: what there is to train on, and how one's own images get there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from powergrad.cli import completion, console
from powergrad.cli.console import EXIT_CODES, Code, Finish, JsonOption, Problem, UrlOption

if TYPE_CHECKING:
    from powergrad.client import Client, Dataset, DatasetVersion

STATE_STYLES = {"checking": "yellow", "ready": "green", "failed": "red"}
SHOWN_CLASSES = 50
SHOWN_FILES = 20

app = typer.Typer(
    help="List, upload, register and delete data sets.",
    no_args_is_help=True,
    epilog=EXIT_CODES,
)

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="A data set's name.", autocompletion=completion.dataset_names)]
VersionOption = Annotated[str | None, typer.Option("--version", help="This version alone (sha256:…).")]
WaitOption = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it has been checked, and show what was found.")]


@app.command("list", epilog=EXIT_CODES)
def list_(as_json: JsonOption = False, url: UrlOption = None) -> None:
    """List the data sets a spec may name: the built-in ones, then your own."""
    with console.connect(url) as client:
        found = client.datasets()
    if as_json:
        console.print_json(found)
    elif not found:
        console.say("No worker has said yet what it can train on, and nothing was uploaded.")
    else:
        table = _table(("data set", "state", "classes", "images", "size", "version"))
        for one in found:
            table.add_row(*(_own_cells(one) if "state" in one else _built_in_cells(one)))
        console.stdout().print(table)


def _built_in_cells(one: dict[str, Any]) -> list[str]:
    classes = one.get("classes")
    return [
        escape(str(one["name"])),
        "[dim]built in[/]",
        "–" if classes is None else f"{classes:,}",
        "",
        "",
        "[dim]" + escape(str(one.get("title", ""))) + "[/]",
    ]


def _own_cells(one: dict[str, Any]) -> list[str]:
    classes, versions = one.get("classes"), len(one.get("versions") or [])
    beside = f" [dim](+{versions - 1} older)[/]" if versions > 1 else ""
    return [
        escape(str(one["name"])),
        _state(str(one["state"])),
        "–" if classes is None else f"{classes:,}",
        _images(one.get("splits")),
        console.size(one.get("bytes") or 0),
        escape(str(one.get("version") or "–"))[:19] + beside,
    ]


@app.command(epilog=EXIT_CODES)
def show(name: NameArgument, version: VersionOption = None, as_json: JsonOption = False, url: UrlOption = None) -> None:
    """Show a data set, its versions, and the report of its check."""
    with console.connect(url) as client:
        _show(client.dataset(name, version=version), as_json=as_json)


@app.command(epilog=EXIT_CODES)
def upload(
    path: Annotated[
        str, typer.Argument(metavar="PATH", parser=console.path_text, help="A folder, or a zip or tar archive, of class folders.")
    ],
    name: Annotated[str | None, typer.Option("--name", help="What specs will call it; default: the name of the folder or archive.")] = None,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Leave images that cannot be decoded out, instead of refusing the set.")
    ] = False,
    wait: WaitOption = True,
    as_json: JsonOption = False,
    url: UrlOption = None,
) -> None:
    """Upload a data set: a folder per class, or train/ and val/ (and test/) with a folder per class in each. A folder is packed on the way."""
    from powergrad.archives import BadArchive

    with console.connect(url) as client:
        try:
            with _bar("sending") as show_progress:
                found = client.upload_dataset(path, name, skip_unreadable=skip_unreadable, on_progress=show_progress)
        except OSError as error:
            raise Problem(f"{error.filename or path}: cannot be read ({error.strerror})") from error
        except BadArchive as error:
            raise Problem(str(error)) from error
        _settle(client, found, wait=wait, as_json=as_json)


@app.command(epilog=EXIT_CODES)
def register(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Folder below the server's data root (DATA_DIR/datasets).")],
    name: Annotated[str, typer.Option("--name", help="What specs will call it.")],
    wait: WaitOption = True,
    as_json: JsonOption = False,
    url: UrlOption = None,
) -> None:
    """Make a folder on the server a data set, where it lies. Nothing is copied; needs an admin's key where there are keys."""
    with console.connect(url) as client:
        _settle(client, client.register_dataset(path, name), wait=wait, as_json=as_json)


@app.command(epilog=EXIT_CODES)
def delete(name: NameArgument, version: VersionOption = None, as_json: JsonOption = False, url: UrlOption = None) -> None:
    """Delete a data set, or one version of it. A registered folder stays where it is."""
    with console.connect(url) as client:
        client.delete_dataset(name, version=version)
    if as_json:
        console.print_json({"deleted": name, "version": version})
    else:
        console.say(f"Deleted {escape(name)}.")


def _settle(client: Client, found: Dataset, *, wait: bool, as_json: bool) -> None:
    """Show what became of a new set; one that failed its check ends the command so."""
    if wait and not found.is_checked:
        if not as_json:
            console.say("[dim]A worker looks at every file …[/]")
        try:
            found = client.wait_dataset(found.name, version=found.version)
        except KeyboardInterrupt:
            console.say(f"[dim]It goes on: powergrad datasets show {escape(found.name)}[/]")
            raise Finish(Code.INTERRUPTED) from None
    _show(found, as_json=as_json)
    if found.state == "failed":
        raise Finish(Code.FAILED)


def _show(found: Dataset, *, as_json: bool) -> None:
    if as_json:
        console.print_json(found.model_dump(mode="json"))
        return
    out = console.stdout()
    table = _table(("", ""), header=False)
    for title, value in _facts(found):
        table.add_row(f"[dim]{title}[/]", value)
    out.print(table)
    if found.report is not None:
        _show_report(found.report)
    if len(found.versions) > 1:
        out.print(_versions(found.versions, found.current))
    if found.state == "ready":
        console.say(f"[dim]Train on it: data: {{dataset: {escape(found.name)}}}[/]")


def _facts(found: Dataset) -> Iterator[tuple[str, str]]:
    yield "data set", f"[bold]{escape(found.name)}[/]  {_state(found.state)}"
    if found.error is not None:
        yield "why", f"[red]{escape(str(found.error.get('detail', '')))}[/]"
    yield "version", escape(found.version or "not known yet")
    yield "source", escape(found.source + (f": {found.path}" if found.path else ""))
    yield "images", f"{_images(found.splits)}  {console.size(found.bytes)}"
    if found.report is not None and found.report.get("sides"):
        sides = found.report["sides"]
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in found.report.get("formats", {}).items())
        yield "pixels", f"shorter side {sides['min']:,} to {sides['max']:,}, median {sides['median']:,}; {escape(kinds)}"


def _show_report(report: dict[str, Any]) -> None:
    counts: dict[str, dict[str, int]] = report.get("class_counts") or {}
    splits = list(report.get("splits") or {})
    if counts:
        table = _table(("class", *splits))
        for label in list(counts)[:SHOWN_CLASSES]:
            table.add_row(escape(label), *(f"{counts[label].get(split, 0):,}" for split in splits))
        console.stdout().print(table)
        if (more := report.get("classes", 0) - SHOWN_CLASSES) > 0:
            console.say(f"[dim]… and {more:,} more classes: --json shows 2,000[/]")
    for title in ("unreadable", "skipped", "odd"):
        files = report.get(title) or {}
        if files.get("count"):
            console.say(f"[yellow]{files['count']:,} {title}[/]")
            for one in files["first"][:SHOWN_FILES]:
                console.say(f"  {escape(one['name'])}: [dim]{escape(one['why'])}[/]")
    for warning in report.get("warnings") or []:
        console.say(f"[yellow]Note:[/] {escape(warning)}")


def _versions(versions: list[DatasetVersion], current: str | None) -> Table:
    table = _table(("version", "state", "images", "size", "added"))
    for one in versions:
        mark = " [green]current[/]" if one.version is not None and one.version == current else ""
        table.add_row(
            escape(one.version or "–") + mark, _state(one.state), _images(one.splits), console.size(one.bytes), console.ago(one.created_at)
        )
    return table


def _state(state: str) -> str:
    return f"[{STATE_STYLES.get(state, 'default')}]{escape(state)}[/]"


def _images(splits: dict[str, int] | None) -> str:
    return "–" if not splits else ", ".join(f"{count:,} {split}" for split, count in splits.items())


def _table(titles: tuple[str, ...], *, header: bool = True) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), show_header=header)
    for title in titles:
        table.add_column(title, overflow="fold")
    return table


@contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console.stderr(), disable=not sys.stderr.isatty(), auto_refresh=True) as progress:
        task = progress.add_task(title, total=None)

        def show_progress(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, description="unpacking" if done == total else title)

        yield show_progress
