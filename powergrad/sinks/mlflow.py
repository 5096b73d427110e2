"""Jobs copied to an MLflow tracking server, from what is stored: a server that is away delays the copy, and no training ever waits for it.

It speaks MLflow's REST API (2.0) itself: the library loads scipy, pandas and 250 MB into a process that only supervises. Metrics go up to the
last checkpoint while a job runs, and whole when it pauses or ends, so that a resume finds nothing to take back; MLflow cannot take back a
point. Where a past was abandoned all the same (a roll-back, a run that is only statistically repeatable), the run in MLflow is deleted and
made anew. What is sent twice is the same point twice, which MLflow stores once.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
import structlog
from sqlalchemy import Row, func, select

from powergrad.jobs import copies
from powergrad.jobs.artifacts import Artifacts
from powergrad.jobs.copies import Copy
from powergrad.jobs.rows import job_dir
from powergrad.jobs.states import TERMINAL, JobState
from powergrad.jobs.store import Store, Tx, is_unavailable
from powergrad.jobs.tables import artifacts, checkpoints, events, jobs
from powergrad.sinks import history
from powergrad.sinks.history import CUTS, History
from powergrad.spec import TrainSpec

API = "/api/2.0/mlflow/"
PROXIED = "mlflow-artifacts:"
METRICS_A_CALL, PARAMS_A_CALL, TAGS_A_CALL = 1000, 100, 100  # the API's own limits
LONGEST_VALUE = 5000
LOOK_S = 2.0
AGAIN_S = 5.0
TIMEOUT_S = 20.0
STATUS = {
    JobState.QUEUED: "SCHEDULED",
    JobState.RUNNING: "RUNNING",
    JobState.PAUSING: "RUNNING",
    JobState.CANCELLING: "RUNNING",
    JobState.PAUSED: "SCHEDULED",
    JobState.SUCCEEDED: "FINISHED",
    JobState.FAILED: "FAILED",
    JobState.CANCELLED: "KILLED",
}
AT_REST = TERMINAL | {JobState.PAUSED}

log = structlog.get_logger(__name__)


class Refused(Exception):
    """The tracking server answered with an error. code: MLflow's own, or the status."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code


@dataclass(frozen=True)
class Server:
    """The calls of the REST API that a copy needs. Raises Refused, and httpx2.HTTPError when there is no answer."""

    http: httpx2.Client

    def call(self, method: str, path: str, **body: Any) -> dict[str, Any]:
        named: dict[str, Any] = {"params": body} if method == "GET" else {"json": body}
        return _understood(self.http.request(method, API + path, **named))

    def experiment(self, name: str) -> str:
        """Its id; it is made if need be."""
        try:
            found = self.call("GET", "experiments/get-by-name", experiment_name=name)
        except Refused as error:
            if error.code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return str(self.call("POST", "experiments/create", name=name)["experiment_id"])
        return str(found["experiment"]["experiment_id"])

    def run_of(self, job_id: str, experiment: str) -> str | None:
        """The run that is the job's: one that was made when the answer did not reach us."""
        wanted = f"tags.`powergrad.job` = '{job_id}'"
        found = self.call("POST", "runs/search", experiment_ids=[experiment], filter=wanted, max_results=1).get("runs", [])
        return str(found[0]["info"]["run_id"]) if found else None

    def put_file(self, run: str, path: Path, name: str) -> None:
        """Through the tracking server, which must keep the artifacts itself. Raises ValueError where it does not."""
        uri = str(self.call("GET", "runs/get", run_id=run)["run"]["info"]["artifact_uri"])
        if not uri.startswith(PROXIED):
            raise ValueError(f"artifacts lie at {uri.partition(':')[0]}: start the MLflow server with --serve-artifacts")
        folder = uri.removeprefix(PROXIED).lstrip("/")
        with path.open("rb") as file:
            content = iter(lambda: file.read(1 << 20), b"")
            _understood(self.http.put(f"/api/2.0/mlflow-artifacts/artifacts/{quote(folder)}/{quote(name)}", content=content))


def _understood(answer: httpx2.Response) -> dict[str, Any]:
    if answer.is_success:
        return dict(answer.json()) if answer.content else {}
    try:
        told = answer.json()
        raise Refused(str(told["error_code"]), str(told.get("message", ""))[:300])
    except (ValueError, KeyError, TypeError):
        raise Refused(str(answer.status_code), answer.text[:300]) from None


@dataclass(frozen=True)
class Seen:
    """What is stored of a job when a round begins. history: what has come since the last round, or all of it."""

    job: Row[Any]
    history: History
    settled: int | None
    """Up to this step no metric will be taken back; None: everything."""
    is_anew: bool
    """Whether the job has given up points that were copied."""
    files: list[Row[Any]]


def look(tx: Tx, copy: Copy) -> Seen | None:
    """None: the job is gone."""
    job = tx.one(select(jobs).where(jobs.c.id == copy.job_id))
    if job is None:
        return None
    newest = select(func.max(checkpoints.c.step)).where(checkpoints.c.job_id == job.id, checkpoints.c.broken.is_(False))
    is_anew = _was_taken_back(tx, job, copy.cursor)
    return Seen(
        job=job,
        history=history.read(tx, job.id, after={} if is_anew else copy.cursor.get("steps")),
        settled=None if JobState(job.state) in AT_REST else int(tx.run(newest).scalar_one() or 0),
        is_anew=is_anew,
        files=list(tx.all(select(artifacts).where(artifacts.c.job_id == job.id).order_by(artifacts.c.name))),
    )


def _was_taken_back(tx: Tx, job: Row[Any], cursor: dict[str, Any]) -> bool:
    """A run that is repeated from a checkpoint gives the same points where it is bitwise repeatable; after a roll-back it never does."""
    copied = max(cursor.get("steps", {}).values(), default=0)
    query = select(events.c.type, events.c.data).where(events.c.job_id == job.id, events.c.type.in_(list(CUTS)))
    cuts = [event for event in tx.all(query.where(events.c.seq > cursor.get("seq", 0))) if event.data[CUTS[event.type]] < copied]
    return any(event.type == "rolled_back" or job.resolved.get("determinism") != "bitwise" for event in cuts)


@dataclass
class Round:
    """One job brought up to date. `cursor` says at any moment what has been copied."""

    server: Server
    seen: Seen
    cursor: dict[str, Any]
    experiment: str
    folder: Path
    """The job's own."""

    def run(self) -> None:
        if self.seen.is_anew:
            self.server.call("POST", "runs/delete", run_id=self.cursor["run"])
            self.cursor.clear()
        if "run" not in self.cursor:
            self._begin()
        self._log_params()
        self._log_metrics()
        if JobState(self.seen.job.state) in TERMINAL:
            self._put_files()
        self._tell_state()  # last: what is FINISHED is whole
        self.cursor |= {"revision": self.seen.job.revision, "seq": self.seen.job.seq}

    def _begin(self) -> None:
        job, experiment = self.seen.job, self.server.experiment(self.experiment)
        run = self.server.run_of(job.id, experiment)
        if run is None:
            tags = [{"key": "powergrad.job", "value": job.id}, {"key": "mlflow.user", "value": job.owner}]
            asked = {"experiment_id": experiment, "run_name": job.name, "start_time": job.created_at, "tags": tags}
            run = self.server.call("POST", "runs/create", **asked)["run"]["info"]["run_id"]
        self.cursor["run"] = run

    def _log(self, **what: list[dict[str, Any]]) -> None:
        self.server.call("POST", "runs/log-batch", run_id=self.cursor["run"], **what)

    def _log_params(self) -> None:
        if self.cursor.get("params"):
            return
        training = {name: value for name, value in self.seen.job.spec.items() if name in TrainSpec.model_fields}
        for some in _parts(sorted(history.flat(training).items()), PARAMS_A_CALL):
            self._log(params=[{"key": name, "value": _text(value)} for name, value in some])
        self.cursor["params"] = True

    def _log_metrics(self) -> None:
        found, settled = self.seen.history, self.seen.settled
        points = sorted(
            (step, name, value) for name, series in found.series.items() for step, value in series if settled is None or step <= settled
        )
        for some in _parts(points, METRICS_A_CALL):
            self._log(
                metrics=[
                    # protobuf's JSON spells it so
                    {"key": name, "value": "NaN" if value is None else value, "timestamp": found.times.at_ms(step), "step": step}
                    for step, name, value in some
                ]
            )
            self.cursor["steps"] = self.cursor.get("steps", {}) | {name: step for step, name, _ in some}

    def _put_files(self) -> None:
        sent = self.cursor.setdefault("files", {})
        for file in self.seen.files:
            if sent.get(file.name) == file.sha256:
                continue
            try:
                self.server.put_file(self.cursor["run"], self.folder / file.path, file.name)
            except FileNotFoundError:
                log.warning("an artifact is gone", job=self.seen.job.id, name=file.name)
            except ValueError as error:  # it will not change by itself, and the rest is worth having
                self.cursor["without_files"] = str(error)
                return
            sent[file.name] = file.sha256

    def _tell_state(self) -> None:
        job = self.seen.job
        tags = _tags(job) | ({"powergrad.without_files": self.cursor["without_files"]} if "without_files" in self.cursor else {})
        changed = {name: value for name, value in tags.items() if self.cursor.get("tags", {}).get(name) != value}
        for some in _parts(sorted(changed.items()), TAGS_A_CALL):
            self._log(tags=[{"key": name, "value": value} for name, value in some])
        self.cursor["tags"] = tags
        state = {"status": STATUS[JobState(job.state)], "run_name": job.name}
        if JobState(job.state) in TERMINAL:
            state["end_time"] = job.finished_at
        if self.cursor.get("state") != state:
            self.server.call("POST", "runs/update", run_id=self.cursor["run"], **state)
            self.cursor["state"] = state


def _tags(job: Row[Any]) -> dict[str, str]:
    tags = {
        "mlflow.source.name": "powergrad",
        "mlflow.note.content": job.notes,
        "powergrad.state": job.state,
        "powergrad.reason": "" if job.reason is None else f"{job.reason['code']}: {job.reason['detail']}",
        "powergrad.attempt": str(job.attempt),
        "powergrad.experiment": job.experiment or "",
        "powergrad.determinism": job.resolved.get("determinism", ""),
        **{f"label.{name}": value for name, value in job.labels.items()},
    }
    return {name: value[:LONGEST_VALUE] for name, value in tags.items() if value}


def _text(value: Any) -> str:
    return (value if isinstance(value, str) else json.dumps(value))[:LONGEST_VALUE]


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[at : at + size] for at in range(0, len(items), size))


@dataclass
class Copier:
    """Copies what is due, from a thread of its own, until stopped. Any number may run, in any number of workers."""

    store: Store
    files: Artifacts
    url: str
    experiment: str
    look_s: float = LOOK_S
    again_s: float = AGAIN_S
    _stopping: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """At once, or after the call that is under way; what it leaves undone is another round's."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=5.0)

    def _run(self) -> None:
        with httpx2.Client(base_url=self.url.rstrip("/"), auth=_credentials(), headers=_token(), timeout=TIMEOUT_S) as http:
            while not self._stopping.wait(self.look_s):
                try:
                    self.copy_due(Server(http))
                except Exception as error:  # the copier outlives its rounds
                    if is_unavailable(error):
                        log.warning("mlflow: database away")
                    else:
                        log.exception("mlflow: a round failed")

    def copy_due(self, server: Server) -> int:
        """Bring every copy that is due up to date, until one cannot be; how many rounds went well."""
        with self.store.read() as tx:
            some = copies.due(tx)
        done = 0
        for job_id in some:
            if self._stopping.is_set() or not self._copy(server, job_id):
                break
            done += 1
        return done

    def _copy(self, server: Server, job_id: str) -> bool:
        with self.store.write() as tx:
            copy = copies.claim(tx, job_id)
        if copy is None:
            return True
        with self.store.read() as tx:
            seen = look(tx, copy)
        if seen is None:
            return True
        cursor = json.loads(json.dumps(copy.cursor))
        try:
            if cursor.get("revision") != seen.job.revision:
                Round(server, seen, cursor, self.experiment, self.files.local_path(job_dir(job_id))).run()
        except (httpx2.HTTPError, Refused, OSError) as error:
            self._failed(server, copy, cursor, error)
            return False
        with self.store.write() as tx:
            copies.settle(tx, copy, cursor, again_in_s=None if JobState(seen.job.state) in TERMINAL else self.again_s)
        return True

    def _failed(self, server: Server, copy: Copy, cursor: dict[str, Any], error: Exception) -> None:
        gone = isinstance(error, Refused) and "run" in cursor and _is_deleted(server, cursor["run"])
        log.warning("mlflow: the run was deleted there: copied no more" if gone else "mlflow: put off", job=copy.job_id, error=str(error))
        with self.store.write() as tx:
            (copies.give_up if gone else copies.put_off)(tx, copy, cursor, str(error) or type(error).__name__)


def _is_deleted(server: Server, run: str) -> bool:
    try:
        return bool(server.call("GET", "runs/get", run_id=run)["run"]["info"]["lifecycle_stage"] == "deleted")
    except Refused as error:
        return error.code == "RESOURCE_DOES_NOT_EXIST"
    except httpx2.HTTPError:
        return False


def _credentials() -> tuple[str, str] | None:
    name, password = (os.environ.get(f"MLFLOW_TRACKING_{part}", "") for part in ("USERNAME", "PASSWORD"))
    return (name, password) if name else None


def _token() -> dict[str, str]:
    token = os.environ.get("MLFLOW_TRACKING_TOKEN", "")
    return {"Authorization": f"Bearer {token}"} if token else {}
