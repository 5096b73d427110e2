"""Jobs as they run: one live row each on a terminal, one line per epoch where the output goes elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from powergrad.cli import console
from powergrad.cli.console import Code
from powergrad.cli.curves import SIDE_BY_SIDE, Curve, Plots, in_colour, mark

if TYPE_CHECKING:
    from powergrad.client import AsyncClient, Job

FRAME_S = 0.125
BAR = 20
PLOT_EVERY_S = 1.0
PLOT_POINTS = 200
PLOTTED = ("val_top1", "train_loss")
PLOT_MOST = 12
"""Runs; of more the curves cannot be told apart."""
LOSS_NAMES = ("train_loss", "val_loss")


@dataclass(frozen=True)
class Row:
    """What is shown of one run. top1 is the newest validation accuracy, a fraction; None is not known yet."""

    key: str
    name: str
    state: str
    fraction: float = 0.0
    epoch: float | None = None
    epochs: int | None = None
    loss: float | None = None
    top1: float | None = None
    images_per_s: float | None = None
    eta_s: float | None = None
    note: str = ""
    took_s: float | None = None

    @property
    def is_running(self) -> bool:
        return self.state in {"running", "pausing", "cancelling"}


def row_of(job: Job) -> Row:
    latest, progress = job.metrics.latest, job.progress
    took_s = (job.finished_at - job.started_at).total_seconds() if job.finished_at and job.started_at else None
    return Row(
        key=job.id,
        name=job.name or job.id,
        state=str(job.state),
        fraction=1.0 if job.state == "succeeded" else progress.fraction or 0.0,
        epoch=progress.fraction * progress.epochs if progress.fraction is not None and progress.epochs else progress.epoch,
        epochs=progress.epochs,
        loss=next((latest[name] for name in LOSS_NAMES if latest.get(name) is not None), None),
        top1=latest.get("val_top1"),
        images_per_s=progress.images_per_s,
        eta_s=progress.eta_s,
        note=_note(job),
        took_s=took_s,
    )


def _note(job: Job) -> str:
    if job.reason is not None and job.state != "succeeded":
        return f"{job.reason.code}: {job.reason.detail}" if job.reason.detail else job.reason.code
    if job.state == "queued" and job.queue is not None:
        place = f"place {job.queue.position}" if job.queue.position else ""
        return ", ".join(text for text in (place, f"waits for {job.queue.waiting_for}" if job.queue.waiting_for else "") if text)
    if job.state == "paused" and job.queue is not None and job.queue.waiting_for:
        return f"waits for {job.queue.waiting_for}"
    return f"attempt {job.attempt}" if job.attempt > 1 else ""


class Board:
    """The rows, in the order they were first seen, as something rich can draw."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self.series: dict[str, dict[str, Curve]] = {}
        """Metric → run → its curve, for what is plotted."""
        self._heard: dict[str, float] = {}

    def put(self, row: Row) -> None:
        self.rows[row.key] = row
        self._heard[row.key] = time.monotonic()

    def __rich_console__(self, console_: Console, options: ConsoleOptions) -> RenderResult:
        yield self._table(in_colour(console_), bar_width=BAR if options.max_width >= SIDE_BY_SIDE else BAR // 3)
        for row in self.rows.values():
            if row.note:
                yield Text(f"  {row.name}: {row.note}", style="dim")
        notes = sum(bool(row.note) for row in self.rows.values())
        series = {metric: [self._curve(metric, key) for key in self.rows] for metric in self.series}
        yield Plots(series, spare=len(self.rows) + notes + 3)

    def _curve(self, metric: str, key: str) -> Curve:
        return self.series[metric].get(key) or Curve(key, (), ())

    def _table(self, colour: bool, *, bar_width: int) -> RenderableType:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", expand=False)
        if self.series:
            table.add_column("")
        table.add_column("job", no_wrap=True, min_width=8)
        table.add_column("state", no_wrap=True, min_width=max((len(row.state) for row in self.rows.values()), default=0))
        table.add_column("", no_wrap=True, max_width=bar_width)
        for title, width in (("epoch", 5), ("loss", 6), ("top-1", 6), ("images/s", 8), ("ETA", 11)):
            table.add_column(title, justify="right", no_wrap=True, min_width=width)
        for place, row in enumerate(self.rows.values()):
            bar = ProgressBar(
                total=1.0,
                completed=row.fraction,
                width=bar_width,
                complete_style="blue",
                finished_style="green",
                pulse=row.is_running and row.fraction == 0.0,
            )
            known_by = [mark(place, colour=colour)] if self.series else []
            table.add_row(*known_by, escape(row.name), console.state(row.state), bar, *cells(replace(row, eta_s=self._left_s(row))))
        return table

    def _left_s(self, row: Row) -> float | None:
        """The ETA counted down since it was heard, so that it does not stand still between two reports."""
        return None if row.eta_s is None else max(0.0, row.eta_s - (time.monotonic() - self._heard[row.key]))


def cells(row: Row) -> list[str]:
    """Epoch, loss, top-1, images/s and ETA of a row as text; a run that has ended shows what it took."""
    epochs = "–" if row.epoch is None or row.epochs is None else f"{row.epoch:.1f}/{row.epochs}".replace(".0/", "/")
    speed = "–" if row.images_per_s is None or not row.is_running else f"{row.images_per_s:,.0f}"
    left = f"took {console.duration(row.took_s)}" if row.took_s is not None else console.duration(row.eta_s if row.is_running else None)
    return [epochs, console.number(row.loss), console.percent(row.top1), speed, left]


class LineWriter:
    """The same for a file or a pipe: a line when the state changes, and one in each epoch, when the last one's score is known."""

    def __init__(self, target: Console) -> None:
        self._target = target
        self._said: dict[str, tuple[str, int]] = {}

    def put(self, row: Row) -> None:
        mark = (row.state, math.ceil(row.epoch or 0.0))
        if self._said.get(row.key) == mark:
            return
        self._said[row.key] = mark
        epoch, loss, top1, speed, left = cells(row)
        known = [f"epoch {epoch}", f"loss {loss}", f"top-1 {top1}", f"{speed} images/s", left if row.took_s is not None else f"ETA {left}"]
        told = "  ".join(part for part in known if "–" not in part)
        self._target.print(f"{row.name}  {row.state}  {told}  {row.note}".rstrip(), markup=False, soft_wrap=True)


@asynccontextmanager
async def display(*, live: bool) -> AsyncIterator[Callable[[Row], None]]:
    """Where to put rows: drawn by a task of this loop (no thread), or written line by line; on standard error."""
    if not live:
        yield LineWriter(console.stderr()).put
        return
    board = Board()
    async with drawn(board):
        yield board.put


@asynccontextmanager
async def drawn(board: RenderableType, *, transient: bool = False) -> AsyncIterator[None]:
    """Keep `board` on the terminal as it is now, on standard error; transient: take it away at the end, instead of leaving its last state."""
    with Live(board, console=console.stderr(), auto_refresh=False, transient=transient) as screen:
        async with repeated(screen.refresh, FRAME_S):
            yield
        if not transient:
            screen.refresh()


@asynccontextmanager
async def repeated(act: Callable[[], Awaitable[None] | None], every_s: float) -> AsyncIterator[None]:
    """Do it again and again beside what is inside."""

    async def repeat() -> None:
        while True:
            done = act()
            if done is not None:
                await done
            await asyncio.sleep(every_s)

    task = asyncio.create_task(repeat())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def follow(client: AsyncClient, job_ids: Iterable[str], hear: Callable[[Job], None]) -> list[Job]:
    """Tell every change of these jobs until all have ended; the jobs as they ended, in order."""

    async def one(job_id: str) -> Job:
        last: Job | None = None
        async for job in client.changes(job_id):
            hear(job)
            last = job
        assert last is not None
        return last

    return list(await asyncio.gather(*(one(job_id) for job_id in job_ids)))


class Plotter:
    """Fetches the curves of the jobs on a board, each when its job has gone on."""

    def __init__(self, client: AsyncClient, board: Board, metrics: Iterable[str]) -> None:
        self._client = client
        self._board = board
        board.series = {metric: {} for metric in metrics}
        self._due: set[str] = set()
        self._seen: dict[str, tuple[int | None, str]] = {}

    def hear(self, job: Job) -> None:
        now = (job.progress.step, str(job.state))
        if self._board.series and self._seen.get(job.id) != now:
            self._seen[job.id] = now
            self._due.add(job.id)

    async def look(self) -> None:
        """A picture that is missing is no reason to stop watching: what cannot be fetched stays as it was."""
        from powergrad.client import ClientError

        while self._due:
            job_id = self._due.pop()
            with contextlib.suppress(ClientError):
                found = await self._client.metrics(job_id, names=tuple(self._board.series), points=PLOT_POINTS)
                for one in found["data"]:
                    self._board.series[one["name"]][job_id] = Curve(job_id, one["steps"], one["values"])


async def follow_live(client: AsyncClient, job_ids: list[str], *, metrics: tuple[str, ...]) -> list[Job]:
    """As `follow`, drawn on the terminal, with plots of these metrics."""
    board = Board()
    plotter = Plotter(client, board, metrics if len(job_ids) <= PLOT_MOST else ())

    def hear(job: Job) -> None:
        board.put(row_of(job))
        plotter.hear(job)

    async with drawn(board):
        async with repeated(plotter.look, PLOT_EVERY_S):
            ended = await follow(client, job_ids, hear)
        await plotter.look()
    return ended


def watch(url: str, job_ids: list[str], *, json_lines: bool, metrics: tuple[str, ...] = PLOTTED) -> list[Job]:
    """Show these jobs until all have ended. With `json_lines` every change is one JSON object on standard output.

    metrics: what a terminal is to plot; none: no plot.
    """
    from powergrad.client import AsyncClient

    async def run() -> list[Job]:
        async with AsyncClient(url) as client:
            if json_lines:
                return await follow(client, job_ids, lambda job: console.print_json(console.as_json(job), compact=True))
            if console.interactive():
                return await follow_live(client, job_ids, metrics=metrics)
            put = LineWriter(console.stderr()).put
            return await follow(client, job_ids, lambda job: put(row_of(job)))

    return asyncio.run(run())


def verdict(jobs: Iterable[Job]) -> Code:
    """The exit code for jobs that have ended: a failure outweighs a cancellation."""
    states = {str(job.state) for job in jobs}
    return Code.FAILED if "failed" in states else Code.CANCELLED if "cancelled" in states else Code.OK


def epilogue(jobs: Iterable[Job]) -> None:
    """What is worth reading when jobs have ended: the result, or the reason with what to try."""
    for job in jobs:
        if job.state == "succeeded":
            best = job.metrics.best.get("val_top1")
            score = f", best val_top1 {best:.4f}" if best is not None else ""
            console.say(f"[green]{escape(job.name or job.id)} succeeded[/]{score}. Its weights: powergrad pull {job.id}")
        elif job.state == "failed" and job.reason is not None:
            console.say(f"[red]{escape(job.name or job.id)} failed[/]: {escape(job.reason.detail or job.reason.code)}")
            if job.reason.hint:
                console.say(f"  Try: {escape(job.reason.hint)}")
            console.say(f"  More: powergrad logs {job.id} · powergrad show {job.id}")
        else:
            console.say(f"{escape(job.name or job.id)} {job.state}")
