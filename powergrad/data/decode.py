"""One image file as pixels, under limits: uploads are not trusted."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from powergrad.data.errors import DataUnreadable

MAX_PIXELS = 64 * 2**20
"""Largest image that is decoded: 8192×8192, 192 MiB as RGB."""
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
# what Pillow's decoders raise on broken files, found by feeding them truncated and bit-flipped ones
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, struct.error, zlib.error)


def decode(path: Path, size: int) -> NDArray[np.uint8]:
    """The image as (3, size, size) RGB: shorter side scaled to `size`, the middle square of it; the first frame of an animation.

    CMYK, grey, palette and 16-bit images are converted.  Raises DataUnreadable that names the file; more than MAX_PIXELS are refused
    from the header, before anything is decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit, below, is stricter
            image = Image.open(path)
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise DataUnreadable(
                    f"{path}: {image.width}×{image.height} pixels, more than {MAX_PIXELS:,}: shrink the image or leave it out"
                )
            image.draft("RGB", (2 * size, 2 * size))  # lets JPEG decode at a half, a quarter, an eighth
            return _square(_rgb(ImageOps.exif_transpose(image)), size)
    except Image.DecompressionBombError as error:
        raise DataUnreadable(f"{path}: more than {MAX_PIXELS:,} pixels: shrink the image or leave it out") from error
    except _BROKEN as error:
        raise DataUnreadable(f"{path}: cannot be decoded ({error}): replace the image or leave it out") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel; Pillow's own conversion would clip at 255
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in {"P", "PA", "LA"}:
        return image.convert("RGBA").convert("RGB")  # Pillow warns about a palette's transparency otherwise
    return image.convert("RGB")


def _square(image: Image.Image, size: int) -> NDArray[np.uint8]:
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    square = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    return np.ascontiguousarray(np.asarray(square, dtype=np.uint8).transpose(2, 0, 1))
