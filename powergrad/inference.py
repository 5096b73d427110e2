"""Classifies images with the network in this folder: python inference.py image.jpg [--top 5]

Needs torch, numpy and Pillow, and the files model.pt2, labels.json and preprocessing.json beside it.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps


def main(arguments: list[str] | None = None) -> int:
    """Prints the most likely classes of each image, a probability and a name a line. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Classify images.")
    parser.add_argument("images", nargs="+", metavar="IMAGE", type=Path)
    parser.add_argument("--top", type=int, default=5, metavar="N", help="how many classes to name (5)")
    options = parser.parse_args(arguments)
    if options.top < 1:
        parser.error(f"--top {options.top}: must be at least 1")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a class may be called what the terminal cannot show
    here = Path(__file__).resolve().parent
    labels = json.loads((here / "labels.json").read_text("utf-8"))
    rules = json.loads((here / "preprocessing.json").read_text("utf-8"))
    model = torch.export.load(here / "model.pt2").module()
    for path in options.images:
        try:
            images = preprocessed(path, rules)
        except (OSError, Image.DecompressionBombError) as error:
            parser.error(f"{path}: cannot be read ({error})")
        with torch.no_grad():
            probabilities = model(images).softmax(dim=1)[0]  # (C,)
        if len(options.images) > 1:
            sys.stdout.write(f"{path}\n")
        for probability, label in zip(*probabilities.topk(min(options.top, len(labels))), strict=True):
            sys.stdout.write(f"{float(probability):.4f}  {labels[int(label)]}\n")
    return 0


def preprocessed(path: Path, rules: dict[str, Any]) -> torch.Tensor:
    """The image as the network takes it, (1, 3, S, S) float32. Raises OSError, Image.DecompressionBombError."""
    pixels = torch.from_numpy(decoded(path, rules["image_size"], grey=rules["channels"] == 1))  # (3, S, S)
    # the same arithmetic as in training, on pixels in [0, 255], for the same bits
    mean, std = (torch.tensor(rules[name], dtype=torch.float64).mul(255).float()[:, None, None] for name in ("mean", "std"))
    return ((pixels - mean) / std)[None]


def decoded(path: Path, size: int, *, grey: bool = False) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(3, size, size) RGB: upright, shorter side scaled to `size`, the middle square of it."""
    with Image.open(path) as image:
        image.draft("RGB", (2 * size, 2 * size))  # lets JPEG decode at a half, a quarter, an eighth
        colours = rgb(ImageOps.exif_transpose(image))
    if grey:
        colours = colours.convert("L").convert("RGB")
    side = min(colours.size)
    left, top = (colours.width - side) / 2, (colours.height - side) / 2
    square = colours.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    return np.ascontiguousarray(np.asarray(square, dtype=np.uint8).transpose(2, 0, 1))


def rgb(image: Image.Image) -> Image.Image:
    """Any kind of image as RGB."""
    if image.mode.startswith("I"):  # 16 bits a pixel; Pillow's own conversion would clip at 255
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in {"P", "PA", "LA"}:
        return image.convert("RGBA").convert("RGB")  # Pillow warns about a palette's transparency otherwise
    return image.convert("RGB")


if __name__ == "__main__":
    sys.exit(main())
