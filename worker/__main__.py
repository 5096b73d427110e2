"""`python -P -m worker`: run one worker until SIGTERM or Ctrl-C, which is a drain: checkpoints are written, jobs go back to the queue."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import setproctitle
import structlog
from celery import signals
from celery.exceptions import SecurityWarning
from pydantic import ValidationError

from powergrad.jobs import logs, migrate
from powergrad.jobs.store import Store
from worker import app as queue
from worker.service import TITLE, WorkerService
from worker.settings import WorkerSettings

log = structlog.get_logger("worker")

TRAINER_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),  # glibc keeps freed tensors for the next step: 7 to 30 % more images/s, measured
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS is deterministic only with a fixed workspace
}


def main() -> int:
    setproctitle.setproctitle(TITLE)
    try:
        settings = WorkerSettings()
    except ValidationError as error:
        for wrong in error.errors(include_url=False, include_input=False):  # a URL may hold a password
            field = "".join(str(part) for part in wrong["loc"][:1])
            name = field if field == "REDIS_URL" else f"POWERGRAD_{field.upper()}"
            sys.stderr.write(f"powergrad worker: {f'{name}: ' if field else ''}{wrong['msg'].removeprefix('Value error, ')}\n")
        return 2
    logs.configure(settings.log_format)
    logs.catch_unhandled()
    if not _schema_is_current(settings):
        sys.stderr.write("worker: the database's schema is not this release's: run `python -P -m powergrad.jobs.migrate` first\n")
        return 3
    os.environ.update({name: value for name, value in TRAINER_ENVIRONMENT.items() if name not in os.environ})
    queue.configure(settings)
    try:
        service = WorkerService(settings, ring=queue.ring)
    except ValueError as error:
        sys.stderr.write(f"worker: {error}\n")
        return 2
    queue.bind(service)
    service.start()

    @signals.worker_shutting_down.connect(weak=False)
    def _drain(**_: Any) -> None:
        service.drain()

    @signals.worker_ready.connect(weak=False)
    def _title(**_: Any) -> None:
        setproctitle.setproctitle(TITLE)

    # Celery warns root about pickle, which this app does not accept; in a container of its own a user may well be root
    warnings.filterwarnings("ignore", category=SecurityWarning)
    arguments = ["--pool=threads", f"--concurrency={len(service.slots.slots)}", f"--hostname={service.id}", "--loglevel=WARNING"]
    try:
        queue.app.worker_main(["--quiet", "worker", *arguments, "--without-gossip", "--without-mingle", "--without-heartbeat"])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    finally:
        service.stop()
    return 0


def _schema_is_current(settings: WorkerSettings) -> bool:
    store = Store(settings.database_url)
    try:
        return migrate.is_current(store)
    finally:
        store.close()


if __name__ == "__main__":
    sys.exit(main())
