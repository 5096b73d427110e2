"""An experiment on a terminal: verdict, warnings, a row per arm; live while it runs, a line per change where the output goes elsewhere."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from powergrad.cli import console
from powergrad.cli.watch import drawn
from powergrad.experiments.labels import short
from powergrad.experiments.units import NOTHING, Unit, p_value, titled, unit

if TYPE_CHECKING:
    from powergrad.client import Arm, AsyncClient, Difference, ExperimentView

CONCLUSIONS = {"better": "green", "worse": "red", "open": "yellow", "identical": "dim", "too_few": "dim"}
WAITING = ("queued", "running", "pausing", "paused", "cancelling")
BAR = 24
WIDE_ENOUGH = 120
"""Columns from which on a list has room for verdicts."""


# --- what was found


def print_found(view: ExperimentView) -> None:
    """On standard output: the verdict first, then what to know before it is believed, then the numbers."""
    out = console.stdout()
    out.print(f"[bold]{escape(view.name or view.id)}[/]  [dim]{view.id}[/]  {console.state(view.state)}", soft_wrap=True)
    out.print()
    out.print(Text(verdict(view), style="bold" if view.verdict else ""))
    for warning in view.warnings:
        grid = Table.grid(padding=(0, 1))
        grid.add_row("[yellow]![/]", Text(warning))
        out.print(grid)
    out.print()
    out.print(arms_table(view))
    if any(arm.convergence is not None for arm in view.arms):
        out.print()
        out.print(speed_table(view))


def verdict(view: ExperimentView) -> str:
    """The verdict, or why there is none yet."""
    if view.verdict:
        return view.verdict
    if view.analysis.state == "failed":
        error = view.analysis.error or {}
        return f"No verdict: the analysis failed ({error.get('detail') or error.get('code') or 'unknown'})"
    if view.is_terminal:
        return "No verdict: no run succeeded" if view.state == "failed" else "No verdict"
    return "No verdict yet: it comes once runs have ended"


def arms_table(view: ExperimentView) -> Table:
    """A row per arm: how many runs, mean and interval, the paired difference to the baseline."""
    metric = metric_of(view)
    measured, is_search = unit(metric), view.baseline is None
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), title=titled(metric), title_justify="left", title_style="dim")
    table.add_column("trial" if is_search else "arm", overflow="fold", max_width=44)
    if is_tuned(view):
        table.add_column("tuned", overflow="fold", max_width=24)
    table.add_column("state" if is_search else "runs", justify="left" if is_search else "right", no_wrap=True)
    table.add_column("mean ± 95 %" if not is_search else "value", justify="right", no_wrap=True)
    if not is_search:
        table.add_column("difference (95 %)", justify="right", no_wrap=True)
        table.add_column("p (Holm)", justify="right", no_wrap=True)
    for arm in ordered(view):
        cells = [name_of(arm, view)]
        cells += [escape(settings(arm.tuned))] if is_tuned(view) else []
        cells += [trial_state(arm) if is_search else runs(arm), mean(arm, measured)]
        cells += [] if is_search else [difference(arm, view, measured), p_value(arm.difference.p_t_holm) if arm.difference else ""]
        table.add_row(*cells)
    return table


def speed_table(view: ExperimentView) -> Table:
    """What it took each arm to reach the baseline's final score."""
    table = Table(
        box=None,
        header_style="dim",
        padding=(0, 2, 0, 0),
        title="to reach the baseline's final score",
        title_justify="left",
        title_style="dim",
    )
    table.add_column("arm", overflow="fold", max_width=44)
    for title in ("seeds that did", "epochs", "seconds", "joules"):
        table.add_column(title, justify="right", no_wrap=True)
    for arm in ordered(view):
        if (speed := arm.convergence) is not None:
            table.add_row(
                name_of(arm, view),
                f"{speed.reached} of {speed.of}",
                *(NOTHING if one.mean is None else f"{one.mean:,.1f}" for one in (speed.epochs, speed.seconds, speed.joules)),
            )
    return table


def ordered(view: ExperimentView) -> list[Arm]:
    """As they were asked for; of a search the best first."""
    if view.baseline is not None:
        return view.arms
    lower = metric_of(view).endswith(("loss", "ece"))
    return sorted(view.arms, key=lambda arm: (arm.mean is None, (arm.mean or 0.0) * (1 if lower else -1)))


def metric_of(view: ExperimentView) -> str:
    return str(view.spec.get("metric") or "val_top1")


def is_tuned(view: ExperimentView) -> bool:
    return bool(view.spec.get("tune"))


def name_of(arm: Arm, view: ExperimentView) -> str:
    label = escape(arm.label or settings(arm.settings) or f"arm {arm.index}")
    is_found = view.baseline is None and arm.index == view.best  # in a comparison the verdict says which is better, if any is
    return f"{label} [green]best[/]" if is_found else label


def settings(values: dict[str, Any]) -> str:
    """`lr 0.1`."""
    return ", ".join(f"{path.rpartition('.')[2]} {short(value)}" for path, value in values.items())


def runs(arm: Arm) -> str:
    """`3/5`, with what went wrong."""
    total = sum(arm.counts.values())
    lost = ", ".join(f"{arm.counts[state]} {state}" for state in ("failed", "cancelled", "deleted") if arm.counts.get(state))
    return f"{arm.counts.get('succeeded', 0)}/{total}" + (f" [red]{lost}[/]" if lost else "")


def trial_state(arm: Arm) -> str:
    """Of a search's one run; a paused one waits at its rung."""
    return " ".join(console.state(state) for state in arm.counts) or "not begun"


def mean(arm: Arm, measured: Unit) -> str:
    if arm.mean is None:
        return NOTHING
    if arm.low is None or arm.high is None:
        return measured.value(arm.mean)
    return f"{measured.value(arm.mean)} ± {measured.value((arm.high - arm.low) / 2)}"


def difference(arm: Arm, view: ExperimentView, measured: Unit) -> str:
    found = arm.difference
    if found is None or found.mean is None:
        return "[dim]baseline[/]" if arm.index == view.baseline else NOTHING
    return f"[{CONCLUSIONS.get(found.conclusion, 'default')}]{measured.difference(found.mean)}[/]{_interval(found, measured)}"


def _interval(found: Difference, measured: Unit) -> str:
    if found.low is None or found.high is None:
        return ""
    return f" ({measured.difference(found.low)} to {measured.difference(found.high)})"


def list_table(views: list[ExperimentView], *, width: int) -> Table:
    """A row per experiment; where there is room, the verdict's beginning."""
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for title in ("experiment", "name", "state", "runs", *(("verdict",) if width >= WIDE_ENOUGH else ())):
        table.add_column(title, no_wrap=True, justify="right" if title == "runs" else "left", overflow="ellipsis")
    for view in views:
        done = f"{view.progress.runs_done}/{view.progress.runs}"
        said = escape((view.verdict or NOTHING)[: width - 80])
        table.add_row(view.id, escape(view.name or NOTHING), console.state(view.state), done, *((said,) if width >= WIDE_ENOUGH else ()))
    return table


# --- as it runs


class Board:
    """The experiment as last heard, as something rich can draw."""

    def __init__(self) -> None:
        self._view: ExperimentView | None = None
        self._heard = time.monotonic()

    def put(self, view: ExperimentView) -> None:
        self._view, self._heard = view, time.monotonic()

    def __rich__(self) -> RenderableType:
        if (view := self._view) is None:
            return Text("…", style="dim")
        head = Table.grid(padding=(0, 2, 0, 0))
        bar = ProgressBar(total=1.0, completed=view.progress.fraction, width=BAR, complete_style="blue", finished_style="green")
        head.add_row(f"[bold]{escape(view.name or view.id)}[/]", console.state(view.state), bar, self._left(view))
        return Group(head, Padding(arms_table(view), (1, 0, 0, 0)))

    def _left(self, view: ExperimentView) -> str:
        eta_s = view.progress.eta_s
        if eta_s is not None and not view.is_terminal:
            eta_s = max(0.0, eta_s - (time.monotonic() - self._heard))
        return progress(view, eta_s)


def progress(view: ExperimentView, eta_s: float | None) -> str:
    """`verdict: 7 of 15 runs, ETA 2 min 10 s`."""
    told = f"{view.stage}: {view.progress.runs_done} of {view.progress.runs} runs"
    if view.is_terminal:
        return told + ("" if view.is_settled else ", a worker computes the verdict")
    return told if eta_s is None else f"{told}, ETA {console.duration(eta_s)}"


class LineWriter:
    """The same for a file or a pipe: a line when the state changes or a run has ended."""

    def __init__(self, target: Console) -> None:
        self._target = target
        self._said: tuple[Any, ...] | None = None

    def put(self, view: ExperimentView) -> None:
        mark = (view.state, view.stage, view.progress.runs_done, view.progress.runs)
        if mark != self._said:
            self._said = mark
            told = f"{view.name or view.id}  {view.state}  {progress(view, view.progress.eta_s)}"
            self._target.print(told, markup=False, soft_wrap=True)


@asynccontextmanager
async def display(*, live: bool) -> AsyncIterator[Callable[[ExperimentView], None]]:
    """Where to put what is heard, on standard error: drawn by a task of this loop, or written line by line."""
    if not live:
        yield LineWriter(console.stderr()).put
        return
    board = Board()
    async with drawn(board, transient=True):
        yield board.put


async def follow(client: AsyncClient, experiment_id: str, hear: Callable[[ExperimentView], None]) -> ExperimentView:
    """Tell every change until it is settled; the experiment as it is then."""
    experiment = await client.experiment(experiment_id)
    async for changed in experiment.changes():
        hear(changed.view)
    return experiment.view


def watch(url: str, experiment_id: str, *, json_lines: bool) -> ExperimentView:
    """Show an experiment until it is settled. With `json_lines` every change is one JSON object on standard output."""
    from powergrad.client import AsyncClient

    async def run() -> ExperimentView:
        async with AsyncClient(url) as client:
            if json_lines:
                return await follow(client, experiment_id, lambda view: console.print_json(view.model_dump(mode="json"), compact=True))
            async with display(live=console.interactive()) as put:
                return await follow(client, experiment_id, put)

    return asyncio.run(run())


def cost(plan: dict[str, Any]) -> Iterator[str]:
    """What a question would run, in words."""
    spec, arms = plan["spec"], plan["arms"]
    if spec["strategy"] != "grid":
        yield f"{spec['strategy']}: {plan['runs']} trials of at most {spec['spec']['epochs']} epochs"
        return
    seeds, tuning = len(plan["seeds"]), plan["runs"] - len(arms) * len(plan["seeds"])
    if tuning:
        yield f"first {tuning} runs that tune {', '.join(spec['tune'])} for each arm, on seeds of their own"
    yield f"{'then ' if tuning else ''}{len(arms)} arms × {seeds} seeds = {len(arms) * seeds} runs; in all {plan['epochs']:,} epochs"
