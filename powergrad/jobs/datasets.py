"""Uploaded and registered data sets: immutable versions by content hash, of which a job pins one.

A set is `checking` until a worker's child has looked at every file, then `ready` or `failed`; only a ready one can be trained on. An
uploaded set's version is known before that, a registered one's only after it. Sets are added in `powergrad.jobs.uploads`.

    anybody     listed  get  samples  remove
    worker      check_ended
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, and_, delete, select, update

from powergrad.jobs import nearest
from powergrad.jobs.debts import owe
from powergrad.jobs.errors import DatasetInUse, DatasetNotFound, SamplesNotFound, Violation, refusal
from powergrad.jobs.spec import JobSpec
from powergrad.jobs.states import TERMINAL
from powergrad.jobs.store import Tx, rfc3339
from powergrad.jobs.tables import datasets, jobs, tasks
from powergrad.spec import BUILT_IN_DATASETS, NamedData

CHECKING, READY, FAILED = "checking", "ready", "failed"
UPLOADED, REGISTERED = "uploaded", "registered"
CHECK = "check_dataset"
"""The kind of the task that looks at a set."""
CHECKED_WITHIN_S = 3 * 3600.0
"""A check has ended after so long, whatever became of it."""
UNKNOWN = "unknown:"
"""Begins the version of a registered set that has not been read yet."""


@dataclass(frozen=True)
class Place:
    """Where a set's folder is: below the artifact root if it was uploaded, else below the data root."""

    path: str
    is_uploaded: bool
    stamp: str | None = None
    """What a registered folder looked like when it was read (`powergrad.archives.stamp_of`)."""


def with_version_pinned(tx: Tx, spec: JobSpec, *, owner: str) -> tuple[JobSpec, str | None]:
    """The spec with the very version that `data.dataset` means now, and that set's id; None for a built-in set.

    Raises UnknownReference, NotReady.
    """
    if not isinstance(spec.data, NamedData):
        return spec, None
    found = newest(tx, spec.data.dataset, version=spec.data.version, owner=owner, locked=True)
    violation = _unusable(tx, spec.data, found, owner=owner)
    if violation is not None:
        raise refusal([violation])
    assert found is not None, "what is not there is unusable"
    data = spec.data.model_copy(update={"version": found.version})
    return spec.model_copy(update={"data": data}), found.id


def newest(tx: Tx, name: str, *, version: str | None = None, owner: str, locked: bool = False) -> Row[Any] | None:
    """A set's row: of a version, or of the newest that is ready; if none is, of the newest.

    locked: nobody deletes it before this transaction ends.
    """
    query = _of(name, owner, version).order_by(datasets.c.id.desc())
    rows = tx.all(query.with_for_update(read=True) if locked else query)  # SQLite's transactions are alone anyway
    return next((row for row in rows if row.state == READY), rows[0] if rows else None)


def _of(name: str, owner: str, version: str | None = None) -> Select[Any]:
    mine: list[ColumnElement[bool]] = [datasets.c.owner == owner, datasets.c.name == name]
    return select(datasets).where(*mine, *(() if version is None else (datasets.c.version == version,)))


def place(tx: Tx, dataset_id: str) -> Place | None:
    """None: it is gone."""
    row = tx.one(select(datasets.c.path, datasets.c.source, datasets.c.report).where(datasets.c.id == dataset_id))
    if row is None:
        return None
    is_uploaded = row.source == UPLOADED
    return Place(row.path, is_uploaded, stamp=None if is_uploaded else (row.report or {}).get("stamp"))


def names(tx: Tx, owner: str) -> list[str]:
    """The names that an owner has given."""
    return sorted({row.name for row in tx.all(select(datasets.c.name).where(datasets.c.owner == owner).distinct())})


def listed(tx: Tx, owner: str) -> list[dict[str, Any]]:
    """An owner's sets as JSON, by name: the newest version of each with what there is beside it."""
    by_name: dict[str, list[Row[Any]]] = {}
    for row in tx.all(select(datasets).where(datasets.c.owner == owner).order_by(datasets.c.name, datasets.c.id.desc())):
        by_name.setdefault(row.name, []).append(row)
    return [_shown(rows, rows[0]) for rows in by_name.values()]


def get(tx: Tx, name: str, *, version: str | None = None, owner: str) -> dict[str, Any]:
    """A version of a set, the newest if none is named, with its report. Raises DatasetNotFound."""
    rows = tx.all(_of(name, owner).order_by(datasets.c.id.desc()))
    chosen = next((row for row in rows if version in (None, row.version)), None)
    if chosen is None:
        raise DatasetNotFound(name if version is None or not rows else f"{name} {version}")
    report = None if chosen.report is None else {part: found for part, found in chosen.report.items() if part != "samples"}
    return {**_shown(rows, chosen), "report": report}


def _shown(rows: Sequence[Row[Any]], chosen: Row[Any]) -> dict[str, Any]:
    current = next((row.version for row in rows if row.state == READY), None)
    return {"name": chosen.name, "object": "dataset", **_version(chosen), "current": current, "versions": [_version(row) for row in rows]}


def _version(row: Row[Any]) -> dict[str, Any]:
    report = row.report or {}
    return {
        "version": None if row.version.startswith(UNKNOWN) else row.version,
        "source": row.source,
        "path": row.path if row.source == REGISTERED else None,
        "state": row.state,
        "error": row.error,
        "classes": report.get("classes"),
        "splits": report.get("splits"),
        "files": row.files,
        "bytes": row.bytes,
        "task": row.task_id,
        "created_at": rfc3339(row.created_at),
        "checked_at": rfc3339(row.checked_at),
    }


def upload_dir(dataset_id: str) -> str:
    """An uploaded set's directory below the artifact root."""
    return f"uploads/{dataset_id}"


def samples_dir(dataset_id: str) -> str:
    """Where pictures of a set's images are, below the artifact root."""
    return f"samples/{dataset_id}"


@dataclass(frozen=True)
class Sheet:
    """Images of one split, class by class. path, bytes, sha256: of the PNG, below the artifact root; shown: what GET …/samples tells."""

    path: str
    bytes: int
    sha256: str
    shown: dict[str, Any]


def samples(tx: Tx, name: str, *, split: str, version: str | None = None, owner: str) -> Sheet:
    """Of a version of a set, or of the newest that is ready. Raises DatasetNotFound, SamplesNotFound."""
    if name in BUILT_IN_DATASETS:
        raise SamplesNotFound(name, "a built-in set is made or read by the workers, and nothing of it is kept here")
    row = newest(tx, name, version=version, owner=owner)
    if row is None:
        raise DatasetNotFound(name if version is None else f"{name} {version}")
    if row.state != READY:
        raise SamplesNotFound(name, "it is still being checked" if row.state == CHECKING else "its check failed")
    drawn = (row.report or {}).get("samples")
    if drawn is None:
        raise SamplesNotFound(name, "it was checked by a release that made none: upload or register it anew")
    if split not in drawn["splits"]:
        raise SamplesNotFound(name, f"it has no images in {split}, only in {', '.join(drawn['splits'])}")
    sheet, counts = drawn["splits"][split], row.report["class_counts"]
    classes = [
        {"label": label, "count": counts.get(label, {}).get(split), "samples": shown, "row": place}
        for place, (label, shown) in enumerate(sheet["rows"])
    ]
    told = {
        "object": "dataset_samples",
        "dataset": row.name,
        "version": row.version,
        "split": split,
        "splits": [one for one in row.report["splits"] if one in drawn["splits"]],
        "tile": drawn["tile"],
        "columns": drawn["columns"],
        "classes": classes,
        "more_classes": row.report["classes"] - len(classes),
    }
    return Sheet(f"{drawn['path']}/{split}.png", sheet["bytes"], sheet["sha256"], told)


def remove(tx: Tx, name: str, *, version: str | None = None, owner: str) -> None:
    """Delete a set, or one version; files that were uploaded are freed after the commit. Raises DatasetNotFound, DatasetInUse."""
    rows = tx.all(_of(name, owner, version).order_by(datasets.c.id).with_for_update())
    if not rows:
        raise DatasetNotFound(name if version is None else f"{name} {version}")
    ids = [row.id for row in rows]
    needed = and_(jobs.c.dataset_id.in_(ids), jobs.c.state.not_in([str(state) for state in TERMINAL]))
    job = tx.one(select(jobs.c.id).where(needed).limit(1))
    if job is not None:
        raise DatasetInUse(name, job.id)
    for row in rows:
        _remove(tx, row)


def _remove(tx: Tx, row: Row[Any]) -> None:
    tx.run(delete(datasets).where(datasets.c.id == row.id))
    if row.task_id is not None and tx.run(delete(tasks).where(tasks.c.id == row.task_id)).rowcount:
        owe(tx, f"tasks/{row.task_id}")
    owe(tx, *_pictures(row), after_s=CHECKED_WITHIN_S if row.state == CHECKING else 0.0)  # a check that is not told may draw yet
    if row.source == UPLOADED:
        owe(tx, upload_dir(row.id))


def _pictures(row: Row[Any]) -> set[str]:
    """A set that was registered again has those of the newer check."""
    drawn = (row.report or {}).get("samples")
    return {samples_dir(row.id)} if drawn is None else {samples_dir(row.id), drawn["path"]}


# --- what came of a check


def check_ended(tx: Tx, task_id: str, *, result: dict[str, Any] | None, error: dict[str, Any] | None) -> None:
    """Store what a check found, in the transaction that ends its task. A set that is gone by now is no error."""
    row = tx.one(select(datasets).where(datasets.c.task_id == task_id, datasets.c.state == CHECKING).with_for_update())
    if row is None:
        if result is not None and result.get("samples") is not None:
            owe(tx, result["samples"]["path"])
        return
    if result is None:
        _settle(tx, row, {"state": FAILED, "error": error})
        return
    found = {name: result[name] for name in ("state", "error", "report", "files", "bytes")}
    if found["report"] is not None:
        found["report"] = {**found["report"], "samples": result.get("samples")}
    if row.source == REGISTERED:
        _register(tx, row, {**found, "version": result["version"]})
    else:
        _settle(tx, row, found)


def _register(tx: Tx, row: Row[Any], found: dict[str, Any]) -> None:
    """What is in the folder now is known: that version is the set's, and what was there before is no more."""
    for other in tx.all(_of(row.name, row.owner).where(datasets.c.id != row.id, datasets.c.source == REGISTERED)):
        if other.path == row.path and other.version != found["version"]:
            gone = {"code": "changed", "detail": f"the folder has changed: it holds version {found['version']} now"}
            tx.run(update(datasets).where(datasets.c.id == other.id).values(state=FAILED, error=gone))
    twin = tx.one(_of(row.name, row.owner, found["version"]).where(datasets.c.id != row.id))
    if twin is None:
        _settle(tx, row, found)
    elif twin.source == REGISTERED:
        owe(tx, *_pictures(twin))
        _settle(tx, twin, {**found, "path": row.path, "task_id": row.task_id})
        tx.run(delete(datasets).where(datasets.c.id == row.id))
    else:  # the same files were uploaded: that copy cannot change under a job
        owe(tx, samples_dir(row.id))
        tx.run(delete(datasets).where(datasets.c.id == row.id))


def _settle(tx: Tx, row: Row[Any], values: dict[str, Any]) -> None:
    tx.run(update(datasets).where(datasets.c.id == row.id).values(**values, checked_at=tx.now_ms))


def _unusable(tx: Tx, wanted: NamedData, found: Row[Any] | None, *, owner: str) -> Violation | None:
    if found is None and wanted.version is not None and newest(tx, wanted.dataset, owner=owner) is not None:
        return Violation("/data/version", "not_found", f"data set {wanted.dataset!r} has no such version", wanted.version)
    if found is None:
        known = (*BUILT_IN_DATASETS, *names(tx, owner))
        return Violation("/data/dataset", "unknown_name", nearest.name(wanted.dataset, known), wanted.dataset)
    if found.state == CHECKING:
        return Violation("/data/dataset", "not_ready", f"data set {wanted.dataset!r} is still being checked", wanted.dataset)
    if found.state == FAILED:
        why = (found.error or {}).get("detail", "its check failed")
        return Violation("/data/dataset", "not_ready", f"data set {wanted.dataset!r} cannot be used: {why}", wanted.dataset)
    return None
