"""Jobs, runs and trainer messages with overrides, and the checks that hold for every job whatever happened to it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy import Row, select

from powergrad import protocol
from powergrad.jobs import claims, lifecycle, recording, retention, rows, submission
from powergrad.jobs.claims import Claim, Offer
from powergrad.jobs.rows import Run
from powergrad.jobs.spec import JobSpec, parse
from powergrad.jobs.states import End, JobState, Outcome, Reason, ReasonCode
from powergrad.jobs.store import Store
from powergrad.jobs.tables import events, jobs

T = TypeVar("T")
OFFER = Offer(worker="worker-1", device="cpu", gpus=0, cpu_threads=2)
STEPS_PER_EPOCH = 10


def spec(**overrides: Any) -> JobSpec:
    return parse({"data": {"dataset": "digits"}, **overrides})


def submit(
    store: Store,
    *,
    owner: str = rows.LOCAL_OWNER,
    key: str | None = None,
    body: str = "",
    hold_epoch: int | None = None,
    **overrides: Any,
) -> str:
    with store.write() as tx:
        new = submission.Submission(spec(**overrides), owner=owner, idempotency_key=key, body_sha256=body, hold_epoch=hold_epoch)
        return submission.submit(tx, new).job_id


def claim(store: Store, offer: Offer = OFFER) -> Claim | None:
    with store.write() as tx:
        return claims.claim(tx, offer)


def running(store: Store, **overrides: Any) -> Run:
    """A new job, claimed."""
    submit(store, **overrides)
    return claimed(store).run


def claimed(store: Store, offer: Offer = OFFER) -> Claim:
    found = claim(store, offer)
    assert found is not None, "nothing to claim"
    return found


def do(store: Store, action: Callable[..., T], *args: Any, **named: Any) -> T:
    """One write transaction around one call of the lifecycle."""
    with store.write() as tx:
        return action(tx, *args, **named)


def record(store: Store, run: Run, *messages: protocol.Message) -> JobState:
    return do(store, recording.record, run, messages)


def finish(store: Store, run: Run, outcome: Outcome = Outcome.SUCCEEDED, code: ReasonCode | None = None) -> JobState:
    return do(store, recording.finish, run, End(outcome, None if code is None else reason(code)))


def fail(store: Store, run: Run, code: ReasonCode = ReasonCode.CRASHED) -> JobState:
    return finish(store, run, Outcome.FAILED, code)


def reason(code: ReasonCode) -> Reason:
    return Reason(code, f"it was {code}", "try again", {"exit_code": 1})


def row(store: Store, job_id: str) -> Row[Any]:
    with store.read() as tx:
        found = tx.one(select(jobs).where(jobs.c.id == job_id))
    assert found is not None
    return found


def state(store: Store, job_id: str) -> JobState:
    return JobState(row(store, job_id).state)


def told(store: Store, job_id: str, kind: str | None = None) -> list[dict[str, Any]]:
    """The data of a job's events (of one type), oldest first."""
    with store.read() as tx:
        rows = tx.all(select(events).where(events.c.job_id == job_id).order_by(events.c.seq))
    return [found.data for found in rows if kind is None or found.type == kind]


def event_numbers(store: Store, job_id: str) -> list[int]:
    with store.read() as tx:
        return [found.seq for found in tx.all(select(events.c.seq).where(events.c.job_id == job_id).order_by(events.c.seq))]


def bring_to(store: Store, wanted: JobState, **overrides: Any) -> str:
    """A job in any state, reached by legal moves."""
    match wanted:
        case JobState.QUEUED:
            return submit(store, **overrides)
        case JobState.PAUSED:
            job_id = submit(store, **overrides)
            do(store, lifecycle.pause, job_id)
            return job_id
        case JobState.CANCELLED:
            job_id = submit(store, **overrides)
            do(store, lifecycle.cancel, job_id)
            return job_id
    run = running(store, **overrides)
    match wanted:
        case JobState.PAUSING:
            do(store, lifecycle.pause, run.job_id)
        case JobState.CANCELLING:
            do(store, lifecycle.cancel, run.job_id)
        case JobState.SUCCEEDED:
            finish(store, run)
        case JobState.FAILED:
            fail(store, run, ReasonCode.DIVERGED)
    return run.job_id


def plan(*, resumed_step: int = 0, epochs: int = 20, **overrides: Any) -> protocol.Plan:
    values: dict[str, Any] = {
        "steps": epochs * STEPS_PER_EPOCH,
        "epochs": epochs,
        "steps_per_epoch": STEPS_PER_EPOCH,
        "train_images": 1280,
        "val_images": 320,
        "test_images": 0,
        "classes": 10,
        "parameters": 1000,
        "precision": "fp32",
        "device": "cpu",
        "cpu_threads": 2,
        "determinism": "bitwise",
        "determinism_reason": "",
        "resumed_from": retention.checkpoint_id(resumed_step) if resumed_step else None,
        "resumed_step": resumed_step,
    }
    return protocol.Plan(**{**values, **overrides})


def step(number: int, loss: float | None = None) -> protocol.Step:
    value = 1.0 / number if loss is None else loss
    return protocol.Step(step=number, epoch=number / STEPS_PER_EPOCH, metrics={"train_loss": value}, images_per_s=100.0, eta_s=1.0)


def evaluation(number: int, top1: float | None) -> protocol.Evaluation:
    metrics = {"val_top1": top1, "val_loss": 1.0 if top1 is None else 1.0 - top1}
    return protocol.Evaluation(step=number, epoch=number // STEPS_PER_EPOCH, split="val", metrics=metrics)


def checkpoint(number: int, top1: float | None = None, *, attempt: int = 1) -> protocol.CheckpointWritten:
    return protocol.CheckpointWritten(
        id=retention.checkpoint_id(number),
        path=f"checkpoints/a{attempt}/{retention.checkpoint_id(number)}",
        step=number,
        epoch=number // STEPS_PER_EPOCH,
        metrics={"val_top1": top1},
        bytes=100,
        sha256="0" * 64,
        total_bytes=200,
        is_best=False,
    )


def at_once(works: list[Callable[[], T]]) -> list[T]:
    """Run every piece of work in its own thread, all starting together; their results, or the first one's exception."""
    gate = threading.Barrier(len(works))
    results: dict[int, T] = {}
    errors: list[Exception] = []

    def run(number: int, work: Callable[[], T]) -> None:
        gate.wait(timeout=30)
        try:
            results[number] = work()
        except Exception as error:  # noqa: BLE001 - raised again below, in the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number, work)) for number, work in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]
    return [results[number] for number in range(len(works))]
