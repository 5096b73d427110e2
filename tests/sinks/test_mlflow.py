"""Jobs copied to a real MLflow server, with what goes wrong on the way."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import select, update

from powergrad.jobs import lifecycle, rows, sweeps
from powergrad.jobs.artifacts import Artifacts
from powergrad.jobs.rows import Run
from powergrad.jobs.states import Outcome, ReasonCode
from powergrad.jobs.store import Store
from powergrad.jobs.tables import mlflow_copies
from powergrad.protocol import ArtifactWritten, RolledBack
from powergrad.sinks.mlflow import Copier, Server
from tests.jobs import builders as b
from tests.worker.conftest import until

ASKED: dict[str, Any] = {"outputs": {"mlflow": True}}
START_S = 150.0


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A tracking server of its own, over SQLite."""
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command: list[str | Path] = [
        Path(sys.executable).with_name("mlflow"),
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", folder / "artifacts"]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "log").open("wb") as out:
        process = subprocess.Popen(command, cwd=folder, env=os.environ | quiet, stdout=out, stderr=out, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: process.poll() is not None or _answers(url), within_s=START_S)
        assert process.poll() is None, (folder / "log").read_text()
        with httpx2.Client(base_url=url, trust_env=False, timeout=60.0) as http:
            yield Server(http)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture
def copier(store: Store, tmp_path: Path) -> Copier:
    return Copier(store, Artifacts(str(tmp_path)), "http://127.0.0.1:1", "powergrad", again_s=0.0)


def test_a_job_is_there_with_parameters_metrics_files_and_state(store: Store, copier: Copier, tracking: Server, tmp_path: Path) -> None:
    run = b.running(store, **ASKED, loss={"alpha": 0.25}, labels={"team": "vision"})
    b.record(store, run, b.plan(), b.step(1), b.step(2), b.evaluation(2, 0.5), b.evaluation(3, None), written(tmp_path, run, b"hello"))
    b.finish(store, run)
    assert copier.copy_due(tracking) == 1
    found = copied(tracking, run)
    assert found["info"]["status"] == "FINISHED"
    assert found["info"]["run_name"] == b.row(store, run.job_id).name
    assert {one["key"]: one["value"] for one in found["data"]["params"]}["loss.alpha"] == "0.25"
    tags = {one["key"]: one["value"] for one in found["data"]["tags"]}
    assert (tags["label.team"], tags["powergrad.state"], tags["powergrad.job"]) == ("vision", "succeeded", run.job_id)
    assert points(tracking, run, "train_loss") == [(1, 1.0), (2, 0.5)]
    assert points(tracking, run, "val_top1") == [(2, 0.5), (3, "NaN")]
    assert fetched(tracking, run, "hello.txt") == b"hello"
    assert not is_due(store, run)


def test_while_it_runs_metrics_go_no_further_than_the_last_checkpoint(store: Store, copier: Copier, tracking: Server) -> None:
    run = b.running(store, **ASKED)
    b.record(store, run, b.plan(), *(b.step(n) for n in range(1, 6)), b.checkpoint(3))
    copier.copy_due(tracking)
    assert steps(tracking, run) == [1, 2, 3]
    assert copied(tracking, run)["info"]["status"] == "RUNNING"
    b.record(store, run, *(b.step(n) for n in range(6, 11)), b.checkpoint(10))
    b.finish(store, run)
    copier.copy_due(tracking)
    assert steps(tracking, run) == list(range(1, 11))


def test_a_run_gone_on_with_has_no_step_twice(store: Store, copier: Copier, tracking: Server) -> None:
    run = b.running(store, **ASKED)
    b.record(store, run, b.plan(), b.step(1), b.checkpoint(1), b.step(2), b.step(3))
    b.finish(store, run, Outcome.FAILED, ReasonCode.DIVERGED)
    copier.copy_due(tracking)
    before = copied(tracking, run)["info"]
    assert (before["status"], steps(tracking, run)) == ("FAILED", [1, 2, 3])
    b.do(store, lifecycle.retry, run.job_id)
    again = b.claimed(store).run
    b.record(store, again, b.plan(resumed_step=1), b.step(2), b.step(3), b.step(4))
    b.finish(store, again)
    assert copier.copy_due(tracking) == 1
    after = copied(tracking, run)["info"]
    assert (after["status"], steps(tracking, run)) == ("FINISHED", [1, 2, 3, 4])
    assert after["run_id"] == before["run_id"]


def test_points_of_a_past_that_was_rolled_back_are_not_left_behind(store: Store, copier: Copier, tracking: Server) -> None:
    run = b.running(store, **ASKED)
    b.record(store, run, b.plan(), b.step(1), b.checkpoint(1), b.step(2), b.step(3), b.checkpoint(3))
    copier.copy_due(tracking)
    assert steps(tracking, run) == [1, 2, 3]
    b.record(store, run, RolledBack(from_step=3, to_step=1, checkpoint="step-00000001", lr_scale=0.5, detail="exploded"))
    b.record(store, run, b.step(2, 7.0))
    b.finish(store, run)
    copier.copy_due(tracking)
    assert points(tracking, run, "train_loss") == [(1, 1.0), (2, 7.0)]


def test_a_server_that_is_away_delays_and_loses_nothing(store: Store, copier: Copier, tracking: Server) -> None:
    run = b.running(store, **ASKED)
    b.record(store, run, b.plan(), b.step(1), b.step(2))
    b.finish(store, run)
    with httpx2.Client(base_url="http://127.0.0.1:1", trust_env=False) as http:
        for failures in (1, 2, 3):
            assert copier.copy_due(Server(http)) == 0
            assert row(store, run).failures == failures
            assert row(store, run).error
            make_due(store, run)
    assert copier.copy_due(tracking) == 1
    assert (steps(tracking, run), row(store, run).failures) == ([1, 2], 0)


def test_a_copier_that_died_after_making_the_run_makes_no_second(store: Store, copier: Copier, tracking: Server) -> None:
    run = b.running(store, **ASKED)
    b.record(store, run, b.plan(), b.step(1))
    b.finish(store, run)
    copier.copy_due(tracking)
    with store.write() as tx:
        tx.run(update(mlflow_copies).where(mlflow_copies.c.job_id == run.job_id).values(cursor={}, due_at=0))
    copier.copy_due(tracking)
    assert len(runs(tracking, run)) == 1
    assert points(tracking, run, "train_loss") == [(1, 1.0)]


def test_a_run_deleted_there_is_not_made_again(store: Store, copier: Copier, tracking: Server) -> None:
    run = b.running(store, **ASKED)
    b.record(store, run, b.plan(), b.step(1), b.checkpoint(1))
    copier.copy_due(tracking)
    tracking.call("POST", "runs/delete", run_id=copied(tracking, run)["info"]["run_id"])
    b.record(store, run, b.step(2), b.checkpoint(2))
    copier.copy_due(tracking)
    assert runs(tracking, run) == []
    assert not is_due(store, run)


def test_the_thread_copies_by_itself(store: Store, copier: Copier, tracking: Server) -> None:
    run = b.running(store, **ASKED)
    b.record(store, run, b.plan(), b.step(1))
    b.finish(store, run)
    copier.url, copier.look_s = str(tracking.http.base_url), 0.05
    copier.start()
    try:
        until(lambda: not is_due(store, run))
    finally:
        copier.stop()
    assert steps(tracking, run) == [1]


def test_a_job_that_does_not_ask_is_not_copied(store: Store, copier: Copier) -> None:
    run = b.running(store)
    b.finish(store, run)
    with store.read() as tx:
        assert tx.all(select(mlflow_copies)) == []
    assert copier.copy_due(Server(httpx2.Client(base_url="http://127.0.0.1:1"))) == 0


def test_a_job_is_not_forgotten_by_itself_before_it_is_copied(store: Store) -> None:
    run = b.running(store, **ASKED, retention={"ttl_seconds": 0.0})
    b.finish(store, run)
    assert b.do(store, sweeps.expire) == []
    with store.write() as tx:
        tx.run(update(mlflow_copies).values(due_at=None))
    assert b.do(store, sweeps.expire) == [run.job_id]
    with store.read() as tx:
        assert tx.all(select(mlflow_copies)) == []


def written(root: Path, run: Run, content: bytes) -> ArtifactWritten:
    path = root / rows.job_dir(run.job_id) / "artifacts" / "a1" / "stored-otherwise.txt"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    return ArtifactWritten(
        name="hello.txt", path="artifacts/a1/stored-otherwise.txt", media_type="text/plain", bytes=len(content), sha256=digest
    )


def row(store: Store, run: Run) -> Any:
    with store.read() as tx:
        return tx.one(select(mlflow_copies).where(mlflow_copies.c.job_id == run.job_id))


def is_due(store: Store, run: Run) -> bool:
    return row(store, run).due_at is not None


def make_due(store: Store, run: Run) -> None:
    with store.write() as tx:
        tx.run(update(mlflow_copies).where(mlflow_copies.c.job_id == run.job_id).values(due_at=0))


def runs(tracking: Server, run: Run) -> list[dict[str, Any]]:
    """The runs that MLflow has of a job, deleted ones left out."""
    wanted = {"experiment_ids": [tracking.experiment("powergrad")], "filter": f"tags.`powergrad.job` = '{run.job_id}'"}
    return list(tracking.call("POST", "runs/search", **wanted, max_results=10).get("runs", []))


def copied(tracking: Server, run: Run) -> dict[str, Any]:
    (found,) = runs(tracking, run)
    return found


def points(tracking: Server, run: Run, name: str) -> list[tuple[int, Any]]:
    found = tracking.call("GET", "metrics/get-history", run_id=copied(tracking, run)["info"]["run_id"], metric_key=name)
    return sorted((int(point.get("step", 0)), point["value"]) for point in found["metrics"])


def steps(tracking: Server, run: Run) -> list[int]:
    return [step for step, _ in points(tracking, run, "train_loss")]


def fetched(tracking: Server, run: Run, name: str) -> bytes:
    run_id = copied(tracking, run)["info"]["run_id"]
    answer = tracking.http.get("/get-artifact", params={"run_id": run_id, "path": name})
    assert answer.status_code == 200, answer.text
    return answer.content
