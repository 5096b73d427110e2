"""A real API process with keys of two owners, jobs of both in every state, and a worker's heartbeat, to send anything to."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

import httpx2

from powergrad import protocol
from powergrad.jobs import fleet, keys, lifecycle, rows
from powergrad.jobs.keys import Scope
from powergrad.jobs.states import JobState
from powergrad.jobs.store import Store
from tests.api.callers import cancelled_experiment, give_report
from tests.api.conftest import DEADLINE_S, WORKER, Broker, until
from tests.jobs import builders

ROOT = Path(__file__).parents[2]
ANNA, BERT = "anna-of-site", "bert-of-site"
"""The owners. No answer to the one has the name of the other in it."""
HEARTBEAT_S = 5.0
_DIRECT = build_opener(ProxyHandler({}))
STATES = (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.RUNNING, JobState.PAUSED)
CHECKPOINT = "step-00000010"
PATIENCE = {
    "POWERGRAD_PREDICT_WAIT_S": "0.05",  # no worker looks at an image: every prediction becomes a task
    "POWERGRAD_SWEEP_S": "1",
    "POWERGRAD_MIN_FREE_BYTES": "0",
}


@dataclass
class Owner:
    """name, a key with the scope `submit`, and what was there from the beginning: jobs (state → id), an experiment with a report."""

    name: str
    key: str
    jobs: dict[str, str] = field(default_factory=dict)
    experiment: str = ""

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}


@dataclass
class Site:
    """A running server. admin: a key of Anna's that manages keys and quotas too."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    anna: Owner
    bert: Owner
    admin: str

    def client(self, key: str | None = None) -> httpx2.Client:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx2.Client(base_url=self.url, headers=headers, trust_env=False, timeout=DEADLINE_S)

    def is_well(self) -> bool:
        """Whether it still runs and serves both owners."""
        if self.process.poll() is not None:
            return False
        asked = [Request(f"{self.url}/v1/jobs?limit=1", headers=owner.headers) for owner in (self.anna, self.bert)]
        return all(
            _DIRECT.open(request, timeout=DEADLINE_S).status == 200 for request in asked
        )  # httpx2 takes a tenth of a second to start

    def defects(self) -> list[str]:
        """What its log says of errors that nobody foresaw: where, and the end of the traceback."""
        found = []
        for line in self.log.read_text(errors="replace").splitlines():
            said = json.loads(line) if line.startswith("{") else {"event": line}
            if "exception" in said or "Traceback" in said["event"]:
                found.append(f"{said.get('method')} {said.get('path')}: {' | '.join(str(said.get('exception', line)).splitlines()[-9:])}")
        return found


@contextmanager
def serving(database_url: str, folder: Path, broker_url: str, **environment: str) -> Iterator[Site]:
    """A site over a migrated, empty database, until the block ends."""
    folder.mkdir(parents=True, exist_ok=True)
    store = Store(database_url)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "PYTHONPATH": str(ROOT),
        "POWERGRAD_DATA_DIR": str(folder),
        "POWERGRAD_DATABASE_URL": database_url,
        "POWERGRAD_PORT": str(port),
        "POWERGRAD_LOG_FORMAT": "json",
        "REDIS_URL": broker_url,
        **PATIENCE,
        **environment,
    }
    log = folder / "api.log"
    ended = threading.Event()
    try:
        anna, bert = (_owner(store, folder, name) for name in (ANNA, BERT))
        _queue(store, anna, bert)
        admin = _key(store, ANNA, Scope.ADMIN)
        _beat(store)
        heart = threading.Thread(target=_keep_beating, args=(store, ended), name="heartbeat", daemon=True)
        heart.start()
        with log.open("wb") as output:
            process = subprocess.Popen([sys.executable, "-P", "-m", "api"], env=os.environ | settings, stderr=output, cwd=folder)
        site = Site(f"http://127.0.0.1:{port}", process, log, anna, bert, admin)
        try:
            until(lambda: process.poll() is not None or _answers(site.url), within_s=60)
            assert process.poll() is None, log.read_text()
            yield site
        finally:
            process.kill()
            process.wait()
            ended.set()
            heart.join()
    finally:
        store.close()


@contextmanager
def with_broker(folder: Path) -> Iterator[Broker]:
    """A Valkey server; folder: short, for a socket's path may have 107 bytes."""
    broker = Broker(folder)
    broker.start()
    try:
        yield broker
    finally:
        broker.stop()


def _answers(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/healthz", trust_env=False).status_code == 200
    except httpx2.TransportError:
        return False


def _key(store: Store, owner: str, scope: Scope) -> str:
    with store.write() as tx:
        return keys.create(tx, owner=owner, scopes=frozenset({scope}))


def _beat(store: Store) -> None:
    with store.write() as tx:
        fleet.register(tx, WORKER)
        fleet.publish(tx, "models", [{"name": name, "title": name} for name in ("resnet18", "resnet50", "timm/vit_tiny_patch16_224")])
        fleet.publish(
            tx, "datasets", [{"name": name} for name in ("digits", "glyphs", "cifar10", "class_folder", "imagenet", "webdataset")]
        )


def _keep_beating(store: Store, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT_S):
        with store.write() as tx:
            fleet.heartbeat(tx, WORKER.id, devices=WORKER.devices, state="ready")


def _owner(store: Store, folder: Path, name: str) -> Owner:
    owner = Owner(name, _key(store, name, Scope.SUBMIT))
    for state in STATES:
        owner.jobs[state] = _in_state(store, folder, state, owner=name, name=f"{name}-{state}", labels={"of": name})
    owner.experiment = cancelled_experiment(store, owner=name, name=f"{name}-asks")
    give_report(store, folder, owner.experiment)
    return owner


def _queue(store: Store, *owners: Owner) -> None:
    """One more job each, that waits: last, or it would have been claimed in place of another."""
    for owner in owners:
        owner.jobs[JobState.QUEUED] = builders.submit(store, owner=owner.name, name=f"{owner.name}-queued")


def _in_state(store: Store, folder: Path, state: JobState, *, owner: str, **overrides: Any) -> str:
    match state:
        case JobState.SUCCEEDED:
            return _trained(store, folder, owner=owner, **overrides)
        case JobState.RUNNING | JobState.FAILED:
            return builders.bring_to(store, state, owner=owner, **overrides)
    job_id = builders.submit(store, owner=owner, **overrides)
    match state:
        case JobState.CANCELLED:
            builders.do(store, lifecycle.cancel, job_id, owner=owner)
        case JobState.PAUSED:
            builders.do(store, lifecycle.pause, job_id, owner=owner)
    return job_id


def _trained(store: Store, folder: Path, **overrides: Any) -> str:
    """A job that has succeeded, with metrics, a checkpoint, an artifact and a log, their files included."""
    run = builders.running(store, **overrides)
    home = folder / rows.job_dir(run.job_id)
    weights, labels = bytes(range(256)) * 4, b'["a","b"]'
    written = builders.checkpoint(10, 0.5).model_copy(update=_sums(home / builders.checkpoint(10).path / "model.safetensors", weights))
    builders.record(store, run, builders.plan(), *map(builders.step, range(1, 11)), builders.evaluation(10, 0.5), written)
    for name in (protocol.LABELS, protocol.PREPROCESSING):
        path = f"artifacts/{name}"
        sums = _sums(home / path, labels)
        builders.record(store, run, protocol.ArtifactWritten(name=name, path=path, media_type="application/json", **sums))
    _write(home / "logs" / "a1.log", b"epoch 1\nepoch 2\n")
    builders.finish(store, run)
    return run.job_id


def _sums(path: Path, data: bytes) -> dict[str, Any]:
    _write(path, data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
