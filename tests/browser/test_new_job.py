"""A new job: the form and the YAML say the same, the server checks both, and the address keeps them."""

from __future__ import annotations

import re
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from playwright.sync_api import Locator, Page, expect

from powergrad.client import Client, Job
from tests.browser.conftest import PHONE, Watched, accessible, shoot
from tests.cli.conftest import tiny

# a spec that is refused is answered with 422, which the browser's console tells as an error
REFUSED = "422"


def opened(page: Page, query: str = "") -> Locator:
    """The YAML editor, once the form is there and the spec was checked."""
    page.goto(f"/new?{query}")
    expect(page.get_by_role("group", name="Settings")).to_be_visible()
    expect(page.get_by_test_id("verdict")).not_to_contain_text(re.compile("Checking|Not checked"))
    return page.get_by_label("Spec as YAML")


def unfold(page: Page) -> None:
    """Open every section of the form."""
    page.locator("details").evaluate_all("all => all.forEach(one => one.open = true)")


def field(page: Page, pointer: str) -> Locator:
    return page.locator(f'[id="field:{pointer}"]')


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_form_is_accessible(page: Page, theme: str) -> None:
    page.emulate_media(color_scheme="dark" if theme == "dark" else "light")
    opened(page)
    unfold(page)
    accessible(page)
    shoot(page, f"new-{theme}")


def test_a_phone_shows_it(page: Page) -> None:
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    opened(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    accessible(page)


def test_form_and_yaml_say_the_same(page: Page) -> None:
    editor = opened(page)
    field(page, "/loss/alpha/value").fill("0.4")
    field(page, "/loss/alpha/value").press("Tab")
    expect(editor).to_have_value(re.compile(r"alpha: 0\.4"))
    editor.fill("# kept\ndata: {dataset: digits}\nepochs: 7\n")
    expect(field(page, "/epochs")).to_have_value("7")
    field(page, "/epochs").fill("8")
    field(page, "/epochs").press("Tab")
    expect(editor).to_have_value(re.compile(r"# kept[\s\S]*epochs: 8"))
    expect(page.get_by_test_id("verdict")).to_contain_text("✓ Valid.")


def test_a_wrong_value_is_said_at_its_field_and_its_line(page: Page, watched: Watched) -> None:
    watched.expected = (REFUSED,)
    editor = opened(page)
    editor.fill("data:\n  dataset: digits\nloss:\n  alpha: 7\nepochs: 0\n")
    expect(page.get_by_test_id("verdict")).to_contain_text("2 things to change")
    expect(page.get_by_role("button", name="Submit the job")).to_be_disabled()
    expect(field(page, "/loss/alpha-error")).to_be_visible()
    expect(field(page, "/loss/alpha")).to_have_attribute("aria-invalid", "true")
    expect(page.locator(".gutter .marked")).to_have_text(["! 4", "! 5"])
    page.get_by_test_id("verdict").get_by_role("button", name="/loss/alpha").click()
    expect(field(page, "/loss/alpha")).to_be_focused()
    accessible(page)
    shoot(page, "new-errors")
    field(page, "/loss/alpha/value").fill("0.5")
    field(page, "/epochs").fill("1")
    field(page, "/epochs").press("Tab")
    expect(page.get_by_test_id("verdict")).to_contain_text("✓ Valid.")
    expect(page.get_by_role("button", name="Submit the job")).to_be_enabled()


def test_a_misspelt_field_is_told_with_the_nearest_one(page: Page, watched: Watched) -> None:
    watched.expected = (REFUSED,)
    editor = opened(page)
    editor.fill("data:\n  dataset: digits\nepoch: 3\n")
    expect(page.get_by_test_id("verdict")).to_contain_text("epochs")
    expect(page.locator(".gutter .marked")).to_have_text(["! 3"])


def test_what_is_no_yaml_is_said_with_its_line(page: Page) -> None:
    editor = opened(page)
    editor.fill("data:\n  dataset: [digits\nepochs: 3\n")
    expect(page.get_by_test_id("verdict")).to_contain_text("Not YAML yet. Line ")
    expect(page.get_by_role("button", name="Submit the job")).to_be_disabled()
    expect(field(page, "/epochs")).to_be_disabled()


def test_the_address_keeps_what_was_written(page: Page) -> None:
    editor = opened(page)
    text = "data:\n  dataset: digits\nloss:\n  alpha: 0.125\n"
    editor.fill(text)
    expect(page).to_have_url(re.compile("spec="))
    assert parse_qs(urlsplit(page.url).query)["spec"] == [text]
    page.reload()
    expect(page.get_by_label("Spec as YAML")).to_have_value(text)
    expect(field(page, "/loss/alpha/value")).to_have_value("0.125")


def test_another_optimizer_keeps_what_both_know(page: Page) -> None:
    editor = opened(page)
    editor.fill("data: {dataset: digits}\noptimizer:\n  name: sgd\n  lr: 0.02\n  momentum: 0.8\n")
    expect(field(page, "/optimizer/momentum")).to_have_value("0.8")
    unfold(page)
    field(page, "/optimizer").select_option(label="adamw")
    expect(page.get_by_test_id("verdict")).to_contain_text("✓ Valid.")
    spec = yaml.safe_load(editor.input_value())
    assert spec["optimizer"] == {"name": "adamw", "lr": 0.02}


def test_a_preset_fills_the_form(page: Page, client: Client) -> None:
    editor = opened(page)
    preset = client.presets()[0]
    page.get_by_label("Begin with").select_option(preset["name"])
    expect(page).to_have_url(re.compile(f"preset={preset['name']}"))
    expect(page.get_by_test_id("verdict")).to_contain_text("✓ Valid.")
    assert client.dry_run(yaml.safe_load(editor.input_value())) == client.dry_run(preset["spec"])


def test_a_job_is_done_again_with_a_change(page: Page, trained: Job, client: Client) -> None:
    editor = opened(page, f"from={trained.id}")
    expect(editor).to_have_value(re.compile("dataset: digits"))
    assert client.dry_run(yaml.safe_load(editor.input_value())) == trained.spec
    assert len(editor.input_value().splitlines()) < 20, "what is so by default anyway is not written"


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_a_job_of_another_optimizer_is_done_again_as_it_was(page: Page, client: Client, name: str) -> None:
    job = client.submit(tiny(name=f"by-{name}", optimizer={"name": name, "weight_decay": 0.03}))
    client.cancel(job.id)
    editor = opened(page, f"from={job.id}")
    expect(editor).to_have_value(re.compile(f"name: {name}"))
    assert client.dry_run(yaml.safe_load(editor.input_value())) == job.spec


def test_a_job_is_submitted_and_its_page_opened(page: Page, client: Client) -> None:
    editor = opened(page)
    editor.fill(yaml.safe_dump(tiny(name="from-the-form")))
    expect(page.get_by_test_id("verdict")).to_contain_text("✓ Valid.")
    page.get_by_text("With every default").click()
    expect(page.get_by_test_id("verdict")).to_contain_text("label_smoothing")
    page.get_by_role("button", name="Submit the job").click()
    expect(page).to_have_url(re.compile("/jobs/job_"))
    expect(page.get_by_role("heading", level=1)).to_have_text("from-the-form")
    job = client.wait(page.url.rpartition("/")[2], 120)
    assert job.state == "succeeded"


@pytest.mark.parametrize(
    "pointer", ["/optimizer", "/schedule", "/data/augment", "/model/norm", "/loss/alpha", "/clip", "/ema", "/early_stopping"]
)
def test_every_choice_of_a_field_is_one_the_server_takes(page: Page, pointer: str) -> None:
    """What a choice begins with is valid at once."""
    editor = opened(page)
    text = editor.input_value()
    unfold(page)
    labels = field(page, pointer).locator("option").all_text_contents()
    assert len(labels) > 1
    for label in labels:
        editor.fill(text)
        field(page, pointer).select_option(label=label)
        page.wait_for_timeout(500)  # longer than the pause before a check
        expect(page.get_by_test_id("verdict")).to_contain_text("✓ Valid.")
