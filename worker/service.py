"""One worker: its slots, its template, its heartbeat, and the loop that takes jobs.

Celery rings (`worker.app`), and an idle worker also looks for itself, so a broker that is away costs latency and never a job. Both end in
`work`, which takes a slot, claims and supervises until nothing is left that fits.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import setproctitle
import structlog

from powergrad import __version__
from powergrad.jobs import claims, fleet, sweeps
from powergrad.jobs.artifacts import Artifacts
from powergrad.jobs.store import Store, is_unavailable
from powergrad.jobs.sweeper import Sweeper
from powergrad.sinks import tensorboard
from worker.settings import WorkerSettings
from worker.slots import Reach, Slots, TakenSlots, device_report, find_gpus, lock_all, plan_slots, release
from worker.supervisor import Bench, supervise
from worker.tasks import TaskRunner
from worker.template import Template

if TYPE_CHECKING:  # its client is an extra
    from powergrad.sinks.mlflow import Copier

log = structlog.get_logger(__name__)

TITLE = "powergrad: worker"


class WorkerService:
    """Everything of a worker but the queue.

    ring: tells the other workers that there is work (after a sweep).
    """

    def __init__(self, settings: WorkerSettings, *, ring: Callable[[], None] = lambda: None) -> None:
        self.settings = settings
        self.id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        run_dir = settings.data_dir / "run" / socket.gethostname()  # cores and flocks are a host's own, the directory may be shared
        cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
        gpus = find_gpus(settings.cuda_visible_devices)
        self.slots = Slots(plan_slots(gpus, cpus, count=settings.slots, gpu_locks=settings.lock_dir, cpu_locks=run_dir / "slots"))
        self.gpus = [slot.gpu for slot in self.slots.slots if slot.gpu is not None]
        self.store = Store(settings.database_url, pool_size=2 * self.slots.places + 4, job_ttl_s=settings.job_ttl_s)
        self.artifacts = Artifacts(str(settings.data_dir))
        self.draining = threading.Event()
        self.template = Template(self._publish)
        self.bench = Bench(settings, self.store, self.artifacts, self.template, self.draining, self._give_up)
        self.tasks = TaskRunner(self.store, self.artifacts, self.template, self.draining)
        self.sweeper = Sweeper(self.store, self.artifacts, ring, settings.sweep_s)
        self.copier = self._new_copier() if settings.mlflow_url else None
        self._life_dir = run_dir / "workers"
        self._life: list[int] = []
        self._stopping = threading.Event()
        self._look_again = threading.Event()
        self._choosing = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._working: set[threading.Thread] = set()

    # --- its own life

    def start(self) -> None:
        """Register, warm the template up, and look after everything from threads."""
        self._life = lock_all([self._life_dir / f"{self.id}.lock"]) or []
        self._register()
        self.template.start()
        self.sweeper.start()
        self.tasks.start()
        if self.copier is not None:
            self.copier.start()
        for target in (self._beat, self._look_for_work):
            thread = threading.Thread(target=target, name=target.__name__.strip("_"), daemon=True)
            thread.start()
            self._threads.append(thread)
        log.info("worker ready", worker=self.id, slots=[slot.device for slot in self.slots.slots])

    def drain(self) -> None:
        """Take nothing more; tell every trainer to write a checkpoint and end. Returns at once (it is called from a signal handler)."""
        self.draining.set()

    def stop(self) -> None:
        """Drain, wait for the supervisors, sign off."""
        self.drain()
        for thread in list(self._working):
            thread.join()
        self._stopping.set()
        self._look_again.set()
        self.sweeper.stop()
        self.tasks.stop()
        if self.copier is not None:
            self.copier.stop()
        for thread in self._threads:
            thread.join(timeout=10)
        self.template.stop()
        with suppress(Exception), self.store.write() as tx:
            fleet.retire(tx, self.id)
        release(self._life)
        with suppress(OSError):
            (self._life_dir / f"{self.id}.lock").unlink()
        self.store.close()

    def _give_up(self) -> None:
        """A device is gone: end by the ordinary way, a drain, and let whoever guards this process start a worker that looks again."""
        log.error("a device was lost: this worker ends")
        self.drain()
        os.kill(os.getpid(), signal.SIGTERM)

    def _register(self) -> None:
        info = fleet.WorkerInfo(
            id=self.id,
            host=socket.gethostname(),
            pid=os.getpid(),
            version=__version__,
            slots=[slot.as_json() for slot in self.slots.slots],
            devices=self._devices(),
            gpus=len(self.gpus),
        )
        with self.store.write() as tx:
            fleet.register(tx, info, state=self._state())

    def _devices(self) -> list[dict[str, Any]]:
        return device_report(self.gpus, self.slots.quarters_in_use())

    def _state(self) -> fleet.WorkerState:
        if self.draining.is_set():
            return "draining"
        return "ready" if self.template.ready.is_set() else "starting"

    def _publish(self, told: dict[str, Any]) -> None:
        """The template can start trainers: say what they can train, and that this worker is ready."""
        try:
            with self.store.write() as tx:
                fleet.publish(tx, "models", told["models"])
                fleet.publish(tx, "datasets", told["datasets"])
                fleet.publish(tx, "outputs", self._outputs())
                fleet.heartbeat(tx, self.id, devices=self._devices(), state=self._state())
        except Exception as error:
            if not is_unavailable(error):
                raise
            log.warning("database away: the catalogue is not published")

    def _new_copier(self) -> Copier:
        try:
            from powergrad.sinks.mlflow import Copier
        except ImportError as error:
            raise SystemExit(f"POWERGRAD_MLFLOW_URL is set: pip install 'powergrad[mlflow]' ({error})") from error
        return Copier(self.store, self.artifacts, self.settings.mlflow_url, self.settings.mlflow_experiment)

    def _outputs(self) -> list[dict[str, Any]]:
        written = {"tensorboard": tensorboard.is_available(), "mlflow": self.copier is not None}
        return [{"name": name} for name, is_written in written.items() if is_written]

    def _beat(self) -> None:
        while not self._stopping.wait(self.settings.heartbeat_s):
            setproctitle.setproctitle(TITLE)  # Celery names the process too, later than we do
            if self.settings.beat_file is not None:
                self.settings.beat_file.touch()
            try:
                with self.store.write() as tx:
                    known = fleet.heartbeat(tx, self.id, devices=self._devices(), state=self._state())
                if not known:
                    self._register()
                self._bury_the_dead()
            except Exception as error:
                if not is_unavailable(error):
                    log.exception("heartbeat failed")
                else:
                    log.warning("heartbeat: database away")

    def _bury_the_dead(self) -> None:
        """Take over at once from workers of this data directory that were killed: their life lock is free, so they are no more."""
        for path in self._life_dir.glob("*.lock"):
            if path.stem == self.id or not _is_dead(path):
                continue
            with self.store.write() as tx:
                orphans = sweeps.expire_worker(tx, path.stem)
                fleet.retire(tx, path.stem)
            path.unlink(missing_ok=True)
            log.warning("a worker of this host was killed", worker=path.stem, jobs=orphans)

    # --- its work

    def work(self) -> int:
        """Claim and supervise one job after another until nothing is left that fits; how many attempts were supervised."""
        self.tasks.wake()
        done = 0
        while self._may_claim():
            with self.chosen() as chosen:
                if chosen is None:
                    break
                supervise(self.bench, *chosen)
                done += 1
        return done

    def _may_claim(self) -> bool:
        """Wait for the template: a job claimed before it could start would only hold its lease. False when draining."""
        while not self.draining.is_set():
            if self.template.ready.wait(0.2):
                return not self.draining.is_set()
        return False

    @contextmanager
    def chosen(self) -> Iterator[tuple[claims.Claim, TakenSlots] | None]:
        """A job and the slots that are its for the length of the block; None when there is none of the one or the other."""
        with ExitStack() as held:
            with self._choosing:  # two threads that gather slots at a time would each take what the other lacks
                taken = held.enter_context(self.slots.take())
                claim = None if taken is None else self._claim(taken)
                if claim is None:
                    held.close()
            if claim is None or taken is None:
                yield None
            else:
                self._look_again.set()  # what was freed may be more than this job has taken
                yield claim, taken

    def _claim(self, taken: TakenSlots) -> claims.Claim | None:
        """The next job, with as many slots taken as it wants."""
        with self.store.read() as tx:
            if not claims.has_work(tx, gpus=self.slots.gpus):
                return None
        reach = Reach(gpus=self.slots.gpus, part=1.0)
        while True:
            offer = claims.Offer(
                worker=self.id,
                device=taken.device,
                gpus=taken.gpu_count,
                cpu_threads=min(len(slot.cpus) for slot in taken.slots),
                lease_ttl_s=self.settings.lease_ttl_s,
                could_hold=reach.gpus,
                in_all=self.slots.gpus,
                part_with_memory=reach.part,
            )
            try:
                with self.store.write() as tx:
                    return claims.claim(tx, offer)
            except claims.SlotsWanted as wanted:
                found = self.slots.resize(taken, wanted.count)
                reach = reach if found is None else reach.and_no_more_than(found)  # so that this comes to an end

    def _look_for_work(self) -> None:
        while not self._stopping.is_set() and not self.draining.is_set():
            try:
                self._start_what_nobody_rang_for()
            except Exception as error:
                if not is_unavailable(error):
                    log.exception("looking for work failed")
            self._look_again.wait(self.settings.poll_s)
            self._look_again.clear()

    def _start_what_nobody_rang_for(self) -> None:
        self._working = {thread for thread in self._working if thread.is_alive()}
        if not self.slots.any_free:
            return
        with self.store.read() as tx:
            if not claims.has_work(tx, gpus=self.slots.gpus):
                return
        thread = threading.Thread(target=self._work_and_log, name=f"found-{time.monotonic_ns()}", daemon=True)
        self._working.add(thread)
        thread.start()

    def _work_and_log(self) -> None:
        try:
            self.work()
        except Exception as error:
            if not is_unavailable(error):
                log.exception("supervision failed")


def _is_dead(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True
