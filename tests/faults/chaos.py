"""The chaos soak: a real stack, hundreds of small jobs, seeded random violence, and then the judge.

    scripts/chaos --seed 7 --minutes 10 --database postgresql --workers 2

What is done when is a pure function of the seed; on whom depends on who is there. At the end the violence stops, everything must drain,
and every job's record is judged against the same spec's undisturbed run. Exit status 1 on any violation.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from powergrad.cli.stack import free_port
from tests.faults import history
from tests.faults.conftest import Site
from tests.faults.customers import SHAPES, Customers
from tests.faults.injuries import BY_DATABASE, Done, Kind, Patient
from tests.faults.postgresql import PostgreSQL
from tests.faults.witness import Overlap, Witness

LEASE_TTL_S = 10.0
SETTINGS = {
    "POWERGRAD_LEASE_TTL_S": f"{LEASE_TTL_S:g}",
    "POWERGRAD_LEASE_MARGIN_S": "2",
    "POWERGRAD_HEARTBEAT_S": "2",
    "POWERGRAD_STOP_GRACE_S": "20",
}
MEAN_PAUSE_S = 4.0
SAY_EVERY_S = 15.0
DRAIN_S = 300.0
REFERENCE_S = 240.0
STARTS = 3
STALE_CPU_S = 0.25  # what a process may take on its way out: more, and it was at work
WORKER_INJURIES = frozenset(
    {"kill_worker", "kill_all_workers", "kill_template", "stop_worker", "stop_worker_and_trainers", "terminate_worker"}
)
IN_THE_WAY = WORKER_INJURIES | {"lock_sqlite", "restart_postgresql", "kill_postgresql", "stop_trainer"}
"""What makes a recovery wait for more than itself."""
NEAR_S = 20.0
ERROR_LINE = re.compile(r"^(?:[\w.]+\.)?(\w*(?:Error|Exception|Fenced|Warning|Exit|Broken\w*))(?::|$)")


@dataclass(frozen=True)
class Blow:
    """One injury of the schedule: when, of what kind, and the seed of its own dice."""

    at_s: float
    kind: Kind
    seed: str


@dataclass(frozen=True)
class Struck:
    """An injury that found its victim. at: seconds since 1970, the clock of the jobs' events."""

    at: float
    kind: str
    done: Done


@dataclass(frozen=True)
class Recovery:
    """From a worker's kill -9 to the next training step of a job of its. lone: no other injury that costs workers or the database was near."""

    job: str
    kind: str
    seconds: float
    lone: bool


@dataclass
class Report:
    """What a soak has found."""

    seed: int
    minutes: float
    database: str
    workers: int
    faults: dict[str, int] = field(default_factory=dict)
    jobs: dict[str, int] = field(default_factory=dict)
    experiments: dict[str, int] = field(default_factory=dict)
    attempts: int = 0
    violations: list[history.Violation] = field(default_factory=list)
    recoveries: list[Recovery] = field(default_factory=list)
    overlaps: list[Overlap] = field(default_factory=list)
    looks: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    """Exceptions in the processes' logs, by name: no violations, but worth a look."""
    seconds: float = 0.0


def schedule(seed: int, *, minutes: float, database: str, mean_pause_s: float = MEAN_PAUSE_S) -> list[Blow]:
    """Every blow of a soak, a pure function of its arguments."""
    dice, kinds, blows, at_s = random.Random(f"chaos-{seed}"), BY_DATABASE[database], list[Blow](), 0.0
    while (at_s := at_s + dice.expovariate(1 / mean_pause_s)) < minutes * 60:
        kind = dice.choices(kinds, [kind.weight for kind in kinds])[0]
        blows.append(Blow(at_s, kind, f"chaos-{seed}-{len(blows)}"))
    return blows


@dataclass
class Soak:
    """One stack, its users, its tormentor. say: hears a line now and then."""

    site: Site
    report: Report
    witness: Witness
    customers: Customers
    references: dict[str, history.Undisturbed] = field(default_factory=dict)
    struck: list[Struck] = field(default_factory=list)
    _undo: list[tuple[float, int, str | None, Done]] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.patient = Patient(self.site, self.witness, LEASE_TTL_S)

    def run(self, blows: Sequence[Blow]) -> None:
        """The whole soak; what it finds goes into the report."""
        began_s = time.monotonic()
        self.learn_the_ordinary_course()
        self.witness.start()
        self.customers.start()
        try:
            self.torment(blows)
        finally:
            self.relieve()
        drained = self.drain()
        self.witness.stop()
        self.judge(drained=drained)
        self.report.seconds = time.monotonic() - began_s

    def learn_the_ordinary_course(self) -> None:
        """Run every shape once, with nothing happening to it."""
        for name, spec in SHAPES.items():
            key = f"undisturbed-{name.replace(' ', '-')}"
            job_id = self.site.client.submit(spec, idempotency_key=key).id
            self.customers.answers[key], self.customers.shapes[job_id] = [job_id], name
        for job_id, name in self.customers.shapes.items():
            self.site.until_state(job_id, *history.TERMINAL, within_s=REFERENCE_S)
            self.references[name] = self.site.undisturbed(job_id)

    def torment(self, blows: Sequence[Blow]) -> None:
        began_s, said_s = time.monotonic(), time.monotonic()
        for blow in blows:
            while (left_s := began_s + blow.at_s - time.monotonic()) > 0:
                self._heal(time.monotonic())
                time.sleep(min(left_s, 0.05))
            if time.monotonic() - said_s > SAY_EVERY_S:
                said_s = time.monotonic()
                say(f"{said_s - began_s:4.0f} s: {len(self.customers.answers)} jobs accepted, {len(self.struck)} faults")
            self._strike(blow)

    def relieve(self) -> None:
        """Whatever lasts ends now."""
        self._heal(float("inf"))

    def drain(self) -> bool:
        """Whether every story and every job came to its end in time."""
        say(f"no more faults; {len(self.customers.answers)} jobs accepted")
        deadline_s = time.monotonic() + DRAIN_S
        told = self.customers.settle(DRAIN_S)
        while (left := self._unfinished()) != []:
            if time.monotonic() > deadline_s:
                say(f"not drained: {left}")
                return False
            time.sleep(0.5)
        return told

    def judge(self, *, drained: bool) -> None:
        report, found = self.report, self.report.violations
        if not drained:
            found.append(history.Violation("-", "everything_drains", f"not within {DRAIN_S:g} s"))
        found += [history.Violation("-", "no_call_is_refused_without_cause", text) for text in self.customers.refusals]
        stored = [job.id for job in self.site.client.list(page_size=100)]
        records = {job_id: self.site.record(job_id) for job_id in stored}
        own, waiting = self.judge_experiments(records)
        found += history.judge_acceptance({**self.customers.answers, **{job_id: [job_id] for job_id in own}}, stored)
        for job_id, record in records.items():
            damaged = frozenset(self.patient.damaged.get(job_id, ()))
            asked = history.Asked(self.customers.cancels.get(job_id, "no"), damaged, waits=job_id in waiting)
            found += history.judge(record, asked, self.references.get(self.customers.shapes.get(job_id, "")))
        report.faults = dict(Counter(one.kind for one in self.struck).most_common())
        report.jobs = dict(Counter(str(record.job["state"]) for record in records.values()).most_common())
        report.attempts = sum(record.job["attempt"] for record in records.values())
        report.recoveries = list(recoveries(self.struck, records))
        report.overlaps, report.looks = self.witness.overlaps(), self.witness.looks
        found += [stale_trainer(overlap, records[overlap.job]) for overlap in report.overlaps if overlap.cpu_s > STALE_CPU_S]
        report.errors = errors_in(self.site.data_dir / "logs")

    def judge_experiments(self, records: Mapping[str, history.Record]) -> tuple[set[str], set[str]]:
        """The jobs that experiments have made, whose users may have ended them; those of searches, of which some wait for ever."""
        views = [one.view.model_dump(mode="json") for one in self.site.client.experiments()]
        self.report.violations += history.judge_acceptance(self.customers.questions, [view["id"] for view in views])
        self.report.experiments = dict(Counter(str(view["state"]) for view in views).most_common())
        own, waiting = set[str](), set[str]()
        for view in views:
            jobs = [record.job for record in records.values() if record.job["experiment"] == view["id"]]
            cancelled = self.customers.wishes.get(view["id"]) == "cancelled"
            self.report.violations += history.judge_experiment(view, jobs, cancelled=cancelled)
            own |= {job["id"] for job in jobs}
            waiting |= {job["id"] for job in jobs if history.rungs(view)}
            if cancelled:
                self.customers.cancels.update({job["id"]: "maybe" for job in jobs})
        return own, waiting

    def _strike(self, blow: Blow) -> None:
        dice = random.Random(blow.seed)
        if blow.kind.alone is not None and any(group == blow.kind.alone for _, _, group, _ in self._undo):
            return
        if blow.kind.name in WORKER_INJURIES and not self.patient.has_spare(dice):
            return
        at = time.time()
        done = blow.kind.inflict(self.patient, dice)
        if done is None:
            return
        self.struck.append(Struck(at, blow.kind.name, done))
        if done.undo is not None:
            heapq.heappush(self._undo, (time.monotonic() + (done.lasts_s or 0.0), next(self._numbers), blow.kind.alone, done))

    def _heal(self, now_s: float) -> None:
        while self._undo and self._undo[0][0] <= now_s:
            done = heapq.heappop(self._undo)[3]
            assert done.undo is not None
            done.undo()

    def _unfinished(self) -> list[str]:
        states = ["queued", "running", "pausing", "paused", "cancelling"]
        asked = self.site.ask(lambda: list(self.site.client.experiments()))
        found = self.site.ask(lambda: list(self.site.client.list(state=states)))
        if asked is None or found is None:
            return ["nothing answers"]
        over = {one.id for one in asked if one.is_settled}  # who has lost a search stays paused
        left = [job for job in found if not (job.state == "paused" and job.experiment in over)]
        return [f"{one.id} is {one.state}" for one in [*left, *(one for one in asked if not one.is_settled)]]


def stale_trainer(overlap: Overlap, record: history.Record) -> history.Violation:
    seen = (
        f"attempt {overlap.stale} lived {overlap.seconds:.2f} s beside {overlap.fresh}, stopped for {overlap.stopped_s:.2f} s of them, "
        f"and took {overlap.cpu_s:.2f} s of processor time"
    )
    return history.Violation(overlap.job, "a_stale_trainer_does_not_work", f"{seen}\n{history.history(record)}")


def recoveries(struck: Sequence[Struck], records: dict[str, history.Record]) -> Iterator[Recovery]:
    """For each job that a worker's kill -9 interrupted, the time to its next step, if its user let it go on."""
    for blow in struck:
        for job in blow.done.interrupted:
            record = records.get(job)
            stepped_at = None if record is None else _next_step_at(record, blow.at)
            if stepped_at is not None:
                near = [other for other in struck if blow.at - NEAR_S < other.at < stepped_at and other.kind in IN_THE_WAY]
                yield Recovery(job, blow.kind, stepped_at - blow.at, lone=near == [blow])


def _next_step_at(record: history.Record, at: float) -> float | None:
    """When a later attempt had done a step, or ended with none left to do; None where the user wanted something else meanwhile."""
    before = [event["data"]["attempt"] for event in record.events if event["type"] == "claimed" and event["at"] <= at]
    for event in record.events:
        if event["at"] <= at:
            continue
        if event["type"] == "state" and event["data"]["to"] in {"pausing", "paused", "cancelling"}:
            return None
        later = event["data"].get("attempt", 0) > (before[-1] if before else 0)
        if later and event["type"] in {"metrics", "attempt_ended"}:
            return float(event["at"])
    return None


def errors_in(logs: Path) -> dict[str, int]:
    """Last lines of tracebacks in the processes' logs, counted by the exception's name."""
    found: Counter[str] = Counter()
    for path in sorted(logs.glob("*.log*")):
        for line in path.read_text(errors="replace").splitlines():
            if (named := ERROR_LINE.match(line)) is not None:
                found[f"{path.name.partition('.')[0].rstrip('-0123456789')}: {named[1]}"] += 1
    return dict(found.most_common())


# --- what is told -----------------------------------------------------------------------------------------------------------------


def told(report: Report) -> str:
    """The report for people."""
    lines = [f"seed {report.seed}, {report.minutes:g} min, {report.database}, {report.workers} workers, {report.seconds:.0f} s in all"]
    lines.append(f"faults: {sum(report.faults.values())}: {_counted(report.faults)}")
    lines.append(f"jobs: {sum(report.jobs.values())}: {_counted(report.jobs)}; {report.attempts} attempts")
    lines.append(f"experiments: {sum(report.experiments.values())}: {_counted(report.experiments) or 'none'}")
    lines.append(f"recovery, kill -9 of a worker to the next step: {_spread([one.seconds for one in report.recoveries])}")
    lines.append(f"  with no other injury in the way: {_spread([one.seconds for one in report.recoveries if one.lone])}")
    lines.append(
        f"two trainers of one job: {len(report.overlaps)} times in {report.looks} looks; {sum(one.seconds for one in report.overlaps):.2f} s, "
        f"the stale one stopped for {sum(one.stopped_s for one in report.overlaps):.2f} s of them; "
        f"processor time it took: {sum(one.cpu_s for one in report.overlaps):.2f} s"
    )
    lines.append(f"errors in logs: {_counted(report.errors) or 'none'}")
    lines += [f"\nVIOLATION {one.rule}, {one.job}: {one.evidence}" for one in report.violations]
    lines.append(f"violations: {len(report.violations)}")
    return "\n".join(lines)


def as_json(report: Report) -> dict[str, Any]:
    return asdict(report)


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in counts.items())


def _spread(seconds: Sequence[float]) -> str:
    if not seconds:
        return "none"
    cuts = statistics.quantiles(seconds, n=100, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 99
    return f"p50 {cuts[49]:.1f} s, p99 {cuts[98]:.1f} s, longest {max(seconds):.1f} s, of {len(seconds)}"


def say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


# --- the command ------------------------------------------------------------------------------------------------------------------


@contextmanager
def stack(folder: Path, *, database: str, workers: int) -> Iterator[Site]:
    """A stack of two slots and its database, gone at the end whatever happens."""
    with ExitStack() as kept:
        server = kept.enter_context(PostgreSQL()) if database == "postgresql" else None
        url = None if server is None else server.url
        site = Site(folder / "data", free_port("127.0.0.1"), settings=SETTINGS, database_url=url, workers=workers, postgresql=server)
        kept.callback(site.close)
        _start(site)
        yield site


def _start(site: Site) -> None:
    """Again, where a busy machine took longer than `powergrad up` waits."""
    for _ in range(STARTS - 1):
        with suppress(AssertionError):
            return site.start()
        if site.up is not None:
            site.stop(signal.SIGTERM)
    return site.start()


def soak(folder: Path, *, seed: int, minutes: float, database: str, workers: int, mean_pause_s: float = MEAN_PAUSE_S) -> Report:
    """Run one from beginning to end on a stack of its own."""
    report = Report(seed, minutes, database, workers)
    with stack(folder, database=database, workers=workers) as site:
        assert site.up is not None
        made = Soak(site, report, Witness(site.up.pid), Customers(site.port, random.Random(f"customers-{seed}")))
        made.run(schedule(seed, minutes=minutes, database=database, mean_pause_s=mean_pause_s))
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/chaos", description="Torment a stack for some minutes, then judge what it did with its jobs."
    )
    parser.add_argument("--seed", type=int, default=None, help="of the schedule and the users; default a random one, printed")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--database", choices=sorted(BY_DATABASE), default="sqlite")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pause", type=float, default=MEAN_PAUSE_S, help="mean seconds between two faults")
    parser.add_argument("--keep", type=Path, default=None, help="folder for the stack's data and logs; default one that is deleted")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(1_000_000) if given.seed is None else given.seed
    signal.signal(signal.SIGTERM, _leave)
    folder = given.keep or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    say(f"seed {seed}")
    try:
        report = soak(folder, seed=seed, minutes=given.minutes, database=given.database, workers=given.workers, mean_pause_s=given.pause)
    except KeyboardInterrupt:
        say("stopped")
        return 130
    finally:
        if given.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    sys.stdout.write((json.dumps(as_json(report), indent=1) if given.json else told(report)) + "\n")
    return 1 if report.violations else 0


def _leave(number: int, frame: FrameType | None) -> None:
    """SIGTERM as Ctrl-C: everything that was started is ended."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
