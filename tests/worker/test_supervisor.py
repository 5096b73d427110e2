"""Attempts supervised for real: trainers are killed, stopped, told to stop, and the job always ends as it must."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from powergrad.jobs import claims, lifecycle, queries, retention, rows, submission, sweeps
from powergrad.jobs.spec import parse
from tests.worker.conftest import Place, tiny_spec, until


def trainer_of(job_id: str) -> psutil.Process:
    """The trainer's process, by the title `ps` shows."""

    def find() -> psutil.Process | None:
        for process in psutil.process_iter(["cmdline"]):
            if process.info["cmdline"] and process.info["cmdline"][0] == f"powergrad: trainer {job_id}":
                return process
        return None

    found = until(find)
    assert isinstance(found, psutil.Process)
    return found


def log_of(place: Place, job_id: str, attempt: int) -> str:
    return (place.service.settings.data_dir / "jobs" / job_id / "logs" / f"a{attempt}.log").read_text()


@pytest.fixture(scope="module")
def undisturbed(place: Place) -> str:
    """sha256 of the weights of a run that nothing happened to."""
    job_id = place.submit()
    job = place.until_state(job_id, "succeeded", "failed")
    assert job["state"] == "succeeded", job["reason"]
    return place.weights_sha256(job_id)


def test_a_job_is_trained_to_its_end(place: Place, undisturbed: str) -> None:
    job_id = place.submit()
    job = place.until_state(job_id, "succeeded", "failed")
    assert job["state"] == "succeeded"
    assert job["progress"]["fraction"] == 1.0
    assert job["attempts"][0]["outcome"] == "succeeded"
    assert {"train_loss", "val_loss", "val_top1", "lr", "images_per_s"} <= set(job["metrics"]["latest"])
    assert place.weights_sha256(job_id) == undisturbed


def test_a_killed_trainer_is_followed_by_one_that_ends_with_the_same_bits(place: Place, undisturbed: str) -> None:
    job_id = place.submit()
    place.until(lambda: place.events(job_id, "checkpoint"))
    trainer_of(job_id).kill()
    job = place.until_state(job_id, "succeeded", "failed")
    assert job["state"] == "succeeded"
    assert job["attempt"] == 2
    assert job["failures"] == 1
    assert job["attempts"][0]["reason"]["code"] == "crashed"
    assert job["attempts"][0]["reason"]["evidence"]["signal"] == "SIGKILL"
    assert job["attempts"][1]["resumed_from"] is not None
    assert place.weights_sha256(job_id) == undisturbed


def test_pause_and_resume_cost_no_failure_and_no_bit(place: Place, undisturbed: str) -> None:
    job_id = place.submit()
    place.until_step(job_id, 3)
    with place.store.write() as tx:
        lifecycle.pause(tx, job_id)
    job = place.until_state(job_id, "paused")
    assert 0 < job["progress"]["step"] < 33
    with place.store.write() as tx:
        lifecycle.resume(tx, job_id)
    job = place.until_state(job_id, "succeeded", "failed")
    assert (job["state"], job["failures"], job["attempt"]) == ("succeeded", 0, 2)
    assert place.weights_sha256(job_id) == undisturbed


def test_a_job_that_holds_at_two_epochs_costs_no_failure_and_no_bit(place: Place, undisturbed: str) -> None:
    job_id = place.submit(hold_epoch=1, checkpoint={"every_epochs": 3})
    for epoch in (1, 2):
        job = place.until_state(job_id, "paused", "succeeded", "failed")
        assert (job["state"], job["failures"], job["progress"]["epoch"], job["progress"]["step"]) == ("paused", 0, epoch, 11 * epoch)
        assert job["attempts"][-1]["outcome"] == "held"
        assert place.events(job_id, "state")[-1]["data"]["reason"] == f"held at epoch {epoch}"
        assert [event["data"]["epoch"] for event in place.events(job_id, "evaluation")] == list(range(1, epoch + 1))
        with place.store.write() as tx:
            rows.go_on(tx, rows.locked(tx, job_id), 2 if epoch == 1 else None)
    job = place.until_state(job_id, "succeeded", "failed")
    assert (job["state"], job["failures"], job["attempt"]) == ("succeeded", 0, 3)
    assert place.weights_sha256(job_id) == undisturbed


def test_a_trainer_killed_as_it_holds_is_followed_by_one_that_holds_without_a_step(place: Place, undisturbed: str) -> None:
    """Killed when the checkpoint of the hold is on record, before its last word or just after it."""
    job_id = place.submit(hold_epoch=1)
    trainer = trainer_of(job_id)
    place.until(lambda: place.events(job_id, "checkpoint"))
    with suppress(psutil.NoSuchProcess):
        trainer.kill()
    job = place.until_state(job_id, "paused", "succeeded", "failed")
    assert job["state"] == "paused"
    assert job["attempts"][-1]["outcome"] == "held"
    assert [event["data"]["epoch"] for event in place.events(job_id, "evaluation")] == [1], "nothing was trained again"
    with place.store.write() as tx:
        lifecycle.resume(tx, job_id)
    assert place.until_state(job_id, "succeeded", "failed")["state"] == "succeeded"
    assert place.weights_sha256(job_id) == undisturbed


def test_a_sigterm_to_trainer_and_template_ends_neither(place: Place, undisturbed: str) -> None:
    """Where every process of a host is told to end, theirs is the worker's drain."""
    job_id = place.submit()
    place.until_step(job_id, 3)
    trainer = trainer_of(job_id)
    template = trainer.parent()
    assert template is not None
    trainer.terminate()
    template.terminate()
    job = place.until_state(job_id, "succeeded", "failed")
    assert (job["state"], job["attempt"]) == ("succeeded", 1)
    assert place.weights_sha256(job_id) == undisturbed


def test_cancel_ends_a_running_job_within_seconds(place: Place) -> None:
    job_id = place.submit(epochs=500)
    place.until_step(job_id, 3)
    trainer = trainer_of(job_id)
    with place.store.write() as tx:
        lifecycle.cancel(tx, job_id)
    place.until_state(job_id, "cancelled", within_s=10)
    place.until(lambda: not trainer.is_running(), within_s=2)


def test_a_run_whose_job_was_taken_is_killed_and_writes_nothing(place: Place) -> None:
    job_id = place.submit(epochs=500)
    place.until_step(job_id, 3)
    trainer = trainer_of(job_id)
    with place.store.write() as tx:  # what a sweep does when a lease has lapsed; then another worker's claim
        sweeps.expire_worker(tx, place.service.id)
        sweeps.sweep(tx)
        taken = claims.claim(tx, claims.Offer(worker="another", device="cpu", gpus=0, cpu_threads=1))
    assert taken is not None
    assert taken.run.attempt == 2
    before = place.job(job_id)
    place.until(lambda: not trainer.is_running(), within_s=5)
    assert place.job(job_id)["revision"] == before["revision"]
    with place.store.write() as tx:
        lifecycle.cancel(tx, job_id)
    place.until_state(job_id, "cancelled", within_s=15)


def test_a_frozen_trainer_is_stalled_and_its_stacks_are_kept(place: Place) -> None:
    job_id = place.submit(limits={"stall_seconds": 2.0, "max_attempts": 1}, epochs=500)
    place.until_step(job_id, 3)
    trainer_of(job_id).suspend()
    job = place.until_state(job_id, "failed")
    assert job["reason"]["code"] == "stalled"


def test_training_time_is_limited_over_all_attempts(place: Place) -> None:
    job_id = place.submit(limits={"max_seconds": 3.0}, epochs=500)
    job = place.until_state(job_id, "failed")
    assert job["reason"]["code"] == "deadline"
    assert job["trained_seconds"] == pytest.approx(3.0, abs=3.0)
    checkpoints = place.events(job_id, "checkpoint")
    assert checkpoints, "what was trained is kept"


def test_a_job_that_diverges_fails_once_and_says_what_to_try(place: Place) -> None:
    job_id = place.submit(optimizer={"lr": 1000.0}, model={"norm": "none"}, precision="fp32")
    job = place.until_state(job_id, "failed", "succeeded")
    assert job["reason"]["code"] == "diverged"
    assert job["attempt"] == 1
    assert "lr" in job["reason"]["hint"]
    assert job["reason"]["evidence"]["log_tail"]


def test_missing_data_names_the_place_it_was_looked_for(place: Place) -> None:
    job_id = place.submit(data={"dataset": "cifar10"})
    job = place.until_state(job_id, "failed")
    assert job["reason"]["code"] == "data_missing"
    assert "cifar" in job["reason"]["detail"]


def test_every_line_of_the_trainer_is_kept(place: Place) -> None:
    job_id = place.submit(epochs=500)
    place.until_step(job_id, 3)
    trainer_of(job_id).kill()
    place.until(lambda: len(place.job(job_id)["attempts"]) == 2)
    assert "step 3" in log_of(place, job_id, 1)
    with place.store.write() as tx:
        lifecycle.cancel(tx, job_id)
    place.until_state(job_id, "cancelled", within_s=15)


def test_old_checkpoints_are_freed_and_the_best_kept(place: Place) -> None:
    job_id = place.submit(epochs=5, checkpoint={"keep_last": 1, "keep_best": 1})
    job = place.until_state(job_id, "succeeded", "failed")
    assert job["state"] == "succeeded"
    on_disk = sorted(path.name for path in (place.service.settings.data_dir / "jobs" / job_id).glob("checkpoints/a1/*"))
    with place.store.read() as tx:
        listed = sorted(c["id"] for c in queries.list_checkpoints(tx, job_id))
    assert on_disk == listed
    assert 1 <= len(listed) <= 2


def test_broken_checkpoints_are_skipped_and_leave_nothing_behind(place: Place, undisturbed: str) -> None:
    job_id = place.submit()
    place.until(lambda: place.events(job_id, "checkpoint"))
    with place.store.write() as tx:
        lifecycle.pause(tx, job_id)
    place.until_state(job_id, "paused")
    job_dir = place.service.settings.data_dir / "jobs" / job_id
    for weights in job_dir.glob("checkpoints/a1/*/model.safetensors"):
        os.truncate(weights, 1000)
    with place.store.write() as tx:
        lifecycle.resume(tx, job_id)
    job = place.until_state(job_id, "succeeded", "failed")
    assert job["state"] == "succeeded"
    assert place.events(job_id, "checkpoint_skipped")
    assert place.weights_sha256(job_id) == undisturbed
    with place.store.read() as tx:
        registered = retention.checkpoint_paths(tx, job_id)
    place.until(lambda: {str(path.relative_to(job_dir)) for path in job_dir.glob("checkpoints/a*/*")} == registered)


def test_two_jobs_run_at_a_time_on_two_slots(place: Place) -> None:
    first, second = place.submit(epochs=500), place.submit(epochs=500)
    place.until_step(first, 3)
    place.until_step(second, 3)
    third = place.submit(epochs=500)
    assert place.job(third)["queue"] == {"position": 1, "waiting_for": "a free slot"}
    cores = [set(trainer_of(job_id).cpu_affinity()) for job_id in (first, second)]
    if (os.cpu_count() or 1) > 1:
        assert not cores[0] & cores[1]
    for job_id in (third, first, second):
        with place.store.write() as tx:
            lifecycle.cancel(tx, job_id)
    for job_id in (first, second, third):
        place.until_state(job_id, "cancelled", within_s=15)


def test_a_job_for_a_gpu_waits_and_says_why(place: Place) -> None:
    job_id = place.submit(resources={"gpus": 1})
    if place.service.gpus:
        pytest.skip("this machine has one")
    assert place.job(job_id)["queue"]["waiting_for"] == "needs 1 GPU; the largest worker has none"
    with place.store.write() as tx:
        lifecycle.cancel(tx, job_id)


def test_the_template_is_back_after_it_was_killed_and_its_jobs_go_on(place: Place, undisturbed: str) -> None:
    job_id = place.submit()
    place.until(lambda: place.events(job_id, "checkpoint"))
    trainer = trainer_of(job_id)
    template = trainer.parent()
    assert template is not None
    assert template.cmdline()[0] == "powergrad: template"
    template.kill()
    place.until(lambda: not trainer.is_running() or trainer.status() == psutil.STATUS_ZOMBIE, within_s=1.0)
    job = place.until_state(job_id, "succeeded", "failed")
    assert job["state"] == "succeeded"
    assert place.weights_sha256(job_id) == undisturbed
    place.until(place.service.template.ready.is_set)


def test_a_finished_job_leaves_no_process_behind(place: Place) -> None:
    job_id = place.submit(epochs=1)
    trainer = trainer_of(job_id)
    place.until_state(job_id, "succeeded", "failed")
    assert not trainer.is_running()
    assert not [file.path for file in psutil.Process().open_files() if job_id in file.path]


# --- weights of another job


def test_a_job_begins_with_anothers_weights_or_says_that_they_are_gone(place: Place) -> None:
    origin = place.submit(epochs=1)
    assert place.until_state(origin, "succeeded", "failed")["state"] == "succeeded"
    # a rate that moves no weight: what it ends with is what it began with (a seed of its own would show)
    frozen: dict[str, Any] = {
        "model": {"init_from": f"{origin}/latest"},
        "epochs": 1,
        "seed": 7,
        "optimizer": {"lr": 1e-12, "weight_decay": 0.0},
    }
    heir = place.submit(**frozen)
    assert place.until_state(heir, "succeeded", "failed")["state"] == "succeeded"
    assert torch.allclose(classifier(place, heir), classifier(place, origin), rtol=0.0, atol=1e-8)  # a rate of 1e-12, eleven times

    with place.store.write() as tx:
        late = submission.submit(tx, submission.Submission(parse(tiny_spec(**frozen)))).job_id
        lifecycle.pause(tx, late)
        stored = queries.find_checkpoint(tx, origin, "latest")
    shutil.rmtree(place.service.settings.data_dir / "jobs" / origin / stored.path)
    with place.store.write() as tx:
        lifecycle.resume(tx, late)
    job = place.until_state(late, "succeeded", "failed")
    assert (job["state"], job["reason"]["code"]) == ("failed", "data_missing")
    assert "model.init_from" in job["reason"]["detail"]


def classifier(place: Place, job_id: str) -> torch.Tensor:
    with place.store.read() as tx:
        stored = queries.find_checkpoint(tx, job_id, "latest")
    path = place.service.settings.data_dir / "jobs" / job_id / stored.path / "model.safetensors"
    return load_file(path)["fc.weight"]


def test_a_worker_that_lives_touches_its_beat_file_again_and_again(place: Place) -> None:
    beat = place.service.settings.beat_file
    assert beat is not None
    place.until(beat.exists)
    beat.unlink()
    place.until(beat.exists, within_s=10 * place.service.settings.heartbeat_s)
