"""How data sets come to be: files that are sent, and folders that lie there already.

begin  go_on  accept  abandon        an upload, whose directory is a debt until it is accepted (`powergrad.jobs.debts`)
register                             a folder below the data root
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, Select, delete, insert, select, update
from ulid import ULID

from powergrad.archives import TREE
from powergrad.jobs import debts, quotas, tasks
from powergrad.jobs.datasets import CHECK, CHECKING, FAILED, REGISTERED, UNKNOWN, UPLOADED, samples_dir, upload_dir
from powergrad.jobs.errors import NameTaken, UploadLost
from powergrad.jobs.store import Tx
from powergrad.jobs.tables import datasets
from powergrad.spec import BUILT_IN_DATASETS

VOUCHED_S = 180.0
"""An upload of which nothing is heard for so long is given up."""


@dataclass(frozen=True)
class Upload:
    """What was sent, unpacked. skip_unreadable: images that cannot be decoded are left out instead of failing the set."""

    id: str
    owner: str
    name: str
    version: str
    files: int
    bytes: int
    skip_unreadable: bool = False


@dataclass(frozen=True)
class Added:
    """checks: a task looks at the set from here on; otherwise it was there already, and nothing was stored."""

    dataset_id: str
    version: str
    checks: bool


def begin(tx: Tx, name: str, *, owner: str, bytes_announced: int = 0) -> str:
    """The id of a new upload, whose files go to `upload_dir(id)`. Raises NameTaken, QuotaExceeded."""
    _refuse_taken(name)
    quotas.check_bytes(tx, owner, more=bytes_announced)
    upload_id = _new_id(tx)
    debts.owe(tx, upload_dir(upload_id), after_s=VOUCHED_S)
    return upload_id


def go_on(tx: Tx, upload_id: str) -> None:
    """The upload is alive. Raises UploadLost."""
    if not debts.put_off(tx, upload_dir(upload_id), after_s=VOUCHED_S):
        raise UploadLost(upload_id)


def abandon(tx: Tx, upload_id: str) -> None:
    """Free its files now."""
    debts.owe(tx, upload_dir(upload_id))


def accept(tx: Tx, upload: Upload) -> Added:
    """Make the files a version of the set, and have them checked. What is there already, byte for byte, stays the only copy.

    Raises UploadLost, QuotaExceeded.
    """
    if not debts.keep(tx, upload_dir(upload.id)):
        raise UploadLost(upload.id)
    if not _is_known(tx, upload):
        quotas.check_bytes(tx, upload.owner, more=upload.bytes)
    row = {
        **_row(tx, upload.id, upload.name, owner=upload.owner, source=UPLOADED, path=f"{upload_dir(upload.id)}/{TREE}"),
        "version": upload.version,
        "files": upload.files,
        "bytes": upload.bytes,
    }
    new = tx.insert(datasets).values(**row).on_conflict_do_nothing().returning(datasets.c.id)
    if tx.one(new) is None:
        return _again(tx, upload)
    return Added(upload.id, upload.version, checks=_check(tx, row, skip_unreadable=upload.skip_unreadable))


def _same(upload: Upload) -> Select[Any]:
    same = (datasets.c.owner == upload.owner, datasets.c.name == upload.name, datasets.c.version == upload.version)
    return select(datasets).where(*same)


def _is_known(tx: Tx, upload: Upload) -> bool:
    return tx.one(_same(upload)) is not None


def _again(tx: Tx, upload: Upload) -> Added:
    """These files came before. If they failed they are looked at once more: the fault may have been ours, or be forgiven now."""
    found = tx.one(_same(upload).with_for_update())
    if found is None:
        raise UploadLost(upload.id)  # it was deleted between the two statements
    debts.owe(tx, upload_dir(upload.id))
    checks = found.state == FAILED and _check(tx, found._asdict(), skip_unreadable=upload.skip_unreadable)
    return Added(found.id, upload.version, checks=checks)


def register(tx: Tx, name: str, path: str, *, owner: str) -> Added:
    """Have a folder below the data root read, and made a version of the set; one that is being read already is not read twice.

    Raises NameTaken.
    """
    _refuse_taken(name)
    mine = (datasets.c.owner == owner, datasets.c.name == name, datasets.c.source == REGISTERED, datasets.c.path == path)
    found: Row[Any] | None = tx.one(select(datasets).where(*mine, datasets.c.state == CHECKING))
    if found is not None:
        return Added(found.id, found.version, checks=False)
    tx.run(delete(datasets).where(*mine, datasets.c.state == FAILED, datasets.c.version.startswith(UNKNOWN)))
    dataset_id = _new_id(tx)
    row = {**_row(tx, dataset_id, name, owner=owner, source=REGISTERED, path=path), "version": UNKNOWN + dataset_id, "files": 0, "bytes": 0}
    tx.run(insert(datasets).values(**row))
    return Added(dataset_id, row["version"], checks=_check(tx, row, skip_unreadable=False))


def _refuse_taken(name: str) -> None:
    if name in BUILT_IN_DATASETS:
        raise NameTaken(name)


def _new_id(tx: Tx) -> str:
    return f"set_{ULID.from_timestamp(tx.now_ms)}"


def _row(tx: Tx, dataset_id: str, name: str, *, owner: str, source: str, path: str) -> dict[str, Any]:
    return {"id": dataset_id, "owner": owner, "name": name, "source": source, "state": CHECKING, "path": path, "created_at": tx.now_ms}


def _check(tx: Tx, row: dict[str, Any], *, skip_unreadable: bool) -> bool:
    """Hand a set to the workers; ring after the commit."""
    task_id = tasks.new_id(tx)
    asked = {
        "path": row["path"],
        "source": row["source"],
        "skip_unreadable": skip_unreadable,
        "bytes": row["bytes"],
        "files": row["files"],
        "samples": samples_dir(row["id"]),
    }
    tasks.submit(tx, task_id, CHECK, asked, owner=row["owner"])
    begun = {"state": CHECKING, "task_id": task_id, "error": None, "report": None, "checked_at": None}
    tx.run(update(datasets).where(datasets.c.id == row["id"]).values(**begun))
    return True
