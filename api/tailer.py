"""The one reader behind every `?wait=`, event stream and log follower of this process.

While anybody waits, it looks at the watched jobs every `POLL_S` and at the watched experiments every `EXPERIMENTS_S` (one query for all),
reads each changed job's new events once and hands them to all of the job's readers. A reader that cannot keep up loses its buffer and goes on from the database, from its own position.
What is kept is bounded: of each watched job its last BUFFERED events, which its readers share; of each reader READ_BYTES read from the
database for it alone, and what the server has written and the reader not yet taken (64 KiB and one event). A reader that takes nothing at
all is cut off by the server (`stalled_s`). A stream holds neither a database connection nor a thread of the pool that serves routes.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, TypeVar

import structlog
from fastapi.sse import format_sse_event

from powergrad.jobs import queries, tasks
from powergrad.jobs.experiments import queries as experiments
from powergrad.jobs.states import TERMINAL, JobState
from powergrad.jobs.store import Store, Tx, is_unavailable

POLL_S = 0.075
EXPERIMENTS_S = 0.5  # of hundreds of jobs one moves at every look: their waiters need not see each step
AWAY_S = 1.0  # between looks while the database is away
BUFFERED = 256  # events a reader may be behind before it is sent to the database
READ_AT_ONCE = 100
READ_BYTES = 64 << 10  # of them kept for a reader until it takes them: events may be long, and readers many
TASK, EXPERIMENT = "task_", "exp_"
IDS_AT_ONCE = 500  # SQLite takes 32,766 parameters, PostgreSQL 65,535: far below both, and short queries let others in

T = TypeVar("T")
log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Frame:
    """One event, ready for the wire, encoded once for all readers."""

    seq: int
    data: bytes


@dataclass(frozen=True)
class Pulse:
    """How a job, a task or an experiment stood at the last look. state None: it is gone."""

    revision: int
    seq: int
    state: JobState | None

    @property
    def is_over(self) -> bool:
        return self.state is None or self.state in TERMINAL


GONE = Pulse(-1, -1, None)


@dataclass(eq=False)
class Watcher:
    """One who waits on a job (or a task or an experiment, by its id). frames: None for those who want no events."""

    job_id: str
    pulse: Pulse | None = None
    frames: deque[Frame] | None = None
    _awake: asyncio.Event = field(default_factory=asyncio.Event)

    def wake(self) -> None:
        self._awake.set()

    async def changed(self, timeout_s: float) -> bool:
        """Wait until something is new; False after `timeout_s` without."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._awake.wait()
        except TimeoutError:
            return False
        self._awake.clear()
        return True


@dataclass
class _Topic:
    watchers: set[Watcher] = field(default_factory=set)
    pulse: Pulse | None = None


class Tailer:
    """Make it in the event loop; `watch` a job; `stop` wakes everybody for good."""

    def __init__(self, store: Store, *, poll_s: float = POLL_S) -> None:
        self._store, self._poll_s = store, poll_s
        self._topics: dict[str, _Topic] = {}
        self._task: asyncio.Task[None] | None = None
        self._experiments_at = 0.0  # of the loop's clock: when experiments are looked at again
        # threads of its own: those of the routes must never wait for those who wait
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="tailer")
        self.is_stopping = False

    @contextmanager
    def watch(self, job_id: str, *, events: bool = False) -> Iterator[Watcher]:
        """Be woken on every change of a job, with its new events in `frames` if wanted."""
        watcher = Watcher(job_id, frames=deque() if events else None)
        self._topics.setdefault(job_id, _Topic()).watchers.add(watcher)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run(), name="tailer")
        try:
            yield watcher
        finally:
            topic = self._topics[job_id]
            topic.watchers.discard(watcher)
            if not topic.watchers:
                del self._topics[job_id]

    def is_watched(self, job_id: str) -> bool:
        """Whether the job has been looked at for somebody who waits."""
        topic = self._topics.get(job_id)
        return topic is not None and topic.pulse is not None

    async def read(self, look: Callable[[Tx], T]) -> T:
        """The result of `look` in a read transaction, off the loop, in the tailer's own threads."""
        return await self.run(self._read, look)

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """A blocking call in the tailer's own threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    async def stop(self) -> None:
        self.is_stopping = True
        for topic in self._topics.values():
            for watcher in topic.watchers:
                watcher.wake()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _read(self, look: Callable[[Tx], T]) -> T:
        with self._store.read() as tx:
            return look(tx)

    async def _run(self) -> None:
        while self._topics and not self.is_stopping:
            try:
                await self._look()
                await asyncio.sleep(self._poll_s)
            except Exception as error:
                if is_unavailable(error):
                    log.warning("tailer: database away", error=str(error).splitlines()[0])
                else:
                    log.exception("tailer: look failed")
                await asyncio.sleep(AWAY_S)

    async def _look(self) -> None:
        known = {one: self._topics[one].pulse for one in self._due()}
        if not known:
            return
        wants_events = {job_id for job_id in known if any(w.frames is not None for w in self._topics[job_id].watchers)}
        pulses, frames = await self.read(lambda tx: _news(tx, known, wants_events))
        for job_id, pulse in pulses.items():
            topic = self._topics.get(job_id)
            if topic is not None and topic.pulse != pulse:
                topic.pulse = pulse
                for watcher in topic.watchers:
                    _tell(watcher, pulse, frames.get(job_id, []))

    def _due(self) -> list[str]:
        """What is looked at now: all, but of the experiments those that were never seen, unless it is their time."""
        now = asyncio.get_running_loop().time()
        if now >= self._experiments_at:
            self._experiments_at = now + EXPERIMENTS_S
            return list(self._topics)
        return [one for one, topic in self._topics.items() if topic.pulse is None or not one.startswith(EXPERIMENT)]


def _news(tx: Tx, known: dict[str, Pulse | None], wants_events: set[str]) -> tuple[dict[str, Pulse], dict[str, list[Frame]]]:
    """How the watched jobs stand, and the events that are new since the last look."""
    ids = list(known)
    found: dict[str, Pulse] = {}
    for start in range(0, len(ids), IDS_AT_ONCE):
        part = ids[start : start + IDS_AT_ONCE]
        seen = _pulses(tx, part)
        found |= {job_id: Pulse(*seen[job_id]) if job_id in seen else GONE for job_id in part}
    frames = {}
    for job_id in wants_events:
        before, now = known[job_id], found[job_id]
        if before is not None and now.seq > before.seq:
            frames[job_id] = [frame_of(event) for event in queries.events_after(tx, job_id, before.seq, limit=BUFFERED)]
    return found, frames


def _pulses(tx: Tx, ids: list[str]) -> dict[str, tuple[int, int, JobState]]:
    """A task or an experiment can be waited for as a job can."""
    task_ids = [one for one in ids if one.startswith(TASK)]
    experiment_ids = [one for one in ids if one.startswith(EXPERIMENT)]
    job_ids = [one for one in ids if not one.startswith((TASK, EXPERIMENT))]
    found = queries.pulse(tx, job_ids) if job_ids else {}
    found |= tasks.pulse(tx, task_ids) if task_ids else {}
    return found | (experiments.pulse(tx, experiment_ids) if experiment_ids else {})


def _tell(watcher: Watcher, pulse: Pulse, frames: list[Frame]) -> None:
    watcher.pulse = pulse
    if watcher.frames is not None:
        if len(watcher.frames) + len(frames) > BUFFERED:
            watcher.frames.clear()  # it will see the gap and read on from the database
        else:
            watcher.frames.extend(frames)
    watcher.wake()


def frame_of(event: dict[str, Any]) -> Frame:
    """An event as server-sent event: id is its number, the event's name its type."""
    data = json.dumps(event, separators=(",", ":"), ensure_ascii=False)
    return Frame(event["seq"], format_sse_event(data_str=data, event=event["type"], id=str(event["seq"])))


async def follow(tailer: Tailer, watcher: Watcher, *, after: int, quiet_s: float) -> AsyncIterator[list[Frame] | None]:
    """A job's events above `after`, without gap or repeat, to the end of the job; None after every `quiet_s` of silence.

    They come as many at a time as there are, up to READ_BYTES: to send one costs what it costs to send ten. Ends early, without having
    reached the end, when the server stops.
    """
    now = asyncio.get_running_loop().time
    position, spoke_at, backlog = after, now(), list[Frame]()
    while not tailer.is_stopping:
        ready = list(_in_order(backlog, position))
        while part := _first_of(ready, READ_BYTES):
            position, spoke_at, ready = part[-1].seq, now(), ready[len(part) :]
            yield part
        backlog = []
        if watcher.pulse is None or position < watcher.pulse.seq:
            backlog = _taken(watcher)
            if not backlog or backlog[0].seq > position + 1 or backlog[-1].seq <= position:
                backlog = await _stored(tailer, watcher, position)
        elif watcher.pulse.is_over:
            return
        elif not await watcher.changed(max(0.0, spoke_at + quiet_s - now())):
            spoke_at = now()
            yield None


def _in_order(frames: list[Frame], position: int) -> Iterator[Frame]:
    """Those that follow `position` without a gap: a look that found more than BUFFERED new events has passed some on, not all."""
    for frame in frames:
        if frame.seq == position + 1:
            position = frame.seq
            yield frame


def _taken(watcher: Watcher) -> list[Frame]:
    assert watcher.frames is not None, "a reader of events watches with events=True"
    taken = list(watcher.frames)
    watcher.frames.clear()
    return taken


async def _stored(tailer: Tailer, watcher: Watcher, position: int) -> list[Frame]:
    def look(tx: Tx) -> tuple[Pulse, list[Frame]]:
        seen = queries.pulse(tx, [watcher.job_id])
        events = queries.events_after(tx, watcher.job_id, position, limit=READ_AT_ONCE)
        return Pulse(*seen[watcher.job_id]) if seen else GONE, [frame_of(event) for event in events]

    pulse, frames = await tailer.read(look)
    if watcher.pulse is None or pulse.revision > watcher.pulse.revision or pulse is GONE:
        watcher.pulse = pulse
    return _first_of(frames, READ_BYTES)


def _first_of(frames: list[Frame], size: int) -> list[Frame]:
    """As many as come to `size` bytes, but one at least."""
    sizes = accumulate(len(frame.data) for frame in frames)
    return [frame for frame, so_far in zip(frames, sizes, strict=True) if so_far <= size] or frames[:1]
