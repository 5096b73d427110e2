"""Event files as TensorBoard itself reads them, of runs that were stopped, killed and gone on with."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from powergrad.jobs import lifecycle, metrics, queries, rows
from powergrad.jobs.store import Store
from powergrad.protocol import ArtifactWritten, Note
from powergrad.sinks import tensorboard
from powergrad.sinks.tensorboard import EventFile
from tests.jobs import builders as b
from tests.worker.conftest import Place, place  # noqa: F401  # a fixture
from tests.worker.test_supervisor import trainer_of

ASKED: dict[str, Any] = {"outputs": {"tensorboard": True}}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's readers


def test_a_run_that_is_paused_and_killed_leaves_one_clean_history(place: Place) -> None:  # noqa: F811
    job_id = place.submit(**ASKED, epochs=3)
    place.until_step(job_id, 3)
    with place.store.write() as tx:
        lifecycle.pause(tx, job_id)
    place.until_state(job_id, "paused")
    assert scalars(registered(place, job_id)) == stored(place.store, job_id)
    with place.store.write() as tx:
        lifecycle.resume(tx, job_id)
    place.until_state(job_id, "running")
    place.until_step(job_id, 12)
    trainer_of(job_id).kill()
    job = place.until_state(job_id, "succeeded", "failed")
    assert (job["state"], job["attempt"]) == ("succeeded", 3)
    assert scalars(registered(place, job_id)) == stored(place.store, job_id)
    left = place.until(lambda: _only(list((place.service.settings.data_dir / "jobs" / job_id).glob("artifacts/*/*tfevents*"))))
    assert left == registered(place, job_id)


def test_a_run_that_does_not_ask_has_no_event_file(place: Place) -> None:  # noqa: F811
    job_id = place.submit(epochs=1)
    place.until_state(job_id, "succeeded")
    with place.store.read() as tx:
        assert [found["name"] for found in queries.list_artifacts(tx, job_id) if "tfevents" in found["name"]] == []


def test_hyperparameters_are_those_of_the_training(store: Store, tmp_path: Path) -> None:
    path = written(store, tmp_path, epochs=7, loss={"alpha": 0.25})
    told = next(value for event in EventFileLoader(str(path)).Load() for value in event.summary.value if "hparams" in value.tag)
    from tensorboard.plugins.hparams import metadata

    found = metadata.parse_session_start_info_plugin_data(told.metadata.plugin_data.content).hparams
    assert found["loss.alpha"].number_value == 0.25
    assert found["epochs"].number_value == 7
    assert found["data.dataset"].string_value == "digits"
    assert "clip" not in found
    assert not [name for name in found if name.startswith(("resources", "labels", "limits"))]


def test_equal_histories_are_equal_bytes(store: Store, tmp_path: Path) -> None:
    run = b.running(store, **ASKED)
    b.record(store, run, b.plan(), b.step(1), b.evaluation(1, 0.5))
    spec = b.spec(**ASKED)
    one, other = (EventFile(run.job_id, 1, spec, tmp_path).write(store, is_last=True) for _ in range(2))
    assert isinstance(one, ArtifactWritten)
    assert one == other


def test_what_is_registered_stays_until_its_successor_is(store: Store, tmp_path: Path) -> None:
    run = b.running(store, **ASKED)
    file = EventFile(run.job_id, 1, b.spec(**ASKED), tmp_path)
    b.record(store, run, b.plan(), b.step(1))
    paths = []
    for number in (2, 3, 4):
        told = file.write(store, is_last=True)
        assert isinstance(told, ArtifactWritten)
        paths.append(tmp_path / told.path)
        b.record(store, run, b.step(number))
    assert [path.exists() for path in paths] == [False, True, True]


def test_without_the_package_a_note_says_what_to_install_once(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *args: Any, **named: Any) -> Any:
        if name.startswith("tensorboard"):
            raise ImportError(name)
        return real(name, *args, **named)

    run = b.running(store, **ASKED)
    b.record(store, run, b.plan(), b.step(1))
    file = EventFile(run.job_id, 1, b.spec(**ASKED), tmp_path)
    monkeypatch.setattr(builtins, "__import__", absent)
    assert file.write(store) == Note(detail=tensorboard.MISSING)
    assert file.write(store) is None
    assert "pip install 'powergrad[tensorboard]'" in tensorboard.MISSING


def test_a_disk_that_is_full_is_a_note_and_fails_nothing(store: Store, tmp_path: Path) -> None:
    run = b.running(store, **ASKED)
    b.record(store, run, b.plan(), b.step(1))
    (tmp_path / "artifacts").write_text("in the way")
    told = EventFile(run.job_id, 1, b.spec(**ASKED), tmp_path).write(store)
    assert isinstance(told, Note)
    assert told.detail.startswith("outputs.tensorboard: not written:")


def _only(found: list[Path]) -> Path | None:
    return found[0] if len(found) == 1 else None


def written(store: Store, folder: Path, **overrides: Any) -> Path:
    """The event file of a run with two points."""
    run = b.running(store, **overrides)
    b.record(store, run, b.plan(), b.step(1), b.step(2))
    told = EventFile(run.job_id, 1, b.spec(**overrides), folder).write(store, is_last=True)
    assert isinstance(told, ArtifactWritten)
    return folder / told.path


def registered(place: Place, job_id: str) -> Path:  # noqa: F811
    """The file that the job's artifact stands for."""
    with place.store.read() as tx:
        (name,) = [found["name"] for found in queries.list_artifacts(tx, job_id) if "tfevents" in found["name"]]
        found = queries.find_artifact(tx, job_id, name)
    return place.service.artifacts.local_path(f"{rows.job_dir(job_id)}/{found.path}")


def scalars(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar as TensorBoard's own reader finds it."""
    reader = EventAccumulator(str(path), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    reader.Reload()
    return {tag: [(event.step, float(event.value)) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def stored(store: Store, job_id: str) -> dict[str, list[tuple[int, float]]]:
    """The stored metrics, as float32."""
    import numpy as np

    with store.read() as tx:
        series = [metrics.read(tx, job_id, name) for name in metrics.names(tx, job_id)]
    return {
        one.name: [(step, float(np.float32(value))) for step, value in zip(one.steps, one.values, strict=True) if value is not None]
        for one in series
    }
