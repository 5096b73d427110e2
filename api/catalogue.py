"""What a spec may name, as the workers published it, kept for a few seconds so that a submission does not ask the database."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from starlette.concurrency import run_in_threadpool

from powergrad.jobs import datasets, fleet
from powergrad.jobs.store import Store
from powergrad.spec import BUILT_IN_DATASETS

KEPT_S = 5.0  # the catalogue changes when a worker of another release starts


@dataclass(frozen=True)
class Names:
    """Known names; empty before the first worker has started, and then any well-formed name passes."""

    models: tuple[str, ...]
    datasets: tuple[str, ...]
    outputs: tuple[str, ...] | None = None
    """What the workers can write for other tools; None before the first has started."""


class Catalogue:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._names = Names((), ())
        self._until = 0.0

    async def names(self) -> Names:
        if time.monotonic() >= self._until:
            self._names = await run_in_threadpool(self._read)
            self._until = time.monotonic() + (KEPT_S if self._names.models and self._names.datasets else 0.5)
        return self._names

    async def names_for(self, body: Any, owner: str) -> Names:
        """The same with the owner's own data sets, where the body of a spec names a set that is not built in."""
        data = body.get("data") if isinstance(body, dict) else None
        wanted = data.get("dataset") if isinstance(data, dict) else None
        found = await self.names()
        if not isinstance(wanted, str) or wanted in BUILT_IN_DATASETS or not found.datasets:
            return found
        own = await run_in_threadpool(self._own, owner)
        return replace(found, datasets=(*found.datasets, *own))

    def _own(self, owner: str) -> list[str]:
        with self._store.read() as tx:
            return datasets.names(tx, owner)

    def _read(self) -> Names:
        with self._store.read() as tx:
            models, datasets, outputs = (_names(fleet.published(tx, kind)) for kind in ("models", "datasets", "outputs"))
        return Names(models, datasets, outputs if models else None)


def _names(entries: list[dict[str, Any]]) -> tuple[str, ...]:
    return tuple(str(entry["name"]) for entry in entries)
