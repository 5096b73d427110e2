"""The dashboard in a real Chromium before a real embedded stack: one of each for all tests."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Locator, Page, Request, expect, sync_playwright

from powergrad.cli.stack import Stack
from powergrad.client import Client, Job
from tests.cli.conftest import READY_S, TRAINED_S, tiny

ROOT = Path(__file__).resolve().parents[2]
SHOTS = Path(os.environ.get("POWERGRAD_SHOTS", ROOT / "test-results"))
"""Where screenshots are kept, to be looked at."""
AXE = ROOT / "web" / "node_modules" / "axe-core" / "axe.min.js"
NAMES = ("chromium", "chromium-browser", "google-chrome")
# as root there is no sandbox; the rest keeps the browser from calling home
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
             "--disable-sync"]  # fmt: skip
PATIENCE_MS = 30_000
expect.set_options(timeout=PATIENCE_MS)
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack that is ready, with two slots."""
    with Stack(tmp_path_factory.mktemp("site"), port=0, slots=2) as stack:
        stack.ready(READY_S)
        yield stack


@pytest.fixture
def client(site: Stack) -> Iterator[Client]:
    site.tend()
    with Client(site.url) as made:
        yield made


@pytest.fixture(scope="session")
def trained(site: Stack) -> Job:
    """A job that has succeeded; tests only read it."""
    with Client(site.url) as client:
        job = client.submit(tiny(name="trained", labels={"kept": "yes"}, epochs=3))
        return client.wait(job.id, TRAINED_S)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("needs Chromium: scripts/browser-check installs it")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield browser
        browser.close()


@dataclass
class Watched:
    """What a page did that it must not do."""

    origin: str
    complaints: list[str] = field(default_factory=list)
    expected: tuple[str, ...] = ()
    """Parts of console messages that the test provokes."""

    def attach(self, context: BrowserContext) -> None:
        context.on("request", self._request)
        context.on("console", self._console)
        context.on("weberror", lambda error: self.complaints.append(f"exception: {error.error}"))

    def _request(self, request: Request) -> None:
        if not request.url.startswith((self.origin, "blob:")):
            self.complaints.append(f"asked another origin: {request.url}")

    def _console(self, message: ConsoleMessage) -> None:
        # the content policy's violations are told here too
        if message.type in ("error", "warning") and not any(part in message.text for part in self.expected):
            self.complaints.append(f"{message.type}: {message.text}")


@pytest.fixture
def watched(site: Stack) -> Watched:
    return Watched(site.url)


@pytest.fixture
def context(browser: Browser, site: Stack, watched: Watched) -> Iterator[BrowserContext]:
    context = browser.new_context(base_url=site.url, locale="en-US", viewport=WIDE)  # type: ignore[arg-type]
    context.set_default_timeout(PATIENCE_MS)
    watched.attach(context)
    yield context
    context.close()
    assert not watched.complaints


@pytest.fixture
def page(context: BrowserContext) -> Page:
    """A fresh page, whose every complaint fails the test."""
    return context.new_page()


def shoot(page: Page, name: str) -> None:
    """Keep a picture of the whole page."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png", full_page=True)


def zoom(page: Page, plot: Locator) -> None:
    """Drag over a plot from a fifth to three fifths of its width."""
    box = plot.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + 50, steps=5)
    page.mouse.up()
    expect(page).to_have_url(re.compile("zoom="))


def accessible(page: Page) -> None:
    """No finding of axe against WCAG 2.2 A and AA."""
    page.evaluate(AXE.read_text())
    rules = {"runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}}
    found: list[dict[str, Any]] = page.evaluate("rules => axe.run(document, rules).then(done => done.violations)", rules)
    assert not [f"{one['id']}: {one['help']}: {one['nodes'][0]['html']}" for one in found]
