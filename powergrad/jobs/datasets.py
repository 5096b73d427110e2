"""Uploaded and registered data sets: immutable versions by content hash, of which a job pins one.

A set is `checking` until a worker's child has looked at every file, then `ready` or `failed`; only a ready one can be trained on.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, and_, select

from powergrad.jobs.errors import Violation, refusal
from powergrad.jobs.spec import JobSpec
from powergrad.jobs.store import Tx
from powergrad.jobs.tables import datasets
from powergrad.spec import BUILT_IN_DATASETS, NamedData

CHECKING, READY, FAILED = "checking", "ready", "failed"
UPLOADED, REGISTERED = "uploaded", "registered"


@dataclass(frozen=True)
class Place:
    """Where a set's folder is: below the artifact root if it was uploaded, else below the data root."""

    path: str
    is_uploaded: bool


def with_version_pinned(tx: Tx, spec: JobSpec, *, owner: str) -> tuple[JobSpec, str | None]:
    """The spec with the very version that `data.dataset` means now, and that set's id; None for a built-in set.

    Raises UnknownReference, NotReady.
    """
    if not isinstance(spec.data, NamedData):
        return spec, None
    found = newest(tx, spec.data.dataset, version=spec.data.version, owner=owner)
    violation = _unusable(tx, spec.data, found, owner=owner)
    if violation is not None:
        raise refusal([violation])
    assert found is not None, "what is not there is unusable"
    data = spec.data.model_copy(update={"version": found.version})
    return spec.model_copy(update={"data": data}), found.id


def newest(tx: Tx, name: str, *, version: str | None = None, owner: str) -> Row[Any] | None:
    """A set's row: of a version, or of the newest that is ready; if none is, of the newest."""
    mine = and_(datasets.c.owner == owner, datasets.c.name == name, *() if version is None else (datasets.c.version == version,))
    rows = tx.all(select(datasets).where(mine).order_by(datasets.c.id.desc()))
    return next((row for row in rows if row.state == READY), rows[0] if rows else None)


def place(tx: Tx, dataset_id: str) -> Place | None:
    """None: it is gone."""
    row = tx.one(select(datasets.c.path, datasets.c.source).where(datasets.c.id == dataset_id))
    return None if row is None else Place(row.path, row.source == UPLOADED)


def names(tx: Tx, owner: str) -> list[str]:
    """The names that an owner has given."""
    return sorted({row.name for row in tx.all(select(datasets.c.name).where(datasets.c.owner == owner).distinct())})


def _unusable(tx: Tx, wanted: NamedData, found: Row[Any] | None, *, owner: str) -> Violation | None:
    if found is None and wanted.version is not None and newest(tx, wanted.dataset, owner=owner) is not None:
        return Violation("/data/version", "not_found", f"data set {wanted.dataset!r} has no such version", wanted.version)
    if found is None:
        known = (*BUILT_IN_DATASETS, *names(tx, owner))
        near = difflib.get_close_matches(wanted.dataset, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known)[:20])}"
        return Violation("/data/dataset", "unknown_name", f"unknown name {wanted.dataset!r}{hint}", wanted.dataset)
    if found.state == CHECKING:
        return Violation("/data/dataset", "not_ready", f"data set {wanted.dataset!r} is still being checked", wanted.dataset)
    if found.state == FAILED:
        why = (found.error or {}).get("detail", "its check failed")
        return Violation("/data/dataset", "not_ready", f"data set {wanted.dataset!r} cannot be used: {why}", wanted.dataset)
    return None
