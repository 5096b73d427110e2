"""Owners, their keys, and all that one of them can have on a server: for the tests of who may do what."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from sqlalchemy import update

from api.routes.experiments import FILES
from powergrad import protocol
from powergrad.jobs import keys, retention, rows, tables, tasks
from powergrad.jobs.experiments import lifecycle as experiments
from powergrad.jobs.experiments import plan
from powergrad.jobs.experiments.lifecycle import NewExperiment
from powergrad.jobs.keys import Scope
from powergrad.jobs.store import Store
from powergrad.jobs.tables import datasets, deliveries
from tests.api.conftest import DEADLINE_S, Api
from tests.jobs import builders

WORD = "annas-very-own"
"""Is in all that Anna has and in nothing else, so that nobody else's answer may contain it."""
FILE = b"weights"


def made(api: Api, owner: str, *scopes: Scope, ttl_s: float | None = None) -> str:
    """A new key, which the server knows at once."""
    key = builders.do(api.store, keys.create, owner=owner, scopes=frozenset(scopes or {Scope.SUBMIT}), ttl_s=ttl_s)
    api.parts.key_ring.forget()
    return key


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@contextmanager
def calling(api: Api, key: str | None = None) -> Iterator[httpx2.Client]:
    """A client of its own, with a key or none, and with its own cookies."""
    with httpx2.Client(base_url=api.url, trust_env=False, timeout=DEADLINE_S, headers={} if key is None else bearer(key)) as http:
        yield http


@dataclass(frozen=True)
class Possessions:
    """What an owner has: a job that has ended, with files, one in the queue, and one of everything else."""

    ended: str
    queued: str
    checkpoint: str
    artifact: str
    task: str
    dataset: str
    delivery: str
    experiment: str

    @property
    def ids(self) -> tuple[str, ...]:
        return self.ended, self.queued, self.task, self.dataset, self.delivery, self.experiment


def possessions(api: Api, owner: str) -> Possessions:
    store = api.store
    run = _trained(api, owner)
    with store.write() as tx:
        task_id = tasks.new_id(tx)
        tasks.submit(tx, task_id, "predict", {"image": WORD}, job_id=run.job_id, owner=owner)
        taken = tasks.claim(tx, lease_s=600)
        assert taken is not None
        tasks.finish(tx, taken, {"object": "prediction", "job": run.job_id, "checkpoint": WORD, "predictions": []})
    name, delivery = f"{WORD}-set", f"msg_{'0' * 26}"
    row: dict[str, Any] = {"owner": owner, "created_at": 1}
    held = {**row, "id": "ds_1", "name": name, "version": f"sha256:{'0' * 64}", "source": "uploaded", "state": "ready", "path": WORD}
    sent = {**row, "id": delivery, "job_id": run.job_id, "url": f"https://{WORD}.example", "event": "job.succeeded", "body": "{}"}
    with store.write() as tx:
        tx.run(datasets.insert().values(**held, files=2, bytes=100, report=_sampled(api.data_dir)))
        tx.run(deliveries.insert().values(**sent, state="failed", attempt=1, due_at=1))
    queued = builders.submit(store, owner=owner, name=WORD, key="annas-key", body="annas body")
    experiment = _experiment(api, owner)
    return Possessions(run.job_id, queued, retention.checkpoint_id(10), "labels.json", task_id, name, delivery, experiment)


def _sampled(data_dir: Path) -> dict[str, Any]:
    """The report of a set, with a sheet of its images on the disk."""
    (data_dir / "samples" / "ds_1").mkdir(parents=True, exist_ok=True)
    (data_dir / "samples" / "ds_1" / "train.png").write_bytes(FILE)
    sheet = {"bytes": len(FILE), "sha256": hashlib.sha256(FILE).hexdigest(), "rows": [[WORD, 1], ["b", 1]]}
    samples = {"path": "samples/ds_1", "tile": 64, "columns": 8, "splits": {"train": sheet}}
    return {"splits": {"train": 2}, "classes": 2, "class_counts": {WORD: {"train": 1}, "b": {"train": 1}}, "samples": samples}


def _experiment(api: Api, owner: str) -> str:
    """An experiment that was cancelled before it began, which no sweeper touches any more, with a report all the same."""
    made = cancelled_experiment(api.store, owner=owner, name=WORD, notes=WORD)
    give_report(api.store, api.data_dir, made)
    with api.store.write() as tx:
        tx.run(update(tables.experiments).values(due_at=None))
    return made


def cancelled_experiment(store: Store, *, owner: str, name: str, notes: str = "") -> str:
    question = plan.parse({"name": name, "spec": {"data": {"dataset": "digits"}}, "grid": {"loss.alpha": [1.0, 0.5]}, "seeds": 1})
    made = builders.do(store, experiments.submit, NewExperiment(question, owner=owner, notes=notes))
    builders.do(store, experiments.cancel, made.experiment_id, owner=owner)
    return made.experiment_id


def give_report(store: Store, data_dir: Path, experiment_id: str, content: bytes = FILE) -> None:
    """Files in the place where a worker's analysis would have put them."""
    folder = f"experiments/{experiment_id}/0"
    (data_dir / folder).mkdir(parents=True, exist_ok=True)
    file = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    for name in FILES:
        (data_dir / folder / name).write_bytes(content)
    files = {name: {"path": f"{folder}/{name}", "media_type": media_type, **file} for name, (media_type, _) in FILES.items()}
    with store.write() as tx:
        tx.run(update(tables.experiments).where(tables.experiments.c.id == experiment_id).values(files=files))


def _trained(api: Api, owner: str) -> rows.Run:
    builders.submit(api.store, owner=owner, name=WORD, labels={"word": WORD})
    run = builders.claimed(api.store).run
    file = {"bytes": len(FILE), "sha256": hashlib.sha256(FILE).hexdigest()}
    written = builders.checkpoint(10, 0.5).model_copy(update=file)
    home = api.data_dir / rows.job_dir(run.job_id)
    for path in (f"{written.path}/model.safetensors", "labels.json", "preprocessing.json"):
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        (home / path).write_bytes(FILE)
    artifacts = [
        protocol.ArtifactWritten(name=name, path=name, media_type="application/json", **file)
        for name in ("labels.json", "preprocessing.json")
    ]
    builders.record(api.store, run, builders.plan(), builders.step(1), builders.evaluation(10, 0.5), written, *artifacts)
    (home / "logs").mkdir(parents=True, exist_ok=True)
    (home / "logs" / "a1.log").write_text(f"{WORD}\n")
    builders.finish(api.store, run)
    return run
