"""Tasks: claimed once, fenced, given back when their worker is lost, forgotten after a day; on both databases."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import select

from powergrad.jobs import lifecycle, rows, tasks
from powergrad.jobs.artifacts import Artifacts
from powergrad.jobs.errors import Fenced, TaskNotFound
from powergrad.jobs.store import Store
from powergrad.jobs.sweeper import sweep_once
from powergrad.jobs.tables import deletions
from tests.jobs import builders as b
from tests.stores import FakeClock

LEASE_S = 90.0


def submit(store: Store, *, owner: str = rows.LOCAL_OWNER, job_id: str | None = None, **arguments: Any) -> str:
    with store.write() as tx:
        task_id = tasks.new_id(tx)
        tasks.submit(tx, task_id, "predict", arguments, owner=owner, job_id=job_id)
    return task_id


def claim(store: Store) -> tasks.Task | None:
    return b.do(store, tasks.claim, lease_s=LEASE_S)


def claimed(store: Store) -> tasks.Task:
    found = claim(store)
    assert found is not None, "nothing to claim"
    return found


def shown(store: Store, task_id: str) -> dict[str, Any]:
    with store.read() as tx:
        return tasks.get(tx, task_id)


def owed(store: Store) -> list[str]:
    with store.read() as tx:
        return [row.path for row in tx.all(select(deletions.c.path))]


def test_a_task_goes_from_queued_to_its_result(store: Store) -> None:
    task_id = submit(store, top=3)
    assert shown(store, task_id)["state"] == "queued"
    task = claimed(store)
    assert (task.id, task.kind, task.arguments, task.attempt) == (task_id, "predict", {"top": 3}, 1)
    assert shown(store, task_id)["state"] == "running"
    b.do(store, tasks.finish, task, {"answer": 42})
    found = shown(store, task_id)
    assert (found["state"], found["result"], found["error"]) == ("succeeded", {"answer": 42}, None)
    assert found["finished_at"] is not None
    assert owed(store) == [f"tasks/{task_id}"]


def test_a_failure_keeps_its_code(store: Store) -> None:
    task_id = submit(store)
    b.do(store, tasks.fail, claimed(store), "data_unreadable", "no image")
    found = shown(store, task_id)
    assert (found["state"], found["error"]) == ("failed", {"code": "data_unreadable", "detail": "no image"})


def test_the_oldest_is_taken_first_and_each_by_one_worker(store: Store, clock: FakeClock) -> None:
    made = []
    for _ in range(6):
        made.append(submit(store))
        clock.advance(0.01)
    assert claimed(store).id == made[0]
    taken = b.at_once([lambda: claim(store) for _ in range(5)])
    assert sorted(task.id for task in taken if task is not None) == made[1:]
    assert claim(store) is None


def test_a_lost_workers_task_goes_back_and_its_late_answer_is_dropped(store: Store, clock: FakeClock) -> None:
    task_id = submit(store)
    late = claimed(store)
    clock.advance(LEASE_S + 1)
    assert b.do(store, tasks.sweep) == [task_id]
    again = claimed(store)
    assert again.attempt == 2
    with pytest.raises(Fenced):
        b.do(store, tasks.finish, late, {})
    b.do(store, tasks.finish, again, {"by": "the second"})
    assert shown(store, task_id)["result"] == {"by": "the second"}


def test_after_three_lost_workers_it_fails(store: Store, clock: FakeClock) -> None:
    task_id = submit(store)
    for _ in range(tasks.MAX_ATTEMPTS):
        claimed(store)
        clock.advance(LEASE_S + 1)
        b.do(store, tasks.sweep)
    assert claim(store) is None
    found = shown(store, task_id)
    assert (found["state"], found["attempt"], found["error"]["code"]) == ("failed", 3, "worker_lost")


def test_many_sweepers_give_a_task_back_once(store: Store, clock: FakeClock) -> None:
    submit(store)
    claimed(store)
    clock.advance(LEASE_S + 1)
    assert sum(len(again) for again in b.at_once([lambda: b.do(store, tasks.sweep) for _ in range(5)])) == 1


def test_tasks_are_forgotten_after_a_day_with_their_files(store: Store, clock: FakeClock, tmp_path: Any) -> None:
    waiting, working = submit(store), submit(store)
    artifacts = Artifacts(str(tmp_path))
    artifacts.write(f"tasks/{waiting}/image", b"x")
    clock.advance(tasks.KEPT_S - 10)
    assert claimed(store).id in (waiting, working)
    with store.read() as tx:
        assert not tasks.needs_sweep(tx)
    clock.advance(11)
    sweep_once(store, artifacts, lambda: None)
    left = [one for one in (waiting, working) if _exists(store, one)]
    assert len(left) == 1  # the one at work
    assert shown(store, left[0])["state"] == "running"
    assert (tmp_path / "tasks" / waiting).exists() == (waiting in left)


def _exists(store: Store, task_id: str) -> bool:
    try:
        return bool(shown(store, task_id))
    except TaskNotFound:
        return False


def test_another_owners_task_is_not_there(store: Store) -> None:
    task_id = submit(store, owner="ann")
    with pytest.raises(TaskNotFound):
        shown(store, task_id)


def test_deleting_a_job_deletes_its_tasks(store: Store) -> None:
    run = b.running(store)
    task_id = submit(store, job_id=run.job_id)
    task = claimed(store)
    b.finish(store, run)
    b.do(store, lifecycle.remove, run.job_id)
    assert not _exists(store, task_id)
    assert f"tasks/{task_id}" in owed(store)
    with pytest.raises(Fenced):
        b.do(store, tasks.finish, task, {})
