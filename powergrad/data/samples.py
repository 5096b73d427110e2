"""Some images of each class of a set, on one sheet a split: what a person looks at before anything trains on it.

Which images hangs on their content alone, so that the same files give the same sheet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from powergrad import durable
from powergrad.data.decode import decode
from powergrad.thumbnails import SIDE, sheet

COLUMNS = 8
"""Images of a class."""
MOST_ROWS = 40
"""Classes on a sheet, spread evenly over all of them: 2,560 pixels high."""

Place = Callable[[str], tuple[str, str]]


def draw(folder: Path, digests: Mapping[str, str], *, place: Place, out_dir: Path) -> dict[str, dict[str, Any]]:
    """Writes OUT_DIR/SPLIT.png of each split that has images; {split: {bytes, sha256, rows: [[class, images shown]]}}.

    digests: of the images, by their names below `folder`.  place: split and class of a name.  Raises DataUnreadable, OSError.
    """
    names: dict[str, dict[str, dict[str, str]]] = {}  # by split, class and content: what is there twice is shown once
    for name in sorted(digests):
        split, label = place(name)
        names.setdefault(split, {}).setdefault(label, {}).setdefault(digests[name], name)
    return {split: _drawn(folder, classes, out_dir / f"{split}.png") for split, classes in names.items()}


def _drawn(folder: Path, classes: Mapping[str, Mapping[str, str]], path: Path) -> dict[str, Any]:
    labels = _spread(sorted(classes))
    chosen = {label: [classes[label][digest] for digest in sorted(classes[label])[:COLUMNS]] for label in labels}
    rows = ([decode(folder / name, SIDE, name=name) for name in chosen[label]] for label in labels)
    content = sheet(rows, columns=COLUMNS)
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.write(path, content)
    shown = [[label, len(chosen[label])] for label in labels]
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "rows": shown}


def _spread(labels: list[str]) -> list[str]:
    return labels if len(labels) <= MOST_ROWS else [labels[i * len(labels) // MOST_ROWS] for i in range(MOST_ROWS)]
