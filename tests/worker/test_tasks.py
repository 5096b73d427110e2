"""Tasks in a real worker: claimed beside its slots, run in limited children, their ends told apart."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from powergrad.jobs import tasks
from powergrad.jobs.tables import tasks as rows
from tests.worker.conftest import Place, until
from worker import tasks as running

ERRANDS = ("look_around", "refuse", "blunder", "die", "devour", "spin", "hang", "babble")


@pytest.fixture(autouse=True)
def kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ERRANDS:
        monkeypatch.setitem(running.KINDS, name, running.Kind(f"tests.worker.errands:{name}"))


def submit(place: Place, kind: str, **arguments: Any) -> str:
    with place.store.write() as tx:
        task_id = tasks.new_id(tx)
        tasks.submit(tx, task_id, kind, arguments)
    place.service.artifacts.write(f"{tasks.task_dir(task_id)}/image", b"input")
    place.service.tasks.wake()
    return task_id


def ended(place: Place, task_id: str) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        with place.store.read() as tx:
            task = tasks.get(tx, task_id)
        return task if task["finished_at"] else None

    found: dict[str, Any] = until(look)
    return found


def test_a_child_has_its_arguments_and_its_limits(place: Place) -> None:
    task = ended(place, submit(place, "look_around", size=3))
    assert (task["state"], task["attempt"], task["error"]) == ("succeeded", 1, None)
    found = task["result"]
    assert found["arguments"] == {"size": 3}
    assert Path(found["root"]) == place.service.settings.data_dir
    assert (found["nice"], found["own_group"], found["gpus"]) == (10, True, "")
    assert found["pid"] not in (os.getpid(), 0)


@pytest.mark.parametrize(
    ("kind", "code", "said"),
    [
        ("refuse", "data_unreadable", "the image: is none"),
        ("blunder", "crashed", "RuntimeError: a defect"),
        ("die", "crashed", "SIGKILL"),
        ("devour", "out_of_memory_host", ""),
        ("babble", "internal", "more than 4,194,304 bytes"),
        ("unheard_of", "internal", "'unheard_of'"),
    ],
)
def test_a_childs_end_is_told_and_the_worker_goes_on(place: Place, kind: str, code: str, said: str) -> None:
    task = ended(place, submit(place, kind))
    assert (task["state"], task["result"], task["error"]["code"]) == ("failed", None, code)
    assert said in task["error"]["detail"]
    assert ended(place, submit(place, "look_around"))["state"] == "succeeded"


def test_a_child_that_computes_too_long_is_ended(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(running.KINDS, "spin", running.Kind("tests.worker.errands:spin", cpu_s=1))
    error = ended(place, submit(place, "spin"))["error"]
    assert (error["code"], error["detail"]) == ("deadline", "it took more than 1 s of processor time")


def test_a_child_that_hangs_is_killed_with_its_own_children(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "DEADLINE_S", 1.0)
    error = ended(place, submit(place, "hang"))["error"]
    assert (error["code"], error["detail"]) == ("deadline", "it took longer than 1 s")
    group = int((place.service.settings.data_dir / "tasks" / "hanging").read_text())
    until(lambda: not _is_there(group))


def _is_there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_files_of_a_task_go_with_its_end(place: Place) -> None:
    task_id = submit(place, "look_around")
    ended(place, task_id)
    until(lambda: not (place.service.settings.data_dir / tasks.task_dir(task_id)).exists())


def test_a_task_runs_though_every_slot_is_taken(place: Place) -> None:
    jobs = [place.submit(epochs=1000) for _ in range(2)]
    for job in jobs:
        place.until_step(job, 1)
    assert ended(place, submit(place, "look_around"))["state"] == "succeeded"
    assert all(place.job(job)["state"] == "running" for job in jobs)
    cancel(place, jobs)


def cancel(place: Place, jobs: list[str]) -> None:
    from powergrad.jobs import lifecycle

    for job in jobs:
        with place.store.write() as tx:
            lifecycle.cancel(tx, job)
        place.until_state(job, "cancelled")


@pytest.fixture(scope="module")
def trained(place: Place) -> str:
    job = place.submit(epochs=1)
    assert place.until_state(job, "succeeded", "failed")["state"] == "succeeded"
    return job


def test_a_run_leaves_what_a_prediction_needs(place: Place, trained: str) -> None:
    from powergrad.jobs import queries

    with place.store.read() as tx:
        found = {name: queries.find_artifact(tx, trained, name) for name in ("labels.json", "preprocessing.json")}
    folder = place.service.settings.data_dir / "jobs" / trained
    assert json.loads((folder / found["labels.json"].path).read_text()) == [str(i) for i in range(10)]
    assert json.loads((folder / found["preprocessing.json"].path).read_text())["image_size"] == 8


# --- the long lane


@pytest.fixture
def lingering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(running.KINDS, "check_dataset", running.Kind("tests.worker.errands:linger", lambda _: 600.0))
    monkeypatch.setattr(running, "RENEW_S", 0.2)
    monkeypatch.setattr(running, "LONG_LEASE_S", 3.0)


def starts(place: Place, name: str) -> list[int]:
    noted = place.service.settings.data_dir / "tasks" / f"{name}-starts"
    return [int(line) for line in noted.read_text().split()] if noted.exists() else []


def stop(place: Place, name: str) -> None:
    (place.service.settings.data_dir / "tasks" / f"{name}-stop").touch()


@pytest.mark.usefixtures("lingering")
def test_a_long_task_holds_up_no_short_one_and_keeps_its_lease(place: Place) -> None:
    long = submit(place, "check_dataset", name="slow")
    until(lambda: starts(place, "slow"))
    lease = lease_of(place, long)
    assert ended(place, submit(place, "look_around"))["state"] == "succeeded"
    until(lambda: lease_of(place, long) > lease + 3000)  # renewed past what it was given at first
    assert len(starts(place, "slow")) == 1
    stop(place, "slow")
    found = ended(place, long)
    assert (found["state"], found["attempt"]) == ("succeeded", 1)


def lease_of(place: Place, task_id: str) -> int:
    with place.store.read() as tx:
        row = tx.one(select(rows.c.lease_until).where(rows.c.id == task_id))
    assert row is not None
    return int(row.lease_until)


@pytest.mark.usefixtures("lingering")
def test_a_long_task_whose_row_is_taken_away_is_killed(place: Place) -> None:
    task_id = submit(place, "check_dataset", name="fenced")
    until(lambda: starts(place, "fenced"))
    with place.store.write() as tx:
        tx.run(rows.delete().where(rows.c.id == task_id))
    (pid,) = starts(place, "fenced")
    until(lambda: not _is_there(pid))
    after = submit(place, "check_dataset", name="after")
    stop(place, "after")
    assert ended(place, after)["state"] == "succeeded"


@pytest.mark.usefixtures("lingering")
def test_a_drained_workers_long_task_goes_to_another_at_once(place: Place) -> None:
    task_id = submit(place, "check_dataset", name="handed")
    until(lambda: starts(place, "handed"))
    first, second = place.service.tasks, running.TaskRunner(place.store, place.service.artifacts, place.service.template, threading.Event())
    first.stop()
    try:
        with place.store.read() as tx:
            assert tasks.get(tx, task_id)["state"] == "queued"
        second.start()
        until(lambda: len(starts(place, "handed")) == 2)
        stop(place, "handed")
        assert ended(place, task_id)["attempt"] == 2
    finally:
        second.stop()
        first.start()


def test_limits_of_a_check_grow_with_the_set_to_two_hours() -> None:
    assert running.check_s({"bytes": 1 << 20, "files": 100}) == 62.0
    assert running.check_s({"bytes": 1 << 40, "files": 1}) == 7200.0
    assert running.check_s({"bytes": 0, "files": 0}) == 7200.0, "a folder of unknown size"
