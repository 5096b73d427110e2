"""Predictions from a run's files alone, against the network itself."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from powergrad.data import DataMissing, DataUnreadable
from powergrad.models import build_model
from powergrad.predict import predict

NAMES = [f"class {i}" for i in range(7)]
SIZE = 16
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
SPEC = {"data": {"dataset": "digits"}, "model": {"name": "resnet20", "norm": "group"}}


@dataclass
class Left:
    """What a run left, below a root."""

    root: Path
    model: torch.nn.Module

    def ask(self, image: bytes, **changes: Any) -> dict[str, Any]:
        (self.root / "image").write_bytes(image)
        sha256 = hashlib.sha256((self.root / "model.safetensors").read_bytes()).hexdigest()
        files = {"weights": "model.safetensors", "labels": "labels.json", "preprocessing": "preprocessing.json", "image": "image"}
        return predict(
            {"job": "job_1", "checkpoint": "step-00000010", "spec": SPEC, "sha256": sha256, "top": 3, **files, **changes}, self.root
        )

    def rules(self, **changes: Any) -> None:
        rules = {"image_size": SIZE, "mean": MEAN, "std": STD, "channels": 3, **changes}
        (self.root / "preprocessing.json").write_text(json.dumps(rules))


@pytest.fixture
def left(tmp_path: Path) -> Left:
    model = build_model("resnet20", num_classes=len(NAMES), image_size=SIZE, norm="group", generator_seed=3).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "labels.json").write_text(json.dumps(NAMES))
    found = Left(tmp_path, model)
    found.rules()
    return found


def encoded(pixels: np.ndarray[Any, Any], kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def picture(size: int = SIZE) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)


def expected(left: Left, pixels: np.ndarray[Any, Any]) -> torch.Tensor:
    """Probabilities by the shortest way: an image that has the network's size already needs no scaling."""
    image = torch.from_numpy(pixels).permute(2, 0, 1).double() / 255
    normal = (image - torch.tensor(MEAN).double()[:, None, None]) / torch.tensor(STD).double()[:, None, None]
    with torch.no_grad():
        logits: torch.Tensor = left.model.double()(normal[None])
    return logits.softmax(1)[0]


def test_the_answer_is_the_networks_own(left: Left) -> None:
    found = left.ask(encoded(picture()))
    values, places = expected(left, picture()).topk(3)
    assert (found["object"], found["job"], found["checkpoint"]) == ("prediction", "job_1", "step-00000010")
    assert [(one["index"], one["label"]) for one in found["predictions"]] == [(int(i), NAMES[int(i)]) for i in places]
    # float32 against float64 through 20 layers
    assert [one["probability"] for one in found["predictions"]] == pytest.approx(values.tolist(), abs=1e-5)


def test_all_classes_are_named_when_more_are_asked_for(left: Left) -> None:
    found = left.ask(encoded(picture(40), "webp"), top=50)["predictions"]
    assert sorted(one["label"] for one in found) == NAMES
    assert sum(one["probability"] for one in found) == pytest.approx(1.0, abs=1e-5)


def test_a_network_of_grey_images_sees_grey(left: Left) -> None:
    left.rules(channels=1)
    colours = picture()
    grey = np.repeat(np.asarray(Image.fromarray(colours).convert("L"))[..., None], 3, axis=2)
    assert left.ask(encoded(colours)) == left.ask(encoded(grey))
    left.rules(channels=3)
    assert left.ask(encoded(colours)) != left.ask(encoded(grey))


@pytest.mark.parametrize("image", [b"", b"no image", encoded(picture())[:200]])
def test_what_is_no_image_is_unreadable(left: Left, image: bytes) -> None:
    with pytest.raises(DataUnreadable, match="the image"):
        left.ask(image)


@pytest.mark.parametrize("name", ["model.safetensors", "labels.json", "preprocessing.json"])
def test_files_that_are_gone_are_missing_data(left: Left, name: str) -> None:
    sha256 = hashlib.sha256((left.root / "model.safetensors").read_bytes()).hexdigest()
    (left.root / name).rename(left.root / "elsewhere")
    if name == "model.safetensors":
        (left.root / name).write_bytes(b"another")
    with pytest.raises(DataMissing):
        left.ask(encoded(picture()), sha256=sha256)


def test_weights_of_another_number_of_classes_are_refused(left: Left) -> None:
    (left.root / "labels.json").write_text(json.dumps(NAMES[:-1]))
    with pytest.raises(ValueError, match="classifier of another size than 6"):
        left.ask(encoded(picture()))


def test_threads_and_modes_are_put_back(left: Left) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    left.ask(encoded(picture()))
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()
