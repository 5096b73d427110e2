"""Forward and backward pass of the PowerGrad loss against F.cross_entropy, alternating in one run.

    python -m benchmarks.loss [--alpha 0.3] [--threads 1] [--device cpu] [--rounds 30] [--json] [--save]

Prints the ratio of the median times at each size, below 1 when the PowerGrad loss is the faster, and their geometric mean.
`--save` appends the result as a line to benchmarks/results/loss.jsonl.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import TypedDict

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks import report
from benchmarks.report import Neighbours, Origin
from powergrad.loss import power_grad_cross_entropy

Loss = Callable[[Tensor, Tensor], Tensor]

SIZES = [(256, 10), (256, 1000), (1024, 1000), (64, 100, 32, 32)]
ROUND_S = 0.01  # seconds a round should last at least: far above the clock's grain


class SizeResult(TypedDict):
    """Medians at one size, in microseconds for one forward and backward pass."""

    shape: list[int]
    cross_entropy_us: float
    power_grad_us: float
    ratio: float


class Result(Origin):
    """One run of the benchmark."""

    peer: str
    threads: int
    alpha: float
    rounds: int
    sizes: list[SizeResult]
    geometric_mean: float
    others_share: float


def main() -> None:
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    result = measure(alpha=options.alpha, device=torch.device(options.device), rounds=options.rounds)
    report.deliver(result, _table(result), options)


def measure(*, alpha: float, device: torch.device, rounds: int) -> Result:
    """Time both losses at every size."""
    neighbours = Neighbours()
    sizes = [_measure_size(shape, alpha=alpha, device=device, rounds=rounds) for shape in SIZES]
    return {
        **report.origin("loss", packages=["torch"]),
        "hardware": _hardware(device),
        "peer": "torch.nn.functional.cross_entropy",
        "threads": torch.get_num_threads(),
        "alpha": alpha,
        "rounds": rounds,
        "sizes": sizes,
        "geometric_mean": math.prod(size["ratio"] for size in sizes) ** (1 / len(sizes)),
        "others_share": neighbours.share(),
    }


def _measure_size(shape: tuple[int, ...], *, alpha: float, device: torch.device, rounds: int) -> SizeResult:
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=rng).to(device).requires_grad_()
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=rng).to(device)
    losses: dict[str, Loss] = {"theirs": F.cross_entropy, "ours": lambda z, y: power_grad_cross_entropy(z, y, alpha=alpha)}

    first = {name: _seconds(loss, logits, target, repeats=3) for name, loss in losses.items()}  # warms caches and allocator up
    repeats = max(1, math.ceil(ROUND_S / max(first.values())))
    times: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(rounds):
        for name, loss in losses.items():
            times[name].append(_seconds(loss, logits, target, repeats=repeats))

    theirs, ours = statistics.median(times["theirs"]), statistics.median(times["ours"])
    return {"shape": list(shape), "cross_entropy_us": theirs * 1e6, "power_grad_us": ours * 1e6, "ratio": ours / theirs}


def _seconds(loss: Loss, logits: Tensor, target: Tensor, *, repeats: int) -> float:
    """Mean time of one forward and backward pass."""
    _wait(logits.device)
    start = time.perf_counter()
    for _ in range(repeats):
        logits.grad = None
        torch.autograd.backward(loss(logits, target))
    _wait(logits.device)
    return (time.perf_counter() - start) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _hardware(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else report.hardware()


def _table(result: Result) -> str:
    rows = [f"{report.heading(result)}; {result['threads']} threads, alpha {result['alpha']}, {result['rounds']} rounds"]
    rows.append(f"{'logits':<20}{'F.cross_entropy':>18}{'PowerGrad':>14}{'ratio':>8}")
    rows += [
        f"{'x'.join(map(str, size['shape'])):<20}{size['cross_entropy_us']:>15.0f} us{size['power_grad_us']:>11.0f} us{size['ratio']:>8.2f}"
        for size in result["sizes"]
    ]
    rows.append(f"{'geometric mean':<52}{result['geometric_mean']:>8.2f}")
    return "\n".join(rows + report.crowding(result["others_share"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="PowerGrad loss against F.cross_entropy, forward and backward")
    parser.add_argument("--alpha", type=float, default=0.3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=30)
    report.add_options(parser)
    return parser


if __name__ == "__main__":
    main()
