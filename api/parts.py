"""What the routes work with: one object per application, made by `create_app`."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Path
from starlette.requests import Request

from api.access import KeyRing
from api.catalogue import Catalogue
from api.deliverer import Deliverer
from api.doorbell import Doorbell
from api.measures import Measures
from api.settings import ApiSettings, is_loopback
from api.submissions import Submissions
from api.tailer import Tailer
from powergrad.jobs.artifacts import Artifacts
from powergrad.jobs.errors import JobNotFound, StorageFull
from powergrad.jobs.store import Store
from powergrad.jobs.sweeper import Sweeper

JOB_ID = re.compile(r"job_[0-9A-HJKMNP-TV-Z]{26}")
FREE_SPACE_KEPT_S = 1.0


@dataclass
class Room:
    """Whether there is space for another job; asked of the file system once a second."""

    artifacts: Artifacts
    needed_bytes: int
    _free_bytes: int | None = None
    _until: float = 0.0

    def check(self) -> None:
        """Raises StorageFull."""
        if time.monotonic() >= self._until:
            self._free_bytes = self.artifacts.free_bytes()
            self._until = time.monotonic() + FREE_SPACE_KEPT_S
        if self._free_bytes is not None and self._free_bytes < self.needed_bytes:
            raise StorageFull(self._free_bytes, self.needed_bytes)


@dataclass
class Parts:
    settings: ApiSettings
    store: Store
    artifacts: Artifacts
    room: Room
    catalogue: Catalogue
    doorbell: Doorbell
    submissions: Submissions
    sweeper: Sweeper
    deliverer: Deliverer
    measures: Measures
    key_ring: KeyRing
    tailer: Tailer | None = None
    """Made when the application starts, in its event loop."""

    @classmethod
    def of(cls, settings: ApiSettings) -> Parts:
        store = Store(settings.database_url, pool_size=16, job_ttl_s=settings.job_ttl_s)
        artifacts = Artifacts(str(settings.data_dir))
        measures = Measures()
        doorbell = Doorbell(settings.redis_url, measures)
        return cls(
            settings=settings,
            store=store,
            artifacts=artifacts,
            room=Room(artifacts, settings.min_free_bytes),
            catalogue=Catalogue(store),
            doorbell=doorbell,
            submissions=Submissions(store, doorbell.ring),
            sweeper=Sweeper(store, artifacts, doorbell.ring, interval_s=settings.sweep_s),
            deliverer=Deliverer(store, settings.allow_list),
            measures=measures,
            key_ring=KeyRing(store, is_reachable=not is_loopback(settings.host)),
        )

    def start(self) -> None:
        """Start what runs beside the requests. In the event loop."""
        self.tailer = Tailer(self.store)
        self.doorbell.start()
        self.submissions.start()
        self.sweeper.start()
        self.deliverer.start()

    async def stop_streams(self) -> None:
        """End every stream and wait, so that the server can end."""
        if self.tailer is not None:
            await self.tailer.stop()

    def stop(self) -> None:
        # submissions first: what they commit still wants to ring
        self.submissions.stop()
        self.sweeper.stop()
        self.deliverer.stop()
        self.doorbell.stop()
        self.store.close()


async def _parts(request: Request) -> Parts:  # async: a plain function would be sent to the thread pool
    parts: Parts = request.app.state.parts
    return parts


async def _job_id(job_id: Annotated[str, Path(description="Id of the job.", examples=["job_01KAQZ5V3N8T4W6Y7C9E1G2H3J"])]) -> str:
    if not JOB_ID.fullmatch(job_id):
        raise JobNotFound(job_id[:64])
    return job_id


WithParts = Annotated[Parts, Depends(_parts)]
JobId = Annotated[str, Depends(_job_id)]
