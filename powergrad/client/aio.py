"""The client for asyncio (or any event loop httpx2 runs on): the same methods as `Client`, awaited."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import httpx2

from powergrad.client import calls
from powergrad.client.calls import Artifacts, Call, Checkpoints, Json, Rows, Spec
from powergrad.client.core import (
    CUT,
    DATASET_LOOK_S,
    QUIET_STREAM_S,
    TASK_LOOK_S,
    LogPlace,
    Patience,
    Place,
    chosen,
    core,
    named,
    predicted,
)
from powergrad.client.download import PartialFile, target_of
from powergrad.client.experiments import AsyncExperiment
from powergrad.client.models import (
    Artifact,
    Checkpoint,
    Dataset,
    Deletion,
    Delivery,
    Event,
    EventPage,
    ExperimentPage,
    Health,
    Job,
    JobPage,
    Prediction,
    Task,
    WebhookSecret,
)
from powergrad.client.retries import Retries
from powergrad.client.series import MetricsTable, table_of
from powergrad.client.upload import name_of, source_of

T = TypeVar("T")


class AsyncClient:
    """PowerGrad over HTTP. Raises ApiError where the server refuses, Unreachable where it does not answer.

    base_url: of the server; default $POWERGRAD_URL, else http://127.0.0.1:8642.  api_key: default $POWERGRAD_API_KEY; a server without keys
    asks for none.  timeout_s: of one answer.  retries: how often a call that may safely be repeated is, on connection errors, 429 and 503.
    """

    def __init__(
        self, base_url: str | None = None, *, api_key: str | None = None, timeout_s: float = 30.0, retries: int | Retries = 5
    ) -> None:
        self._core = core(base_url, timeout_s, retries, api_key)
        self._http = httpx2.AsyncClient(**self._core.settings())

    @property
    def base_url(self) -> str:
        return self._core.base_url

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    # --- jobs

    async def submit(self, spec: Spec, *, idempotency_key: str | None = None) -> Job:
        """The queued job. A key is made where none is given, so that a repeated request never makes a second job."""
        return await self.send(calls.submit(spec, idempotency_key=idempotency_key))

    async def dry_run(self, spec: Spec) -> Json:
        """The spec as the server would store it, every default filled in; nothing is stored."""
        return await self.send(calls.dry_run(spec))

    async def get(self, job_id: str) -> Job:
        return await self.send(calls.get(job_id))

    async def page(self, *, limit: int = 20, after: str | None = None, **filters: Any) -> JobPage:
        """One page of jobs, newest first; filters as in `list`."""
        return await self.send(calls.page(limit=limit, after=after, **filters))

    async def list(
        self,
        *,
        state: Iterable[str] = (),
        labels: Mapping[str, str] | None = None,
        experiment: str | None = None,
        created_after: datetime | str | None = None,
        created_before: datetime | str | None = None,
        q: str | None = None,
        sort: str | None = None,
        page_size: int = 100,
    ) -> AsyncIterator[Job]:
        """Every job that fits, newest first or by `sort` ("-metrics.val_top1"), fetched page by page as they are asked for."""
        filters = {
            "state": list(state),
            "labels": labels,
            "experiment": experiment,
            "created_after": created_after,
            "created_before": created_before,
            "q": q,
            "sort": sort,
        }
        after: str | None = None
        while True:
            found = await self.page(limit=page_size, after=after, **filters)
            for job in found.data:
                yield job
            if not (found.has_more and found.data):
                return
            after = found.data[-1].id

    async def changes(self, job_id: str, *, timeout_s: float | None = None) -> AsyncIterator[Job]:
        """The job now, then at each change of state or progress, the terminal one last. Raises TimeoutError."""
        patience = Patience(timeout_s)
        seen = await self.send(calls.look(job_id))
        while True:
            if seen.job is not None:
                yield seen.job
                if seen.job.is_terminal:
                    return
            seen = await self.send(calls.look_again(job_id, etag=seen.etag, wait_s=patience.next_wait_s(job_id)))

    async def wait(self, job_id: str, timeout_s: float | None = None) -> Job:
        """The job when it has ended, in whatever terminal state. Raises TimeoutError."""
        async for job in self.changes(job_id, timeout_s=timeout_s):
            if job.is_terminal:
                return job
        raise AssertionError("changes() ends with a terminal job")

    async def cancel(self, job_id: str) -> Job:
        return await self.send(calls.act(job_id, "cancel"))

    async def pause(self, job_id: str) -> Job:
        return await self.send(calls.act(job_id, "pause"))

    async def resume(self, job_id: str) -> Job:
        return await self.send(calls.act(job_id, "resume"))

    async def retry(self, job_id: str, *, limits: Mapping[str, Any] | None = None) -> Job:
        """Let a failed job go on from its last checkpoint, with these limits raised."""
        return await self.send(calls.retry(job_id, limits))

    async def clone(
        self,
        job_id: str,
        *,
        changes: Mapping[str, Any] | None = None,
        from_checkpoint: str | None = None,
        idempotency_key: str | None = None,
    ) -> Job:
        """A new job: the same spec with `changes` by dotted name, {"loss.alpha": 0.3}.

        from_checkpoint: best, latest or an id of a checkpoint of the job whose weights the new one begins with.  A key is made where none
        is given, so that a repeated request never makes a second job.
        """
        return await self.send(calls.clone(job_id, changes, from_checkpoint, idempotency_key))

    async def update(self, job_id: str, fields: Mapping[str, Any], *, if_match: str | None = None) -> Job:
        """Change name, labels, notes, priority or retention; with `if_match`, only while the job's version is still that one."""
        return await self.send(calls.update(job_id, fields, if_match))

    async def delete(self, job_id: str) -> None:
        await self.send(calls.delete(job_id))

    async def delete_many(self, *, limit: int = 1000, dry_run: bool = False, **filters: Any) -> Deletion:
        """Delete the newest `limit` (at most 1000) jobs that fit and have ended; at least one filter, as in `list`. dry_run: only say which."""
        return await self.send(calls.delete_many(limit=limit, dry_run=dry_run, **filters))

    # --- what a job leaves

    async def events(self, job_id: str, after: int = 0, *, limit: int | None = None) -> EventPage:
        return await self.send(calls.events(job_id, after, limit))

    async def stream(self, job_id: str, after: int = 0) -> AsyncIterator[Event]:
        """Every event after number `after`, live, until the job has ended: no gap and no repeat, however often the connection breaks."""
        place, call, tries = Place(after), calls.stream(job_id, after), 0
        while True:
            outcome: httpx2.TransportError = CUT
            try:
                async with self._open(call, read_s=QUIET_STREAM_S) as response:
                    async for frame in httpx2.EventSource(response):
                        if (event := place.take(frame)) is not None:
                            tries = 0
                            yield event
                        if place.ended:
                            return
            except httpx2.TransportError as error:
                outcome = error
            tries += 1
            await self._pause(call, outcome, tries)
            call = calls.stream(job_id, place.seq)

    async def metrics(self, job_id: str, *, names: Iterable[str] = (), points: int | None = None, after: int | None = None) -> Json:
        """Series by name, thinned to `points` keeping extremes."""
        return await self.send(calls.metrics(job_id, names, points, after))

    async def act_on_many(self, action: Literal["cancel", "pause", "resume", "delete"], job_ids: Iterable[str]) -> Json:
        """The same for up to 500 jobs, each by itself: `done` names those that moved, `refused` says of the others why not."""
        return await self.send(calls.act_on_many(job_ids, action))

    async def compare(
        self,
        job_ids: Iterable[str] = (),
        *,
        name: str = "val_top1",
        points: int = 300,
        x: Literal["step", "epoch", "seconds"] = "step",
        **filters: Any,
    ) -> Json:
        """One metric of up to 500 jobs, thinned out with its extremes kept: those of `job_ids`, or the newest that fit filters as in `list`."""
        return await self.send(calls.compare(job_ids, name=name, points=points, x=x, **filters))

    async def metrics_table(self, job_id: str, *, names: Iterable[str] = (), points: int | None = None) -> MetricsTable:
        """The same as columns over `step`, ready for a data frame; None where a metric was not measured at a step."""
        wanted = list(names)
        return table_of(await self.metrics(job_id, names=wanted, points=points), wanted)

    async def metrics_csv(self, job_id: str, *, names: Iterable[str] = (), points: int | None = None) -> str:
        return await self.send(calls.metrics_csv(job_id, names, points))

    async def logs(self, job_id: str, *, tail: int | None = None) -> str:
        return await self.send(calls.logs(job_id, tail))

    async def follow_logs(self, job_id: str, *, tail: int | None = None) -> AsyncIterator[str]:
        """Log text as it comes, until the job has ended: no gap and no repeat, however often the connection breaks."""
        place, tries = LogPlace(job_id, tail), 0
        while True:
            call, began = place.call(), False
            outcome: httpx2.TransportError = CUT
            try:
                async with self._open(call, read_s=QUIET_STREAM_S) as response:
                    place.begin(response)
                    began = True
                    async for block in response.aiter_bytes():
                        tries = 0
                        yield place.take(block)
                if place.is_complete:
                    yield place.rest()
                    return
            except httpx2.TransportError as error:
                outcome = error
                if began and isinstance(error, httpx2.ReadTimeout):
                    tries = 0  # a log has no pings: it was quiet, or the server is gone, which the next try finds out
            tries += 1
            await self._pause(call, outcome, tries)

    async def checkpoints(self, job_id: str) -> Checkpoints:
        return await self.send(calls.checkpoints(job_id))

    async def pin(self, job_id: str, checkpoint: str = "best", *, pinned: bool = True) -> Checkpoint:
        """Keep a checkpoint (best, latest or an id) whatever retention says; with `pinned=False` leave it to retention again."""
        return await self.send(calls.pin(job_id, checkpoint, pinned=pinned))

    async def download(
        self,
        job_id: str,
        checkpoint: str = "best",
        path: str | os.PathLike[str] | None = None,
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Path:
        """Fetch a checkpoint's model.safetensors to `path` (a file, or a folder; default the current one), its sha256 verified.

        A broken download is gone on with, in this call or a later one. on_progress: called with (bytes here, bytes in all). Raises
        DownloadCorrupt.
        """
        found = chosen(await self.checkpoints(job_id), checkpoint, job_id)
        target = target_of(path, f"{job_id}-{found.id}.safetensors")
        return await self._fetch(target, found, lambda start: calls.weights(job_id, found.id, start), on_progress)

    async def artifacts(self, job_id: str) -> Artifacts:
        """The files that a job wrote beside its checkpoints."""
        return await self.send(calls.artifacts(job_id))

    async def download_artifact(
        self,
        job_id: str,
        name: str,
        path: str | os.PathLike[str] | None = None,
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Path:
        """Fetch an artifact to `path` (a file, or a folder; default NAME in the current one), verified and gone on with as a checkpoint is."""
        found = named(await self.artifacts(job_id), name, job_id)
        return await self._fetch(target_of(path, found.name), found, lambda start: calls.artifact(job_id, name, start), on_progress)

    async def _fetch(
        self,
        target: Path,
        published: Checkpoint | Artifact,
        call_from: Callable[[int], Call[None]],
        on_progress: Callable[[int, int], None] | None,
    ) -> Path:
        tries = 0
        with PartialFile(target, published) as part:
            while not part.is_complete:
                before, call = part.done, call_from(part.done)
                outcome: httpx2.TransportError = CUT
                try:
                    async with self._open(call) as response:
                        part.accept(response)
                        async for chunk in response.aiter_bytes():
                            part.write(chunk)
                            if on_progress is not None:
                                on_progress(part.done, part.size)
                except httpx2.TransportError as error:
                    outcome = error
                if not part.is_complete:
                    tries = 1 if part.done > before else tries + 1
                    await self._pause(call, outcome, tries)
            return part.publish()

    async def predict(
        self, job_id: str, image: bytes | str | os.PathLike[str], top: int = 5, *, checkpoint: str = "best", timeout_s: float | None = 300.0
    ) -> Prediction:
        """The `top` likeliest classes of an image: its bytes (JPEG, PNG or WebP), or a path to it. Raises ApiError, OSError, TimeoutError."""
        data = image if isinstance(image, bytes) else await asyncio.to_thread(Path(image).read_bytes)
        patience = Patience(timeout_s)
        call = calls.predict(job_id, data, media_type=calls.media_type_of(data), checkpoint=checkpoint, top=top)
        answer = await self.send(call)
        while isinstance(answer, Task):
            if (found := predicted(answer)) is not None:
                return found
            await asyncio.sleep(min(TASK_LOOK_S, patience.next_wait_s(answer.id)))
            answer = await self.send(calls.task(answer.id))
        return answer

    # --- experiments

    async def ask(self, question: Spec, *, idempotency_key: str | None = None) -> AsyncExperiment:
        """The experiment, its first runs queued. A key is made where none is given, so that a repeated request never asks twice."""
        return AsyncExperiment(self, await self.send(calls.ask(question, idempotency_key=idempotency_key)))

    async def plan(self, question: Spec) -> Json:
        """The question with every default, its arms, seeds and number of runs; nothing is stored."""
        return await self.send(calls.plan(question))

    async def experiment(self, experiment_id: str) -> AsyncExperiment:
        return AsyncExperiment(self, await self.send(calls.experiment(experiment_id)))

    async def experiment_page(self, *, limit: int = 20, after: str | None = None, state: Iterable[str] = ()) -> ExperimentPage:
        """One page of experiments, newest first."""
        return await self.send(calls.experiments(limit=limit, after=after, state=state))

    async def experiments(self, *, state: Iterable[str] = (), page_size: int = 100) -> AsyncIterator[AsyncExperiment]:
        """Every experiment, newest first, fetched page by page as they are asked for."""
        wanted = list(state)
        after: str | None = None
        while True:
            found = await self.send(calls.experiments(limit=page_size, after=after, state=wanted))
            for view in found.data:
                yield AsyncExperiment(self, view)
            if not (found.has_more and found.data):
                return
            after = found.data[-1].id

    # --- webhooks

    async def webhook_secret(self) -> WebhookSecret:
        """The secret that signs the caller's webhooks, made at the first call."""
        return await self.send(calls.webhook_secret())

    async def rotate_webhook_secret(self) -> WebhookSecret:
        """A new secret; the old one signs beside it for 24 hours."""
        return await self.send(calls.rotate_webhook_secret())

    async def deliveries(self, *, job: str | None = None, state: str | None = None, page_size: int = 100) -> AsyncIterator[Delivery]:
        """What was sent in the last 30 days, newest first, fetched page by page as it is asked for. state: pending, delivered, failed."""
        after: str | None = None
        while True:
            found = await self.send(calls.deliveries(job=job, state=state, limit=page_size, after=after))
            for one in found.data:
                yield one
            if not (found.has_more and found.data):
                return
            after = found.data[-1].id

    async def delivery(self, delivery_id: str) -> Delivery:
        return await self.send(calls.delivery(delivery_id))

    async def retry_delivery(self, delivery_id: str) -> Delivery:
        """The delivery, due now."""
        return await self.send(calls.retry_delivery(delivery_id))

    async def test_webhook(self, url: str) -> Delivery:
        """Owe `url` an event webhook.test: delivered as those of jobs are. Raises ApiError (422) for one that may not be called."""
        return await self.send(calls.test_webhook(url))

    # --- data sets

    async def datasets(self) -> Rows:
        """The built-in sets, then one's own by name."""
        return await self.send(calls.datasets())

    async def dataset(self, name: str, *, version: str | None = None) -> Dataset:
        """The newest version of a set, or the one that is named, with the report of its check."""
        return await self.send(calls.dataset(name, version))

    async def dataset_samples(self, name: str, *, split: str = "train", version: str | None = None) -> Json:
        """Which images of each class there is a picture of, and the path of the picture, `image`."""
        return await self.send(calls.dataset_samples(name, split, version))

    async def upload_dataset(
        self,
        path: str | os.PathLike[str],
        name: str | None = None,
        *,
        skip_unreadable: bool = False,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Dataset:
        """Send an archive of class folders, or a folder, which is packed on the way; the set as it is then: being checked, or known already.

        name: by default that of the file or folder.  skip_unreadable: leave images that cannot be decoded out instead of failing.
        on_progress: called with (bytes sent, bytes in all).  Raises ApiError, ClientError, OSError.
        """
        source = source_of(Path(path), on_progress)
        return await self.send(calls.upload_dataset(source, name or name_of(Path(path)), skip_unreadable=skip_unreadable))

    async def register_dataset(self, path: str, name: str) -> Dataset:
        """Make a folder below the server's data root a data set, where it lies."""
        return await self.send(calls.register_dataset(path, name))

    async def wait_dataset(self, name: str, timeout_s: float | None = None, *, version: str | None = None) -> Dataset:
        """The set when it has been checked, ready or failed. Raises TimeoutError."""
        patience = Patience(timeout_s)
        while True:
            found = await self.dataset(name, version=version)
            if found.is_checked:
                return found
            await asyncio.sleep(min(DATASET_LOOK_S, patience.next_wait_s(name)))

    async def delete_dataset(self, name: str, *, version: str | None = None) -> None:
        """Delete a set, or one version. A registered folder stays where it is."""
        await self.send(calls.delete_dataset(name, version))

    # --- the server

    async def workers(self) -> Rows:
        return await self.send(calls.rows("/v1/workers"))

    async def models(self) -> Rows:
        return await self.send(calls.rows("/v1/models"))

    async def presets(self) -> Rows:
        return await self.send(calls.rows("/v1/presets"))

    async def preset(self, name: str) -> Json:
        """One of the paper's experiments: name, title, `spec` (to submit) and the paper's figures."""
        return await self.send(calls.preset(name))

    async def schema(self) -> Json:
        """The JSON Schema of a job spec."""
        return await self.send(calls.document("/v1/schemas/job"))

    async def health(self) -> Health:
        """Whether everything that a job needs is there, and what is missing."""
        return await self.send(calls.health())

    # --- the wire

    async def send(self, call: Call[T]) -> T:
        """Make a call, again where that may help, and read its answer."""
        for tries in itertools.count(1):
            outcome = await self._try(call)
            wait_s = self._core.wait_s(call, outcome, tries)
            if wait_s is None:
                return self._core.settle(call, outcome, tries)
            await asyncio.sleep(wait_s)
        raise AssertionError("unreachable")

    async def _try(self, call: Call[Any]) -> httpx2.Response | httpx2.TransportError:
        try:
            return await self._http.send(self._http.build_request(**_awaited(self._core.arguments(call), call)))
        except httpx2.TransportError as error:
            return error

    @asynccontextmanager
    async def _open(self, call: Call[Any], *, read_s: float | Literal["usual"] | None = "usual") -> AsyncIterator[httpx2.Response]:
        """An answer whose body is still to come; refusals that may pass are tried again here, broken connections by the caller."""
        for tries in itertools.count(1):
            request = self._http.build_request(**self._core.arguments(call))
            if read_s != "usual":
                request.extensions["timeout"]["read"] = read_s
            response = await self._http.send(request, stream=True)
            try:
                wait_s = self._core.wait_s(call, response, tries)
                if wait_s is None:
                    if not response.is_success:
                        await response.aread()
                    yield self._core.response(call, response, tries)
                    return
            finally:
                await response.aclose()
            await asyncio.sleep(wait_s)

    async def _pause(self, call: Call[Any], outcome: httpx2.TransportError, tries: int) -> None:
        wait_s = self._core.wait_s(call, outcome, tries)
        if wait_s is None:
            raise self._core.unreachable(outcome) from outcome
        await asyncio.sleep(wait_s)


def _awaited(arguments: dict[str, Any], call: Call[Any]) -> dict[str, Any]:
    """A body that is read from the disk is read in a thread."""
    return arguments if call.stream is None else {**arguments, "content": _read_elsewhere(arguments["content"])}


async def _read_elsewhere(blocks: Iterator[bytes]) -> AsyncIterator[bytes]:
    while (block := await asyncio.to_thread(next, blocks, None)) is not None:
        yield block
