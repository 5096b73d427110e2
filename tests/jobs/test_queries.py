"""What is shown of jobs: pages, filters, ETags, and the indexes that make them cheap."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import event, text, update

from powergrad import protocol
from powergrad.jobs import claims, fleet, lifecycle, queries, recording, rows, submission, sweeps
from powergrad.jobs.errors import CheckpointNotFound, JobNotFound
from powergrad.jobs.lifecycle import Amendment, RaisedLimits
from powergrad.jobs.queries import Filter
from powergrad.jobs.states import JobState, Outcome, ReasonCode
from powergrad.jobs.store import Store
from powergrad.jobs.tables import jobs
from tests.jobs import builders as b
from tests.stores import FakeClock


def walk(store: Store, wanted: Filter | None = None, *, limit: int = 2, sort: str | None = None) -> list[str]:
    """Ids of all pages, one after the other."""
    ids: list[str] = []
    while True:
        with store.read() as tx:
            page = queries.page(tx, wanted or Filter(), limit=limit, after=ids[-1] if ids else None, sort=sort)
        ids += [job["id"] for job in page.data]
        assert len(page.data) <= limit
        if not page.has_more:
            return ids
        assert len(page.data) == limit


def get(store: Store, job_id: str) -> dict[str, Any]:
    with store.read() as tx:
        return queries.get(tx, job_id)


def submit_many(store: Store, clock: FakeClock, count: int) -> list[str]:
    ids = []
    for _ in range(count):
        ids.append(b.submit(store))
        clock.advance(1)
    return ids


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8])
def test_pages_are_newest_first_and_whole(store: Store, clock: FakeClock, limit: int) -> None:
    ids = submit_many(store, clock, 7)
    assert walk(store, limit=limit) == ids[::-1]


def test_a_page_does_not_move_when_new_jobs_come(store: Store, clock: FakeClock) -> None:
    ids = submit_many(store, clock, 4)
    with store.read() as tx:
        first = queries.page(tx, Filter(), limit=2)
    submit_many(store, clock, 3)
    with store.read() as tx:
        second = queries.page(tx, Filter(), limit=2, after=first.data[-1]["id"])
    assert [job["id"] for job in first.data + second.data] == ids[::-1]


@pytest.mark.parametrize("sort", ["-metrics.val_top1", "metrics.val_top1"])
def test_sorting_by_a_metric_pages_through_ties_and_missing_values(store: Store, clock: FakeClock, sort: str) -> None:
    scores = [0.1 + 0.2, None, 0.3, 0.5, 0.3, None, 0.5, 1e-17, None, 0.3]
    ids = submit_many(store, clock, len(scores))
    with store.write() as tx:
        for job_id, score in zip(ids, scores, strict=True):
            best = {} if score is None else {"val_top1": score}
            tx.run(update(jobs).where(jobs.c.id == job_id).values(best=best if job_id != ids[1] else {"val_top1": None}))
    sign = -1 if sort.startswith("-") else 1
    order = sorted(range(len(ids)), key=lambda i: -i)  # newest first among equals: Python's sort is stable
    order.sort(key=lambda i: (scores[i] is None, sign * (scores[i] or 0.0)))
    for limit in (1, 3, 20):
        assert walk(store, limit=limit, sort=sort) == [ids[i] for i in order]


@pytest.mark.parametrize("sort", ["val_top1", "--metrics.x", 'metrics."', "metrics.", "-metrics.a b", "metrics.x'; drop"])
def test_a_sort_that_is_not_known_is_refused(store: Store, sort: str) -> None:
    with store.read() as tx, pytest.raises(ValueError, match=r"must be metrics\.NAME"):
        queries.page(tx, Filter(), limit=1, sort=sort)


def test_a_sorted_page_after_anothers_job_is_not_found(store: Store) -> None:
    job_id = b.submit(store, owner="ada")
    with store.read() as tx, pytest.raises(JobNotFound):
        queries.page(tx, Filter(), limit=1, sort="-metrics.val_top1", after=job_id)


def test_filters(store: Store, clock: FakeClock) -> None:
    first = b.submit(store, name="Alpha_1", labels={"team": "vision", "arm": "a"})
    clock.advance(10)
    second = b.submit(store, name="beta", labels={"team": "vision", "arm": "b"})
    clock.advance(10)
    third = b.submit(store, name="alpha%2".replace("%", "-"))
    b.do(store, lifecycle.cancel, third)
    b.submit(store, owner="another", name="alpha")
    created = {job_id: b.row(store, job_id).created_at for job_id in (first, second, third)}
    cases: list[tuple[Filter, list[str]]] = [
        (Filter(), [third, second, first]),
        (Filter(states=[JobState.QUEUED]), [second, first]),
        (Filter(states=[JobState.CANCELLED, JobState.FAILED]), [third]),
        (Filter(states=[JobState.CANCELLED, JobState.QUEUED]), [third, second, first]),
        (Filter(labels={"team": "vision"}), [second, first]),
        (Filter(labels={"team": "vision", "arm": "b"}), [second]),
        (Filter(labels={"team": "b"}), []),
        (Filter(q="ALPHA"), [third, first]),
        (Filter(q="a_1"), [first]),
        (Filter(q="%"), []),
        (Filter(q=second[:20].lower()), [] if second[:20].lower() not in second.lower() else [second]),
        (Filter(created_after_ms=created[first]), [third, second]),
        (Filter(created_before_ms=created[third]), [second, first]),
        (Filter(experiment="exp_1"), []),
    ]
    for wanted, expected in cases:
        assert set(walk(store, wanted, limit=1)) >= set(expected), wanted
        if wanted.q != second[:20].lower():  # the start of an id may be shared by jobs of one moment
            assert walk(store, wanted, limit=1) == expected, wanted


def test_an_amended_label_is_what_is_found(store: Store) -> None:
    job_id = b.submit(store, labels={"team": "vision"})
    b.do(store, lifecycle.amend, job_id, Amendment(labels={"team": "audio"}))
    assert walk(store, Filter(labels={"team": "vision"})) == []
    assert walk(store, Filter(labels={"team": "audio"})) == [job_id]


def test_the_queue_position_counts_who_is_sooner(store: Store, clock: FakeClock) -> None:
    old, high = b.submit(store), b.submit(store, priority=9)
    clock.advance(1)
    young = b.submit(store)
    assert [get(store, job_id)["queue"]["position"] for job_id in (high, old, young)] == [1, 2, 3]
    b.claimed(store)
    assert [get(store, job_id)["queue"]["position"] for job_id in (high, old, young)] == [None, 1, 2]


def worker(gpus: int) -> fleet.WorkerInfo:
    return fleet.WorkerInfo(id=f"w{gpus}", host="h", pid=1, version="0", slots=[], devices=[], gpus=gpus)


def test_a_queued_job_says_what_it_waits_for(store: Store, clock: FakeClock) -> None:
    job_id = b.submit(store, resources={"gpus": 1})

    def waiting_for() -> str | None:
        found: str | None = get(store, job_id)["queue"]["waiting_for"]
        return found

    assert waiting_for() == "a worker: none is alive"
    b.do(store, fleet.register, worker(0), state="starting")
    assert waiting_for() == "a worker: it is still loading torch"
    b.do(store, fleet.register, worker(0))
    assert waiting_for() == "needs 1 GPU; the largest worker has none"
    b.do(store, fleet.register, worker(2))
    assert waiting_for() == "a free slot"
    run = b.claimed(store, b.OFFER.__class__("w2", "H100", 1, 4)).run
    assert waiting_for() is None
    b.fail(store, run)
    assert str(waiting_for()).startswith("the next attempt, not before 20")
    clock.advance(fleet.ALIVE_S + 1)
    assert waiting_for() == "a worker: none is alive"


# --- ETags

CHANGES: dict[str, Callable[[Store, rows.Run], Any]] = {
    "step": lambda store, run: b.record(store, run, b.step(1)),
    "evaluation": lambda store, run: b.record(store, run, b.evaluation(10, 0.5)),
    "phase": lambda store, run: b.record(store, run, protocol.Phase(name="training")),
    "plan": lambda store, run: b.record(store, run, b.plan(device="another cpu")),
    "trained time": lambda store, run: b.do(store, recording.renew, run, trained_ms=1000),
    "amend": lambda store, run: b.do(store, lifecycle.amend, run.job_id, Amendment(notes="n")),
    "pause": lambda store, run: b.do(store, lifecycle.pause, run.job_id),
    "cancel": lambda store, run: b.do(store, lifecycle.cancel, run.job_id),
    "succeed": b.finish,
    "fail": b.fail,
}
NO_CHANGES: dict[str, Callable[[Store, rows.Run], Any]] = {
    "renewal": lambda store, run: b.do(store, recording.renew, run),
    "sweep": lambda store, run: b.do(store, sweeps.sweep),
    "another job": lambda store, run: b.submit(store),
    "empty amendment": lambda store, run: b.do(store, lifecycle.amend, run.job_id, Amendment()),
    "resume of a running job": lambda store, run: b.do(store, lifecycle.resume, run.job_id),
    "reading": lambda store, run: walk(store),
}


@pytest.mark.parametrize("change", sorted(CHANGES | NO_CHANGES))
def test_the_etag_moves_exactly_when_the_job_does(store: Store, change: str) -> None:
    run = b.running(store)
    before = get(store, run.job_id)
    with store.read() as tx:
        pulse = queries.pulse(tx, [run.job_id])
    (CHANGES | NO_CHANGES)[change](store, run)
    after = get(store, run.job_id)
    with store.read() as tx:
        moved = queries.pulse(tx, [run.job_id]) != pulse
    assert (after != before) == (change in CHANGES)
    assert (queries.etag(after) != queries.etag(before)) == (change in CHANGES)
    assert moved == (change in CHANGES)  # what a waiter watches instead of the whole job


def test_the_etag_of_a_queued_job_follows_its_queue(store: Store, clock: FakeClock) -> None:
    ahead = b.submit(store)
    clock.advance(1)
    job_id = b.submit(store)
    tags = [queries.etag(get(store, job_id))]
    b.do(store, lifecycle.cancel, ahead)
    tags.append(queries.etag(get(store, job_id)))
    b.do(store, fleet.register, worker(0))
    tags.append(queries.etag(get(store, job_id)))
    tags.append(queries.etag(get(store, job_id)))
    assert len(set(tags)) == 3
    assert all(re.fullmatch(r'"[\x21\x23-\x7e]+"', tag) for tag in tags)


def test_version_moves_with_state_and_user_fields_only(store: Store) -> None:
    run = b.running(store)
    assert get(store, run.job_id)["version"] == 2
    b.record(store, run, b.plan(), b.step(1))
    b.do(store, recording.renew, run, trained_ms=5)
    assert get(store, run.job_id)["version"] == 2
    b.do(store, lifecycle.amend, run.job_id, Amendment(name="x"))
    b.finish(store, run)
    assert get(store, run.job_id)["version"] == 4


# --- events, checkpoints, attempts


def test_events_are_read_on_from_any_number(store: Store) -> None:
    run = b.running(store)
    b.record(store, run, b.plan(), b.step(1), b.evaluation(10, 0.5))
    with store.read() as tx:
        every = queries.events_after(tx, run.job_id, 0)
        assert [found["seq"] for found in every] == list(range(1, len(every) + 1))
        for seq in range(len(every) + 1):
            assert queries.events_after(tx, run.job_id, seq, limit=2) == every[seq : seq + 2]


def test_checkpoints_are_listed_newest_first_and_found_by_name(store: Store) -> None:
    run = b.running(store)
    with store.read() as tx, pytest.raises(CheckpointNotFound):
        queries.find_checkpoint(tx, run.job_id, "latest")
    b.record(store, run, b.plan(), b.checkpoint(10, 0.5), b.checkpoint(20, 0.7), b.checkpoint(30, 0.7), b.checkpoint(40, None))
    with store.read() as tx:
        found = queries.list_checkpoints(tx, run.job_id)
        assert [(row["step"], row["is_best"], row["is_latest"]) for row in found] == [
            (40, False, True),
            (30, False, False),
            (20, True, False),
            (10, False, False),
        ]
        ids = {name: queries.find_checkpoint(tx, run.job_id, name).id for name in ("best", "latest", "step-00000010")}
        assert ids == {"best": "step-00000020", "latest": "step-00000040", "step-00000010": "step-00000010"}
        for wanted in ("step-00000011", "BEST", ""):
            with pytest.raises(CheckpointNotFound):
                queries.find_checkpoint(tx, run.job_id, wanted)


def test_attempts_tell_their_ends(store: Store, clock: FakeClock) -> None:
    run = b.running(store)
    clock.advance(5)
    b.fail(store, run)
    clock.advance(5)
    b.finish(store, b.claimed(store).run, Outcome.STOPPED)
    b.claimed(store)
    told = get(store, run.job_id)["attempts"]
    assert [(made["number"], made["outcome"], made["ended_at"] is None) for made in told] == [
        (1, "failed", False),
        (2, "stopped", False),
        (3, None, True),
    ]
    with store.read() as tx:
        assert queries.attempt_numbers(tx, run.job_id) == [1, 2, 3]
        (listed,) = queries.page(tx, Filter(), limit=5).data
    assert listed["attempts"] == told


@pytest.mark.parametrize("read", [queries.get, queries.exists, queries.list_checkpoints, queries.attempt_numbers])
def test_what_is_not_there_or_anothers_is_not_found(store: Store, read: Callable[..., Any]) -> None:
    job_id = b.submit(store, owner="ada")
    with store.read() as tx:
        for wanted in (job_id, "job_nothing"):
            with pytest.raises(JobNotFound):
                read(tx, wanted)
        read(tx, job_id, owner="ada")


# --- plans


@contextmanager
def statements(store: Store) -> Iterator[list[tuple[str, Any]]]:
    seen: list[tuple[str, Any]] = []

    def listen(_connection: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, _many: bool) -> None:
        seen.append((statement, parameters))

    event.listen(store.engine, "before_cursor_execute", listen)
    yield seen
    event.remove(store.engine, "before_cursor_execute", listen)


def plans(store: Store, work: Callable[[], Any]) -> list[str]:
    """The plan lines of every statement that `work` sends and that touches the jobs."""
    with statements(store) as seen:
        work()
    lines: list[str] = []
    with store.engine.connect() as connection:
        for statement, parameters in seen:
            if re.match(r"(SELECT|UPDATE|DELETE)\b", statement) and re.search(r"\b(jobs|idempotency_keys)\b", statement):
                rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
                lines += [str(row[-1]) for row in rows]
    return lines


def reading(query: Callable[..., Any], *args: Any, **named: Any) -> Callable[[Store], Any]:
    def work(store: Store) -> Any:
        with store.read() as tx:
            return query(tx, *args, **named)

    return work


LOOKS: dict[str, tuple[Callable[[Store], Any], str]] = {
    "claim": (b.claim, "ix_jobs_owner_queue"),
    "has_work": (reading(claims.has_work, gpus=1), "ix_jobs_queue|ix_jobs_owner_queue"),
    "needs_sweep": (reading(sweeps.needs_sweep), "ix_jobs_lease"),
    "sweep": (lambda store: b.do(store, sweeps.sweep), "ix_jobs_lease"),
    "live workers": (reading(fleet.live_workers), "ix_jobs_lease"),
    "page": (reading(queries.page, Filter(), limit=20), "ix_jobs_owner"),
    "next page": (reading(queries.page, Filter(), limit=20, after="job_01"), "ix_jobs_owner"),
    "page of a state": (reading(queries.page, Filter(states=[JobState.FAILED]), limit=20), "ix_jobs_owner_state"),
    "page of states": (reading(queries.page, Filter(states=[JobState.FAILED, JobState.RUNNING]), limit=20), "ix_jobs_owner"),
    "page of a label": (reading(queries.page, Filter(labels={"a": "1"}), limit=20), "ix_job_labels_pair"),
    "pulse": (reading(queries.pulse, ["job_1", "job_2"]), "sqlite_autoindex_jobs_1"),
}


@pytest.mark.parametrize("look", sorted(LOOKS))
def test_frequent_looks_use_an_index_and_never_scan_the_jobs(sqlite_store: Store, look: str) -> None:
    with sqlite_store.write() as tx:
        made = [submission.submit(tx, submission.Submission(b.spec(labels={"a": str(n % 2)}))).job_id for n in range(200)]
        for job_id in made[:150]:
            lifecycle.cancel(tx, job_id)
        tx.run(text("ANALYZE"))
    work, index = LOOKS[look]
    lines = plans(sqlite_store, lambda: work(sqlite_store))
    assert any(re.search(rf"USING (COVERING )?INDEX ({index})\b", line) for line in lines), lines
    # a partial index holds only the queued or only the owned jobs: to walk it is the point
    scans = [line for line in lines if line.startswith("SCAN jobs") and not re.search(r"ix_jobs_(queue|owner_queue|lease)", line)]
    assert scans == []
    if look.endswith("page"):
        assert not any("TEMP B-TREE" in line for line in lines), lines


def test_a_retry_shows_its_raised_limits(store: Store) -> None:
    job_id = b.bring_to(store, JobState.FAILED)
    assert get(store, job_id)["reason"]["code"] == ReasonCode.DIVERGED
    b.do(store, lifecycle.retry, job_id, limits=RaisedLimits(max_seconds=9.5))
    job = get(store, job_id)
    assert (job["spec"]["limits"]["max_seconds"], job["reason"], job["state"]) == (9.5, None, "queued")
