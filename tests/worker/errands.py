"""What the children of tests' tasks do."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from powergrad.data import DataUnreadable

Arguments = Mapping[str, Any]


def look_around(arguments: Arguments, root: Path) -> dict[str, Any]:
    """Where the child finds itself."""
    return {
        "arguments": dict(arguments),
        "root": str(root),
        "nice": os.nice(0),
        "own_group": os.getpgid(0) == os.getpid(),
        "gpus": os.environ["CUDA_VISIBLE_DEVICES"],
        "pid": os.getpid(),
    }


def refuse(arguments: Arguments, root: Path) -> dict[str, Any]:
    raise DataUnreadable("the image: is none")


def blunder(arguments: Arguments, root: Path) -> dict[str, Any]:
    raise RuntimeError("a defect")


def die(arguments: Arguments, root: Path) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def devour(arguments: Arguments, root: Path) -> dict[str, Any]:
    return {"bytes": len(bytearray(1 << 40))}


def spin(arguments: Arguments, root: Path) -> dict[str, Any]:
    while True:
        pass


def hang(arguments: Arguments, root: Path) -> dict[str, Any]:
    """Waits for ever, with a child of its own that would outlive it."""
    if os.fork() == 0:
        signal.pause()
    (root / "tasks" / "hanging").write_text(str(os.getpgid(0)))
    time.sleep(1e6)
    return {}


def babble(arguments: Arguments, root: Path) -> dict[str, Any]:
    return {"text": "x" * (1 << 23)}


def linger(arguments: Arguments, root: Path) -> dict[str, Any]:
    """Works until it is told to stop, by a file; every start is noted."""
    with (root / "tasks" / f"{arguments['name']}-starts").open("a") as file:
        file.write(f"{os.getpid()}\n")
    while not (root / "tasks" / f"{arguments['name']}-stop").exists():
        time.sleep(0.02)
    return {"by": os.getpid()}
