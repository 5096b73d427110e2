"""Every request the API knows, as data: what to send, and how to read the answer. Both clients send these; nothing here does I/O."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generic, Literal, TypeVar, cast
from urllib.parse import quote

import httpx2
from pydantic import BaseModel

from powergrad.client.models import (
    Artifact,
    Checkpoint,
    Dataset,
    Deletion,
    Delivery,
    DeliveryPage,
    EventPage,
    ExperimentPage,
    ExperimentView,
    Health,
    Job,
    JobPage,
    Prediction,
    Task,
    WebhookSecret,
)
from powergrad.client.upload import Source

T = TypeVar("T")
Json = dict[str, Any]
Rows = list[Json]
Checkpoints = list[Checkpoint]
Artifacts = list[Artifact]
Spec = Mapping[str, Any] | BaseModel
Params = dict[str, str | int | bool | list[str]]

EXPERIMENTS = "/v1/experiments"
LONGEST_POLL_S = 30.0
LONGEST_UNPACKING_S = 3600.0


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request and the reader of its answer."""

    method: str
    path: str
    read: Callable[[httpx2.Response], T]
    params: Params = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    json: Any = None
    content: bytes | None = None
    stream: Callable[[], Iterator[bytes]] | None = None
    """A body too large for memory, from its beginning for each try."""
    repeatable: bool = True
    """Doing it twice is the same as doing it once."""
    extra_wait_s: float = 0.0
    """How much longer than usual the server may take to answer."""
    fine: frozenset[int] = frozenset()
    """Statuses of 400 and more that `read` wants to see, and that are not tried again."""
    done_before: frozenset[int] = frozenset()
    """Statuses that, on a repetition, mean that the first try got through."""


@dataclass(frozen=True)
class Seen:
    """A job as one answer showed it, with the tag to ask for the next change; `job` is None where nothing changed."""

    job: Job | None
    etag: str | None


def submit(spec: Spec, *, idempotency_key: str | None) -> Call[Job]:
    key = idempotency_key or uuid.uuid4().hex
    return Call("POST", "/v1/jobs", _job, json=plain(spec), headers={"Idempotency-Key": key})


def dry_run(spec: Spec) -> Call[Json]:
    return Call("POST", "/v1/jobs", _json, json=plain(spec), params={"dry_run": True})


def get(job_id: str) -> Call[Job]:
    return Call("GET", _job_path(job_id), _job)


def look(job_id: str) -> Call[Seen]:
    return Call("GET", _job_path(job_id), _seen)


def look_again(job_id: str, *, etag: str | None, wait_s: float) -> Call[Seen]:
    """The job when it differs from `etag`, or nothing after `wait_s` (whole seconds, at least one)."""
    headers = {} if etag is None else {"If-None-Match": etag}
    return Call("GET", _job_path(job_id), _seen, params={"wait": max(1, round(wait_s))}, headers=headers, extra_wait_s=wait_s)


def page(
    *,
    limit: int,
    after: str | None = None,
    state: Iterable[str] = (),
    labels: Mapping[str, str] | None = None,
    experiment: str | None = None,
    created_after: datetime | str | None = None,
    created_before: datetime | str | None = None,
    q: str | None = None,
    sort: str | None = None,
) -> Call[JobPage]:
    params: Params = {"limit": limit} | _filters(state, labels, experiment, created_after, created_before, q)
    params |= {name: value for name, value in {"after": after, "sort": sort}.items() if value is not None}
    return Call("GET", "/v1/jobs", lambda response: JobPage.model_validate_json(response.content), params=params)


def _filters(
    state: Iterable[str],
    labels: Mapping[str, str] | None,
    experiment: str | None,
    created_after: datetime | str | None,
    created_before: datetime | str | None,
    q: str | None,
) -> Params:
    named = {"experiment": experiment, "created_after": _time(created_after), "created_before": _time(created_before), "q": q}
    params: Params = {name: value for name, value in named.items() if value is not None}
    params |= {f"label.{key}": value for key, value in (labels or {}).items()}
    if states := [str(one) for one in state]:
        params["state"] = states
    return params


def act(job_id: str, action: Literal["cancel", "pause", "resume"]) -> Call[Job]:
    return Call("POST", f"{_job_path(job_id)}/{action}", _job)


def act_on_many(job_ids: Iterable[str], action: Literal["cancel", "pause", "resume", "delete"]) -> Call[Json]:
    return Call("POST", f"/v1/jobs/{action}", _json, json={"ids": list(job_ids)})


def retry(job_id: str, limits: Mapping[str, Any] | None) -> Call[Job]:
    """A second retry of a job that already goes on is refused (409), so it is not repeated blindly."""
    return Call("POST", f"{_job_path(job_id)}/retry", _job, json={"limits": dict(limits)} if limits else None, repeatable=False)


def clone(job_id: str, changes: Mapping[str, Any] | None, from_checkpoint: str | None, idempotency_key: str | None) -> Call[Job]:
    body: Json = {"set": dict(changes or {})}
    if from_checkpoint is not None:
        body["from_checkpoint"] = from_checkpoint
    headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
    return Call("POST", f"{_job_path(job_id)}/clone", _job, json=body, headers=headers)


def update(job_id: str, fields: Mapping[str, Any], if_match: str | None) -> Call[Job]:
    headers = {"If-Match": if_match} if if_match is not None else {}
    return Call("PATCH", _job_path(job_id), _job, json=dict(fields), headers=headers, repeatable=if_match is None)


def delete(job_id: str) -> Call[None]:
    return Call("DELETE", _job_path(job_id), lambda _: None, done_before=frozenset({404}))


def delete_many(
    *,
    state: Iterable[str] = (),
    labels: Mapping[str, str] | None = None,
    experiment: str | None = None,
    created_after: datetime | str | None = None,
    created_before: datetime | str | None = None,
    q: str | None = None,
    limit: int,
    dry_run: bool,
) -> Call[Deletion]:
    """Not repeated blindly: a second call would take the next jobs."""
    params: Params = {"limit": limit, "dry_run": dry_run} | _filters(state, labels, experiment, created_after, created_before, q)
    return Call("DELETE", "/v1/jobs", lambda response: Deletion.model_validate_json(response.content), params=params, repeatable=dry_run)


def events(job_id: str, after: int, limit: int | None) -> Call[EventPage]:
    params: Params = {"after": after}
    if limit is not None:
        params["limit"] = limit
    return Call("GET", f"{_job_path(job_id)}/events", lambda response: EventPage.model_validate_json(response.content), params=params)


def stream(job_id: str, after: int) -> Call[None]:
    """The live event stream from the event after number `after` (0: from the first)."""
    headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"} | ({"Last-Event-ID": str(after)} if after else {})
    return Call("GET", f"{_job_path(job_id)}/events", lambda _: None, headers=headers)


def metrics(job_id: str, names: Iterable[str], points: int | None, after: int | None) -> Call[Json]:
    return Call("GET", f"{_job_path(job_id)}/metrics", _json, params=_series(names, points, after))


def metrics_csv(job_id: str, names: Iterable[str], points: int | None) -> Call[str]:
    headers = {"Accept": "text/csv"}
    return Call("GET", f"{_job_path(job_id)}/metrics", lambda response: response.text, params=_series(names, points, None), headers=headers)


def compare(
    job_ids: Iterable[str],
    *,
    name: str,
    points: int,
    x: Literal["step", "epoch", "seconds"],
    state: Iterable[str] = (),
    labels: Mapping[str, str] | None = None,
    experiment: str | None = None,
    created_after: datetime | str | None = None,
    created_before: datetime | str | None = None,
    q: str | None = None,
) -> Call[Json]:
    params: Params = {"name": name, "points": points, "x": x}
    params |= _filters(state, labels, experiment, created_after, created_before, q)
    if ids := list(job_ids):
        params["job"] = ids
    return Call("GET", "/v1/metrics/compare", _json, params=params)


def logs(job_id: str, tail: int | None) -> Call[str]:
    params: Params = {} if tail is None else {"tail": tail}
    return Call("GET", f"{_job_path(job_id)}/logs", lambda response: response.text, params=params)


def follow_logs(job_id: str, *, tail: int | None, offset: int | None) -> Call[None]:
    """The log as it is written, from its last `tail` lines or from byte `offset` on."""
    place = {name: value for name, value in {"tail": tail, "offset": offset}.items() if value is not None}
    return Call("GET", f"{_job_path(job_id)}/logs", lambda _: None, params={"follow": True, **place})


def checkpoints(job_id: str) -> Call[Checkpoints]:
    return Call("GET", f"{_job_path(job_id)}/checkpoints", lambda response: [Checkpoint.model_validate(one) for one in _rows(response)])


def pin(job_id: str, checkpoint_id: str, *, pinned: bool) -> Call[Checkpoint]:
    path = f"{_job_path(job_id)}/checkpoints/{quote(checkpoint_id, safe='')}/{'pin' if pinned else 'unpin'}"
    return Call("POST", path, lambda response: Checkpoint.model_validate_json(response.content))


def artifacts(job_id: str) -> Call[Artifacts]:
    return Call("GET", f"{_job_path(job_id)}/artifacts", lambda response: [Artifact.model_validate(one) for one in _rows(response)])


def weights(job_id: str, checkpoint_id: str, start: int) -> Call[None]:
    return _file(f"{_job_path(job_id)}/checkpoints/{quote(checkpoint_id, safe='')}/model.safetensors", start)


def artifact(job_id: str, name: str, start: int) -> Call[None]:
    return _file(f"{_job_path(job_id)}/artifacts/{quote(name, safe='')}", start)


def _file(path: str, start: int) -> Call[None]:
    """A file from byte `start` on, as it is stored."""
    headers = {"Accept": "*/*", "Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    return Call("GET", path, lambda _: None, headers=headers)


def predict(job_id: str, image: bytes, *, media_type: str, checkpoint: str, top: int) -> Call[Prediction | Task]:
    """The prediction, or, where it takes longer than the server waits, its task."""
    return Call(
        "POST",
        f"/v1/predict/{quote(job_id, safe='')}",
        lambda response: (Task if response.status_code == 202 else Prediction).model_validate_json(response.content),
        params={"checkpoint": checkpoint, "top": top},
        headers={"Content-Type": media_type},
        content=image,
        extra_wait_s=LONGEST_POLL_S,
    )


def task(task_id: str) -> Call[Task]:
    return Call("GET", f"/v1/tasks/{quote(task_id, safe='')}", lambda response: Task.model_validate_json(response.content))


def media_type_of(image: bytes) -> str:
    """By its first bytes, as the formats' specifications give them. What is none of the three is left to the server to refuse."""
    if image.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    return "image/webp" if image[:4] == b"RIFF" and image[8:12] == b"WEBP" else "image/png"


@dataclass(frozen=True)
class SeenExperiment:
    """An experiment as one answer showed it, with the tag to ask for the next change; `view` is None where nothing changed."""

    view: ExperimentView | None
    etag: str | None


@dataclass(frozen=True)
class Published:
    """A whole file as it came, and the digest it was sent with; None where none was."""

    content: bytes
    sha256: str | None


def ask(question: Spec, *, idempotency_key: str | None) -> Call[ExperimentView]:
    key = idempotency_key or uuid.uuid4().hex
    return Call("POST", EXPERIMENTS, _experiment, json=plain(question), headers={"Idempotency-Key": key})


def plan(question: Spec) -> Call[Json]:
    return Call("POST", EXPERIMENTS, _json, json=plain(question), params={"dry_run": True})


def experiment(experiment_id: str) -> Call[ExperimentView]:
    return Call("GET", _experiment_path(experiment_id), _experiment)


def experiments(*, limit: int, after: str | None, state: Iterable[str]) -> Call[ExperimentPage]:
    params: Params = {"limit": limit}
    if after is not None:
        params["after"] = after
    if states := [str(one) for one in state]:
        params["state"] = states
    return Call("GET", EXPERIMENTS, lambda response: ExperimentPage.model_validate_json(response.content), params=params)


def look_at_experiment(experiment_id: str, *, etag: str | None, wait_s: float) -> Call[SeenExperiment]:
    """The experiment when it differs from `etag`, or nothing after `wait_s` (whole seconds); with no tag, as it is now."""
    if etag is None:
        return Call("GET", _experiment_path(experiment_id), _seen_experiment)
    wait: Params = {"wait": max(1, round(wait_s))}
    headers = {"If-None-Match": etag}
    return Call("GET", _experiment_path(experiment_id), _seen_experiment, params=wait, headers=headers, extra_wait_s=wait_s)


def act_on_experiment(experiment_id: str, action: Literal["cancel", "pause", "resume"]) -> Call[ExperimentView]:
    return Call("POST", f"{_experiment_path(experiment_id)}/{action}", _experiment)


def add_seeds(experiment_id: str, count: int, idempotency_key: str | None) -> Call[ExperimentView]:
    headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
    return Call("POST", f"{_experiment_path(experiment_id)}/seeds", _experiment, json={"count": count}, headers=headers)


def clone_experiment(
    experiment_id: str, changes: Mapping[str, Any] | None, name: str | None, idempotency_key: str | None
) -> Call[ExperimentView]:
    body: Json = {"set": dict(changes or {})} | ({} if name is None else {"name": name})
    headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
    return Call("POST", f"{_experiment_path(experiment_id)}/clone", _experiment, json=body, headers=headers)


def update_experiment(experiment_id: str, fields: Mapping[str, Any]) -> Call[ExperimentView]:
    return Call("PATCH", _experiment_path(experiment_id), _experiment, json=dict(fields))


def delete_experiment(experiment_id: str) -> Call[None]:
    return Call("DELETE", _experiment_path(experiment_id), lambda _: None, done_before=frozenset({404}))


def experiment_file(experiment_id: str, name: str) -> Call[Published]:
    headers = {"Accept": "*/*", "Accept-Encoding": "identity"}
    return Call("GET", f"{_experiment_path(experiment_id)}/{name}", _published, headers=headers)


def datasets() -> Call[Rows]:
    return Call("GET", "/v1/datasets", _rows)


def dataset(name: str, version: str | None) -> Call[Dataset]:
    return Call("GET", _dataset_path(name), _dataset, params={} if version is None else {"version": version})


def dataset_samples(name: str, split: str, version: str | None) -> Call[Json]:
    params: Params = {"split": split}
    if version is not None:
        params["version"] = version
    return Call("GET", f"{_dataset_path(name)}/samples", _json, params=params)


def upload_dataset(source: Source, name: str, *, skip_unreadable: bool) -> Call[Dataset]:
    """The same files are the same version however often they are sent, so this may be repeated."""
    headers = {"Content-Type": source.media_type} | ({} if source.size is None else {"Content-Length": str(source.size)})
    params: Params = {"name": name, "unreadable": "skip" if skip_unreadable else "fail"}
    return Call("POST", "/v1/datasets", _dataset, params=params, headers=headers, stream=source.stream, extra_wait_s=LONGEST_UNPACKING_S)


def register_dataset(path: str, name: str) -> Call[Dataset]:
    return Call("POST", "/v1/datasets", _dataset, json={"name": name, "path": path})


def delete_dataset(name: str, version: str | None) -> Call[None]:
    params: Params = {} if version is None else {"version": version}
    return Call("DELETE", _dataset_path(name), lambda _: None, params=params, done_before=frozenset({404}))


def rows(path: Literal["/v1/workers", "/v1/models", "/v1/presets"]) -> Call[Rows]:
    return Call("GET", path, _rows)


def preset(name: str) -> Call[Json]:
    return document(f"/v1/presets/{quote(name, safe='')}")


def document(path: str) -> Call[Json]:
    return Call("GET", path, _json)


def webhook_secret() -> Call[WebhookSecret]:
    return Call("GET", "/v1/webhooks/secret", _webhook_secret)


def rotate_webhook_secret() -> Call[WebhookSecret]:
    """A second rotation would end the overlap with the secret that receivers have, so it is not repeated blindly."""
    return Call("POST", "/v1/webhooks/secret/rotate", _webhook_secret, repeatable=False)


def deliveries(*, job: str | None, state: str | None, limit: int, after: str | None) -> Call[DeliveryPage]:
    named = {"job": job, "state": state, "after": after}
    params: Params = {"limit": limit}
    params |= {name: value for name, value in named.items() if value is not None}
    return Call("GET", "/v1/webhooks/deliveries", lambda response: DeliveryPage.model_validate_json(response.content), params=params)


def delivery(delivery_id: str) -> Call[Delivery]:
    return Call("GET", f"/v1/webhooks/deliveries/{quote(delivery_id, safe='')}", _delivery)


def retry_delivery(delivery_id: str) -> Call[Delivery]:
    return Call("POST", f"/v1/webhooks/deliveries/{quote(delivery_id, safe='')}/retry", _delivery, repeatable=False)


def test_webhook(url: str) -> Call[Delivery]:
    return Call("POST", "/v1/webhooks/test", _delivery, json={"url": url}, repeatable=False)


def health() -> Call[Health]:
    return Call("GET", "/readyz", _health, fine=frozenset({503}))


def plain(spec: Spec) -> Json:
    """A spec as JSON values; a pydantic model says only what was set."""
    return spec.model_dump(mode="json", exclude_unset=True) if isinstance(spec, BaseModel) else dict(spec)


def _job_path(job_id: str) -> str:
    return f"/v1/jobs/{quote(job_id, safe='')}"


def _time(value: datetime | str | None) -> str | None:
    return value.isoformat() if isinstance(value, datetime) else value


def _series(names: Iterable[str], points: int | None, after: int | None) -> Params:
    wanted = list(names)
    params: Params = {"name": wanted} if wanted else {}
    return params | {key: value for key, value in {"points": points, "after": after}.items() if value is not None}


def _dataset_path(name: str) -> str:
    return f"/v1/datasets/{quote(name, safe='')}"


def _experiment_path(experiment_id: str) -> str:
    return f"{EXPERIMENTS}/{quote(experiment_id, safe='')}"


def _experiment(response: httpx2.Response) -> ExperimentView:
    return ExperimentView.model_validate_json(response.content)


def _seen_experiment(response: httpx2.Response) -> SeenExperiment:
    etag = response.headers.get("etag")
    return SeenExperiment(None, etag) if response.status_code == 304 else SeenExperiment(_experiment(response), etag)


def _published(response: httpx2.Response) -> Published:
    etag = response.headers.get("etag", "").strip('"')
    return Published(response.content, etag if len(etag) == 64 else None)


def _dataset(response: httpx2.Response) -> Dataset:
    return Dataset.model_validate_json(response.content)


def _job(response: httpx2.Response) -> Job:
    return Job.model_validate_json(response.content)


def _seen(response: httpx2.Response) -> Seen:
    etag = response.headers.get("etag")
    return Seen(None, etag) if response.status_code == 304 else Seen(_job(response), etag)


def _json(response: httpx2.Response) -> Json:
    return cast("Json", response.json())


def _rows(response: httpx2.Response) -> Rows:
    body = response.json()
    return cast("Rows", body["data"] if isinstance(body, dict) else body)


def _webhook_secret(response: httpx2.Response) -> WebhookSecret:
    return WebhookSecret.model_validate_json(response.content)


def _delivery(response: httpx2.Response) -> Delivery:
    return Delivery.model_validate_json(response.content)


def _health(response: httpx2.Response) -> Health:
    body = response.json()
    return Health.model_validate((body if isinstance(body, dict) else {}) | {"ready": response.status_code == 200})
