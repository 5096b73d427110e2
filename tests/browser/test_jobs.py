"""The list of jobs: its address says everything, and what can be done with many jobs at once."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Locator, Page, expect

from powergrad.cli.stack import Stack
from powergrad.client import Client, Job
from tests.browser.conftest import PHONE, accessible, shoot
from tests.cli.conftest import TRAINED_S, endless, tiny

LISTED = "label.set=listed"


@pytest.fixture(scope="module")
def listed(site: Stack) -> list[Job]:
    """Two alphas of two seeds each, ended."""
    with Client(site.url) as client:
        jobs = [
            client.submit(tiny(name=f"a{alpha}-s{seed}", labels={"set": "listed"}, loss={"alpha": alpha}, seed=seed))
            for alpha in (1.0, 0.5)
            for seed in (0, 1)
        ]
        return [client.wait(job.id, TRAINED_S) for job in jobs]


@pytest.fixture
def queue(client: Client) -> Iterator[list[Job]]:
    """More jobs than slots, none of which ends by itself."""
    jobs = [client.submit(endless(name=f"long-{index}", labels={"set": "long"})) for index in range(4)]
    yield jobs
    left = [job.id for job in client.list(labels={"set": "long"}) if not job.is_terminal]
    if left:
        client.act_on_many("cancel", left)


def opened(page: Page, query: str = LISTED) -> Locator:
    """The table's lines of jobs, once they are there."""
    page.goto(f"/jobs?{query}")
    expect(page.get_by_role("table", name="Jobs")).to_have_attribute("aria-busy", "false")
    return page.locator("a.job")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_list_is_accessible(page: Page, listed: list[Job], theme: str) -> None:
    page.emulate_media(color_scheme="dark" if theme == "dark" else "light")
    expect(opened(page)).to_have_count(len(listed))
    accessible(page)
    shoot(page, f"jobs-{theme}")


def test_a_phone_shows_it(page: Page, listed: list[Job]) -> None:
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    expect(opened(page)).to_have_count(len(listed))
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    accessible(page)
    shoot(page, "jobs-phone")


def test_filters_stand_in_the_address_and_outlive_a_reload(page: Page, listed: list[Job]) -> None:
    names = opened(page, "")
    page.get_by_placeholder("Label: key=value").fill("set=listed")
    page.get_by_role("button", name="Add", exact=True).click()
    page.get_by_placeholder("Name or id …").fill("a0.5")
    page.get_by_role("group", name="States").get_by_role("button", name="succeeded").click()
    expect(names).to_have_text(["a0.5-s1", "a0.5-s0"])
    for part in ("label.set=listed", "q=a0.5", "state=succeeded"):
        assert part in page.url
    page.reload()
    expect(names).to_have_text(["a0.5-s1", "a0.5-s0"])
    expect(page.get_by_placeholder("Name or id …")).to_have_value("a0.5")
    expect(page.get_by_role("button", name="succeeded")).to_have_attribute("aria-pressed", "true")
    page.get_by_role("button", name="Take the label set=listed off the filters").click()
    expect(page).not_to_have_url(re.compile("label"))
    page.get_by_role("button", name="Clear the filters").click()
    expect(page).to_have_url(re.compile(r"/jobs$"))
    expect(page.get_by_placeholder("Name or id …")).to_have_value("")


def test_it_is_sorted_by_a_metric_and_by_any_column(page: Page, listed: list[Job]) -> None:
    names = opened(page)
    best = max(listed, key=lambda job: job.metrics.best["val_top1"] or 0)
    page.get_by_role("button", name="Best val_top1").click()
    expect(page).to_have_url(re.compile("sort=-best.val_top1"))
    expect(page.get_by_role("columnheader", name="Best val_top1")).to_have_attribute("aria-sort", "descending")
    expect(names.first).to_have_text(best.name or best.id)
    page.get_by_role("button", name="Best val_top1").click()
    expect(page).to_have_url(re.compile("sort=best.val_top1"))
    expect(names.last).to_have_text(best.name or best.id)
    page.get_by_label("Sort by").select_option("name")
    expect(names).to_have_text(["a0.5-s0", "a0.5-s1", "a1.0-s0", "a1.0-s1"])


def test_it_is_grouped_by_a_setting_with_the_groups_mean(page: Page, listed: list[Job]) -> None:
    names = opened(page)
    page.get_by_label("Group by").select_option("alpha")
    group = page.get_by_role("row").filter(has=page.get_by_role("button", name=re.compile(r"0\.5 \(2\)")))
    expect(group).to_contain_text("±")
    page.get_by_role("button", name=re.compile(r"0\.5 \(2\)")).click()
    expect(names).to_have_text(["a1.0-s1", "a1.0-s0"])
    shoot(page, "jobs-grouped")


def test_a_column_of_any_field_is_added(page: Page, listed: list[Job]) -> None:
    opened(page)
    page.get_by_role("button", name="Columns").click()
    page.get_by_placeholder("train_loss, loss.label_smoothing, label.team").fill("data.batch_size")
    page.get_by_role("button", name="Add a column").click()
    page.keyboard.press("Escape")
    expect(page).to_have_url(re.compile("cols=.*spec.data.batch_size"))
    expect(page.get_by_role("row").filter(has_text="a0.5-s1")).to_contain_text("256")
    page.reload()
    expect(page.get_by_role("columnheader", name="data.batch_size")).to_be_visible()


def test_a_view_is_saved_chosen_and_forgotten(page: Page, listed: list[Job]) -> None:
    opened(page, f"{LISTED}&sort=name")
    page.get_by_role("button", name="Save the view …").click()
    page.get_by_role("dialog").get_by_label("Name").fill("Mine")
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.get_by_role("combobox", name=re.compile("^View"))).to_have_value("Mine")
    opened(page, "")
    page.get_by_role("combobox", name=re.compile("^View")).select_option("Mine")
    expect(page).to_have_url(re.compile("label.set=listed.*sort=name"))
    expect(page.locator("a.job").first).to_have_text("a0.5-s0")
    page.get_by_role("button", name="Forget the view").click()
    expect(page.get_by_role("combobox", name=re.compile("^View"))).to_have_count(0)


def test_the_keyboard_moves_selects_and_opens(page: Page, listed: list[Job]) -> None:
    names = opened(page)
    expect(names).to_have_count(4)
    page.keyboard.press("j")
    page.keyboard.press("j")
    expect(names.nth(1)).to_be_focused()
    page.keyboard.press("x")
    expect(page.get_by_role("region", name="Selected jobs")).to_contain_text("1 job selected")
    page.keyboard.press("k")
    expect(names.first).to_be_focused()
    page.keyboard.press("/")
    expect(page.get_by_placeholder("Name or id …")).to_be_focused()
    page.keyboard.type("j")
    expect(page.get_by_placeholder("Name or id …")).to_have_value("j")
    names = opened(page)
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("a0.5-s1")


def test_many_jobs_are_paused_resumed_cancelled_and_deleted(page: Page, client: Client, queue: list[Job]) -> None:
    names = opened(page, "label.set=long")
    expect(names).to_have_count(4)

    def all_of_them(action: str) -> None:
        page.get_by_label("Select all jobs of this page").check()
        page.get_by_role("region", name="Selected jobs").get_by_role("button", name=f"{action} …").click()
        page.get_by_role("dialog").get_by_role("button", name=f"{action} 4 jobs").click()
        expect(page.get_by_role("dialog")).to_have_count(0)

    def states(wanted: str) -> None:
        expect(page.get_by_role("row").filter(has_text=re.compile(rf"long-\d\s*{wanted}"))).to_have_count(4)

    all_of_them("Pause")
    expect(page.get_by_test_id("bulk-result")).to_have_text(re.compile("4 paused"))
    states("paused")
    all_of_them("Resume")
    expect(page.get_by_test_id("bulk-result")).to_have_text(re.compile("4 resumed"))
    all_of_them("Cancel")
    states("cancelled")
    all_of_them("Delete")
    expect(page.get_by_test_id("bulk-result")).to_have_text(re.compile("4 deleted"))
    expect(page.get_by_text("No job fits these filters.")).to_be_visible()
    assert not list(client.list(labels={"set": "long"}))


def test_what_could_not_be_done_is_said(page: Page, listed: list[Job], client: Client) -> None:
    opened(page)
    page.get_by_label("Select all jobs of this page").check()
    page.get_by_role("button", name="Cancel …").click()
    page.get_by_role("button", name="Cancel 4 jobs").click()
    expect(page.get_by_test_id("bulk-result")).to_contain_text("4 could not")
    expect(page.get_by_test_id("bulk-result")).to_contain_text("(4 times)")
    assert all(client.get(job.id).state == "succeeded" for job in listed)


def test_pages_are_turned_forth_and_back(page: Page, site: Stack, client: Client) -> None:
    for index in range(21):
        client.cancel(client.submit(tiny(name=f"page-{index}", labels={"set": "paged"})).id)
    names = opened(page, "label.set=paged&limit=20")
    expect(names).to_have_count(20)
    page.get_by_role("button", name="Next →").click()
    expect(names).to_have_text(["page-0"])
    page.reload()
    expect(names).to_have_text(["page-0"])
    page.go_back()
    expect(names).to_have_count(20)
    page.get_by_role("button", name="Next →").click()
    page.get_by_role("button", name="← Previous").click()
    expect(names.first).to_have_text("page-20")


def test_the_list_follows_what_happens(page: Page, client: Client) -> None:
    page.goto("/jobs?label.set=late")
    expect(page.get_by_text("No job fits these filters.")).to_be_visible()
    job = client.submit(tiny(name="late", labels={"set": "late"}))
    expect(page.locator("a.job")).to_have_text(["late"])
    expect(page.get_by_role("row").filter(has_text="late")).to_contain_text("succeeded", timeout=60_000)
    assert client.get(job.id).state == "succeeded"


def test_a_selection_leads_to_the_comparison(page: Page, listed: list[Job]) -> None:
    opened(page)
    page.get_by_label("Select a0.5-s0").check()
    page.get_by_label("Select a1.0-s0").check()
    page.get_by_role("link", name="Compare", exact=True).last.click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Compare")
    expect(page.get_by_role("table").get_by_role("link")).to_have_count(2)
