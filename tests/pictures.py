"""Archives of small pictures, as users send them."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Mapping

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def png(seed: int, *, width: int = 20, height: int = 16) -> bytes:
    """A picture of noise."""
    return encoded(Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def flowers(*, each: int = 4, seed: int = 0) -> dict[str, bytes]:
    """A folder per class with `each` pictures."""
    names = ("daisy", "rose", "tulip")
    return {f"{name}/{i}.png": png(seed + 100 * label + i) for label, name in enumerate(names) for i in range(each)}


def digits(count: int = 600) -> dict[str, bytes]:
    """scikit-learn's digits as 8×8 PNGs."""
    bunch = load_digits()
    grey = np.rint(bunch.images[:count] * (255 / 16)).astype(np.uint8)
    return {
        f"{label}/{i:04d}.png": encoded(Image.fromarray(image)) for i, (image, label) in enumerate(zip(grey, bunch.target, strict=False))
    }


def zipped(entries: Mapping[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return out.getvalue()


def tarred(entries: Mapping[str, bytes], mode: str = "w:gz") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:  # type: ignore[call-overload]  # the mode is a parameter
        for name, content in entries.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()
