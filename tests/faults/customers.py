"""Simulated users of a stack: they submit small jobs, change their minds, and repeat what was not answered, through the API alone.

Each job has a story, a generator that yields how long it waits before it goes on; one thread tells all of them in turn. What the users
were answered, and what they want in the end, is what the judge is told.
"""

from __future__ import annotations

import heapq
import itertools
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from powergrad.client import ApiError, Client, Unreachable
from powergrad.client.models import Job
from tests.faults.history import TERMINAL, Answer

T = TypeVar("T")
Story = Generator[float, None, T]
Wish = Literal["left alone", "cancelled", "paused", "more seeds"]
Fate = Literal["left alone", "cancelled", "paused", "cancelled and retried", "retried when it fails"]

AGAIN_S = 0.4
TIMEOUT_S = 5.0
FATES: dict[Fate, float] = {"left alone": 10, "cancelled": 2, "paused": 3, "cancelled and retried": 1.5, "retried when it fails": 1}

GLYPHS: dict[str, Any] = {"dataset": "glyphs", "classes": 10, "train_per_class": 16, "val_per_class": 4, "image_size": 8, "batch_size": 32}
TINY: dict[str, Any] = {
    "data": GLYPHS,
    "model": {"name": "resnet20"},
    "optimizer": {"lr": 0.02},
    "resources": {"gpus": 0, "cpu_threads": 1},
    "limits": {"max_attempts": 100},  # violence alone must not end it
}
"""Five steps an epoch, an eighth of a second each."""
SHAPES: dict[str, dict[str, Any]] = {
    "one epoch": TINY | {"epochs": 1},
    "middle": TINY | {"epochs": 6, "seed": 1, "loss": {"alpha": 0.25}},
    "long": TINY | {"epochs": 12},
    "adamw and ema": TINY | {"epochs": 8, "optimizer": {"name": "adamw", "lr": 0.002}, "ema": {"decay": 0.9}},
    "telemetry": TINY | {"epochs": 8, "seed": 2, "telemetry": {"every_steps": 3, "pictures": False}},
    "mixed images": TINY | {"epochs": 6, "data": GLYPHS | {"augment": {"crop": "pad", "mixup": 0.2, "cutmix": 1.0}}},
    "rare checkpoints": TINY | {"epochs": 9, "seed": 3, "checkpoint": {"every_epochs": 4, "keep_last": 1}},
    "two attempts": TINY | {"epochs": 7, "seed": 4, "limits": {"max_attempts": 2}},
    "rolls back": TINY | {"epochs": 6, "optimizer": {"lr": 900.0}, "on_divergence": "rollback"},
    "diverges": TINY | {"epochs": 6, "optimizer": {"lr": 900.0}},
    "crashes": TINY | {"epochs": 2, "loss": {"class_weights": [1.0, 2.0]}, "limits": {"max_attempts": 2}},
    "data missing": TINY | {"epochs": 2, "data": {"dataset": "class_folder", "path": "nowhere", "image_size": 8}},
}
RATES: dict[str, Any] = {"optimizer.lr": {"low": 0.001, "high": 0.2, "log": True}}
QUESTIONS: dict[str, dict[str, Any]] = {
    "halves": {"spec": TINY | {"epochs": 4}, "strategy": "asha", "space": RATES, "search": {"trials": 5, "reduction": 2}},
    "compares": {"spec": SHAPES["one epoch"], "grid": {"loss.alpha": [1.0, 0.5]}, "seeds": 2},
    "tunes": {"spec": SHAPES["one epoch"], "grid": {"loss.alpha": [1.0, 0.5]}, "seeds": 1, "tune": {"optimizer.lr": [0.01, 0.02]}},
    "searches": {"spec": SHAPES["one epoch"], "strategy": "random", "space": RATES, "search": {"trials": 4}},
}
"""Experiments, by what they do; their jobs are small."""
QUESTION_EVERY = 12
"""One user of so many asks a question instead of submitting a job."""
WEIGHTS: dict[str, float] = {"long": 4, "middle": 2, "telemetry": 2}
"""How often a shape is drawn, where it is not 1."""


class _Unexpected(Exception):
    """An answer that none of the calls should get; it has been noted, and its story ends."""


@dataclass(frozen=True)
class Plan:
    """One job to be: its spec, what its user will do with it, and when. cut: the first answer is not waited for; twice: sent once more."""

    shape: str
    fate: Fate
    delay_s: float
    cut: bool
    twice: bool
    key: str


def draw_plan(dice: random.Random, number: int) -> Plan:
    names = list(SHAPES)
    return Plan(
        shape=dice.choices(names, [WEIGHTS.get(name, 1.0) for name in names])[0],
        fate=dice.choices(list(FATES), list(FATES.values()))[0],
        delay_s=dice.choice((0.0, dice.uniform(0.0, 3.0))),
        cut=dice.random() < 0.15,
        twice=dice.random() < 0.15,
        key=f"chaos-{number}",
    )


@dataclass
class Customers:
    """All the users of a stack, in a thread between `start` and `settle`. queued: how many jobs they keep waiting."""

    port: int
    dice: random.Random
    queued: int = 4
    answers: dict[str, list[str]] = field(default_factory=dict)
    """Ids that each idempotency key was answered with."""
    shapes: dict[str, str] = field(default_factory=dict)
    cancels: dict[str, Answer] = field(default_factory=dict)
    fates: dict[str, Fate] = field(default_factory=dict)
    questions: dict[str, list[str]] = field(default_factory=dict)
    """Ids of experiments that each idempotency key was answered with."""
    wishes: dict[str, Wish] = field(default_factory=dict)
    """What the user of an experiment did with it."""
    refusals: list[str] = field(default_factory=list)
    """Answers that none of the calls should get."""
    _stories: list[tuple[float, int, Story[None]]] = field(default_factory=list)
    _numbers: Any = field(default_factory=itertools.count)
    _closing: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.client = Client(f"http://127.0.0.1:{self.port}", retries=0, timeout_s=TIMEOUT_S)
        self._thread = threading.Thread(target=self._run, name="customers", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def settle(self, within_s: float) -> bool:
        """No new job; whether every story came to its end in time."""
        self._closing.set()
        self._thread.join(within_s)
        return not self._thread.is_alive()

    def submit(self, plan: Plan) -> Story[str]:
        """The id, once the server has said it."""
        spec = {**SHAPES[plan.shape], "name": plan.key, "labels": {"shape": plan.shape.replace(" ", "-")}}
        if plan.cut:
            _send_and_hang_up(self.port, spec, plan.key)
            yield AGAIN_S
        for _ in range(1 + plan.twice):
            job = yield from self._insist(lambda: self.client.submit(spec, idempotency_key=plan.key))
            assert job is not None, "no state of a job forbids to submit one"
            self.answers.setdefault(plan.key, []).append(job.id)
        return self.answers[plan.key][0]

    def _run(self) -> None:
        ask_s = 0.0
        while not self._closing.is_set() or self._stories:
            now = time.monotonic()
            if not self._closing.is_set() and now >= ask_s:
                ask_s = now + 0.5
                for _ in range(self.queued - self._waiting()):
                    number = next(self._numbers)
                    asks = number % QUESTION_EVERY == QUESTION_EVERY - 1
                    self._begin(self._question(number) if asks else self._life(draw_plan(self.dice, number)))
            if self._stories and self._stories[0][0] <= now:
                self._go_on(heapq.heappop(self._stories)[2])
            else:
                time.sleep(0.02)
        self.client.close()

    def _begin(self, story: Story[None]) -> None:
        heapq.heappush(self._stories, (time.monotonic(), next(self._numbers), story))

    def _go_on(self, story: Story[None]) -> None:
        with suppress(StopIteration, _Unexpected):
            wait_s = next(story)
            heapq.heappush(self._stories, (time.monotonic() + wait_s, next(self._numbers), story))

    def _waiting(self) -> int:
        try:
            return len(self.client.page(limit=self.queued, state=["queued"]).data)
        except (ApiError, Unreachable):
            return self.queued

    def _life(self, plan: Plan) -> Story[None]:
        job_id = yield from self.submit(plan)
        self.shapes[job_id], self.cancels[job_id], self.fates[job_id] = plan.shape, "no", plan.fate
        yield plan.delay_s
        match plan.fate:
            case "cancelled":
                yield from self._cancel(job_id)
            case "paused":
                yield from self._pause_and_resume(job_id)
            case "cancelled and retried":
                yield from self._cancel(job_id)
                yield from self._retry(job_id, "cancelled")
            case "retried when it fails":
                yield from self._retry(job_id, "failed")
            case "left alone":
                pass

    def _question(self, number: int) -> Story[None]:
        """An experiment, asked for twice, and what its user does with it afterwards."""
        key, kind = f"question-{number}", list(QUESTIONS)[len(self.questions) % len(QUESTIONS)]  # a short soak, too, asks each
        wish: Wish = self.dice.choice(("left alone", "left alone", "cancelled", "paused", "more seeds"))
        for _ in range(2):
            asked = yield from self._insist(lambda: self.client.ask({**QUESTIONS[kind], "name": key}, idempotency_key=key))
            assert asked is not None, "no state of an experiment forbids to ask a question"
            self.questions.setdefault(key, []).append(asked.id)
        assert asked is not None
        self.wishes[asked.id] = wish
        yield self.dice.uniform(0.0, 5.0)
        match wish:
            case "cancelled":
                yield from self._insist(asked.cancel)
            case "paused":
                if (yield from self._insist(asked.pause)) is not None:
                    yield self.dice.uniform(0.0, 3.0)
                    yield from self._insist(asked.resume)
            case "more seeds":
                with suppress(Unreachable, ApiError):  # no key: what was not answered may have been done, and is not repeated
                    asked.add_seeds(1)
            case "left alone":
                pass

    def _cancel(self, job_id: str) -> Story[None]:
        self.cancels[job_id] = "maybe"
        job = yield from self._insist(lambda: self.client.cancel(job_id))
        self.cancels[job_id] = "no" if job is None else "yes"

    def _retry(self, job_id: str, state: str) -> Story[None]:
        """Once, as soon as it is in `state`; an answer that was cut off shows as a conflict with the job that goes on."""
        job = yield from self._end_of(job_id)
        if job.state == state:
            yield from self._insist(lambda: self.client.retry(job_id))
            self.cancels[job_id] = "no"

    def _pause_and_resume(self, job_id: str) -> Story[None]:
        paused = yield from self._insist(lambda: self.client.pause(job_id))
        if paused is None:
            return
        yield self.dice.uniform(0.0, 3.0)
        while (yield from self._insist(lambda: self.client.resume(job_id))) is None:
            job = yield from self._insist(lambda: self.client.get(job_id))
            assert job is not None
            if job.state in TERMINAL:
                return
            yield AGAIN_S

    def _end_of(self, job_id: str) -> Story[Job]:
        while True:
            job = yield from self._insist(lambda: self.client.get(job_id))
            assert job is not None
            if job.state in TERMINAL:
                return job
            yield 1.0

    def _insist(self, call: Callable[[], T]) -> Story[T | None]:
        """The answer, however often it takes; None where the state does not allow it."""
        while True:
            try:
                return call()
            except Unreachable:
                pass
            except ApiError as error:
                if error.code == "illegal_move":
                    return None
                if error.status not in {409, 429, 503}:
                    self.refusals.append(str(error))
                    raise _Unexpected from error
            yield AGAIN_S


def _send_and_hang_up(port: int, spec: dict[str, Any], key: str) -> None:
    """A whole POST whose answer nobody waits for."""
    body = json.dumps(spec).encode()
    head = (
        f"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Idempotency-Key: {key}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=2.0) as line:
        line.sendall(head.encode() + body)
