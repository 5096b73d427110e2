"""Images per second of two jobs on two slots, against one alone and against two plain processes, alternating in one run.

    python -m benchmarks.slots [--rounds 5] [--points 8] [--quick] [--json] [--save]

A real stack with two slots on a temporary directory; digits at 16 px, ResNet-18. Each slot owns half of the cores and each trainer has as
many threads. The plain processes take torch's default threads on all cores, as jobs do where nobody shares the cores out. Speed is the
median of the trainer's own `images_per_s` over the log points after the first epoch, taken while all of a group are at work.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks import report
from benchmarks.report import Neighbours, Origin, Spread, spread
from benchmarks.service import OVER, BenchmarkError, PlainProcess, cancel, service
from powergrad.client import Client
from powergrad.protocol import TrainerConfig
from powergrad.spec import TrainSpec

PACKAGES = ("torch", "torchvision")
GOAL = 1.8
JOBS = 2
WARM_POINTS = 4  # the first epoch: caches fill, the allocator takes its memory
POLL_S = 0.5  # a look costs milliseconds of a core that is being measured
PATIENCE_S = 600.0

# no end and no checkpoint while it is watched
TRAINING: dict[str, Any] = {"data": {"dataset": "digits"}, "epochs": 10_000, "checkpoint": {"every_epochs": 10_000}}
QUICK = TRAINING | {"data": {"dataset": "digits", "image_size": 8}}


class Runner(Protocol):
    """Something that trains."""

    def speeds(self) -> list[float]:
        """Images per second at each log point so far. Raises BenchmarkError when it has ended."""
        ...


@dataclass(frozen=True)
class Job:
    """A job of the service."""

    client: Client
    id: str

    def speeds(self) -> list[float]:
        job = self.client.get(self.id)
        if job.state in OVER:
            raise BenchmarkError(f"{self.id} ended while it was measured: {job.reason}")
        found = self.client.metrics(self.id, names=["images_per_s"], points=100_000)["data"]
        return [value for series in found for value in series["values"]]

    def threads(self) -> int:
        """Threads the trainer was given."""
        return next(int(event.data["cpu_threads"]) for event in self.client.events(self.id).data if event.type == "plan")


class Result(Origin):
    """Speeds in images per second, of all jobs of a group together."""

    peer: str
    threads: int
    together: Spread
    alone: Spread
    plain: Spread
    ratio_to_alone: float
    ratio_to_plain: float
    others_share: float


@dataclass(frozen=True)
class Round:
    """One round's speeds: images per second of the whole group."""

    together: float
    alone: float
    plain: float


def main() -> None:
    options = _parser().parse_args()
    result = measure(QUICK, rounds=1, points=1) if options.quick else measure(TRAINING, rounds=options.rounds, points=options.points)
    report.deliver(result, _table(result), options)


def measure(spec: dict[str, Any], *, rounds: int, points: int) -> Result:
    """Alternate the three groups; points: log points of each job that count in a round. spec: what all of them train."""
    with service(slots=JOBS) as client:
        neighbours, threads = Neighbours(), set[int]()
        found = [
            Round(
                together=_of_jobs(client, [spec] * JOBS, points, threads),
                alone=_of_jobs(client, [spec], points, threads),
                plain=_of_processes([spec] * JOBS, points),
            )
            for _ in range(rounds)
        ]
        others = neighbours.share()
    if len(threads) != 1:
        raise BenchmarkError(f"the slots are not of one size: trainers had {sorted(threads)} threads; give it an even number of cores")
    return _result(found, threads.pop(), others)


def _of_jobs(client: Client, specs: Sequence[dict[str, Any]], points: int, threads: set[int]) -> float:
    """The speed of these jobs at a time; adds the threads they had to `threads`."""
    with ExitStack() as ends:
        jobs = []
        for spec in specs:
            jobs.append(Job(client, client.submit(spec).id))
            ends.callback(cancel, client, jobs[-1].id)
        speed = joint_speed(jobs, points)
        threads |= {job.threads() for job in jobs}
    return speed


def _of_processes(specs: Sequence[dict[str, Any]], points: int) -> float:
    with ExitStack() as ends:
        processes = []
        for spec in specs:
            folder = ends.enter_context(tempfile.TemporaryDirectory())
            config = TrainerConfig(
                run_id="plain", attempt=1, spec=TrainSpec.model_validate(spec), run_dir=folder, data_root=folder, device="cpu"
            )
            processes.append(ends.enter_context(PlainProcess(config, default_threads=True)))
        return joint_speed(processes, points)


def joint_speed(runners: Sequence[Runner], points: int) -> float:
    """Sum of the runners' median speeds over the time in which each, past its first epoch, logs at least `points` points."""
    begun = _when_all_have(runners, [WARM_POINTS] * len(runners))
    ended = _when_all_have(runners, [len(speeds) + points for speeds in begun])
    return sum(statistics.median(after[len(before) :]) for before, after in zip(begun, ended, strict=True))


def _when_all_have(runners: Sequence[Runner], counts: Sequence[int]) -> list[list[float]]:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        speeds = [runner.speeds() for runner in runners]
        if all(len(one) >= count for one, count in zip(speeds, counts, strict=True)):
            return speeds
        time.sleep(POLL_S)
    raise BenchmarkError(f"not {list(counts)} log points within {PATIENCE_S:.0f} s")


def _result(rounds: Sequence[Round], threads: int, others_share: float) -> Result:
    return {
        **report.origin("slots", packages=PACKAGES),
        "peer": "one job alone on one slot; two plain processes with torch's default threads",
        "threads": threads,
        "together": spread([one.together for one in rounds]),
        "alone": spread([one.alone for one in rounds]),
        "plain": spread([one.plain for one in rounds]),
        "ratio_to_alone": statistics.median(one.together / one.alone for one in rounds),
        "ratio_to_plain": statistics.median(one.together / one.plain for one in rounds),
        "others_share": others_share,
    }


def _table(result: Result) -> str:
    together = f"{JOBS} jobs, {result['threads']} thread(s) each"
    lines = [report.heading(result), f"{'images per second':<52}{'median':>9}{'n':>5}"]
    lines += [
        _row(f"{together}, together on {JOBS} slots", result["together"]),
        _row("one of them alone on one slot", result["alone"]),
        _row(f"{JOBS} plain processes, torch's default threads", result["plain"]),
        f"{'together / alone':<52}{result['ratio_to_alone']:>9.2f} x    goal >= {GOAL} x",
        f"{'together / plain processes':<52}{result['ratio_to_plain']:>9.2f} x",
    ]
    return "\n".join(lines + report.crowding(result["others_share"]))


def _row(label: str, speed: Spread) -> str:
    return f"{label:<52}{speed['median']:>9.0f}{speed['n']:>5}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Images per second of two jobs on two slots, against one alone and two plain processes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--points", type=int, default=8, help="log points of each job that count in a round (an epoch has 4)")
    parser.add_argument("--quick", action="store_true", help="one round of one point at 8 px: shows that it works")
    report.add_options(parser)
    return parser


if __name__ == "__main__":
    main()
