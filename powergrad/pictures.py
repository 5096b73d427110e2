"""The paper's figures (arXiv 2111.12495) for the user's own run, from its metrics and the history that its telemetry kept.

The same numbers give the same bytes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from powergrad.drawing import BLUE, GREEN, STYLE, UNDATED, VERMILLION, settle, sheet
from powergrad.telemetry import ZERO_NORM, History

Metrics = Mapping[str, list[tuple[int, float]]]
"""Points (step, value) by the metric's name, oldest first; a value may be NaN."""
Floats = NDArray[np.float64]

SPREAD = 20.0
"""A largest value this many times the median one would flatten the rest: such a curve is drawn on a logarithmic axis."""
MOST_COLUMNS = 400
"""Of a heat map: half of its pixels. More looks than these are thinned out."""
MOST_LAYERS = 40
"""Panels of filters in one picture: ten rows of four can still be read."""
PANELS_A_ROW = 4


def draw(history: History, metrics: Metrics, out_dir: Path, *, title: str) -> list[Path]:
    """Draws each figure that there is data for, as SVG and PNG, and returns the files' paths.

    training (the paper's figure 2), logits (4), logit-norm (5), gradients (6), filters (7).  title: whose run it is, above each figure.
    """
    finite = {name: points for name, raw in metrics.items() if (points := [point for point in raw if math.isfinite(point[1])])}
    time = _Time.of(history)
    out_dir.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        drawings = {
            "training": _training(finite, time),
            "logits": _logits(finite, time),
            "logit-norm": _logit_norm(finite, time),
            "gradients": _gradients(history, finite, time),
            "filters": _filters(history, time),
        }
        return [path for name, figure in drawings.items() if figure is not None for path in _saved(figure, out_dir / name, title)]


@dataclass(frozen=True)
class _Time:
    """The horizontal axis: epochs where the history tells how long they are, else steps."""

    label: str
    steps_per_unit: float

    @classmethod
    def of(cls, history: History) -> _Time:
        if not history.filters:
            return cls("step", 1.0)
        return cls("epoch", history.filters[-1].step / history.filters[-1].epoch)

    def at(self, steps: Sequence[int]) -> Floats:
        return np.asarray(steps, dtype=np.float64) / self.steps_per_unit


@dataclass(frozen=True)
class _Curve:
    metric: str
    label: str
    colour: str


def _training(metrics: Metrics, time: _Time) -> Figure | None:
    panels = [
        ("top-1 accuracy", [_Curve("train_top1", "training", BLUE), _Curve("val_top1", "validation", VERMILLION)]),
        ("cross-entropy (nats)", [_Curve("train_loss", "training", BLUE), _Curve("val_loss", "validation", VERMILLION)]),
    ]
    averaged = [
        _Curve("ema_val_top1", "validation, averaged weights", GREEN),
        _Curve("ema_val_loss", "validation, averaged weights", GREEN),
    ]
    panels = [
        (label, [curve for curve in [*curves, more] if curve.metric in metrics])
        for (label, curves), more in zip(panels, averaged, strict=True)
    ]
    figure = _curves(panels, metrics, time, height_in=3.6)
    if figure is None:
        return None
    figure.suptitle("accuracy and loss")
    for axes in figure.axes:
        if "accuracy" in axes.get_ylabel():
            axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
    return figure


def _logits(metrics: Metrics, time: _Time) -> Figure | None:
    names = {"norm": "norm (L2)", "mean_abs": "|mean|", "max_abs": "|max|", "var": "variance"}
    panels = [(label, [_Curve(f"val_logit_{name}", "", BLUE)]) for name, label in names.items() if f"val_logit_{name}" in metrics]
    figure = _curves(panels, metrics, time, height_in=5.2)
    if figure is not None:
        figure.suptitle("logits, mean over the validation images")
    return figure


def _logit_norm(metrics: Metrics, time: _Time) -> Figure | None:
    losses, norms = dict(metrics.get("val_loss", [])), dict(metrics.get("val_logit_norm", []))
    steps = sorted(losses.keys() & norms.keys())
    if not steps:
        return None
    figure = sheet(4.4)
    axes = figure.add_subplot()
    x, y = [losses[step] for step in steps], [norms[step] for step in steps]
    axes.plot(x, y, color="#bbbbbb", linewidth=0.8, zorder=1)
    points = axes.scatter(x, y, c=time.at(steps), cmap="viridis", s=28, edgecolors="white", linewidths=0.4, zorder=2)
    axes.set(xlabel="validation cross-entropy (nats)", ylabel="validation logit norm (L2, mean)", xscale=_scale(x), yscale=_scale(y))
    if len(steps) > 1:
        figure.colorbar(points, ax=axes, label=time.label, pad=0.02)
    figure.suptitle("logit norm against loss")
    return figure


def _gradients(history: History, metrics: Metrics, time: _Time) -> Figure | None:
    curves = {
        "grad_true_share": "true class's share of the\nlogit gradient (squared)",
        "grad_cosine": "cosine with the\nordinary logit gradient",
        "grad_gain": "length of the logit gradient\n(ordinary is 1)",
        "grad_norm": "gradient norm (L2),\nall parameters",
    }
    panels = [(label, [_Curve(name, "", BLUE)]) for name, label in curves.items() if name in metrics]
    layers = _layer_gradients(history)
    if not panels and not layers:
        return None
    rows, map_in = math.ceil(len(panels) / 2), min(9.0, 1.2 + 0.145 * len(layers)) if layers else 0.0
    figure = sheet(0.4 + 1.8 * rows + map_in)
    grid = figure.add_gridspec(rows + bool(layers), 2, height_ratios=[1.8] * rows + [map_in] * bool(layers))
    for place, (label, of_panel) in enumerate(panels):
        _panel(figure.add_subplot(grid[place // 2, place % 2]), label, of_panel, metrics, time)
    if layers:
        steps = [record.step for record in history.gradients]
        _gradient_map(figure, figure.add_subplot(grid[rows, :]), layers, steps, time)
    figure.suptitle("gradients, before clipping")
    return figure


def _layer_gradients(history: History) -> dict[str, Floats]:
    """Gradient norm of each module that has parameters of its own, in the network's order: (looks,)."""
    names = list(history.gradients[0].norms) if history.gradients else []
    squares: dict[str, Floats] = {}
    for name in names:
        values = np.asarray([record.norms[name] for record in history.gradients])
        layer = name.rpartition(".")[0] or name
        squares[layer] = squares.get(layer, np.zeros(len(values))) + values**2
    return {layer: np.sqrt(of_layer) for layer, of_layer in squares.items()}


def _gradient_map(figure: Figure, axes: Axes, layers: Mapping[str, Floats], steps: Sequence[int], time: _Time) -> None:
    every = math.ceil(len(steps) / MOST_COLUMNS)
    norms = np.stack(list(layers.values()))[:, ::every]  # (L, T)
    positive = np.ma.masked_where(~(norms > 0), norms)  # NaN too
    mesh = axes.pcolormesh(
        _edges(time.at(steps[::every])), np.arange(len(layers) + 1), positive, norm=_log_norm(positive), cmap="viridis", rasterized=True
    )
    axes.invert_yaxis()  # the first layer on top
    shown = range(0, len(layers), math.ceil(len(layers) / 56))
    axes.set_yticks([layer + 0.5 for layer in shown], [list(layers)[layer] for layer in shown], fontsize=7)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False)
    axes.set_facecolor("#dddddd")
    axes.set(xlabel=time.label, title="gradient norm (L2) by layer; grey: zero or not finite")
    figure.colorbar(mesh, ax=axes, pad=0.02, aspect=30, label="gradient norm (L2)")


def _filters(history: History, time: _Time) -> Figure | None:
    if not history.filters:
        return None
    steps = [record.step for record in history.filters]
    layers = {name: np.asarray([record.norms[name] for record in history.filters]).T for name in history.filters[-1].norms}  # (O, T) each
    shown = _layers_to_show(layers)
    rows = math.ceil(len(shown) / PANELS_A_ROW)
    figure = sheet(1.1 + 1.35 * rows)
    scale = _log_norm(np.concatenate([norms[norms >= ZERO_NORM] for norms in layers.values()]))
    colours = mpl.colormaps["viridis"].with_extremes(under=VERMILLION, bad="#dddddd")
    grid = figure.subplots(rows, min(PANELS_A_ROW, len(shown)), sharex=True, squeeze=False)
    mesh = None
    for axes, name in zip(grid.flat, shown, strict=False):
        norms = layers[name]
        # what a logarithm has no place for would be taken for missing
        drawn = np.where(norms < ZERO_NORM, scale.vmin / 10 if scale.vmin else ZERO_NORM, norms)[np.argsort(-norms[:, -1], kind="stable")]
        mesh = axes.pcolormesh(_edges(time.at(steps)), np.arange(len(drawn) + 1), drawn, norm=scale, cmap=colours, rasterized=True)
        zeroed = int((norms[:, -1] < ZERO_NORM).sum())
        count = f"{zeroed} of {len(norms)} zeroed" if zeroed else f"{len(norms)} filters"
        axes.set_title(f"{_shortened(name)}\n{count}", fontsize=7, color=VERMILLION if zeroed else "black")
        axes.set_yticks([])
        axes.invert_yaxis()
        axes.grid(visible=False)
    for axes in list(grid.flat)[len(shown) :]:
        axes.set_axis_off()
    assert mesh is not None, "a network without convolutions leaves no filters in its history"
    figure.colorbar(mesh, ax=grid, label="weight norm of a filter (L2)", pad=0.01, aspect=40, shrink=min(1.0, 4 / rows))
    figure.supxlabel(time.label, fontsize=9)
    figure.supylabel("filters, by their norm at the end", fontsize=9)
    figure.legend(handles=[Patch(color=VERMILLION, label=f"zeroed out (norm below {ZERO_NORM:g})")], loc="outside lower right")
    part = "" if len(shown) == len(layers) else f" ({len(shown)} of {len(layers)} layers, those with zeroed filters first)"
    figure.suptitle(f"weight norms of the filters{part}")
    return figure


def _layers_to_show(layers: Mapping[str, Floats]) -> list[str]:
    """At most MOST_LAYERS, in the network's order: those with zeroed filters, then others evenly spaced."""
    names = list(layers)
    zeroed = sorted((name for name in names if _zeroed(layers[name])), key=lambda name: -_zeroed(layers[name]))[:MOST_LAYERS]
    others = [name for name in names if name not in zeroed]
    room = min(len(others), MOST_LAYERS - len(zeroed))
    chosen = {*zeroed, *(others[place * len(others) // room] for place in range(room))}
    return [name for name in names if name in chosen]


def _zeroed(norms: Floats) -> int:
    return int((norms[:, -1] < ZERO_NORM).sum())


def _curves(panels: Sequence[tuple[str, Sequence[_Curve]]], metrics: Metrics, time: _Time, *, height_in: float) -> Figure | None:
    """Panels of curves, two in a row, without the empty ones; None if all are."""
    drawn = [(label, curves) for label, curves in panels if curves]
    if not drawn:
        return None
    rows = math.ceil(len(drawn) / 2)
    figure = sheet(height_in if rows * 2 >= len(panels) else height_in / 2)
    for place, (label, curves) in enumerate(drawn, start=1):
        _panel(figure.add_subplot(rows, min(2, len(drawn)), place), label, curves, metrics, time)
    return figure


def _panel(axes: Axes, label: str, curves: Sequence[_Curve], metrics: Metrics, time: _Time) -> None:
    for curve in curves:
        steps, values = zip(*metrics[curve.metric], strict=True)
        axes.plot(time.at(steps), values, color=curve.colour, label=curve.label, marker="o" if len(steps) <= 30 else "", markersize=3)
    axes.set(xlabel=time.label, ylabel=label)
    axes.set_yscale(_scale([value for curve in curves for _, value in metrics[curve.metric]]))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if any(curve.label for curve in curves):
        axes.legend()


def _scale(values: Sequence[float]) -> Literal["log", "linear"]:
    return "log" if min(values) > 0 and max(values) > SPREAD * statistics.median(values) else "linear"


def _edges(centres: Floats) -> Floats:
    """Borders of the columns around these places."""
    if len(centres) == 1:
        return np.asarray([centres[0] - 0.5, centres[0] + 0.5])
    middles = (centres[1:] + centres[:-1]) / 2
    return np.concatenate(([2 * centres[0] - middles[0]], middles, [2 * centres[-1] - middles[-1]]))


def _log_norm(values: Any) -> LogNorm:
    """From the smallest to the largest value that is there, or around 1 where there is none."""
    there = np.ma.masked_invalid(values).compressed()
    low, high = (float(there.min()), float(there.max())) if there.size else (1.0, 1.0)
    return LogNorm(low, high) if high > low else LogNorm(low / 2, high * 2)


def _shortened(name: str, most: int = 28) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"


def _saved(figure: Figure, path: Path, title: str) -> Iterator[Path]:
    what = figure.get_suptitle()
    figure.suptitle(f"{title}: {what}" if title else what, fontsize=11, fontweight="bold")
    settle(figure)
    for kind, metadata in UNDATED.items():
        figure.savefig(path.with_suffix(f".{kind}"), metadata=metadata)
        yield path.with_suffix(f".{kind}")
