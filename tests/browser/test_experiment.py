"""Experiments: the verdict, the differences and the runs behind them."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, expect

from powergrad.cli.stack import Stack
from powergrad.client import Client
from tests.browser.conftest import PHONE, accessible, shoot
from tests.cli.conftest import TRAINED_S, tiny


@pytest.fixture(scope="module")
def judged(site: Stack) -> str:
    """Id of an experiment with two arms that has ended and has been analysed."""
    with Client(site.url) as client:
        asked = client.ask({"name": "judged", "spec": tiny(epochs=2), "grid": {"loss.alpha": [1.0, 0.5]}, "seeds": 2})
        return asked.wait(4 * TRAINED_S).id


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_verdict_comes_first(page: Page, judged: str, theme: str) -> None:
    page.emulate_media(color_scheme="dark" if theme == "dark" else "light")
    page.goto(f"/experiments/{judged}")
    expect(page.get_by_test_id("verdict")).to_be_visible()
    expect(page.get_by_role("row").filter(has_text="judged-a1-s1")).to_be_visible()
    page.locator("figure canvas").first.wait_for()
    expect(page.locator("svg .zero").first).to_be_attached()
    accessible(page)
    shoot(page, f"experiment-{theme}")


def test_a_phone_shows_it_whole(page: Page, judged: str) -> None:
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    page.goto(f"/experiments/{judged}")
    page.locator("figure canvas").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    accessible(page)


def test_the_list_leads_to_it(page: Page, judged: str) -> None:
    page.goto("/experiments")
    page.get_by_role("link", name="judged").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("judged")
    page.get_by_role("link", name="judged-a0-s0").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("judged-a0-s0")
