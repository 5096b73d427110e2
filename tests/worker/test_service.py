"""How a worker chooses a job and the slots for it: a real service on a real store and real lock files, GPUs made up, nothing started."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

import pytest

from powergrad.jobs import fleet, submission
from powergrad.jobs.claims import Claim
from powergrad.jobs.spec import parse
from powergrad.jobs.store import Store
from powergrad.protocol import TrainerConfig
from tests.worker.conftest import tiny_spec
from worker import service, supervisor
from worker.child import Launch
from worker.service import WorkerService
from worker.settings import WorkerSettings
from worker.slots import Gpu, TakenSlots

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


def submit(store: Store, *gpus: float | None) -> list[str]:
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
        assert worker.slots.resize(free, 4) is None


def test_a_job_that_finds_too_few_slots_keeps_its_turn_and_no_slot(make: Make) -> None:
    host, other = sorted((make(), make()), key=lambda worker: worker.id)
    wide, small = submit(host.store, 4, 1)
    with other.slots.take() as held:
        assert held is not None
        with host.chosen() as chosen:
            assert chosen is None
        assert other.slots.resize(held, 4) is None
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
    left = set(submit(worker.store, 4, 1, 0.25, 2, None, 0.5, 3, 0.75, 4, 1, 0.5, 2, 0.25, 0, 1, 0.25))
    in_use: dict[tuple[int, int], str] = {}
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
                        for quarter in taken.held:
                            assert in_use.setdefault(quarter, claim.run.job_id) == claim.run.job_id, "held twice"
                    assert taken.gpu_count == (claim.gpus or 1)
                    with lock:
                        for quarter in taken.held:
                            del in_use[quarter]
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


def test_jobs_on_parts_share_a_gpu_and_what_it_has_of_cores(make: Make) -> None:
    worker = make(gpus=1)
    half, quarter, another, late = submit(worker.store, 0.5, 0.25, 0.25, 0.25)
    with ExitStack() as running:
        chosen = [running.enter_context(worker.chosen()) for _ in range(4)]
        assert [one and one[0].run.job_id for one in chosen] == [half, quarter, another, None]
        for claim, taken in filter(None, chosen):
            assert taken.gpu_count == claim.gpus
            assert claim.cpu_threads == max(1, int(len(worker.slots.slots[0].cpus) * claim.gpus))
        assert not worker.slots.any_free
    with worker.chosen() as last:
        assert last is not None
        assert last[0].run.job_id == late


def test_a_job_on_a_whole_gpu_keeps_its_turn_while_parts_are_in_use(make: Make) -> None:
    worker = make(gpus=1)
    submit(worker.store, 0.25)
    with worker.chosen() as first:
        assert first is not None
        whole, late = submit(worker.store, 1, 0.25)
        with worker.chosen() as refused:
            assert refused is None, "three quarters are free, and are kept"
    with worker.chosen() as next_one:
        assert next_one is not None
        assert next_one[0].run.job_id == whole
    with worker.chosen() as after:
        assert after is not None
        assert after[0].run.job_id == late


def test_a_part_without_memory_lets_others_go_first(make: Make) -> None:
    worker = make(gpus=2)
    worker.slots.with_memory = lambda gpu: 1 if gpu.uuid == "GPU-1" else 0
    half, quarter, whole = submit(worker.store, 0.5, 0.25, 1)
    with worker.chosen() as first, worker.chosen() as second, worker.chosen() as third:
        assert first is not None
        assert second is not None
        assert [first[0].run.job_id, second[0].run.job_id] == [quarter, whole]
        assert first[1].gpus[0].uuid == "GPU-1"
        assert third is None
    worker.slots.with_memory = lambda _: 2
    with worker.chosen() as freed:
        assert freed is not None
        assert freed[0].run.job_id == half


def test_a_gpu_of_a_worker_is_supervised_by_as_many_threads_as_it_has_parts_in_use(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = make(gpus=1)
    all_there, seen, running = threading.Event(), set[str](), threading.Lock()

    def supervise(_: object, claim: Claim, taken: TakenSlots) -> None:
        assert taken.gpu_count == 0.25
        with running:
            seen.add(claim.run.job_id)
            if len(seen) == 4:
                all_there.set()
        assert all_there.wait(60), "they run at the same time or not at all"

    monkeypatch.setattr(service, "supervise", supervise)
    worker.template.ready.set()
    submitted = submit(worker.store, *[0.25] * 4)
    looks = threading.Thread(target=worker._look_for_work)
    looks.start()
    try:
        assert all_there.wait(60)
        assert seen == set(submitted)
    finally:
        all_there.set()
        worker._stopping.set()
        worker._look_again.set()
        looks.join()
        for thread in list(worker._working):
            thread.join()


@pytest.mark.parametrize(
    ("gpus", "device", "share", "ranks", "visible", "locks"),
    [
        (0, "cpu", 1.0, 1, (), 4),
        (0.25, "cuda:0", 0.25, 1, ("GPU-0",), 1),
        (0.75, "cuda:0", 0.75, 1, ("GPU-0",), 3),
        (1, "cuda:0", 1.0, 1, ("GPU-0",), 4),
        (2, "cuda:0", 1.0, 2, ("GPU-0", "GPU-1"), 8),
    ],
)
def test_a_trainer_is_told_its_share_and_inherits_its_locks(
    make: Make, monkeypatch: pytest.MonkeyPatch, gpus: float, device: str, share: float, ranks: int, visible: tuple[str, ...], locks: int
) -> None:
    worker, launches = make(gpus=2), list[Launch]()

    def spawn(launch: Launch) -> NoReturn:
        launches.append(launch)
        raise OSError("nothing is started here")

    monkeypatch.setattr(worker.template, "spawn", spawn)
    submit(worker.store, gpus)
    with worker.chosen() as chosen:
        assert chosen is not None
        supervisor.supervise(worker.bench, *chosen)
    (launch,) = launches
    config = TrainerConfig.model_validate_json(launch.config_json)
    assert (config.device, config.gpu_share, config.ranks) == (device, share, ranks)
    assert (launch.visible_gpus, len(launch.locks)) == (visible, locks)
