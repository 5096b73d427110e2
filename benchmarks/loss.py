"""Forward and backward pass of the PowerGrad loss against F.cross_entropy, alternating in one run.

    python -m benchmarks.loss [--alpha 0.3] [--threads 1] [--device cpu] [--rounds 30] [--json] [--save]

Prints the ratio of the median times at each size, below 1 when the PowerGrad loss is the faster, and their geometric mean.
`--save` appends the result as a line to benchmarks/results/loss.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypedDict

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from powergrad.loss import power_grad_cross_entropy

Loss = Callable[[Tensor, Tensor], Tensor]

SIZES = [(256, 10), (256, 1000), (1024, 1000), (64, 100, 32, 32)]
RESULTS = Path(__file__).parent / "results" / "loss.jsonl"
ROUND_S = 0.01  # seconds a round should last at least: far above the clock's grain
STARVED = 0.9  # CPU time over wall time below which somebody else had the core


class SizeResult(TypedDict):
    """Medians at one size, in microseconds for one forward and backward pass."""

    shape: list[int]
    cross_entropy_us: float
    power_grad_us: float
    ratio: float


class Result(TypedDict):
    """One run of the benchmark."""

    benchmark: str
    peer: str
    date: str
    hardware: str
    threads: int
    torch: str
    python: str
    alpha: float
    rounds: int
    sizes: list[SizeResult]
    geometric_mean: float
    cpu_share: float


def main() -> None:
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    result = measure(alpha=options.alpha, device=torch.device(options.device), rounds=options.rounds)
    print(json.dumps(result) if options.json else _table(result))
    if options.save:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as lines:
            lines.write(json.dumps(result) + "\n")


def measure(*, alpha: float, device: torch.device, rounds: int) -> Result:
    """Time both losses at every size."""
    wall, cpu = time.perf_counter(), time.process_time()
    sizes = [_measure_size(shape, alpha=alpha, device=device, rounds=rounds) for shape in SIZES]
    return {
        "benchmark": "loss",
        "peer": "torch.nn.functional.cross_entropy",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": _hardware(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "alpha": alpha,
        "rounds": rounds,
        "sizes": sizes,
        "geometric_mean": math.prod(size["ratio"] for size in sizes) ** (1 / len(sizes)),
        "cpu_share": (time.process_time() - cpu) / (time.perf_counter() - wall),
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
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def _table(result: Result) -> str:
    rows = [
        f"{result['hardware']}, {result['threads']} threads, torch {result['torch']}, alpha {result['alpha']}, {result['rounds']} rounds"
    ]
    rows.append(f"{'logits':<20}{'F.cross_entropy':>18}{'PowerGrad':>14}{'ratio':>8}")
    rows += [
        f"{'x'.join(map(str, size['shape'])):<20}{size['cross_entropy_us']:>15.0f} us{size['power_grad_us']:>11.0f} us{size['ratio']:>8.2f}"
        for size in result["sizes"]
    ]
    rows.append(f"{'geometric mean':<52}{result['geometric_mean']:>8.2f}")
    if result["cpu_share"] < STARVED:
        rows.append(f"warning: this process had the CPU for {result['cpu_share']:.0%} of the time; repeat on an idle machine")
    return "\n".join(rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="PowerGrad loss against F.cross_entropy, forward and backward")
    parser.add_argument("--alpha", type=float, default=0.3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--save", action="store_true", help="append the result to benchmarks/results/loss.jsonl")
    return parser


if __name__ == "__main__":
    main()
