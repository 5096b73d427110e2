"""An experiment's figures: differences with their intervals, curves, final values, and for searches the settings that were tried.

What a colour says is said by a shape, a dash or a word too, for readers who cannot tell colours apart and for paper.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from powergrad.drawing import BLUE, STYLE, VERMILLION, Format, encoded, settle, sheet
from powergrad.experiments import units
from powergrad.experiments.findings import ArmFindings, Difference, Evidence, Findings, RunEvidence
from powergrad.experiments.labels import short, words
from powergrad.experiments.units import NOTHING, Unit, shortened

Sheet = Figure | SubFigure

PNG_DPI = 150
"""For paper: 1200 pixels wide."""
LABEL_LETTERS = 44
"""Of an arm's label beside a row: half of the picture at most."""
LEGEND_LETTERS = 40
COLOURED = 7
"""Curves that are told apart by colour and dash; of more arms the others are grey."""
COLOURS = ("#000000", BLUE, VERMILLION, "#009E73", "#CC79A7", "#8C6D00", "#56B4E9")
"""Okabe and Ito's, the yellow and orange darkened to be seen on white; black is the baseline's."""
DASHES: tuple[Any, ...] = ("-", "-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1, 1, 1, 1, 1)), (0, (8, 2)))
OTHERS = "#b0b0b0"
LATE_FROM = 2 / 3
"""The later part of training is drawn again by itself: differences at the end are small beside the way there."""
LATE_POINTS = 3
"""Evaluations that the later part has at least, or it is not drawn."""
LOG_SPREAD = 20.0
"""Positive numbers whose largest is so many times the smallest lie on a logarithmic axis."""
MOST_CATEGORIES = 12
"""Names on one axis of parallel coordinates; of more every second, third … is written."""
WIDE = 3.0
"""Intervals that reach further than so many of the median one are cut at the edge, with an arrow: two seeds would flatten all the rest."""


@dataclass(frozen=True)
class _Mark:
    meaning: str
    colour: str
    shape: str
    filled: bool


MARKS = {
    "better": _Mark("better", BLUE, "^", filled=True),
    "worse": _Mark("worse", VERMILLION, "v", filled=True),
    "open": _Mark("open: not told apart", "#555555", "o", filled=False),
    "identical": _Mark("identical in every seed", "#555555", "s", filled=True),
    "too_few": _Mark("too few seeds", "#777777", "x", filled=False),
}


def forest(findings: Findings) -> Figure:
    """Each arm's mean difference to the baseline with its interval: a row an arm, a line at 0."""
    with _style():
        figure = sheet(_forest_height(findings))
        _draw_forest(figure, findings)
        return figure


def strip(findings: Findings, evidence: Evidence) -> Figure:
    """The metric of every finished run, and the mean: a row an arm."""
    with _style():
        figure = sheet(1.1 + 0.26 * len(findings["arms"]))
        _draw_strip(figure, findings, evidence)
        return figure


def curves(findings: Findings) -> Figure:
    """The metric over epochs: the mean of an arm's runs in a band from the lowest to the highest."""
    with _style():
        figure = sheet(_curves_height(findings))
        _draw_curves(figure, findings)
        return figure


def parallel(findings: Findings, evidence: Evidence) -> Figure:
    """Parallel coordinates: a line a run, through its settings to its metric; the best on top and brightest."""
    with _style():
        figure = sheet(4.2)
        _draw_parallel(figure, findings, evidence)
        return figure


def progress(findings: Findings, evidence: Evidence) -> Figure:
    """The metric of each trial of a search in their order, and the best so far."""
    with _style():
        figure = sheet(3.0)
        _draw_progress(figure, findings, evidence)
        return figure


def summary(findings: Findings, evidence: Evidence) -> Figure:
    """The one figure of an experiment: forest over curves, or for a search parallel coordinates over the best so far."""
    searched = findings["baseline"] is None and len(findings["arms"]) > 1
    upper, lower = (4.2, 3.0) if searched else (_forest_height(findings), _curves_height(findings))
    with _style():
        figure = sheet(upper + lower + 0.35)
        figure.suptitle(shortened(evidence["name"], 70), fontsize=11, fontweight="bold")
        above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[upper, lower])[:, 0]
        if searched:
            _draw_parallel(above, findings, evidence)
            _draw_progress(below, findings, evidence)
        else:
            _draw_forest(above, findings)
            _draw_curves(below, findings)
        return figure


def render(figure: Figure, kind: Format) -> bytes:
    """The figure's file: equal findings give equal bytes."""
    with _style():
        if figure.get_layout_engine() is not None:
            settle(figure)
        return encoded(figure, kind)


@contextmanager
def _style() -> Iterator[None]:
    # a name such as `$\frac` is a name, and no formula to be set
    with mpl.rc_context({**STYLE, "text.parse_math": False, "savefig.dpi": PNG_DPI}):
        yield


def _forest_height(findings: Findings) -> float:
    return 1.25 + 0.26 * len(findings["arms"])


def _curves_height(findings: Findings) -> float:
    return 2.7 + 0.17 * math.ceil(min(len(findings["arms"]), COLOURED + 1) / 2)


def _empty(figure: Sheet, title: str, why: str) -> None:
    figure.suptitle(title, fontsize=10)
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.text(0.5, 0.5, why, ha="center", va="center", color="#333333", transform=axes.transAxes)


def _waiting(findings: Findings) -> str:
    return f"{findings['finished']} of {findings['planned']} runs have finished."


def _draw_forest(figure: Sheet, findings: Findings) -> None:
    unit, title = units.unit(findings["metric"]), f"Difference to the baseline: {units.in_words(findings['metric'])}"
    rows = [(arm, difference) for arm in findings["arms"] if (difference := arm["difference"]) is not None]
    if not rows:
        return _empty(
            figure, title, "There is one arm: nothing to compare." if findings["baseline"] is not None else "There is no baseline."
        )
    if all(difference["mean"] is None for _, difference in rows):
        return _empty(figure, title, f"No seed has finished in both the baseline and another arm yet.\n{_waiting(findings)}")
    axes = figure.add_subplot()
    low, high = _range([difference for _, difference in rows], unit)
    axes.axvline(0.0, color="#222222", linewidth=1.0, zorder=1)
    _draw_differences(axes, [difference for _, difference in rows], unit, low, high)
    axes.set_xlim(low - 0.03 * (high - low), high + 0.03 * (high - low))
    _name_rows(axes, [arm["label"] for arm, _ in rows])
    _annotate_rows(axes, [_difference_text(difference, unit) for _, difference in rows])
    better = "right" if findings["direction"] == "max" else "left"
    figure.suptitle(f"{title} (further {better} is better)", fontsize=10)
    in_units = f" in {unit.of_difference}" if unit.of_difference else ""
    axes.set_xlabel(f"mean difference{in_units}, line: 95 % t interval, p: Holm’s; 0 is {_baseline_label(findings)}")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:+.4g}".replace("-", "−") if x else "0"))
    _legend_of_marks(figure, [difference["conclusion"] for _, difference in rows])
    return None


def _range(differences: Sequence[Difference], unit: Unit) -> tuple[float, float]:
    """What the axis shows: 0, all means, and all intervals but the parts of very wide ones."""
    means = [unit.scale * one["mean"] for one in differences if one["mean"] is not None]
    halves = [unit.scale * (one["high"] - one["low"]) / 2 for one in differences if one["low"] is not None and one["high"] is not None]
    most = WIDE * float(np.median(halves)) if halves else 0.0
    ends = [end for one in differences for end in _interval(one, unit, most)]
    low, high = min([0.0, *means, *ends]), max([0.0, *means, *ends])
    return (low, high) if high > low else (-(10.0**-unit.digits), 10.0**-unit.digits)


def _interval(difference: Difference, unit: Unit, most: float = math.inf) -> list[float]:
    """Both ends, at most so far from the mean; none where there is no interval."""
    mean, low, high = difference["mean"], difference["low"], difference["high"]
    if mean is None or low is None or high is None:
        return []
    return [max(low * unit.scale, mean * unit.scale - most), min(high * unit.scale, mean * unit.scale + most)]


def _draw_differences(axes: Axes, differences: Sequence[Difference], unit: Unit, low: float, high: float) -> None:
    """A few artists of many rows each: sixty rows of four artists would take seconds."""
    for name, mark in MARKS.items():
        rows = [(row, one) for row, one in enumerate(differences) if one["conclusion"] == name and one["mean"] is not None]
        spans = [(row, *interval) for row, one in rows if (interval := _interval(one, unit))]
        axes.hlines(
            [row for row, *_ in spans], [max(left, low) for _, left, _ in spans], [min(right, high) for *_, right in spans],
            color=mark.colour, linewidth=1.8, zorder=2,
        )  # fmt: skip
        ends = [(row, left, "<" if left < low else "|") for row, left, _ in spans] + [
            (row, right, ">" if right > high else "|") for row, _, right in spans
        ]
        for shape in ("|", "<", ">"):
            places = [(min(max(x, low), high), row) for row, x, shown in ends if shown == shape]
            axes.plot(
                [x for x, _ in places],
                [row for _, row in places],
                marker=shape,
                color=mark.colour,
                linestyle="none",
                markersize=6,
                zorder=2,
            )
        axes.plot([unit.scale * (one["mean"] or 0.0) for _, one in rows], [row for row, _ in rows], **_look(mark), zorder=3)


def _look(mark: _Mark) -> dict[str, Any]:
    return {
        "marker": mark.shape,
        "color": mark.colour,
        "markerfacecolor": mark.colour if mark.filled else "white",
        "markersize": 7,
        "markeredgewidth": 1.5,
        "linestyle": "none",
    }


def _name_rows(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), [shortened(label, LABEL_LETTERS) for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")


def _annotate_rows(axes: Axes, texts: Sequence[str]) -> None:
    """The numbers themselves, in a column at the right."""
    right = axes.twinx()
    right.set_ylim(axes.get_ylim())
    right.set_yticks(range(len(texts)), texts, fontsize=8)
    right.tick_params(axis="y", length=0)
    right.grid(visible=False)
    right.spines[:].set_visible(False)


def _difference_text(difference: Difference, unit: Unit) -> str:
    if difference["mean"] is None:
        return "no pair of seeds yet"
    mean, low, high = (unit.difference(value) for value in (difference["mean"], difference["low"], difference["high"]))
    p = difference["p_t_holm"]
    return mean + (f"  [{low}, {high}]" if low != NOTHING else "") + ("" if p is None else f"  p {_compared(p)}")


def _compared(p: float) -> str:
    text = units.p_value(p)
    return text if text.startswith("<") else f"= {text}"


def _baseline_label(findings: Findings) -> str:
    baseline = findings["baseline"]
    assert baseline is not None, "differences have a baseline"
    arm = findings["arms"][baseline]
    unit, mean = units.unit(findings["metric"]), _mean(arm, findings["metric"])
    return shortened(arm["label"], 30) + (f" ({unit.value(mean)} {unit.name})".replace(" )", ")") if mean is not None else "")


def _legend_of_marks(figure: Sheet, conclusions: Iterable[str]) -> None:
    there = set(conclusions)
    handles = [Line2D([], [], label=mark.meaning, **_look(mark)) for name, mark in MARKS.items() if name in there]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)


def _draw_strip(figure: Sheet, findings: Findings, evidence: Evidence) -> None:
    unit, title = units.unit(findings["metric"]), f"Each finished run: {units.titled(findings['metric'])}"
    scores = {arm["index"]: _scores(evidence, findings, arm["index"]) for arm in findings["arms"]}
    if not any(scores.values()):
        return _empty(figure, title, _waiting(findings))
    axes = figure.add_subplot()
    dots = [(unit.scale * value, row) for row, values in enumerate(scores.values()) for value in values]
    means = [(unit.scale * float(np.mean(values)), row) for row, values in enumerate(scores.values()) if values]
    axes.plot([x for x, _ in dots], [row for _, row in dots], "o", color=BLUE, markersize=6, alpha=0.55, markeredgewidth=0)
    axes.plot([x for x, _ in means], [row for _, row in means], "|", color="#000000", markersize=13, markeredgewidth=2)
    figure.suptitle(title, fontsize=10)
    _name_rows(axes, [arm["label"] for arm in findings["arms"]])
    _annotate_rows(axes, [_count(len(scores[arm["index"]])) for arm in findings["arms"]])
    axes.set_xlabel(f"{units.titled(findings['metric'])}; dot: a run, bar: their mean")
    _in_unit(axes.xaxis.set_major_formatter, unit)
    return None


def _count(runs: int) -> str:
    return f"{runs} run" if runs == 1 else f"{runs} runs"


def _scores(evidence: Evidence, findings: Findings, arm: int) -> list[float]:
    return [score for run in evidence["runs"] if run["arm"] == arm and (score := _score(run, findings)) is not None]


def _score(run: RunEvidence, findings: Findings) -> float | None:
    return run["final"].get(findings["metric"]) if run["state"] == "succeeded" else None


def _in_unit(set_formatter: Callable[[Any], None], unit: Unit) -> None:
    """Ticks without more digits than they need: 91, 91.5."""
    set_formatter(FuncFormatter(lambda x, _: f"{x:.6g}".replace("-", "−") + ("%" if unit.name == "%" else "")))


def _draw_curves(figure: Sheet, findings: Findings) -> None:
    title = f"{units.titled(findings['metric'])} over training".capitalize()
    drawn = [arm for arm in findings["arms"] if arm["curve"]["epochs"]]
    if not drawn:
        return _empty(figure, title, "No run has been evaluated yet.")
    late = _late(drawn)
    figure.suptitle(title, fontsize=10)
    panels = figure.subplots(1, 2 if late is not None else 1, squeeze=False, width_ratios=[1.25, 1] if late is not None else None)[0]
    coloured = _coloured(findings, drawn)
    for axes, since in zip(panels, (-math.inf, late), strict=False):
        _draw_curves_since(axes, findings, drawn, coloured, since)
    panels[0].set_title("whole training")
    if late is not None:
        panels[1].set_title(f"from epoch {late:.4g} on")
    _legend_of_curves(figure, findings, coloured, others=len(drawn) - len(coloured))
    return None


def _late(arms: Sequence[ArmFindings]) -> float | None:
    """The first epoch of the later part; None where that has hardly a point."""
    epochs = sorted({epoch for arm in arms for epoch in arm["curve"]["epochs"]})
    later = [epoch for epoch in epochs if epoch >= LATE_FROM * epochs[-1]]
    return later[0] if LATE_POINTS <= len(later) < len(epochs) else None


def _coloured(findings: Findings, drawn: Sequence[ArmFindings]) -> list[ArmFindings]:
    """The baseline and the best arms, in the experiment's order: so many that they can be told apart."""
    if len(drawn) <= COLOURED:
        return list(drawn)
    sign = 1.0 if findings["direction"] == "max" else -1.0
    by_score = sorted(drawn, key=lambda arm: _rank(_mean(arm, findings["metric"]), sign), reverse=True)
    first = [arm for arm in drawn if arm["index"] == findings["baseline"]]
    chosen = {arm["index"] for arm in [*first, *(arm for arm in by_score if arm not in first)][:COLOURED]}
    return [arm for arm in drawn if arm["index"] in chosen]


def _mean(arm: ArmFindings, metric: str) -> float | None:
    return arm["metrics"][metric]["mean"] if metric in arm["metrics"] else None


def _draw_curves_since(
    axes: Axes, findings: Findings, drawn: Sequence[ArmFindings], coloured: Sequence[ArmFindings], since: float | None
) -> None:
    unit, looks = units.unit(findings["metric"]), _looks(findings, coloured)
    for arm in sorted(drawn, key=lambda arm: arm["index"] in looks):  # the grey ones lie beneath
        epochs, mean, low, high = (np.asarray(arm["curve"][key], dtype=np.float64) for key in ("epochs", "mean", "low", "high"))
        kept = epochs >= (-math.inf if since is None else since)
        colour, dashes = looks.get(arm["index"], (OTHERS, "-"))
        marker = "o" if int(kept.sum()) == 1 else ""
        axes.plot(
            epochs[kept],
            unit.scale * mean[kept],
            color=colour,
            linestyle=dashes,
            linewidth=1.6 if arm["index"] in looks else 0.7,
            marker=marker,
        )
        if arm["index"] in looks:
            axes.fill_between(epochs[kept], unit.scale * low[kept], unit.scale * high[kept], color=colour, alpha=0.13, linewidth=0)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    _in_unit(axes.yaxis.set_major_formatter, unit)


def _looks(findings: Findings, coloured: Sequence[ArmFindings]) -> dict[int, tuple[str, Any]]:
    """Colour and dash by arm; the first is the baseline's."""
    ordered = sorted(coloured, key=lambda arm: arm["index"] != findings["baseline"])
    return {arm["index"]: (COLOURS[place], DASHES[place]) for place, arm in enumerate(ordered)}


def _legend_of_curves(figure: Sheet, findings: Findings, coloured: Sequence[ArmFindings], *, others: int) -> None:
    looks = _looks(findings, coloured)
    handles = [
        Line2D([], [], color=looks[arm["index"]][0], linestyle=looks[arm["index"]][1], label=_legend_label(arm, findings))
        for arm in coloured
    ]
    if others:
        handles.append(Line2D([], [], color=OTHERS, linewidth=0.7, label=f"{others} other arms"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, handlelength=3.5)


def _legend_label(arm: ArmFindings, findings: Findings) -> str:
    label = shortened(arm["label"], LEGEND_LETTERS) + (", baseline" if arm["index"] == findings["baseline"] else "")
    return f"\N{ZERO WIDTH SPACE}{label}" if label.startswith("_") else label  # matplotlib leaves names with _ out of legends


@dataclass(frozen=True)
class _Axis:
    """One setting's, or the metric's: where each value lies, from 0 at the bottom to 1 at the top."""

    title: str
    places: Mapping[str, float]
    """Of each value, by its JSON-like text."""
    ticks: Sequence[tuple[float, str]]


def _draw_parallel(figure: Sheet, findings: Findings, evidence: Evidence) -> None:
    title = f"What was tried, and its {units.in_words(findings['metric'])}"
    runs = [(run, _settings(evidence, run["arm"])) for run in evidence["runs"]]
    paths = list(dict.fromkeys(path for _, settings in runs for path in settings))
    scores = [score for run, _ in runs if (score := _score(run, findings)) is not None]
    if not scores or not paths:
        return _empty(figure, title, _waiting(findings) if paths else "No setting is varied.")
    unit = units.unit(findings["metric"])
    drawn = [_axis(words(path), [settings.get(path) for _, settings in runs]) for path in paths]
    drawn.append(_number_axis(units.titled(findings["metric"]), [score * unit.scale for score in scores], logarithmic=False))
    axes = figure.add_subplot()
    norm = Normalize(min(scores), max(scores)) if max(scores) > min(scores) else Normalize(scores[0] - 1, scores[0] + 1)
    sign = 1.0 if findings["direction"] == "max" else -1.0
    colours = mpl.colormaps["viridis_r" if sign > 0 else "viridis"]
    for run, settings in sorted(runs, key=lambda one: _rank(_score(one[0], findings), sign)):
        score = _score(run, findings)
        heights = [axis.places[_key(settings.get(path))] for path, axis in zip(paths, drawn, strict=False)]
        if score is None:
            axes.plot(heights, color=OTHERS, linewidth=0.7, linestyle=(0, (2, 2)), zorder=1)
        else:
            best = score == sign * max(sign * one for one in scores)
            axes.plot(
                [*heights, drawn[-1].places[_key(score * unit.scale)]], color=colours(norm(score)), linewidth=3.0 if best else 1.0, zorder=2
            )
    _draw_axes(axes, drawn)
    figure.suptitle(title, fontsize=10)
    axes.set_xlabel(f"thick: the best run; dark is better; {len(runs) - len(scores)} of {len(runs)} runs without a final value are dashed")
    return None


def _settings(evidence: Evidence, arm: int) -> dict[str, Any]:
    return {**evidence["arms"][arm]["settings"], **evidence["arms"][arm]["tuned"]}


def _rank(score: float | None, sign: float) -> float:
    return -math.inf if score is None else sign * score


def _key(value: Any) -> str:
    return repr(value)


def _axis(title: str, values: Sequence[Any]) -> _Axis:
    numbers = [float(value) for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < len(values):
        return _category_axis(title, values)
    return _number_axis(title, values, logarithmic=min(numbers) > 0 and max(numbers) >= LOG_SPREAD * min(numbers))


def _number_axis(title: str, values: Sequence[float], *, logarithmic: bool) -> _Axis:
    low, high = float(min(values)), float(max(values))
    if low == high:
        return _Axis(title, {_key(value): 0.5 for value in values}, [(0.5, short(low))])
    scale: Callable[[float], float] = math.log10 if logarithmic else float
    bottom, span = scale(low), scale(high) - scale(low)
    found = (LogLocator() if logarithmic else MaxNLocator(nbins=5)).tick_values(low, high)
    ticks = [float(tick) for tick in found if low <= tick <= high] or [low, high]
    places = {_key(value): (scale(float(value)) - bottom) / span for value in values}
    return _Axis(f"{title}\n(log)" if logarithmic else title, places, [((scale(tick) - bottom) / span, short(tick)) for tick in ticks])


def _category_axis(title: str, values: Sequence[Any]) -> _Axis:
    names = {_key(value): _category(value) for value in values}
    places = {key: place / (len(names) - 1) if len(names) > 1 else 0.5 for place, key in enumerate(names)}
    every = math.ceil(len(names) / MOST_CATEGORIES)
    return _Axis(title, places, [(places[key], names[key]) for key in list(names)[::every]])


def _category(value: Any) -> str:
    if isinstance(value, dict):
        return shortened(" ".join(short(part) for part in value.values() if part is not None) or "on", 16)
    return shortened(short(value), 16)


def _draw_axes(axes: Axes, drawn: Sequence[_Axis]) -> None:
    for x, axis in enumerate(drawn):
        axes.plot([x, x], [0, 1], color="#222222", linewidth=1.0, zorder=3)
        last = x == len(drawn) - 1
        for height, text in axis.ticks:
            axes.plot([x], [height], marker="_", color="#222222", markersize=7, zorder=3)
            axes.annotate(
                text,
                (x, height),
                (6 if last else -6, 0),
                textcoords="offset points",
                ha="left" if last else "right",
                va="center",
                fontsize=8,
                zorder=4,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6},
            )
    axes.set_xticks(range(len(drawn)), [_wrapped(axis.title) for axis in drawn])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_yticks([])
    axes.set_xlim(-0.35, len(drawn) - 1 + 0.3)
    axes.set_ylim(-0.04, 1.04)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def _wrapped(title: str) -> str:
    return "\n".join(textwrap.wrap(title.replace("\n", " "), 18, max_lines=3, placeholder="…"))


def _draw_progress(figure: Sheet, findings: Findings, evidence: Evidence) -> None:
    title = f"{units.titled(findings['metric'])} of each trial".capitalize()
    unit, better = units.unit(findings["metric"]), max if findings["direction"] == "max" else min
    scored = [
        (number, score * unit.scale) for number, run in enumerate(evidence["runs"], 1) if (score := _score(run, findings)) is not None
    ]
    if not scored:
        return _empty(figure, title, _waiting(findings))
    axes = figure.add_subplot()
    numbers, scores = [number for number, _ in scored], [score for _, score in scored]
    best = list(accumulate(scores, better))
    axes.plot(numbers, scores, "o", color=BLUE, markersize=5, alpha=0.7, markeredgewidth=0, label="a trial")
    axes.plot([*numbers, len(evidence["runs"])], [*best, best[-1]], drawstyle="steps-post", color=VERMILLION, label="the best so far")
    ended = [number for number, run in enumerate(evidence["runs"], 1) if run["state"] in ("failed", "cancelled")]
    if ended:
        axes.plot(
            ended,
            [0.03] * len(ended),
            "x",
            color="#555555",
            markersize=5,
            transform=axes.get_xaxis_transform(),
            label="ended without a value",
        )
    figure.suptitle(title, fontsize=10)
    axes.set_xlabel("trial")
    axes.set_xlim(0.5, len(evidence["runs"]) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    _in_unit(axes.yaxis.set_major_formatter, unit)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return None
