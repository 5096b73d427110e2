"""A job's metrics as columns, as data frames and plotting libraries take them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from powergrad.client import notebook

STEP = "step"

Value = int | float | None


class MetricsTable(dict[str, list[Value]]):
    """Columns of equal length by name: `step`, ascending, then a metric each; None where it was not measured at that step.

    `pandas.DataFrame(table)` and `polars.DataFrame(table)` take it as it is.
    """

    @property
    def steps(self) -> list[int]:
        return [int(step) for step in self[STEP] if step is not None]

    def rows(self) -> list[dict[str, Value]]:
        """The same as a dictionary a step."""
        return [dict(zip(self, row, strict=True)) for row in zip(*self.values(), strict=True)]

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric, where it was measured: what `plot(*table.series("val_top1"))` wants. Raises KeyError."""
        measured = [(step, float(value)) for step, value in zip(self.steps, self[name], strict=True) if value is not None]
        return [step for step, _ in measured], [value for _, value in measured]

    def _repr_html_(self) -> str:
        return notebook.columns(self)


def table_of(answer: dict[str, Any], names: Iterable[str]) -> MetricsTable:
    """From the API's answer; metrics without a point have a column all the same where they were asked for by name."""
    found = {one["name"]: dict(zip(one["steps"], one["values"], strict=True)) for one in answer["data"]}
    for name in names:
        found.setdefault(name, {})
    steps = sorted({step for points in found.values() for step in points})
    return MetricsTable({STEP: steps, **{name: [points.get(step) for step in steps] for name, points in sorted(found.items())}})
