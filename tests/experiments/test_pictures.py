"""The figures: what the findings say is where they say it, whatever the shape of the experiment and whatever things are called."""

from __future__ import annotations

import struct
import xml.etree.ElementTree as ET
from collections.abc import Callable

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from powergrad.drawing import WIDTH_IN, settle
from powergrad.experiments import pictures
from powergrad.experiments.findings import Evidence, Findings
from tests.experiments import samples

SVG = "{http://www.w3.org/2000/svg}"
DRAWINGS: dict[str, Callable[[Findings, Evidence], Figure]] = {
    "forest": lambda found, _: pictures.forest(found),
    "curves": lambda found, _: pictures.curves(found),
    "strip": pictures.strip,
    "parallel": pictures.parallel,
    "progress": pictures.progress,
    "summary": pictures.summary,
}


def sample(shape: Callable[[], Evidence]) -> tuple[Findings, Evidence]:
    evidence = shape()
    return samples.findings(evidence), evidence


def drawn_text(figure: Figure) -> str:
    """Every word of the picture, as a reader of the SVG gets it."""
    root = ET.fromstring(pictures.render(figure, "svg"))
    return "\n".join("".join(text.itertext()) for text in root.iter(f"{SVG}text"))


def ticks(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def points(line: Line2D) -> NDArray[np.float64]:
    """(N, 2)."""
    return np.asarray(line.get_xydata(), dtype=np.float64)


def overhang(figure: Figure) -> float:
    """How far anything reaches out of the picture once it is laid out, in inches."""
    settle(figure)
    box, frame = figure.get_tightbbox(), figure.bbox_inches
    return float(max(frame.x0 - box.x0, box.x1 - frame.x1, frame.y0 - box.y0, box.y1 - frame.y1))


@pytest.mark.parametrize("shape", samples.SHAPES)
def test_every_figure_of_every_shape_is_drawn_in_its_frame(shape: str) -> None:
    findings, evidence = sample(samples.SHAPES[shape])
    for name, draw in DRAWINGS.items():
        figure = draw(findings, evidence)
        assert overhang(figure) < 0.02, name


def test_a_row_of_the_forest_shows_the_mean_and_the_interval() -> None:
    findings, _ = sample(samples.six_tuned)
    axes, numbers = pictures.forest(findings).axes
    centres = {row: x for line in axes.lines if line.get_markersize() == 7 for x, row in points(line)}
    for row, arm in enumerate(findings["arms"][1:]):
        difference = arm["difference"]
        assert difference is not None
        assert centres[row] == pytest.approx(100 * (difference["mean"] or 0))
        assert ticks(axes)[row] == arm["label"]
        assert ticks(numbers)[row].startswith(f"{100 * (difference['mean'] or 0):+.2f}  [")
    ends = [np.asarray(path.vertices) for found in axes.collections for path in found.get_paths()]
    spans = sorted((of_path[0, 1], *of_path[:, 0]) for of_path in ends)
    expected = [
        (row, 100 * (arm["difference"]["low"] or 0), 100 * (arm["difference"]["high"] or 0))
        for row, arm in enumerate(findings["arms"][1:])
        if arm["difference"] is not None
    ]
    np.testing.assert_allclose(spans, expected)


def test_conclusions_differ_in_shape_and_not_in_colour_alone() -> None:
    looks = {(mark.shape, mark.filled) for mark in pictures.MARKS.values()}
    assert len(looks) == len(pictures.MARKS)
    coloured = list(zip(pictures.COLOURS, map(str, pictures.DASHES), strict=True))
    assert len(set(coloured)) == pictures.COLOURED


def test_one_interval_that_is_far_wider_than_the_others_is_cut_and_its_numbers_still_stand_beside_it() -> None:
    findings, _ = sample(samples.six_tuned)
    wide = findings["arms"][3]["difference"]
    assert wide is not None
    wide["low"], wide["high"] = -0.9, 0.95
    axes, numbers = pictures.forest(findings).axes
    assert axes.get_xlim()[1] < 20
    assert {"<", ">"} <= {str(line.get_marker()) for line in axes.lines if len(points(line))}
    assert "[−90.00, +95.00]" in ticks(numbers)[2]


def test_the_forest_says_which_way_is_better() -> None:
    assert "further right is better" in drawn_text(pictures.forest(sample(samples.two_arms)[0]))
    assert "further left is better" in drawn_text(pictures.forest(sample(samples.lower_is_better)[0]))


def test_the_curves_are_the_findings_in_percent() -> None:
    findings, _ = sample(samples.two_arms)
    whole, late = pictures.curves(findings).axes
    for line, arm in zip(whole.lines, findings["arms"], strict=True):
        np.testing.assert_allclose(points(line)[:, 0], np.asarray(arm["curve"]["epochs"]))
        np.testing.assert_allclose(points(line)[:, 1], 100 * np.asarray(arm["curve"]["mean"]))
    assert points(late.lines[0])[:, 0].min() >= 20


def test_of_many_arms_the_baseline_and_the_best_are_coloured() -> None:
    findings, _ = sample(lambda: samples.many(12))
    assert findings["best"] not in (None, 0)
    text = drawn_text(pictures.curves(findings))
    assert f"{12 - pictures.COLOURED} other arms" in text
    assert f"{findings['arms'][0]['label']}, baseline" in text
    assert findings["arms"][findings["best"] or 0]["label"] in text


def test_parallel_coordinates_put_each_value_at_its_place() -> None:
    findings, evidence = sample(samples.search)
    axes = pictures.parallel(findings, evidence).axes[0]
    best = next(line for line in axes.lines if line.get_linewidth() == 3.0)
    settings = findings["arms"][findings["best"] or 0]["settings"]
    rates = np.log10([arm["settings"]["optimizer.lr"] for arm in findings["arms"]])
    place = (np.log10(settings["optimizer.lr"]) - rates.min()) / (rates.max() - rates.min())
    assert points(best)[1, 1] == pytest.approx(place)
    assert points(best)[-1, 1] == pytest.approx(1.0)
    text = drawn_text(pictures.parallel(findings, evidence))
    for word in ("learning rate", "(log)", "adamw", "agc 0.01", "none"):
        assert word in text


def test_the_best_so_far_never_gets_worse() -> None:
    findings, evidence = sample(samples.search)
    steps = next(line for line in pictures.progress(findings, evidence).axes[0].lines if line.get_label() == "the best so far")
    values = points(steps)[:, 1]
    assert (np.diff(values) >= 0).all()
    best = findings["arms"][findings["best"] or 0]["metrics"]["val_top1"]["mean"]
    assert values[-1] == pytest.approx(100 * (best or 0))


def test_where_nothing_has_finished_the_picture_says_so() -> None:
    assert "0 of 6 runs have finished" in drawn_text(pictures.summary(*sample(samples.nothing_finished)))
    assert "0 of 2 runs have finished" in drawn_text(pictures.summary(*sample(samples.nothing_searched)))


def test_names_are_drawn_as_they_are_and_set_no_formula() -> None:
    text = drawn_text(pictures.summary(*sample(samples.hostile)))
    assert samples.PAYLOAD in text
    assert "$x^2$" in text
    assert b"<script" not in pictures.render(pictures.summary(*sample(samples.hostile)), "svg")


def test_a_name_with_an_underscore_first_and_letters_that_xml_forbids_is_in_the_legend() -> None:
    findings, _ = sample(samples.two_arms)
    findings["arms"][1]["label"] = "_\x00run\x1b"
    assert "_\N{REPLACEMENT CHARACTER}run" in drawn_text(pictures.curves(findings))


def test_equal_findings_give_equal_bytes() -> None:
    for kind in ("svg", "png"):
        first, second = (pictures.render(pictures.summary(*sample(samples.two_arms)), kind) for _ in range(2))
        assert first == second


def test_a_png_is_wide_enough_for_paper() -> None:
    content = pictures.render(pictures.forest(sample(samples.two_arms)[0]), "png")
    assert struct.unpack(">I", content[16:20])[0] == WIDTH_IN * pictures.PNG_DPI


def test_sixty_arms_have_a_row_each() -> None:
    figure = pictures.forest(sample(lambda: samples.many(60))[0])
    assert len(ticks(figure.axes[0])) == 59
    assert overhang(figure) < 0.02


def test_drawing_leaves_matplotlib_as_it_was() -> None:
    before = dict(mpl.rcParams)
    pictures.render(pictures.summary(*sample(samples.two_arms)), "svg")
    assert dict(mpl.rcParams) == before
