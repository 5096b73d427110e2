"""Data sets and workers: an upload, what the check finds, who works."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from powergrad.client import Client
from tests.browser.conftest import PHONE, accessible, shoot


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Three classes of four images in two splits."""
    path = tmp_path / "Three colours.zip"
    with zipfile.ZipFile(path, "w") as packed:
        for split in ("train", "val"):
            for number, label in enumerate(("red", "green", "blue")):
                for index in range(4):
                    image = io.BytesIO()
                    shade = 40 + 40 * index + (7 if split == "val" else 0)
                    Image.new("RGB", (20, 20), tuple(shade if channel == number else 0 for channel in range(3))).save(image, "PNG")
                    packed.writestr(f"{split}/{label}/{index}.png", image.getvalue())
    return path


def test_an_upload_is_checked_and_shown(page: Page, client: Client, archive: Path) -> None:
    page.goto("/datasets")
    page.get_by_label("Archive").set_input_files(archive)
    expect(page.get_by_label("Name", exact=True)).to_have_value("three-colours")
    page.get_by_role("button", name="Upload", exact=True).click()
    expect(page.get_by_role("heading", level=1)).to_have_text("three-colours")
    expect(page.get_by_text("ready").first).to_be_visible(timeout=60_000)
    expect(page.get_by_role("row").filter(has_text="blue")).to_contain_text("4")
    expect(page.get_by_role("img", name="4 images of red")).to_be_visible()
    accessible(page)
    shoot(page, "dataset")
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page.get_by_role("button", name="Delete …").click()
    page.get_by_role("button", name="Delete it").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Data sets")
    assert "three-colours" not in {one["name"] for one in client.datasets()}


def test_what_is_no_archive_is_refused_in_words(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "flowers.rar"
    path.write_bytes(b"Rar!")
    page.goto("/datasets")
    page.get_by_label("Archive").set_input_files(path)
    page.get_by_role("button", name="Upload", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("flowers.rar")


def test_workers_show_their_devices(page: Page) -> None:
    page.goto("/workers")
    expect(page.get_by_role("article").first).to_contain_text("CPU")
    expect(page.get_by_role("progressbar").first).to_be_visible()
