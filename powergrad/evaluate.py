"""Metrics of a network on a held-out split."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor, nn
from torchmetrics.aggregation import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.metric import Metric

TOP_K = 5


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

    The loss is plain cross-entropy in nats, whatever the training smooths. The logit statistics are means over the images of, over the
    classes, the L2 norm, |mean|, |max| and variance (arXiv 2111.12495, section 5).  beat: called with the images done after each batch.
    """
    metrics: dict[str, Metric] = {name: MeanMetric(nan_strategy="disable").to(device) for name in ("loss", *LOGIT_STATISTICS)}
    for k in (1, TOP_K):
        if k <= classes:
            metrics[f"top{k}"] = MulticlassAccuracy(classes, top_k=k, average="micro", validate_args=False).to(device)
    done = 0
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for images, labels in batches:
                with autocast:
                    logits = model(images).float()  # (B, C)
                _update(metrics, logits, labels)
                done += len(labels)
                beat(done)
    finally:
        model.train(training)
    return {f"{split}_{name}": float(metric.compute()) for name, metric in metrics.items()}


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
