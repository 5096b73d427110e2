"""What users name is text, wherever it is shown."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, expect

from powergrad.client import Client
from tests.browser.conftest import Watched, shoot
from tests.cli.conftest import TRAINED_S, tiny

PAYLOADS = (
    "<img src=/icon.svg onload=window.broken=1>",
    "<script>window.broken=1</script>",
    '"><svg onload=window.broken=1>',
    "{@html 'x'}<b onmouseover=window.broken=1>bold</b>",
)


@pytest.fixture
def hostile(client: Client) -> str:
    """A job that ended whose every free text is markup; its id. A name may hold letters, figures and three signs only."""
    job = client.submit(tiny(name="hostile", labels={"team": PAYLOADS[0], "owner": PAYLOADS[1]}))
    client.update(job.id, {"notes": "\n".join(PAYLOADS)})
    return client.wait(job.id, TRAINED_S).id


def test_markup_in_names_is_shown_and_not_run(page: Page, client: Client, hostile: str) -> None:
    shows = {
        "/jobs": page.get_by_role("link", name="hostile", exact=True),
        f"/jobs/{hostile}": page.locator("figure canvas"),
        f"/compare?job={hostile}": page.locator("figure canvas"),
        f"/new?from={hostile}": page.locator("textarea"),
        "/jobs?group=label.team": page.get_by_text(PAYLOADS[0]),
    }
    for path, shown in shows.items():
        page.goto(path)
        shown.first.wait_for()
        assert page.evaluate("window.broken") is None, path
        assert page.locator("main b, main script").count() == 0, path
    page.goto(f"/jobs/{hostile}")
    expect(page.get_by_text(PAYLOADS[0]).first).to_be_visible()
    expect(page.get_by_text(PAYLOADS[2]).first).to_be_visible()
    shoot(page, "hostile")


@pytest.mark.parametrize("query", ["q=<script>window.broken=1</script>", 'sort="><img src=x onerror=window.broken=1>', "state=nothing"])
def test_a_hostile_address_runs_nothing(page: Page, watched: Watched, query: str) -> None:
    watched.expected = ("422",)
    page.goto(f"/jobs?{query}")
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    assert page.evaluate("window.broken") is None
