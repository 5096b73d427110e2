"""The process that `powergrad up` becomes: starts the stack, guards it until Ctrl-C, stops it in order.

    python -P -m powergrad.cli.guard '{"data_dir": …, "host": …, "port": …, "workers": …, "slots": …}'

It lives as long as the service, so it loads no library: the command line, which does, execs into it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from powergrad.cli.stack import DEFAULT_PORT, Stack, StackError

TICK_S = 0.1
READY_S = 120.0  # a cold disk reads torch once, in the worker's template: seconds, rarely a minute
HASTY_S = 5.0
BOLD, DIM, RED, GREEN, YELLOW = "1", "2", "31", "32", "33"


class StopSignals:
    """Counts Ctrl-C, SIGTERM and SIGHUP instead of dying of them: one stops in order, a second one kills."""

    def __init__(self) -> None:
        self.count = 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.count += 1

    def hurry(self) -> bool:
        return self.count > 1


def main(settings: str) -> int:
    signals = StopSignals()
    title("powergrad: up")
    try:
        given = json.loads(settings)
        run(Stack(Path(given.pop("data_dir")), **given, say=tell), signals)
    except StackError as error:
        say(styled(str(error), RED))
        return 1
    return 0


def run(stack: Stack, signals: StopSignals) -> None:
    """Start, guard and stop the stack. Raises StackError where it does not come up."""
    began = time.monotonic()
    say(styled("Starting …", DIM))
    stack.start()
    try:
        stack.ready(READY_S, give_up=lambda: signals.count > 0)
    except StackError:
        stack.stop(grace_s=HASTY_S, hurry=signals.hurry)
        raise
    if signals.count == 0:
        say(banner(stack, time.monotonic() - began))
    while signals.count == 0:
        stack.tend()
        time.sleep(TICK_S)
    say("Stopping: what runs writes a checkpoint and goes on at the next start. " + styled("(Ctrl-C again kills)", DIM))
    stack.stop(hurry=signals.hurry)
    say("Stopped.")


def banner(stack: Stack, took_s: float) -> str:
    lines = [
        "",
        f"  {styled('PowerGrad is up', BOLD, GREEN)}  {styled(stack.url, BOLD)}  {styled(f'({took_s:.1f} s)', DIM)}",
        "",
        f"  {styled('data', DIM)}  {stack.data_dir}",
        f"  {styled('logs', DIM)}  {stack.logs}",
        f"  {styled('docs', DIM)}  {stack.url}/docs",
        "",
        f"  {styled('In another terminal:', DIM)}  powergrad init  {styled('then', DIM)}  powergrad submit job.yaml --wait",
        f"  {styled('Ctrl-C stops it; running jobs go on at the next start.', DIM)}",
        "",
    ]
    if stack.port != DEFAULT_PORT:
        lines.insert(-2, f"  {styled('This is not the usual address, so there, first:', DIM)}  export POWERGRAD_URL={stack.url}")
    return "\n".join(lines)


def tell(line: str) -> None:
    """What happened to a part, with the time; the lines of its log that come with it are indented."""
    first, *rest = line.splitlines()
    say("\n".join([f"{styled(time.strftime('%H:%M:%S'), YELLOW)} {first}", *(f"  {styled(text, DIM)}" for text in rest)]))


def say(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone (SIGHUP) while there is still something to stop
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def styled(text: str, *codes: str) -> str:
    return f"\x1b[{';'.join(codes)}m{text}\x1b[0m" if in_colour() else text


def in_colour() -> bool:
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def title(name: str) -> None:
    """What `ps` shows, where the server extra is installed."""
    with contextlib.suppress(ImportError):
        from setproctitle import setproctitle

        setproctitle(name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
