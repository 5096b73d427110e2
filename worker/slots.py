"""What a worker trains on: slots, each with its own cores and at most one GPU, held by locks that outlive the worker.

A slot is taken by `flock` on its token files, and the trainer inherits the open files: the slot is free only when the trainer and its
children are gone, whatever became of the supervisor. GPU tokens are named by UUID in a folder shared by all workers of the host (four
quarters to a GPU; a whole GPU is all four, taken in order, so that two takers never hold half each; a release that knows no parts takes
all four too, and so keeps off a GPU of which another holds a part); CPU tokens lie in the data directory. A job on several GPUs holds as
many slots, a job on a part of one some of its quarters and their share of its cores: all of it or nothing.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pynvml

from powergrad.jobs.gpus import QUARTERS, quarters, quarters_with_memory

Token = tuple[int, int]
"""A slot's index, and which of its token files."""


@dataclass(frozen=True)
class Gpu:
    """A GPU by NVML: uuid is what CUDA_VISIBLE_DEVICES accepts."""

    uuid: str
    name: str
    memory_bytes: int


@dataclass(frozen=True)
class Slot:
    """One trainer's place. cpus: cores it may use; gpu: None on a CPU slot; tokens: the lock files that stand for it."""

    index: int
    cpus: tuple[int, ...]
    gpu: Gpu | None
    tokens: tuple[Path, ...]

    @property
    def device(self) -> str:
        """Its name for people."""
        return f"cpu ({len(self.cpus)} cores)" if self.gpu is None else f"{self.gpu.name} {self.gpu.uuid}"

    def cpus_of(self, tokens: Sequence[int]) -> list[int]:
        """The cores that go with some of its tokens: as large a share, at least one."""
        shares = _shares(self.cpus, len(self.tokens))
        return sorted({cpu for token in tokens for cpu in shares[token]})

    def as_json(self) -> dict[str, Any]:
        return {"index": self.index, "device": "cpu" if self.gpu is None else self.gpu.uuid, "cpus": list(self.cpus)}


def find_gpus(visible: str | None = None) -> list[Gpu]:
    """The GPUs NVML shows; none where there is no driver. visible: as CUDA_VISIBLE_DEVICES, indices or UUIDs; None is all, "" is none."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    found = [
        Gpu(_text(pynvml.nvmlDeviceGetUUID(h)), _text(pynvml.nvmlDeviceGetName(h)), pynvml.nvmlDeviceGetMemoryInfo(h).total)
        for h in handles
    ]
    return choose_gpus(found, visible)


def choose_gpus(found: Sequence[Gpu], visible: str | None) -> list[Gpu]:
    """Those of the GPUs that CUDA_VISIBLE_DEVICES names, in its order; like CUDA, it ends at the first name that is none."""
    if visible is None:
        return list(found)
    chosen: list[Gpu] = []
    for name in filter(None, (part.strip() for part in visible.split(","))):
        named = [gpu for i, gpu in enumerate(found) if name == str(i) or gpu.uuid.startswith(name)]
        if not named:
            break
        chosen.append(named[0])
    return chosen


def plan_slots(gpus: Sequence[Gpu], cpus: Sequence[int], *, count: int | None, gpu_locks: Path, cpu_locks: Path) -> list[Slot]:
    """`count` slots: by default one a GPU, or one on the CPU. The cores are shared out evenly, every slot has at least one.

    Raises ValueError for more slots than GPUs.
    """
    if gpus and count is not None and count > len(gpus):
        raise ValueError(f"slots={count}: there is one slot a GPU, and {len(gpus)} GPUs; set CUDA_VISIBLE_DEVICES= to train on the CPU")
    gpus = gpus[:count]
    n = len(gpus) or count or 1
    shares = _shares(cpus, n)
    if gpus:
        return [
            Slot(i, shares[i], gpu, tuple(gpu_locks / f"{gpu.uuid}.{quarter}.lock" for quarter in range(QUARTERS)))
            for i, gpu in enumerate(gpus)
        ]
    # the name holds the cores: workers with other cores on the same directory do not get in each other's way
    return [Slot(i, shares[i], None, (cpu_locks / f"cpu-{i}-of-{n}-{shares[i][0]}.lock",)) for i in range(n)]


def _shares(cpus: Sequence[int], n: int) -> list[tuple[int, ...]]:
    if n >= len(cpus):
        return [(cpus[i % len(cpus)],) for i in range(n)]
    borders = [i * len(cpus) // n for i in range(n + 1)]
    return [tuple(cpus[a:b]) for a, b in itertools.pairwise(borders)]


@dataclass
class TakenSlots:
    """What this process holds for one job, in the order of the index: a slot, part of one, or as many as the job wants GPUs."""

    of: Sequence[Slot]
    held: set[Token] = field(default_factory=set)
    locks: dict[Token, list[int]] = field(default_factory=dict)

    @property
    def slots(self) -> list[Slot]:
        indices = {index for index, _ in self.held}
        return [slot for slot in self.of if slot.index in indices]

    @property
    def fds(self) -> list[int]:
        """The locked files, to be inherited by the trainer."""
        return [fd for token in sorted(self.locks) for fd in self.locks[token]]

    def hand_over(self) -> None:
        """Leave the locks to the trainer that has inherited them: they end with it, even while this process is frozen."""
        for fds in self.locks.values():
            release(fds)

    def tokens_of(self, slot: Slot) -> list[int]:
        return sorted(token for index, token in self.held if index == slot.index)

    @property
    def gpus(self) -> list[Gpu]:
        """Those it holds, wholly or in part."""
        return [slot.gpu for slot in self.slots if slot.gpu is not None]

    @property
    def gpu_count(self) -> float:
        """How many GPUs it holds: whole ones, or a part of one; 0 on a CPU slot."""
        return sum(len(self.tokens_of(slot)) for slot in self.slots if slot.gpu is not None) / QUARTERS

    @property
    def cpus(self) -> list[int]:
        """The cores of all of it."""
        return sorted({cpu for slot in self.slots for cpu in slot.cpus_of(self.tokens_of(slot))})

    @property
    def device(self) -> str:
        """Its name for people, of at most 128 characters."""
        first, *others = self.slots
        if not others:
            return _cut(first.device if self.gpu_count in (0, 1) else f"{self.gpu_count:g} of {first.device}", 128)
        kinds = " and ".join(sorted({gpu.name for gpu in self.gpus}))
        return _cut(f"{len(self.slots)} x {kinds}, slots {', '.join(str(slot.index) for slot in self.slots)}", 128)


@dataclass(frozen=True)
class Reach:
    """What could be held at a moment. gpus: whole ones, or the largest part of one; part: the largest part of one whose memory is free too."""

    gpus: float
    part: float

    def and_no_more_than(self, other: Reach) -> Reach:
        return Reach(min(self.gpus, other.gpus), min(self.part, other.part))


def reach(free: Mapping[int, Collection[int]], with_memory: Mapping[int, int]) -> Reach:
    """free: unheld quarters of each GPU slot; with_memory: of how many quarters its memory is free."""
    whole = sum(len(tokens) == QUARTERS for tokens in free.values())
    part = max((min(len(tokens), with_memory[index]) for index, tokens in free.items()), default=0) / QUARTERS
    return Reach(whole or max((len(tokens) for tokens in free.values()), default=0) / QUARTERS, part)


def choose(free: Mapping[int, Collection[int]], wanted: float, with_memory: Mapping[int, int]) -> set[Token] | None:
    """The quarters to hold for so many GPUs, or None: of the fullest GPU that has room for a part, so that whole ones stay free."""
    if wanted >= 1:
        whole = sorted(index for index, tokens in free.items() if len(tokens) == QUARTERS)[: int(wanted)]
        return {(index, token) for index in whole for token in free[index]} if len(whole) == wanted else None
    count = quarters(wanted)
    with_room = [(len(tokens), index) for index, tokens in free.items() if count <= min(len(tokens), with_memory[index])]
    if not with_room:
        return None
    _, index = min(with_room)
    return {(index, token) for token in sorted(free[index])[:count]}


def memory_of(gpu: Gpu) -> int:
    """Of how many quarters of a GPU NVML finds the memory free; where it cannot tell, of all."""
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid))
    except pynvml.NVMLError:
        return QUARTERS
    return quarters_with_memory(memory.total, memory.used)


@dataclass
class Slots:
    """The slots of this worker and which of them its threads hold. with_memory: of how many quarters of a GPU the memory is free."""

    slots: list[Slot]
    with_memory: Callable[[Gpu], int] = memory_of
    _held: set[Token] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def places(self) -> int:
        """Trainers that there can be at a time: four on a GPU."""
        return sum(len(slot.tokens) for slot in self.slots)

    @property
    def any_free(self) -> bool:
        """Whether a thread of this worker could try to take one; another process may still hold its lock."""
        return len(self._held) < self.places

    @property
    def gpus(self) -> int:
        """GPU slots in all."""
        return len(self._of_gpus)

    @property
    def _of_gpus(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.gpu is not None]

    def quarters_in_use(self) -> dict[str, int]:
        """How many quarters of each GPU, by its UUID, this worker's jobs hold."""
        with self._lock:
            held = Counter(index for index, _ in self._held)
        return {slot.gpu.uuid: held[slot.index] for slot in self.slots if slot.gpu is not None}

    @contextmanager
    def take(self) -> Iterator[TakenSlots | None]:
        """A free slot for the length of the block, to be resized in it, or a quarter of one, or None when all are held, here or elsewhere."""
        taken = TakenSlots(self.slots)
        with self._lock:
            found = any(self._lock_all_of(taken, slot) for slot in self.slots) or self._hold(taken, 1 / QUARTERS) is None
        try:
            yield taken if found else None
        finally:
            with self._lock:
                self._let_go(taken, set(taken.held))

    def resize(self, taken: TakenSlots, count: float) -> Reach | None:
        """Holds `count` slots instead, or that part of one, and returns None; or holds what it held, and returns what there could be now.

        All or nothing, and it never waits: two takers that want what the other has thus both go without, and neither waits for the other.
        """
        with self._lock:
            return self._hold(taken, count)

    def _hold(self, taken: TakenSlots, count: float) -> Reach | None:
        """Takes every free quarter for a moment, keeps those it chooses, or those it had."""
        before = set(taken.held)
        for slot in self._of_gpus:
            for token in range(len(slot.tokens)):
                self._lock_one(taken, slot, token)
        free = {slot.index: taken.tokens_of(slot) for slot in taken.slots}
        with_memory = {slot.index: self.with_memory(slot.gpu) for slot in taken.slots if slot.gpu is not None}
        chosen = choose(free, count, with_memory)
        self._let_go(taken, taken.held - (before if chosen is None else chosen))
        return reach(free, with_memory) if chosen is None else None

    def _lock_all_of(self, taken: TakenSlots, slot: Slot) -> bool:
        for token in range(len(slot.tokens)):
            if not self._lock_one(taken, slot, token):
                self._let_go(taken, set(taken.held))
                return False
        return True

    def _lock_one(self, taken: TakenSlots, slot: Slot, token: int) -> bool:
        if (slot.index, token) in self._held or (fds := lock_all(slot.tokens[token : token + 1])) is None:
            return False
        self._held.add((slot.index, token))
        taken.held.add((slot.index, token))
        taken.locks[slot.index, token] = fds
        return True

    def _let_go(self, taken: TakenSlots, tokens: Iterable[Token]) -> None:
        for token in tokens:
            taken.held.discard(token)
            release(taken.locks.pop(token))
            self._held.discard(token)


def lock_all(paths: Sequence[Path]) -> list[int] | None:
    """Open and lock every file, in order; None (and nothing held) when one is taken."""
    fds: list[int] = []
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        fds.append(fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            release(fds)
            return None
    return fds


def release(fds: list[int]) -> None:
    """Close our share of the locks; a living trainer keeps its own."""
    while fds:
        os.close(fds.pop())


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def device_report(gpus: Sequence[Gpu], quarters_in_use: Mapping[str, int]) -> list[dict[str, Any]]:
    """What GET /v1/workers shows of the devices: memory in bytes, utilisation in [0, 1]; quarters in use, by UUID, are the worker's own."""
    memory = psutil.virtual_memory()
    cpu = {
        "kind": "cpu",
        "name": f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores",
        "memory_bytes": memory.total,
        "memory_used_bytes": memory.total - memory.available,
        "utilisation": psutil.cpu_percent(interval=None) / 100,
    }
    return [cpu, *({**_gpu_report(gpu), "quarters_in_use": quarters_in_use[gpu.uuid]} for gpu in gpus)]


def _gpu_report(gpu: Gpu) -> dict[str, Any]:
    report: dict[str, Any] = {"kind": "gpu", "name": gpu.name, "uuid": gpu.uuid, "memory_bytes": gpu.memory_bytes}
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid)
        used, busy = pynvml.nvmlDeviceGetMemoryInfo(handle).used, pynvml.nvmlDeviceGetUtilizationRates(handle).gpu
    except pynvml.NVMLError as error:
        return {**report, "error": str(error)}
    return {**report, "memory_used_bytes": used, "utilisation": busy / 100}


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
