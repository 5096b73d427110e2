"""What grows by itself: the first run's path to its first curve, growth, and a connection that breaks and comes back."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from powergrad.cli.stack import Stack
from powergrad.client import Client
from tests.browser.conftest import WIDE, Watched, shoot
from tests.browser.relay import Relay
from tests.cli.conftest import TRAINED_S, endless, tiny


@pytest.fixture
def relay(site: Stack) -> Iterator[Relay]:
    with Relay(int(site.url.rpartition(":")[2])) as relay:
        yield relay


@pytest.fixture
def behind(browser: Browser, relay: Relay) -> Iterator[Page]:
    """A page that reaches the server through the relay; what it says of broken connections is expected."""
    context = browser.new_context(base_url=relay.url, locale="en-US", viewport=WIDE)  # type: ignore[arg-type]
    context.set_default_timeout(30_000)
    yield context.new_page()
    context.close()


def drawn(page: Page) -> int:
    """How often the first plot was drawn."""
    return int(page.locator("[data-drawn]").first.get_attribute("data-drawn") or 0)


def test_from_the_first_job_to_its_first_curve(page: Page, client: Client) -> None:
    job = client.submit(tiny(name="first", epochs=3))
    page.goto("/")
    page.get_by_role("link", name="first", exact=True).first.click()
    expect(page).to_have_url(re.compile(f"/jobs/{job.id}"))
    page.locator("figure canvas").first.wait_for()
    expect(page.get_by_text("succeeded").first).to_be_visible(timeout=TRAINED_S * 1000)
    expect(page.get_by_test_id("live")).to_have_text("ended")
    shoot(page, "first-curve")


def test_curves_grow_while_the_job_trains(page: Page, client: Client) -> None:
    job = client.submit(endless(name="growing"))
    page.goto(f"/jobs/{job.id}")
    page.locator("figure canvas").first.wait_for()
    expect(page.get_by_test_id("live")).to_have_text("live")
    before = drawn(page)
    page.wait_for_function("before => Number(document.querySelector('[data-drawn]').dataset.drawn) > before + 2", arg=before)
    client.cancel(job.id)
    expect(page.get_by_text("cancelled").first).to_be_visible()


def test_a_broken_connection_is_shown_and_made_good(behind: Page, relay: Relay, client: Client) -> None:
    job = client.submit(endless(name="broken-line"))
    heard: list[str] = []
    behind.on("request", lambda request: heard.append(request.url))
    behind.goto(f"/jobs/{job.id}")
    behind.locator("figure canvas").first.wait_for()
    expect(behind.get_by_test_id("live")).to_have_text("live")
    relay.is_down = True
    assert relay.cut() > 0
    expect(behind.get_by_test_id("live")).to_have_text(re.compile("reconnecting"))
    shoot(behind, "reconnecting")
    relay.is_down = False
    expect(behind.get_by_test_id("live")).to_have_text("live")
    before = drawn(behind)
    behind.wait_for_function("before => Number(document.querySelector('[data-drawn]').dataset.drawn) > before", arg=before)
    again = [url for url in heard if f"/{job.id}/events?after=" in url]
    assert len(again) >= 2, "the stream was opened again"
    assert int(again[-1].rpartition("=")[2]) > 0, "from the last event that was seen, not from the first"
    client.cancel(job.id)


def test_a_job_that_is_not_there_is_told_so(page: Page, watched: Watched) -> None:
    watched.expected = ("404",)
    page.goto("/jobs/job_01J00000000000000000000000")
    expect(page.get_by_role("alert")).to_contain_text("job_01J00000000000000000000000")
