"""What all pages share: where they load from, who may look, themes, links."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import httpx2
import pytest
from playwright.sync_api import BrowserContext, Page, expect

from powergrad.cli.stack import Stack
from powergrad.client import Job
from tests.browser.conftest import PHONE, Watched, accessible, shoot

PATHS = ("/jobs", "/experiments", "/compare", "/datasets", "/workers", "/new")
MOST_BYTES = 150_000
BUILT = Path(__file__).resolve().parents[2] / "api" / "dashboard"


def test_everything_is_small(site: Stack) -> None:
    files = [path for path in BUILT.rglob("*") if path.suffix in (".js", ".css", ".html", ".svg")]
    assert sum(len(gzip.compress(path.read_bytes())) for path in files) < MOST_BYTES


@pytest.mark.parametrize("path", ["/", *PATHS, "/jobs/job_unknown"])
def test_pages_come_with_a_content_policy(site: Stack, path: str) -> None:
    answer = httpx2.get(site.url + path, trust_env=False)
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    assert answer.headers["cache-control"] == "no-cache"


def test_what_is_no_page_is_a_problem(site: Stack) -> None:
    answer = httpx2.get(f"{site.url}/no/such/page", trust_env=False)
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")


def test_assets_are_kept_for_ever(site: Stack) -> None:
    [script] = BUILT.glob("assets/*.js")
    answer = httpx2.get(f"{site.url}/assets/{script.name}", trust_env=False)
    assert "immutable" in answer.headers["cache-control"]


def test_the_policy_holds(page: Page, watched: Watched) -> None:
    watched.expected = ("Content Security Policy", "violates the following")
    page.goto("/jobs")
    page.get_by_role("heading", level=1).wait_for()
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=/icon.svg onload=\"window.broken = 1\">')")
    page.evaluate("{ const made = document.createElement('script'); made.textContent = 'window.broken = 1'; document.body.append(made) }")
    assert page.evaluate("window.broken") is None


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("path", PATHS)
def test_pages_are_accessible_in_both_themes(page: Page, trained: Job, path: str, theme: str) -> None:
    page.emulate_media(color_scheme="dark" if theme == "dark" else "light")
    page.goto(path)
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    expect(page.get_by_text("Loading …")).to_have_count(0)
    accessible(page)
    shoot(page, f"{path.strip('/')}-{theme}")


@pytest.mark.parametrize("path", PATHS)
def test_a_phone_shows_pages_whole(page: Page, trained: Job, path: str) -> None:
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    page.goto(path)
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    expect(page.get_by_text("Loading …")).to_have_count(0)
    shoot(page, f"{path.strip('/')}-phone")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_the_theme_is_chosen_and_remembered(page: Page) -> None:
    page.goto("/jobs")
    page.get_by_label("Theme").select_option("dark")
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    page.reload()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")


def test_links_lead_through_the_pages_and_back(page: Page) -> None:
    page.goto("/jobs")
    page.evaluate("window.kept = true")
    page.get_by_role("navigation").get_by_role("link", name="Workers").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Workers")
    page.go_back()
    expect(page).to_have_url(re.compile("/jobs$"))
    assert page.evaluate("window.kept"), "no page was loaded anew"


def test_nothing_calls_elsewhere_in_the_documentation(context: BrowserContext) -> None:
    page = context.new_page()
    page.goto("/docs")
    expect(page.get_by_text("Train image classifiers over HTTP.").first).to_be_visible()
