"""The Celery app: one queue, one task, and that task is a doorbell.

The message carries nothing and may come late, twice or never. What Celery would keep (results, events, retries) is switched off: the
database holds it.
"""

from __future__ import annotations

from queue import Empty
from typing import Any

import structlog
from celery import Celery
from kombu.exceptions import OperationalError
from kombu.transport import TRANSPORT_ALIASES, redis
from redis.exceptions import RedisError

from powergrad.jobs import doorbell
from worker.service import WorkerService
from worker.settings import WorkerSettings

log = structlog.get_logger(__name__)


class _Channel(redis.Channel):
    """Drops a ring that cannot be read, its bytes damaged on the broker's disk: kombu would end the worker, and the jobs it runs with it."""

    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)  # type: ignore[misc]  # the stubs leave it out
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("a ring that cannot be read", error=repr(error))
            raise Empty from error


class Transport(redis.Transport):
    """kombu's own, but for what it does with a message that is none."""

    Channel = _Channel


TRANSPORT_ALIASES["redis"] = f"{__name__}:Transport"  # the scheme of the URL decides, and no setting overrules it

app = Celery("powergrad")
_service: WorkerService | None = None


def configure(settings: WorkerSettings) -> None:
    """Set the app up for a broker. Each setting that is not Celery's default has its reason beside it."""
    app.conf.update(
        broker_url=settings.redis_url,
        task_default_queue=doorbell.QUEUE,
        task_ignore_result=True,  # the database row is the result
        task_acks_late=True,  # with prefetch 1: a ring waits in the queue for a worker that is free, not behind one that is busy
        worker_prefetch_multiplier=1,
        task_reject_on_worker_lost=False,  # a task whose process dies at every start would come back without end
        worker_cancel_long_running_tasks_on_connection_loss=False,  # a broker's hiccup must not touch a running job
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,  # for ever: the worker finds work without the broker
        broker_transport_options={
            "visibility_timeout": 43200,  # a ring held by a long job is not rung again meanwhile
            "unacked_restore_throttle": 1,
            "socket_keepalive": True,
            "health_check_interval": 10,
        },
    )


def bind(service: WorkerService) -> None:
    """Give the task the worker it works for."""
    global _service
    _service = service


@app.task(name=doorbell.TASK)
def work() -> None:
    """There may be work."""
    if _service is not None:
        _service.work()


def ring() -> None:
    """Tell some worker that there is work. A broker that is away is no error: workers look for themselves."""
    try:
        with app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, timeout=1)
            app.send_task(doorbell.TASK, connection=connection, retry=False, expires=doorbell.EXPIRES_S)
    except (OperationalError, RedisError, OSError) as error:
        log.info("broker away: no ring", error=str(error))
