"""Glyphs: the same images for every run, however they are batched; classes that can be told apart, and learned."""

from __future__ import annotations

import unicodedata

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from fontTools.ttLib import TTFont  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st
from PIL import ImageFont
from torch import Tensor, nn

from powergrad.data.errors import DataMissing
from powergrad.data.glyphs import MOST_CLASSES, Glyphs, SplitName, draw_glyphs, font_path, glyph_names, glyphs, render, templates

CPU = torch.device("cpu")
SIZE = 24


def drawn(
    index: Tensor, *, classes: int = 100, difficulty: float = 0.5, split: SplitName = "train", size: int = SIZE, shapes: int = SIZE
) -> Tensor:
    found = templates(classes, size=shapes, device=CPU)
    return draw_glyphs(index, index % classes, templates=found, size=size, difficulty=difficulty, split=split)


def data_set(*, classes: int = 10, train_per_class: int = 20, val_per_class: int = 5, difficulty: float = 0.5) -> Glyphs:
    return glyphs(SIZE, classes=classes, train_per_class=train_per_class, val_per_class=val_per_class, difficulty=difficulty, device=CPU)


def smoothed(characters: list[str]) -> Tensor:
    """(N, 256) float: what the rule of the list compares, 48 px renderings as 16×16 pixels smoothed by (1, 2, 1) / 4."""
    font = ImageFont.truetype(font_path(), 96, layout_engine=ImageFont.Layout.BASIC)
    renderings = [torch.frombuffer(bytearray(render(c, size=48, font=font).tobytes()), dtype=torch.uint8) for c in characters]
    ink = F.avg_pool2d(torch.stack(renderings).view(-1, 1, 48, 48) / 255, 3)
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
    return F.conv2d(ink, (kernel[:, None] * kernel)[None, None], padding=1).flatten(1)


def distances(some: Tensor, others: Tensor) -> Tensor:
    """(len(some), len(others)) of |a - b|² / (|a|² + |b|²)."""
    squares = some.square().sum(1)[:, None] + others.square().sum(1)
    return 1 - 2 * (some @ others.T) / squares


def candidates() -> list[str]:
    """Every character of the font that has ink of its own, in the order of the rule."""
    known = [chr(point) for point in TTFont(font_path(), lazy=True).getBestCmap()]
    alphabets = [range(ord(first), ord(last) + 1) for first, last in ("09", "AZ", "az", "ΑΩ", "αω", "Ая")]
    familiar = {chr(point): place for place, point in enumerate(point for alphabet in alphabets for point in alphabet)}
    kind = {character: unicodedata.category(character)[0] for character in known}
    font = ImageFont.truetype(font_path(), 96, layout_engine=ImageFont.Layout.BASIC)
    visible = [c for c in known if kind[c] not in "CMZ" and font.getmask(c).getbbox() is not None]
    return sorted(visible, key=lambda c: (familiar.get(c, len(familiar)), kind[c] not in "LN", c))


# --- the classes -----------------------------------------------------------------------------------------------------------------


def test_the_list_is_what_its_rule_gives() -> None:
    """Each visible character of the font that is not near an earlier class. Another FreeType may move pairs close to the bound: 1 %."""
    characters = candidates()
    looks = smoothed(characters)
    near = distances(looks, looks) < 0.08
    is_class = torch.zeros(len(characters), dtype=torch.bool)
    for place in range(len(characters)):
        is_class[place] = not (near[place] & is_class).any()
    chosen = [characters[place] for place in is_class.nonzero().flatten().tolist()][:MOST_CLASSES]
    assert len(set(chosen) ^ set(glyph_names(MOST_CLASSES))) <= 20
    assert chosen[:60] == list(glyph_names(60))


def test_no_two_classes_look_alike() -> None:
    looks = smoothed(list(glyph_names(2000)))
    apart = distances(looks, looks).fill_diagonal_(1.0)
    assert float(apart.min()) > 0.079  # the rule's 0.08, less another FreeType's rounding


def test_a_twin_of_another_alphabet_is_no_class() -> None:
    names = glyph_names(2000)
    assert names[:36] == tuple("0123456789ABCDEFGHIJKLMNOPQRTUVWXYZa")
    assert not {"Α", "А", "ο", "о", "Р", "l", "c"} & set(names)


@given(st.integers(10, 2000))
def test_fewer_classes_are_the_first_of_more(classes: int) -> None:
    assert glyph_names(classes) == glyph_names(2000)[:classes]


def test_templates_are_ink_within_a_margin_of_one_pixel() -> None:
    found = templates(2000, size=SIZE, device=CPU)
    assert (found.shape, found.dtype) == ((2000, 1, SIZE, SIZE), torch.float32)
    assert (float(found.min()), float(found.max())) == (0.0, 1.0)
    assert float(found[..., [0, -1], :].max()) == float(found[..., [0, -1]].max()) == 0.0
    spans = [found.amax(dim) > 0.02 for dim in ((1, 2), (1, 3))]  # (2000, S): columns and rows with ink
    longer = torch.maximum(*(SIZE - some.int().argmax(1) - some.flip(1).int().argmax(1) for some in spans))
    assert int(longer.min()) >= SIZE - 4  # a faint end may round away


def test_templates_of_fewer_classes_are_the_first_of_more() -> None:
    assert torch.equal(templates(30, size=16, device=CPU), templates(60, size=16, device=CPU)[:30])


def test_without_the_font_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataMissing, match="pip install matplotlib"):
        font_path()


# --- the images ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("difficulty", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("size", [8, 15, 24, 33])
def test_an_image_does_not_depend_on_its_batch(size: int, difficulty: float) -> None:
    """Equal bits: for a batch cut in pieces of a length that no vector register divides, and for single images."""
    index = torch.arange(5000, 5131)
    whole = drawn(index, size=size, shapes=size, difficulty=difficulty)
    pieces = [drawn(piece, size=size, shapes=size, difficulty=difficulty) for piece in torch.split(index, 17)]
    assert torch.equal(torch.cat(pieces), whole)
    backwards = drawn(index.flip(0), size=size, shapes=size, difficulty=difficulty)
    assert torch.equal(backwards.flip(0), whole)
    assert torch.equal(drawn(index[77:78], size=size, shapes=size, difficulty=difficulty), whole[77:78])


def test_images_are_bytes_of_the_size_asked_for() -> None:
    images = drawn(torch.arange(300), size=20)
    assert (images.shape, images.dtype, images.device.type) == ((300, 1, 20, 20), torch.uint8, "cpu")
    assert (int(images.min()), int(images.max())) == (0, 255)


def test_two_images_of_a_class_differ() -> None:
    for difficulty in (0.0, 0.5):
        index = torch.arange(0, 5000, 100)  # all of class 0
        images = drawn(index, difficulty=difficulty)
        assert len({image.numpy().tobytes() for image in images}) > 40  # clean ones are shifted alone, a few coincide in all pixels


def test_train_and_val_are_drawn_apart() -> None:
    index = torch.arange(200)
    train, val = (drawn(index, split=split).float().flatten(1) for split in ("train", "val"))
    assert float((train - val).abs().mean(dim=1).min()) > 3  # grey levels: the shift, the noise and all else are others


def test_without_difficulty_an_image_is_its_template_moved() -> None:
    """A shift of up to 8 % of the half side is 0.96 px at 24: some shift by sixths of a pixel brings the scaled template onto the image."""
    index, classes = torch.arange(20), 20
    images = drawn(index, classes=classes, difficulty=0.0)[:, 0] / 255
    shapes = templates(classes, size=SIZE, device=CPU)
    steps = torch.linspace(-0.08, 0.08, 13)
    shifts = torch.cartesian_prod(steps, steps)
    best = torch.full((classes,), torch.inf)
    for down, right in shifts:
        move = torch.tensor([[1 / 0.8, 0, -right / 0.8], [0, 1 / 0.8, -down / 0.8]]).expand(classes, 2, 3)
        moved = F.grid_sample(shapes, F.affine_grid(move, [classes, 1, SIZE, SIZE], align_corners=False), align_corners=False)[:, 0]
        best = torch.minimum(best, (moved - images).abs().mean((1, 2)))
    assert float(best.max()) < 0.02  # mean grey level; without a shift the worst is 0.05 to 0.1


def nearest_template_accuracy(difficulty: float) -> float:
    """Share of 2,000 images of 100 classes whose class has the template with the highest correlation, scaled as clean images are."""
    index, classes = torch.arange(2000), 100
    shapes = templates(classes, size=SIZE, device=CPU)
    placed = draw_glyphs(index[:classes], index[:classes], templates=shapes, size=SIZE, difficulty=0.0, split="val").float().flatten(1)
    images = drawn(index, classes=classes, difficulty=difficulty).float().flatten(1)
    centred = [F.normalize(some - some.mean(dim=1, keepdim=True)) for some in (images, placed)]
    return float(((centred[0] @ centred[1].T).argmax(dim=1) == index % classes).float().mean())


def test_difficulty_makes_it_harder() -> None:
    accuracies = [nearest_template_accuracy(difficulty) for difficulty in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[0] > 0.6  # even clean images are shifted, by up to a pixel
    assert 0.01 < accuracies[-1] < 0.15  # guessing is 0.01


def test_each_kind_of_difficulty_is_there() -> None:
    """At 1 some images are negatives, some noisy, some of little contrast; at 0 none is."""
    index = torch.arange(1000)
    clean, hard = (drawn(index, difficulty=difficulty).float()[:, 0] for difficulty in (0.0, 1.0))

    def roughness(images: Tensor) -> Tensor:
        return (images[:, 1:] - images[:, :-1]).abs().median(dim=1).values.median(dim=1).values

    assert float(clean.mean((1, 2)).max()) < 128 < float(hard.mean((1, 2)).quantile(0.6))  # negatives are half of them
    assert float(roughness(clean).max()) < float(roughness(hard).quantile(0.5))
    assert float(clean.amax((1, 2)).min()) > 180


# --- the data set ----------------------------------------------------------------------------------------------------------------


def test_classes_are_balanced_in_both_splits() -> None:
    data = data_set(classes=12, train_per_class=100, val_per_class=7)
    assert torch.equal(torch.bincount(data.train[1]), torch.full((12,), 100))
    assert torch.equal(torch.bincount(data.val[1]), torch.full((12,), 7))
    assert (data.train[0].shape, data.val[0].shape) == ((1200, 1, SIZE, SIZE), (84, 1, SIZE, SIZE))
    assert data.class_names == glyph_names(12)


def test_a_data_set_is_drawn_image_by_image() -> None:
    """More images than one batch of 1,024: each is what drawing it alone gives."""
    data = data_set(classes=12, train_per_class=100)
    again = drawn(torch.arange(1200), classes=12)
    assert torch.equal(data.train[0], again)
    assert torch.equal(data.val[0], drawn(torch.arange(60), classes=12, split="val"))


def test_more_images_of_a_class_begin_with_the_same() -> None:
    few, more = (data_set(train_per_class=count).train[0] for count in (20, 30))
    assert torch.equal(few, more[: len(few)])


def test_global_random_state_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = data_set().train[0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(data_set().train[0], one)


def test_every_batch_gives_a_sign_of_life() -> None:
    beats: list[None] = []
    glyphs(8, classes=10, train_per_class=250, val_per_class=110, difficulty=0.5, device=CPU, beat=lambda: beats.append(None))
    assert len(beats) == 3 + 2  # 2,500 and 1,100 images, 1,024 at a time


def test_a_small_network_learns_it() -> None:
    """150 steps of Adam on 20 classes: far above the 5 % of guessing on images it has not seen, and not perfect."""
    data = data_set(classes=20, train_per_class=100, val_per_class=20)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 25, 20)
        )
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    pixels, labels = data.train[0] / 255, data.train[1]
    for step in range(150):
        batch = slice(step * 100 % 2000, step * 100 % 2000 + 100)
        loss = F.cross_entropy(net(pixels[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        top1 = float((net(data.val[0] / 255).argmax(dim=1) == data.val[1]).float().mean())
    assert 0.3 < top1 < 0.95


# --- errors ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [9, 2001])
def test_a_number_of_classes_out_of_range_is_named_with_the_rule(classes: int) -> None:
    with pytest.raises(ValueError, match=rf"^classes={classes}: must be in \[10, 2000\]$"):
        glyph_names(classes)
    with pytest.raises(ValueError, match=rf"^classes={classes}: "):
        data_set(classes=classes)


@pytest.mark.parametrize("difficulty", [1.2, -0.1, float("nan")])
def test_a_difficulty_out_of_range_is_named_with_the_rule(difficulty: float) -> None:
    with pytest.raises(ValueError, match=rf"^difficulty={difficulty}: must be in \[0, 1\]$"):
        data_set(difficulty=difficulty)


def test_images_too_small_or_too_few_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^size=7: must be at least 8"):
        drawn(torch.arange(3), size=7)
    with pytest.raises(ValueError, match=r"^train_per_class=0: must be at least 1$"):
        data_set(train_per_class=0)
    with pytest.raises(ValueError, match=r"^val_per_class=0: must be at least 1$"):
        data_set(val_per_class=0)


def test_a_set_too_large_to_hold_is_refused_before_it_is_drawn() -> None:
    with pytest.raises(ValueError, match=r"10\.7 GiB: must be at most 8 GiB; lower classes"):
        data_set(classes=2000, train_per_class=9995, val_per_class=5)


def test_a_blank_has_no_rendering() -> None:
    font = ImageFont.truetype(font_path(), 48, layout_engine=ImageFont.Layout.BASIC)
    with pytest.raises(ValueError, match=r"^character=' ': has no ink$"):
        render(" ", size=24, font=font)
