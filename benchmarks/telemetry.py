"""A training loop with telemetry against the same loop without, the two alternating step by step in one run.

    python -m benchmarks.telemetry [--every-steps 100] [--batch-size 32] [--image-size 32] [--threads 1] [--device cpu] [--rounds 5]
                                   [--quick] [--json] [--save]

A round is `every_steps` steps of a ResNet-18 with one look, and one evaluation with its look at weights and features: as dear as telemetry
gets, since an epoch has seldom so few steps. Prints the ratio of a round's times (median), below 1.03 wanted, and what a look takes. At the
end both networks must have the same weights, bit for bit.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import resnet18  # type: ignore[import-untyped]

from benchmarks import report
from benchmarks.report import Neighbours, Origin, Spread
from powergrad.loss import power_grad_cross_entropy
from powergrad.spec import TelemetrySpec
from powergrad.telemetry import Telemetry, read_history

ALPHA = 0.3
CLASSES = 100
EVALUATION_BATCHES = 10
QUICK = {"rounds": 1, "every_steps": 5, "batch_size": 4}


class Result(Origin):
    """One run of the benchmark; times in milliseconds."""

    peer: str
    threads: int
    every_steps: int
    batch_size: int
    image_size: int
    rounds: int
    step_ms: Spread
    look_ms: Spread
    evaluation_look_ms: Spread
    looks_share: float
    """Time of all looks over that of all steps: what the ratio cannot resolve on a busy machine."""
    ratio: float
    round_ratios: list[float]
    others_share: float


@dataclass
class Arm:
    """One of the two loops. telemetry: None in the plain one."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    telemetry: Telemetry | None
    spec: TelemetrySpec
    device: torch.device
    steps: int = 0
    step_s: list[float] = field(default_factory=list)
    look_s: list[float] = field(default_factory=list)
    evaluation_look_s: list[float] = field(default_factory=list)

    def step(self, images: Tensor, labels: Tensor) -> float:
        """Takes one step; returns its seconds."""
        begun = _now(self.device)
        logits = self.model(images)
        loss = power_grad_cross_entropy(logits, labels, alpha=ALPHA)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self.steps += 1
        if self.telemetry is not None and self.spec.is_due(self.steps):
            before = _now(self.device)
            self.telemetry.look(self.steps, logits=logits, targets=labels, alpha=ALPHA)
            self.look_s.append(_now(self.device) - before)
        self.optimizer.step()
        self.step_s.append(_now(self.device) - begun)
        return self.step_s[-1]

    def evaluate(self, batches: list[Tensor], *, epoch: int) -> float:
        """Puts the batches through the network; returns the seconds, the look at weights and features included."""
        begun = _now(self.device)
        self.model.eval()
        watch: AbstractContextManager[None] = nullcontext() if self.telemetry is None else self.telemetry.watch_features()
        with torch.no_grad(), watch:
            for images in batches:
                self.model(images)
        self.model.train()
        before = _now(self.device)
        if self.telemetry is not None:
            self.telemetry.at_evaluation(self.steps, epoch, metrics={"val_top1": 0.0}, train_top1=0.0)
            self.evaluation_look_s.append(_now(self.device) - before)
        return _now(self.device) - begun


def main() -> None:
    options = _parser().parse_args()
    if options.quick:
        vars(options).update(QUICK)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as run_dir:
        result = measure(Path(run_dir), options)
    report.deliver(result, _table(result), options)


def measure(run_dir: Path, options: argparse.Namespace) -> Result:
    """Time both arms over so many rounds. Raises RuntimeError if their weights differ in the end."""
    neighbours = Neighbours()
    device = torch.device(options.device)
    rng = torch.Generator().manual_seed(0)
    size = (options.batch_size, 3, options.image_size, options.image_size)
    batches = [torch.randn(size, generator=rng).to(device, memory_format=torch.channels_last) for _ in range(EVALUATION_BATCHES)]
    labels = torch.randint(CLASSES, (options.batch_size,), generator=rng).to(device)

    plain, watched = _arm(None, options, device), _arm(run_dir, options, device)
    ratios = []
    for number in range(options.rounds + 1):  # the first warms up
        times = {id(plain): 0.0, id(watched): 0.0}
        for step in range(options.every_steps):
            for arm in (plain, watched) if step % 2 else (watched, plain):
                times[id(arm)] += arm.step(batches[step % EVALUATION_BATCHES], labels)
        for arm in (plain, watched) if number % 2 else (watched, plain):
            times[id(arm)] += arm.evaluate(batches, epoch=number + 1)
        ratios.append(times[id(watched)] / times[id(plain)])
    _compare(plain, watched, run_dir, rounds=options.rounds + 1)
    return {
        **report.origin("telemetry", packages=["torch", "torchvision"]),
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else report.hardware(),
        "peer": "the same loop without telemetry",
        "threads": torch.get_num_threads(),
        "every_steps": options.every_steps,
        "batch_size": options.batch_size,
        "image_size": options.image_size,
        "rounds": options.rounds,
        "step_ms": _milliseconds(plain.step_s[options.every_steps :]),
        "look_ms": _milliseconds(watched.look_s[1:]),
        "evaluation_look_ms": _milliseconds(watched.evaluation_look_s[1:]),
        "looks_share": sum(watched.look_s[1:] + watched.evaluation_look_s[1:]) / sum(plain.step_s[options.every_steps :]),
        "ratio": statistics.median(ratios[1:]),
        "round_ratios": ratios[1:],
        "others_share": neighbours.share(),
    }


def _arm(run_dir: Path | None, options: argparse.Namespace, device: torch.device) -> Arm:
    torch.manual_seed(0)
    model = resnet18(num_classes=CLASSES).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)
    telemetry = None
    if run_dir is not None:
        telemetry = Telemetry(
            model,
            classifier="fc",
            run_dir=run_dir,
            attempt=1,
            resumed_step=0,
            epochs=options.rounds + 1,
            device=device,
        )
    return Arm(model, optimizer, telemetry, TelemetrySpec(every_steps=options.every_steps), device)


def _compare(plain: Arm, watched: Arm, run_dir: Path, *, rounds: int) -> None:
    theirs, ours = plain.model.state_dict(), watched.model.state_dict()
    differing = [name for name in theirs if not torch.equal(theirs[name], ours[name])]
    if differing:
        raise RuntimeError(f"telemetry changed the training: {', '.join(differing)}")
    history = read_history(run_dir)
    if (len(history.gradients), len(history.filters)) != (rounds, math.ceil(rounds / math.ceil(rounds / 64))):
        raise RuntimeError(f"{len(history.gradients)} looks and {len(history.filters)} snapshots were kept in {rounds} rounds")


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _milliseconds(seconds: list[float]) -> Spread:
    return report.spread([value * 1e3 for value in seconds])


def _table(result: Result) -> str:
    rows = [f"{report.heading(result)}; {result['threads']} threads, {result['rounds']} rounds"]
    rows.append(f"ResNet-18, {result['image_size']} px, batches of {result['batch_size']}, a look every {result['every_steps']} steps")
    for name, label in (("step_ms", "step"), ("look_ms", "look at gradients"), ("evaluation_look_ms", "look at an evaluation")):
        found: Spread = result[name]  # type: ignore[literal-required]
        rows.append(f"{label:<24}{found['median']:>10.2f} ms   (p95 {found['p95']:.2f})")
    rows.append(
        f"{'with / without':<24}{result['ratio']:>10.4f}      (rounds {', '.join(f'{ratio:.4f}' for ratio in result['round_ratios'])})"
    )
    rows.append(f"{'looks, of the steps':<24}{result['looks_share']:>10.2%}")
    return "\n".join(rows + report.crowding(result["others_share"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="a training loop with telemetry against the same without")
    parser.add_argument("--every-steps", type=int, default=TelemetrySpec().every_steps)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="just enough to show that it works")
    report.add_options(parser)
    return parser


if __name__ == "__main__":
    main()
