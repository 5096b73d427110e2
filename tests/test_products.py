"""What a run leaves beside its checkpoints, made by real runs of the trainer."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from powergrad import checkpoint, trainer
from powergrad.data import Data, open_data
from powergrad.data.decode import decode
from powergrad.models import build_model
from powergrad.protocol import ArtifactWritten, CheckpointWritten, Done, Evaluation, Message, Note, Phase, ResumePoint, Step, TrainerConfig
from powergrad.spec import TrainSpec
from powergrad.telemetry import read_history
from tests.data.folders import class_folder
from tests.training import CPU, NEVER, StopAfter

NAMES = tuple("abcdefghij")
CHARTS = ["training", "logits", "logit-norm", "gradients", "filters"]
PICTURES = {f"{chart}.{kind}" for chart in CHARTS for kind in ("svg", "png")}
START, TABLES = ["labels.json", "preprocessing.json"], ["confusion.json", "per_class.csv", "mistakes.png", "mistakes.json"]
SPEC: dict[str, Any] = {
    "data": {"dataset": "class_folder", "path": "pets", "image_size": 16, "batch_size": 20},
    "epochs": 4,
    "precision": "fp32",
    "optimizer": {"lr": 0.05},
    "schedule": {},
    "telemetry": {"every_steps": 1},
    "export": ["onnx"],
}
"""A resnet18 on noise, at a rate at which its best epoch is not its last."""


@dataclass(frozen=True)
class Told:
    """What an attempt has said."""

    run_dir: Path
    messages: list[Message]

    @property
    def artifacts(self) -> list[ArtifactWritten]:
        return [message for message in self.messages if isinstance(message, ArtifactWritten)]

    @property
    def notes(self) -> list[str]:
        return [message.detail for message in self.messages if isinstance(message, Note)]

    @property
    def checkpoints(self) -> list[CheckpointWritten]:
        return [message for message in self.messages if isinstance(message, CheckpointWritten)]

    @property
    def best(self) -> CheckpointWritten:
        return [written for written in self.checkpoints if written.is_best][-1]

    def file(self, name: str) -> Path:
        (path,) = [artifact.path for artifact in self.artifacts if artifact.name == name]
        return self.run_dir / path


def attempt(run_dir: Path, data_root: Path, *, spec: dict[str, Any] | None = None, stop_after: int = NEVER, **fields: Any) -> Told:
    parts = {"run_id": "run", "attempt": 1, "run_dir": str(run_dir), "data_root": str(data_root), "cpu_threads": 1}
    config = TrainerConfig.model_validate({**parts, **fields, "spec": TrainSpec.model_validate(SPEC | (spec or {}))})
    messages: list[Message] = []
    trainer.run(config, emit=messages.append, orders=StopAfter(stop_after))
    return Told(run_dir, messages)


def again(run_dir: Path, data_root: Path, last: CheckpointWritten, **fields: Any) -> Told:
    """Another attempt, from that checkpoint."""
    point = ResumePoint(id=last.id, path=last.path, step=last.step, sha256=last.sha256)
    return attempt(run_dir, data_root, attempt=2, resume=[point], **fields)


SMALL: dict[str, Any] = {"model": {"name": "resnet20"}, "epochs": 2, "export": []}


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with ten classes in three splits."""
    root = tmp_path_factory.mktemp("data")
    for part, each in (("train", 6), ("val", 3), ("test", 2)):
        class_folder(root / "pets" / part, classes=NAMES, each=each)
    return root


@pytest.fixture(scope="module")
def told(pets: Path, tmp_path_factory: pytest.TempPathFactory) -> Told:
    return attempt(tmp_path_factory.mktemp("run"), pets)


@pytest.fixture(scope="module")
def small(pets: Path, tmp_path_factory: pytest.TempPathFactory) -> Told:
    return attempt(tmp_path_factory.mktemp("small"), pets, spec=SMALL)


def test_all_is_made_and_nothing_is_made_twice(told: Told) -> None:
    names = [artifact.name for artifact in told.artifacts]
    assert names[:6] == START + TABLES
    assert set(names[6:-2]) == PICTURES | {"telemetry.json"}
    assert names[-2:] == ["MODEL_CARD.md", "model.onnx"]
    assert len(names) == len(set(names))
    assert told.notes == []
    assert told.messages[-1] == Done(outcome="succeeded")


def test_an_artifact_is_on_the_disk_as_it_was_announced(told: Told) -> None:
    for artifact in told.artifacts:
        path = told.run_dir / artifact.path
        assert artifact.path == f"artifacts/a1/{artifact.name}"
        assert (artifact.bytes, artifact.sha256) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    assert {path.name for path in (told.run_dir / "artifacts" / "a1").iterdir()} == {artifact.name for artifact in told.artifacts}


def test_an_artifact_says_what_it_is(told: Told) -> None:
    kinds = {artifact.name: artifact.media_type for artifact in told.artifacts}
    assert kinds["labels.json"] == kinds["confusion.json"] == "application/json"
    assert (kinds["per_class.csv"], kinds["MODEL_CARD.md"]) == ("text/csv", "text/markdown")
    assert (kinds["training.svg"], kinds["training.png"]) == ("image/svg+xml", "image/png")
    assert kinds["model.onnx"] == "application/octet-stream"


def test_labels_and_preprocessing_are_there_before_the_first_step(told: Told, pets: Path) -> None:
    """So that a checkpoint of a run that never ends can be used."""
    first = next(i for i, message in enumerate(told.messages) if isinstance(message, Step))
    assert [message.name for message in told.messages[:first] if isinstance(message, ArtifactWritten)] == START
    assert json.loads(told.file("labels.json").read_text()) == list(NAMES)
    data, rules = opened(pets), json.loads(told.file("preprocessing.json").read_text())
    assert (rules["image_size"], rules["channels"]) == (16, 3)
    assert rules["mean"] == pytest.approx((data.mean.flatten() / 255).tolist())
    assert rules["std"] == pytest.approx((data.std.flatten() / 255).tolist())


def opened(data_root: Path) -> Data:
    return open_data(TrainSpec.model_validate(SPEC).data, data_root=data_root, seed=0, device=CPU)


def validation(told: Told, pets: Path) -> tuple[torch.Tensor, torch.Tensor]:
    data = opened(pets)
    ((images, labels),) = data.held_out_batches(data.val, batch_size=1000)
    return images, labels


def logits_of(told: Told, written: CheckpointWritten, images: torch.Tensor) -> torch.Tensor:
    model = build_model("resnet18", num_classes=10, image_size=16, norm=None, generator_seed=0)
    model.load_state_dict(checkpoint.load(told.run_dir / written.path).weights)
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(images)
    return logits


def test_the_tables_are_of_the_best_weights_on_the_validation_split(told: Told, pets: Path) -> None:
    images, labels = validation(told, pets)
    assert told.best is not told.checkpoints[-1], "the last is the best: the test would prove nothing"
    predicted = logits_of(told, told.best, images).argmax(1)
    confusion = np.zeros((10, 10), dtype=int)
    np.add.at(confusion, (labels.numpy(), predicted.numpy()), 1)
    assert json.loads(told.file("confusion.json").read_text())["matrix"] == confusion.tolist()
    rows = list(csv.DictReader(told.file("per_class.csv").read_text().splitlines()))
    assert [int(row["support"]) for row in rows] == [3] * 10
    assert [float(row["recall"]) for row in rows] == pytest.approx([confusion[i, i] / 3 for i in range(10)], abs=1e-4)


def test_the_worst_mistakes_name_their_files_and_are_shown(told: Told, pets: Path) -> None:
    listed = json.loads(told.file("mistakes.json").read_text())
    _, labels = validation(told, pets)
    for mistake in listed["mistakes"]:
        assert mistake["truth"] == labels[mistake["index"]] != mistake["prediction"]
        assert (pets / "pets" / "val" / mistake["path"]).parent.name == NAMES[mistake["truth"]]
    first = decode(pets / "pets" / "val" / listed["mistakes"][0]["path"], 64)
    with Image.open(told.file("mistakes.png")) as sheet:
        assert np.array_equal(np.asarray(sheet)[:64, :64], first.transpose(1, 2, 0))
    assert listed["sprite"]["count"] == min(24, len(listed["mistakes"]))


def test_an_image_that_has_gone_costs_the_pictures_of_mistakes_only(pets: Path, tmp_path: Path) -> None:
    shutil.copytree(pets, tmp_path / "data")
    files = list((tmp_path / "data" / "pets" / "val").glob("*/*.png"))
    messages: list[Message] = []

    def emit(message: Message) -> None:
        if message == Phase(name="exporting"):
            for file in files:
                file.unlink()
        messages.append(message)

    config = {"run_id": "run", "attempt": 1, "run_dir": str(tmp_path / "run"), "data_root": str(tmp_path / "data"), "cpu_threads": 1}
    trainer.run(TrainerConfig.model_validate({**config, "spec": SPEC | SMALL}), emit=emit, orders=StopAfter(NEVER))
    told = Told(tmp_path / "run", messages)
    (note,) = told.notes
    assert note.startswith("mistakes without images: ")
    assert json.loads(told.file("mistakes.json").read_text())["sprite"] is None
    assert messages[-1] == Done(outcome="succeeded")


def test_the_exported_network_is_that_of_the_best_checkpoint(told: Told, pets: Path) -> None:
    import onnxruntime  # type: ignore[import-untyped]

    session = onnxruntime.InferenceSession(told.file("model.onnx"))
    images, _ = validation(told, pets)
    expected = logits_of(told, told.best, images)
    (given,) = session.get_inputs()
    (found,) = session.run(None, {given.name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4)  # another library's sums


def test_the_card_tells_the_scores_of_the_best_and_the_test_split(told: Told) -> None:
    card = told.file("MODEL_CARD.md").read_text()
    (tested,) = [m.metrics for m in told.messages if isinstance(m, Evaluation) and m.split == "test"]
    for value in (told.best.metrics["val_top1"], tested["test_top1"]):
        assert value is not None
        assert f"{value:.4g}" in card
    assert told.best.id in card
    assert "![Curves of the run](data:image/svg+xml;base64," in card


def test_without_telemetry_there_are_no_pictures(pets: Path, tmp_path: Path) -> None:
    """Unless a bundle wants them; `pictures` set to false is the same."""
    for name, telemetry in (("none", None), ("no pictures", {"every_steps": 1, "pictures": False})):
        names = {artifact.name for artifact in attempt(tmp_path / name, pets, spec=SMALL | {"telemetry": telemetry}).artifacts}
        assert names == {*START, *TABLES, "MODEL_CARD.md", *(["telemetry.json"] if telemetry else [])}


def test_what_telemetry_kept_per_layer_can_be_had_as_figures(small: Told) -> None:
    told, kept = json.loads(small.file("telemetry.json").read_text()), read_history(small.run_dir)
    assert [look["step"] for look in told["gradients"]] == [look.step for look in kept.gradients] == list(range(1, len(kept.gradients) + 1))
    assert told["gradients"][0]["norms"]["fc.weight"] == kept.gradients[0].norms["fc.weight"] > 0
    assert told["filters"][-1]["norms"]["conv1"] == kept.filters[-1].norms["conv1"]
    assert len(told["filters"][-1]["norms"]["conv1"]) == 16


def test_a_complete_run_makes_them_again(small: Told, pets: Path) -> None:
    """Taken up from its last checkpoint, by an attempt of its own folder; what the first has made stays as it is."""
    before = {path: path.read_bytes() for path in (small.run_dir / "artifacts" / "a1").iterdir()}
    second = again(small.run_dir, pets, small.checkpoints[-1], spec=SMALL)
    assert not any(isinstance(message, Step) for message in second.messages)
    assert [artifact.name for artifact in second.artifacts] == [artifact.name for artifact in small.artifacts]
    assert {Path(artifact.path).parent for artifact in second.artifacts} == {Path("artifacts/a2")}
    for name in START + TABLES:
        assert second.file(name).read_bytes() == small.file(name).read_bytes()
    assert {path: path.read_bytes() for path in before} == before


def test_a_stopped_run_has_only_what_its_checkpoints_need(pets: Path, tmp_path: Path) -> None:
    told = attempt(tmp_path, pets, spec=SMALL, stop_after=2)
    assert [artifact.name for artifact in told.artifacts] == START
    assert told.messages[-1] == Done(outcome="stopped")


def test_a_damaged_history_costs_the_pictures_and_no_run(pets: Path, tmp_path: Path) -> None:
    told = attempt(tmp_path, pets, spec=SMALL)
    journal = tmp_path / "telemetry" / "a1.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(["{torn\n", *lines[1:]]))
    second = again(tmp_path, pets, told.checkpoints[-1], spec=SMALL)
    assert second.messages[-1] == Done(outcome="succeeded")
    assert [note.startswith("no pictures: ") for note in second.notes] == [True]
    assert "a1.jsonl" in second.notes[0]
    assert [artifact.name for artifact in second.artifacts] == [*START, *TABLES, "MODEL_CARD.md"]


def test_a_folder_that_cannot_be_written_costs_no_run(pets: Path, tmp_path: Path) -> None:
    """At the end, that is: what a checkpoint needs must be writable at the start."""
    told = attempt(tmp_path, pets, spec=SMALL, stop_after=2)
    (tmp_path / "artifacts" / "a1" / "confusion.json").mkdir()
    rest = attempt(tmp_path, pets, spec=SMALL)
    assert len(told.artifacts) == 2
    assert rest.messages[-1] == Done(outcome="succeeded")
    assert [note.startswith("not all could be written: ") for note in rest.notes] == [True]
