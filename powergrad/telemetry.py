"""What the paper measures besides accuracy, of the user's own run: gradients, weights, dead filters and features, memory, energy.

Scalars are handed back as metrics. What there is one value a layer or a filter of goes into `telemetry/a<attempt>.jsonl` below the
run's directory; `read_history` joins the attempts' files to what an undisturbed run would have written. Nothing here changes a bit of
the training: values are read from the network, never written, and no random state is touched. A look costs one wait for the device.
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from powergrad.loss import power_softmax
from powergrad.protocol import finite_or_none

log = logging.getLogger(__name__)

DIRECTORY = "telemetry"
SNAPSHOTS = 64
"""Of the filters' norms in a run: each is a number a filter (26,560 in a ResNet-50), and no picture is wider."""
DIGITS = 6
"""Significant decimal digits of what is kept: fp32 has seven, the last of them noise."""
ZERO_NORM = 1e-6
"""L2 norm below which a filter counts as zeroed out. A fresh one has a norm near 1; without a gradient, weight decay shrinks it
geometrically and never quite to 0. At 1e-6 what it adds is beneath the rounding of its neighbours' outputs (2^-20), and the gradient it
passes back is as small: without a normalisation layer behind it, it never recovers (arXiv 2111.12495, on zeroing-out)."""
MACHINE_METRICS = ("memory_gib", "gpu_energy_j", "gpu_power_w")
"""What two runs of one spec do not share."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Telemetry:
    """Looks at one attempt's network: at gradients every so many steps, at weights and features in every evaluation.

    classifier: dotted name of the module that gives the logits, as `powergrad.models.classifier_of` says it.  run_dir: the run's directory.
    resumed_step: steps already done; what earlier attempts wrote after it is void.  epochs: of the whole run.
    keeps_history: of several ranks, which say the same, only one may write.
    A history that cannot be written (disk full) is logged once and given up for the attempt; training goes on.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        classifier: str,
        run_dir: Path,
        attempt: int,
        resumed_step: int,
        epochs: int,
        device: torch.device,
        keeps_history: bool = True,
    ) -> None:
        self._model, self._classifier, self._device = model, classifier, device
        model.get_submodule(classifier)  # raises AttributeError now instead of after an epoch
        self._epochs = epochs
        self._parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._convolutions = {name: module for name, module in model.named_modules() if isinstance(module, CONVOLUTIONS)}
        self._used_features: Tensor | None = None
        counter = nvml_energy_counter(device)
        self._energy = None if counter is None else EnergyMeter(counter)
        self._journal = _Journal(run_dir / DIRECTORY / f"a{attempt}.jsonl", silent=not keeps_history)
        self._journal.append(
            {"resumed_step": resumed_step, "parameters": list(self._parameters), "convolutions": list(self._convolutions)}, durable=True
        )

    @torch.no_grad()
    def look(self, step: int, *, logits: Tensor, targets: Tensor, alpha: float, label_smoothing: float = 0.0) -> dict[str, float]:
        """Gradient metrics, between the backward pass (unscaled) and clipping. One wait for the device.

        logits: (B, C) of the (last micro-)batch.  targets: class indices (B,) or probabilities (B, C).  alpha, label_smoothing: the loss's.
        Returns grad_norm (L2, over all parameters) and, of the gradient p' - q at the logits, over the batch: grad_true_share (the true
        class's part of its squared length), grad_cosine (with the ordinary gradient p - q) and grad_gain (length, ordinary is 1).
        """
        graded = {name: parameter.grad for name, parameter in self._parameters.items() if parameter.grad is not None}
        norms = torch.stack([torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in graded.values()])
        at_logits = _logit_gradient(logits, targets, alpha=alpha, label_smoothing=label_smoothing)
        values: list[float] = torch.cat((torch.linalg.vector_norm(norms)[None], at_logits, norms)).tolist()  # the wait for the device
        of = dict(zip(graded, values[4:], strict=True))
        self._journal.append({"step": step, "gradients": [_rounded(of.get(name, math.nan)) for name in self._parameters]})
        return dict(zip(("grad_norm", "grad_true_share", "grad_cosine", "grad_gain"), values[:4], strict=True))

    @contextmanager
    def watch_features(self, model: nn.Module | None = None) -> Iterator[None]:
        """Notes, during an evaluation, which of the features before the classifier are ever different from zero.

        model: what is evaluated where that is a copy (averaged weights, say); None is the network itself.
        """
        self._used_features = None
        classifier = (self._model if model is None else model).get_submodule(self._classifier)
        hook = classifier.register_forward_pre_hook(self._note_features)
        try:
            yield
        finally:
            hook.remove()

    @torch.no_grad()
    def at_evaluation(self, step: int, epoch: int, *, metrics: Mapping[str, float], train_top1: float | None) -> dict[str, float]:
        """Metrics of weights and machine after an evaluation; every so many epochs the norm of every filter goes into the history.

        epoch: epochs done.  metrics: the evaluation's, of which val_top1 counts.  train_top1: None where there is none yet.
        Returns weight_norm; zero_filters and zero_filter_share (networks with convolutions); zero_features (features that were zero for
        every image, if `watch_features` saw some); generalisation_gap; memory_gib (peak, of the device or the process);
        gpu_energy_j (whole GPU, since this attempt began) and gpu_power_w (mean since the evaluation before), where NVML counts them.
        """
        weights = torch.stack([torch.linalg.vector_norm(parameter, dtype=torch.float32) for parameter in self._parameters.values()])
        filters = [_filter_norms(module.weight) for module in self._convolutions.values()]
        unused = [] if self._used_features is None else [(~self._used_features).sum().float()[None]]
        self._used_features = None
        scalars = torch.cat((torch.linalg.vector_norm(weights)[None], *unused, *filters)).tolist()  # the wait for the device

        found = {"weight_norm": scalars.pop(0)} | ({"zero_features": scalars.pop(0)} if unused else {})
        if filters:
            zeroed = sum(norm < ZERO_NORM for norm in scalars)
            found |= {"zero_filters": float(zeroed), "zero_filter_share": zeroed / len(scalars)}
        if train_top1 is not None and "val_top1" in metrics:
            found["generalisation_gap"] = train_top1 - metrics["val_top1"]
        if filters and self._snapshot_due(epoch):
            split = _split([_rounded(norm) for norm in scalars], [len(norms) for norms in filters])
            self._journal.append({"step": step, "epoch": epoch, "filters": split}, durable=True)
        return found | {"memory_gib": peak_memory_gib(self._device)} | ({} if self._energy is None else self._energy.read())

    def rolled_back(self, to_step: int) -> None:
        """Training went back to `to_step`: what was written after it is void."""
        self._journal.append({"rolled_back_to": to_step}, durable=True)

    def _snapshot_due(self, epoch: int) -> bool:
        """Every so many epochs, counted from the end: the last is always among them."""
        return (self._epochs - epoch) % math.ceil(self._epochs / SNAPSHOTS) == 0

    def _note_features(self, classifier: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        features = inputs[0].detach()  # (B, ..., F), before a convolution (B, F, ...)
        feature_dim = 1 if isinstance(classifier, CONVOLUTIONS) else features.dim() - 1
        used = (features != 0).any(dim=[dim for dim in range(features.dim()) if dim != feature_dim])  # (F,)
        self._used_features = used if self._used_features is None else self._used_features | used


def _logit_gradient(logits: Tensor, targets: Tensor, *, alpha: float, label_smoothing: float) -> Tensor:
    """(3,) float32: true share, cosine, gain. An image whose gradient is zero has no direction and counts in none.

    In L1 the true class's share would be 1/2 whatever alpha is, since the entries of p' - q sum to zero: hence squares, which run from
    1/2 (one wrong class gets all the rest) to nearly 1 (all wrong classes share it).
    """
    wide = logits.detach().double()  # p - q of a well-learned image is lost in fp32's rounding of p
    classes = wide.shape[1]
    by_index = targets.dim() == 1
    q = torch.zeros_like(wide).scatter_(1, targets[:, None].long(), 1.0) if by_index else targets.double()  # (B, C)
    true_class = q.argmax(dim=1, keepdim=True)
    q = (1.0 - label_smoothing) * q + label_smoothing / classes

    ours, ordinary = power_softmax(wide, alpha, dim=1) - q, torch.softmax(wide, dim=1) - q
    length, ordinary_length = ours.norm(dim=1), ordinary.norm(dim=1)
    share = (ours.gather(1, true_class).squeeze(1) / length).square()
    cosine = (ours * ordinary).sum(dim=1) / (length * ordinary_length)
    return torch.stack((share.nanmean(), cosine.nanmean(), length.sum() / ordinary_length.sum())).float()


def _filter_norms(weight: Tensor) -> Tensor:
    """(O,) L2 norms of a convolution's filters, weight (O, I, ...)."""
    norms: Tensor = torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.dim())), dtype=torch.float32)
    return norms


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: allocated by torch on a GPU, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


@dataclass
class EnergyMeter:
    """Energy and power from a counter of millijoules, which gives None when it cannot be read."""

    counter: Callable[[], int | None]
    clock: Callable[[], float] = time.monotonic
    _begun: int | None = field(init=False)
    _last: tuple[int | None, float] = field(init=False)

    def __post_init__(self) -> None:
        self._begun = self.counter()
        self._last = (self._begun, self.clock())

    def read(self) -> dict[str, float]:
        """gpu_energy_j since the meter was made, gpu_power_w since the last reading; nothing where the counter gave none."""
        (before, then), (after, now) = self._last, (self.counter(), self.clock())
        self._last = (after, now)
        if self._begun is None or before is None or after is None or now <= then:
            return {}
        return {"gpu_energy_j": (after - self._begun) / 1e3, "gpu_power_w": (after - before) / 1e3 / (now - then)}


def nvml_energy_counter(device: torch.device) -> Callable[[], int | None] | None:
    """NVML's counter of the GPU's energy in mJ; None without a GPU, NVML, or a GPU that counts (Volta and later do, MIG slices do not)."""
    if device.type != "cuda":
        return None
    try:
        import pynvml  # comes with the worker, not with the library
    except ImportError:
        return None

    def counter() -> int | None:
        try:
            return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))
        except pynvml.NVMLError:
            return None

    try:
        pynvml.nvmlInit()
        # by UUID: NVML knows nothing of CUDA_VISIBLE_DEVICES
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except pynvml.NVMLError:
        return None
    return None if counter() is None else counter


@dataclass(frozen=True)
class Gradients:
    """L2 norm of each trained parameter's gradient, before clipping, by its name; NaN where there was no finite one."""

    step: int
    norms: dict[str, float]


@dataclass(frozen=True)
class Filters:
    """L2 norms of the filters of each convolution, by its name, in the order of its output channels."""

    step: int
    epoch: int
    norms: dict[str, list[float]]


@dataclass(frozen=True)
class History:
    """What a run has kept per layer, oldest first, as if it had never been interrupted."""

    gradients: tuple[Gradients, ...] = ()
    filters: tuple[Filters, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The same as plain values; null where a norm is not finite."""
        return {
            "gradients": [
                {"step": one.step, "norms": {name: finite_or_none(norm) for name, norm in one.norms.items()}} for one in self.gradients
            ],
            "filters": [
                {
                    "step": one.step,
                    "epoch": one.epoch,
                    "norms": {name: list(map(finite_or_none, norms)) for name, norms in one.norms.items()},
                }
                for one in self.filters
            ],
        }


def read_history(run_dir: Path) -> History:
    """The attempts' files joined, without what was written after a step that training went back to. Empty where there are none.

    Raises ValueError for a file that is damaged elsewhere than in its last line.
    """
    gradients: dict[int, Gradients] = {}
    filters: dict[int, Filters] = {}
    for path in sorted((run_dir / DIRECTORY).glob("a*.jsonl"), key=lambda path: int(path.stem[1:])):
        parameters: Sequence[str] = ()
        convolutions: Sequence[str] = ()
        for line in _lines(path):
            back_to = line.get("resumed_step", line.get("rolled_back_to"))
            if back_to is not None:
                gradients = {step: record for step, record in gradients.items() if step <= back_to}
                filters = {step: record for step, record in filters.items() if step <= back_to}
                parameters, convolutions = line.get("parameters", parameters), line.get("convolutions", convolutions)
            elif "gradients" in line:
                norms = dict(zip(parameters, map(_read, line["gradients"]), strict=True))
                gradients[line["step"]] = Gradients(line["step"], norms)
            else:
                by_filter = [list(map(_read, norms)) for norms in line["filters"]]
                filters[line["step"]] = Filters(line["step"], line["epoch"], dict(zip(convolutions, by_filter, strict=True)))
    return History(tuple(gradients[step] for step in sorted(gradients)), tuple(filters[step] for step in sorted(filters)))


class _Journal:
    """An append-only file of JSON lines. Opened for each line: a trainer that is killed leaves nothing open and at most one torn line."""

    def __init__(self, path: Path, *, silent: bool) -> None:
        self._path = path
        self._given_up = silent
        if silent:
            return
        with self._outlived():
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():  # this attempt once before, and perhaps cut short
                os.truncate(path, len(_whole_lines(path)))

    def append(self, line: Mapping[str, Any], *, durable: bool = False) -> None:
        """durable: before a checkpoint, so that a machine that goes down does not take from the history what lies before it."""
        if self._given_up:
            return
        with self._outlived(), self._path.open("ab") as file:
            file.write(json.dumps(line, separators=(",", ":"), allow_nan=False).encode() + b"\n")
            if durable:
                file.flush()
                os.fsync(file.fileno())

    @contextmanager
    def _outlived(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._given_up = True  # a line after a torn one would be read as part of it
            log.warning("no more telemetry is kept in this attempt: %s", error)


def _whole_lines(path: Path) -> bytes:
    """A file's bytes up to its last newline."""
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_whole_lines(path).splitlines(), start=1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: must be a JSON object ({error}); remove the file to read the other attempts'"
            ) from error


def _rounded(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def _read(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _split(values: Sequence[float | None], lengths: Sequence[int]) -> list[list[float | None]]:
    rest = iter(values)
    return [[next(rest) for _ in range(length)] for length in lengths]
