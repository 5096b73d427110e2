"""Rings the workers: a thread that sends "there is work" to the broker, so that no request ever waits for it.

A ring is a hint. Where the broker is away it is dropped: idle workers look for themselves and sweepers ring again.
"""

from __future__ import annotations

import threading

import structlog
from celery import Celery
from kombu.exceptions import OperationalError
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from api.measures import Measures
from powergrad.jobs import doorbell

MOST_WAITING = 32  # rings lying in the queue: workers that have heard one look until nothing is left
PAUSE_PER_RING_S = 0.002  # a ring costs 0.4 ms of this process: under load at most a fifth of a core goes into ringing

log = structlog.get_logger(__name__)


class Doorbell:
    """`ring` may be called from anywhere and returns at once. `start` and `stop` frame its thread."""

    def __init__(self, redis_url: str, measures: Measures) -> None:
        self._celery = _client(redis_url)
        self._redis = _redis(redis_url)
        self._measures = measures
        self._wanted = 0
        self._is_sending = False
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="doorbell", daemon=True)
        self._broker_is_away = False

    def ring(self, times: int = 1) -> None:
        """Say that there is work, for so many."""
        with self._changed:
            self._wanted += times
            self._changed.notify()

    @property
    def is_silent(self) -> bool:
        """Whether nothing is wanted that has not been sent or dropped."""
        with self._changed:
            return not self._wanted and not self._is_sending

    def is_connected(self) -> bool:
        """Whether the broker answers now."""
        try:
            return bool(self._redis.ping())
        except (RedisError, OSError):
            return False

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        with self._changed:
            self._changed.notify()
        self._thread.join(timeout=1.0)
        self._redis.close()

    def _run(self) -> None:
        while not self._stopping.is_set():
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._stopping.is_set())
                wanted, self._wanted = self._wanted, 0
                self._is_sending = True
            if wanted and not self._stopping.is_set():
                sent = self._send(wanted)
                self._is_sending = False
                self._stopping.wait(PAUSE_PER_RING_S * max(1, sent))

    def _send(self, wanted: int) -> int:
        """Send up to `wanted` rings, no more than leave MOST_WAITING in the queue; how many went out."""
        sent = 0
        try:
            room = MOST_WAITING - int(self._redis.llen(doorbell.QUEUE))
            for _ in range(min(wanted, room)):
                self._celery.send_task(doorbell.TASK, queue=doorbell.QUEUE, expires=doorbell.EXPIRES_S, ignore_result=True, retry=False)
                sent += 1
        except (RedisError, OperationalError, OSError) as error:
            self._measures.rings.labels("lost").inc(wanted)
            if not self._broker_is_away:
                log.warning("broker away: rings are dropped, workers find the jobs by looking", error=str(error))
            self._broker_is_away = True
        else:
            if self._broker_is_away:
                log.info("broker is back")
            self._broker_is_away = False
        self._measures.rings.labels("sent").inc(sent)
        return sent


def _client(redis_url: str) -> Celery:
    celery = Celery("powergrad-api", broker=redis_url, set_as_current=False)
    celery.conf.update(
        broker_pool_limit=1,  # one thread rings
        broker_connection_retry=False,
        task_publish_retry=False,
        task_ignore_result=True,
        task_create_missing_queues=True,
        broker_transport_options={
            "socket_timeout": doorbell.SEND_TIMEOUT_S,
            "socket_connect_timeout": doorbell.SEND_TIMEOUT_S,
            "retry_on_timeout": False,
            "max_retries": 0,  # without it kombu tries to connect for ever
        },
    )
    return celery


def _redis(redis_url: str) -> Redis:
    """A plain connection to the same broker."""
    timeout = doorbell.SEND_TIMEOUT_S
    return Redis.from_url(plain_url(redis_url), socket_timeout=timeout, socket_connect_timeout=timeout, retry=Retry(NoBackoff(), 0))


def plain_url(redis_url: str) -> str:
    """A broker's URL for redis-py: Celery spells a Unix socket redis+socket://, redis-py unix://."""
    return redis_url.replace("redis+socket://", "unix://", 1).replace("virtual_host=", "db=", 1)
