"""`powergrad up`: the whole service on this machine, until Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.markup import escape
from rich.panel import Panel

from powergrad.cli import console
from powergrad.cli.console import Problem
from powergrad.cli.stack import DEFAULT_HOST, DEFAULT_PORT, Stack, StackError

TICK_S = 0.1
READY_S = 120.0  # a cold disk reads torch once, in the worker's template: seconds, rarely a minute


def default_data_dir() -> Path:
    return Path(os.environ.get("POWERGRAD_DATA_DIR") or "~/.powergrad").expanduser()


class StopSignals:
    """Counts Ctrl-C, SIGTERM and SIGHUP instead of dying of them: one stops in order, a second one kills."""

    def __init__(self) -> None:
        self.count = 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the signal module's signature
        self.count += 1

    def hurry(self) -> bool:
        return self.count > 1


def up(
    host: Annotated[str, typer.Option(help="Loopback address to listen on.")] = DEFAULT_HOST,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = DEFAULT_PORT,
    data_dir: Annotated[
        Path | None, typer.Option(help="Where jobs, checkpoints and logs live.", envvar="POWERGRAD_DATA_DIR", show_default="~/.powergrad")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Worker processes.")] = 1,
    slots: Annotated[
        int | None, typer.Option(min=1, max=256, help="Jobs at a time per worker.", show_default="one per GPU, else 1")
    ] = None,
) -> None:
    """Run the server, a queue and workers on this machine until Ctrl-C."""
    signals = StopSignals()
    title("powergrad: up")
    try:
        stack = Stack(data_dir or default_data_dir(), host, port, workers, slots, say=_tell)
        run(stack, signals)
    except StackError as error:
        raise Problem(str(error)) from error


def run(stack: Stack, signals: StopSignals) -> None:
    """Start, guard and stop the stack. Raises StackError where it does not come up."""
    began = time.monotonic()
    with console.stderr().status("Starting …", spinner="dots") if sys.stderr.isatty() else contextlib.nullcontext():
        stack.start()
        try:
            stack.ready(READY_S, give_up=lambda: signals.count > 0)
        except StackError:
            stack.stop(grace_s=5.0, hurry=signals.hurry)
            raise
    if signals.count == 0:
        _banner(stack, time.monotonic() - began)
    while signals.count == 0:
        stack.tend()
        time.sleep(TICK_S)
    console.say("Stopping: what runs writes a checkpoint and goes on at the next start. [dim](Ctrl-C again kills)[/]")
    stack.stop(hurry=signals.hurry)
    console.say("Stopped.")


def title(name: str) -> None:
    """What `ps` shows, where the server extra is installed."""
    with contextlib.suppress(ImportError):
        from setproctitle import setproctitle

        setproctitle(name)


def _tell(line: str) -> None:
    first, *rest = line.splitlines()
    console.say(f"[yellow]{time.strftime('%H:%M:%S')}[/] {escape(first)}")
    for text in rest:
        console.say(f"  [dim]{escape(text)}[/]")


def _banner(stack: Stack, took_s: float) -> None:
    elsewhere = f"\n[dim]This is not the usual address, so first:[/]  export POWERGRAD_URL={stack.url}"
    lines = (
        f"[bold green]PowerGrad is up[/]  [bold]{stack.url}[/]  [dim]({console.duration(took_s)})[/]\n\n"
        f"[dim]data[/]   {escape(str(stack.data_dir))}\n"
        f"[dim]logs[/]   {escape(str(stack.logs))}\n"
        f"[dim]docs[/]   {stack.url}/docs\n\n"
        f"[dim]In another terminal:[/]  powergrad init  [dim]then[/]  powergrad submit job.yaml --wait"
        f"{'' if stack.port == DEFAULT_PORT else elsewhere}\n"
        f"[dim]Ctrl-C stops it; running jobs go on at the next start.[/]"
    )
    target = console.stderr()
    if sys.stderr.isatty():
        target.print(Panel(lines, expand=False, padding=(1, 2)))
    else:
        target.print(lines, soft_wrap=True)
