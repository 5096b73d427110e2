"""The picture of the evidence: accuracy over training by net, and the differences that alpha makes with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#444444", "#0072b2", "#d55e00", "#009e73", "#cc79a7")
"""Okabe and Ito's, told apart by colour-blind readers; the first is the peer's."""


class Curve(TypedDict):
    """val_top1 over training: mean, lowest and highest of the seeds, in [0, 1]."""

    net: str
    alpha: float
    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


class Effect(TypedDict):
    """A difference to the first alpha and its interval, in [-1, 1]."""

    net: str
    alpha: float
    split: str
    mean: float
    low: float
    high: float


def save(path: Path, *, curves: Sequence[Curve], effects: Sequence[Effect]) -> None:
    """Writes the picture as SVG."""
    nets = list(dict.fromkeys(curve["net"] for curve in curves))
    alphas = list(dict.fromkeys(curve["alpha"] for curve in curves))
    colours = dict(zip(alphas, COLOURS, strict=False))
    # the same data give the same file, and its text can be read and searched
    with mpl.rc_context({"svg.hashsalt": "evidence", "svg.fonttype": "none", "font.size": 9.0}):
        figure = Figure(figsize=(3.6 * (len(nets) + 1), 3.4), layout="constrained")
        *left, right = figure.subplots(1, len(nets) + 1)
        for axes, net in zip(left, nets, strict=True):
            _draw_curves(axes, [curve for curve in curves if curve["net"] == net], colours)
            axes.set_title(net)
        left[0].set_ylabel("validation top-1, %")
        _draw_effects(right, effects, colours)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _draw_curves(axes: Axes, curves: Sequence[Curve], colours: dict[float, str]) -> None:
    for curve in curves:
        colour = colours[curve["alpha"]]
        low, mean, high = ([100 * value for value in curve[name]] for name in ("low", "mean", "high"))
        axes.fill_between(curve["steps"], low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(curve["steps"], mean, color=colour, label=f"α = {curve['alpha']:g}", marker=".", markersize=4)
    axes.set_xlabel("step (band: lowest to highest seed)")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)


def _draw_effects(axes: Axes, effects: Sequence[Effect], colours: dict[float, str]) -> None:
    names = [f"{effect['net']}, α = {effect['alpha']:g}, {effect['split']}" for effect in effects]
    for row, effect in enumerate(effects):
        mean, low, high = (100 * effect[name] for name in ("mean", "low", "high"))
        filled = "full" if effect["split"] == "val" else "none"
        errors = [[mean - low], [high - mean]]
        axes.errorbar(mean, row, xerr=errors, fmt="o", color=colours[effect["alpha"]], fillstyle=filled, capsize=3)
    axes.axvline(0.0, color="#444444", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_title("top-1 against α = 1, points")
    axes.set_xlabel("mean of pairs, 95 % t interval")
    axes.grid(axis="x", alpha=0.3)
