"""`powergrad experiment`: ask whether a setting helps, watch the runs that answer, read the verdict."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
import yaml
from rich.markup import escape

from powergrad.cli import arms, completion, console, questions, specfile
from powergrad.cli.console import EXIT_CODES, Code, Finish, JsonOption, Problem, UrlOption

if TYPE_CHECKING:
    from powergrad.client import Client, Experiment, ExperimentView

SEARCHED = 1000
KINDS = ("html", "md", "json", "svg", "png", "csv")

app = typer.Typer(
    help="Ask a question that many runs answer: submit or ask, watch, show, report.",
    no_args_is_help=True,
    epilog=EXIT_CODES,
)

ExperimentArgument = Annotated[
    str,
    typer.Argument(metavar="EXPERIMENT", help="An id, an unambiguous part of one, or `last`.", autocompletion=completion.experiment_ids),
]
ExperimentsArgument = Annotated[
    list[str],
    typer.Argument(metavar="EXPERIMENT...", help="Ids, unambiguous parts of ids, or `last`.", autocompletion=completion.experiment_ids),
]
SeedsOption = Annotated[int | None, typer.Option("--seeds", min=1, help="Runs of each arm.")]
WaitOption = Annotated[bool, typer.Option("--wait", help="Watch it until the verdict is in; the exit code says how it ended.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Check the question, print it and what it costs; store nothing.")]


@app.command(epilog=EXIT_CODES)
def submit(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A question in YAML or JSON; - reads standard input.")],
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Change a field: spec.epochs=3, grid.loss.alpha=[1,0.5]. Repeatable.",
            autocompletion=completion.question_settings,
        ),
    ] = None,
    seeds: SeedsOption = None,
    wait: WaitOption = False,
    dry_run: DryRunOption = False,
    idempotency_key: Annotated[
        str | None, typer.Option("--idempotency-key", help="The same key and question give the same experiment again.")
    ] = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
) -> None:
    """Ask the question in a file."""
    question = questions.changed(specfile.read(file, kind="an experiment"), changes or [])
    if seeds is not None:
        question["seeds"] = seeds
    with console.connect(url) as client:
        if dry_run:
            plan = client.plan(question)
            _say_cost(plan)
            console.print_json(plan)
            return
        _begin(client, question, idempotency_key, wait=wait, as_json=as_json)


@app.command(epilog=EXIT_CODES)
def ask(
    spec: Annotated[str, typer.Argument(metavar="SPEC", help="A job spec in YAML or JSON, the base of every run; - reads standard input.")],
    vary: Annotated[
        list[str],
        typer.Option(
            "--vary",
            metavar="NAME=A,B,…",
            help="What is in question: loss.alpha=1,0.5,0.25. Of several every combination.",
            autocompletion=completion.settings,
        ),
    ],
    tune: Annotated[
        list[str] | None,
        typer.Option(
            "--tune",
            metavar="NAME=A,B,…",
            help="Give each arm its own best of these: optimizer.lr=0.05,0.1. Repeatable.",
            autocompletion=completion.settings,
        ),
    ] = None,
    seeds: SeedsOption = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            "--baseline",
            metavar="NAME=VALUE",
            help="The arm to compare with; default loss.alpha=1, else the first. Repeatable.",
            autocompletion=completion.settings,
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            "--metric", help="What is compared, after the last epoch.", show_default="val_top1", autocompletion=completion.metric_names
        ),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Change a field of the job spec: epochs=3. Repeatable.", autocompletion=completion.settings
        ),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="To know it by.")] = None,
    wait: WaitOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the question and print it, ready for a file; what it costs on standard error.")
    ] = False,
    as_json: JsonOption = False,
    url: UrlOption = None,
) -> None:
    """Ask whether a setting helps, starting from a job spec."""
    question: questions.Question = {
        "spec": specfile.changed(specfile.read(spec), changes or []),
        "grid": questions.lists(vary, option="--vary"),
        "tune": questions.lists(tune or [], option="--tune"),
        "seeds": seeds,
        "baseline": questions.values(baseline or [], option="--baseline"),
        "metric": metric,
        "name": name,
    }
    question = {key: value for key, value in question.items() if value not in (None, {})}
    with console.connect(url) as client:
        if dry_run:
            _say_cost(client.plan(question))
            _print_question(question, as_json=as_json)
            return
        _begin(client, question, None, wait=wait, as_json=as_json)


def _print_question(question: questions.Question, *, as_json: bool) -> None:
    if as_json:
        console.print_json(question)
    else:
        sys.stdout.write(yaml.safe_dump(question, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120))


def _say_cost(plan: dict[str, Any]) -> None:
    for line in arms.cost(plan):
        console.say(f"[dim]{escape(line)}[/]")


def _begin(client: Client, question: questions.Question, idempotency_key: str | None, *, wait: bool, as_json: bool) -> None:
    experiment = client.ask(question, idempotency_key=idempotency_key)
    if wait:
        console.say(f"Asked: [bold]{experiment.id}[/]")
        _watch(client, experiment.id, as_json=as_json)
    elif as_json:
        _print_view(experiment.view)
    else:
        typer.echo(experiment.id)
        console.say(f"[dim]{experiment.view.progress.runs} runs. Watch them: powergrad experiment watch {experiment.id}[/]")


@app.command("list", epilog=EXIT_CODES)
def list_(
    state: Annotated[
        list[str] | None, typer.Option("--state", help="Only experiments in this state. Repeatable.", autocompletion=completion.states)
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="How many at most.")] = 20,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Ids only, one a line.")] = False,
    as_json: JsonOption = False,
    url: UrlOption = None,
) -> None:
    """List experiments, newest first."""
    with console.connect(url) as client:
        found = [one.view for one in itertools.islice(client.experiments(state=state or (), page_size=min(limit, 100)), limit)]
    if as_json:
        console.print_json([view.model_dump(mode="json") for view in found])
    elif quiet:
        console.lines(view.id for view in found)
    elif found:
        out = console.stdout()
        out.print(arms.list_table(found, width=out.width))
    else:
        console.say(
            "No experiment fits." if state else "No experiment yet. Begin with: powergrad experiment ask job.yaml --vary loss.alpha=1,0.5"
        )


@app.command(epilog=EXIT_CODES)
def show(experiment: ExperimentArgument, as_json: JsonOption = False, url: UrlOption = None) -> None:
    """Show the verdict, what to know before it is believed, and the arms."""
    with console.connect(url) as client:
        view = client.experiment(find(client, experiment)).view
    if as_json:
        _print_view(view)
    else:
        arms.print_found(view)
        if view.files:
            console.say(f"\n[dim]The whole report: powergrad experiment report {view.id}[/]")


@app.command(epilog=EXIT_CODES)
def watch(experiment: ExperimentArgument, as_json: JsonOption = False, url: UrlOption = None) -> None:
    """Watch an experiment until its verdict is in. Exit code: 0 succeeded, 1 failed, 2 cancelled."""
    with console.connect(url) as client:
        _watch(client, find(client, experiment), as_json=as_json)


def _watch(client: Client, experiment_id: str, *, as_json: bool) -> None:
    try:
        view = arms.watch(client.base_url, experiment_id, json_lines=as_json)
    except KeyboardInterrupt:
        console.say(f"[dim]Not watching any more; the server goes on. Again: powergrad experiment watch {experiment_id}[/]")
        raise Finish(Code.INTERRUPTED) from None
    if not as_json:
        arms.print_found(view)
    raise Finish({"succeeded": Code.OK, "cancelled": Code.CANCELLED}.get(view.state, Code.FAILED))


@app.command(epilog=EXIT_CODES)
def seeds(
    experiment: ExperimentArgument,
    count: Annotated[int, typer.Argument(metavar="COUNT", min=1, help="Further runs of every arm.")],
    wait: WaitOption = False,
    as_json: JsonOption = False,
    url: UrlOption = None,
) -> None:
    """Run every arm on further seeds; arms keep what tuning chose for them."""
    with console.connect(url) as client:
        changed = client.experiment(find(client, experiment)).add_seeds(count)
        if wait:
            _watch(client, changed.id, as_json=as_json)
        _told(changed.view, as_json=as_json)


@app.command(epilog=EXIT_CODES)
def clone(
    experiment: ExperimentArgument,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Change the question: spec.epochs=3, grid.loss.alpha=[1,0.3]. Repeatable.",
            autocompletion=completion.question_settings,
        ),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the new one.")] = None,
    wait: WaitOption = False,
    as_json: JsonOption = False,
    url: UrlOption = None,
) -> None:
    """Ask a question again, with changes."""
    wanted = questions.parsed(changes or [])
    with console.connect(url) as client:
        made = client.experiment(find(client, experiment)).clone(wanted, name=name)
        if wait:
            console.say(f"Asked: [bold]{made.id}[/]")
            _watch(client, made.id, as_json=as_json)
        _told(made.view, as_json=as_json)


def _told(view: ExperimentView, *, as_json: bool) -> None:
    if as_json:
        _print_view(view)
    else:
        console.stdout().print(f"{view.id}  {console.state(view.state)}  {view.progress.runs} runs")


@app.command(epilog=EXIT_CODES)
def cancel(experiments: ExperimentsArgument, as_json: JsonOption = False, url: UrlOption = None) -> None:
    """Cancel experiments: their running jobs end within seconds and keep their checkpoints."""
    _act(experiments, lambda one: one.cancel(), as_json=as_json, url=url)


@app.command(epilog=EXIT_CODES)
def pause(experiments: ExperimentsArgument, as_json: JsonOption = False, url: UrlOption = None) -> None:
    """Pause experiments: their running jobs write a checkpoint first."""
    _act(experiments, lambda one: one.pause(), as_json=as_json, url=url)


@app.command(epilog=EXIT_CODES)
def resume(experiments: ExperimentsArgument, as_json: JsonOption = False, url: UrlOption = None) -> None:
    """Queue the paused jobs of experiments again."""
    _act(experiments, lambda one: one.resume(), as_json=as_json, url=url)


@app.command(epilog=EXIT_CODES)
def delete(experiments: ExperimentsArgument, as_json: JsonOption = False, url: UrlOption = None) -> None:
    """Delete experiments that have ended, with their jobs and files."""
    _act(experiments, _deleted, as_json=as_json, url=url)


def _deleted(experiment: Experiment) -> Experiment:
    experiment.delete()
    return experiment


def _act(wanted: list[str], action: Callable[[Experiment], Experiment], *, as_json: bool, url: str | None) -> None:
    """Do it to each; a refusal is told and the others still get their turn."""
    from powergrad.client import ApiError

    done: list[ExperimentView] = []
    refused = False
    with console.connect(url) as client:
        for name in wanted:
            try:
                view = action(client.experiment(find(client, name))).view
            except (ApiError, Problem) as error:
                refused = True
                said = console.describe(error) if isinstance(error, ApiError) else f"[red]{escape(str(error))}[/]"
                console.say(f"{escape(name)}: {said}")
                continue
            done.append(view)
            if not as_json:
                gone = action is _deleted
                console.stdout().print(f"{view.id}  {'deleted' if gone else console.state(view.state)}")
    if as_json:
        console.print_json([view.model_dump(mode="json") for view in done])
    if refused:
        raise Finish(Code.REFUSED)


@app.command(epilog=EXIT_CODES)
def report(
    experiment: ExperimentArgument,
    kind: Annotated[
        str | None, typer.Option("--format", help=f"One of {', '.join(KINDS)}; default by the file's name, else html.", show_default=False)
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="FILE", parser=console.path_text, help="Where to put it; a folder, or - for standard output."
        ),
    ] = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
) -> None:
    """Fetch the report, a figure, or a table of all runs."""
    from powergrad.client import calls
    from powergrad.client.experiments import FILES

    chosen = cast('Literal["html", "md", "json", "svg", "png", "csv"]', _kind(kind, output))
    with console.connect(url) as client:
        found = client.experiment(find(client, experiment))
        if output == "-":
            sys.stdout.buffer.write(client.send(calls.experiment_file(found.id, FILES[chosen])).content)
            sys.stdout.buffer.flush()
            return
        try:
            path = found.report(chosen, output)
        except OSError as error:
            raise Problem(f"{error.filename or output}: cannot be written ({error.strerror})") from error
    if as_json:
        console.print_json({"experiment": found.id, "format": chosen, "path": str(path), "bytes": path.stat().st_size})
    else:
        typer.echo(str(path))


def _kind(kind: str | None, output: str | None) -> str:
    """What --format says, else what the file's name ends in."""
    suffix = Path(output or "").suffix.removeprefix(".").lower()
    chosen = kind or (suffix if suffix in KINDS else "html")
    if chosen not in KINDS:
        raise Problem(f"--format {chosen}: must be one of {', '.join(KINDS)}", code=Code.USAGE)
    return chosen


def _print_view(view: ExperimentView) -> None:
    console.print_json(view.model_dump(mode="json"))


def find(client: Client, wanted: str) -> str:
    """The id that `wanted` means: an id, `last`, or a part of one that fits no other among the newest SEARCHED experiments."""
    if re.fullmatch(r"exp_[0-9A-Za-z]{26}", wanted):
        return wanted
    newest = (one.id for one in itertools.islice(client.experiments(page_size=1 if wanted == "last" else 100), SEARCHED))
    if wanted == "last":
        if (found := next(newest, None)) is None:
            raise Problem(
                "There is no experiment yet.", advice="powergrad experiment ask job.yaml --vary loss.alpha=1,0.5", code=Code.REFUSED
            )
        return found
    part = wanted.removeprefix("exp_").upper()
    begins = wanted.startswith("exp_")
    fitting = [one for one in newest if (one[4:].startswith(part) if begins else part in one[4:])]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        advice = "The ids: powergrad experiment list -q -n 1000"
        near = console.nearest(wanted, {one.id: one.name for one in client.experiment_page(limit=100).data}, kind="experiment")
        raise Problem(f"{wanted}: none of the newest {SEARCHED:,} experiments has such an id.{near}", advice=advice, code=Code.REFUSED)
    more = ", …" if len(fitting) > 5 else ""
    told = f"{wanted}: {len(fitting)} experiments fit: {', '.join(fitting[:5])}{more}"
    raise Problem(told, advice="Give more of the id.", code=Code.REFUSED)
