"""Exports of real networks compute what the network computes, run without PowerGrad, and are the same bytes each time."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from powergrad import export as exporting
from powergrad import inference
from powergrad.card import Facts
from powergrad.data import open_data
from powergrad.data.decode import decode
from powergrad.export import ExportError, Format, Preprocessing, environment, export
from powergrad.models import build_model
from powergrad.spec import TrainSpec
from tests.data.folders import class_folder, image

SIZE = 32
CLASSES = tuple(f"class {i}" for i in range(10))
PREPROCESSING = Preprocessing(SIZE, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
SPEC = TrainSpec.model_validate({"data": {"dataset": "cifar10"}})
FACTS = Facts(
    weights="best checkpoint",
    step=20,
    epoch=2,
    parameters=11_173_962,
    metrics={"val_top1": 0.5},
    points=({"step": 10, "epoch": 1.0, "train_loss": 2.25, "lr": 0.1}, {"step": 10, "epoch": 1.0, "val_top1": None}),
    environment=environment(torch.device("cpu")),
)
ONNX_ATOL = 1e-4  # promised
PT2_ATOL = 1e-5  # the same operators in float32, in another memory layout
BLOCKED = """
import runpy, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in sys.stdlib_module_names and name.partition(".")[0] in {"powergrad", "torchvision", "timm", "pydantic", "safetensors"}:
            raise ModuleNotFoundError(f"{name} is not here")
sys.meta_path.insert(0, Block())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True)
class Exported:
    model: nn.Module
    paths: dict[str, Path]


def resnet18(norm: Any = "batch") -> nn.Module:
    """A network whose batch statistics are not those it was made with."""
    model = build_model("resnet18", num_classes=10, image_size=SIZE, norm=norm, generator_seed=0)
    with torch.no_grad():
        model.train()(torch.randn(8, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)))
    return model


def small() -> nn.Module:
    """What is exported in a moment."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(512, 10))


def exported(model: nn.Module, out_dir: Path, *formats: Format, **changes: Any) -> dict[str, Path]:
    arguments: dict[str, Any] = {"preprocessing": PREPROCESSING, "class_names": CLASSES, "spec": SPEC, "facts": FACTS} | changes
    return {path.name: path for path in export(model, formats=formats, out_dir=out_dir, **arguments)}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def all_formats(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    model = resnet18().to(memory_format=torch.channels_last)
    return Exported(model, exported(model, tmp_path_factory.mktemp("all"), "torch_export", "onnx", "bundle"))


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    training = model.training
    try:
        with torch.no_grad():
            logits: Tensor = model.eval()(images)
            return logits
    finally:
        model.train(training)


def onnx_logits(path: Path, images: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_every_format_gives_the_networks_logits_at_any_batch(all_formats: Exported, batch: int) -> None:
    images = torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(batch))
    expected = logits_of(all_formats.model, images)
    assert expected.std() > 0.1, "a network that says the same of everything would prove nothing"
    torch.testing.assert_close(torch.export.load(all_formats.paths["model.pt2"]).module()(images), expected, atol=PT2_ATOL, rtol=0)
    torch.testing.assert_close(onnx_logits(all_formats.paths["model.onnx"], images), expected, atol=ONNX_ATOL, rtol=0)


def test_the_network_is_left_as_it_was(all_formats: Exported) -> None:
    assert all_formats.model.training
    assert all(parameter.requires_grad for parameter in all_formats.model.parameters())


def test_onnx_is_one_valid_file_that_says_what_it_takes(all_formats: Exported) -> None:
    path = all_formats.paths["model.onnx"]
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path, load_external_data=False)
    assert not any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer)
    metadata = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert metadata == {"class_names": list(CLASSES), "preprocessing": PREPROCESSING.as_json()}


def test_no_file_tells_where_it_was_made(all_formats: Exported) -> None:
    folders = {str(Path(module.__file__).parents[1]).encode() for module in (torch, exporting) if module.__file__}
    for path in all_formats.paths.values():
        content = path.read_bytes()
        assert not [folder for folder in folders if folder in content], path


def test_a_bundle_has_all_it_needs(all_formats: Exported) -> None:
    with zipfile.ZipFile(all_formats.paths["bundle.zip"]) as bundle:
        assert bundle.testzip() is None
        read = {name: bundle.read(name) for name in bundle.namelist()}
    assert sorted(read) == [
        "MODEL_CARD.md",
        "environment.json",
        "files/config.yaml",
        "files/wandb-summary.json",
        "inference.py",
        "labels.json",
        "metrics.csv",
        "model.pt2",
        "model.safetensors",
        "preprocessing.json",
        "spec.json",
    ]
    assert json.loads(read["labels.json"]) == list(CLASSES)
    assert TrainSpec.model_validate_json(read["spec.json"]) == SPEC
    assert json.loads(read["environment.json"])["torch"] == torch.__version__
    config = yaml.safe_load(read["files/config.yaml"])
    assert config.pop("wandb_version") == 1
    assert TrainSpec.model_validate({name: entry["value"] for name, entry in config.items()}) == SPEC
    assert json.loads(read["files/wandb-summary.json"]) == {**FACTS.metrics, "epoch": FACTS.epoch, "_step": FACTS.step}
    rows = list(csv.DictReader(io.StringIO(read["metrics.csv"].decode())))
    assert rows == [
        {"step": "10", "epoch": "1.0", "lr": "0.1", "train_loss": "2.25", "val_top1": ""},
        {"step": "10", "epoch": "1.0", "lr": "", "train_loss": "", "val_top1": ""},
    ]
    assert read["model.pt2"] == all_formats.paths["model.pt2"].read_bytes()


def test_the_bundles_weights_are_the_networks(all_formats: Exported, tmp_path: Path) -> None:
    with zipfile.ZipFile(all_formats.paths["bundle.zip"]) as bundle:
        weights = load_file(bundle.extract("model.safetensors", tmp_path))
    expected = all_formats.model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_equal_networks_are_equal_bytes(tmp_path: Path) -> None:
    model = small()
    once, again = (exported(model, tmp_path / name, "bundle", "onnx") for name in ("once", "again"))
    assert {name: path.read_bytes() for name, path in once.items()} == {name: path.read_bytes() for name, path in again.items()}


def test_torchs_generators_do_not_move(tmp_path: Path) -> None:
    model = small()
    before = torch.get_rng_state()
    exported(model, tmp_path, "torch_export", "onnx")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_network_without_normalisation(tmp_path: Path) -> None:
    model = resnet18("none")
    images = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))
    path = exported(model, tmp_path, "onnx")["model.onnx"]
    torch.testing.assert_close(onnx_logits(path, images), logits_of(model, images), atol=ONNX_ATOL, rtol=0)


def test_a_network_of_timms(tmp_path: Path) -> None:
    model = build_model("timm/test_efficientnet", num_classes=10, image_size=SIZE, norm=None, generator_seed=0)
    images = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))
    paths = exported(model, tmp_path, "torch_export", "onnx")
    expected = logits_of(model, images)
    torch.testing.assert_close(torch.export.load(paths["model.pt2"]).module()(images), expected, atol=PT2_ATOL, rtol=0)
    torch.testing.assert_close(onnx_logits(paths["model.onnx"], images), expected, atol=ONNX_ATOL, rtol=0)


class ReadsValues(nn.Module):
    """Goes one way or the other by what is in the images, which no graph can hold."""

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)[:, :10]
        return flat if float(flat.sum().item()) > 0 else -flat


def test_a_network_that_cannot_be_traced_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"torch_export: .*; onnx: ") as caught:
        exported(ReadsValues(), tmp_path, "torch_export", "onnx")
    assert set(caught.value.failures) == {"torch_export", "onnx"}
    assert caught.value.written == []
    assert list(tmp_path.iterdir()) == []


class Widened(nn.Module):
    """Logits too large for an absolute tolerance: no runtime adds up in torch's order."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images) * 1e7
        return logits


def test_an_export_that_computes_something_else_is_refused_with_the_figure_and_the_others_are_kept(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"logits differ by [0-9.e+-]+ from the network's own, more than 0.0001") as caught:
        exported(Widened(), tmp_path, "onnx", "torch_export")
    assert set(caught.value.failures) == {"onnx"}
    assert [path.name for path in caught.value.written] == ["model.pt2"]
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be among bundle, onnx, torch_export"):
        exported(nn.Flatten(), tmp_path, "tflite")  # type: ignore[arg-type]


def test_weights_too_large_for_one_file_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "ONE_FILE_BYTES", 1000)
    model = small()
    paths = exported(model, tmp_path, "onnx")
    assert list(paths) == ["model.onnx.data", "model.onnx"]
    assert paths["model.onnx.data"].stat().st_size > 4 * 512 * 10
    images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(onnx_logits(paths["model.onnx"], images), logits_of(model, images), atol=ONNX_ATOL, rtol=0)


# --- the script of a bundle


@pytest.fixture(scope="module")
def trained_on_folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, Any, Path]:
    """A bundle unpacked, its network, its data set and the folder of images."""
    root = tmp_path_factory.mktemp("folders")
    folder = class_folder(root / "pets", each=4)
    spec = TrainSpec.model_validate({"data": {"dataset": "class_folder", "path": "pets", "image_size": 16, "val_fraction": 0.5}})
    data = open_data(spec.data, data_root=root, seed=0, device=torch.device("cpu"))
    model = build_model("resnet20", num_classes=3, image_size=16, norm="batch", generator_seed=0)
    with torch.no_grad():
        model(torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1)))
    path = exported(model, root, "bundle", preprocessing=Preprocessing.of(data), class_names=data.class_names, spec=spec)["bundle.zip"]
    with zipfile.ZipFile(path) as bundle:
        bundle.extractall(root / "bundle")
    return root / "bundle", model, data, folder


def said(script: Path, *arguments: str) -> list[tuple[float, str]]:
    """What the script prints, in a process that has neither PowerGrad nor what only it needs."""
    command = [sys.executable, "-I", "-W", "error::UserWarning", "-c", BLOCKED, str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    return [(float(line[:6]), line[8:]) for line in done.stdout.splitlines()]


def test_the_script_says_what_the_network_says(trained_on_folders: tuple[Path, nn.Module, Any, Path]) -> None:
    bundle, model, data, _ = trained_on_folders
    images, _ = next(data.held_out_batches(data.val, batch_size=1))
    probabilities = logits_of(model, images).softmax(dim=1)[0]
    first = sorted((bundle.parent / "pets" / "ant").iterdir())
    matching = [path for path in first if np.array_equal(decode(path, 16), data.val.images.pixels[0].numpy())]
    assert len(matching) == 1
    expected = sorted(((float(p), name) for p, name in zip(probabilities, data.class_names, strict=True)), reverse=True)

    found = said(bundle / "inference.py", str(matching[0]))
    assert [name for _, name in found] == [name for _, name in expected]
    assert [p for p, _ in found] == pytest.approx([p for p, _ in expected], abs=1e-4)  # four digits are printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--top", "0", "x.png"], "--top 0: must be at least 1"), (["no.png"], "no.png: cannot be read")],
)
def test_the_script_refuses_in_words(
    trained_on_folders: tuple[Path, nn.Module, Any, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(inference, "__file__", str(trained_on_folders[0] / "inference.py"))
    with pytest.raises(SystemExit, match="2"):
        inference.main(arguments)
    assert message in capsys.readouterr().err


def test_the_script_names_several_images_and_as_many_classes_as_asked(
    trained_on_folders: tuple[Path, nn.Module, Any, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, _, _, folder = trained_on_folders
    monkeypatch.setattr(inference, "__file__", str(bundle / "inference.py"))
    files = sorted(str(path) for path in (folder / "bee").iterdir())[:2]
    assert inference.main([*files, "--top", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [lines[0], lines[2]] == files
    assert re.fullmatch(r"[01]\.\d{4}  (ant|bee|cat)", lines[1])
    assert len(lines) == 4


def pictures(folder: Path) -> Iterator[Path]:
    """One file of every kind that needs its own care."""
    big = image(1, width=301, height=200)
    turned = Image.Exif()
    turned[0x0112] = 6
    sixteen = Image.fromarray(np.random.default_rng(2).integers(0, 65536, (30, 40)).astype(np.uint16))
    for name, made, options in (
        ("drafted.jpg", big, {"quality": 90}),
        ("turned.jpg", big, {"exif": turned}),
        ("cmyk.jpg", big.convert("CMYK"), {}),
        ("grey.png", big.convert("L"), {}),
        ("palette.png", big.convert("P"), {}),
        ("alpha.png", big.convert("RGBA"), {}),
        ("sixteen.png", sixteen, {}),
    ):
        made.save(folder / name, **options)
        yield folder / name


def test_the_script_reads_images_as_training_does(tmp_path: Path) -> None:
    for path in pictures(tmp_path):
        assert np.array_equal(inference.decoded(path, 24), decode(path, 24)), path.name


def test_the_script_normalises_as_training_does_to_the_bit(trained_on_folders: tuple[Path, nn.Module, Any, Path]) -> None:
    bundle, _, data, folder = trained_on_folders
    rules = json.loads((bundle / "preprocessing.json").read_text())
    images = torch.cat([images for images, _ in data.held_out_batches(data.val, batch_size=4)])
    files = sorted(path for kind in folder.iterdir() for path in kind.iterdir())
    mine = [inference.preprocessed(path, rules)[0] for path in files]
    assert all(any(torch.equal(one, other) for other in mine) for one in images)


@given(st.lists(st.floats(2**-7, 1.0, width=32), min_size=3, max_size=3))
def test_mean_and_deviation_come_back_as_the_very_values_of_training(values: list[float]) -> None:
    written = exporting._in_unit_range(torch.tensor(values)[None, :, None, None] * 255)
    assert torch.equal(torch.tensor(written, dtype=torch.float64).mul(255).float(), torch.tensor(values) * 255)


def test_a_mean_of_few_digits_is_written_in_few_digits() -> None:
    assert exporting._in_unit_range(torch.tensor(PREPROCESSING.mean) * 255) == PREPROCESSING.mean


def test_a_grey_data_set_makes_images_grey_first(tmp_path: Path) -> None:
    spec = TrainSpec.model_validate({"data": {"dataset": "digits"}})
    data = open_data(spec.data, data_root=tmp_path, seed=0, device=torch.device("cpu"))
    rules = Preprocessing.of(data)
    assert (rules.image_size, rules.channels) == (16, 1)
    pixels = next(data.val.images.batches(torch.zeros(1, dtype=torch.int64), 1))[0, 0].numpy()
    Image.fromarray(pixels).save(tmp_path / "digit.png")
    image(3).save(tmp_path / "colours.png")
    expected = next(data.held_out_batches(data.val, batch_size=1))[0]
    assert torch.equal(inference.preprocessed(tmp_path / "digit.png", rules.as_json()), expected)
    channels = inference.preprocessed(tmp_path / "colours.png", rules.as_json())[0]
    assert torch.equal(channels[0], channels[1])


def test_the_card_in_the_bundle_holds_the_recipe(trained_on_folders: tuple[Path, nn.Module, Any, Path]) -> None:
    card = (trained_on_folders[0] / "MODEL_CARD.md").read_text()
    recipe = yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])
    assert TrainSpec.model_validate(recipe).data.dataset == "class_folder"
