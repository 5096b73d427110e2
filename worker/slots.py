"""What a worker trains on: slots, each with its own cores and at most one GPU, held by locks that outlive the worker.

A slot is taken by `flock` on its token files, and the trainer inherits the open files: the slot is free only when the trainer and its
children are gone, whatever became of the supervisor. GPU tokens are named by UUID in a folder shared by all workers of the host (four
quarters to a GPU; a whole GPU is all four, taken in order, so that two takers never hold half each); CPU tokens lie in the data directory.
A job on several GPUs holds as many slots, all or none of them.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pynvml

QUARTERS = 4


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
    """Slots held by this process, in the order of their index: one, or as many as a job wants GPUs."""

    held: dict[int, Slot]
    locks: dict[int, list[int]]

    @property
    def slots(self) -> list[Slot]:
        return [self.held[index] for index in sorted(self.held)]

    @property
    def fds(self) -> list[int]:
        """The locked files, to be inherited by the trainer."""
        return [fd for index in sorted(self.locks) for fd in self.locks[index]]

    def hand_over(self) -> None:
        """Leave the locks to the trainer that has inherited them: they end with it, even while this process is frozen."""
        for fds in self.locks.values():
            release(fds)

    @property
    def gpus(self) -> list[Gpu]:
        return [slot.gpu for slot in self.slots if slot.gpu is not None]

    @property
    def cpus(self) -> list[int]:
        """The cores of all of them."""
        return sorted({cpu for slot in self.slots for cpu in slot.cpus})

    @property
    def device(self) -> str:
        """Its name for people, of at most 128 characters."""
        first, *others = self.slots
        if not others:
            return first.device
        kinds = " and ".join(sorted({gpu.name for gpu in self.gpus}))
        return _cut(f"{len(self.slots)} x {kinds}, slots {', '.join(str(slot.index) for slot in self.slots)}", 128)


@dataclass
class Slots:
    """The slots of this worker and which of them its threads hold."""

    slots: list[Slot]
    _held: set[int] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def any_free(self) -> bool:
        """Whether a thread of this worker could try to take one; another process may still hold its lock."""
        return len(self._held) < len(self.slots)

    @property
    def gpus(self) -> int:
        """GPU slots in all."""
        return sum(slot.gpu is not None for slot in self.slots)

    @contextmanager
    def take(self) -> Iterator[TakenSlots | None]:
        """A free slot for the length of the block, to be resized in it, or None when all are held, here or by another process."""
        taken = TakenSlots({}, {})
        with self._lock:
            found = self._lock_free(taken, 1)
        try:
            yield taken if found else None
        finally:
            with self._lock:
                self._let_go(taken, list(taken.held))

    def resize(self, taken: TakenSlots, count: int) -> int:
        """Holds `count` slots instead, or as many as before; how many there could be now. All or nothing, and it never waits.

        Two takers that want what the other has thus both go without, and neither waits for the other.
        """
        with self._lock:
            before = set(taken.held)
            if len(before) < count:
                found = self._lock_free(taken, count - len(before))
                if len(before) + found < count:
                    self._let_go(taken, [index for index in taken.held if index not in before])
                    return len(before) + found
            else:
                self._let_go(taken, sorted(before)[count:])
        return count

    def _lock_free(self, taken: TakenSlots, count: int) -> int:
        """Locks up to `count` more slots, lowest index first; how many it got."""
        got = 0
        for slot in self.slots:
            if got == count:
                break
            if slot.index in self._held or (fds := lock_all(slot.tokens)) is None:
                continue
            self._held.add(slot.index)
            taken.held[slot.index], taken.locks[slot.index] = slot, fds
            got += 1
        return got

    def _let_go(self, taken: TakenSlots, indices: list[int]) -> None:
        for index in indices:
            del taken.held[index]
            release(taken.locks.pop(index))
            self._held.discard(index)


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


def device_report(gpus: Sequence[Gpu]) -> list[dict[str, Any]]:
    """What GET /v1/workers shows of the devices: memory in bytes, utilisation in [0, 1]."""
    memory = psutil.virtual_memory()
    cpu = {
        "kind": "cpu",
        "name": f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores",
        "memory_bytes": memory.total,
        "memory_used_bytes": memory.total - memory.available,
        "utilisation": psutil.cpu_percent(interval=None) / 100,
    }
    return [cpu, *(_gpu_report(gpu) for gpu in gpus)]


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
