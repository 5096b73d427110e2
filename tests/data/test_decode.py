"""A part of an image, taken from its original pixels."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image

from powergrad.data.augment import FileCrop, ResizedCrop
from powergrad.data.decode import Box, CropOf, decode


def smooth(width: int, height: int) -> Image.Image:
    """Red rises to the right and green downwards, by what no JPEG disturbs much."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([across, down, np.full_like(across, 128)], axis=-1).round().astype(np.uint8))


def encoded(image: Image.Image, kind: str = "png", **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def at(box: Box) -> CropOf:
    return lambda height, width: box


def test_bytes_a_path_and_an_open_image_are_decoded_alike(tmp_path: Path) -> None:
    content = encoded(smooth(60, 40))
    (tmp_path / "a.png").write_bytes(content)
    from_bytes = decode(content, 16, name="a")
    assert np.array_equal(from_bytes, decode(tmp_path / "a.png", 16))
    assert np.array_equal(from_bytes, decode(smooth(60, 40), 16, name="a"))


def test_a_crop_is_what_pillow_cuts_and_scales() -> None:
    image, box = smooth(90, 70), Box(10, 20, 58, 44)
    cut = image.crop((10, 20, 58, 44)).resize((16, 16), Image.Resampling.BILINEAR)
    ours = decode(encoded(image), 16, name="", crop=at(box)).transpose(1, 2, 0)
    # a cut-out image ends at its edge, where the box may look a pixel further: a step of the slope (255 / 70 a pixel), rounded
    assert np.abs(ours.astype(int) - np.asarray(cut)).max() <= 4


def test_a_crop_that_is_none_gives_the_middle_square() -> None:
    content = encoded(smooth(60, 40), "jpeg")
    assert np.array_equal(decode(content, 16, name="", crop=lambda height, width: None), decode(content, 16, name=""))


def test_the_crop_is_asked_with_height_and_width() -> None:
    asked = []
    decode(encoded(smooth(60, 40)), 16, name="", crop=lambda height, width: asked.append((height, width)))
    assert asked == [(40, 60)]


@pytest.mark.parametrize("side", [700, 701, 703, 1400])
def test_a_jpeg_decoded_at_a_fraction_gives_the_same_part(side: int) -> None:
    image, box = smooth(side, side // 2), Box(side * 0.3, side * 0.05, side * 0.9, side * 0.45)
    whole = decode(encoded(image), 16, name="", crop=at(box))
    fraction = decode(encoded(image, "jpeg", quality=98), 16, name="", crop=at(box))
    # the scaled decoder and the filter average over other pixels: a slope stays where it is, within two levels
    assert np.abs(whole.astype(int) - fraction).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photograph_is_cropped_upright(orientation: int) -> None:
    upright, undo = smooth(48, 32), {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
                                     7: "TRANSVERSE", 8: "ROTATE_270"}.get(orientation)  # fmt: skip
    stored = upright.transpose(Image.Transpose[undo]) if undo else upright
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    box = Box(4, 8, 36, 24)
    ours = decode(encoded(stored, exif=exif), 8, name="", crop=at(box))
    assert np.array_equal(ours, decode(encoded(upright), 8, name="", crop=at(box)))


@given(st.integers(1, 900), st.integers(1, 900), st.data())
def test_any_box_inside_any_image_is_decoded(width: int, height: int, data: st.DataObject) -> None:
    left, top = data.draw(st.floats(0, width - 0.5)), data.draw(st.floats(0, height - 0.5))
    right, bottom = data.draw(st.floats(left + 0.5, width)), data.draw(st.floats(top + 0.5, height))
    content = encoded(Image.new("RGB", (width, height), "white"), "jpeg")
    assert decode(content, 8, name="", crop=at(Box(left, top, right, bottom))).min() >= 250


def test_a_resized_crop_travels_to_a_worker_and_draws_the_same_box() -> None:
    crop = FileCrop(7, ResizedCrop())
    there: FileCrop = pickle.loads(pickle.dumps(crop))
    boxes = {crop(index, epoch, 375, 500) for index in range(10) for epoch in range(3)}
    assert boxes == {there(index, epoch, 375, 500) for index in range(10) for epoch in range(3)}
    assert len(boxes) == 30
