"""`powergrad export`: from a run directory of `powergrad train` to files that compute what its checkpoint computes."""

from __future__ import annotations

import csv
import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import onnxruntime  # type: ignore[import-untyped]
import pytest
import torch
from torch import Tensor, nn

from powergrad import checkpoint
from powergrad.cli.main import main
from powergrad.data import open_data
from powergrad.models import build_model
from powergrad.spec import TrainSpec

SPEC: dict[str, Any] = {
    "data": {"dataset": "digits", "image_size": 8, "batch_size": 256, "val_fraction": 0.5},
    "model": {"name": "resnet20"},
    "epochs": 2,
    "precision": "fp32",
    "resources": {"gpus": 0, "cpu_threads": 1},
    "checkpoint": {"keep_last": 2, "keep_best": 1},
}
ATOL = 1e-4  # what an export promises


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "job.json").write_text(json.dumps(SPEC))
    assert main(["train", str(folder / "job.json"), "--run-dir", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    """A run directory of one's own."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def entries(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "checkpoints.jsonl").read_text().splitlines()]


def network(run_dir: Path, entry: dict[str, Any]) -> nn.Module:
    model = build_model("resnet20", num_classes=10, image_size=8, norm=None, generator_seed=0)
    model.load_state_dict(checkpoint.load(run_dir / entry["path"]).weights)
    return model.eval()


def held_out() -> Tensor:
    spec = TrainSpec.model_validate({name: part for name, part in SPEC.items() if name != "resources"})
    data = open_data(spec.data, data_root=Path("/nowhere"), seed=0, device=torch.device("cpu"))
    return next(data.held_out_batches(data.val, batch_size=20))[0]


def logits_of(path: Path, images: Tensor) -> Tensor:
    """What an exported file computes."""
    if path.suffix == ".pt2":
        logits: Tensor = torch.export.load(path).module()(images)
        return logits
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def same(path: Path, model: nn.Module) -> bool:
    with torch.no_grad():
        return torch.allclose(logits_of(path, held_out()), model(held_out()), atol=ATOL, rtol=0)


def test_the_best_checkpoint_is_exported_in_the_forms_asked_for(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["export", str(trained), "--format", "onnx", "--format", "bundle", "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(out / "model.onnx"), str(out / "bundle.zip")]
    best = max(entries(trained), key=lambda entry: (entry["metrics"]["val_top1"], -entry["step"]))
    assert same(out / "model.onnx", network(trained, best))

    with zipfile.ZipFile(out / "bundle.zip") as bundle:
        card, labels = bundle.read("MODEL_CARD.md").decode(), json.loads(bundle.read("labels.json"))
        rows = list(csv.DictReader(io.StringIO(bundle.read("metrics.csv").decode())))
    assert labels == list("0123456789")
    assert f"best checkpoint, {best['id']}" in card
    assert f"{best['metrics']['val_top1']:.4g}" in card
    assert len(rows) == len((trained / "metrics.jsonl").read_text().splitlines())


@pytest.mark.parametrize("wanted", ["latest", "step-00000003"])
def test_another_checkpoint_can_be_named(trained: Path, tmp_path: Path, wanted: str) -> None:
    first, last = entries(trained)
    assert first["id"] == "step-00000003"
    assert main(["export", str(trained), "--format", "torch_export", "--checkpoint", wanted, "--out", str(tmp_path)]) == 0
    expected, other = (last, first) if wanted == "latest" else (first, last)
    assert same(tmp_path / "model.pt2", network(trained, expected))
    assert not same(tmp_path / "model.pt2", network(trained, other))


def test_a_run_that_left_no_class_names_is_described_by_its_data(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "artifacts")
    assert main(["export", str(run_dir)]) == 0
    with zipfile.ZipFile(run_dir / "exports" / "bundle.zip") as bundle:
        assert json.loads(bundle.read("labels.json")) == list("0123456789")
        rules = json.loads(bundle.read("preprocessing.json"))
    assert (rules["image_size"], rules["channels"], rules["mean"]) == (8, 1, pytest.approx([0.3053] * 3, abs=1e-6))


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(["export", *arguments])
    told = capsys.readouterr()
    assert told.out == ""
    return code, told.err


def test_an_unknown_checkpoint_is_wrong_usage_and_the_known_ones_are_named(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = refusal(capsys, str(trained), "--checkpoint", "step-00000099")
    assert code == 64
    assert "has no such checkpoint" in told
    assert "best, latest, step-00000003, step-00000006" in told


def test_a_directory_without_a_run_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = refusal(capsys, str(tmp_path))
    assert code == 1
    assert "does not say which spec trained here" in told


def test_a_run_without_a_checkpoint_is_told(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run_dir / "checkpoints")
    code, told = refusal(capsys, str(run_dir))
    assert code == 1
    assert "has no checkpoint yet" in told


def test_a_damaged_checkpoint_is_not_exported(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run_dir / entries(run_dir)[-1]["path"] / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    code, told = refusal(capsys, str(run_dir), "--checkpoint", "latest")
    assert code == 1
    assert "the manifest says" in told.replace("\n", " ")
    assert not (run_dir / "exports").exists()


def test_an_average_that_was_not_kept_is_told(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = refusal(capsys, str(trained), "--average")
    assert code == 1
    assert "holds no averaged weights" in told


def test_an_average_is_exported_where_the_run_keeps_one(run_dir: Path) -> None:
    entry = entries(run_dir)[-1]
    weights = network(run_dir, entry).state_dict()
    averaged = {name: tensor / 2 if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    published = checkpoint.publish(run_dir, attempt=2, step=9, epoch=3, weights=weights, ema=averaged, state={})
    with (run_dir / "checkpoints.jsonl").open("a") as file:
        file.write(json.dumps(entry | {"id": published.id, "path": published.path, "step": 9, "epoch": 3}) + "\n")
    assert main(["export", str(run_dir), "--format", "torch_export", "--checkpoint", published.id, "--average"]) == 0
    model = network(run_dir, entry)
    model.load_state_dict(averaged)
    assert same(run_dir / "exports" / "model.pt2", model)


def test_what_cannot_be_exported_is_told_beside_what_was_made(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = entries(run_dir)[-1]
    weights = {name: tensor.clone() for name, tensor in network(run_dir, entry).state_dict().items()}
    weights["fc.weight"] *= 1e8  # logits that no two runtimes compute to within the tolerance
    published = checkpoint.publish(run_dir, attempt=2, step=9, epoch=3, weights=weights, ema=None, state={})
    with (run_dir / "checkpoints.jsonl").open("a") as file:
        file.write(json.dumps(entry | {"id": published.id, "path": published.path, "step": 9, "epoch": 3}) + "\n")
    code, told = refusal(capsys, str(run_dir), "--checkpoint", "latest", "-f", "onnx", "-f", "torch_export")
    assert code == 1
    assert "Not exported: onnx: " in told
    assert "model.pt2" in told
    assert [path.name for path in (run_dir / "exports").iterdir()] == ["model.pt2"]
