"""An independent witness of which trainers live: the kernel's own list of processes, looked at many times a second.

It trusts nothing that a stack says of itself. Each trainer it sees is kept as a `Sighting`, from its first look to its last; two of one
job at a time are an `Overlap`. What the stale one of them did meanwhile is told by the processor time that it took: a stopped or dying
process takes none.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

LOOK_S = 0.02
SEARCH_S = 0.5
"""Between two searches of the whole family for templates; their children are looked at in every round."""
TICKS_S = 1 / os.sysconf("SC_CLK_TCK")
TITLE = re.compile(r"powergrad: trainer (job_\w+)")
LOG = re.compile(r"/logs/a(\d+)\.log$")


@dataclass
class Sighting:
    """One trainer process. Times are of `time.monotonic`; attempt is 0 until its log could be seen."""

    pid: int
    worker: int
    job: str = ""
    attempt: int = 0
    first_s: float = 0.0
    last_s: float = 0.0
    looks: list[tuple[float, bool, float]] = field(default_factory=list)
    """(when, whether it was stopped, processor seconds so far)"""

    def between(self, begin_s: float, end_s: float) -> list[tuple[float, bool, float]]:
        return [look for look in self.looks if begin_s <= look[0] <= end_s]


@dataclass(frozen=True)
class Overlap:
    """Two trainers of one job at a time. stopped_s: how much of it the stale one was stopped; cpu_s: processor time it took meanwhile."""

    job: str
    stale: int
    fresh: int
    seconds: float
    stopped_s: float
    cpu_s: float


class Witness:
    """Looks from `start` to `stop`. root: pid of the process whose family the stack is."""

    def __init__(self, root: int) -> None:
        self.root = root
        self.sightings: list[Sighting] = []
        self.looks = 0
        self._live: dict[int, Sighting] = {}
        self._templates: dict[int, int] = {}  # pid -> its worker's
        self._others: set[int] = set()
        self._searched_s = 0.0
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="witness", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def living(self, worker: int | None = None) -> list[Sighting]:
        """The trainers seen at the last look, those of a worker or all, by job."""
        with self._lock:
            seen = [sighting for sighting in self._live.values() if sighting.job and worker in (None, sighting.worker)]
        return sorted(seen, key=lambda sighting: sighting.job)

    def overlaps(self) -> list[Overlap]:
        return find_overlaps(self.sightings)

    def _watch(self) -> None:
        while not self._stopping.wait(LOOK_S):
            now = time.monotonic()
            if now - self._searched_s >= SEARCH_S:
                self._search()
                self._searched_s = now
            for template, worker in list(self._templates.items()):
                for pid in _children(template):
                    if pid not in self._live and pid not in self._others:
                        self._live[pid] = Sighting(pid, worker, first_s=now)
            for sighting in list(self._live.values()):
                self._look(sighting)
            self.looks += 1

    def _search(self) -> None:
        try:
            family = psutil.Process(self.root).children(recursive=True)
        except psutil.NoSuchProcess:
            return
        parents = {process.pid: process for process in family}
        self._templates = {
            pid: process.ppid()
            for pid, process in parents.items()
            if process.is_running() and _title(pid).startswith("powergrad: template")
        }
        self._others &= parents.keys()

    def _look(self, sighting: Sighting) -> None:
        seen = _stat(sighting.pid)
        if seen is None:
            with self._lock:
                del self._live[sighting.pid]
            return
        state, cpu_s = seen
        sighting.last_s = time.monotonic()
        sighting.looks.append((sighting.last_s, state in "Tt", cpu_s))
        if not sighting.job:
            self._name(sighting)
        elif not sighting.attempt:
            sighting.attempt = _attempt(sighting.pid)

    def _name(self, sighting: Sighting) -> None:
        """A fork bears its template's title until it says what it is: a trainer, or something that is none of ours."""
        title = _title(sighting.pid)
        named = TITLE.match(title)
        if named:
            sighting.job, sighting.attempt = named[1], _attempt(sighting.pid)
            self.sightings.append(sighting)
        elif title and not title.startswith("powergrad: template"):
            self._others.add(sighting.pid)
            with self._lock:
                del self._live[sighting.pid]


def find_overlaps(sightings: Iterable[Sighting]) -> list[Overlap]:
    """Each pair of trainers of one job that were there at the same time, the one of the lower attempt being the stale one."""
    by_job: dict[str, list[Sighting]] = {}
    for sighting in sightings:
        by_job.setdefault(sighting.job, []).append(sighting)
    found = []
    for job, seen in by_job.items():
        ordered = sorted(seen, key=lambda one: (one.attempt, one.first_s))
        for i, stale in enumerate(ordered):
            found += [_overlap(job, stale, fresh) for fresh in ordered[i + 1 :] if _both(stale, fresh)]
    return found


def _both(one: Sighting, other: Sighting) -> bool:
    return max(one.first_s, other.first_s) < min(one.last_s, other.last_s)


def _overlap(job: str, stale: Sighting, fresh: Sighting) -> Overlap:
    begin_s, end_s = max(stale.first_s, fresh.first_s), min(stale.last_s, fresh.last_s)
    looks = stale.between(begin_s, end_s)
    share = sum(stopped for _, stopped, _ in looks) / len(looks) if looks else 0.0
    cpu_s = looks[-1][2] - looks[0][2] if looks else 0.0
    return Overlap(job, stale.attempt, fresh.attempt, end_s - begin_s, share * (end_s - begin_s), cpu_s)


def _children(pid: int) -> list[int]:
    """Of the main thread, which is the one that forks."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _stat(pid: int) -> tuple[str, float] | None:
    """State letter and processor seconds; None for a process that has ended, reaped or not."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else (fields[0], (int(fields[11]) + int(fields[12])) * TICKS_S)


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _attempt(pid: int) -> int:
    """From the name of the log that is its standard output."""
    try:
        named = LOG.search(os.readlink(f"/proc/{pid}/fd/1"))
    except OSError:
        return 0
    return int(named[1]) if named else 0
