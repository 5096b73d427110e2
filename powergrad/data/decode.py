"""One encoded image as pixels, under limits: uploads are not trusted."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from powergrad.data.errors import DataUnreadable

MAX_PIXELS = 64 * 2**20
"""Largest image that is decoded: 8192×8192, 192 MiB as RGB."""
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM")
"""Pillow goes by a file's content, not its name, and knows formats that are programs (EPS is handed to Ghostscript): these, no others."""
BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, struct.error, zlib.error)
"""What Pillow's decoders raise on broken files, found by feeding them truncated and bit-flipped ones."""
_JPEG_SCALES = (8, 4, 2)  # libjpeg decodes at these fractions; its decoder has more, Pillow offers these


class Box(NamedTuple):
    """A part of an image in pixels, fractions allowed, inside 0..width and 0..height."""

    left: float
    top: float
    right: float
    bottom: float


CropOf = Callable[[int, int], Box | None]
"""Which part of an image of (height, width) pixels is taken; None is the middle square."""
Source = Path | str | bytes | Image.Image
"""A file, the bytes of one, or an image that something else has opened."""


def decode(source: Source, size: int, *, crop: CropOf | None = None, name: str | None = None) -> NDArray[np.uint8]:
    """The image as (3, size, size) RGB: shorter side scaled to `size`, the middle square of it; the first frame of an animation.

    CMYK, grey, palette and 16-bit images are converted; the camera's orientation is applied first.  crop: which part is scaled to
    size×size instead of the middle square, whatever its shape.  name: what errors call the image, for sources that have no path.
    Raises DataUnreadable that names it; more than MAX_PIXELS are refused from the header, before anything is decoded.
    """
    name = str(source) if name is None else name
    try:
        with _opened(source) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataUnreadable(
                    f"{name}: {image.width}×{image.height} pixels, more than {MAX_PIXELS:,}: shrink the image or leave it out"
                )
            width, height = _upright(image)
            box = crop(height, width) if crop else None
            if box is None:
                image.draft("RGB", (2 * size, 2 * size))  # lets JPEG decode at a half, a quarter, an eighth
                return _square(_rgb(ImageOps.exif_transpose(image)), size)
            scale = next((s for s in _JPEG_SCALES if s * 2 * size <= min(box.right - box.left, box.bottom - box.top)), 1)
            image.draft("RGB", (image.width // scale, image.height // scale))
            drafted = _rgb(ImageOps.exif_transpose(image))
            return _part(drafted, size, _scaled(box, drafted.width / width, drafted.height / height, drafted.size))
    except Image.DecompressionBombError as error:
        raise DataUnreadable(f"{name}: more than {MAX_PIXELS:,} pixels: shrink the image or leave it out") from error
    except BROKEN as error:
        raise DataUnreadable(f"{name}: cannot be decoded ({error}): replace the image or leave it out") from error


def _opened(source: Source) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is stricter
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)


def _upright(image: Image.Image) -> tuple[int, int]:
    """Width and height once the camera's orientation is applied."""
    lying = image.getexif().get(ExifTags.Base.Orientation, 1) in {5, 6, 7, 8}  # a quarter turn: EXIF 2.3, tag 0x0112
    return (image.height, image.width) if lying else image.size


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel; Pillow's own conversion would clip at 255
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in {"P", "PA", "LA"}:
        return image.convert("RGBA").convert("RGB")  # Pillow warns about a palette's transparency otherwise
    return image.convert("RGB")


def _square(image: Image.Image, size: int) -> NDArray[np.uint8]:
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return _part(image, size, Box(left, top, left + side, top + side))


def _scaled(box: Box, across: float, down: float, bounds: tuple[int, int]) -> Box:
    """The box in an image decoded at a fraction of its size, whose sides are rounded up."""
    right, bottom = min(box.right * across, bounds[0]), min(box.bottom * down, bounds[1])
    return Box(box.left * across, box.top * down, right, bottom)


def _part(image: Image.Image, size: int, box: Box) -> NDArray[np.uint8]:
    part = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.ascontiguousarray(np.asarray(part, dtype=np.uint8).transpose(2, 0, 1))
