"""Runs that are compared compute alike: what the first claim settles, all of an experiment do."""

from __future__ import annotations

from powergrad.jobs.claims import Offer, effective_spec
from powergrad.jobs.store import Store
from tests.jobs import builders as b
from tests.jobs.experiments import builders as e

ON_GPU = Offer(worker="g", device="cuda", gpus=1, cpu_threads=8, in_all=1)


def test_every_job_computes_with_the_threads_of_the_first(store: Store) -> None:
    e.submit(store)
    first = b.claimed(store, Offer(worker="a", device="cpu", gpus=0, cpu_threads=3))
    others = [b.claimed(store, Offer(worker="b", device="cpu", gpus=0, cpu_threads=7)) for _ in range(3)]
    assert [claim.cpu_threads for claim in (first, *others)] == [3, 3, 3, 3]


def test_jobs_of_another_experiment_and_of_none_settle_their_own(store: Store) -> None:
    e.submit(store, seeds=1)
    b.claimed(store)
    b.claimed(store)
    e.submit(store, seeds=1)
    b.submit(store)
    wide = Offer(worker="b", device="cpu", gpus=0, cpu_threads=7)
    assert [b.claimed(store, wide).cpu_threads for _ in range(3)] == [7, 7, 7]


def test_a_precision_that_one_has_settled_is_the_others(store: Store) -> None:
    e.submit(store)
    b.record(store, b.claimed(store).run, b.plan(precision="bf16"))
    assert effective_spec(b.claimed(store)).precision == "bf16"


def test_a_precision_that_an_arm_asks_for_is_no_others(store: Store) -> None:
    e.submit(store, grid={"precision": ["fp32", "auto"]}, seeds=1)
    first = b.claimed(store)
    assert first.spec.precision == "fp32"
    b.record(store, first.run, b.plan(precision="fp32"))
    assert effective_spec(b.claimed(store)).precision == "auto"


def test_what_began_without_a_gpu_goes_on_without(store: Store) -> None:
    e.submit(store)
    b.claimed(store)
    assert b.claimed(store, ON_GPU).gpus == 0


def test_what_began_on_a_gpu_waits_for_one(store: Store) -> None:
    e.submit(store)
    assert b.claimed(store, ON_GPU).gpus == 1
    assert b.claim(store) is None
    assert b.claimed(store, ON_GPU).gpus == 1
