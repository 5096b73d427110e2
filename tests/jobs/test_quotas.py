"""What each quota stops, when, and what it leaves alone; over both databases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from powergrad.jobs import lifecycle, queries, quotas, recording, rows, submission
from powergrad.jobs.claims import Offer
from powergrad.jobs.errors import JobError, QuotaExceeded
from powergrad.jobs.quotas import Quota
from powergrad.jobs.states import End, JobState, Outcome
from powergrad.jobs.store import Store
from powergrad.jobs.submission import Submission, Submitted
from powergrad.jobs.tables import datasets
from tests.jobs import builders as b

ADA = "ada"
FOUR_GPUS = Offer(worker="w", device="gpus", gpus=4, cpu_threads=1, could_hold=4, in_all=4)


def grant(store: Store, **limits: float) -> None:
    b.do(store, quotas.grant, ADA, Quota(**limits))  # type: ignore[arg-type]  # each limit has its own number type


def usage(store: Store, owner: str = ADA) -> dict[str, dict[str, float | None]]:
    with store.read() as tx:
        return quotas.usage(tx, owner)


def submit(store: Store, **overrides: object) -> str:
    return b.submit(store, owner=ADA, **overrides)  # type: ignore[arg-type]  # fields of a spec


def submitted(store: Store, group: list[Submission]) -> list[str]:
    """What became of each of a group."""
    found: list[Submitted | JobError] = b.do(store, submission.submit_all, group)
    return ["stored" if isinstance(one, Submitted) else type(one).__name__ for one in found]


def waiting_for(store: Store, job_id: str) -> str | None:
    with store.read() as tx:
        shown = queries.get(tx, job_id, owner=ADA)
        (listed,) = [job for job in queries.page(tx, queries.Filter(owner=ADA), limit=100).data if job["id"] == job_id]
    assert listed["queue"]["waiting_for"] == shown["queue"]["waiting_for"], "the list says what the job says"
    found: str | None = shown["queue"]["waiting_for"]
    return found


# --- queued


def test_the_queue_takes_as_many_as_are_granted_and_more_when_one_has_started(store: Store) -> None:
    grant(store, max_queued=2)
    submit(store)
    submit(store)
    with pytest.raises(QuotaExceeded, match="quota of queued: 2 of 2 are used: wait until jobs have started") as refused:
        submit(store)
    assert (refused.value.quota, refused.value.used, refused.value.granted) == ("queued", 2, 2)
    b.claimed(store)
    submit(store)
    assert usage(store)["queued"] == {"used": 2, "granted": 2}


def test_of_a_group_those_are_stored_that_fit_and_other_owners_are_untouched(store: Store) -> None:
    grant(store, max_queued=2)
    mine, others = Submission(b.spec(), owner=ADA), Submission(b.spec())
    assert submitted(store, [mine, others, mine, mine, others]) == ["stored", "stored", "stored", "QuotaExceeded", "stored"]
    assert (usage(store)["queued"]["used"], usage(store, rows.LOCAL_OWNER)["queued"]["used"]) == (2, 2)


def test_a_refused_job_of_a_group_takes_no_place(store: Store) -> None:
    grant(store, max_queued=1)
    mine = Submission(b.spec(), owner=ADA)
    broken = replace(mine, spec=b.spec(model={"init_from": "job_00000000000000000000000000"}))
    assert submitted(store, [broken, mine]) == ["UnknownReference", "stored"]


def test_a_replay_is_no_new_job_even_when_the_queue_is_full(store: Store) -> None:
    grant(store, max_queued=1)
    first = submit(store, key="once", body="same")
    assert submit(store, key="once", body="same") == first
    replay = Submission(b.spec(), owner=ADA, idempotency_key="once", body_sha256="same")
    assert submitted(store, [replay, replace(replay, idempotency_key="twice"), replay]) == ["stored", "QuotaExceeded", "stored"]


def test_a_key_whose_job_was_refused_may_come_again(store: Store) -> None:
    grant(store, max_queued=0)
    with pytest.raises(QuotaExceeded):
        submit(store, key="once", body="one")
    grant(store, max_queued=1)
    submit(store, key="once", body="another")


def test_nobody_gets_round_the_queue_by_bringing_jobs_back(store: Store) -> None:
    paused, cancelled = submit(store), submit(store)
    b.do(store, lifecycle.pause, paused, owner=ADA)
    b.do(store, lifecycle.cancel, cancelled, owner=ADA)
    grant(store, max_queued=1)
    waiting = submit(store)
    for come_back, job_id in ((lifecycle.resume, paused), (lifecycle.retry, cancelled)):
        before = b.row(store, job_id)
        with pytest.raises(QuotaExceeded):
            b.do(store, come_back, job_id, owner=ADA)
        assert b.row(store, job_id) == before
    b.do(store, lifecycle.cancel, waiting, owner=ADA)
    assert b.do(store, lifecycle.resume, paused, owner=ADA) is JobState.QUEUED
    assert b.do(store, lifecycle.resume, paused, owner=ADA) is JobState.QUEUED, "twice is no error"


def test_two_that_submit_at_once_never_share_the_last_place(store: Store) -> None:
    """On PostgreSQL both transactions run at the same time, and each alone would find room."""
    grant(store, max_queued=3)

    def try_it() -> bool:
        try:
            submit(store)
        except QuotaExceeded:
            return False
        return True

    assert sum(b.at_once([try_it] * 8)) == 3
    assert usage(store)["queued"]["used"] == 3


# --- running


def test_as_many_run_as_are_granted_and_the_next_says_what_it_waits_for(store: Store) -> None:
    grant(store, max_running=1)
    first, second = submit(store), submit(store)
    assert b.claimed(store).run.job_id == first
    assert b.claim(store) is None
    assert waiting_for(store, second) == "running quota of 1"
    others = b.submit(store)
    assert b.claimed(store).run.job_id == others, "nobody else waits"
    assert usage(store)["running"] == {"used": 1, "granted": 1}


def test_a_place_is_free_again_when_a_job_ends(store: Store) -> None:
    grant(store, max_running=1)
    submit(store)
    second = submit(store)
    b.finish(store, b.claimed(store).run)
    assert waiting_for(store, second) != "running quota of 1"
    assert b.claimed(store).run.job_id == second


def test_a_pausing_job_still_holds_its_place(store: Store) -> None:
    grant(store, max_running=1)
    first = submit(store)
    submit(store)
    run = b.claimed(store).run
    b.do(store, lifecycle.pause, first, owner=ADA)
    assert b.claim(store) is None
    b.finish(store, run, Outcome.STOPPED)
    assert b.claim(store) is not None


def test_a_running_quota_of_nothing_stops_everything(store: Store) -> None:
    grant(store, max_running=0)
    job_id = submit(store)
    assert b.claim(store) is None
    assert waiting_for(store, job_id) == "running quota of 0"


def test_workers_that_claim_at_once_never_exceed_the_quota(store: Store) -> None:
    grant(store, max_running=2)
    for _ in range(8):
        submit(store)
    claims = b.at_once([lambda: b.claim(store)] * 8)
    assert sum(claim is not None for claim in claims) == 2
    assert usage(store)["running"]["used"] == 2


# --- GPU seconds


def on_gpus(store: Store, gpus: float) -> rows.Run:
    submit(store, resources={"gpus": gpus})
    return b.claimed(store, replace(FOUR_GPUS, gpus=gpus)).run


def test_every_gpu_of_a_job_counts_at_each_renewal_and_at_its_end(store: Store) -> None:
    run = on_gpus(store, 2)
    b.do(store, recording.renew, run, trained_ms=1500)
    assert usage(store)["gpu_seconds"]["used"] == 3.0
    b.do(store, recording.finish, run, End(Outcome.SUCCEEDED, None), trained_ms=500)
    assert usage(store)["gpu_seconds"]["used"] == 4.0


def test_a_part_of_a_gpu_costs_its_part_of_the_time(store: Store) -> None:
    run = on_gpus(store, 0.25)
    b.do(store, recording.renew, run, trained_ms=1500)
    assert usage(store)["gpu_seconds"]["used"] == 0.375
    b.do(store, recording.finish, run, End(Outcome.SUCCEEDED, None), trained_ms=501)
    assert usage(store)["gpu_seconds"]["used"] == 0.5, "milliseconds are whole"


def test_a_job_on_cores_costs_no_gpu_time(store: Store) -> None:
    submit(store)
    b.do(store, recording.renew, b.claimed(store).run, trained_ms=60_000)
    assert usage(store)["gpu_seconds"]["used"] == 0.0


def test_what_was_used_stays_used_when_the_job_is_deleted(store: Store) -> None:
    run = on_gpus(store, 1)
    b.do(store, recording.finish, run, End(Outcome.SUCCEEDED, None), trained_ms=7000)
    b.do(store, lifecycle.remove, run.job_id, owner=ADA)
    assert usage(store)["gpu_seconds"]["used"] == 7.0


def test_who_has_used_up_the_gpu_time_submits_no_more_and_starts_no_more(store: Store) -> None:
    grant(store, max_gpu_s=10.0)
    waits = submit(store, resources={"gpus": 1}, priority=1)
    run = on_gpus(store, 2)
    b.do(store, recording.renew, run, trained_ms=4999)
    submit(store, priority=0)
    assert b.do(store, recording.renew, run, trained_ms=1) is JobState.RUNNING, "what runs goes on"
    with pytest.raises(QuotaExceeded, match="quota of gpu_seconds: 10 of 10 are used: ask"):
        submit(store)
    assert b.claim(store, replace(FOUR_GPUS, gpus=1)) is None
    assert waiting_for(store, waits) == "GPU quota: all 10 seconds granted are used"
    grant(store, max_gpu_s=11.0)
    assert b.claimed(store, replace(FOUR_GPUS, gpus=1)).run.job_id == waits


def test_a_new_limit_keeps_what_was_used(store: Store) -> None:
    run = on_gpus(store, 1)
    b.do(store, recording.renew, run, trained_ms=1000)
    grant(store, max_gpu_s=5.0)
    assert usage(store)["gpu_seconds"] == {"used": 1.0, "granted": 5.0}
    b.do(store, quotas.grant, ADA, Quota())
    assert usage(store)["gpu_seconds"] == {"used": 1.0, "granted": None}


# --- bytes


def test_who_stores_as_much_as_is_granted_submits_no_more(store: Store) -> None:
    grant(store, max_bytes=201)
    submit(store)
    run = b.claimed(store).run
    b.record(store, run, b.plan(), b.checkpoint(10, 0.5))  # 200 bytes in all
    submit(store)
    grant(store, max_bytes=200)
    with pytest.raises(QuotaExceeded, match="quota of bytes: 200 of 200 are used: delete jobs or data sets"):
        submit(store)
    b.finish(store, run)
    b.do(store, lifecycle.remove, run.job_id, owner=ADA)
    submit(store)


def test_uploaded_sets_count_and_registered_ones_do_not(store: Store) -> None:
    for number, source in enumerate(("uploaded", "registered")):
        row = {"id": f"ds_{number}", "owner": ADA, "name": source, "version": f"sha256:{number}", "source": source, "state": "ready"}
        b.do(store, lambda tx, row=row: tx.run(datasets.insert().values(**row, path="p", files=1, bytes=1000, created_at=0)))
    assert usage(store)["bytes"]["used"] == 1000
    grant(store, max_bytes=1500)
    with store.read() as tx:
        quotas.check_bytes(tx, ADA, more=500)
        with pytest.raises(QuotaExceeded, match="bytes: 1,000 of 1,500"):
            quotas.check_bytes(tx, ADA, more=501)


# --- all of them


def test_an_owner_without_a_row_has_no_limit(store: Store) -> None:
    assert usage(store) == {
        "object": "usage",
        "owner": ADA,
        "queued": {"used": 0, "granted": None},
        "running": {"used": 0, "granted": None},
        "gpu_seconds": {"used": 0.0, "granted": None},
        "bytes": {"used": 0, "granted": None},
    }
    with store.read() as tx:
        assert quotas.granted(tx, ADA) == Quota()
        assert quotas.held_back(tx, ADA) is None


def test_what_is_granted_is_read_back(store: Store) -> None:
    wanted = Quota(max_queued=1, max_running=0, max_gpu_s=2.5, max_bytes=2**40)
    b.do(store, quotas.grant, ADA, wanted)
    with store.read() as tx:
        assert quotas.granted(tx, ADA) == wanted


@pytest.mark.parametrize("action", [quotas.limited, quotas.spent], ids=["submission", "claim"])
def test_who_books_gpu_time_waits_for_neither_submissions_nor_claims(store: Store, action: Callable[..., object]) -> None:
    """A run renews its lease while others submit and claim for its owner: were it to wait, it could lose the lease."""
    if store.is_sqlite:
        pytest.skip("SQLite has one writer at a time, whatever it writes")
    grant(store, max_running=5, max_queued=5)
    run = on_gpus(store, 1)
    with store.write() as tx:
        action(tx, [ADA]) if action is quotas.limited else action(tx)
        b.at_once([lambda: b.do(store, recording.renew, run, trained_ms=1000)])
    assert usage(store)["gpu_seconds"]["used"] == 1.0
