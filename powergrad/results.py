"""What a network gets right and wrong on held-out images: confusion, scores per class, calibration, worst mistakes.

Kept per image are 20 bytes: (class, prediction, confidence). All figures come from these, so that nothing grows with the square of the
number of classes: a dense matrix of 10,000 classes would be 800 MB, which is also why torchmetrics' per-class scores, made of one, are
not used here.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from powergrad import durable
from powergrad.data.images import Split
from powergrad.evaluate import calibration_error
from powergrad.spreadsheets import spreadsheet_safe
from powergrad.thumbnails import SIDE, sheet

WORST = 100
"""Mistakes that are listed."""
SHOWN, COLUMNS = 24, 6
"""Of these, how many are shown as images, and how many in a row."""
SPRITE = "mistakes.png"
DENSE_CLASSES = 200
"""Up to so many classes confusion.json holds the whole matrix."""


@dataclass(frozen=True)
class Mistake:
    """An image that was taken for another class."""

    index: int
    """Its place in the split."""
    truth: int
    prediction: int
    probability: float
    """Of the prediction."""


@dataclass(frozen=True)
class Results:
    """A network's answers on one split, counted. Scores of a class that are 0/0 are NaN."""

    class_names: tuple[str, ...]
    images: int
    confusion: Tensor
    """(C, C) int64, sparse and coalesced; rows are the truth, columns the prediction."""
    precision: Tensor
    """(C,) float64; NaN for a class that was never predicted."""
    recall: Tensor
    """(C,) float64; NaN for a class without images."""
    f1: Tensor
    """(C,) float64; NaN for a class of which there is neither."""
    support: Tensor
    """(C,) int64: images of each class."""
    ece: float
    """Expected calibration error of the predicted class, 15 bins of equal width, in [0, 1]."""
    worst: tuple[Mistake, ...]
    """Mistakes made with the highest probability first; of equals, the first in the split."""


def analyse(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    class_names: Sequence[str],
    device: torch.device,
    autocast: torch.autocast,
    worst: int = WORST,
) -> Results:
    """The results of one pass over a split. The network's mode is put back.

    batches: images and classes, in the split's order.  Raises ValueError for a split without images, and for logits that are not finite.
    """
    truths, predictions, confidences = _answers(model, batches, device=device, autocast=autocast)
    classes = len(class_names)
    support = torch.bincount(truths, minlength=classes)
    predicted = torch.bincount(predictions, minlength=classes)
    right = torch.bincount(truths[truths == predictions], minlength=classes)
    return Results(
        class_names=tuple(class_names),
        images=len(truths),
        confusion=_confusion(truths, predictions, classes),
        precision=right.double() / predicted,  # true division: 0/0 is NaN
        recall=right.double() / support,
        f1=2 * right.double() / (support + predicted),
        support=support,
        ece=calibration_error([confidences], [truths == predictions]),
        worst=_worst(truths, predictions, confidences, worst),
    )


@dataclass(frozen=True)
class Gallery:
    """What the worst mistakes look like. sprite: a PNG of the first `count` of them, row by row."""

    names: Mapping[int, str]
    """Of their files, by their places in the split."""
    sprite: bytes | None = None
    count: int = 0


def gallery(worst: Sequence[Mistake], split: Split) -> Gallery:
    """The first of the mistakes as tiles.  split: the one that was analysed.  Raises DataUnreadable."""
    shown = [mistake.index for mistake in worst[:SHOWN]]
    names = split.names([mistake.index for mistake in worst])
    if not shown:
        return Gallery(names)
    tiles = split.originals(shown, SIDE)
    rows = [tiles[at : at + COLUMNS] for at in range(0, len(tiles), COLUMNS)]
    return Gallery(names, sheet(rows, columns=COLUMNS), len(shown))


def write(results: Results, out_dir: Path, gallery: Gallery) -> list[Path]:
    """The paths of confusion.json, per_class.csv, mistakes.png (where there are any) and mistakes.json, each written whole. Raises OSError."""
    sprite = None if gallery.sprite is None else {"file": SPRITE, "tile": SIDE, "columns": COLUMNS, "count": gallery.count}
    listed = [{**vars(mistake), "path": gallery.names.get(mistake.index)} for mistake in results.worst]
    mistakes = {"class_names": results.class_names, "mistakes": listed, "sprite": sprite}
    contents = {
        "confusion.json": _json(_confusion_entries(results)),
        "per_class.csv": _per_class_csv(results).encode(errors="backslashreplace"),
        SPRITE: gallery.sprite,
        "mistakes.json": _json(mistakes),  # after the picture that it names
    }
    return [durable.write(out_dir / name, content) for name, content in contents.items() if content is not None]


def _answers(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, device: torch.device, autocast: torch.autocast
) -> tuple[Tensor, Tensor, Tensor]:
    """Truth (N,) int64, prediction (N,) int64 and its probability (N,) float32, on the CPU: counting on a GPU has no deterministic form."""
    truths, predictions, confidences = [], [], []
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for images, labels in batches:
                with autocast:
                    logits = model(images.to(device))  # (B, C)
                confidence, prediction = logits.float().softmax(dim=1).max(dim=1)
                truths.append(labels.cpu())
                predictions.append(prediction.cpu())
                confidences.append(confidence.cpu())
    finally:
        model.train(training)
    if not truths:
        raise ValueError("batches=0 images: there is nothing to analyse; give a split that has some")
    probabilities = torch.cat(confidences)
    if not bool(probabilities.isfinite().all()):
        raise ValueError("logits are not finite: the network has diverged; analyse an earlier checkpoint")
    return torch.cat(truths), torch.cat(predictions), probabilities


def _confusion(truths: Tensor, predictions: Tensor, classes: int) -> Tensor:
    ones = torch.ones(len(truths), dtype=torch.int64)
    return torch.sparse_coo_tensor(torch.stack((truths, predictions)), ones, (classes, classes), check_invariants=True).coalesce()


def _worst(truths: Tensor, predictions: Tensor, confidences: Tensor, count: int) -> tuple[Mistake, ...]:
    wrong = (truths != predictions).nonzero().squeeze(1)
    order = confidences[wrong].argsort(descending=True, stable=True)[:count]
    return tuple(Mistake(i, int(truths[i]), int(predictions[i]), float(confidences[i])) for i in wrong[order].tolist())


def _confusion_entries(results: Results) -> dict[str, Any]:
    """The whole matrix, or for many classes the correct answers per class and [truth, prediction, count] of each mistake, most frequent first."""
    common = {"class_names": results.class_names, "rows": "truth", "columns": "prediction", "images": results.images}
    if len(results.class_names) <= DENSE_CLASSES:
        return common | {"matrix": results.confusion.to_dense().tolist()}
    (rows, columns), counts = results.confusion.indices(), results.confusion.values()
    wrong = rows != columns
    mistakes = torch.stack((rows[wrong], columns[wrong], counts[wrong]), dim=1)
    correct = torch.zeros_like(results.support)
    correct[rows[~wrong]] = counts[~wrong]
    return common | {
        "correct": correct.tolist(),
        "mistakes": mistakes[mistakes[:, 2].argsort(descending=True, stable=True)].tolist(),
    }


def _per_class_csv(results: Results) -> str:
    """A line a class; an empty cell is a score that is 0/0."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["class", "precision", "recall", "f1", "support"])
    scores = torch.stack((results.precision, results.recall, results.f1), dim=1).tolist()
    for name, values, support in zip(results.class_names, scores, results.support.tolist(), strict=True):
        cells = ["" if math.isnan(value) else f"{value:.6f}" for value in values]
        table.writerow([spreadsheet_safe(name), *cells, support])
    return text.getvalue()


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"
