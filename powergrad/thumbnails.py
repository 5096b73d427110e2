"""Many small images in one PNG, tile beside tile: a browser fetches one file and cuts it up.

Equal images give equal bytes.
"""

from __future__ import annotations

import io
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 64
"""Of a tile, in pixels."""


def tile(pixels: NDArray[np.uint8]) -> Image.Image:
    """(1 or 3, S, S) as a tile: larger images are averaged down, smaller ones enlarged without blur, so that each of their pixels is seen."""
    channels = pixels if len(pixels) == 3 else np.repeat(pixels, 3, axis=0)
    image = Image.fromarray(np.ascontiguousarray(channels.transpose(1, 2, 0)))
    return image.resize((SIDE, SIDE), Image.Resampling.NEAREST if image.width < SIDE else Image.Resampling.BOX)


def sheet(rows: Iterable[Iterable[NDArray[np.uint8]]], *, columns: int) -> bytes:
    """A PNG of SIDE×SIDE tiles, `columns` wide; a row that has fewer images than that ends black."""
    drawn = [[tile(pixels) for pixels in row] for row in rows]
    picture = Image.new("RGB", (columns * SIDE, max(1, len(drawn)) * SIDE))
    for top, row in enumerate(drawn):
        for left, image in enumerate(row):
            picture.paste(image, (left * SIDE, top * SIDE))
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=True)
    return out.getvalue()
