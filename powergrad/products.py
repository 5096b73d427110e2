"""What a run leaves beside its checkpoints: class names, preprocessing, tables of its mistakes, pictures, exports.

Everything lies in `artifacts/a<attempt>/` of the run's directory, so that a thawed old attempt touches nothing of its successor's, and is
announced when it is complete. What cannot be made is a note: it fails no run.
"""

from __future__ import annotations

import hashlib
import json
import mimetypes
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from powergrad import durable, results
from powergrad.engine import Emit, Run, best_models
from powergrad.progress import Progress
from powergrad.protocol import ArtifactWritten, Note, Phase

LABELS, PREPROCESSING = "labels.json", "preprocessing.json"
RESIZE = "shorter side, centre square, bilinear"
MEDIA_TYPES = {".onnx": "application/octet-stream", ".pt2": "application/zip", ".md": "text/markdown", ".csv": "text/csv"}


def describe(run: Run, *, emit: Emit) -> None:
    """What a prediction needs to know beside the weights: labels.json and preprocessing.json."""
    folder = _folder(run)
    mean, std = ((values.flatten() / 255).expand(3).tolist() for values in (run.data.mean, run.data.std))
    preprocessing = {"image_size": run.data.image_size, "mean": mean, "std": std, "resize": RESIZE}
    files = {LABELS: list(run.data.class_names), PREPROCESSING: preprocessing}
    _announce(run, [durable.write(folder / name, json.dumps(value).encode()) for name, value in files.items()], emit=emit)


def finish(run: Run, progress: Progress, *, emit: Emit) -> None:
    """Looks at the best weights once more: confusion, scores per class and worst mistakes on the validation split."""
    emit(Phase(name="exporting"))
    model, _ = best_models(run, progress.best, emit=emit)
    _announce(run, _tables(run, model, emit=emit), emit=emit)


def _tables(run: Run, model: nn.Module, *, emit: Emit) -> list[Path]:
    try:
        found = results.analyse(
            model,
            run.data.held_out_batches(run.data.val, batch_size=256),
            class_names=run.data.class_names,
            device=run.device,
            autocast=run.autocast(),
        )
    except ValueError as error:
        emit(Note(detail=f"no table of results: {error}"))
        return []
    return results.write(found, _folder(run))


def _folder(run: Run) -> Path:
    return run.run_dir / "artifacts" / f"a{run.attempt}"


def _announce(run: Run, paths: Iterable[Path], *, emit: Emit) -> None:
    for path in paths:
        with path.open("rb") as file:
            sha256, size = hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
        media_type = MEDIA_TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        emit(ArtifactWritten(name=path.name, path=str(path.relative_to(run.run_dir)), media_type=media_type, bytes=size, sha256=sha256))
