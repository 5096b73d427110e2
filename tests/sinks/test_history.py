"""The times of points: when what has survived was stored."""

from __future__ import annotations

from sqlalchemy import update

from powergrad import protocol
from powergrad.jobs import metrics
from powergrad.jobs.rows import Run
from powergrad.jobs.store import Store
from powergrad.jobs.tables import events
from powergrad.sinks import history
from tests.jobs import builders as b


def test_a_point_has_the_time_at_which_it_was_stored(store: Store) -> None:
    run = b.running(store)
    b.record(store, run, b.plan(), b.step(1), b.step(2))
    b.record(store, run, b.step(3), b.evaluation(3, 0.5))
    assert stored_as(store, run) == {1: 0, 2: 0, 3: 1}


def test_what_was_rolled_back_has_left_no_trace(store: Store) -> None:
    run = b.running(store)
    b.record(store, run, b.plan(), b.step(1), b.step(2), b.step(3))
    b.record(store, run, rolled_back(to_step=2))
    b.record(store, run, b.step(3, 7.0))
    b.record(store, run, b.step(4))
    found = read(store, run)
    assert found.series["train_loss"] == [(1, 1.0), (2, 0.5), (3, 7.0), (4, 0.25)]
    assert stored_as(store, run) == {1: 0, 2: 0, 3: 1, 4: 2}


def test_a_roll_back_to_the_begin_leaves_nothing(store: Store) -> None:
    run = b.running(store)
    b.record(store, run, b.plan(), b.step(1), b.step(2))
    b.record(store, run, rolled_back(to_step=0))
    assert read(store, run).series == {}
    b.record(store, run, b.step(1, 3.0))
    assert stored_as(store, run) == {1: 1}


def test_only_what_comes_after_is_read(store: Store) -> None:
    run = b.running(store)
    b.record(store, run, b.plan(), b.step(1), b.step(2), b.step(3), b.evaluation(3, None))
    with store.read() as tx:
        found = history.read(tx, run.job_id, after={"train_loss": 2, "images_per_s": 3})
    assert {name: series for name, series in found.series.items() if series} == {
        "train_loss": [(3, 1 / 3)],
        "val_loss": [(3, 1.0)],
        "val_top1": [(3, None)],
    }


def test_a_spec_is_flattened_to_its_leaves() -> None:
    assert history.flat({"loss": {"alpha": 0.5, "weights": [1, 2]}, "ema": None}) == {
        "loss.alpha": 0.5,
        "loss.weights": [1, 2],
        "ema": None,
    }


def read(store: Store, run: Run) -> history.History:
    with store.read() as tx:
        return history.read(tx, run.job_id)


def stored_as(store: Store, run: Run) -> dict[int, int]:
    """For each surviving step: by which `metrics` event, counted from 0, it is said to have been stored."""
    with store.write() as tx:
        query = update(events).where(events.c.job_id == run.job_id, events.c.type == "metrics").values(at=1000 + events.c.seq)
        stamps = sorted(row.at for row in tx.all(query.returning(events.c.at)))
        found = history.read(tx, run.job_id)
        steps = {step for name in metrics.names(tx, run.job_id) for step in metrics.read(tx, run.job_id, name).steps}
    return {step: stamps.index(found.times.at_ms(step)) for step in sorted(steps)}


def rolled_back(*, to_step: int) -> protocol.RolledBack:
    return protocol.RolledBack(from_step=3, to_step=to_step, checkpoint=f"step-{to_step:08d}", lr_scale=0.5, detail="exploded")
