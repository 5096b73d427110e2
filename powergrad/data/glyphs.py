"""Glyphs: a data set of up to 2,000 classes that is made as it is needed, from the characters of the DejaVu Sans font.

What ImageNet is to a cluster, this is to a laptop: many classes, many of them alike, and images hard enough that training accuracy has
room. Every image is a character, deformed, placed, shaded, partly covered and made noisy; each choice is a pure function of the split
and the image's index (powergrad.data.draws), so the images are the same in every run and on every machine type up to rounding.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from PIL import Image, ImageFont
from torch import Tensor

from powergrad.data.draws import Stream, hashes
from powergrad.data.errors import DataMissing
from powergrad.data.images import Beat

SplitName = Literal["train", "val"]
Arrays = tuple[Tensor, Tensor]
"""(N, 1, S, S) uint8 and (N,) int64."""

FEWEST_CLASSES, MOST_CLASSES = 10, 2000
SMALLEST_SIZE = 8  # px
MOST_BYTES = 8 * 2**30
"""Pixels of a whole data set: they stay on the device."""
BATCH = 1024
"""Images drawn at once: their float copies stay in the caches of a core, at 24 px and 1024 images 2.4 MB each."""

# 10 digits, then the Latin, Greek and Cyrillic letters of everyday text, then other letters and numbers, then other signs, each by code
# point; without blanks and combining marks, and without every character whose rendering, scaled to its own ink, is nearly that of an
# earlier one: |a - b|^2 < 0.08 (|a|^2 + |b|^2) on 16 x 16 pixels smoothed by (1, 2, 1) / 4. Written down rather than computed, so that
# a class keeps its number whatever draws the font. Hexadecimal ranges, in order.
_CHARACTERS = """
    30-39 41-52 54-5a 61-62 64-66 6b 6d-6e 70-74 79 393-394 39e 3a3 3a6 3a8 3b1-3b2 3b4 3b6 3ba-3be 3c0 3c2-3c3 3c6-3c7 3c9 414 416
    418-419 41b 426-42f 444 aa ba bc-bd c0 c6-c8 cc-cd d0-d2 d8-d9 dd-e0 e6 e8 ec-ef f1-f2 f9 fd-fe 104-107 10e-10f 111 118-119 11c-11d
    122 124-125 127 132 136-137 139 13b 13e 140-141 145-146 149-14a 152 154-156 15a-15b 15e 163-165 172-174 179-17a 181 186-188 18a 18e
    190-193 195 19d 1a1-1a4 1a6-1a7 1aa 1af 1b3-1b4 1b6-1b8 1ba 1be 1c1-1c2 1c4-1c7 1ca 1cc 1d6 1de-1df 1e2-1e3 1e5 1e8-1ea 1ec 1ee 1f1
    1f6-1f7 1ff 211 219-21a 21c 221-224 231 234-235 238-23b 23e-244 246-247 24a 24c-24d 255-256 258 25a 25d-25e 260-261 263-264 267-268
    26e-273 277-27b 27d-27f 281-282 286-288 28d-28e 290-291 293-295 29b 29d-29f 2a3-2a4 2a6-2b0 2b9-2ba 2bd-2bf 2c6-2cb 2d0-2d1 2e0 370
    372-373 37a 37c 386 388-38a 38c 38e 390 3ac-3b0 3ca 3ce 3d1-3d3 3d6-3d7 3d9 3de-3e2 3e6-3e7 3e9-3ea 3ec 3f0-3f1 3fa-3fc 402-403
    409-40c 452 45b-45c 45f 462-464 466 468 46a 46c 46e 470 474 476 478-47a 47c 47e 48a 48d-48e 491-492 494 496 498 49a 49e-4a0 4a2 4a4
    4a6 4a8 4ac 4b1-4b2 4b4 4b6 4b9-4ba 4bc 4be 4c1 4c3 4c5 4c7 4cb 4cd 4da 4df 4ec 4f4 4f6 4f8 4fa-4fb 4ff-500 502-506 508-509 50e-50f
    512 514 516-519 520 522 524 532-53b 53e-541 543 546-547 54a-54c 54e 550 552 554 556 567 569 56d 573-574 576 579 57b-57c 57f 583
    586-587 5d0-5d4 5d6 5da 5dc 5de 5e0 5e2-5ea 5f0-5f2 621 624 626 628-62c 62e-634 636-637 639-63a 641-64a 660-662 664-666 669 66f 679
    67b-67c 681 688-689 68b 68f 691-693 695 6a0-6a2 6a4-6a5 6a9-6aa 6ae-6af 6b2-6b6 6b8-6bb 6be 6d0 6f4 6f6 7c1-7c4 7c6-7c7 7c9 7cc-7d8
    7da-7dd 7df 7e2-7e5 7f4-7f5 e81-e82 e84 e87-e88 e8a e8d e94 e96-e97 e99 e9b-e9e ea1 ea3 ea5 ea7 eaa-eab eae-eb0 eb2-eb3 ebd ec0-ec1
    ec3-ec4 ec6 ed1-ed3 ed5-ed9 edc 10a0-10a3 10a5-10ab 10ae-10b5 10b8 10bc-10bf 10c1 10c3-10c5 10d0 10d2-10d4 10d6-10da 10de-10ea 10ed
    10ef 10f1-10f5 10f9 10fc 1402 1405-1406 140a-1415 1417-141a 1421-1422 1425 1429-142c 142e 1433-1434 1438-143a 143c-1447 144f 1451 1457
    1459-1465 1469 146b-146c 146e 1470-1471 1473-1474 1476-147c 147f-1482 1485 148a 1490-14a0 14a2-14a3 14a7-14a8 14ac-14ad 14af 14b2-14b5
    14bc 14c0-14c5 14c7-14cb 14cd 14d3-14d8 14da-14e9 14ec-14f1 14f5-14fb 1502-1505 1510-1524 1526-153d 1542-154c 154e-154f 1552-1553
    1555-155c 155e-155f 1564-1568 1574-1575 1577-1579 157e-1585 158a-158f 1591-1596 15a0 15a2-15a5 15a7-15aa 15ac-15ad 1647 166f-1671
    1673-1676 1682-1684 1686-1689 168b-168d 168f 1691 1694-1697 1d0c 1d12-1d13 1d16-1d17 1d19-1d1a 1d1e 1d4a 1d51 1d59 1d5e 1da3 1db0 1db6
    1db9 1e00-1e02 1e04 1e08-1e09 1e0d 1e15 1e1c-1e1f 1e23 1e25 1e28-1e29 1e2d 1e31 1e38 1e3a 1e3e-1e3f 1e42 1e5c-1e5d 1e67-1e68 1e6b 1e7c
    1e88 1e8a 1e8d 1e93 1e98 1e9a 1e9e 1ea5 1eac-1ead 1ebe 1ec3 1ed5 1ee8 1eeb 1ef0 1ef4 1efa-1efb 1f06 1f0a 1f0c 1f0f 1f1a 1f26 1f2a 1f2e
    1f34 1f36 1f3a 1f3c 1f3e 1f4a 1f4d 1f5b 1f5f 1f66 1f6e 1f76 1f80 1f86 1f88 1f8a 1f8d 1f8f 1f98 1f9a 1f9e 1fa0 1fa6 1fa8 1faa 1fac 1fae
    1fb3 1fca 1fec 1ff3 2102 210b-210e 2110-2113 2115 2119-211d 2124 2128 212c-212d 212f-2131 2133 2135-2136 2138 213c-213e 2145-2148 214e
    2152 2156 215a 215f 2162-2163 2165-2168 216a-216b 2172-2173 2175-2176 2178 217a-217b 2180-2182 2185 2189 2460-2463 2465 2469 2776 2784
    2786 2789 2c63 2c65-2c66 2c68 2c6a-2c6b 2c71-2c72 2c74 2c77 2c7a 2d00-2d09 2d0b-2d0c 2d0e-2d13 2d15 2d18-2d19 2d1c 2d1f 2d21-2d25 2d30
    2d33 2d3b-2d3f 2d42-2d44 2d46-2d48 2d4b-2d4c 2d50 2d52 2d55-2d58 2d5a-2d5c 2d5e 2d62-2d64 2d6f a4d5 a4d8 a4fa-a4fd a64c a650 a654
    a656-a657 a662 a664 a666 a66b-a66c a66e a68d a71c a722 a724 a728-a729 a732 a734 a736-a739 a73c-a73d a746-a748 a74b a753 a764 a782 a78e
    a790 a7a2 a7a5 a7f8 a7fb a7fd a7ff fb00 fb02-fb03 fb05-fb06 fb13-fb17 fb1d fb1f-fb25 fb27-fb28 fb2a fb2e fb35-fb36 fb39 fb4c-fb4f
    fb53-fb55 fb58 fb5f fb61 fb64 fb69 fb6b fb6d fb73-fb75 fb78-fb79 fb83 fb85 fb87 fb8b fb8f-fb91 fb93-fb95 fb98 fb9f fba1 fbab-fbac
    fbd4-fbd5 fbd8 fbe5 fbe8-fbe9 fbfd-fbff fe70-fe73 fe76-fe78 fe7b-fe7c fe8a fe91 fe94 fe96-fe98 fe9f fea3-fea4 fea6-fea8 feaa feae feb0
    feb2-feb3 feb6-feb8 febb febf-fec0 fec2 feca fecc fece-fed0 fed3 fed6 fed8 feda fede fee2-fee4 fee7 feea feee fef2 fef5-fefc 10302
    10304 1030a-1030e 10310 10312 10314-10316 10319-1031a 10321 10323 1d538-1d539 1d53b-1d53c 1d53e 1d541-1d544 1d546 1d54a-1d550
    1d552-1d553 1d555 1d557-1d558 1d55a 1d55c-1d55f 1d561 1d563 1d565-1d566 1d56a 1d7d8-1d7df 1ee21 1ee29-1ee2a 1ee2d 1ee35-1ee36
    1ee61-1ee62 1ee64 1ee67-1ee6a 1ee6c 1ee6e-1ee70 22-23 25-26 28-2a 2f 3b-3e 40 5c 5e-5f 7b 7d a2-a7 a9 ab-ac ae b1 b6 b8 bb bf d7 f7
    2c2-2c3 2d8 2db-2df 2e5-2e8 2ed 385 482 55c 55e-55f 5c3 5c6 5f4 606 609-60a 61b 66a-66b 66d 7f8-7f9 e3f 10fb 169b-169c 1fc1 1fcd-1fcf
    1fed 1ffe 2015 201f 2021 2023 2025-2026 2030-2032 2034-2038 203a-203d 203f-2040 2042 2044 2047-204d 204f-2052 2055-2056 2058-2059
    205b-205d 20a0-20a1 20a6-20a8 20aa 20ac 20ae-20b0 20b2 20b4 20b8-20ba 20bd 2100 2103-2105 2109 2114 2116 2118 211e-2123 2125 212e
    213a-213b 2140 2144 214b 2190 2192 2194 2196-21aa 21af-21be 21c0-21c1 21c3-21cd 21cf 21d1 21d3 21d6-21d9 21e1 21e4-21e6 21e8 21ea-21eb
    21ee 21f0-21f3 21f5-21f6 21fd-21ff 2201 2204-2205 2208-220c 2210 2213-2214 221a-221b 221d 221f-2222 2227 222c-222d 222f-2231 2234-2235
    2237-223a 223e-223f 2241-2246 224e-2250 2252-2254 2257 2259-225a 225f 2262-226c 226e-2273 2276-2279 227b-2282 2284-228c 228f 2291
    2293-2294 2297 22a0-22a3 22a6-22ae 22b0-22b2 22b4-22b6 22b9 22bb-22bc 22be-22bf 22c2 22c4 22c8 22cb-22d5 22da-22e1 22e8-22ed 22f0-22f2
    22f5-22f6 22f8-22fa 22fd 22ff 2301-2302 2305-2307 230c-2311 2318-2319 231c-231f 2324-2327 232b-232c 237d 2387 2394 239b 239d-239e
    23a0-23a1 23a3-23a4 23a8 23ac-23ad 23ce-23cf 23e5 23e8 2423 2502 2508-2509 250d 250f 2513 2515 2517 2519 251b 2529-252a 2538 253c 2545
    2547 2552-2554 2556 2558-2559 255b-255d 2562 2565-2569 2571-2573 2578 257f 258a 2591 2599-259c 259e-259f 25a1 25a3-25a4 25a9 25ad
    25af-25b0 25b2-25b3 25b7 25b9-25bb 25bd 25bf-25c1 25c4-25c5 25c7-25c8 25ca-25cc 25d0-25d4 25d6-25d7 25dc-25e5 25e7-25e8 25eb-25ee 25f4
    25f6 25f8-25fa 25ff-2604 2606 2608-260a
"""

# Strengths at difficulty 1, chosen by eye so that a person still reads most images at 0.5 and about half of them at 1. A reach of x means
# that the image's own draw lies between -x and x. Lengths are in halves of the image, or of the template where it says so.
CLEAN_SHIFT = 0.08  # at difficulty 0 already, or all images of a class would be one
CLEAN_SCALE = 0.80
SHIFT_REACH = 0.24
SCALE_REACH = 0.30
ASPECT_REACH = 0.25
HALF_TURN_REACH = 0.36  # tangent of half the angle: 40 degrees
SHEAR_REACH = 0.5
BEND_REACH = 0.30  # of the template, at each node of the field
BEND_NODES = 4
BLOCK_REACH = 0.45  # half sides of the covering block
STROKE_REACH = 0.13  # half width of the covering stroke
CONTRAST_LOSS = 0.75
GRADIENT_REACH = 0.30
INVERTED_SHARE = 0.5
NOISE_REACH = 0.60


@dataclass(frozen=True)
class Glyphs:
    """A whole data set on the device, balanced: the class of image i is i modulo the number of classes."""

    class_names: tuple[str, ...]
    train: Arrays
    val: Arrays


def glyphs(
    size: int,
    *,
    classes: int,
    train_per_class: int,
    val_per_class: int,
    difficulty: float,
    device: torch.device,
    beat: Beat = lambda: None,
) -> Glyphs:
    """Draws both splits. `beat` is called after each batch.

    size: side of the images in pixels.  difficulty: in [0, 1].  Raises ValueError, DataMissing where the font is not.
    """
    _check(size, classes, difficulty)
    for label, value in (("train_per_class", train_per_class), ("val_per_class", val_per_class)):
        if value < 1:
            raise ValueError(f"{label}={value}: must be at least 1")
    if (needed := (train_per_class + val_per_class) * classes * size * size) > MOST_BYTES:
        raise ValueError(
            f"{classes} classes of {train_per_class} + {val_per_class} images of {size} px take {needed / 2**30:.1f} GiB: must be at most "
            f"{MOST_BYTES // 2**30} GiB; lower classes, train_per_class, val_per_class or the image size"
        )
    shapes = templates(classes, size=size, device=device)

    def split(name: SplitName, per_class: int) -> Arrays:
        index = torch.arange(per_class * classes, device=device)
        labels = index % classes
        pixels = torch.empty(len(index), 1, size, size, dtype=torch.uint8, device=device)
        for into, chunk, of in zip(*(torch.split(whole, BATCH) for whole in (pixels, index, labels)), strict=True):
            into.copy_(draw_glyphs(chunk, of, templates=shapes, size=size, difficulty=difficulty, split=name))
            beat()
        return pixels, labels

    return Glyphs(glyph_names(classes), split("train", train_per_class), split("val", val_per_class))


def glyph_names(classes: int) -> tuple[str, ...]:
    """The first so many characters of the list. Raises ValueError unless they are 10 to 2,000."""
    _check_classes(classes)
    return tuple(map(chr, _code_points()[:classes]))


def templates(classes: int, *, size: int, device: torch.device) -> Tensor:
    """(classes, 1, size, size) float32 in [0, 1]: each character's ink, scaled to fill the square but for one pixel on each side.

    Rendered once a process. `size` should be that of the images: characters are rendered for it, not sampled down with gaps.
    """
    _check_classes(classes)
    return _rendered(classes, size).to(device).float().div_(255)


@functools.lru_cache(maxsize=4)
def _rendered(classes: int, size: int) -> Tensor:
    """(classes, 1, size, size) uint8."""
    font = ImageFont.truetype(font_path(), max(64, 2 * size), layout_engine=ImageFont.Layout.BASIC)
    rendered = (render(name, size=size, font=font) for name in glyph_names(classes))
    pixels = b"".join(image.tobytes() for image in rendered)
    return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(classes, 1, size, size)


def render(character: str, *, size: int, font: ImageFont.FreeTypeFont) -> Image.Image:
    """A character's ink in grey, its longer side size - 2 pixels, centred on black. Raises ValueError for a blank."""
    mask = font.getmask(character)
    box = mask.getbbox()
    if box is None:
        raise ValueError(f"character={character!r}: has no ink")
    ink = Image.frombytes("L", mask.size, bytes(mask)).crop(box)
    zoom = (size - 2) / max(ink.size)
    width, height = (max(1, round(side * zoom)) for side in ink.size)
    square = Image.new("L", (size, size))
    square.paste(ink.resize((width, height), Image.Resampling.BILINEAR), ((size - width) // 2, (size - height) // 2))
    return square


def font_path() -> Path:
    """The DejaVu Sans that matplotlib's wheel brings, found without importing matplotlib. Raises DataMissing."""
    found = importlib.util.find_spec("matplotlib")
    if found is None or not found.submodule_search_locations:
        raise DataMissing("glyphs needs the font DejaVuSans.ttf of the matplotlib package, which is not installed: pip install matplotlib")
    path = Path(found.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
    if not path.is_file():
        raise DataMissing(f"glyphs needs the font {path}, which is not there: install matplotlib from its wheel, which brings it")
    return path


def draw_glyphs(index: Tensor, labels: Tensor, *, templates: Tensor, size: int, difficulty: float, split: SplitName) -> Tensor:
    """Images (N, 1, size, size) uint8 of the classes `labels`, on the device of `index`; equal however the indices are batched.

    index: (N,) int64, decides every choice with `split`; labels: (N,) int64 into `templates` (C, 1, T, T).
    difficulty: 0 is clean print, slightly shifted; 1 is very hard. Raises ValueError.
    """
    _check(size, len(templates), difficulty)
    draws = _Draws(index, seed=_SPLIT_SEEDS[split])
    across = (torch.arange(size, device=index.device) * 2 + 1) / size - 1  # (S,) pixel centres in [-1, 1]
    x, y = across[None, None, :], across[None, :, None]

    grid = _pose(draws, x, y, difficulty) + _bend(draws, size, difficulty)  # (N, S, S, 2)
    ink = F.grid_sample(templates[labels], grid, mode="bilinear", padding_mode="zeros", align_corners=False)[:, 0]  # (N, S, S)
    covered = _cover(draws, ink, x, y, difficulty)
    return _shade(draws, covered, x, y, difficulty).mul_(255).round_().to(torch.uint8)[:, None]


# every step below uses sums, products, quotients, comparisons and one square root alone: they round the same in the vectorised part of a
# tensor and in its tail, which sines and exponentials do not, and so no bit depends on an image's place in the batch


@dataclass(frozen=True)
class _Draws:
    """The random choices of some images."""

    index: Tensor
    seed: int

    def symmetric(self, count: int, stream: Stream) -> list[Tensor]:
        """`count` tensors (N, 1, 1) of even draws in [-1, 1)."""
        return [column[:, None, None] for column in self._table(count, stream).unbind(1)]

    def field(self, count: int, stream: Stream) -> Tensor:
        """(N, count) even draws in [-1, 1) of 16 bits: four from each hash."""
        words = self._words(-(-count // 4), stream)
        return words.view(torch.int16)[:, :count] * 2.0**-15

    def _table(self, count: int, stream: Stream) -> Tensor:
        # the upper 24 bits, as many as a float32 holds
        return (self._words(count, stream) >> 40).to(torch.float32) * 2.0**-23

    def _words(self, count: int, stream: Stream) -> Tensor:
        places = self.index[:, None] * count + torch.arange(count, device=self.index.device)
        return hashes(places, seed=self.seed, stream=stream)


_SPLIT_SEEDS: dict[SplitName, int] = {"train": 0, "val": 1}


def _pose(draws: _Draws, x: Tensor, y: Tensor, difficulty: float) -> Tensor:
    """(N, S, S, 2): where in the template each pixel looks, after shift, rotation, scale and shear."""
    right, down, scale, aspect, turn, shear = draws.symmetric(6, Stream.GLYPH_POSE)
    reach = CLEAN_SHIFT + SHIFT_REACH * difficulty
    x, y = x - right * reach, y - down * reach
    half = turn * (HALF_TURN_REACH * difficulty)
    cosine, sine = (1 - half * half) / (1 + half * half), 2 * half / (1 + half * half)
    size = CLEAN_SCALE * (1 + scale * (SCALE_REACH * difficulty))
    stretch = 1 + aspect * (ASPECT_REACH * difficulty)
    along, against = (cosine * x + sine * y) / (size * stretch), (cosine * y - sine * x) * stretch / size
    return torch.stack([along + shear * (SHEAR_REACH * difficulty) * against, against], dim=-1)


def _bend(draws: _Draws, size: int, difficulty: float) -> Tensor:
    """(N, S, S, 2): a smooth random displacement, cubic between few nodes."""
    nodes = draws.field(2 * BEND_NODES**2, Stream.GLYPH_BEND).view(-1, 2, BEND_NODES, BEND_NODES) * (BEND_REACH * difficulty)
    return F.interpolate(nodes, size=(size, size), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)


def _cover(draws: _Draws, ink: Tensor, x: Tensor, y: Tensor, difficulty: float) -> Tensor:
    """The ink (N, S, S) under a block of background or half ink, and a stroke of ink."""
    block_x, block_y, width, height, grey, stroke_x, stroke_y, slope_x, slope_y, thickness = draws.symmetric(10, Stream.GLYPH_OCCLUSION)
    reach = BLOCK_REACH * difficulty / 2
    in_block = ((x - block_x).abs() < (width + 1) * reach) & ((y - block_y).abs() < (height + 1) * reach)
    ink = torch.where(in_block, grey.clamp(min=0) / 2, ink)
    distance = (slope_x * (x - stroke_x) + slope_y * (y - stroke_y)).abs()  # times the slope's length
    in_stroke = distance < (slope_x * slope_x + slope_y * slope_y).sqrt() * ((thickness * STROKE_REACH).clamp(min=0) * difficulty)
    return torch.where(in_stroke, torch.ones_like(ink), ink)


def _shade(draws: _Draws, ink: Tensor, x: Tensor, y: Tensor, difficulty: float) -> Tensor:
    """Grey levels (N, S, S) in [0, 1]: less contrast, a background with a gradient, some negatives, noise."""
    size = ink.shape[-1]
    loss, level, slope_x, slope_y, negative, noisy = draws.symmetric(6, Stream.GLYPH_SHADE)
    contrast = 1 - (loss + 1) / 2 * (CONTRAST_LOSS * difficulty)
    background = (1 - contrast) * (level + 1) / 2
    is_negative = (negative + 1) / 2 < INVERTED_SHARE * difficulty
    shaded = background + contrast * torch.where(is_negative, 1 - ink, ink)
    noise = draws.field(size * size, Stream.GLYPH_NOISE).view(-1, size, size) * ((noisy + 1) / 2 * (NOISE_REACH * difficulty))
    gradient = (slope_x * x + slope_y * y) * (GRADIENT_REACH * difficulty)
    return (shaded + gradient + noise).clamp_(0, 1)


def _check(size: int, classes: int, difficulty: float) -> None:
    _check_classes(classes)
    if size < SMALLEST_SIZE:
        raise ValueError(f"size={size}: must be at least {SMALLEST_SIZE} pixels")
    if not 0 <= difficulty <= 1:
        raise ValueError(f"difficulty={difficulty}: must be in [0, 1]")


def _check_classes(classes: int) -> None:
    if not FEWEST_CLASSES <= classes <= MOST_CLASSES:
        raise ValueError(f"classes={classes}: must be in [{FEWEST_CLASSES}, {MOST_CLASSES}]")


@functools.cache
def _code_points() -> tuple[int, ...]:
    ranges = (part.split("-") for part in _CHARACTERS.split())
    return tuple(point for ends in ranges for point in range(int(ends[0], 16), int(ends[-1], 16) + 1))
