"""From POST to the first training step, against a fresh Python that does the same, alternating in one run.

    python -m benchmarks.job_start [--rounds 15] [--pairs 5] [--quick] [--json] [--save]

A real stack with one slot on a temporary directory; digits at 16 px, ResNet-18. Each round submits a job to the idle worker, listens to
its event stream until the phase `training`, cancels it, and then starts a plain process and waits until that enters its first step. A
pair queues a second job behind a first that ends by itself; a third is submitted the moment the second is cancelled.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypedDict

from benchmarks import report
from benchmarks.report import Neighbours, Origin, Spread, spread
from benchmarks.service import PlainProcess, cancel, marker, service, watch
from powergrad.client import Client
from powergrad.protocol import TrainerConfig
from powergrad.spec import DigitsData, TrainSpec

PACKAGES = ("torch", "torchvision", "fastapi", "celery")
GOAL_MS = 300.0
GOAL_RATIO = 25.0
IDLE_S = (0.5, 1.0)  # between jobs, at random: no loop that polls may be met at always the same moment

SPEC: dict[str, Any] = {"data": {"dataset": "digits"}, "epochs": 100}
SHORT: dict[str, Any] = {"data": {"dataset": "digits", "image_size": 8, "val_fraction": 0.5, "batch_size": 256}, "epochs": 1}

STAGES = {
    "created": "POST until stored",
    "claimed": "ring, claim",
    "starting": "fork",
    "loading_data": "settings",
    "building_model": "data",
    "plan": "model, optimizer",
    "training": "plan until step 1",
    "heard": "event to client",
}
"""What lies before each mark, in the order of the marks."""


@dataclass(frozen=True)
class Start:
    """One start of a job: when its POST was sent and answered, and its marks, by the machine's clock."""

    sent: datetime
    answered: datetime
    marks: dict[str, datetime]

    @property
    def client_ms(self) -> float:
        """From sending the POST to hearing of the first step."""
        return _ms(self.sent, self.marks["heard"])

    @property
    def database_ms(self) -> float:
        """From the stored job to the stored first step."""
        return _ms(self.marks["created"], self.marks["training"])

    def stages(self) -> dict[str, float]:
        times = [self.sent, *(self.marks[name] for name in STAGES)]
        return {label: _ms(a, b) for label, (a, b) in zip(STAGES.values(), itertools.pairwise(times), strict=True)}


class Pair(TypedDict):
    """Milliseconds of two jobs back to back, and of one right behind them."""

    client: float
    database: float
    slot_just_free: float


class Result(Origin):
    """All times in milliseconds."""

    peer: str
    client_ms: Spread
    database_ms: Spread
    post_ms: Spread
    fresh_ms: Spread
    ratio: float
    back_to_back_ms: Spread
    back_to_back_database_ms: Spread
    slot_just_free_ms: Spread
    back_to_back_ratio: float
    stages_ms: dict[str, float]
    others_share: float


def main() -> None:
    options = _parser().parse_args()
    rounds, pairs = (2, 1) if options.quick else (options.rounds, options.pairs)
    result = measure(rounds=rounds, pairs=pairs)
    report.deliver(result, _table(result), options)


def measure(*, rounds: int, pairs: int) -> Result:
    """Alternate starts through the service with fresh processes, then the pairs; the first start of each kind is not counted."""
    with service(slots=1) as client:
        threads = _warm_up(client)
        fresh_start_ms(threads)
        neighbours = Neighbours()
        starts, fresh, followed = [], [], []
        for _ in range(rounds):
            _idle()
            starts.append(start(client))
            fresh.append(fresh_start_ms(threads))
        for _ in range(pairs):
            _idle()
            followed.append(back_to_back(client))
        others = neighbours.share()
    return _result(starts, fresh, followed, others)


def start(client: Client) -> Start:
    """One job from POST to its first step, then cancelled."""
    sent = _now()
    job = client.submit(SPEC)
    answered = _now()
    marks = _marks_until_training(client, job.id)
    cancel(client, job.id)
    return Start(sent, answered, marks)


def fresh_start_ms(threads: int) -> float:
    """From starting a Python process to its first step."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainerConfig(
            run_id="fresh", attempt=1, spec=_train_spec(), run_dir=folder, data_root=folder, cpu_threads=threads, device="cpu"
        )
        with PlainProcess(config, default_threads=False) as process:
            return (process.wait_for(type="phase", name="training") - process.begun_s) * 1000


def back_to_back(client: Client) -> Pair:
    """A second job queued while a first runs, from the end of the first to the second's first step; then one POST to the slot just freed."""
    first = client.submit(SHORT)
    for _ in watch(client, first.id, until="training"):
        pass
    second = client.submit(SPEC)
    ended, heard_end = list(watch(client, first.id, until="succeeded"))[-1]
    marks = _marks_until_training(client, second.id)
    cancel(client, second.id)
    third = start(client)
    assert ended.at is not None
    return {
        "client": _ms(heard_end, marks["heard"]),
        "database": _ms(ended.at, marks["training"]),
        "slot_just_free": third.client_ms,
    }


def _warm_up(client: Client) -> int:
    """Start one job, which waits until the template is there; how many threads it was given."""
    job = client.submit(SPEC)
    events = [event for event, _ in watch(client, job.id, until="training")]
    cancel(client, job.id)
    return next(int(event.data["cpu_threads"]) for event in events if event.type == "plan")


def _marks_until_training(client: Client, job_id: str) -> dict[str, datetime]:
    """When the database stored each mark of STAGES first, and when the last was heard."""
    marks: dict[str, datetime] = {}
    for event, heard in watch(client, job_id, until="training"):
        assert event.at is not None
        marks.setdefault(marker(event), event.at)
        marks["heard"] = heard
    return marks


def _train_spec() -> TrainSpec:
    return TrainSpec(data=DigitsData(dataset="digits"), epochs=SPEC["epochs"])


def _idle() -> None:
    time.sleep(random.uniform(*IDLE_S))


def _now() -> datetime:
    return datetime.now().astimezone()


def _ms(begin: datetime, end: datetime) -> float:
    return (end - begin).total_seconds() * 1000


def _result(starts: Sequence[Start], fresh: Sequence[float], followed: Sequence[Pair], others_share: float) -> Result:
    client, plain = spread([one.client_ms for one in starts]), spread(fresh)
    behind = spread([pair["client"] for pair in followed])
    return {
        **report.origin("job_start", packages=PACKAGES),
        "peer": "a fresh python process doing the same work",
        "client_ms": client,
        "database_ms": spread([one.database_ms for one in starts]),
        "post_ms": spread([_ms(one.sent, one.answered) for one in starts]),
        "fresh_ms": plain,
        "ratio": plain["median"] / client["median"],
        "back_to_back_ms": behind,
        "back_to_back_database_ms": spread([pair["database"] for pair in followed]),
        "slot_just_free_ms": spread([pair["slot_just_free"] for pair in followed]),
        "back_to_back_ratio": behind["median"] / client["median"],
        "stages_ms": {label: statistics.median(one.stages()[label] for one in starts) for label in STAGES.values()},
        "others_share": others_share,
    }


def _table(result: Result) -> str:
    client, ratio, behind = result["client_ms"], result["ratio"], result["back_to_back_ratio"]
    lines = [report.heading(result), f"{'to the first step, ms':<44}{'median':>9}{'p95':>9}{'n':>5}"]
    lines += [
        _row("POST to first step, heard by the client", client),
        _row("  stored job to stored first step", result["database_ms"]),
        _row("  POST answered", result["post_ms"]),
        _row("fresh python process", result["fresh_ms"]),
        _row("end of a job to the next one's first step", result["back_to_back_ms"]),
        _row("  by the database's times", result["back_to_back_database_ms"]),
        _row("POST the moment the slot is free", result["slot_just_free_ms"]),
        "where the time goes, ms (medians):",
        *(f"  {label:<42}{ms:>9.1f}" for label, ms in result["stages_ms"].items()),
        f"{'median of the idle worker':<44}{client['median']:>6.0f} ms   goal <= {GOAL_MS:.0f} ms",
        f"{'fresh process / job':<44}{ratio:>6.1f} x    goal >= {GOAL_RATIO:.0f} x",
        f"{'second of two / job on an idle worker':<44}{behind:>6.2f} x    goal <= 1 x",
    ]
    return "\n".join(lines + report.crowding(result["others_share"]))


def _row(label: str, times: Spread) -> str:
    return f"{label:<44}{times['median']:>9.1f}{times['p95']:>9.1f}{times['n']:>5}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="From POST /v1/jobs to the first training step, against a fresh Python process")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two rounds and one pair: shows that it works")
    report.add_options(parser)
    return parser


if __name__ == "__main__":
    main()
