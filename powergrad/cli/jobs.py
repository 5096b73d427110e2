"""Commands about jobs: write a spec, submit it, list, show, watch, the four verbs, and delete."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from powergrad.cli import completion, console
from powergrad.cli.console import Code, Finish, JobArgument, JobsArgument, JsonOption, Problem, UrlOption

if TYPE_CHECKING:
    from powergrad.client import Client, Deletion, Job

EXAMPLE = """\
# A job for PowerGrad. Only data.dataset is required; what is commented out shows the default.
# Check it:  powergrad submit job.yaml --dry-run      Run it:  powergrad submit job.yaml --wait
name: my-first-job

data:
  dataset: digits          # digits and glyphs need no files; also cifar10, mnist, class_folder, imagenet, webdataset, …
  image_size: 16           # pixels; default: the data set's own
  batch_size: 64
  # augment: standard      # none, standard, imagenet, or its parts; default: the data set's own
  # val_fraction: 0.2      # held out where the data set brings no validation split

model:
  name: resnet18           # all of them: powergrad models
  # norm: null             # batch, group, or none (a network without normalisation layers); null: the network's own
  # pretrained: false      # start from the library's published weights
  # init_from: null        # start from an earlier job's: job_…/best

loss:
  alpha: 0.25              # PowerGrad Transform's exponent in [0, 1]; 1 is ordinary cross-entropy
  # label_smoothing: 0.0
  # class_weights: null    # balanced, or a list

optimizer:
  # name: sgd              # sgd, adamw, lion or muon
  lr: 0.02
  # momentum: 0.9
  # nesterov: true
  # weight_decay: 5e-4

schedule:
  # name: cosine           # cosine, linear, step, constant or onecycle
  warmup_epochs: 1         # default: min(5, epochs // 10)

# clip:                    # default: no clipping
#   mode: agc              # norm, value or agc
#   value: 0.01

epochs: 5
# precision: auto          # auto, fp32, bf16 or fp16
# accumulate: 1            # parts in which a batch is computed, to save memory
# ema: null                # {decay: 0.9999} keeps and scores an average of the weights
# early_stopping: null     # {metric: val_top1, patience_epochs: 10}
# on_divergence: stop      # or rollback: back to the last checkpoint, at half the rate
# telemetry: null          # {every_steps: 100} adds gradient and weight statistics, and pictures
# export: []               # bundle, onnx, torch_export
# seed: 0
# deterministic: true      # same spec, same machine type and software: same bits

# checkpoint:
#   every_epochs: 1
#   keep_last: 2
#   keep_best: 1

# limits:
#   max_seconds: null      # training time over all attempts
#   max_attempts: 3
#   stall_seconds: 600

# resources:
#   gpus: null             # how many share each batch, or 0.25, 0.5, 0.75 of one; null: 1 where there is one
#   cpu_threads: null      # part of the exact result; null: all cores of the slot

# retention:
#   ttl_seconds: null      # so long after its end the job goes, files and all; null: the server's own rule

# webhook: null            # {url: "https://example.com/hook"} is called when the job has ended

# outputs:
#   tensorboard: false     # metrics as a TensorBoard event file, among the artifacts
#   mlflow: false          # a copy of the run on the operator's MLflow server

# priority: 5              # 9 starts first, 0 last
# labels:
#   team: vision
"""


def init(
    path: Annotated[str, typer.Argument(help="File to write; - prints it.")] = "job.yaml",
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Write a commented example spec."""
    if path == "-":
        typer.echo(EXAMPLE, nl=False)
        return
    try:
        with Path(path).open("w" if force else "x", encoding="utf-8") as file:
            file.write(EXAMPLE)
    except FileExistsError as error:
        raise Problem(f"{path}: is there already.", advice="Another name: powergrad init NAME · or overwrite it: --force") from error
    except OSError as error:
        raise Problem(f"{path}: cannot be written ({error.strerror})") from error
    console.say(f"Wrote [bold]{escape(path)}[/]. Run it: powergrad submit {escape(path)} --wait")


def submit(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A job spec in YAML or JSON; - reads standard input.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Change a field: loss.alpha=0.3. Repeatable.", autocompletion=completion.settings),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Watch the job until it ends; the exit code says how.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the spec and print it with every default; store nothing.")] = False,
    idempotency_key: Annotated[str | None, typer.Option("--idempotency-key", help="The same key and spec give the same job again.")] = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
) -> None:
    """Queue a job."""
    from powergrad.cli import specfile

    spec = specfile.changed(specfile.read(file), settings or [])
    with console.connect(url) as client:
        if dry_run:
            console.print_json(client.dry_run(spec))
            return
        job = client.submit(spec, idempotency_key=idempotency_key)
        if wait:
            console.say(f"Queued [bold]{job.id}[/]")
            _watch(client, [job.id], as_json=as_json)
        elif as_json:
            console.print_json(console.as_json(job))
        else:
            typer.echo(job.id)
            console.say(f"[dim]Queued. Watch it: powergrad watch {job.id}[/]")


def jobs(
    state: Annotated[
        list[str] | None, typer.Option("--state", help="Only jobs in this state. Repeatable.", autocompletion=completion.states)
    ] = None,
    label: Annotated[list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="Only jobs with this label. Repeatable.")] = None,
    search: Annotated[str | None, typer.Option("--search", metavar="TEXT", help="Only jobs whose name fits.")] = None,
    sort: Annotated[
        str | None,
        typer.Option("--sort", metavar="FIELD", help="Such as -metrics.val_top1: the best first.", autocompletion=completion.sort_keys),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="How many at most.")] = 20,
    everything: Annotated[bool, typer.Option("--all", help="All of them, whatever --limit says.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Ids only, one a line.")] = False,
    as_json: JsonOption = False,
    url: UrlOption = None,
) -> None:
    """List jobs, newest first."""
    labels = dict(_pair(text) for text in label or [])
    found: list[Job] = []
    with console.connect(url) as client:
        source = client.list(state=state or (), labels=labels, q=search, sort=sort, page_size=100 if everything else min(limit, 100))
        for job in source:
            found.append(job)
            if len(found) == limit and not everything:
                break
    if as_json:
        console.print_json([console.as_json(job) for job in found])
    elif quiet:
        console.lines(job.id for job in found)
    elif found:
        out = console.stdout()
        out.print(_table(found, width=out.width))
    else:
        console.say("No job fits." if state or labels or search else "No job yet. Begin with: powergrad init, powergrad submit job.yaml")


def show(job: JobArgument, as_json: JsonOption = False, url: UrlOption = None) -> None:
    """Show one job: state, progress, scores, attempts, and why it failed if it did."""
    with console.connect(url) as client:
        found = client.get(console.find(client, job))
    if as_json:
        console.print_json(console.as_json(found))
    else:
        _show(found)


def watch(
    job_ids: JobsArgument,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            "-m",
            help="Plot this one. Repeatable.",
            show_default="val_top1 and train_loss",
            autocompletion=completion.metric_names,
        ),
    ] = None,
    plot: Annotated[bool, typer.Option("--plot/--no-plot", help="Draw curves below the table; on a terminal only.")] = True,
    as_json: JsonOption = False,
    url: UrlOption = None,
) -> None:
    """Watch jobs until all have ended. Exit code: 0 succeeded, 1 one failed, 2 one was cancelled."""
    from powergrad.cli.watch import PLOTTED

    metrics = tuple(metric or PLOTTED) if plot else ()
    with console.connect(url) as client:
        _watch(client, [console.find(client, wanted) for wanted in job_ids], as_json=as_json, metrics=metrics)


def cancel(job_ids: JobsArgument, as_json: JsonOption = False, url: UrlOption = None) -> None:
    """Cancel jobs: a running one ends within seconds and keeps its checkpoints."""
    _act(job_ids, lambda client, job_id: client.cancel(job_id), as_json=as_json, url=url)


def pause(job_ids: JobsArgument, as_json: JsonOption = False, url: UrlOption = None) -> None:
    """Pause jobs: a running one writes a checkpoint first."""
    _act(job_ids, lambda client, job_id: client.pause(job_id), as_json=as_json, url=url)


def resume(job_ids: JobsArgument, as_json: JsonOption = False, url: UrlOption = None) -> None:
    """Queue paused jobs again; they go on from their checkpoint."""
    _act(job_ids, lambda client, job_id: client.resume(job_id), as_json=as_json, url=url)


def retry(job_ids: JobsArgument, as_json: JsonOption = False, url: UrlOption = None) -> None:
    """Let failed jobs go on from their last checkpoint."""
    _act(job_ids, lambda client, job_id: client.retry(job_id), as_json=as_json, url=url)


def delete(
    job_ids: Annotated[
        list[str] | None, typer.Argument(metavar="[JOB...]", help="Ids, unambiguous parts of ids, or `last`; or give options.")
    ] = None,
    state: Annotated[
        list[str] | None,
        typer.Option("--state", help="Jobs that ended so: succeeded, failed, cancelled. Repeatable.", autocompletion=completion.states),
    ] = None,
    label: Annotated[list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="Jobs with this label. Repeatable.")] = None,
    older_than: Annotated[str | None, typer.Option("--older-than", metavar="30d", help="Jobs submitted so long ago: 12h, 30d, 8w.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Delete nothing: only say what would go.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
    url: UrlOption = None,
) -> None:
    """Delete jobs that have ended, with their files: those named, or all that fit the options."""
    filters = _deletion_filters(state, label, older_than)
    if bool(job_ids) == bool(filters):
        raise Problem("Name jobs, or give --state, --label or --older-than: one of the two.", code=Code.USAGE)
    with console.connect(url) as client:
        deleted, refused = _delete_named(client, job_ids, dry_run=dry_run) if job_ids else (None, False)
        if deleted is None:
            deleted = _delete_fitting(client, filters, dry_run=dry_run, yes=yes)
    if as_json:
        console.print_json({**deleted.model_dump(include={"deleted", "bytes"}), "dry_run": dry_run})
    else:
        console.lines(deleted.deleted)
        console.say(f"{'Would delete' if dry_run else 'Deleted'} {_so_many(deleted)}." if deleted.deleted or job_ids else "No job fits.")
    if refused:
        raise Finish(Code.REFUSED)


def _delete_named(client: Client, job_ids: list[str], *, dry_run: bool) -> tuple[Deletion, bool]:
    """What went, and whether anything was refused; the others still get their turn."""
    from powergrad.client import ApiError, Deletion

    gone: dict[str, int] = {}
    refused = False
    for wanted in job_ids:
        try:
            job = client.get(console.find(client, wanted))
            if not dry_run:
                client.delete(job.id)
        except ApiError as error:
            refused = True
            console.say(f"{escape(wanted)}: {console.describe(error)}")
        except Problem as problem:
            refused = True
            console.say(f"[red]{escape(str(problem))}[/]")
        else:
            gone[job.id] = job.bytes
    return Deletion(deleted=list(gone), bytes=sum(gone.values())), refused


def _delete_fitting(client: Client, filters: dict[str, Any], *, dry_run: bool, yes: bool) -> Deletion:
    from powergrad.client import Deletion

    found = client.delete_many(**filters, dry_run=True)
    if dry_run or not found.deleted:
        return found
    if not yes:
        _ask_whether(f"Delete {_so_many(found)} for good?")
    gone = Deletion(deleted=[], bytes=0, has_more=True)
    while gone.has_more:
        more = client.delete_many(**filters)
        gone = Deletion(deleted=gone.deleted + more.deleted, bytes=gone.bytes + more.bytes, has_more=more.has_more and bool(more.deleted))
    return gone


def _deletion_filters(state: list[str] | None, label: list[str] | None, older_than: str | None) -> dict[str, Any]:
    filters: dict[str, Any] = {}
    if state:
        filters["state"] = state
    if label:
        filters["labels"] = dict(_pair(text) for text in label)
    if older_than is not None:
        filters["created_before"] = datetime.now(UTC) - timedelta(seconds=console.seconds(older_than, option="--older-than"))
    return filters


def _ask_whether(question: str) -> None:
    if not sys.stdin.isatty():
        raise Problem(question, advice="Nobody is there to ask: say --yes, or look first with --dry-run.", code=Code.USAGE)
    if not typer.confirm(question, err=True):
        raise Finish(Code.INTERRUPTED)


def _so_many(found: Deletion) -> str:
    count = len(found.deleted)
    return f"{count} job{'' if count == 1 else 's'}{' and more' if found.has_more else ''} ({console.size(found.bytes)})"


def _act(job_ids: list[str], action: Callable[[Client, str], Job], *, as_json: bool, url: str | None) -> None:
    """Do it to each; a refusal is told and the others still get their turn."""
    from powergrad.client import ApiError

    done: list[Job] = []
    refused = False
    with console.connect(url) as client:
        for wanted in job_ids:
            try:
                job = action(client, console.find(client, wanted))
            except ApiError as error:
                refused = True
                console.say(f"{escape(wanted)}: {console.describe(error)}")
                continue
            except Problem as problem:
                refused = True
                console.say(f"[red]{escape(str(problem))}[/]")
                continue
            done.append(job)
            if not as_json:
                console.stdout().print(f"{job.id}  {console.state(job.state)}")
    if as_json:
        console.print_json([console.as_json(job) for job in done])
    if refused:
        raise Finish(Code.REFUSED)


def _watch(client: Client, job_ids: list[str], *, as_json: bool, metrics: tuple[str, ...] | None = None) -> None:
    from powergrad.cli import watch as watching

    try:
        ended = watching.watch(client.base_url, job_ids, json_lines=as_json, metrics=watching.PLOTTED if metrics is None else metrics)
    except KeyboardInterrupt:
        console.say(f"[dim]Not watching any more; the server goes on. Again: powergrad watch {' '.join(job_ids)}[/]")
        raise Finish(Code.INTERRUPTED) from None
    if not as_json:
        watching.epilogue(ended)
    raise Finish(watching.verdict(ended))


def _pair(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise Problem(f"--label {text}: must be KEY=VALUE, such as team=vision", code=Code.USAGE)
    return key, value


ROOMY = 110
"""Columns from which on a list has room for everything."""
CRAMPED = 90


def _table(found: list[Job], *, width: int) -> Table:
    """A row per job: ids and states whole whatever the width, names cut, the rest as there is room."""
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("job", no_wrap=True, width=max(len(job.id) for job in found))
    table.add_column("name", no_wrap=True, overflow="ellipsis")
    table.add_column("state", no_wrap=True, width=max(len(job.state) for job in found))
    shown = {
        "epoch": (_epochs, 0),
        "val top-1": (lambda job: console.percent(job.metrics.latest.get("val_top1")), ROOMY),
        "best": (lambda job: console.percent(job.metrics.best.get("val_top1")), 0),
        "created": (lambda job: console.ago(job.created_at), CRAMPED),
    }
    cells = {title: [cell(job) for job in found] for title, (cell, from_width) in shown.items() if width >= from_width}
    for title, values in cells.items():
        table.add_column(title, justify="right", no_wrap=True, width=max(map(len, (title, *values))))
    taken = sum(column.width or 0 for column in table.columns) + 2 * len(table.columns)
    table.columns[1].max_width = max(len("name"), width - taken)
    for place, job in enumerate(found):
        table.add_row(job.id, escape(job.name or "–"), console.state(job.state), *(values[place] for values in cells.values()))
    return table


def _epochs(job: Job) -> str:
    progress = job.progress
    return "–" if progress.epoch is None or not progress.epochs else f"{int(progress.epoch)}/{progress.epochs}"


def _show(job: Job) -> None:
    facts = Table.grid(padding=(0, 2))
    for key, value in _facts(job):
        facts.add_row(f"[dim]{key}[/]", value)
    target = console.stdout()
    target.print(Panel(facts, title=f"[bold]{escape(job.name or job.id)}[/]", title_align="left", expand=False, box=box.ROUNDED))
    if job.metrics.latest:
        target.print(_metrics_table(job))
    if job.attempts:
        target.print(_attempts_table(job))
    target.print(f"[dim]powergrad show {job.id} --json prints everything, the spec with it[/]", soft_wrap=True)


def _facts(job: Job) -> list[tuple[str, str]]:
    progress = job.progress
    facts = [("id", job.id), ("state", console.state(job.state))]
    if job.reason is not None:
        facts.append(("reason", escape(f"{job.reason.code}: {job.reason.detail}" if job.reason.detail else job.reason.code)))
        if job.reason.hint:
            facts.append(("try", escape(job.reason.hint)))
    if job.queue is not None and job.state == "queued":
        facts.append(("queue", escape(f"place {job.queue.position or '–'}, waits for {job.queue.waiting_for or 'a worker'}")))
    if job.queue is not None and job.state == "paused" and job.queue.waiting_for:
        facts.append(("waits for", escape(job.queue.waiting_for)))
    if progress.steps:
        done = f"step {progress.step or 0}/{progress.steps}, epoch {_epochs(job)}, {console.percent(progress.fraction)}"
        facts.append(("progress", done + (f", ETA {console.duration(progress.eta_s)}" if job.state == "running" else "")))
    if progress.ended_early:
        facts.append(("ended early", escape(progress.ended_early)))
    facts += [("trains", escape(_summary(job.spec)))]
    facts += [(name, f"{console.ago(moment)}") for name, moment in _moments(job) if moment is not None]
    if job.labels:
        facts.append(("labels", escape(", ".join(f"{key}={value}" for key, value in job.labels.items()))))
    if job.notes:
        facts.append(("notes", escape(job.notes)))
    return facts


def _moments(job: Job) -> list[tuple[str, Any]]:
    return [("created", job.created_at), ("started", job.started_at), ("finished", job.finished_at)]


def _summary(spec: dict[str, Any]) -> str:
    """`resnet18 on digits, alpha 0.25, sgd lr 0.05, 8 epochs`."""
    model, data = spec.get("model") or {}, spec.get("data") or {}
    loss, optimizer = spec.get("loss") or {}, spec.get("optimizer") or {}
    return (
        f"{model.get('name', 'resnet18')} on {data.get('dataset', '?')}, alpha {loss.get('alpha', 1.0):g}, "
        f"{optimizer.get('name', 'sgd')} lr {optimizer.get('lr', 0.1):g}, {_so_many_epochs(spec.get('epochs'))}"
    )


def _so_many_epochs(count: Any) -> str:
    return f"{count or '?'} epoch{'' if count == 1 else 's'}"


def _metrics_table(job: Job) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("metric", no_wrap=True)
    table.add_column("latest", justify="right")
    table.add_column("at the best checkpoint", justify="right")
    for name in sorted(job.metrics.latest.keys() | job.metrics.best.keys()):
        table.add_row(escape(name), console.number(job.metrics.latest.get(name)), console.number(job.metrics.best.get(name)))
    return table


def _attempts_table(job: Job) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for title in ("attempt", "worker", "device", "outcome", "resumed from", "took"):
        table.add_column(title, no_wrap=True)
    for attempt in job.attempts:
        took_s = (attempt.ended_at - attempt.started_at).total_seconds() if attempt.ended_at and attempt.started_at else None
        words = (attempt.worker, attempt.device, attempt.outcome, attempt.resumed_from)
        table.add_row(str(attempt.number), *(escape(word or "–") for word in words), console.duration(took_s))
    return table
