"""A trained network in forms that need no PowerGrad: torch.export, ONNX, and a bundle with the script that uses it.

Every form takes normalised images (N, 3, S, S), N free, in float32 and gives logits (N, C). Each is loaded again and compared with the
network itself before it is kept. No path of the machine that trained is in any of them.
"""

from __future__ import annotations

import copy
import csv
import importlib.util
import io
import json
import os
import platform
import shutil
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from powergrad import __version__, checkpoint, durable
from powergrad.card import Facts, model_card
from powergrad.data import Data, open_data
from powergrad.models import build_model
from powergrad.models import preprocessing as published_normalisation
from powergrad.spec import TrainSpec

Format = Literal["bundle", "onnx", "torch_export"]

FORMATS: tuple[Format, ...] = get_args(Format)
TOLERANCE = 1e-4
"""Largest difference of any logit; those of trained networks are of order 10, float32 has 7 digits."""
ONE_FILE_BYTES = 2 * 10**9
"""Up to so many bytes of weights model.onnx holds them itself; protobuf ends at 2 GiB."""
CHECKED_BATCHES = (1, 3)
"""Neither is the batch that was traced."""
TRACED_BATCH = 2
LONGEST_CAUSE = 300
"""Characters of an exporter's message: they can be pages."""
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first moment a zip can name: equal contents are equal bytes


class ExportError(Exception):
    """Some formats could not be made of this network. `failures` has the cause by format; `written` the files of the others."""

    def __init__(self, failures: dict[Format, str], written: list[Path]) -> None:
        super().__init__("; ".join(f"{name}: {cause}" for name, cause in failures.items()))
        self.failures = failures
        self.written = written


@dataclass(frozen=True)
class Preprocessing:
    """What becomes of an image before the network sees it: upright, shorter side to `image_size`, middle square, bilinear, normalised."""

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """One value a channel, or one for all; of pixels in [0, 1]."""
    channels: int = 3
    """1: images are turned grey first, and the grey repeated; the network takes three in any case."""

    @classmethod
    def of(cls, data: Data) -> Preprocessing:
        """That of an open data set. Reads one image."""
        pixels = next(data.val.images.batches(torch.zeros(1, dtype=torch.int64, device=data.val.labels.device), 1))
        return cls(data.image_size, _in_unit_range(data.mean), _in_unit_range(data.std), pixels.shape[1])

    @classmethod
    def from_json(cls, rules: dict[str, Any]) -> Preprocessing:
        """What `as_json` gave. Raises KeyError, TypeError."""
        return cls(int(rules["image_size"]), tuple(rules["mean"]), tuple(rules["std"]), int(rules["channels"]))

    def as_json(self) -> dict[str, Any]:
        return {
            "image_size": self.image_size,
            "channels": self.channels,
            "colour": "RGB",
            "orientation": "exif",
            "resize": "shorter side to image_size",
            "crop": "middle square",
            "interpolation": "bilinear, antialiased",
            "range": [0.0, 1.0],
            "mean": _three(self.mean),
            "std": _three(self.std),
            "input": {"shape": ["batch", 3, self.image_size, self.image_size], "dtype": "float32"},
        }


def export(
    model: nn.Module,
    *,
    formats: Sequence[Format],
    preprocessing: Preprocessing,
    class_names: Sequence[str],
    spec: TrainSpec,
    facts: Facts,
    out_dir: Path,
) -> list[Path]:
    """The files made, in the order of `formats`: model.pt2, model.onnx (beyond 2 GB with model.onnx.data), bundle.zip.

    The model is copied, not changed, and may be on any device; torch's generators are not moved.  Raises ValueError for an unknown
    format, OSError when the disk is full, and ExportError at the end, when all formats have been tried.
    """
    if unknown := sorted(set(formats) - set(FORMATS)):
        raise ValueError(f"formats={unknown}: must be among {', '.join(FORMATS)}")
    scratch = out_dir / f"{durable.UNFINISHED}export"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        with torch.autocast("cpu", enabled=False), torch.no_grad():
            work = _Work(_portable(model), preprocessing, tuple(class_names), spec, facts, scratch)
            made, failures = _make_all(work, formats)
        written = [durable.publish(path, out_dir / path.name) for path in made]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if failures:
        raise ExportError(failures, written)
    return written


@dataclass(frozen=True)
class Restored:
    """A network as a checkpoint holds it."""

    model: nn.Module
    manifest: checkpoint.Manifest


def restored(path: Path, *, spec: TrainSpec, classes: int, image_size: int, averaged: bool = False) -> Restored:
    """The network of a checkpoint's folder, verified.  averaged: the moving average of its weights.

    Raises CheckpointBroken, and ValueError for a checkpoint of another network or without an average.
    """
    manifest = checkpoint.verify(path)
    loaded = checkpoint.load(path)
    weights = loaded.ema if averaged else loaded.weights
    if weights is None:
        raise ValueError(f"{path}: holds no averaged weights: its spec has no ema")
    model = build_model(spec.model.name, num_classes=classes, image_size=image_size, norm=spec.model.norm, generator_seed=spec.seed)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path}: holds another network than {spec.model.name} with {classes} classes ({_cause(error)})") from error
    return Restored(model, manifest)


def described(spec: TrainSpec, *, data_root: Path) -> tuple[tuple[str, ...], Preprocessing]:
    """Class names and preprocessing, from the data set itself, of which no image but one is decoded. Raises DataMissing, DataUnreadable."""
    data = open_data(spec.data, data_root=data_root, seed=spec.seed, device=torch.device("cpu"), resident_bytes=0)
    rules = Preprocessing.of(data)
    if spec.model.pretrained:
        mean, std = published_normalisation(spec.model.name)
        rules = replace(rules, mean=mean, std=std)
    return data.class_names, rules


def environment(device: torch.device | None = None) -> dict[str, str]:
    """Versions of what computes here, and on what; nothing that names the machine."""
    found = {
        "powergrad": __version__,
        "torch": torch.__version__,
        **{name: version(name) for name in ("torchvision", "timm", "numpy") if importlib.util.find_spec(name) is not None},
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
    }
    if device is not None:
        found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if torch.version.cuda is not None and device is not None and device.type == "cuda":
        found["cuda"] = torch.version.cuda
    return found


@dataclass
class _Work:
    """One network on its way into several formats, which share what they can."""

    model: nn.Module
    """On the CPU, in float32, for evaluation."""
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    spec: TrainSpec
    facts: Facts
    scratch: Path
    _program: ExportedProgram | None = None
    _pt2: Path | None = None

    def torch_export(self) -> list[Path]:
        return [self.pt2()]

    def onnx(self) -> list[Path]:
        path = self.scratch / "model.onnx"
        _save_onnx(self.program(), path, self.metadata(), external=_bytes_of(self.model) > ONE_FILE_BYTES)
        _compare(self.model, _onnx_logits(path), self.preprocessing.image_size)
        data = path.with_name("model.onnx.data")
        return [data, path] if data.exists() else [path]  # the data first: who sees the model finds them

    def bundle(self) -> list[Path]:
        weights = self.scratch / "model.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}, weights)
        card = model_card(spec=self.spec, facts=self.facts, class_names=self.class_names, preprocessing=self.preprocessing)
        contents: dict[str, Path | bytes] = {
            "MODEL_CARD.md": card.encode(errors="backslashreplace"),
            "inference.py": _script(),
            "labels.json": _json(self.class_names),
            "preprocessing.json": _json(self.preprocessing.as_json()),
            "spec.json": _json(self.spec.model_dump(mode="json")),
            "metrics.csv": _metrics_csv(self.facts),
            "environment.json": _json(dict(self.facts.environment)),
            "files/config.yaml": _run_config(self.spec),
            "files/wandb-summary.json": _run_summary(self.facts),
            "model.pt2": self.pt2(),
            "model.safetensors": weights,
        }
        return [_zipped(contents, self.scratch / "bundle.zip")]

    def program(self) -> ExportedProgram:
        if self._program is None:
            self._program = _traced(self.model, self.preprocessing.image_size)
        return self._program

    def pt2(self) -> Path:
        """model.pt2, checked."""
        if self._pt2 is None:
            path = self.scratch / "model.pt2"
            torch.export.save(self.program(), path)
            _compare(self.model, torch.export.load(path).module(), self.preprocessing.image_size)
            self._pt2 = path
        return self._pt2

    def metadata(self) -> dict[str, str]:
        return {"class_names": json.dumps(self.class_names), "preprocessing": json.dumps(self.preprocessing.as_json())}


def _make_all(work: _Work, formats: Sequence[Format]) -> tuple[list[Path], dict[Format, str]]:
    makers: dict[Format, Callable[[], list[Path]]] = {"torch_export": work.torch_export, "onnx": work.onnx, "bundle": work.bundle}
    made: list[Path] = []
    failures: dict[Format, str] = {}
    for name in formats:
        try:
            made += makers[name]()
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001 # exporters raise anything, from dozens of places, for what they cannot do
            failures[name] = _cause(error)
    return made, failures


def _cause(error: Exception) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    text = f"{type(error).__name__}: {first}" if first else type(error).__name__
    return text if len(text) <= LONGEST_CAUSE else text[: LONGEST_CAUSE - 1] + "…"


def _portable(model: nn.Module) -> nn.Module:
    portable = copy.deepcopy(model).to("cpu", torch.float32).to(memory_format=torch.contiguous_format)
    return portable.eval().requires_grad_(requires_grad=False)


def _traced(model: nn.Module, size: int) -> ExportedProgram:
    example = torch.zeros(TRACED_BATCH, 3, size, size)
    program = torch.export.export(model, (example,), dynamic_shapes=({0: Dim("batch")},))
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)  # file names of this machine
    return program


class _Differs(Exception):
    """What was written computes something else."""


def _compare(model: nn.Module, written: Callable[[Tensor], Tensor], size: int) -> None:
    """Raises _Differs with the figure if any logit is farther off than TOLERANCE, or not finite."""
    generator = torch.Generator().manual_seed(0)
    for batch in CHECKED_BATCHES:
        images = torch.randn(batch, 3, size, size, generator=generator)
        difference = float((written(images) - model(images)).abs().max())
        if not difference <= TOLERANCE:  # NaN too
            raise _Differs(f"logits differ by {difference:.3g} from the network's own, more than {TOLERANCE:g}")


def _save_onnx(program: ExportedProgram, path: Path, metadata: dict[str, str], *, external: bool) -> None:
    made = torch.onnx.export(program, dynamo=True, verbose=False, input_names=["images"], output_names=["logits"])
    assert made is not None, "with dynamo it is returned"
    parts: list[Any] = [made.model, made.model.graph, *made.model.graph.all_nodes()]
    for part in parts:
        part.metadata_props.clear()  # how torch came to each node: of no use to a runtime, and as large as a small network
    made.model.metadata_props.update(metadata)
    made.save(path, external_data=external)


def _onnx_logits(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime  # type: ignore[import-untyped] # loaded only where it is wanted

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _bytes_of(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def _script() -> bytes:
    found = importlib.util.find_spec("powergrad.inference")
    assert found is not None
    assert found.origin is not None, "a module of this package"
    return Path(found.origin).read_bytes()


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode() + b"\n"


def _metrics_csv(facts: Facts) -> bytes:
    """A line a point; an empty cell was not measured there, or is not finite."""
    names = sorted({name for point in facts.points for name in point} - {"step", "epoch"})
    text = io.StringIO()
    table = csv.DictWriter(text, ["step", "epoch", *names], restval="", lineterminator="\n")
    table.writeheader()
    table.writerows(facts.points)
    return text.getvalue().encode()


def _run_config(spec: TrainSpec) -> bytes:
    """The spec as Weights & Biases lays a run's config out: a value below each name."""
    named = {name: {"value": value} for name, value in spec.model_dump(mode="json").items()}
    return yaml.safe_dump({"wandb_version": 1, **named}, sort_keys=False, allow_unicode=True, width=10**6).encode()


def _run_summary(facts: Facts) -> bytes:
    """The scores of these weights as Weights & Biases keeps a run's summary; null is not finite."""
    return _json({**facts.metrics, "epoch": facts.epoch, "_step": facts.step})


def _zipped(contents: dict[str, Path | bytes], path: Path) -> Path:
    """Stored, not compressed: weights do not shrink, and so the bytes depend on no zlib."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as bundle:
        for name, content in contents.items():
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            entry.file_size = os.path.getsize(content) if isinstance(content, Path) else len(content)  # decides on zip64
            with bundle.open(entry, "w") as file, content.open("rb") if isinstance(content, Path) else io.BytesIO(content) as source:
                shutil.copyfileobj(source, file, 2**20)
    return path


def _in_unit_range(values: Tensor) -> tuple[float, ...]:
    return tuple(_shortest(np.float32(value)) for value in values.flatten().tolist())


def _shortest(value: np.float32) -> float:
    """A 255th in the fewest digits that, times 255, are the very float32 value again; nine always are."""
    short = (float(f"{float(value) / 255:.{digits}g}") for digits in range(1, 10))
    return next(one for one in short if np.float32(one * 255) == value)


def _three(values: tuple[float, ...]) -> list[float]:
    return list(values) if len(values) == 3 else list(values) * 3
