"""How a worker chooses a job and the slots for it: a real service on a real store and real lock files, GPUs made up, nothing started."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from powergrad.jobs import fleet, submission
from powergrad.jobs.spec import parse
from powergrad.jobs.store import Store
from tests.worker.conftest import tiny_spec
from worker import service
from worker.service import WorkerService
from worker.settings import WorkerSettings
from worker.slots import Gpu

Make = Callable[..., WorkerService]


@pytest.fixture
def make(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Workers of one host, with so many GPUs."""
    made: list[WorkerService] = []

    def build(gpus: int = 4) -> WorkerService:
        monkeypatch.setattr(service, "find_gpus", lambda _: [Gpu(f"GPU-{i}", "H100", 80 << 30) for i in range(gpus)])
        settings = WorkerSettings(data_dir=tmp_path, database_url=database_url, lock_dir=tmp_path / "locks")
        built = WorkerService(settings)
        with built.store.write() as tx:
            info = fleet.WorkerInfo(id=built.id, host="h", pid=1, version="0", slots=[], devices=[], gpus=gpus)
            fleet.register(tx, info)
        made.append(built)
        return built

    yield build
    for built in made:
        built.store.close()


def submit(store: Store, *gpus: int | None) -> list[str]:
    with store.write() as tx:
        return [submission.submit(tx, submission.Submission(parse(tiny_spec(resources={"gpus": n})))).job_id for n in gpus]


def test_a_wide_job_has_its_gpus_and_all_their_cores(make: Make) -> None:
    worker = make()
    submit(worker.store, 3)
    with worker.chosen() as chosen:
        assert chosen is not None
        claim, taken = chosen
        assert [gpu.uuid for gpu in taken.gpus] == ["GPU-0", "GPU-1", "GPU-2"]
        assert taken.cpus == sorted({cpu for slot in worker.slots.slots[:3] for cpu in slot.cpus})
        assert taken.device == "3 x H100, slots 0, 1, 2"
        assert claim.cpu_threads == 3
    with worker.slots.take() as free:
        assert free is not None
        assert worker.slots.resize(free, 4) == 4


def test_a_job_that_finds_too_few_slots_keeps_its_turn_and_no_slot(make: Make) -> None:
    host, other = sorted((make(), make()), key=lambda worker: worker.id)
    wide, small = submit(host.store, 4, 1)
    with other.slots.take() as held:
        assert held is not None
        with host.chosen() as chosen:
            assert chosen is None
        assert other.slots.resize(held, 4) == 4
    with host.chosen() as chosen:
        assert chosen is not None
        assert chosen[0].run.job_id == wide
        with other.chosen() as beside:
            assert beside is None, "all are held"
    with other.chosen() as chosen:
        assert chosen is not None
        assert chosen[0].run.job_id == small


def test_threads_of_one_worker_share_its_gpus_out_without_loss(make: Make) -> None:
    worker = make()
    left = set(submit(worker.store, 4, 1, 2, None, 3, 4, 1, 2, 0, 1))
    in_use: dict[str, str] = {}
    lock, finished = threading.Lock(), threading.Event()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            while not finished.is_set():
                with worker.chosen() as chosen:
                    if chosen is None:
                        finished.wait(0.005)
                        continue
                    claim, taken = chosen
                    with lock:
                        for gpu in taken.gpus:
                            assert in_use.setdefault(gpu.uuid, claim.run.job_id) == claim.run.job_id, "held twice"
                    assert len(taken.gpus) == max(1, claim.gpus)
                    with lock:
                        for gpu in taken.gpus:
                            del in_use[gpu.uuid]
                        left.discard(claim.run.job_id)
                if not left:
                    finished.set()
        except BaseException as error:  # noqa: BLE001 # raised again below
            errors.append(error)
            finished.set()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert finished.wait(60)
    for thread in threads:
        thread.join()
    assert errors == []
    assert left == set()


def test_a_cpu_worker_takes_one_slot_a_job(make: Make) -> None:
    worker = make(gpus=0)
    (job_id,) = submit(worker.store, None)
    with worker.chosen() as chosen:
        assert chosen is not None
        claim, taken = chosen
        assert (claim.run.job_id, claim.gpus, taken.gpus, len(taken.slots)) == (job_id, 0, [], 1)
