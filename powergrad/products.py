"""What a run leaves beside its checkpoints: class names, preprocessing, tables of its mistakes, a model card, pictures, exports.

Everything lies in `artifacts/a<attempt>/` of the run's directory, so that a thawed old attempt touches nothing of its successor's, and is
announced when it is complete. What cannot be made is a note: it fails no run.
"""

from __future__ import annotations

import hashlib
import json
import math
import mimetypes
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from powergrad import durable, results
from powergrad.card import Facts, Point, model_card
from powergrad.data.errors import DataError
from powergrad.engine import Emit, Run, best_models
from powergrad.export import ExportError, Preprocessing, environment, export
from powergrad.progress import Progress
from powergrad.protocol import LABELS, PREPROCESSING, ArtifactWritten, Note, Phase, Plan
from powergrad.telemetry import History, read_history

CARD, HISTORY = "MODEL_CARD.md", "telemetry.json"
MEDIA_TYPES = {".onnx": "application/octet-stream", ".pt2": "application/zip", ".md": "text/markdown", ".csv": "text/csv"}
CURVES = "training.svg"


def describe(run: Run, *, emit: Emit) -> None:
    """What a prediction needs to know beside the weights: labels.json and preprocessing.json."""
    contents = {LABELS: list(run.data.class_names), PREPROCESSING: Preprocessing.of(run.data).as_json()}
    files = [durable.write(_folder(run) / name, json.dumps(content, indent=1).encode()) for name, content in contents.items()]
    _announce(run, files, emit=emit)


def finish(run: Run, progress: Progress, plan: Plan, *, emit: Emit) -> None:
    """Of the best weights: their mistakes on the validation split, a model card, and the exports the spec asks for. Of the run: pictures."""
    emit(Phase(name="exporting"))
    try:
        _finish(run, progress, plan, emit=emit)
    except OSError as error:  # the weights are safe: a disk that is full now fails no run
        emit(Note(detail=f"not all could be written: {error}"))


def _finish(run: Run, progress: Progress, plan: Plan, *, emit: Emit) -> None:
    model, _ = best_models(run, progress.best, emit=emit)
    found = _analysed(run, model, emit=emit)
    if found is not None:
        _announce(run, results.write(found, _folder(run), _gallery(run, found, emit=emit)), emit=emit)
    if (history := _history(run, emit=emit)) is not None:
        _announce(run, [*_layers(run, history), *_pictures(run, progress, history)], emit=emit)
    facts = _facts(run, progress, plan, found)
    preprocessing = Preprocessing.of(run.data)
    card = model_card(spec=run.spec, facts=facts, class_names=run.data.class_names, preprocessing=preprocessing)
    _announce(run, [durable.write(_folder(run) / CARD, card.encode())], emit=emit)
    if run.spec.export:
        _announce(run, _exports(run, model, preprocessing, facts, emit=emit), emit=emit)


def _analysed(run: Run, model: nn.Module, *, emit: Emit) -> results.Results | None:
    batches = run.data.held_out_batches(run.data.val, batch_size=min(max(run.batch_size, 64), 1024))
    try:
        return results.analyse(model, batches, class_names=run.data.class_names, device=run.device, autocast=run.autocast())
    except ValueError as error:
        emit(Note(detail=f"no tables of results: {error}"))
        return None


def _gallery(run: Run, found: results.Results, *, emit: Emit) -> results.Gallery:
    try:
        return results.gallery(found.worst, run.data.val)
    except DataError as error:  # a file that has gone since it was read
        emit(Note(detail=f"mistakes without images: {error}"))
        return results.Gallery({})


def _history(run: Run, *, emit: Emit) -> History | None:
    """What telemetry kept per layer, which is nothing without it; None where it cannot be read."""
    if run.spec.telemetry is None:
        return History()
    try:
        return read_history(run.run_dir)
    except ValueError as error:  # a line that is damaged
        emit(Note(detail=f"no pictures: {error}"))
        return None


def _layers(run: Run, history: History) -> list[Path]:
    return [] if run.spec.telemetry is None else [durable.write(_folder(run) / HISTORY, json.dumps(history.as_json()).encode())]


def _pictures(run: Run, progress: Progress, history: History) -> list[Path]:
    telemetry = run.spec.telemetry
    if "bundle" not in run.spec.export and (telemetry is None or not telemetry.pictures):
        return []
    from powergrad.pictures import draw  # here: a second of matplotlib that most runs do not need

    series: dict[str, list[tuple[int, float]]] = {}
    for point in (*progress.scores, *progress.looks):
        for name, value in point.items():
            series.setdefault(name, []).append((int(point["step"]), value))
    return draw(history, series, _folder(run), title=f"{run.spec.data.dataset}, {run.spec.model.name}")


def _exports(run: Run, model: nn.Module, preprocessing: Preprocessing, facts: Facts, *, emit: Emit) -> list[Path]:
    try:
        return export(
            model,
            formats=run.spec.export,
            preprocessing=preprocessing,
            class_names=run.data.class_names,
            spec=run.spec,
            facts=facts,
            out_dir=_folder(run),
        )
    except ExportError as error:
        emit(Note(detail=f"not exported: {error}"))
        return error.written


def _facts(run: Run, progress: Progress, plan: Plan, found: results.Results | None) -> Facts:
    best = progress.best
    step = progress.step if best is None else best.step
    points: list[Point] = [{name: _finite(value) for name, value in point.items()} for point in progress.scores]
    scores = next((point for point in points if point["step"] == step), {})
    curves = _folder(run) / CURVES
    return Facts(
        weights="last checkpoint" if best is None else f"best checkpoint, {Path(best.path).name}",
        step=step,
        epoch=step // run.steps_per_epoch,
        parameters=plan.parameters,
        metrics={name: value for name, value in {**scores, **progress.test}.items() if name not in {"step", "epoch"}},
        points=points,
        train_images=plan.train_images,
        val_images=plan.val_images,
        test_images=plan.test_images,
        data_sha256=run.data.fingerprint(),
        attempts=run.attempt,
        determinism=f"{plan.determinism}: {plan.determinism_reason}",
        precision=plan.precision,
        cpu_threads=plan.cpu_threads,
        ece=None if found is None else found.ece,
        curves=curves if curves.exists() else None,
        environment=environment(run.device),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _folder(run: Run) -> Path:
    return run.run_dir / "artifacts" / f"a{run.attempt}"


def _announce(run: Run, paths: Iterable[Path], *, emit: Emit) -> None:
    for path in paths:
        with path.open("rb") as file:
            sha256, size = hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
        media_type = MEDIA_TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        emit(ArtifactWritten(name=path.name, path=str(path.relative_to(run.run_dir)), media_type=media_type, bytes=size, sha256=sha256))
