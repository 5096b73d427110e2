"""Metrics as columns."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from powergrad.client import MetricsTable
from powergrad.client.series import table_of

ANSWER: dict[str, Any] = {
    "data": [
        {"name": "val_top1", "total": 2, "steps": [4, 8], "values": [0.5, None]},
        {"name": "train_loss", "total": 3, "steps": [2, 4, 6], "values": [2.0, 1.5, 1.0]},
    ]
}


def test_columns_are_aligned_by_step() -> None:
    table = table_of(ANSWER, ())
    assert table == {"step": [2, 4, 6, 8], "train_loss": [2.0, 1.5, 1.0, None], "val_top1": [None, 0.5, None, None]}
    assert table.rows()[1] == {"step": 4, "train_loss": 1.5, "val_top1": 0.5}


def test_a_series_has_only_what_was_measured() -> None:
    assert table_of(ANSWER, ()).series("val_top1") == ([4], [0.5])
    with pytest.raises(KeyError):
        table_of(ANSWER, ()).series("val_loss")


def test_what_was_asked_for_has_a_column_even_without_points() -> None:
    assert table_of({"data": []}, ["val_loss"]) == {"step": [], "val_loss": []}


def test_a_long_table_shows_its_ends_in_a_notebook() -> None:
    html = MetricsTable({"step": list(range(1000)), "<b>": [0.5] * 1000})._repr_html_()
    assert ">0<" in html
    assert ">999<" in html
    assert ">500<" not in html
    assert "1,000 rows × 2 columns" in html
    assert "<b>" not in html


points = st.dictionaries(st.integers(0, 50), st.none() | st.floats(allow_nan=False), max_size=20)


@given(st.dictionaries(st.sampled_from(["train_loss", "val_top1", "lr"]), points))
def test_every_point_is_where_it_was_and_columns_are_of_equal_length(series: dict[str, dict[int, float | None]]) -> None:
    answer = {
        "data": [{"name": name, "steps": sorted(held), "values": [held[step] for step in sorted(held)]} for name, held in series.items()]
    }
    table = table_of(answer, ())
    assert len({len(column) for column in table.values()}) == 1
    assert table.steps == sorted({step for held in series.values() for step in held})
    for name, held in series.items():
        assert dict(zip(table.steps, table[name], strict=True)) == {step: held.get(step) for step in table.steps}
