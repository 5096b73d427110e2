"""Both clients against the real service."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sklearn.datasets import load_digits

from powergrad import __version__
from powergrad.cli.stack import Stack
from powergrad.client import ApiError, AsyncClient, Client, Event, Job, Prediction
from tests.cli.conftest import TRAINED_S, endless, tiny


def test_a_ready_server_says_so(client: Client) -> None:
    assert client.health().ready


def test_a_live_worker_is_listed_with_its_slots(client: Client) -> None:
    (worker,) = client.workers()
    assert worker["version"] == __version__
    assert len(worker["slots"]) == 2


def test_the_catalogue_and_the_schema_name_what_a_spec_may(client: Client, trained: Job) -> None:
    assert "resnet18" in {model["name"] for model in client.models()}
    assert "alpha" in str(client.schema())


def test_a_trained_job_tells_what_it_did(trained: Job) -> None:
    assert trained.state == "succeeded", trained.reason
    assert trained.is_terminal
    assert trained.progress.fraction == 1.0
    assert 0.0 <= (trained.metrics.best["val_top1"] or -1.0) <= 1.0
    assert [attempt.outcome for attempt in trained.attempts] == ["succeeded"]
    assert trained.created_at is not None
    assert trained.finished_at is not None
    assert trained.finished_at > trained.created_at


def test_events_come_complete_by_page_and_by_stream(client: Client, trained: Job) -> None:
    streamed = list(client.stream(trained.id))
    assert [event.seq for event in streamed] == list(range(1, len(streamed) + 1))
    assert streamed[0].type == "created"
    assert client.events(trained.id).data == streamed
    assert list(client.stream(trained.id, after=3)) == streamed[3:]


def test_a_stream_follows_a_job_live_to_its_end(live: Stack, client: Client) -> None:
    async def follow() -> tuple[list[Event], Job]:
        async with AsyncClient(live.url) as waiting:
            job = await waiting.submit(tiny())
            events = [event async for event in waiting.stream(job.id)]
            return events, await waiting.get(job.id)

    events, job = asyncio.run(follow())
    assert job.state == "succeeded"
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert "checkpoint" in {event.type for event in events}


def test_changes_end_with_the_end(client: Client) -> None:
    seen = list(client.changes(client.submit(tiny()).id, timeout_s=TRAINED_S))
    assert seen[-1].state == "succeeded"
    assert "running" in {job.state for job in seen}
    steps = [job.progress.step or 0 for job in seen]
    assert steps == sorted(steps)


def test_the_same_key_gives_the_same_job_and_another_body_is_refused(client: Client) -> None:
    key = uuid.uuid4().hex
    first = client.submit(endless(), idempotency_key=key)
    assert client.submit(endless(), idempotency_key=key).id == first.id
    with pytest.raises(ApiError) as refused:
        client.submit(endless(seed=1), idempotency_key=key)
    assert refused.value.status == 422
    client.cancel(first.id)


def test_a_dry_run_fills_in_the_defaults_and_stores_nothing(client: Client) -> None:
    before = client.page(limit=1).data
    spec = client.dry_run({"data": {"dataset": "digits"}})
    assert "resnet18" in str(spec)
    assert [job.id for job in client.page(limit=1).data] == [job.id for job in before]


def test_every_violation_comes_back_at_once(client: Client) -> None:
    with pytest.raises(ApiError) as refused:
        client.submit(tiny(loss={"alpha": 1.4}, epochs=0))
    assert {violation.pointer for violation in refused.value.errors} == {"/loss/alpha", "/epochs"}


def test_the_best_weights_come_verified(client: Client, trained: Job, tmp_path: Path) -> None:
    (best,) = [checkpoint for checkpoint in client.checkpoints(trained.id) if checkpoint.is_best]
    path = client.download(trained.id, "best", tmp_path)
    assert path.stat().st_size == best.bytes
    assert hashlib.sha256(path.read_bytes()).hexdigest() == best.sha256


def test_the_real_server_resumes_a_broken_download(client: Client, trained: Job, tmp_path: Path) -> None:
    whole = client.download(trained.id, "best", tmp_path / "whole.safetensors").read_bytes()
    checkpoint = client.checkpoints(trained.id)[0]
    (tmp_path / f".half.safetensors.{checkpoint.sha256[:16]}.part").write_bytes(whole[: len(whole) // 2])
    heard: list[int] = []
    path = client.download(trained.id, checkpoint.id, tmp_path / "half.safetensors", on_progress=lambda done, _: heard.append(done))
    assert path.read_bytes() == whole
    assert heard[0] > len(whole) // 2, "the first half was not sent again"


def test_metrics_come_as_series_and_as_csv(client: Client, trained: Job) -> None:
    series = {one["name"]: one for one in client.metrics(trained.id, names=["train_loss", "val_top1"])["data"]}
    assert set(series) == {"train_loss", "val_top1"}
    assert series["val_top1"]["values"][-1] == pytest.approx(trained.metrics.latest["val_top1"])
    header, *rows = client.metrics_csv(trained.id, names=["val_top1"]).splitlines()
    assert header == "step,val_top1"
    assert float(rows[-1].split(",")[1]) == pytest.approx(trained.metrics.latest["val_top1"])


def test_both_clients_compare_alike(client: Client, trained: Job, live: Stack) -> None:
    async def compared() -> dict[str, Any]:
        async with AsyncClient(live.url) as waiting:
            return await waiting.compare(labels=trained.labels, q=trained.id, x="epoch")

    found = client.compare([trained.id], x="epoch")
    assert found["data"][0]["values"][-1] == pytest.approx(trained.metrics.latest["val_top1"], rel=1e-6)
    assert found["data"][0]["x"][-1] == trained.progress.epochs
    assert asyncio.run(compared()) == found


def test_many_jobs_are_moved_at_once(client: Client, trained: Job) -> None:
    jobs = [client.submit(endless()).id for _ in range(2)]
    answer = client.act_on_many("cancel", [*jobs, trained.id])
    assert answer["done"] == jobs
    assert [(one["id"], one["code"]) for one in answer["refused"]] == [(trained.id, "illegal_move")]
    assert [client.wait(job_id, TRAINED_S).state for job_id in jobs] == ["cancelled", "cancelled"]


def test_a_followed_log_is_the_log(client: Client, trained: Job) -> None:
    log = client.logs(trained.id)
    assert "val_top1" in log
    assert "".join(client.follow_logs(trained.id)) == log
    assert client.logs(trained.id, tail=2).splitlines() == log.splitlines()[-2:]


def test_lists_are_filtered_and_paged(client: Client, trained: Job) -> None:
    made = [client.submit(endless(labels={"batch": "one"})).id for _ in range(3)]
    assert [job.id for job in client.list(labels={"batch": "one"}, page_size=2)] == made[::-1]
    assert [job.id for job in client.list(labels={"kept": "yes"})] == [trained.id]
    assert trained.id in {job.id for job in client.list(state=["succeeded"], sort="-metrics.val_top1")}
    for job_id in made:
        client.cancel(job_id)


def test_a_job_is_paused_resumed_and_cancelled(client: Client) -> None:
    job = client.submit(endless())
    next(one for one in client.changes(job.id, timeout_s=60) if one.state == "running" and (one.progress.step or 0) > 0)
    client.pause(job.id)
    paused = next(one for one in client.changes(job.id, timeout_s=60) if one.state == "paused")
    assert [checkpoint.is_latest for checkpoint in client.checkpoints(job.id)][:1] == [True]
    client.resume(job.id)
    again = next(one for one in client.changes(job.id, timeout_s=60) if one.state == "running")
    assert again.attempt == paused.attempt + 1
    client.cancel(job.id)
    assert client.wait(job.id, 60).state == "cancelled"
    with pytest.raises(ApiError) as refused:
        client.pause(job.id)
    assert refused.value.status == 409


def test_user_fields_change_only_at_the_version_expected(client: Client, trained: Job) -> None:
    job = client.submit(endless())
    cancelled = client.wait(client.cancel(job.id).id, 60)
    changed = client.update(job.id, {"notes": "a try"}, if_match=f'"{cancelled.version}"')
    assert changed.notes == "a try"
    with pytest.raises(ApiError) as refused:
        client.update(job.id, {"notes": "another"}, if_match=f'"{cancelled.version}"')
    assert refused.value.status == 412
    client.delete(job.id)
    with pytest.raises(ApiError) as gone:
        client.get(job.id)
    assert gone.value.status == 404


def test_a_clone_differs_where_told(client: Client, trained: Job) -> None:
    twin = client.clone(trained.id, changes={"loss.alpha": 0.25})
    client.wait(client.cancel(twin.id).id, 60)
    client.delete(twin.id)
    assert twin.spec["loss"]["alpha"] == 0.25
    assert twin.spec["data"] == trained.spec["data"]


def test_a_clone_begins_with_a_checkpoint_which_stays(client: Client, trained: Job) -> None:
    twin = client.clone(trained.id, from_checkpoint="best")
    client.wait(client.cancel(twin.id).id, 60)
    client.delete(twin.id)
    best = next(one for one in client.checkpoints(trained.id) if one.is_best)
    assert twin.spec["model"]["init_from"] == f"{trained.id}/{best.id}"
    assert best.pinned
    assert client.pin(trained.id, best.id, pinned=False).pinned is False


def test_both_clients_predict_alike(client: Client, trained: Job, live: Stack, tmp_path: Path) -> None:
    image = tmp_path / "digit.png"
    Image.fromarray((load_digits().images[5] * 255 / 16).astype("uint8")).save(image)
    found = client.predict(trained.id, image, 3)

    async def ask() -> Prediction:
        async with AsyncClient(live.url) as also:
            return await also.predict(trained.id, image.read_bytes(), 3, checkpoint="best")

    assert asyncio.run(ask()) == found
    assert (found.job, len(found.predictions)) == (trained.id, 3)


def test_a_preset_can_be_submitted(client: Client) -> None:
    name = client.presets()[0]["name"]
    assert client.dry_run(client.preset(name)["spec"])["name"] == name
