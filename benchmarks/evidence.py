"""Whether PowerGrad Transform helps on glyphs: each alpha at its own best learning rate, several seeds, with and without normalisation.

    python -m benchmarks.evidence [--out DIR] [--no-resume] [--seeds 5] [--processes 2] [--figure PATH] [--quick] [--json] [--save]

Trains the specs of examples/evidence through `powergrad.trainer.run`. The learning rate of each net and alpha is chosen on a seed of its
own with a shorter budget, from a grid of factors of 2 that is widened while the best lies on its edge; the verdict is made of other
seeds. Every finished run is a line of DIR/runs.jsonl, and a benchmark that was cut goes on from there. Runs are the same bits however
busy the machine is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypedDict

from scipy import stats  # type: ignore[import-untyped]

from benchmarks import evidence_figure, report
from benchmarks.report import Neighbours, Origin
from powergrad.cli import specfile
from powergrad.jobs import spec as jobs
from powergrad.process import die_with_parent
from powergrad.protocol import Evaluation, Failure, Message, Plan, Step, TrainerConfig
from powergrad.spec import TrainSpec

EXAMPLES = Path(__file__).parents[1] / "examples" / "evidence"
FIGURE = Path(__file__).parents[1] / "docs" / "evidence.svg"
PACKAGES = ("torch", "torchvision", "scipy")
PEER = "cross-entropy (alpha 1), same net, data, seeds and budget"
CONFIDENCE = 0.95
COLLAPSED = 2.0
"""Times the accuracy of guessing: a run that ends below has learned nothing, or lost it."""

Stage = Literal["tuning", "verdict"]


@dataclass(frozen=True)
class Trial:
    """One run of the study, named by what differs from its net's spec."""

    net: str
    stage: Stage
    alpha: float
    lr: float
    seed: int

    def __str__(self) -> str:
        return f"{self.net} alpha {self.alpha:g} rate {self.lr:g} seed {self.seed} ({self.stage})"


@dataclass(frozen=True)
class Study:
    """What is to be run."""

    specs: Mapping[str, TrainSpec]
    """By net; the learning rate is the grid's middle, alpha and seed do not matter."""
    alphas: tuple[float, ...] = (1.0, 0.5, 0.25)
    """The first is what the others are compared with."""
    grid: tuple[int, ...] = (-2, -1, 0, 1)
    """Learning rates, as powers of 2 times the spec's."""
    widest: int = 3
    """Steps by which the grid may grow at either end."""
    tuning_seed: int = 1000
    tuning_epochs: int = 5
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of the verdict; none is the tuning's."""

    def spec_of(self, trial: Trial) -> TrainSpec:
        spec = self.specs[trial.net]
        return spec.model_copy(
            update={
                "loss": spec.loss.model_copy(update={"alpha": trial.alpha}),
                "optimizer": spec.optimizer.model_copy(update={"lr": trial.lr}),
                "epochs": self.tuning_epochs if trial.stage == "tuning" else spec.epochs,
                "seed": trial.seed,
            }
        )

    def tuning(self, net: str, alpha: float, exponent: int) -> Trial:
        return Trial(net, "tuning", alpha, self.specs[net].optimizer.lr * 2.0**exponent, self.tuning_seed)

    def arms(self) -> Iterator[tuple[str, float]]:
        return ((net, alpha) for net in self.specs for alpha in self.alphas)


class Point(TypedDict):
    """Metrics after so many steps; None is a value that is not finite."""

    step: int
    top1: float | None
    loss: float | None


@dataclass(frozen=True)
class Run:
    """What came of a trial."""

    trial: Trial
    fingerprint: str
    """Of the spec: a line of another one is not taken for a result of this."""
    outcome: Literal["finished", "diverged"]
    detail: str
    classes: int
    steps_per_epoch: int
    seconds: float
    train: tuple[Point, ...]
    """At log points: over the images since the one before, as they were learned from."""
    val: tuple[Point, ...]
    """After each epoch, over the whole split."""

    @property
    def val_top1(self) -> float:
        """At the end; nan where it did not get there."""
        return _number(self.val[-1]["top1"]) if self.outcome == "finished" else math.nan

    @property
    def val_loss(self) -> float:
        return _number(self.val[-1]["loss"]) if self.outcome == "finished" else math.nan

    @property
    def train_top1(self) -> float:
        """Over the last epoch, as it was trained on."""
        if self.outcome != "finished":
            return math.nan
        begin = self.train[-1]["step"] - self.steps_per_epoch
        steps = [begin, *(point["step"] for point in self.train if point["step"] > begin)]
        last = self.train[1 - len(steps) :]
        return sum((b - a) * _number(point["top1"]) for a, b, point in zip(steps, steps[1:], last, strict=False)) / self.steps_per_epoch

    @property
    def collapsed(self) -> bool:
        """It ended near the accuracy of guessing."""
        return self.outcome == "finished" and not self.val_top1 > COLLAPSED / self.classes

    def to_line(self) -> str:
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def from_line(cls, line: str) -> Run:
        values = json.loads(line)
        return cls(**values | {"trial": Trial(**values["trial"]), "train": tuple(values["train"]), "val": tuple(values["val"])})


Runs = Mapping[Trial, Run]


# --- what to run -----------------------------------------------------------------------------------------------------------------


def due(study: Study, runs: Runs) -> list[Trial]:
    """The trials that can be started now, in order: a net's and alpha's verdict waits for its learning rate."""
    wanted = [trial for net, alpha in study.arms() for trial in _untuned(study, runs, net, alpha)]
    rates = {(net, alpha): lr for net, alpha in study.arms() if (lr := chosen_lr(study, runs, net, alpha)) is not None}
    wanted += [Trial(net, "verdict", alpha, lr, seed) for seed in study.seeds for (net, alpha), lr in rates.items()]
    return [trial for trial in wanted if trial not in runs]


def chosen_lr(study: Study, runs: Runs, net: str, alpha: float) -> float | None:
    """The rate with the best final val_top1 of the tuning; None while it is open."""
    scores = _scores(study, runs, net, alpha)
    if missing_exponents(study.grid, scores, widest=study.widest):
        return None
    return study.tuning(net, alpha, best_exponent(scores)).lr


def _untuned(study: Study, runs: Runs, net: str, alpha: float) -> list[Trial]:
    missing = missing_exponents(study.grid, _scores(study, runs, net, alpha), widest=study.widest)
    return [study.tuning(net, alpha, exponent) for exponent in missing]


def _scores(study: Study, runs: Runs, net: str, alpha: float) -> dict[int, float]:
    """Final val_top1 by exponent; -1 where the run diverged."""
    reach = range(min(study.grid) - study.widest, max(study.grid) + study.widest + 1)
    found = {exponent: runs.get(study.tuning(net, alpha, exponent)) for exponent in reach}
    return {exponent: _or(run.val_top1, -1.0) for exponent, run in found.items() if run is not None}


def missing_exponents(grid: Sequence[int], scores: Mapping[int, float], *, widest: int) -> list[int]:
    """What is still to be tried: the grid, then one step beyond it at a time while the best lies on the edge, `widest` at most."""
    if untried := [exponent for exponent in grid if exponent not in scores]:
        return untried
    best = best_exponent(scores)
    if best == max(scores) < max(grid) + widest:
        return [best + 1]
    if best == min(scores) > min(grid) - widest:
        return [best - 1]
    return []


def best_exponent(scores: Mapping[int, float]) -> int:
    """The highest score's, the lower rate of equals."""
    return max(scores, key=lambda exponent: (scores[exponent], -exponent))


# --- running ---------------------------------------------------------------------------------------------------------------------


def train(trial: Trial, spec: TrainSpec) -> Run:
    """One run on one thread. Raises RuntimeError where it ends by anything but its own learning rate."""
    from powergrad.trainer import StandingOrders, run  # torch is for the workers: the parent only waits and counts

    heard: list[Message] = []
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        config = TrainerConfig(run_id="evidence", attempt=1, spec=spec, run_dir=folder, data_root=folder, cpu_threads=1)
        end = run(config, emit=heard.append, orders=StandingOrders())
    diverged = isinstance(end, Failure) and end.code == "diverged"
    if isinstance(end, Failure) and not diverged:
        raise RuntimeError(f"{trial}: {end.detail}\n{end.traceback}")
    plan = next(message for message in heard if isinstance(message, Plan))
    return Run(
        trial=trial,
        fingerprint=fingerprint(spec),
        outcome="diverged" if diverged else "finished",
        detail=end.detail,
        classes=plan.classes,
        steps_per_epoch=plan.steps_per_epoch,
        seconds=time.monotonic() - begun,
        train=tuple(_point(message, "train") for message in heard if isinstance(message, Step)),
        val=tuple(_point(message, "val") for message in heard if isinstance(message, Evaluation) and message.split == "val"),
    )


def _point(message: Step | Evaluation, split: str) -> Point:
    return {"step": message.step, "top1": message.metrics[f"{split}_top1"], "loss": message.metrics[f"{split}_loss"]}


def fingerprint(spec: TrainSpec) -> str:
    """Of what the spec says beyond the defaults, so that a new field with a default leaves it as it is."""
    return hashlib.sha256(spec.model_dump_json(exclude_defaults=True).encode()).hexdigest()[:16]


@dataclass
class Log:
    """The finished runs, in a file that outlives the process."""

    path: Path
    study: Study
    runs: dict[Trial, Run] = field(default_factory=dict)

    def load(self) -> None:
        """Takes what the file has of this study; a line that was cut is done again."""
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                run = Run.from_line(line)
            except (ValueError, KeyError, TypeError):
                continue
            if run.trial.net in self.study.specs and run.fingerprint == fingerprint(self.study.spec_of(run.trial)):
                self.runs[run.trial] = run

    def add(self, run: Run) -> None:
        self.runs[run.trial] = run
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            # a line that was cut must not swallow this one
            cut = file.tell() > 0 and self.path.read_bytes()[-1:] != b"\n"
            file.write(b"\n" * cut + run.to_line().encode())
            file.flush()
            os.fsync(file.fileno())


def carry_out(study: Study, log: Log, *, processes: int) -> None:
    """Runs what is due until nothing is, several at a time; says each on standard error. Raises RuntimeError of a run that breaks."""
    spawning, me = multiprocessing.get_context("spawn"), os.getpid()
    pool = ProcessPoolExecutor(processes, spawning, initializer=die_with_parent, initargs=(me,))
    under_way: dict[Future[Run], Trial] = {}
    before, begun = len(log.runs), time.monotonic()
    try:
        while True:
            waiting = [trial for trial in due(study, log.runs) if trial not in under_way.values()]
            for trial in waiting[: processes - len(under_way)]:
                under_way[pool.submit(train, trial, study.spec_of(trial))] = trial
            if not under_way:
                return
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                del under_way[future]
                log.add(future.result())
                each = (time.monotonic() - begun) / (len(log.runs) - before)
                _say(future.result(), done=len(log.runs), left=runs_left(study, log.runs), each_s=each)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _say(run: Run, *, done: int, left: int, each_s: float) -> None:
    how = run.outcome if run.outcome == "diverged" else f"val_top1 {run.val_top1:.2%}, val_loss {run.val_loss:.3f}"
    line = f"{done} of {done + left}: {run.trial}: {how}, {run.seconds:.0f} s; about {each_s * left / 60:.0f} min left"
    print(line, file=sys.stderr, flush=True)


def runs_left(study: Study, runs: Runs) -> int:
    """At least so many: a grid may still grow."""
    tuning = sum(len(_untuned(study, runs, net, alpha)) for net, alpha in study.arms())
    done = sum(trial.stage == "verdict" for trial in runs)
    return tuning + len(list(study.arms())) * len(study.seeds) - done


# --- the verdict -----------------------------------------------------------------------------------------------------------------


class Estimate(TypedDict):
    """Mean and standard deviation over seeds and the t interval of the mean; None with too few."""

    n: int
    mean: float | None
    sd: float | None
    low: float | None
    high: float | None


class Difference(Estimate):
    """Of two arms, seed by seed."""

    p: float | None
    """Two-sided, of the paired t-test."""


class Arm(TypedDict):
    """One net at one alpha."""

    net: str
    alpha: float
    lr: float
    tuning: dict[str, float | None]
    """Final val_top1 by learning rate; None is a run that diverged."""
    val_top1: Estimate
    train_top1: Estimate
    val_loss: Estimate
    val_top1_difference: Difference | None
    """To the first alpha, which has none."""
    train_top1_difference: Difference | None
    diverged: list[str]
    collapsed: list[str]


class Result(Origin):
    """The study as a whole."""

    peer: str
    specs: dict[str, Any]
    seeds: list[int]
    tuning_seed: int
    tuning_epochs: int
    arms: list[Arm]
    curves: list[evidence_figure.Curve]
    run_hours: float
    others_share: float


def estimate(values: Sequence[float]) -> Estimate:
    """Of the finite values."""
    values = [value for value in values if math.isfinite(value)]
    n = len(values)
    mean = statistics.fmean(values) if n else None
    if mean is None or n < 2:
        return {"n": n, "mean": mean, "sd": None, "low": None, "high": None}
    sd = statistics.stdev(values)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * sd / math.sqrt(n)
    return {"n": n, "mean": mean, "sd": sd, "low": mean - half, "high": mean + half}


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """ours - theirs, pair by pair, where both are finite."""
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if math.isfinite(a) and math.isfinite(b)]
    found = estimate([a - b for a, b in pairs])
    p = float(stats.ttest_rel(*zip(*pairs, strict=True)).pvalue) if found["sd"] else None
    return {**found, "p": p}


def verdict(study: Study, runs: Runs) -> list[Arm]:
    """Every net and alpha, in the study's order, once all runs are there."""
    return [_arm(study, runs, net, alpha) for net, alpha in study.arms()]


def _arm(study: Study, runs: Runs, net: str, alpha: float) -> Arm:
    ours, theirs = (_verdict_runs(study, runs, net, some) for some in (alpha, study.alphas[0]))
    is_peer = alpha == study.alphas[0]
    lr = chosen_lr(study, runs, net, alpha)
    assert lr is not None, "nothing is due any more"
    scores = {trial.lr: run.val_top1 for trial, run in runs.items() if (trial.net, trial.alpha, trial.stage) == (net, alpha, "tuning")}
    return {
        "net": net,
        "alpha": alpha,
        "lr": lr,
        "tuning": {f"{rate:g}": scores[rate] if math.isfinite(scores[rate]) else None for rate in sorted(scores)},
        "val_top1": estimate([run.val_top1 for run in ours]),
        "train_top1": estimate([run.train_top1 for run in ours]),
        "val_loss": estimate([run.val_loss for run in ours]),
        "val_top1_difference": None if is_peer else difference([run.val_top1 for run in ours], [run.val_top1 for run in theirs]),
        "train_top1_difference": None if is_peer else difference([run.train_top1 for run in ours], [run.train_top1 for run in theirs]),
        "diverged": [str(run.trial) for run in _all_runs(runs, net, alpha) if run.outcome == "diverged"],
        "collapsed": [str(run.trial) for run in _all_runs(runs, net, alpha) if run.collapsed],
    }


def _verdict_runs(study: Study, runs: Runs, net: str, alpha: float) -> list[Run]:
    """One per seed, in order."""
    lr = chosen_lr(study, runs, net, alpha)
    assert lr is not None, "nothing is due any more"
    return [runs[Trial(net, "verdict", alpha, lr, seed)] for seed in study.seeds]


def _all_runs(runs: Runs, net: str, alpha: float) -> list[Run]:
    return [run for trial, run in runs.items() if (trial.net, trial.alpha) == (net, alpha)]


def curves(study: Study, runs: Runs) -> list[evidence_figure.Curve]:
    """val_top1 after each epoch: mean, lowest and highest of the verdict's runs that finished."""
    found: list[evidence_figure.Curve] = []
    for net, alpha in study.arms():
        finished = [run for run in _verdict_runs(study, runs, net, alpha) if run.outcome == "finished"]
        columns = [[_number(point["top1"]) for point in points] for points in zip(*(run.val for run in finished), strict=True)]
        steps = [point["step"] for point in finished[0].val] if finished else []
        found.append(
            {
                "net": net,
                "alpha": alpha,
                "steps": steps,
                "mean": [statistics.fmean(column) for column in columns],
                "low": [min(column) for column in columns],
                "high": [max(column) for column in columns],
            }
        )
    return found


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _or(value: float, otherwise: float) -> float:
    return value if math.isfinite(value) else otherwise


# --- the report ------------------------------------------------------------------------------------------------------------------


def table(result: Result) -> str:
    """The verdict as Markdown."""
    seeds = ", ".join(map(str, result["seeds"]))
    tuned = f"rates chosen on seed {result['tuning_seed']} with {result['tuning_epochs']} epochs"
    rows = [
        f"{report.heading(result)}; verdict on seeds {seeds}, {tuned}; {result['run_hours']:.1f} hours of runs",
        "",
        "| net | α | rate | runs | val top-1 % (sd) [95 %] | train top-1 % (sd) [95 %] | Δ val to α = 1 [95 %], p | Δ train, p | val loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in result["arms"]:
        cells = [arm["net"], f"{arm['alpha']:g}", f"{arm['lr']:g}", f"{arm['val_top1']['n']}"]
        cells += [_percent(arm["val_top1"]), _percent(arm["train_top1"])]
        cells += [_change(arm["val_top1_difference"]), _change(arm["train_top1_difference"])]
        cells.append("–" if arm["val_loss"]["mean"] is None else f"{arm['val_loss']['mean']:.3f}")
        rows.append("| " + " | ".join(cells) + " |")
    for kind in ("diverged", "collapsed"):
        listed = [name for arm in result["arms"] for name in (arm["diverged"] if kind == "diverged" else arm["collapsed"])]
        rows += ["", f"Runs that {kind}: {'; '.join(listed) or 'none'}"]
    return "\n".join(rows)


def _percent(found: Estimate) -> str:
    if found["mean"] is None:
        return "–"
    if found["sd"] is None or found["low"] is None or found["high"] is None:
        return f"{found['mean']:.2%}".rstrip("%")
    return f"{100 * found['mean']:.2f} ({100 * found['sd']:.2f}) [{100 * found['low']:.2f}, {100 * found['high']:.2f}]"


def _change(found: Difference | None) -> str:
    if found is None or found["mean"] is None:
        return "–"
    if found["low"] is None or found["high"] is None:
        return f"{100 * found['mean']:+.2f}"
    p = "" if found["p"] is None else f", p = {found['p']:.3g}"
    return f"{100 * found['mean']:+.2f} [{100 * found['low']:+.2f}, {100 * found['high']:+.2f}]{p}"


def main() -> None:
    options = _parser().parse_args()
    study = quick_study() if options.quick else replace(full_study(), seeds=tuple(range(options.seeds)))
    out = options.out or (Path(tempfile.mkdtemp(prefix="evidence-")) if options.quick else report.RESULTS / "evidence")
    log = Log(out / "runs.jsonl", study)
    if options.resume:
        log.load()
    elif log.path.exists():
        log.path.unlink()

    neighbours = Neighbours()
    try:
        carry_out(study, log, processes=options.processes)
    except KeyboardInterrupt:
        print(f"stopped; {len(log.runs)} runs are kept in {log.path}, the same command goes on from there", file=sys.stderr)
        raise SystemExit(130) from None
    result: Result = {
        **report.origin("evidence", packages=PACKAGES),
        "peer": PEER,
        "specs": {net: spec.model_dump(mode="json", exclude_defaults=True) for net, spec in study.specs.items()},
        "seeds": list(study.seeds),
        "tuning_seed": study.tuning_seed,
        "tuning_epochs": study.tuning_epochs,
        "arms": verdict(study, log.runs),
        "curves": curves(study, log.runs),
        "run_hours": sum(run.seconds for run in log.runs.values()) / 3600,
        "others_share": neighbours.share(),
    }
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    figure = options.figure or (out / "evidence.svg" if options.quick else FIGURE)
    evidence_figure.save(figure, curves=result["curves"], effects=_effects(result["arms"]))
    report.deliver(result, table(result), options)


def _effects(arms: Sequence[Arm]) -> list[evidence_figure.Effect]:
    found: list[evidence_figure.Effect] = []
    for arm in arms:
        for split, change in (("val", arm["val_top1_difference"]), ("train", arm["train_top1_difference"])):
            if change is not None and change["mean"] is not None:
                mean, low, high = change["mean"], change["low"], change["high"]
                ends = (mean, mean) if low is None or high is None else (low, high)
                found.append({"net": arm["net"], "alpha": arm["alpha"], "split": split, "mean": mean, "low": ends[0], "high": ends[1]})
    return found


def full_study() -> Study:
    """What docs/evidence.md tells of."""
    return Study({path.stem: jobs.parse(specfile.read(str(path))).training() for path in sorted(EXAMPLES.glob("*.yaml"))})


def quick_study() -> Study:
    """Every part of the study with almost nothing in it: seconds, and no evidence of anything."""
    small = {"classes": 10, "train_per_class": 24, "val_per_class": 5, "image_size": 8, "batch_size": 40}
    specs = {
        net: spec.model_copy(update={"data": spec.data.model_copy(update=small), "epochs": 3}) for net, spec in full_study().specs.items()
    }
    return Study(specs, alphas=(1.0, 0.25), grid=(-1, 0), widest=0, tuning_epochs=2, seeds=(0, 1))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="PowerGrad Transform against ordinary cross-entropy on glyphs, each at its best rate")
    parser.add_argument("--out", type=Path, help="folder of the runs (default benchmarks/results/evidence)")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True, help="go on from the runs in --out")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each net and alpha that the verdict is made of")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--figure", type=Path, help="where the picture goes (default docs/evidence.svg)")
    parser.add_argument("--quick", action="store_true", help="a tiny study in a temporary folder: just enough to show that it works")
    report.add_options(parser)
    return parser


if __name__ == "__main__":
    main()
