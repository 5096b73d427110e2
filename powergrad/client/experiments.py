"""An experiment as something to hold: what it was when last seen, and what can be done with it, for either client.

experiment = client.ask({"spec": {"data": {"dataset": "digits"}}, "grid": {"loss.alpha": [1.0, 0.5]}, "seeds": 5})
print(experiment.wait().verdict)
experiment.report("html", "alpha.html")
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from powergrad.client import calls
from powergrad.client.core import Patience
from powergrad.client.download import target_of
from powergrad.client.errors import DownloadCorrupt
from powergrad.client.models import Arm, ExperimentView

if TYPE_CHECKING:
    from powergrad.client.aio import AsyncClient
    from powergrad.client.sync import Client

Format = Literal["html", "md", "json", "svg", "png", "csv"]
FILES: dict[Format, str] = {
    "html": "report.html",
    "md": "report.md",
    "json": "report.json",
    "svg": "plot.svg",
    "png": "plot.png",
    "csv": "runs.csv",
}


class _Seen:
    """What the last answer said."""

    view: ExperimentView
    """All of it."""

    @property
    def id(self) -> str:
        return self.view.id

    @property
    def name(self) -> str:
        return self.view.name or self.view.id

    @property
    def state(self) -> str:
        return self.view.state

    @property
    def is_settled(self) -> bool:
        return self.view.is_settled

    @property
    def verdict(self) -> str | None:
        """One sentence; None until runs have ended and a worker has looked at them."""
        return self.view.verdict

    @property
    def warnings(self) -> list[str]:
        """What to know before the verdict is believed."""
        return self.view.warnings

    @property
    def arms(self) -> list[Arm]:
        return self.view.arms

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.state}: {self.verdict or 'no verdict yet'}>"

    def _repr_html_(self) -> str:
        return self.view._repr_html_()


class Experiment(_Seen):
    """Of `Client`; its methods raise what the client's do."""

    def __init__(self, client: Client, view: ExperimentView) -> None:
        self._client = client
        self.view = view

    def refresh(self) -> Self:
        """The same object, with what is known now."""
        return self._take(calls.experiment(self.id))

    def changes(self, *, timeout_s: float | None = None) -> Iterator[Self]:
        """Itself now, then at each change, the settled state last. Raises TimeoutError."""
        patience = Patience(timeout_s)
        seen = self._client.send(calls.look_at_experiment(self.id, etag=None, wait_s=0))
        while True:
            if seen.view is not None:
                self.view = seen.view
                yield self
                if self.is_settled:
                    return
            seen = self._client.send(calls.look_at_experiment(self.id, etag=seen.etag, wait_s=patience.next_wait_s(self.id)))

    def wait(self, timeout_s: float | None = None) -> Self:
        """Itself when all runs have ended and the verdict is in, in whatever terminal state. Raises TimeoutError."""
        for _ in self.changes(timeout_s=timeout_s):
            pass
        return self

    def report(self, kind: Format = "html", path: str | os.PathLike[str] | None = None) -> Path:
        """Fetch the report or a figure to `path` (a file, or a folder; default the current one), its sha256 verified.

        Raises ApiError (409) before the first analysis, DownloadCorrupt.
        """
        return _put(path, f"{self.id}-{FILES[kind]}", self._client.send(calls.experiment_file(self.id, FILES[kind])))

    def add_seeds(self, count: int, *, idempotency_key: str | None = None) -> Self:
        """Further runs of every arm; it runs again if it had ended. A key is made where none is given: a repeated request adds once."""
        return self._take(calls.add_seeds(self.id, count, idempotency_key))

    def cancel(self) -> Self:
        return self._take(calls.act_on_experiment(self.id, "cancel"))

    def pause(self) -> Self:
        return self._take(calls.act_on_experiment(self.id, "pause"))

    def resume(self) -> Self:
        return self._take(calls.act_on_experiment(self.id, "resume"))

    def update(self, fields: Mapping[str, Any]) -> Self:
        """Change name or notes."""
        return self._take(calls.update_experiment(self.id, fields))

    def clone(self, changes: Mapping[str, Any] | None = None, *, name: str | None = None, idempotency_key: str | None = None) -> Experiment:
        """A new experiment: the same question with `changes` by dotted name, {"spec.epochs": 3, "grid.loss.alpha": [1.0, 0.3]}."""
        return Experiment(self._client, self._client.send(calls.clone_experiment(self.id, changes, name, idempotency_key)))

    def delete(self) -> None:
        """Only when it has ended: its jobs and their files go too."""
        self._client.send(calls.delete_experiment(self.id))

    def _take(self, call: calls.Call[ExperimentView]) -> Self:
        self.view = self._client.send(call)
        return self


class AsyncExperiment(_Seen):
    """Of `AsyncClient`: the same methods as `Experiment`, awaited."""

    def __init__(self, client: AsyncClient, view: ExperimentView) -> None:
        self._client = client
        self.view = view

    async def refresh(self) -> Self:
        """The same object, with what is known now."""
        return await self._take(calls.experiment(self.id))

    async def changes(self, *, timeout_s: float | None = None) -> AsyncIterator[Self]:
        """Itself now, then at each change, the settled state last. Raises TimeoutError."""
        patience = Patience(timeout_s)
        seen = await self._client.send(calls.look_at_experiment(self.id, etag=None, wait_s=0))
        while True:
            if seen.view is not None:
                self.view = seen.view
                yield self
                if self.is_settled:
                    return
            seen = await self._client.send(calls.look_at_experiment(self.id, etag=seen.etag, wait_s=patience.next_wait_s(self.id)))

    async def wait(self, timeout_s: float | None = None) -> Self:
        """Itself when all runs have ended and the verdict is in, in whatever terminal state. Raises TimeoutError."""
        async for _ in self.changes(timeout_s=timeout_s):
            pass
        return self

    async def report(self, kind: Format = "html", path: str | os.PathLike[str] | None = None) -> Path:
        """Fetch the report or a figure to `path` (a file, or a folder; default the current one), its sha256 verified.

        Raises ApiError (409) before the first analysis, DownloadCorrupt.
        """
        return _put(path, f"{self.id}-{FILES[kind]}", await self._client.send(calls.experiment_file(self.id, FILES[kind])))

    async def add_seeds(self, count: int, *, idempotency_key: str | None = None) -> Self:
        """Further runs of every arm; it runs again if it had ended. A key is made where none is given: a repeated request adds once."""
        return await self._take(calls.add_seeds(self.id, count, idempotency_key))

    async def cancel(self) -> Self:
        return await self._take(calls.act_on_experiment(self.id, "cancel"))

    async def pause(self) -> Self:
        return await self._take(calls.act_on_experiment(self.id, "pause"))

    async def resume(self) -> Self:
        return await self._take(calls.act_on_experiment(self.id, "resume"))

    async def update(self, fields: Mapping[str, Any]) -> Self:
        """Change name or notes."""
        return await self._take(calls.update_experiment(self.id, fields))

    async def clone(
        self, changes: Mapping[str, Any] | None = None, *, name: str | None = None, idempotency_key: str | None = None
    ) -> AsyncExperiment:
        """A new experiment: the same question with `changes` by dotted name, {"spec.epochs": 3, "grid.loss.alpha": [1.0, 0.3]}."""
        return AsyncExperiment(self._client, await self._client.send(calls.clone_experiment(self.id, changes, name, idempotency_key)))

    async def delete(self) -> None:
        """Only when it has ended: its jobs and their files go too."""
        await self._client.send(calls.delete_experiment(self.id))

    async def _take(self, call: calls.Call[ExperimentView]) -> Self:
        self.view = await self._client.send(call)
        return self


def _put(path: str | os.PathLike[str] | None, name: str, found: calls.Published) -> Path:
    """Write a file that came whole; it appears under its name only when it is. Raises DownloadCorrupt."""
    target = target_of(path, name)
    if found.sha256 is not None and (sha256 := hashlib.sha256(found.content).hexdigest()) != found.sha256:
        raise DownloadCorrupt(f"{target}: sha256 is {sha256}, published was {found.sha256}; nothing was kept, so try again")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    part.write_bytes(found.content)
    part.replace(target)
    return target
