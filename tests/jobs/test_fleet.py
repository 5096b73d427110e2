"""Workers come, live, drain, go silent and leave."""

from __future__ import annotations

from typing import Any

from powergrad.jobs import fleet, queries
from powergrad.jobs.fleet import Capacity, WorkerInfo
from powergrad.jobs.store import Store
from tests.jobs.builders import OFFER, claimed, do, submit
from tests.stores import FakeClock


def info(name: str = OFFER.worker, **overrides: Any) -> WorkerInfo:
    values: dict[str, Any] = {"host": "h", "pid": 7, "version": "0.1", "slots": [{"index": 0}], "devices": [], "gpus": 0}
    return WorkerInfo(id=name, **{**values, **overrides})


def listed(store: Store) -> list[dict[str, Any]]:
    with store.read() as tx:
        return fleet.live_workers(tx)


def test_a_worker_is_listed_with_what_it_runs(store: Store) -> None:
    do(store, fleet.register, info())
    job_id = submit(store)
    claimed(store)
    (worker,) = listed(store)
    assert (worker["id"], worker["running"], worker["state"], worker["slots"]) == ("worker-1", [job_id], "ready", [{"index": 0}])


def test_a_silent_worker_is_not_alive_until_it_beats_again(store: Store, clock: FakeClock) -> None:
    do(store, fleet.register, info(gpus=4))
    clock.advance(fleet.ALIVE_S + 1)
    assert listed(store) == []
    assert do(store, fleet.capacity) == Capacity(workers=0, gpus=0)
    assert do(store, fleet.heartbeat, "worker-1", devices=[{"name": "H100"}], state="draining")
    assert [(worker["state"], worker["devices"]) for worker in listed(store)] == [("draining", [{"name": "H100"}])]
    assert do(store, fleet.capacity) == Capacity(workers=1, gpus=4)


def test_a_forgotten_worker_must_register_again(store: Store, clock: FakeClock) -> None:
    do(store, fleet.register, info())
    clock.advance(fleet.FORGOTTEN_S + 1)
    do(store, fleet.register, info("other"))
    assert not do(store, fleet.heartbeat, "worker-1", devices=[], state="ready")
    do(store, fleet.register, info())
    do(store, fleet.register, info(pid=8))
    assert [worker["pid"] for worker in listed(store)] == [7, 8]
    do(store, fleet.retire, "worker-1")
    assert [worker["id"] for worker in listed(store)] == ["other"]


def test_the_newest_catalogue_is_published(store: Store) -> None:
    with store.read() as tx:
        assert fleet.published(tx, "models") == []
    do(store, fleet.publish, "models", [{"name": "a"}])
    do(store, fleet.publish, "models", [{"name": "b"}, {"name": "c"}])
    do(store, fleet.publish, "datasets", [{"name": "digits"}])
    with store.read() as tx:
        assert [entry["name"] for entry in fleet.published(tx, "models")] == ["b", "c"]


GIB = 2**30


def gpu(used_gib: float | None, quarters_in_use: int = 0) -> dict[str, Any]:
    used = {} if used_gib is None else {"memory_used_bytes": int(used_gib * GIB)}
    return {"kind": "gpu", "memory_bytes": 80 * GIB, "quarters_in_use": quarters_in_use, **used}


def shortage(store: Store, part: float, *devices: dict[str, Any], state: fleet.WorkerState = "ready") -> str | None:
    do(
        store,
        fleet.register,
        info(host="box", gpus=len(devices), devices=[{"kind": "cpu", "memory_bytes": 8 * GIB}, *devices]),
        state=state,
    )
    with store.read() as tx:
        return fleet.capacity(tx).short_of_memory(part)


def test_a_part_whose_memory_is_nowhere_free_is_told_how_much_there_is(store: Store) -> None:
    assert shortage(store, 0.25, gpu(79.5), gpu(76.9)) == "GPU 1 of box has 3.1 GiB free of the 20.0 GiB that 0.25 of it is"
    assert shortage(store, 0.5, gpu(60, quarters_in_use=2)) == "GPU 0 of box has 20.0 GiB free of the 40.0 GiB that 0.5 of it is"


def test_one_gpu_with_the_memory_is_enough(store: Store) -> None:
    assert shortage(store, 0.25, gpu(79), gpu(20)) is None
    assert shortage(store, 0.25, gpu(61.5, quarters_in_use=3)) is None, "a little of it is the driver's and the others'"


def test_memory_is_not_what_is_missing_where_the_quarters_are_in_use_or_nobody_knows(store: Store) -> None:
    assert shortage(store, 0.5, gpu(79, quarters_in_use=3)) is None
    assert shortage(store, 0.5, gpu(79), gpu(None)) is None
    assert shortage(store, 0.5, gpu(79), state="draining") is None


def test_a_waiting_part_says_which_memory_it_waits_for(store: Store) -> None:
    job_id = submit(store, resources={"gpus": 0.25})
    shortage(store, 0.25, gpu(76.9))
    with store.read() as tx:
        shown = queries.get(tx, job_id)
    assert shown["queue"]["waiting_for"] == "GPU 0 of box has 3.1 GiB free of the 20.0 GiB that 0.25 of it is"
