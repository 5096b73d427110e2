"""Which training images are held out for validation."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from powergrad.data.draws import Stream, hashes
from powergrad.data.errors import DataMissing
from powergrad.data.images import Parts

SPLIT_SEED = 2111_12495
"""Fixed, and not the run's seed: all arms and seeds of an experiment are scored on the same images."""


def with_validation(parts: Parts, val_fraction: float) -> Parts:
    """The same where there is a validation split; otherwise a share of each class of train becomes it.

    Raises DataMissing for a class of fewer than two images.
    """
    if parts.val is not None:
        return parts
    train, val = stratified(parts.train.labels, val_fraction, class_names=parts.class_names)
    return replace(parts, train=parts.train.subset(train), val=parts.train.subset(val))


def stratified(labels: Tensor, val_fraction: float, *, class_names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Indices of (train, val), each rising; of every class its share is held out, at least one image on either side.

    labels: (N,) int64.  Raises DataMissing for a class of fewer than two images.
    """
    order = torch.argsort(hashes(torch.arange(len(labels)), seed=SPLIT_SEED, stream=Stream.SPLIT), stable=True)
    by_class = order[torch.argsort(labels[order], stable=True)]
    counts = torch.bincount(labels, minlength=len(class_names)).tolist()
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for members, name in zip(torch.split(by_class, counts), class_names, strict=True):
        if len(members) < 2:
            raise DataMissing(f"class {name!r} has {len(members)} image(s): at least 2 are needed, one to train and one to validate on")
        held_out[members[: min(max(1, round(len(members) * val_fraction)), len(members) - 1)]] = True
    return (~held_out).nonzero().flatten(), held_out.nonzero().flatten()
