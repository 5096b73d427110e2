"""Many runs in one picture: groups with bands, toggles, zoom, and what differs between the runs."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect

from powergrad.cli.stack import Stack
from powergrad.client import Client, Job
from tests.browser.conftest import PHONE, Watched, accessible, shoot, zoom
from tests.cli.conftest import TRAINED_S, endless, tiny

SET = "label.set=compared"


@pytest.fixture(scope="module")
def runs(site: Stack) -> list[Job]:
    """Two alphas of two seeds each, ended."""
    with Client(site.url) as client:
        jobs = [
            client.submit(tiny(name=f"c{alpha}-s{seed}", labels={"set": "compared"}, loss={"alpha": alpha}, seed=seed, epochs=4))
            for alpha in (1.0, 0.25)
            for seed in (0, 1)
        ]
        return [client.wait(job.id, TRAINED_S) for job in jobs]


def opened(page: Page, query: str = SET) -> None:
    page.goto(f"/compare?{query}")
    expect(page.get_by_role("heading", level=1)).to_have_text("Compare")
    page.locator("figure canvas").first.wait_for()
    expect(page.get_by_role("columnheader", name="loss.alpha")).to_be_visible()


def lines(page: Page) -> int:
    """How many are drawn, as the picture says of itself."""
    told = page.get_by_role("figure").get_attribute("aria-label") or ""
    found = re.search(r"of (\d+) lines", told)
    assert found is not None, told
    return int(found[1])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_overlay_is_accessible(page: Page, runs: list[Job], theme: str) -> None:
    page.emulate_media(color_scheme="dark" if theme == "dark" else "light")
    opened(page)
    assert lines(page) == len(runs)
    accessible(page)
    shoot(page, f"compare-{theme}")


def test_a_phone_shows_it(page: Page, runs: list[Job]) -> None:
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    opened(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    accessible(page)


def test_what_differs_stands_beside_the_best_values(page: Page, runs: list[Job]) -> None:
    opened(page)
    row = page.get_by_role("row").filter(has_text="c0.25-s1")
    best = runs[3].metrics.best["val_top1"]
    assert best is not None
    expect(row).to_contain_text("0.25")
    expect(row).to_contain_text(f"{100 * best:.1f}"[:3])
    expect(page.get_by_role("columnheader", name="seed")).to_have_count(0)


def test_groups_have_means_and_bands(page: Page, runs: list[Job]) -> None:
    opened(page)
    page.get_by_label("Group by").select_option("config")
    expect(page.get_by_role("figure")).to_have_attribute("aria-label", "val_top1 of 2 lines")
    expect(page.get_by_role("row").filter(has_text="alpha=0.25 (2)")).to_contain_text("±")
    shoot(page, "compare-bands")
    page.get_by_label("Band").select_option("none")
    expect(page.get_by_role("figure")).to_have_attribute("aria-label", "val_top1 of 4 lines")
    page.reload()
    expect(page.get_by_label("Band")).to_have_value("none")


def test_runs_are_switched_off_and_on_and_the_address_knows(page: Page, runs: list[Job]) -> None:
    opened(page)
    page.get_by_label("Show c0.25-s0").uncheck()
    expect(page.get_by_role("figure")).to_have_attribute("aria-label", "val_top1 of 3 lines")
    page.reload()
    expect(page.get_by_label("Show c0.25-s0")).not_to_be_checked()
    page.get_by_role("button", name="Hide all").click()
    expect(page.get_by_text("None of the shown runs has a value")).to_be_visible()
    page.get_by_role("button", name="Show all").click()
    expect(page.get_by_role("figure")).to_have_attribute("aria-label", "val_top1 of 4 lines")


def test_a_zoom_and_the_hidden_survive_new_points(page: Page, client: Client) -> None:
    job = client.submit(endless(name="grows", labels={"set": "growing"}))
    other = client.submit(endless(name="grows-too", labels={"set": "growing"}, loss={"alpha": 0.5}))
    page.goto("/compare?label.set=growing&name=train_loss&x=epoch")
    plot = page.locator("figure .u-over").first
    plot.wait_for()
    page.get_by_label("Show grows-too").uncheck()
    page.wait_for_function("() => Number(document.querySelector('[data-drawn]').dataset.drawn) > 3")
    zoom(page, plot)
    before = page.url
    drawn = int(page.locator("[data-drawn]").get_attribute("data-drawn") or 0)
    page.wait_for_function("drawn => Number(document.querySelector('[data-drawn]').dataset.drawn) > drawn", arg=drawn)
    assert page.url == before
    expect(page.get_by_label("Show grows-too")).not_to_be_checked()
    plot.dblclick(position={"x": 100, "y": 60})
    expect(page).not_to_have_url(re.compile("zoom="))
    for one in (job, other):
        client.cancel(one.id)


def test_smoothing_scale_axis_and_metric_stand_in_the_address(page: Page, runs: list[Job]) -> None:
    opened(page)
    page.get_by_label("Smoothing").fill("0.5")
    page.get_by_role("button", name="Log scale").click()
    page.get_by_label("against").select_option("seconds")
    page.get_by_label("Metric").fill("val_loss")
    page.get_by_label("Metric").press("Tab")
    expect(page.get_by_role("figure")).to_have_attribute("aria-label", "val_loss of 4 lines")
    page.reload()
    expect(page.get_by_label("Smoothing")).to_have_value("0.5")
    expect(page.get_by_role("button", name="Log scale")).to_have_attribute("aria-pressed", "true")
    expect(page.get_by_label("against")).to_have_value("seconds")
    expect(page.get_by_label("Metric")).to_have_value("val_loss")


def test_the_curves_are_downloaded(page: Page, runs: list[Job]) -> None:
    opened(page)
    page.get_by_label("Show c1.0-s0").uncheck()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download as CSV").click()
    text = download.value.path().read_text().splitlines()
    assert text[0] == "job,run,step,val_top1"
    assert {line.split(",")[0] for line in text[1:]} == {job.id for job in runs if job.name != "c1.0-s0"}


def test_runs_are_added_by_id_and_label(page: Page, runs: list[Job]) -> None:
    page.goto("/compare?label.set=nobody")
    expect(page.get_by_text("No run fits.")).to_be_visible()
    words = page.get_by_placeholder("Runs: job_…, exp_…, label=value, or part of a name")
    page.get_by_role("button", name="Take label.set nobody away").click()
    words.fill(f"{runs[0].id} {runs[2].id}")
    page.get_by_role("button", name="Add", exact=True).click()
    expect(page.get_by_role("table").get_by_role("link")).to_have_count(2)
    page.get_by_role("button", name="Take the 2 chosen runs away").click()
    words.fill("set=compared")
    words.press("Enter")
    expect(page.get_by_role("table").get_by_role("link")).to_have_count(4)


def test_a_job_that_is_none_of_ours_is_told(page: Page, watched: Watched) -> None:
    watched.expected = ("404",)
    page.goto("/compare?job=job_01KAQZ5V3N8T4W6Y7C9E1G2H3J")
    expect(page.get_by_role("alert")).to_contain_text("no job 'job_01KAQZ5V3N8T4W6Y7C9E1G2H3J'")
