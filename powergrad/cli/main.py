"""The `powergrad` command. Every sub-command is a function in a module named after what it is about."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from powergrad import __version__
from powergrad.cli import compare, console, datasets, demo, doctor, experiments, export, jobs, keys, results, server, train, up, webhooks
from powergrad.cli.console import EXIT_CODES, Code, Finish, Problem

CLICK_USAGE = 2

app = typer.Typer(
    name="powergrad",
    help="Train image classifiers with PowerGrad Transform: as a service (up, submit, watch, pull) or in this process (train).",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False) -> None:
    del version


for panel, commands in {
    "Server": (up.up, demo.demo, doctor.doctor, keys.quota, server.workers, server.models, server.presets),
    "Jobs": (jobs.init, jobs.submit, jobs.jobs, jobs.show, jobs.watch, jobs.cancel, jobs.pause, jobs.resume, jobs.retry, jobs.delete),
    "Results": (
        results.logs,
        results.metrics,
        compare.compare,
        results.artifacts,
        results.pull,
        results.pin,
        results.unpin,
        results.predict,
    ),
    "Without a server": (train.train, export.export),
}.items():
    for command in commands:
        app.command(rich_help_panel=panel, epilog=EXIT_CODES)(command)
app.add_typer(keys.app, name="keys", rich_help_panel="Server")
app.add_typer(datasets.app, name="datasets", rich_help_panel="Jobs")
app.add_typer(experiments.app, name="experiment", rich_help_panel="Jobs")
app.add_typer(webhooks.app, name="webhooks", rich_help_panel="Server")


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; the exit code, which the console script hands to the shell."""
    console.mend_streams()
    code = _run(arguments)
    try:
        sys.stdout.flush()
    except OSError as error:
        console.drop_output()
        return _told(error) if code == Code.OK else code
    return code


def _run(arguments: list[str] | None) -> int:
    try:
        app(args=arguments, prog_name="powergrad", standalone_mode=True)
    except SystemExit as end:
        return _ended(end)
    except Finish as end:
        return end.code
    except Problem as problem:
        console.show_problem(problem)
        return problem.code
    except KeyboardInterrupt:
        return _interrupted()
    except Exception as error:  # noqa: BLE001 - what the client did not raise goes on as it is
        return _told(error)
    return Code.OK


def _ended(end: SystemExit) -> int:
    """The exit code for an end that typer or rich has made of something else."""
    if isinstance(end.__context__, BrokenPipeError):
        return Code.OK
    if end.code == Code.INTERRUPTED:
        return _interrupted()
    return Code.USAGE if end.code == CLICK_USAGE else int(end.code or 0)


def _interrupted() -> int:
    console.say("Interrupted.")
    return Code.INTERRUPTED


def _told(error: Exception) -> int:
    """The exit code for what the client or the system raised, once it has been said in words; anything else goes on as it is."""
    from powergrad.client import ApiError, ClientError, Unreachable

    match error:
        case ApiError():
            console.say(console.describe(error))
            return Code.REFUSED
        case Unreachable():
            cause = "refused" if error.refused else str(error).partition(": ")[2] or "no answer"
            console.show_problem(console.silence(error.url, cause))
            return Code.UNREACHABLE
        case ClientError() | TimeoutError():
            console.show_problem(Problem(str(error)))
            return Code.FAILED
        case BrokenPipeError():  # `powergrad jobs | head`: the reader has had enough
            return Code.OK
        case OSError(strerror=str(why)):
            console.show_problem(Problem(f"{error.filename or 'Output'}: {why}"))
            return Code.FAILED
        case _:
            raise error


if __name__ == "__main__":
    sys.exit(main())
