"""Workers come, live, drain, go silent and leave."""

from __future__ import annotations

from typing import Any

from powergrad.jobs import fleet
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
