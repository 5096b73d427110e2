"""The benchmark of the dashboard runs and its result holds together; it is here because it needs the browser."""

from __future__ import annotations

import pytest
from playwright.sync_api import Browser

from tests.benchmarks.test_commands import SECONDS, printed


@pytest.mark.timeout(SECONDS)
def test_ui_measures_first_curves_and_inputs(browser: Browser) -> None:
    result = printed("benchmarks.ui", "--quick")
    assert result["ratio"] == pytest.approx(result["tensorboard_ms"]["median"] / result["from_navigation_ms"]["median"])
    assert 0 < result["first_curve_ms"]["median"] < result["from_navigation_ms"]["median"]
    assert result["interaction"]["n"] > 20
    assert result["mlflow_ms"] is None
