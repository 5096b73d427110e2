"""What all figures share: the looks, colours that all readers can tell apart, and bytes that depend on the numbers alone.

Drawn with matplotlib's objects, no pyplot: nothing global is left behind, and no display is asked for.
"""

from __future__ import annotations

import io
from typing import Literal

import matplotlib as mpl
from matplotlib.figure import Figure

Format = Literal["svg", "png"]

WIDTH_IN, DPI = 8.0, 100
"""A picture is 800 pixels wide."""
BLUE, GREEN, VERMILLION = "#0072B2", "#009E73", "#D55E00"
"""Okabe and Ito's."""
STYLE = mpl.RcParams(
    {
        "svg.hashsalt": "powergrad",  # ids in an SVG are random without it
        "svg.fonttype": "none",  # text stays text: it can be searched and copied
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e4e4e4",
        "grid.linewidth": 0.7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#888888",
        "legend.frameon": False,
        "lines.linewidth": 1.6,
        "figure.facecolor": "white",
        "savefig.facecolor": "white",
    }
)
UNDATED: dict[Format, dict[str, None]] = {"svg": {"Date": None}, "png": {"Software": None}}
"""Metadata without dates and versions: equal figures are equal bytes."""


def sheet(height_in: float, *, width_in: float = WIDTH_IN) -> Figure:
    """An empty figure that makes room for its labels."""
    return Figure(figsize=(width_in, height_in), dpi=DPI, layout="constrained")


def settle(figure: Figure) -> None:
    """Lays the figure out for good: it takes longer than the drawing, and all formats are to look alike."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def encoded(figure: Figure, kind: Format) -> bytes:
    """The figure's file."""
    content = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(content, format=kind, metadata=UNDATED[kind])
    return content.getvalue()
