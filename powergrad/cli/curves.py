"""Curves in a terminal: a metric over steps, a colour for each run, drawn with characters of 2 × 4 dots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from powergrad.experiments.units import titled, unit

COLOURS = ("blue", "green", "red", "cyan", "magenta", "yellow")
"""Of a terminal's own sixteen, the same words in plotext and in rich; readable on light and on dark ground."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"
NARROWEST, WIDEST = 40, 110
LOWEST, HIGHEST = 8, 18
SIDE_BY_SIDE = 100
"""Columns from which on two plots stand beside each other."""


@dataclass(frozen=True)
class Curve:
    """One run's values of one metric; None where a value is not finite."""

    name: str
    steps: Sequence[int]
    values: Sequence[float | None]

    def known(self) -> tuple[list[int], list[float]]:
        pairs = [(step, value) for step, value in zip(self.steps, self.values, strict=True) if value is not None and math.isfinite(value)]
        return [step for step, _ in pairs], [value for _, value in pairs]


def mark(place: int, *, colour: bool) -> Text:
    """What a run's curve is known by: a dot in its colour, or, where there are no colours, its letter."""
    if not colour:
        return Text(LETTERS[place % len(LETTERS)])
    return Text("●", style=f"bright_{COLOURS[place % len(COLOURS)]}")


def in_colour(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def drawn(metric: str, curves: Sequence[Curve], *, width: int, height: int, colour: bool) -> Text:
    """A frame of `width` × `height` characters with every curve in it."""
    import plotext  # a fifth of a second, which commands that draw nothing save

    figure = plotext.figure
    figure.clear()
    figure.theme("simple" if colour else "colorless")
    figure.plot_size(width, height)
    figure.title(titled(metric))
    for place, curve in enumerate(curves):
        steps, values = curve.known()
        if not steps:
            continue
        marker = "braille" if colour else LETTERS[place % len(LETTERS)]
        scaled = [value * unit(metric).scale for value in values]
        signal = figure.signal(steps, scaled, marker=plotext.marker(marker, f"{COLOURS[place % len(COLOURS)]}+") if colour else marker)
        figure.draw(signal.lines(len(steps) > 1))
    ticks = whole_ticks([step for curve in curves for step in curve.known()[0]], count=max(2, width // 14))
    figure.ruler("x").ticks(ticks, [f"{tick:,}" for tick in ticks])
    return Text.from_ansi(figure.build().string(colorless=not colour).rstrip("\n"))


def whole_ticks(steps: Sequence[int], *, count: int) -> list[int]:
    """At most `count` steps, evenly from the first to the last; none where there are none."""
    if not steps:
        return []
    first, last = min(steps), max(steps)
    return sorted({first + round((last - first) * place / (count - 1)) for place in range(count)})


@dataclass(frozen=True)
class Plots:
    """Metrics of some runs, as something rich can draw: as many plots as there is room for, nothing where there is none.

    series: metric → curves, the same runs in the same order in each.  spare: rows of the screen that other things need.
    """

    series: Mapping[str, Sequence[Curve]]
    spare: int = 4

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = {name: curves for name, curves in self.series.items() if any(len(curve.known()[0]) > 1 for curve in curves)}
        height = min(HIGHEST, console.size.height - self.spare)
        if not shown or options.max_width < NARROWEST or height < LOWEST:
            return
        beside = 2 if options.max_width >= SIDE_BY_SIDE else 1
        width = min(WIDEST, (options.max_width - 2 * (beside - 1)) // beside)
        grid = Table.grid(padding=(0, 2, 0, 0))
        colour = in_colour(console)
        grid.add_row(*(drawn(name, curves, width=width, height=height, colour=colour) for name, curves in list(shown.items())[:beside]))
        yield grid
