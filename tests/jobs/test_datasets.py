"""Data sets as rows: versions, what a check leaves, uploads as debts, deletions; on both databases."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import select

from powergrad.jobs import datasets, debts, lifecycle, quotas, tasks, uploads
from powergrad.jobs.errors import (
    DatasetInUse,
    DatasetNotFound,
    Fenced,
    NameTaken,
    NotReady,
    QuotaExceeded,
    SamplesNotFound,
    UnknownReference,
    UploadLost,
)
from powergrad.jobs.rows import LOCAL_OWNER
from powergrad.jobs.states import JobState
from powergrad.jobs.store import Store
from powergrad.jobs.tables import deletions
from powergrad.jobs.uploads import VOUCHED_S, Added, Upload
from tests.jobs import builders as b
from tests.stores import FakeClock

VERSION = "sha256:" + "1" * 64
OTHER = "sha256:" + "2" * 64


def sent(store: Store, *, version: str = VERSION, owner: str = LOCAL_OWNER, name: str = "flowers", size: int = 1000) -> Added:
    upload_id = b.do(store, uploads.begin, name, owner=owner)
    return b.do(store, uploads.accept, Upload(upload_id, owner, name, version, 12, size))


def result(version: str = VERSION, **changes: Any) -> dict[str, Any]:
    report = {"classes": 3, "splits": {"train": 12}, "stamp": "seen"}
    return {"state": "ready", "error": None, "version": version, "files": 12, "bytes": 1000, "report": report} | changes


def check(store: Store, found: dict[str, Any] | None = None) -> tasks.Task:
    """Do the check that waits."""
    task = b.do(store, tasks.claim, lease_s=30, long=True)
    assert task is not None, "no check waits"
    b.do(store, tasks.finish, task, found or result())
    return task


def ready(store: Store, **sending: Any) -> str:
    added = sent(store, **sending)
    check(store, result(added.version))
    return added.dataset_id


def shown(store: Store, name: str = "flowers", *, owner: str = LOCAL_OWNER, version: str | None = None) -> dict[str, Any]:
    with store.read() as tx:
        return datasets.get(tx, name, version=version, owner=owner)


def owed(store: Store) -> set[str]:
    with store.read() as tx:
        return {row.path for row in tx.all(select(deletions.c.path).where(debts.due(tx)))}


def test_an_upload_goes_from_checking_to_ready(store: Store) -> None:
    added = sent(store)
    assert added.checks
    assert (shown(store)["state"], shown(store)["current"]) == ("checking", None)
    task = check(store)
    assert task.arguments == {
        "path": f"uploads/{added.dataset_id}/tree", "source": "uploaded", "skip_unreadable": False, "bytes": 1000, "files": 12,
        "samples": f"samples/{added.dataset_id}",
    }  # fmt: skip
    found = shown(store)
    assert (found["state"], found["current"], found["classes"]) == ("ready", VERSION, 3)
    assert owed(store) == {f"tasks/{task.id}"}


def test_a_check_that_ends_by_an_error_fails_the_set(store: Store) -> None:
    sent(store)
    task = b.do(store, tasks.claim, lease_s=30, long=True)
    b.do(store, tasks.fail, task, "out_of_memory_host", "too large")
    assert (shown(store)["state"], shown(store)["error"]) == ("failed", {"code": "out_of_memory_host", "detail": "too large"})


def test_three_lost_workers_fail_the_set_and_the_same_files_start_anew(store: Store, clock: FakeClock) -> None:
    first = sent(store)
    for _ in range(tasks.MAX_ATTEMPTS):
        assert b.do(store, tasks.claim, lease_s=30, long=True) is not None
        clock.advance(31)
        b.do(store, tasks.sweep)
    assert (shown(store)["state"], shown(store)["error"]["code"]) == ("failed", "worker_lost")
    again = sent(store)
    assert (again.dataset_id, again.checks) == (first.dataset_id, True)
    check(store)
    assert shown(store)["state"] == "ready"


def test_a_late_check_of_a_task_that_was_taken_over_changes_nothing(store: Store, clock: FakeClock) -> None:
    sent(store)
    late = b.do(store, tasks.claim, lease_s=30, long=True)
    assert late is not None
    clock.advance(31)
    b.do(store, tasks.sweep)
    check(store)
    with pytest.raises(Fenced):
        b.do(store, tasks.fail, late, "crashed", "x")
    assert shown(store)["state"] == "ready"


def test_a_renewed_task_is_kept_and_one_given_back_waits(store: Store, clock: FakeClock) -> None:
    sent(store)
    task = b.do(store, tasks.claim, lease_s=30, long=True)
    assert task is not None
    for _ in range(5):
        clock.advance(20)
        b.do(store, tasks.renew, task, lease_s=30)
    assert b.do(store, tasks.sweep) == []
    b.do(store, tasks.give_back, task)
    with pytest.raises(Fenced):
        b.do(store, tasks.renew, task, lease_s=30)
    assert check(store).attempt == 2


def test_checks_and_other_tasks_do_not_take_each_others_lane(store: Store) -> None:
    sent(store)
    with store.read() as tx:
        assert (tasks.has_work(tx), tasks.has_work(tx, long=True)) == (False, True)
    assert b.do(store, tasks.claim, lease_s=30) is None
    with store.write() as tx:
        tasks.submit(tx, tasks.new_id(tx), "predict", {})
    short, long = b.do(store, tasks.claim, lease_s=30), b.do(store, tasks.claim, lease_s=30, long=True)
    assert (getattr(short, "kind", None), getattr(long, "kind", None)) == ("predict", "check_dataset")


def test_the_same_files_at_once_are_one_version(store: Store) -> None:
    ids = [b.do(store, uploads.begin, "flowers", owner=LOCAL_OWNER) for _ in range(5)]
    added = b.at_once([lambda i=i: b.do(store, uploads.accept, Upload(i, LOCAL_OWNER, "flowers", VERSION, 12, 1000)) for i in ids])  # type: ignore[misc]
    assert sum(one.checks for one in added) == 1
    assert len({one.dataset_id for one in added}) == 1
    assert len(owed(store)) == 4
    check(store)
    assert b.do(store, tasks.claim, lease_s=30, long=True) is None


def test_another_owner_has_a_set_of_his_own(store: Store) -> None:
    ready(store)
    with pytest.raises(DatasetNotFound):
        shown(store, owner="ann")
    assert sent(store, owner="ann").checks
    with store.read() as tx:
        assert [one["name"] for one in datasets.listed(tx, "ann")] == ["flowers"]
        assert datasets.listed(tx, "bob") == []
    with pytest.raises(DatasetNotFound):
        b.do(store, datasets.remove, "flowers", owner="bob")


# --- uploads


def test_an_upload_that_nobody_vouches_for_is_lost(store: Store, clock: FakeClock) -> None:
    upload_id = b.do(store, uploads.begin, "flowers", owner=LOCAL_OWNER)
    for _ in range(3):
        clock.advance(VOUCHED_S - 1)
        b.do(store, uploads.go_on, upload_id)
    assert owed(store) == set()
    clock.advance(VOUCHED_S)
    assert owed(store) == {f"uploads/{upload_id}"}
    with pytest.raises(UploadLost):
        b.do(store, uploads.go_on, upload_id)
    with pytest.raises(UploadLost):
        b.do(store, uploads.accept, Upload(upload_id, LOCAL_OWNER, "flowers", VERSION, 12, 1000))
    with pytest.raises(DatasetNotFound):
        shown(store)


def test_an_upload_that_is_accepted_is_owed_no_more(store: Store, clock: FakeClock) -> None:
    sent(store)
    clock.advance(2 * VOUCHED_S)
    assert owed(store) == set()


def test_names_of_built_in_sets_are_taken(store: Store) -> None:
    for taken in ("digits", "imagenet", "cifar10"):
        with pytest.raises(NameTaken):
            b.do(store, uploads.begin, taken, owner=LOCAL_OWNER)
        with pytest.raises(NameTaken):
            b.do(store, uploads.register, taken, "folder", owner=LOCAL_OWNER)


def test_a_quota_holds_at_the_beginning_and_at_the_end(store: Store) -> None:
    b.do(store, quotas.grant, "ann", quotas.Quota(max_bytes=1500))
    with pytest.raises(QuotaExceeded):
        b.do(store, uploads.begin, "flowers", owner="ann", bytes_announced=1501)
    sent(store, owner="ann", size=1000)
    with pytest.raises(QuotaExceeded):
        sent(store, owner="ann", version=OTHER, size=501)
    assert not sent(store, owner="ann", size=1000).checks, "the same files take no more room"
    sent(store, owner="ann", version=OTHER, size=500)


# --- folders


def registered(store: Store, path: str = "garden") -> Added:
    return b.do(store, uploads.register, "flowers", path, owner=LOCAL_OWNER)


def test_a_folders_version_is_known_when_it_has_been_read(store: Store) -> None:
    added = registered(store)
    assert (shown(store)["version"], shown(store)["source"], shown(store)["path"]) == (None, "registered", "garden")
    assert registered(store) == Added(added.dataset_id, added.version, checks=False)
    check(store)
    found = shown(store)
    assert (found["version"], found["state"], found["files"]) == (VERSION, "ready", 12)
    with store.read() as tx:
        place = datasets.place(tx, added.dataset_id)
    assert place == datasets.Place("garden", is_uploaded=False, stamp="seen")


def test_an_unchanged_folder_stays_one_version_with_a_new_stamp(store: Store) -> None:
    added = registered(store)
    check(store)
    assert registered(store).checks
    check(store, result(report={"stamp": "seen again", "classes": 3, "splits": {}}))
    assert len(shown(store)["versions"]) == 1
    with store.read() as tx:
        place = datasets.place(tx, added.dataset_id)
    assert place is not None
    assert place.stamp == "seen again"


def test_a_changed_folder_takes_the_place_of_what_it_was(store: Store) -> None:
    registered(store)
    check(store)
    registered(store)
    check(store, result(OTHER))
    found = shown(store)
    assert [(one["version"], one["state"]) for one in found["versions"]] == [(OTHER, "ready"), (VERSION, "failed")]
    assert found["versions"][1]["error"]["code"] == "changed"
    registered(store)
    check(store, result(VERSION))
    assert shown(store, version=VERSION)["state"] == "ready", "what was put back is what it was"


def test_a_folder_that_failed_can_be_registered_again_without_a_trace(store: Store) -> None:
    registered(store)
    task = b.do(store, tasks.claim, lease_s=30, long=True)
    b.do(store, tasks.fail, task, "data_missing", "empty")
    registered(store)
    check(store)
    assert [one["state"] for one in shown(store)["versions"]] == ["ready"]


def test_a_folder_with_files_that_were_uploaded_stays_the_upload(store: Store) -> None:
    ready(store)
    registered(store)
    check(store)
    assert [one["source"] for one in shown(store)["versions"]] == ["uploaded"]


# --- jobs


def submit(store: Store, **data: Any) -> str:
    return b.submit(store, data={"dataset": "flowers", **data})


def test_a_job_pins_the_newest_version_that_is_ready(store: Store, clock: FakeClock) -> None:
    ready(store)
    clock.advance(1)
    sent(store, version=OTHER)
    job = submit(store)
    assert b.row(store, job).spec["data"]["version"] == VERSION
    with pytest.raises(NotReady):
        submit(store, version=OTHER)
    check(store, result(OTHER))
    assert b.row(store, submit(store)).spec["data"]["version"] == OTHER
    with pytest.raises(UnknownReference):
        submit(store, version="sha256:" + "3" * 64)


def test_a_set_stays_while_a_job_needs_it(store: Store) -> None:
    dataset_id = ready(store)
    job = submit(store)
    claim = b.claimed(store)
    assert claim.dataset == datasets.Place(f"uploads/{dataset_id}/tree", is_uploaded=True)
    with pytest.raises(DatasetInUse) as refused:
        b.do(store, datasets.remove, "flowers", owner=LOCAL_OWNER)
    assert refused.value.job_id == job
    b.finish(store, claim.run)
    b.do(store, datasets.remove, "flowers", owner=LOCAL_OWNER)
    assert f"uploads/{dataset_id}" in owed(store)
    assert b.state(store, job) is JobState.SUCCEEDED
    with pytest.raises(UnknownReference):
        submit(store)


def test_only_the_version_that_a_job_needs_stays(store: Store, clock: FakeClock) -> None:
    ready(store)
    clock.advance(1)
    submit(store)
    ready(store, version=OTHER)
    b.do(store, datasets.remove, "flowers", version=OTHER, owner=LOCAL_OWNER)
    with pytest.raises(DatasetInUse):
        b.do(store, datasets.remove, "flowers", version=VERSION, owner=LOCAL_OWNER)


def test_a_set_that_is_being_checked_goes_with_its_task(store: Store) -> None:
    added = sent(store)
    task = b.do(store, tasks.claim, lease_s=30, long=True)
    b.do(store, datasets.remove, "flowers", owner=LOCAL_OWNER)
    assert owed(store) == {f"uploads/{added.dataset_id}", f"tasks/{task.id}"} if task else False
    with pytest.raises(Fenced):
        b.do(store, tasks.finish, task, result())


def test_deleting_a_registered_set_owes_nothing_of_the_folder(store: Store) -> None:
    added = registered(store)
    task = check(store)
    b.do(store, datasets.remove, "flowers", owner=LOCAL_OWNER)
    assert owed(store) == {f"tasks/{task.id}", f"samples/{added.dataset_id}"}


DRAWN = {"tile": 64, "columns": 8, "splits": {"train": {"bytes": 3, "sha256": "0" * 64, "rows": [["daisy", 4], ["rose", 2]]}}}


def drawn(path: str) -> dict[str, Any]:
    found = result(samples={**DRAWN, "path": path})
    found["report"] |= {"class_counts": {"daisy": {"train": 6}, "rose": {"train": 2}, "tulip": {"train": 4}}}
    return found


def samples_of(store: Store, **asked: Any) -> datasets.Sheet:
    with store.read() as tx:
        return datasets.samples(tx, "flowers", **{"split": "train", "owner": LOCAL_OWNER, **asked})


def test_samples_are_those_of_the_version_that_is_ready(store: Store) -> None:
    added = sent(store)
    with pytest.raises(SamplesNotFound, match="still being checked"):
        samples_of(store)
    check(store, drawn(f"samples/{added.dataset_id}"))
    found = samples_of(store)
    assert (found.path, found.bytes) == (f"samples/{added.dataset_id}/train.png", 3)
    assert found.shown["classes"] == [
        {"label": "daisy", "count": 6, "samples": 4, "row": 0},
        {"label": "rose", "count": 2, "samples": 2, "row": 1},
    ]
    assert (found.shown["more_classes"], found.shown["version"]) == (1, VERSION)
    assert "samples" not in shown(store)["report"], "they have a place of their own"
    with pytest.raises(SamplesNotFound, match="no images in val, only in train"):
        samples_of(store, split="val")
    with pytest.raises(DatasetNotFound):
        samples_of(store, owner="ann")
    with pytest.raises(DatasetNotFound):
        samples_of(store, version=OTHER)


def test_a_set_that_an_older_release_checked_has_no_samples(store: Store) -> None:
    ready(store)
    with pytest.raises(SamplesNotFound, match="upload or register it anew"):
        samples_of(store)


def test_a_folder_that_is_registered_again_has_the_newer_samples_and_owes_the_older(store: Store) -> None:
    first = registered(store)
    check(store, drawn(f"samples/{first.dataset_id}"))
    second = registered(store)
    check(store, drawn(f"samples/{second.dataset_id}"))
    assert samples_of(store).path == f"samples/{second.dataset_id}/train.png"
    assert f"samples/{first.dataset_id}" in owed(store)
    assert f"samples/{second.dataset_id}" not in owed(store)
    b.do(store, datasets.remove, "flowers", owner=LOCAL_OWNER)
    assert f"samples/{second.dataset_id}" in owed(store)


def test_what_a_check_draws_of_a_set_that_is_gone_is_freed_in_the_end(store: Store, clock: FakeClock) -> None:
    added = sent(store)
    assert b.do(store, tasks.claim, lease_s=30, long=True) is not None
    b.do(store, datasets.remove, "flowers", owner=LOCAL_OWNER)
    assert f"samples/{added.dataset_id}" not in owed(store), "it is being drawn"
    clock.advance(datasets.CHECKED_WITHIN_S)
    assert f"samples/{added.dataset_id}" in owed(store)


def test_a_submission_and_a_deletion_at_once_leave_no_job_without_its_set(store: Store) -> None:
    def submitted() -> str:
        try:
            return submit(store)
        except UnknownReference:
            return "refused"

    def removed() -> str:
        try:
            b.do(store, datasets.remove, "flowers", owner=LOCAL_OWNER)
        except DatasetInUse:
            return "in use"
        return "gone"

    for _ in range(10):
        ready(store)
        job, end = b.at_once([submitted, removed])
        assert (job == "refused") == (end == "gone")
        if job != "refused":
            b.do(store, lifecycle.cancel, job)
            b.do(store, datasets.remove, "flowers", owner=LOCAL_OWNER)
