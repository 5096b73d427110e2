"""An archive on its way in: to the disk as it comes, never into memory, then unpacked by a short-lived process of its own."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from api import errors
from api.errors import Refused
from api.parts import Parts
from powergrad.jobs import debts, uploads
from powergrad.jobs.datasets import upload_dir
from powergrad.jobs.errors import StorageFull
from powergrad.jobs.store import is_unavailable
from powergrad.jobs.uploads import VOUCHED_S, Added, Upload

WRITTEN_AT_ONCE = 1 << 20
ROOM_EVERY_BYTES = 64 << 20
SILENCE_S = 60.0
"""A sender of whom nothing comes for so long is given up."""
DROPPED_BYTES = 64 << 20  # read and dropped, because a sender that is cut off never reads the refusal
VOUCH_S = VOUCHED_S / 4
UNPACKED_AT_ONCE = 2
CPU_S = 120
CPU_BYTES_PER_S = 4 << 20  # of the archive: xz gives 20 MB/s of what is packed on one core
PATIENCE = 10  # times the processor time, on the clock: it runs below nice on a busy host

log = structlog.get_logger(__name__)
_turns = threading.BoundedSemaphore(UNPACKED_AT_ONCE)


@dataclass(frozen=True)
class Sent:
    """What is asked of an upload."""

    name: str
    owner: str
    skip_unreadable: bool


async def receive(parts: Parts, request: Request, sent: Sent) -> Added:
    """Take an archive in and make it a version of a data set. Whatever goes wrong, nothing of it is left.

    Raises Refused (400, 413, 422), StorageFull, NameTaken, QuotaExceeded, UploadLost.
    """
    announced = _announced(request)
    if announced > parts.settings.max_upload_bytes:
        await _drop(request)
        raise _too_large(parts)
    _check_room(parts, announced)
    upload_id = await run_in_threadpool(_begin, parts, sent, announced)
    try:
        archive = await _Writer(parts, upload_id).write(request)
        return await run_in_threadpool(_take, parts, sent, upload_id, archive)
    except BaseException:
        # its own thread: this may be the end of a cancelled request, which must not wait
        threading.Thread(target=_discard, args=(parts, upload_id), name="discard-upload").start()
        raise


def _announced(request: Request) -> int:
    length = request.headers.get("content-length", "")
    return int(length) if length.isascii() and length.isdigit() else 0


def _too_large(parts: Parts) -> Refused:
    limit = parts.settings.max_upload_bytes
    detail = f"the archive has more than {limit:,} bytes: split the set, or register a folder below the data root"
    return Refused(errors.TOO_LARGE, detail, headers={"Connection": "close"})


def _check_room(parts: Parts, wanted: int) -> None:
    """Raises StorageFull."""
    free = parts.artifacts.free_bytes()
    if free is not None and free - wanted < parts.settings.min_free_bytes:
        raise StorageFull(free, wanted + parts.settings.min_free_bytes)


def _begin(parts: Parts, sent: Sent, announced: int) -> str:
    with parts.store.write() as tx:
        return uploads.begin(tx, sent.name, owner=sent.owner, bytes_announced=announced)


async def _drop(request: Request) -> None:
    dropped = 0
    async for chunk in _heard(request):
        dropped += len(chunk)
        if dropped > DROPPED_BYTES:
            return


async def _heard(request: Request) -> AsyncIterator[bytes]:
    """The body as it comes. Raises Refused (400) for a sender that has fallen silent."""
    chunks = request.stream().__aiter__()
    while True:
        try:
            async with asyncio.timeout(SILENCE_S):
                chunk = await anext(chunks)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise Refused(errors.MALFORMED, f"nothing came for {SILENCE_S:g} s", headers={"Connection": "close"}) from None
        yield chunk


@dataclass(frozen=True)
class _Archive:
    path: Path
    size: int
    sha256: str


class _Writer:
    """Writes a body to `archive` in an upload's directory, and vouches for the upload meanwhile."""

    def __init__(self, parts: Parts, upload_id: str) -> None:
        self.parts, self.upload_id = parts, upload_id
        self.path = parts.artifacts.local_dir(upload_dir(upload_id)) / "archive"
        self._digest = hashlib.sha256()
        self._size = self._room_checked_at = 0
        self._vouched_s = time.monotonic()

    async def write(self, request: Request) -> _Archive:
        waiting: list[bytes] = []
        waiting_bytes = 0
        with await run_in_threadpool(self.path.open, "wb") as file:
            async for chunk in _heard(request):
                if time.monotonic() - self._vouched_s > VOUCH_S:
                    await run_in_threadpool(_vouch, self.parts, self.upload_id)
                    self._vouched_s = time.monotonic()
                waiting.append(chunk)
                waiting_bytes += len(chunk)
                if self._size + waiting_bytes > self.parts.settings.max_upload_bytes:
                    await _drop(request)
                    raise _too_large(self.parts)
                if waiting_bytes >= WRITTEN_AT_ONCE:
                    await run_in_threadpool(self._put, file, waiting)
                    waiting, waiting_bytes = [], 0
            await run_in_threadpool(self._put, file, waiting)
        if self._size == 0:
            raise Refused(errors.MALFORMED, "the body is empty: send a zip or tar file of class folders")
        return _Archive(self.path, self._size, self._digest.hexdigest())

    def _put(self, file: Any, chunks: list[bytes]) -> None:
        try:
            for chunk in chunks:
                file.write(chunk)
                self._digest.update(chunk)
                self._size += len(chunk)
            file.flush()
        except OSError as error:
            raise _full(self.parts, error) from error
        if self._size - self._room_checked_at >= ROOM_EVERY_BYTES:
            self._room_checked_at = self._size
            _check_room(self.parts, 0)


def _full(parts: Parts, error: OSError) -> StorageFull:
    log.warning("an upload cannot be written", error=str(error))
    return StorageFull(parts.artifacts.free_bytes() or 0, parts.settings.min_free_bytes)


def _vouch(parts: Parts, upload_id: str) -> None:
    with parts.store.write() as tx:
        uploads.go_on(tx, upload_id)


def _take(parts: Parts, sent: Sent, upload_id: str, archive: _Archive) -> Added:
    """Unpack what has come, and accept it."""
    while not _turns.acquire(timeout=VOUCH_S):
        _vouch(parts, upload_id)
    try:
        found = _unpacked(parts, upload_id, archive)
    finally:
        _turns.release()
    archive.path.unlink()
    _sync(archive.path.parent)
    upload = Upload(
        upload_id, sent.owner, sent.name, found["version"], found["files"], found["bytes"], skip_unreadable=sent.skip_unreadable
    )
    with parts.store.write() as tx:
        added = uploads.accept(tx, upload)
    parts.doorbell.ring()
    log.info("data set uploaded", name=sent.name, version=added.version, archive=archive.sha256, bytes=archive.size, checks=added.checks)
    if added.dataset_id != upload_id:
        _discard(parts, upload_id)
    return added


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unpacked(parts: Parts, upload_id: str, archive: _Archive) -> dict[str, Any]:
    """What the process that unpacks answers. Raises Refused (413, 422), StorageFull."""
    cpu_s = CPU_S + archive.size // CPU_BYTES_PER_S
    settings = parts.settings
    limits = {
        "entries": settings.max_upload_entries,
        "bytes": settings.max_unpacked_bytes,
        "min_free_bytes": settings.min_free_bytes,
        "cpu_s": cpu_s,
    }
    config = {"archive": str(archive.path), "into": str(archive.path.parent), "parent": os.getpid(), "limits": limits}
    # this thread waits for it: the process dies with the thread that started it
    command = [sys.executable, "-P", "-m", "powergrad.archives", json.dumps(config)]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=archive.path.parent, text=True
    ) as process:
        said, complaint = _heard_out(parts, upload_id, process, until_s=time.monotonic() + PATIENCE * cpu_s)
    if process.returncode:
        log.warning("unpacking failed", upload=upload_id, exit_code=process.returncode, stderr=complaint[-2000:])
        rule = f"cannot be unpacked within {cpu_s} s of processor time and the memory that any archive of images needs"
        raise Refused(errors.BAD_ARCHIVE, f"the archive {rule}", entry="", rule=rule)
    answer: dict[str, Any] = json.loads(said)
    if "refusal" in answer:
        raise _refusal(parts, **answer["refusal"])
    found: dict[str, Any] = answer["result"]
    return found


def _heard_out(parts: Parts, upload_id: str, process: subprocess.Popen[str], *, until_s: float) -> tuple[str, str]:
    """What it says on both streams, the upload vouched for meanwhile."""
    try:
        while True:
            left_s = until_s - time.monotonic()
            try:
                return process.communicate(timeout=max(0.0, min(left_s, VOUCH_S)))
            except subprocess.TimeoutExpired:
                if left_s <= 0:
                    process.kill()
                    return process.communicate()
                _vouch(parts, upload_id)
    except BaseException:
        process.kill()
        raise


def _refusal(parts: Parts, kind: str, entry: str, rule: str) -> Exception:
    if kind == "storage_full":
        return StorageFull(parts.artifacts.free_bytes() or 0, parts.settings.min_free_bytes)
    detail = f"{entry}: {rule}" if entry else f"the archive {rule}" if not rule.startswith("found") else rule
    return Refused(errors.TOO_LARGE if kind == "too_large" else errors.BAD_ARCHIVE, detail, entry=entry, rule=rule)


def _discard(parts: Parts, upload_id: str) -> None:
    """Free what there is of an upload now; what cannot be freed now is the sweeper's."""
    path = upload_dir(upload_id)
    try:
        with parts.store.write() as tx:
            uploads.abandon(tx, upload_id)
        parts.artifacts.delete(path)
        with parts.store.write() as tx:
            debts.freed(tx, path)
    except Exception as error:  # noqa: BLE001 - it is owed, so it will be freed
        log.warning("an upload is not freed yet", upload=upload_id, error=str(error), unavailable=is_unavailable(error))
