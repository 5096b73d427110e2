"""What can be done to a running stack from outside: each injury is a function, and what it leaves to be undone it gives back.

Everything random is drawn from the dice it is handed. An injury that finds no victim gives None, and is not counted.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import psycopg
import redis
from celery import Celery

from powergrad.jobs import doorbell
from tests.faults.conftest import Site
from tests.faults.witness import Sighting, Witness

Undo = Callable[[], None]


@dataclass(frozen=True)
class Done:
    """An injury that was inflicted. told: on whom, in words.  lasts_s: until `undo` is due; None where there is nothing to undo."""

    told: str
    lasts_s: float | None = None
    undo: Undo | None = None
    interrupted: tuple[str, ...] = ()
    """Jobs whose trainers were alive under the workers that were killed."""


@dataclass
class Patient:
    """A stack and what is known of it. ttl_s: of its leases.  damaged: checkpoints whose files were damaged, by job."""

    site: Site
    witness: Witness
    ttl_s: float
    damaged: dict[str, set[str]] = field(default_factory=dict)

    def processes(self, title: str) -> list[psutil.Process]:
        return sorted(self.site.processes(title), key=lambda process: process.pid)

    def trainer(self, dice: random.Random) -> Sighting | None:
        living = self.witness.living()
        return dice.choice(living) if living else None

    def has_spare(self, dice: random.Random) -> bool:
        """Whether another worker could take over at once; now and then it does not matter."""
        able = [process for process in self.processes("powergrad: standby") if _is_at_work(process)]
        return len(able) >= min(2, self.site.workers) or dice.random() < CARELESS


CARELESS = 0.1

Injury = Callable[[Patient, random.Random], Done | None]


# --- kill -9 ----------------------------------------------------------------------------------------------------------------------


def kill_trainer(patient: Patient, dice: random.Random) -> Done | None:
    victim = patient.trainer(dice)
    return None if victim is None or not _send(victim.pid, signal.SIGKILL) else Done(f"trainer of {victim.job}, attempt {victim.attempt}")


def kill_template(patient: Patient, dice: random.Random) -> Done | None:
    return _kill_one(patient.processes("powergrad: template"), dice)


def kill_worker(patient: Patient, dice: random.Random) -> Done | None:
    """One that has a trainer, if there is one."""
    workers = patient.processes("powergrad: worker")
    busy = [worker for worker in workers if patient.witness.living(worker.pid)]
    if not workers:
        return None
    victim = dice.choice(busy or workers)
    jobs = tuple(sighting.job for sighting in patient.witness.living(victim.pid))
    if not _send(victim.pid, signal.SIGKILL):
        return None
    return Done(f"worker {victim.pid} with {', '.join(jobs) or 'nothing'}", interrupted=jobs)


def kill_all_workers(patient: Patient, dice: random.Random) -> Done | None:
    jobs = tuple(sighting.job for sighting in patient.witness.living())
    told = [str(worker.pid) for worker in patient.processes("powergrad: worker") if _send(worker.pid, signal.SIGKILL)]
    return Done(f"workers {', '.join(told)} with {', '.join(jobs) or 'nothing'}", interrupted=jobs) if told else None


def kill_api(patient: Patient, dice: random.Random) -> Done | None:
    return _kill_one(patient.processes("powergrad: api"), dice)


def kill_broker(patient: Patient, dice: random.Random) -> Done | None:
    return _kill_one(_brokers(patient), dice)


# --- SIGSTOP … SIGCONT, SIGTERM ---------------------------------------------------------------------------------------------------


def stop_trainer(patient: Patient, dice: random.Random) -> Done | None:
    victim = patient.trainer(dice)
    return None if victim is None else _stop([victim.pid], f"trainer of {victim.job}", _long(patient, dice))


def stop_worker(patient: Patient, dice: random.Random) -> Done | None:
    """The supervisor freezes, its trainer does not."""
    workers = patient.processes("powergrad: worker")
    return _stop([dice.choice(workers).pid], "worker", _long(patient, dice)) if workers else None


def stop_worker_and_trainers(patient: Patient, dice: random.Random) -> Done | None:
    """All freeze, as on a machine that sleeps; they thaw when another may long have taken over."""
    busy = [worker for worker in patient.processes("powergrad: worker") if patient.witness.living(worker.pid)]
    if not busy:
        return None
    worker = dice.choice(busy)
    trainers = patient.witness.living(worker.pid)
    told = f"worker {worker.pid} with {', '.join(sighting.job for sighting in trainers)}"
    return _stop([worker.pid, *(sighting.pid for sighting in trainers)], told, _long(patient, dice))


def terminate_worker(patient: Patient, dice: random.Random) -> Done | None:
    workers = patient.processes("powergrad: worker")
    victim = dice.choice(workers) if workers else None
    return None if victim is None or not _send(victim.pid, signal.SIGTERM) else Done(f"worker {victim.pid}")


# --- the broker -------------------------------------------------------------------------------------------------------------------


def flush_broker(patient: Patient, dice: random.Random) -> Done | None:
    with suppress(redis.RedisError), redis.Redis(unix_socket_path=str(patient.site.valkey_socket()), socket_timeout=2.0) as broker:
        broker.flushall()
        return Done("FLUSHALL")
    return None


def delete_broker_directory(patient: Patient, dice: random.Random) -> Done | None:
    shutil.rmtree(patient.site.data_dir / "valkey", ignore_errors=True)
    return _kill_one(_brokers(patient), dice)


def corrupt_broker_file(patient: Patient, dice: random.Random) -> Done | None:
    """Bytes in the middle of its append-only file, which it reads when it starts again."""
    files = [path for path in sorted((patient.site.data_dir / "valkey" / "appendonlydir").glob("*.aof")) if path.stat().st_size > 64]
    if not files:
        return None
    _overwrite(files[-1], dice, count=16)
    return _kill_one(_brokers(patient), dice)


def ring_many_times(patient: Patient, dice: random.Random) -> Done | None:
    """Twenty doorbells, for no job in particular."""
    celery = Celery("chaos", broker=f"redis+socket://{patient.site.valkey_socket()}", set_as_current=False)
    celery.conf.update(
        broker_connection_retry=False, task_publish_retry=False, broker_transport_options={"socket_timeout": 1.0, "max_retries": 0}
    )
    try:
        for _ in range(20):
            celery.send_task(doorbell.TASK, queue=doorbell.QUEUE, expires=doorbell.EXPIRES_S, ignore_result=True, retry=False)
    except Exception as error:  # noqa: BLE001 - whatever a broker that is away makes of it
        return Done(f"20 doorbells, cut off by {type(error).__name__}")
    finally:
        celery.close()
    return Done("20 doorbells")


# --- the database -----------------------------------------------------------------------------------------------------------------


def lock_sqlite(patient: Patient, dice: random.Random) -> Done | None:
    """An exclusive transaction that is held: readers read on, nobody writes."""
    connection = sqlite3.connect(patient.site.data_dir / "powergrad.db", timeout=5.0, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError:
        connection.close()
        return None

    def let_go() -> None:
        connection.execute("ROLLBACK")
        connection.close()

    return Done("locked", dice.uniform(1.0, 1.4 * patient.ttl_s), let_go)


def restart_postgresql(patient: Patient, dice: random.Random) -> Done | None:
    server = patient.site.postgresql
    assert server is not None
    server.stop()
    return Done("stopped", dice.uniform(0.5, 1.2 * patient.ttl_s), server.start)


def kill_postgresql(patient: Patient, dice: random.Random) -> Done | None:
    server = patient.site.postgresql
    assert server is not None
    server.kill()
    return Done("kill -9 of the server", dice.uniform(0.5, 3.0), server.start)


def terminate_postgresql_backends(patient: Patient, dice: random.Random) -> Done | None:
    assert patient.site.postgresql is not None
    with suppress(psycopg.Error):
        return Done(f"{patient.site.postgresql.terminate_backends()} connections ended")
    return None


def kill_postgresql_backend(patient: Patient, dice: random.Random) -> Done | None:
    assert patient.site.postgresql is not None
    with suppress(psycopg.Error):
        return Done("kill -9 of one backend") if patient.site.postgresql.kill_a_backend(dice) else None
    return None


# --- the files --------------------------------------------------------------------------------------------------------------------


def damage_checkpoint(patient: Patient, dice: random.Random) -> Done | None:
    """The newest checkpoint of a job at work is cut short or has a bit flipped; then its trainer is killed, so that it is needed."""
    victim = patient.trainer(dice)
    if victim is None:
        return None
    found = sorted((patient.site.job_dir(victim.job) / "checkpoints").glob("a*/step-*"), key=lambda path: path.name)
    files = [path for path in (found[-1].iterdir() if found else ()) if path.suffix in {".safetensors", ".pt", ".json"}]
    if not files:
        return None
    file = dice.choice(sorted(files))
    patient.damaged.setdefault(victim.job, set()).add(found[-1].name)
    cut = dice.random() < 0.5
    try:
        if cut:
            os.truncate(file, dice.randrange(file.stat().st_size))
        else:
            _overwrite(file, dice, count=1)
    except FileNotFoundError:  # pruned meanwhile
        return None
    _send(victim.pid, signal.SIGKILL)
    return Done(f"{'cut short' if cut else 'changed'}: {file.relative_to(patient.site.data_dir / 'jobs')}")


# --- what they share --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """weight: how often it is drawn, beside the others'.  alone: not while another of this group lasts."""

    inflict: Injury
    weight: float
    alone: str | None = None

    @property
    def name(self) -> str:
        return getattr(self.inflict, "__name__", "injury")


EVERYWHERE = (
    Kind(kill_trainer, 6),
    Kind(kill_template, 3),
    Kind(kill_worker, 8),
    Kind(kill_all_workers, 0.5),
    Kind(kill_api, 2),
    Kind(kill_broker, 2),
    Kind(stop_trainer, 2),
    Kind(stop_worker, 3),
    Kind(stop_worker_and_trainers, 4),
    Kind(terminate_worker, 2),
    Kind(flush_broker, 1.5),
    Kind(delete_broker_directory, 1),
    Kind(corrupt_broker_file, 1),
    Kind(ring_many_times, 2),
    Kind(damage_checkpoint, 3),
)
BY_DATABASE: dict[str, Sequence[Kind]] = {
    "sqlite": (*EVERYWHERE, Kind(lock_sqlite, 3, "database")),
    "postgresql": (
        *EVERYWHERE,
        Kind(restart_postgresql, 1, "database"),
        Kind(kill_postgresql, 0.5, "database"),
        Kind(terminate_postgresql_backends, 1.5, "database"),
        Kind(kill_postgresql_backend, 1.5, "database"),
    ),
}


def _is_at_work(standby: psutil.Process) -> bool:
    """Neither its worker nor its template is stopped."""
    try:
        return all(process.status() not in {psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE} for process in standby.parents()[:2])
    except psutil.NoSuchProcess:
        return False


def _kill_one(found: Sequence[psutil.Process], dice: random.Random) -> Done | None:
    victim = dice.choice(found) if found else None
    return None if victim is None or not _send(victim.pid, signal.SIGKILL) else Done(f"pid {victim.pid}")


def _brokers(patient: Patient) -> list[psutil.Process]:
    try:
        return [patient.site.valkey()]
    except (StopIteration, psutil.NoSuchProcess):
        return []


def _long(patient: Patient, dice: random.Random) -> float:
    """From a moment to well past the lease."""
    return dice.choice((dice.uniform(0.2, 2.0), dice.uniform(1.2, 2.2) * patient.ttl_s))


def _stop(pids: Sequence[int], told: str, lasts_s: float) -> Done | None:
    stopped = [pid for pid in pids if _send(pid, signal.SIGSTOP)]

    def thaw() -> None:
        for pid in stopped:
            _send(pid, signal.SIGCONT)

    return Done(f"{told} for {lasts_s:.1f} s", lasts_s, thaw) if stopped else None


def _send(pid: int, number: signal.Signals) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _overwrite(path: Path, dice: random.Random, *, count: int) -> None:
    """Flip a bit in each of `count` bytes somewhere in the middle."""
    with path.open("r+b") as file:
        size = path.stat().st_size
        at = dice.randrange(size // 4, max(size // 4 + 1, 3 * size // 4))
        file.seek(at)
        bytes_there = file.read(count)
        file.seek(at)
        file.write(bytes(byte ^ (1 << dice.randrange(8)) for byte in bytes_there))
