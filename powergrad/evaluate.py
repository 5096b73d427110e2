"""Metrics of a network on a held-out split."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor, nn
from torchmetrics.aggregation import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.functional.classification import binary_calibration_error
from torchmetrics.metric import Metric

TOP_K = 5
CALIBRATION_BINS = 15
"""Of the expected calibration error (Guo et al. 2017, arXiv 1706.04599)."""


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    split: str,
    classes: int,
    device: torch.device,
    autocast: torch.autocast,
    beat: Callable[[int], None],
) -> dict[str, float]:
    """Loss, accuracies and logit statistics over all batches, each name with its split in front; `val_top5` from five classes on.

    The loss is plain cross-entropy in nats, whatever the training smooths. `ece` is the expected calibration error. The logit statistics are means over the images of, over the
    classes, the L2 norm, |mean|, |max| and variance (arXiv 2111.12495, section 5).  beat: called with the images done after each batch.
    """
    metrics: dict[str, Metric] = {name: MeanMetric(nan_strategy="disable").to(device) for name in ("loss", *LOGIT_STATISTICS)}
    for k in (1, TOP_K):
        if k <= classes:
            metrics[f"top{k}"] = MulticlassAccuracy(classes, top_k=k, average="micro", validate_args=False).to(device)
    confidences: list[Tensor] = []
    hits: list[Tensor] = []
    done = 0
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for images, labels in batches:
                with autocast:
                    logits = model(images).float()  # (B, C)
                _update(metrics, logits, labels)
                confidence, guess = logits.softmax(dim=1).max(dim=1)
                confidences.append(confidence)
                hits.append(guess == labels)
                done += len(labels)
                beat(done)
    finally:
        model.train(training)
    values = {name: float(metric.compute()) for name, metric in metrics.items()}
    return {f"{split}_{name}": value for name, value in (values | {"ece": calibration_error(confidences, hits)}).items()}


def calibration_error(confidences: Sequence[Tensor], hits: Sequence[Tensor]) -> float:
    """Mean distance of confidence and accuracy over bins of equal width, in [0, 1]; NaN where a confidence is.

    confidences: the largest probability of each image, in batches (B,).  hits: whether its class was right.
    On the CPU: a GPU would add a bin's images up in an order that changes from run to run.
    """
    confidence = torch.cat([*confidences]).cpu()
    if not bool(confidence.isfinite().all()):
        return math.nan
    return float(binary_calibration_error(confidence, torch.cat([*hits]).cpu().long(), n_bins=CALIBRATION_BINS))


LOGIT_STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "logit_norm": lambda logits: logits.norm(dim=1),
    "logit_mean_abs": lambda logits: logits.mean(dim=1).abs(),
    "logit_max_abs": lambda logits: logits.amax(dim=1).abs(),
    "logit_var": lambda logits: logits.var(dim=1, correction=0),
}


def _update(metrics: dict[str, Metric], logits: Tensor, labels: Tensor) -> None:
    metrics["loss"].update(F.cross_entropy(logits, labels, reduction="none"))
    for name, statistic in LOGIT_STATISTICS.items():
        metrics[name].update(statistic(logits))
    for k in (1, TOP_K):
        if f"top{k}" in metrics:
            metrics[f"top{k}"].update(logits, labels)
