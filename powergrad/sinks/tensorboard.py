"""A run as a TensorBoard event file, written anew from the stored metrics at checkpoints and at the end: no step is in it twice.

The package `tensorboard` is an extra; without it nothing is written, and a note at the job says so. It loads no torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import time
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import structlog

from powergrad import durable
from powergrad.jobs.spec import JobSpec
from powergrad.jobs.store import Store, is_unavailable
from powergrad.protocol import ArtifactWritten, Note
from powergrad.sinks import history
from powergrad.sinks.history import History

MISSING = "outputs.tensorboard: the worker lacks the package tensorboard: pip install 'powergrad[tensorboard]'"
MEDIA_TYPE = "application/octet-stream"
SHARE = 0.05  # of the supervisor's time, at most, before the end
OF_THE_TRAINING = ("data", "model", "loss", "optimizer", "schedule", "clip", "epochs", "precision", "accumulate", "ema", "seed")

log = structlog.get_logger(__name__)


def is_available() -> bool:
    return importlib.util.find_spec("tensorboard") is not None


def encoded(found: History, *, job_id: str, spec: dict[str, Any]) -> bytes:
    """The event file: equal histories are equal bytes. Hyperparameters first, then a record a step. Raises ImportError."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    created_s = found.created_ms / 1000
    file = io.BytesIO()
    records = RecordWriter(file)
    records.write(_bytes(Event(wall_time=created_s, file_version="brain.Event:2")))
    records.write(_bytes(Event(wall_time=created_s, summary=_hyperparameters(spec, job_id=job_id, created_s=created_s))))
    points = sorted((step, name, value) for name, series in found.series.items() for step, value in series if value is not None)
    for step, values in groupby(points, key=lambda point: point[0]):
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for _, name, value in values])
        records.write(_bytes(Event(wall_time=found.times.at_ms(step) / 1000, step=step, summary=summary)))
    return file.getvalue()


def _bytes(event: Any) -> bytes:
    serialised: bytes = event.SerializeToString(deterministic=True)
    return serialised


def _hyperparameters(spec: dict[str, Any], *, job_id: str, created_s: float) -> Any:
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb

    chosen = history.flat({name: spec[name] for name in OF_THE_TRAINING if name in spec})
    values = {name: value if isinstance(value, bool | int | float | str) else json.dumps(value) for name, value in chosen.items()}
    return hparams_pb({name: value for name, value in values.items() if value != "null"}, trial_id=job_id, start_time_secs=created_s)


@dataclass
class EventFile:
    """The event file of one attempt, in `artifacts/a<attempt>/` as all its files."""

    job_id: str
    attempt: int
    spec: JobSpec
    run_dir: Path
    _told: str = ""
    _registered: Path | None = None
    _next_s: float = 0.0

    def write(self, store: Store, *, is_last: bool = False) -> ArtifactWritten | Note | None:
        """What is to be told of it, if anything. Raises what the database raises when it is away, and nothing else.

        Before the end it is left out while it would take too much of the time: a history of a million points costs seconds.
        """
        began_s = time.monotonic()
        if not is_last and began_s < self._next_s:
            return None
        try:
            written = self._write(store)
        except Exception as error:
            if is_unavailable(error):
                raise
            log.warning("no TensorBoard events", error=str(error))
            return self._note(MISSING if isinstance(error, ImportError) else f"outputs.tensorboard: not written: {error}")
        ended_s = time.monotonic()
        self._next_s = ended_s + (ended_s - began_s) / SHARE
        return written

    def _write(self, store: Store) -> ArtifactWritten:
        with store.read() as tx:
            found = history.read(tx, self.job_id)
        content = encoded(found, job_id=self.job_id, spec=self.spec.model_dump(mode="json"))
        # the same in every attempt: the last one's stands for all
        name = f"events.out.tfevents.{found.created_ms // 1000}.{self.job_id}"
        sha256 = hashlib.sha256(content).hexdigest()
        folder = self.run_dir / "artifacts" / f"a{self.attempt}"
        # a file for each content: the one that is registered stays whole until its successor is
        path = durable.write(folder / f"{sha256[:12]}.{name}", content)
        for leftover in folder.glob(f"*.{name}"):
            if leftover not in (path, self._registered):
                leftover.unlink(missing_ok=True)
        self._registered = path
        relative = str(path.relative_to(self.run_dir))
        return ArtifactWritten(name=name, path=relative, media_type=MEDIA_TYPE, bytes=len(content), sha256=sha256)

    def _note(self, detail: str) -> Note | None:
        """The same is told once."""
        if detail == self._told:
            return None
        self._told = detail
        return Note(detail=detail)
