"""What a trained network makes of one image, from the files a run leaves: weights, labels.json, preprocessing.json. No data set is opened."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from powergrad import determinism
from powergrad.data import DataMissing
from powergrad.data.decode import decode
from powergrad.models import build_model, load_weights
from powergrad.protocol import Question
from powergrad.spec import TrainSpec

IMAGE = "the image"  # what errors call it: the caller knows which


def predict(arguments: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """The answer to a Question, as JSON: {"object": "prediction", job, checkpoint, predictions: [{label, index, probability}]}, likeliest first.

    Raises DataUnreadable for an image that cannot be decoded within the limits of training, DataMissing for files that are gone or changed.
    """
    question = Question(**arguments)
    names, rules = (_json(root / path) for path in (question.labels, question.preprocessing))
    pixels = _decoded(root / question.image, rules)
    model = _network(question, root, classes=len(names), image_size=rules["image_size"])
    with determinism.settings(deterministic=True, threads=1), torch.inference_mode():
        probabilities = model(_normalised(pixels, rules)).float().softmax(dim=1)[0]  # (C,)
    values, places = probabilities.topk(min(question.top, len(names)))
    found = [
        {"label": names[place], "index": place, "probability": value} for value, place in zip(values.tolist(), places.tolist(), strict=True)
    ]
    return {"object": "prediction", "job": question.job, "checkpoint": question.checkpoint, "predictions": found}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise DataMissing(f"{path.name} is gone: the job was deleted, or is starting anew") from error


def _decoded(path: Path, rules: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(3, S, S); grey for a network that was trained on grey images, the grey repeated."""
    try:
        pixels = decode(path.read_bytes(), rules["image_size"], name=IMAGE)
    except FileNotFoundError as error:
        raise DataMissing(f"{IMAGE} is gone") from error
    if rules["channels"] != 1:
        return pixels
    grey = np.asarray(Image.fromarray(pixels.transpose(1, 2, 0)).convert("L"))
    return np.repeat(grey[None], 3, axis=0)


def _network(question: Question, root: Path, *, classes: int, image_size: int) -> nn.Module:
    path = root / question.weights
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise DataMissing(f"{question.checkpoint} is gone: retention or a deletion freed it") from error
    if found != question.sha256:
        raise DataMissing(f"{question.checkpoint} is another by now: ask again")
    wanted = TrainSpec.model_validate(question.spec).model
    model = build_model(wanted.name, num_classes=classes, image_size=image_size, norm=wanted.norm, generator_seed=0)
    fresh = load_weights(model, path).fresh
    if fresh:
        raise ValueError(f"{question.checkpoint}: has a classifier of another size than {classes} classes: {', '.join(fresh)}")
    return model.eval()


def _normalised(pixels: np.ndarray[Any, np.dtype[np.uint8]], rules: dict[str, Any]) -> Tensor:
    """(1, 3, S, S) float32, by the arithmetic of training on pixels in [0, 255], for the same bits."""
    mean, std = (torch.tensor(rules[name], dtype=torch.float64).mul(255).float()[:, None, None] for name in ("mean", "std"))
    return ((torch.from_numpy(pixels) - mean) / std)[None].contiguous(memory_format=torch.channels_last)
