"""`powergrad train`: one run in this process, without a server. The same spec, the same trainer, the same bits."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer
from rich.live import Live
from rich.markup import escape

from powergrad.cli import console, specfile
from powergrad.cli.console import Code, Finish, Problem
from powergrad.cli.up import default_data_dir
from powergrad.cli.watch import Board, LineWriter, Row

if TYPE_CHECKING:
    from powergrad.checkpoint import Manifest
    from powergrad.jobs.spec import JobSpec
    from powergrad.protocol import Done, Failure, InitialWeights, Message, ResumePoint, TrainerConfig
    from powergrad.spec import TrainSpec


class Stoppable(Protocol):
    def give(self, stop: Any) -> None: ...


def train(
    file: Annotated[str, typer.Argument(metavar="SPEC", help="A job spec in YAML or JSON; - reads standard input.")],
    run_dir: Annotated[
        Path,
        typer.Option(
            "--run-dir",
            parser=console.path,
            metavar="PATH",
            help="Where checkpoints and metrics go; one that is there already is gone on with.",
        ),
    ],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Change a field: loss.alpha=0.3. Repeatable.")
    ] = None,
    data_root: Annotated[
        Path | None,
        typer.Option("--data-root", parser=console.path, metavar="PATH", help="Where data sets lie.", show_default="~/.powergrad/datasets"),
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu or cuda:0.", show_default="cuda:0 where there is one")] = None,
    ranks: Annotated[
        int | None, typer.Option("--ranks", min=1, max=64, help="Processes that share each batch.", show_default="resources.gpus, or 1")
    ] = None,
    init_from: Annotated[
        Path | None,
        typer.Option(
            "--init-from", parser=console.path, metavar="CHECKPOINT", help="Start from another run's weights: a checkpoint's directory."
        ),
    ] = None,
) -> None:
    """Train here and now, without a server. Ctrl-C writes a checkpoint; the same command goes on from it, with the same result."""
    if device not in {None, "cpu", "cuda:0"}:
        raise Problem(f"--device {device}: must be cpu or cuda:0", advice="Another GPU: CUDA_VISIBLE_DEVICES=1", code=Code.USAGE)
    spec = _checked(specfile.changed(specfile.read(file), settings or []))
    if spec.model.init_from is not None:
        raise Problem(
            f"model.init_from={spec.model.init_from}: names a job, and there is no server here",
            advice="Leave it out and use --init-from RUN_DIR/checkpoints/a1/step-…",
            code=Code.REFUSED,
        )
    with _locked(run_dir):
        console.say("[dim]Loading torch …[/]")
        _load_torch()
        root = (data_root or default_data_dir() / "datasets").absolute()
        config = _config(spec, run_dir.absolute(), root, device, ranks=ranks, init_from=init_from)
        _finish(_run(config), config)


def _checked(body: dict[str, Any]) -> JobSpec:
    """The spec, by the server's own rules. Raises Problem with every violation."""
    from powergrad.jobs.errors import InvalidSpec
    from powergrad.jobs.spec import parse

    try:
        return parse(body)
    except InvalidSpec as error:
        wrong = "\n".join(f"  {violation.pointer or '/'}  {violation.detail}" for violation in error.violations)
        raise Problem(f"The spec is not valid:\n{wrong}", code=Code.REFUSED) from error


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Hold the run directory, made if need be: two runs in one would mix their checkpoints."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / ".lock").open("a")
    except OSError as error:
        raise Problem(f"{run_dir}: cannot be used as run directory ({error.strerror})") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Problem(f"{run_dir}: another run is using it", advice="Choose another --run-dir.") from error
        yield


def _load_torch() -> None:
    """Import what trains. Ctrl-C ends the process here and now: inside an import it would come out as any other error."""

    def leave(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signal module's signature
        os.write(2, b"Interrupted.\n")
        os._exit(Code.INTERRUPTED)

    before = signal.signal(signal.SIGINT, leave)
    try:
        import powergrad.trainer  # noqa: F401 - torch with it
    finally:
        signal.signal(signal.SIGINT, before)


def _config(
    spec: JobSpec, run_dir: Path, data_root: Path, device: str | None, *, ranks: int | None, init_from: Path | None
) -> TrainerConfig:
    # a process that has asked CUDA cannot be forked into ranks any more; NVML knows as much
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import torch

    from powergrad.protocol import TrainerConfig

    if device == "cuda:0" and not torch.cuda.is_available():
        raise Problem("--device cuda:0: torch finds no GPU here", advice="--device cpu, or see: powergrad doctor")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = _checkpoints(run_dir)
    on_gpus = device == "cuda:0" or (device is None and spec.resources.gpus != 0 and torch.cuda.is_available())
    processes = ranks or (max(1, int(spec.resources.gpus or 1)) if on_gpus else 1)
    if on_gpus and processes > torch.cuda.device_count():
        raise Problem(
            f"{processes} processes need as many GPUs, torch finds {torch.cuda.device_count()}", advice="--ranks 1, or --device cpu"
        )
    threads = _same_as_before(run_dir, spec.training(), threads=spec.resources.cpu_threads or cores, ranks=processes)
    return TrainerConfig(
        run_id=run_dir.name,
        attempt=_last_attempt(run_dir) + 1,
        spec=spec.training(),
        run_dir=str(run_dir),
        data_root=str(data_root),
        device="cuda:0" if on_gpus else "cpu",
        gpu_share=min(1.0, spec.resources.gpus or 1.0),
        cpu_threads=threads,
        ranks=processes,
        init_from=None if init_from is None else _initial_weights(init_from),
        resume=[_resume_point(run_dir, path, manifest) for path, manifest in found],
    )


def _initial_weights(checkpoint: Path) -> InitialWeights:
    from powergrad.checkpoint import MODEL, CheckpointError, read_manifest
    from powergrad.protocol import InitialWeights

    try:
        manifest = read_manifest(checkpoint)
    except CheckpointError as error:
        raise Problem(
            f"--init-from {checkpoint}: {error}", advice="Name the directory of a checkpoint: RUN_DIR/checkpoints/a1/step-…"
        ) from error
    return InitialWeights(path=str(checkpoint.absolute() / MODEL), sha256=manifest.model.sha256)


def _same_as_before(run_dir: Path, spec: TrainSpec, *, threads: int, ranks: int) -> int:
    """The thread count the run began with (it is part of its bits). Raises Problem if the directory holds a run of another spec.

    A directory without a checkpoint holds no run yet: nothing would be gone on with, so it takes any spec.
    """
    record = run_dir / "run.json"
    now = {"spec": spec.model_dump(mode="json"), "ranks": ranks}
    if not record.exists() or not any(run_dir.glob("checkpoints/a*/step-*")):
        record.write_text(json.dumps(now | {"cpu_threads": threads}, indent=2) + "\n")
        return threads
    try:
        before = json.loads(record.read_text())
        other = sorted(name.removeprefix("spec.") for name in _differences({"spec": before["spec"], "ranks": before["ranks"]}, now))
        threads = int(before["cpu_threads"])
    except (ValueError, KeyError, TypeError) as error:
        raise Problem(f"{record}: does not say which spec trained here", advice="Choose another --run-dir.") from error
    if other:
        raise Problem(
            f"{run_dir}: holds a run of another spec; different: {', '.join(other)}", advice="Choose another --run-dir, or the old spec."
        )
    return threads


def _differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """Dotted names whose values differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before.keys() | now.keys():
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))
    elif before != now:
        yield name


def _checkpoints(run_dir: Path) -> list[tuple[Path, Manifest]]:
    """Whole checkpoints, newest first."""
    from powergrad.checkpoint import CheckpointError, read_manifest

    found = []
    for path in run_dir.glob("checkpoints/a*/step-*"):
        try:
            found.append((path, read_manifest(path)))
        except CheckpointError as error:
            console.say(f"[yellow]Skipped[/] {escape(str(error))}")
    return sorted(found, key=lambda one: (one[1].step, one[1].attempt), reverse=True)


def _resume_point(run_dir: Path, path: Path, manifest: Manifest) -> ResumePoint:
    from powergrad.protocol import ResumePoint

    return ResumePoint(id=path.name, path=str(path.relative_to(run_dir)), step=manifest.step, sha256=manifest.model.sha256)


def _last_attempt(run_dir: Path) -> int:
    numbers = [path.name.removeprefix("a") for path in run_dir.glob("checkpoints/a*")]
    return max((int(number) for number in numbers if number.isdigit()), default=0)


def _run(config: TrainerConfig) -> Done | Failure:
    from powergrad.trainer import StandingOrders, run

    orders = StandingOrders()
    live = console.interactive()
    with _obeying_signals(orders), _screen(live=live) as show:
        record = Record(config, show)
        return run(config, emit=record.hear, orders=orders)


@contextmanager
def _obeying_signals(orders: Stoppable) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask for a checkpoint; a second one does without."""
    heard = 0

    def hear(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signal module's signature
        nonlocal heard
        heard += 1
        orders.give("checkpoint" if heard == 1 else "now")
        sys.stderr.write("\nStopping at the next step with a checkpoint. Again: without one.\n" if heard == 1 else "\n")

    before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Show(Protocol):
    def __call__(self, row: Row) -> None: ...


@contextmanager
def _screen(*, live: bool) -> Iterator[Show]:
    """Drawn whenever something is said, by this thread: a thread of its own would be copied into forked data loaders."""
    if not live:
        yield LineWriter(console.stderr()).put
        return
    board = Board()
    with Live(board, console=console.stderr(), auto_refresh=False) as screen:

        def put(row: Row) -> None:
            board.put(row)
            screen.refresh()

        yield put


@dataclass
class Record:
    """Hears the trainer: keeps metrics.jsonl, deletes checkpoints nobody wants any more, shows where the run is."""

    config: TrainerConfig
    show: Show
    row: Row = field(init=False)
    steps: int = 0

    def __post_init__(self) -> None:
        self.row = Row(key=self.config.run_id, name=self.config.run_id, state="running", epochs=self.config.spec.epochs)
        self.run_dir = Path(self.config.run_dir)

    def hear(self, message: Message) -> None:
        match message.type:
            case "plan":
                self._cut_metrics_back(message.resumed_step)
                self.steps = message.steps
                if message.resumed_from is not None:
                    console.say(f"Going on from [bold]{message.resumed_from}[/] ({message.resumed_step} of {message.steps} steps done)")
                self._put(fraction=message.resumed_step / message.steps, epoch=message.resumed_step / message.steps_per_epoch)
            case "step":
                self._write({"step": message.step, "epoch": message.epoch, **message.metrics, "images_per_s": message.images_per_s})
                self._put(
                    fraction=message.step / max(1, self.steps),
                    epoch=message.epoch,
                    loss=message.metrics.get("train_loss"),
                    images_per_s=message.images_per_s,
                    eta_s=message.eta_s,
                    note="",  # it trains again after an evaluation, and says so only by its steps
                )
            case "evaluation":
                self._write({"step": message.step, "epoch": float(message.epoch), **message.metrics})
                self._put(top1=message.metrics.get("val_top1", self.row.top1))
            case "checkpoint":
                _append(self.run_dir / "checkpoints.jsonl", message.model_dump())
                self._delete_old_checkpoints()
            case "rolled_back":
                console.say(f"[yellow]rolled back[/]: {escape(message.detail)}")
                self._cut_metrics_back(message.to_step)
            case "checkpoint_skipped" | "checkpoint_failed" | "note":
                console.say(f"[yellow]{message.type.replace('_', ' ')}[/]: {escape(message.detail)}")
            case "phase":
                self._put(note="" if message.name in {"training", "finished"} else message.name.replace("_", " "))
            case "done" | "failure":
                self._put(state="failed" if message.type == "failure" else message.outcome, note="")

    def _put(self, **changes: Any) -> None:
        self.row = replace(self.row, **changes)
        self.show(self.row)

    def _write(self, point: dict[str, Any]) -> None:
        _append(self.run_dir / "metrics.jsonl", point)

    def _cut_metrics_back(self, step: int) -> None:
        """Points after the step gone on from belong to an abandoned past."""
        path = self.run_dir / "metrics.jsonl"
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= step]
        path.write_text("".join(f"{line}\n" for line in kept))

    def _delete_old_checkpoints(self) -> None:
        """Keep the newest and the best that the spec asks for."""
        keeps = self.config.spec.checkpoint
        scores = {entry["path"]: entry["metrics"].get("val_top1") for entry in map(json.loads, _lines(self.run_dir / "checkpoints.jsonl"))}
        there = _checkpoints(self.run_dir)
        scored = [(scores.get(str(path.relative_to(self.run_dir))), manifest.step, path) for path, manifest in there]
        best = sorted((-score, step, path) for score, step, path in scored if score is not None)
        wanted = {path for path, _ in there[: keeps.keep_last]} | {path for *_, path in best[: keeps.keep_best]}
        for path, _ in there:
            if path not in wanted:
                shutil.rmtree(path, ignore_errors=True)


def _append(path: Path, entry: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def _lines(path: Path) -> list[str]:
    """Whole lines: a crash may have cut the last one short."""
    return [line.rstrip("\n") for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []


def _finish(end: Done | Failure, config: TrainerConfig) -> None:
    run_dir = Path(config.run_dir)
    if end.type == "failure":
        if end.code == "crashed":
            sys.stderr.write(end.traceback)
        raise Problem(f"Failed ({end.code}): {end.detail}", advice=f"Try: {end.hint}" if end.hint else "")
    if end.outcome == "stopped":
        console.say(f"Stopped. The same command goes on from here ({escape(str(run_dir))}).")
        raise Finish(Code.INTERRUPTED)
    entries = [entry for entry in map(json.loads, _lines(run_dir / "checkpoints.jsonl")) if (run_dir / entry["path"]).exists()]
    best = max(entries, key=lambda entry: (entry["metrics"].get("val_top1") or 0.0, -entry["step"]), default=None)
    if best is not None:
        console.say(f"[green]Succeeded[/]: best val_top1 {console.number(best['metrics'].get('val_top1'))}")
        typer.echo(str(run_dir / best["path"] / "model.safetensors"))
