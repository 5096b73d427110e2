"""A job's page: every part of it, what can be done there, and that it all stands in the address."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect

from powergrad.client import Client, Job
from tests.browser.conftest import PHONE, Watched, accessible, shoot, zoom
from tests.cli.conftest import endless, tiny

PARTS = ("", "results", "files", "log", "events", "config")


def opened(page: Page, job: Job, query: str = "") -> None:
    page.goto(f"/jobs/{job.id}?{query}")
    expect(page.get_by_role("heading", level=1)).to_have_text(job.name or job.id)
    expect(page.get_by_text("Loading …")).to_have_count(0)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("part", PARTS)
def test_every_part_is_accessible(page: Page, trained: Job, part: str, theme: str) -> None:
    page.emulate_media(color_scheme="dark" if theme == "dark" else "light")
    opened(page, trained, f"tab={part}")
    accessible(page)
    shoot(page, f"job-{part or 'curves'}-{theme}")


@pytest.mark.parametrize("part", PARTS)
def test_every_part_fits_a_phone(page: Page, trained: Job, part: str) -> None:
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    opened(page, trained, f"tab={part}")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    accessible(page)


def test_smoothing_and_scale_outlive_a_reload(page: Page, trained: Job) -> None:
    opened(page, trained)
    page.get_by_label("Smoothing").fill("0.6")
    page.get_by_role("button", name="Loss on a log scale").click()
    expect(page).to_have_url(re.compile("smooth=0.6.*log=1"))
    page.reload()
    expect(page.get_by_label("Smoothing")).to_have_value("0.6")
    expect(page.get_by_role("button", name="Loss on a log scale")).to_have_attribute("aria-pressed", "true")


def test_a_zoom_survives_new_points(page: Page, client: Client) -> None:
    job = client.submit(endless(name="zoomed"))
    opened(page, job)
    plot = page.locator(".u-over").first
    plot.wait_for()
    page.wait_for_function("() => Number(document.querySelector('[data-drawn]').dataset.drawn) > 8")
    zoom(page, plot)
    zoomed = page.url
    before = int(page.locator("[data-drawn]").first.get_attribute("data-drawn") or 0)
    page.wait_for_function("before => Number(document.querySelector('[data-drawn]').dataset.drawn) > before + 2", arg=before)
    assert page.url == zoomed
    client.cancel(job.id)


def test_a_job_is_paused_resumed_and_cancelled(page: Page, client: Client) -> None:
    job = client.submit(endless(name="moved"))
    opened(page, job)
    page.locator("figure canvas").first.wait_for()
    page.get_by_role("button", name="Pause").click()
    page.get_by_role("button", name="Resume").click()
    expect(page.get_by_role("button", name="Pause")).to_be_visible()
    page.get_by_role("button", name="Cancel …").click()
    page.get_by_role("button", name="Cancel the job").click()
    expect(page.get_by_role("button", name="Retry")).to_be_visible()
    assert client.get(job.id).state == "cancelled"


def test_name_labels_and_notes_are_changed(page: Page, client: Client) -> None:
    job = client.submit(tiny(name="before"))
    opened(page, job)
    page.get_by_role("button", name="Edit", exact=True).click()
    page.get_by_label("Name", exact=True).fill("after")
    page.get_by_label("Labels").fill("team=vision\nno label")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("alert")).to_contain_text("“no label” is no label")
    page.get_by_label("Labels").fill("team=vision")
    page.get_by_label("Notes").fill("for the report")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("after")
    found = client.get(job.id)
    assert (found.labels, found.notes) == ({"team": "vision"}, "for the report")


def test_a_checkpoint_is_pinned_and_downloaded(page: Page, client: Client, trained: Job) -> None:
    opened(page, trained, "tab=files")
    row = page.get_by_role("row").filter(has_text="latest")
    row.get_by_role("button").click()
    expect(row.get_by_role("button")).to_have_text("Unpin")
    assert any(one.pinned for one in client.checkpoints(trained.id))
    with page.expect_download() as download:
        row.get_by_role("link", name=re.compile("Download")).click()
    assert download.value.path().stat().st_size > 10_000
    row.get_by_role("button").click()
    expect(row.get_by_role("button")).to_have_text("Pin")


def test_the_log_is_searched(page: Page, trained: Job) -> None:
    opened(page, trained, "tab=log")
    page.get_by_label("Find").fill("CHECKPOINT")
    expect(page.get_by_role("status").filter(has_text=" lines")).to_have_text(re.compile(r"^[1-9]\d* of \d+ lines$"))
    expect(page.locator("mark").first).to_have_text("checkpoint")
    page.get_by_label("Find").fill("no such words")
    expect(page.get_by_text("No line has this text.")).to_be_visible()


def test_two_jobs_are_told_apart(page: Page, client: Client, trained: Job) -> None:
    other = client.submit(tiny(name="other", epochs=3, loss={"alpha": 0.5}))
    opened(page, trained, f"tab=config&with={other.id}")
    differing = page.get_by_role("row").filter(has_text="(differs)")
    expect(differing.filter(has_text="alpha")).to_contain_text("0.5")
    expect(differing.filter(has_text="name")).to_contain_text("other")


def test_what_is_copied_makes_the_same_job(page: Page, client: Client, trained: Job) -> None:
    opened(page, trained, "tab=config")
    page.get_by_role("button", name="Python", exact=True).click()
    text = page.get_by_role("region", name="as Python").inner_text()
    told: dict[str, object] = {}
    exec(text[text.index("spec =") : text.index("with Client")], told)  # the page's own words, as a user would run them
    assert client.dry_run(told["spec"]) == trained.spec  # type: ignore[arg-type]


def test_an_unknown_job_is_said_to_be_unknown(page: Page, watched: Watched) -> None:
    watched.expected = ("404",)
    page.goto("/jobs/job_01KAQZ5V3N8T4W6Y7C9E1G2H3J")
    expect(page.get_by_role("alert")).to_be_visible()
