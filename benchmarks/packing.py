"""Jobs per hour of small runs that share one GPU in quarters, against the same runs one after the other, alternating in one run.

    python -m benchmarks.packing [--runs 8] [--rounds 3] [--device cuda:0] [--quick] [--json] [--save]

Each run is a fork of a process that has imported torch, as a worker's are, and needs nothing but the training library: no service, no
database. All runs compute the same, with as many threads, so they must also end with the same weights. Where there is no CUDA device it
says so and ends well; `--device cpu` shows that it works, and nothing more.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.report import Neighbours, Origin, Spread, spread
from powergrad.jobs.gpus import QUARTERS
from powergrad.protocol import CheckpointWritten, Message, TrainerConfig
from powergrad.spec import TrainSpec
from worker.slots import find_gpus

PACKAGES = ("torch", "torchvision")
PRELOAD = ["powergrad.trainer", "powergrad.preload"]
HOUR_S = 3600.0

# so small that a GPU waits for the next kernel most of the time, so long that a start is little of it
SMALL: dict[str, Any] = {
    "data": {"dataset": "digits", "image_size": 32},
    "model": {"name": "resnet20"},
    "epochs": 60,
    "checkpoint": {"every_epochs": 60},
}
QUICK = SMALL | {"data": {"dataset": "digits", "image_size": 8}, "epochs": 1, "checkpoint": {"every_epochs": 1}}


class BenchmarkError(Exception):
    """A run did not end well; the message says how."""


class Result(Origin):
    """Runs that ended per hour."""

    peer: str
    device: str
    runs: int
    packed_per_hour: Spread
    alone_per_hour: Spread
    ratio: float
    same_weights: bool
    others_share: float


@dataclass(frozen=True)
class Group:
    """What came of some runs: how many an hour, and the sha256 of each one's weights."""

    per_hour: float
    weights: frozenset[str]


def main() -> None:
    options = _parser().parse_args()
    device = _name_of(options.device)
    if device is None:
        print("no CUDA device", flush=True)
        return
    runs, rounds, spec = (QUARTERS, 1, QUICK) if options.quick else (options.runs, options.rounds, SMALL)
    result = packing(spec, runs=runs, rounds=rounds, device=options.device, name=device)
    report.deliver(result, _table(result), options)


def packing(spec: dict[str, Any] = SMALL, *, runs: int = 8, rounds: int = 3, device: str = "cuda:0", name: str = "") -> Result:
    """Alternate runs in quarters of a device and runs one after the other. spec: what each trains; name: the device's, for the report."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    _together(context, spec, device, runs=1, at_once=1)  # torch is imported now, and the device warm
    neighbours = Neighbours()
    packed, alone = [], []
    for _ in range(rounds):
        alone.append(_together(context, spec, device, runs=runs, at_once=1))
        packed.append(_together(context, spec, device, runs=runs, at_once=QUARTERS))
    return {
        **report.origin("packing", packages=PACKAGES),
        "peer": "the same runs one after the other, each with all of the device's memory",
        "device": name or device,
        "runs": runs,
        "packed_per_hour": spread([group.per_hour for group in packed]),
        "alone_per_hour": spread([group.per_hour for group in alone]),
        "ratio": statistics.median(one.per_hour / other.per_hour for one, other in zip(packed, alone, strict=True)),
        "same_weights": len(frozenset().union(*(group.weights for group in [*packed, *alone]))) == 1,
        "others_share": neighbours.share(),
    }


def _together(context: ForkServerContext, spec: dict[str, Any], device: str, *, runs: int, at_once: int) -> Group:
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(at_once) as threads:
        configs = [_config(spec, Path(folder) / str(number), device, share=1 / at_once) for number in range(runs)]
        begun_s = time.perf_counter()
        weights = frozenset(threads.map(lambda config: _train_apart(context, config), configs))
        return Group(runs / (time.perf_counter() - begun_s) * HOUR_S, weights)


def _config(spec: dict[str, Any], folder: Path, device: str, *, share: float) -> TrainerConfig:
    folder.mkdir()
    return TrainerConfig(
        run_id="packed",
        attempt=1,
        spec=TrainSpec.model_validate(spec),
        run_dir=str(folder),
        data_root=str(folder),
        device=device,
        gpu_share=share,
        cpu_threads=max(1, report.cores() // QUARTERS),  # a quarter's, in both groups: they are part of the bits
    )


def _train_apart(context: ForkServerContext, config: TrainerConfig) -> str:
    """Train in a process of its own; the sha256 of the weights. Raises BenchmarkError."""
    hear, say = context.Pipe(duplex=False)
    with hear:
        process = context.Process(target=_train, args=(config.model_dump_json(), say), daemon=True)
        process.start()
        say.close()
        try:
            succeeded, told = hear.recv()
        except EOFError as error:
            raise BenchmarkError("a run ended without a word") from error
        process.join()
    if not succeeded:
        raise BenchmarkError(told)
    return str(told)


def _train(config_json: str, say: Connection) -> None:
    from powergrad import trainer

    heard: list[Message] = []
    end = trainer.run(TrainerConfig.model_validate_json(config_json), emit=heard.append, orders=trainer.StandingOrders())
    weights = [message.sha256 for message in heard if isinstance(message, CheckpointWritten)]
    say.send((True, weights[-1]) if end.type == "done" else (False, f"{end.code}: {end.detail}"))


def _name_of(device: str) -> str | None:
    """The name of the device for people; None for a GPU that is not there."""
    if device == "cpu":
        return "cpu"
    gpus = find_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))
    number = int(device.removeprefix("cuda:"))
    return gpus[number].name if number < len(gpus) else None


def _table(result: Result) -> str:
    lines = [
        report.heading(result),
        f"{result['runs']} runs on {result['device']}",
        f"{'jobs per hour':<40}{'median':>9}{'n':>5}",
        _row(f"{QUARTERS} at a time, a quarter each", result["packed_per_hour"]),
        _row("one after the other", result["alone_per_hour"]),
        f"{'packed / one after the other':<40}{result['ratio']:>9.2f} x",
        "the weights are the same, bit by bit" if result["same_weights"] else "warning: the weights differ between runs",
    ]
    return "\n".join(lines + report.crowding(result["others_share"]))


def _row(label: str, speed: Spread) -> str:
    return f"{label:<40}{speed['median']:>9.0f}{speed['n']:>5}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Jobs per hour of small runs on quarters of a GPU, against one after the other")
    parser.add_argument("--runs", type=int, default=8, help="runs of a group")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda:0", help="cuda:N, or cpu, which shows that it works")
    parser.add_argument("--quick", action="store_true", help="one round of four runs of one epoch at 8 px: shows that it works")
    report.add_options(parser)
    return parser


if __name__ == "__main__":
    main()
