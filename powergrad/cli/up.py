"""`powergrad up`: the whole service on this machine, until Ctrl-C."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from powergrad.cli import console, stack
from powergrad.cli.console import Problem
from powergrad.cli.stack import DEFAULT_HOST, DEFAULT_PORT


def default_data_dir() -> Path:
    return Path(os.environ.get("POWERGRAD_DATA_DIR") or "~/.powergrad").expanduser()


def up(
    host: Annotated[
        str, typer.Option(help="Address to listen on; one that other machines reach needs a key: powergrad keys create.")
    ] = DEFAULT_HOST,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = DEFAULT_PORT,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where jobs, checkpoints and logs live.",
            parser=console.path,
            metavar="PATH",
            envvar="POWERGRAD_DATA_DIR",
            show_default="~/.powergrad",
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Worker processes.")] = 1,
    slots: Annotated[
        int | None, typer.Option(min=1, max=256, help="Jobs at a time per worker.", show_default="one per GPU, else 1")
    ] = None,
) -> None:
    """Run the server, a queue and workers on this machine until Ctrl-C."""
    place = (data_dir or default_data_dir()).expanduser().absolute()
    if not stack.is_loopback(host):
        _check_keys(host, place)
    settings = json.dumps({"data_dir": str(place), "host": host, "port": port, "workers": workers, "slots": slots})
    os.execv(sys.executable, stack.module("powergrad.cli.guard", settings))  # noqa: S606 - the same process, without this one's libraries


def _check_keys(host: str, data_dir: Path) -> None:
    """Raises Problem where others could reach the server and no key would keep them out; the server itself would end for it."""
    from powergrad.cli import keys

    if not keys.have_working(data_dir):
        raise Problem(
            f"--host {host}: other machines can reach this address, and there is no key that they would have to show.",
            advice=f"Make one: powergrad keys create --data-dir {data_dir}\nOr stay on loopback, and from another machine: "
            f"ssh -L {DEFAULT_PORT}:127.0.0.1:{DEFAULT_PORT} THIS_HOST",
        )
