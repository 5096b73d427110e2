"""The paper's experiments as job specs: one preset for each row of its tables (arXiv 2111.12495, tables 1 to 5). Imports no torch.

The recipe is that of section 4: SGD with Nesterov momentum 0.9, weight decay 5e-4, 256 images on each of 4 GPUs, 100 epochs, 5 of them
warm-up from 4e-4 to 0.4, mixed precision, ImageNet-1K. Smaller batches have a rate smaller in proportion. `python -m powergrad.presets
FOLDER` writes them as YAML.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

BATCH, PEAK_LR, WARMUP_LR = 1024, 0.4, 4e-4
NORM_BOUND = 1.0
"""Of clipping by global norm: the paper gives none, this is the usual one."""
AGC_FACTOR = 0.01  # Brock et al. 2021, arXiv 2102.06171


@dataclass(frozen=True)
class Preset:
    """A ready spec and what the paper got with it: single runs, accuracies as fractions."""

    name: str
    """paper-05-resnet50-pgt0.3."""
    title: str
    spec: dict[str, Any]
    """The body of a job: data set, network, loss, recipe and GPUs."""
    row: int
    train_top1: float
    val_top1: float
    gain: float | None
    """Of val_top1 over the baseline's; None is a baseline."""


@dataclass(frozen=True)
class _Row:
    number: int
    model: str
    train: float
    val: float
    alpha: float = 1.0
    gain: float | None = None
    smoothing: float = 0.0
    schedule: str = "cosine"
    clip: str | None = None
    norm: str | None = None
    batch: int = BATCH

    @property
    def method(self) -> str:
        parts = ["ls0.1"] * bool(self.smoothing) + [self.clip or ""] * bool(self.clip) + [f"pgt{self.alpha:g}"] * (self.alpha < 1.0)
        return "-".join(parts) or "baseline"


_ROWS = (
    _Row(1, "seresnet50", 81.50, 77.218),
    _Row(2, "seresnet50", 82.47, 77.952, alpha=0.3, gain=0.734),
    _Row(3, "resnet50", 79.18, 76.560),
    _Row(4, "resnet50", 79.68, 77.216, alpha=0.05, gain=0.656),
    _Row(5, "resnet50", 79.43, 76.886, alpha=0.3, gain=0.326),
    _Row(6, "resnet50", 78.81, 76.698, smoothing=0.1, gain=0.138),
    _Row(7, "resnet50", 78.47, 76.968, alpha=0.3, smoothing=0.1, gain=0.408),
    _Row(8, "resnet50", 77.69, 76.390, alpha=0.05, smoothing=0.1, gain=-0.170),
    _Row(9, "resnet50", 78.99, 75.970, schedule="step"),
    # the ablation table's alpha; the main table prints 0.05 beside the same figures
    _Row(10, "resnet50", 79.56, 76.494, alpha=0.3, schedule="step", gain=0.524),
    _Row(11, "resnet101", 82.29, 77.896),
    _Row(12, "resnet101", 83.10, 78.258, alpha=0.3, gain=0.362),
    _Row(13, "seresnet18", 71.42, 71.090),
    _Row(14, "seresnet18", 71.60, 71.436, alpha=0.25, gain=0.346),
    _Row(15, "resnet18", 69.95, 69.704, schedule="step"),
    _Row(16, "resnet18", 70.30, 69.844, alpha=0.25, schedule="step", gain=0.140),
    _Row(17, "resnet18", 70.38, 70.208),
    _Row(18, "resnet18", 70.53, 70.298, alpha=0.25, gain=0.090),
    _Row(19, "resnet18", 66.27, 64.816, norm="none"),
    _Row(20, "resnet18", 66.62, 65.498, alpha=0.92, norm="none", gain=0.682),
    _Row(21, "resnet18", 68.02, 66.552, norm="none", batch=512),
    _Row(22, "resnet18", 69.50, 67.236, alpha=0.25, norm="none", batch=512, gain=0.684),
    _Row(23, "resnet18", 68.86, 66.796, norm="none", batch=256),
    _Row(24, "resnet18", 69.04, 67.064, clip="norm", norm="none", batch=256, gain=0.268),
    _Row(25, "resnet18", 69.06, 67.298, clip="agc", norm="none", batch=256, gain=0.502),
    _Row(26, "resnet18", 69.97, 67.814, alpha=0.25, norm="none", batch=256, gain=1.018),
    _Row(27, "resnet18", 68.67, 67.088, alpha=0.25, clip="norm", norm="none", batch=256, gain=0.292),
    _Row(28, "resnet18", 70.92, 68.856, alpha=0.25, clip="agc", norm="none", batch=256, gain=2.060),
)


@cache
def all_presets() -> tuple[Preset, ...]:
    """The 28 rows, in the order of the paper's tables."""
    return tuple(_preset(row) for row in _ROWS)


def preset(name: str) -> Preset:
    """Raises KeyError for a name that is none."""
    return next((one for one in all_presets() if one.name == name), None) or _unknown(name)


def _unknown(name: str) -> Preset:
    raise KeyError(f"preset {name!r}: must be one of {', '.join(one.name for one in all_presets())}")


def _preset(row: _Row) -> Preset:
    norm = "" if row.norm is None else "-nobn"
    batch = "" if row.batch == BATCH else f"-b{row.batch}"
    schedule = "" if row.schedule == "cosine" else f"-{row.schedule}"
    name = f"paper-{row.number:02d}-{row.model}{norm}{batch}{schedule}-{row.method}"
    title = f"ImageNet-1K, {row.model}{' without normalisation' if row.norm else ''}, {row.schedule}, batch {row.batch}: {row.method}"
    gain = None if row.gain is None else row.gain / 100
    return Preset(name, title, _spec(row, name), row.number, row.train / 100, row.val / 100, gain)


def _spec(row: _Row, name: str) -> dict[str, Any]:
    share = row.batch / BATCH
    spec: dict[str, Any] = {
        "name": name,
        "data": {"dataset": "imagenet", "image_size": 224, "batch_size": row.batch, "augment": "imagenet", "workers": 8},
        "model": {"name": row.model} | ({} if row.norm is None else {"norm": row.norm}),
        "loss": {"alpha": row.alpha} | ({"label_smoothing": row.smoothing} if row.smoothing else {}),
        "optimizer": {"name": "sgd", "lr": PEAK_LR * share, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
        "schedule": {"name": row.schedule, "warmup_epochs": 5, "warmup_lr": WARMUP_LR * share}
        | ({"milestones": [30, 60, 90], "gamma": 0.1} if row.schedule == "step" else {}),
        "epochs": 100,
        "precision": "auto",
        "resources": {"gpus": 4},
        "labels": {"paper": f"row-{row.number:02d}"},
    }
    if row.clip is not None:
        spec["clip"] = {"mode": row.clip, "value": AGC_FACTOR if row.clip == "agc" else NORM_BOUND}
    return spec


def _yaml(one: Preset) -> str:
    import yaml  # only here: the presets themselves need none

    gain = "the baseline" if one.gain is None else f"{100 * one.gain:+.3f} points"
    head = f"# {one.title}.\n# arXiv 2111.12495, one run: {100 * one.train_top1:.2f} % train, {100 * one.val_top1:.3f} % validation top-1 ({gain}).\n"
    return head + yaml.safe_dump(one.spec, sort_keys=False)


def write(folder: Path) -> list[Path]:
    """The presets as YAML files, one a row."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{one.name.removeprefix('paper-')}.yaml" for one in all_presets()]
    for path, one in zip(paths, all_presets(), strict=True):
        path.write_text(_yaml(one))
    return paths


if __name__ == "__main__":
    write(Path(sys.argv[1]))
