"""`powergrad export`: what a run of `powergrad train` left, in forms that need no PowerGrad."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from powergrad.cli import console
from powergrad.cli.console import Code, JsonOption, Problem
from powergrad.cli.up import default_data_dir
from powergrad.spec import TrainSpec

if TYPE_CHECKING:
    from powergrad.card import Facts
    from powergrad.export import Format as FormatName
    from powergrad.export import Preprocessing, Restored


class Format(StrEnum):
    """As an enumeration: what typer offers as a list of choices."""

    BUNDLE = "bundle"
    ONNX = "onnx"
    TORCH_EXPORT = "torch_export"


def export(
    run_dir: Annotated[Path, typer.Argument(parser=console.path, metavar="RUN_DIR", help="The --run-dir of a powergrad train.")],
    formats: Annotated[
        list[Format] | None,
        typer.Option(
            "--format",
            "-f",
            help="bundle (a zip with weights, card and a script that classifies images), onnx, torch_export. Repeatable.",
            show_default="bundle",
        ),
    ] = None,
    checkpoint: Annotated[str, typer.Option("--checkpoint", "-c", help="best, latest, or a checkpoint's id.")] = "best",
    average: Annotated[bool, typer.Option("--average", help="Export the moving average of the weights (ema) instead.")] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", parser=console.path, metavar="PATH", help="Folder for the files.", show_default="RUN_DIR/exports"),
    ] = None,
    data_root: Annotated[
        Path | None,
        typer.Option(
            "--data-root",
            parser=console.path,
            metavar="PATH",
            help="Where data sets lie, for a run that left no class names.",
            show_default="~/.powergrad/datasets",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Turn a checkpoint of powergrad train into a bundle, ONNX or torch.export, checked against the network itself."""
    run = _read(run_dir)
    chosen = run.checkpoint(checkpoint)
    console.say("[dim]Loading torch …[/]")
    names, rules = _described(run, (data_root or default_data_dir() / "datasets").absolute())
    found = _restored(run, chosen, classes=len(names), image_size=rules.image_size, average=average)
    facts = _facts(run, chosen, found, average=average)
    written = _exported(run, found, facts, names, rules, formats or [Format.BUNDLE], out or run_dir / "exports")
    if as_json:
        console.print_json([{"path": str(path), "bytes": path.stat().st_size} for path in written])
    else:
        console.lines(str(path) for path in written)


@dataclass(frozen=True)
class Run:
    """A run directory as it was read."""

    path: Path
    spec: TrainSpec
    cpu_threads: int | None
    checkpoints: list[dict[str, Any]]
    """Those that are still there, oldest first."""
    points: list[dict[str, Any]]

    @property
    def best(self) -> dict[str, Any]:
        """The highest val_top1, the earliest of equals; without any, the latest."""
        scored = [entry for entry in self.checkpoints if entry["metrics"].get("val_top1") is not None]
        return max(scored, key=lambda entry: (entry["metrics"]["val_top1"], -entry["step"]), default=self.checkpoints[-1])

    def checkpoint(self, wanted: str) -> dict[str, Any]:
        """Raises Problem for one that is not there."""
        if wanted in {"best", "latest"}:
            return self.best if wanted == "best" else self.checkpoints[-1]
        fitting = [entry for entry in self.checkpoints if entry["id"] == wanted]
        if not fitting:
            ids = ", ".join(dict.fromkeys(entry["id"] for entry in self.checkpoints))
            raise Problem(f"--checkpoint {wanted}: {self.path} has no such checkpoint", advice=f"best, latest, {ids}", code=Code.USAGE)
        return fitting[-1]


def _read(run_dir: Path) -> Run:
    """Raises Problem where there is no run, or none with a checkpoint."""
    record = run_dir / "run.json"
    try:
        read = json.loads(record.read_text())
        spec = TrainSpec.model_validate_json(json.dumps(read["spec"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Problem(f"{record}: does not say which spec trained here", advice="Give the --run-dir of a powergrad train.") from error
    latest_of = {entry["path"]: entry for entry in _entries(run_dir / "checkpoints.jsonl")}  # a step that was done twice counts once
    there = [entry for entry in latest_of.values() if (run_dir / entry["path"] / "manifest.json").exists()]
    if not there:
        raise Problem(f"{run_dir}: has no checkpoint yet", advice="Train on: the last epoch always writes one.")
    in_order = sorted(there, key=lambda entry: (entry["step"], _attempt(entry)))
    return Run(run_dir, spec, read.get("cpu_threads"), in_order, _entries(run_dir / "metrics.jsonl"))


def _entries(path: Path) -> list[dict[str, Any]]:
    """Whole lines: a crash may have cut the last one short."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _attempt(entry: dict[str, Any]) -> int:
    return int(Path(entry["path"]).parent.name.removeprefix("a"))


def _described(run: Run, data_root: Path) -> tuple[tuple[str, ...], Preprocessing]:
    """Class names and preprocessing: as the run wrote them down, or else from its data set. Raises Problem."""
    from powergrad.data.errors import DataError
    from powergrad.export import Preprocessing, described

    for folder in sorted(run.path.glob("artifacts/a*"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        labels, rules = folder / "labels.json", folder / "preprocessing.json"
        if labels.exists() and rules.exists():
            return tuple(json.loads(labels.read_text())), Preprocessing.from_json(json.loads(rules.read_text()))
    try:
        return described(run.spec, data_root=data_root)
    except DataError as error:
        raise Problem(f"The class names are not known: {error}", advice="Name the folder of the data sets: --data-root") from error


def _restored(run: Run, chosen: dict[str, Any], *, classes: int, image_size: int, average: bool) -> Restored:
    from powergrad.checkpoint import CheckpointError
    from powergrad.export import restored

    try:
        return restored(run.path / chosen["path"], spec=run.spec, classes=classes, image_size=image_size, averaged=average)
    except (CheckpointError, ValueError) as error:
        raise Problem(str(error), advice="Choose another: --checkpoint latest") from error


def _facts(run: Run, chosen: dict[str, Any], found: Restored, *, average: bool) -> Facts:
    from powergrad.card import Facts
    from powergrad.export import environment

    is_best = chosen is run.best
    tested = [point for point in run.points if any(name.startswith(("test_", "ema_test_")) for name in point)]
    test = {name: value for point in tested if is_best for name, value in point.items() if "test_" in name}
    curves = next(iter(sorted(run.path.glob("artifacts/a*/training.svg"), reverse=True)), None)
    return Facts(
        weights=f"{'best' if is_best else 'not the best'} checkpoint, {chosen['id']}{', moving average' if average else ''}",
        step=chosen["step"],
        epoch=chosen["epoch"],
        parameters=sum(parameter.numel() for parameter in found.model.parameters()),
        metrics={**chosen["metrics"], **test},
        points=run.points,
        attempts=_attempt(chosen),
        cpu_threads=run.cpu_threads,
        curves=curves,
        environment={"trained with torch": found.manifest.torch, "trained with powergrad": found.manifest.powergrad, **environment()},
    )


def _exported(
    run: Run, found: Restored, facts: Facts, names: tuple[str, ...], rules: Preprocessing, formats: list[Format], out: Path
) -> list[Path]:
    from powergrad.export import ExportError
    from powergrad.export import export as make

    try:
        wanted = cast("list[FormatName]", [name.value for name in dict.fromkeys(formats)])
        return make(found.model, formats=wanted, preprocessing=rules, class_names=names, spec=run.spec, facts=facts, out_dir=out)
    except ExportError as error:
        made = "".join(f"\nMade: {path}" for path in error.written)
        raise Problem(f"Not exported: {error}{made}", advice="Some networks cannot be had in every form: try another --format.") from error
