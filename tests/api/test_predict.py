"""POST /v1/predict: what is handed to a worker, how its answer comes back, and what is refused before. The worker here is the test."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest

from powergrad import protocol
from powergrad.jobs import retention, rows, tasks
from tests.api.conftest import Api, register_worker, serving, settings_for, until
from tests.jobs import builders

PNG = b"\x89PNG made up"
IMAGE = {"Content-Type": "image/png"}
PREDICTION = {
    "object": "prediction",
    "job": "job_1",
    "checkpoint": "step-00000010",
    "predictions": [{"label": "cat", "index": 3, "probability": 0.75}],
}


@dataclass(frozen=True)
class Trained:
    api: Api
    job_id: str

    def ask(self, content: bytes = PNG, **params: Any) -> httpx2.Response:
        return self.api.http.post(f"/v1/predict/{self.job_id}", content=content, headers=IMAGE, params=params)


def train(api: Api, *, names: tuple[str, ...] = ("labels.json", "preprocessing.json"), with_checkpoint: bool = True) -> Trained:
    run = builders.running(api.store)
    builders.record(api.store, run, builders.plan())
    if with_checkpoint:
        builders.record(api.store, run, builders.checkpoint(10, 0.9), builders.checkpoint(20, 0.5))
    for name in names:
        path, sha256 = f"artifacts/a1/{name}", hashlib.sha256(b"").hexdigest()
        written = protocol.ArtifactWritten(name=name, path=path, media_type="application/json", bytes=0, sha256=sha256)
        builders.record(api.store, run, written)
    return Trained(api, run.job_id)


@pytest.fixture
def trained(any_api: Api) -> Trained:
    register_worker(any_api.store)
    return train(any_api)


@contextmanager
def answering(api: Api, answer: Callable[[Any, tasks.Task], None]) -> Iterator[list[tasks.Task]]:
    """A worker that takes one task, looks at its image, and answers."""
    taken: list[tasks.Task] = []

    def work() -> None:
        def claim() -> tasks.Task | None:
            with api.store.write() as tx:
                return tasks.claim(tx, lease_s=60)

        task: tasks.Task = until(claim)
        taken.append(task)
        assert (api.data_dir / task.arguments["image"]).read_bytes() == PNG
        with api.store.write() as tx:
            answer(tx, task)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield taken
    finally:
        thread.join(timeout=30)
        assert not thread.is_alive()


def test_the_answer_of_the_worker_is_the_answer(any_api: Api, trained: Trained) -> None:
    with answering(any_api, lambda tx, task: tasks.finish(tx, task, PREDICTION)) as taken:
        answer = trained.ask(top=3)
    assert (answer.status_code, answer.json()) == (200, PREDICTION)
    asked, home = taken[0].arguments, rows.job_dir(trained.job_id)
    assert (taken[0].kind, asked["job"], asked["checkpoint"], asked["top"]) == ("predict", trained.job_id, "step-00000010", 3)
    assert asked["weights"] == f"{home}/checkpoints/a1/step-00000010/model.safetensors"
    assert (asked["labels"], asked["preprocessing"]) == (f"{home}/artifacts/a1/labels.json", f"{home}/artifacts/a1/preprocessing.json")
    assert "resources" not in asked["spec"]  # what a trainer is given, no more
    task = any_api.http.get(answer.headers["location"]).json()
    assert (task["state"], task["job"], task["result"]) == ("succeeded", trained.job_id, PREDICTION)


@pytest.mark.parametrize(("asked", "step"), [("latest", 20), ("step-00000020", 20), ("best", 10)])
def test_another_checkpoint_can_be_asked(any_api: Api, trained: Trained, asked: str, step: int) -> None:
    with answering(any_api, lambda tx, task: tasks.finish(tx, task, PREDICTION)) as taken:
        assert trained.ask(checkpoint=asked).status_code == 200
    assert taken[0].arguments["checkpoint"] == retention.checkpoint_id(step)


@pytest.mark.parametrize(
    ("code", "status", "problem"),
    [("data_unreadable", 422, "unreadable_image"), ("data_missing", 409, "no_checkpoint"), ("crashed", 500, "task_failed")],
)
def test_a_failure_of_the_worker_is_a_refusal(any_api: Api, trained: Trained, code: str, status: int, problem: str) -> None:
    with answering(any_api, lambda tx, task: tasks.fail(tx, task, code, "because")):
        answer = trained.ask()
    assert (answer.status_code, answer.json()["code"]) == (status, problem)
    assert "because" in answer.json()["detail"]


def test_what_takes_longer_is_a_task_to_come_back_to(api: Api) -> None:
    api.parts.settings.predict_wait_s = 0.2
    try:
        register_worker(api.store)
        answer = train(api).ask()
    finally:
        api.parts.settings.predict_wait_s = 30.0
    assert (answer.status_code, answer.json()["state"]) == (202, "queued")
    task = api.http.get(answer.headers["location"]).json()
    assert task == answer.json()


def test_many_wait_without_holding_up_the_others(api: Api) -> None:
    """More waiters than the server has threads for its routes."""
    register_worker(api.store)
    trained = train(api)
    answers: list[int] = []
    waiting = [threading.Thread(target=lambda: answers.append(trained.ask().status_code)) for _ in range(50)]
    for thread in waiting:
        thread.start()
    done = 0
    while done < 50:

        def claim() -> tasks.Task | None:
            with api.store.write() as tx:
                return tasks.claim(tx, lease_s=60)

        if done == 0:
            until(lambda: _waiting(api) == 50)
            assert api.http.get("/v1/jobs").status_code == 200  # answered by a thread of the pool
        task: tasks.Task = until(claim)
        with api.store.write() as tx:
            tasks.finish(tx, task, PREDICTION)
        done += 1
    for thread in waiting:
        thread.join(timeout=30)
    assert answers == [200] * 50


def _waiting(api: Api) -> int:
    from sqlalchemy import func, select

    from powergrad.jobs.tables import tasks as table

    with api.store.read() as tx:
        return int(tx.run(select(func.count()).select_from(table)).scalar_one())


def test_a_job_without_a_checkpoint_or_labels_is_a_conflict(any_api: Api) -> None:
    register_worker(any_api.store)
    for job in (train(any_api, with_checkpoint=False), train(any_api, names=("labels.json",))):
        answer = job.ask()
        assert (answer.status_code, answer.json()["code"]) == (409, "no_checkpoint")


def test_without_a_worker_it_is_unavailable(any_api: Api) -> None:
    before = set(any_api.data_dir.glob("tasks/*"))
    answer = train(any_api).ask()
    assert (answer.status_code, answer.json()["code"]) == (503, "no_worker")
    assert int(answer.headers["retry-after"]) >= 1
    assert set(any_api.data_dir.glob("tasks/*")) <= before  # no image is kept for nobody


@pytest.mark.parametrize(
    ("url", "status", "code"),
    [
        ("/v1/predict/job_01KAQZ5V3N8T4W6Y7C9E1G2H3J", 404, "job_not_found"),
        ("/v1/predict/{job}?checkpoint=step-00000099", 404, "checkpoint_not_found"),
        ("/v1/predict/{job}?checkpoint=newest", 422, "invalid_request"),
        ("/v1/predict/{job}?top=0", 422, "invalid_request"),
        ("/v1/predict/{job}?tops=3", 422, "invalid_request"),
    ],
)
def test_what_cannot_be_asked_is_refused(any_api: Api, trained: Trained, url: str, status: int, code: str) -> None:
    answer = any_api.http.post(url.format(job=trained.job_id), content=PNG, headers=IMAGE)
    assert (answer.status_code, answer.json()["code"]) == (status, code)


@pytest.mark.parametrize("media_type", ["application/json", "text/plain", "multipart/form-data; boundary=x", "image/gif", ""])
def test_only_images_are_taken(any_api: Api, trained: Trained, media_type: str) -> None:
    answer = any_api.http.post(f"/v1/predict/{trained.job_id}", content=PNG, headers={"Content-Type": media_type})
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")
    assert "image/jpeg" in answer.json()["detail"]


def test_an_image_is_no_body_elsewhere(any_api: Api) -> None:
    assert any_api.http.post("/v1/jobs", content=PNG, headers=IMAGE).status_code == 415


def test_an_empty_body_is_refused(any_api: Api, trained: Trained) -> None:
    assert trained.ask(b"").json()["code"] == "malformed"


def test_an_image_beyond_the_limit_is_refused_unread(sqlite_url: str, tmp_path: Any) -> None:
    with serving(settings_for(sqlite_url, tmp_path, max_image_bytes=2048)) as api:
        register_worker(api.store)
        answer = train(api).ask(b"x" * 2049)
        assert (answer.status_code, answer.json()["code"]) == (413, "too_large")


@pytest.mark.parametrize("task_id", ["task_01KAQZ5V3N8T4W6Y7C9E1G2H3J", "x", "task_%00"])
def test_a_task_that_is_not_there_is_not_found(any_api: Api, task_id: str) -> None:
    answer = any_api.http.get(f"/v1/tasks/{task_id}")
    assert (answer.status_code, answer.json()["code"]) == (404, "task_not_found")
