"""Plots in a terminal: every curve is there, where it belongs, and nothing is drawn where there is no room."""

from __future__ import annotations

import io
import math
import re

import pytest
from rich.console import Console

from powergrad.cli.curves import COLOURS, HIGHEST, LETTERS, Curve, Plots, in_colour, mark, whole_ticks

ANSI = re.compile(r"\x1b\[[0-9;]*m")


def rising(name: str = "a", *, count: int = 20, scale: float = 1.0) -> Curve:
    return Curve(name, range(count), [scale * place / count for place in range(count)])


def printed(plots: Plots, *, width: int = 80, height: int = 40, colour: bool = False) -> str:
    target = Console(file=io.StringIO(), force_terminal=True, width=width, height=height, no_color=not colour, color_system="256")
    target.print(plots)
    assert isinstance(target.file, io.StringIO)
    return target.file.getvalue()


def test_a_rising_curve_goes_from_the_lower_left_to_the_upper_right() -> None:
    lines = [line for line in printed(Plots({"val_loss": [rising()]})).splitlines() if "│" in line or "┤" in line]
    columns = [line.index("a") for line in lines if "a" in line.partition("│")[2] or "a" in line.partition("┤")[2]]
    assert len(columns) > 5
    assert columns == sorted(columns, reverse=True)


def test_accuracies_are_percent_and_steps_whole_numbers() -> None:
    told = printed(Plots({"val_top1": [rising(count=2000, scale=0.5)]}))
    assert "validation top-1 accuracy (%)" in told
    assert re.search(r"^ ?50\.0", told, re.MULTILINE)
    assert "1,999" in told


def test_each_run_has_a_colour_or_a_letter() -> None:
    series = {"val_loss": [rising("a"), rising("b", scale=2.0)]}
    assert len({mark(place, colour=True).style for place in range(len(COLOURS))}) == len(COLOURS)
    assert {code for code in ANSI.findall(printed(Plots(series), colour=True)) if code != "\x1b[0m"} == {"\x1b[94m", "\x1b[92m"}
    bare = printed(Plots(series))
    assert "\x1b[9" not in bare
    assert {str(mark(0, colour=False)), str(mark(1, colour=False))} == set(LETTERS[:2])
    assert {"a", "b"} <= set(bare)


def test_colours_are_those_of_the_terminal_s_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert in_colour(Console(force_terminal=True, color_system="256"))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not in_colour(Console(force_terminal=True, color_system="256"))
    assert not in_colour(Console(file=io.StringIO()))


@pytest.mark.parametrize(("width", "height"), [(39, 40), (80, 11)])
def test_nothing_is_drawn_where_there_is_no_room(width: int, height: int) -> None:
    assert printed(Plots({"val_loss": [rising()]}), width=width, height=height).strip() == ""


@pytest.mark.parametrize("curve", [Curve("a", (), ()), Curve("a", (1,), (0.5,)), Curve("a", (1, 2), (None, math.nan))])
def test_nothing_is_drawn_before_there_is_a_line(curve: Curve) -> None:
    assert printed(Plots({"val_loss": [curve]})).strip() == ""


@pytest.mark.parametrize("width", [40, 79, 80, 99, 100, 150, 300])
def test_plots_keep_to_the_screen(width: int) -> None:
    told = ANSI.sub("", printed(Plots({"val_top1": [rising()], "train_loss": [rising()]}), width=width))
    assert max(len(line) for line in told.splitlines()) <= width
    assert len(told.splitlines()) <= HIGHEST
    assert ("training loss" in told) == (width >= 100), "two stand beside each other where there is room"


def test_a_constant_and_a_curve_with_gaps_can_be_drawn() -> None:
    told = printed(Plots({"val_loss": [Curve("a", range(9), [1.0] * 9), Curve("b", range(9), [None, 1.0, math.inf, 2.0, *[None] * 5])]}))
    assert {"a", "b"} <= set(told)


def test_ticks_are_different_steps() -> None:
    assert whole_ticks([], count=4) == []
    assert whole_ticks([7], count=4) == [7]
    assert whole_ticks([1, 2], count=6) == [1, 2]
    assert whole_ticks(range(101), count=5) == [0, 25, 50, 75, 100]
