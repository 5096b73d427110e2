"""What Prometheus is told of this process and of the jobs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)


class Measures:
    """One registry for one application; the process-wide default one would be shared by tests."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = Counter("powergrad_http_requests", "Requests answered.", ["method", "route", "status"], registry=self.registry)
        self._seconds = Histogram(
            "powergrad_http_seconds", "Seconds to the head of the answer.", ["route"], buckets=BUCKETS_S, registry=self.registry
        )
        self.streams = Gauge("powergrad_streams", "Open event streams, log followers and waiting polls.", registry=self.registry)
        self.rings = Counter("powergrad_doorbell_rings", "Messages sent to the broker.", ["result"], registry=self.registry)
        self.jobs = Gauge("powergrad_jobs", "Jobs stored, by state.", ["state"], registry=self.registry)
        self.workers = Gauge("powergrad_workers", "Workers alive.", registry=self.registry)
        self.database_up = Gauge("powergrad_database_up", "1 when the database answered this scrape.", registry=self.registry)

    def answered(self, scope: Mapping[str, Any], status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "none")  # the template, so that ids do not make series
        self._requests.labels(_method(scope["method"]), route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def refused(self, method: str, status: int) -> None:
        self._requests.labels(_method(method), "none", str(status)).inc()


def _method(method: str) -> str:
    return method if method in {"GET", "HEAD", "POST", "PATCH", "DELETE", "PUT", "OPTIONS"} else "other"
