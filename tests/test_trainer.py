"""The trainer as its supervisor sees it: what it says, what it obeys, and how its process ends."""

from __future__ import annotations

import errno
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from powergrad import checkpoint, trainer
from powergrad.checkpoint import CheckpointBroken, StorageFull
from powergrad.data import DataMissing, DataUnreadable
from powergrad.process import DEADLINE_PASSED, ORPHANED, die_with_parent
from powergrad.progress import Diverged
from powergrad.protocol import (
    ArtifactWritten,
    CheckpointSkipped,
    CheckpointWritten,
    Control,
    Done,
    Failure,
    Message,
    Note,
    Phase,
    Plan,
    ResumePoint,
    Step,
    TrainerConfig,
    boottime_s,
    decode_message,
    encode,
)
from powergrad.spec import TrainSpec
from tests.data.folders import class_folder
from tests.training import NEVER, StopAfter

M = TypeVar("M")

PATIENCE_S = 60.0
"""A resnet18 on a busy machine; nothing waits that long unless it hangs."""


def config(run_dir: Path, *, spec: dict[str, Any] | None = None, **fields: Any) -> TrainerConfig:
    """An attempt of a resnet18 on 18 small images, in two epochs of four steps."""
    if not (run_dir / "data" / "pets").exists():
        class_folder(run_dir / "data" / "pets")
    parts: dict[str, Any] = {
        "data": {"dataset": "class_folder", "path": "pets", "image_size": 8, "batch_size": 4, "val_fraction": 0.25},
        "epochs": 2,
        "precision": "fp32",
        "schedule": {},
    }
    given = {"run_id": "run", "attempt": 1, "run_dir": str(run_dir), "data_root": str(run_dir / "data"), "cpu_threads": 1}
    return TrainerConfig.model_validate({**given, **fields, "spec": TrainSpec.model_validate(parts | (spec or {}))})


def heard(given: TrainerConfig, *, stop_after: int = NEVER) -> list[Message]:
    messages: list[Message] = []
    end = trainer.run(given, emit=messages.append, orders=StopAfter(stop_after))
    assert messages[-1] == end
    return messages


def of(kind: type[M], messages: list[Message]) -> list[M]:
    return [message for message in messages if isinstance(message, kind)]


def test_a_run_tells_its_story_in_order(tmp_path: Path) -> None:
    messages = heard(config(tmp_path))
    kinds = [f"{m.type}:{m.name}" if isinstance(m, Phase) else m.type for m in messages]
    epoch = ["step"] * 4 + ["phase:evaluating", "evaluation", "phase:checkpointing", "checkpoint"]
    start = ["phase:starting", "phase:loading_data", "phase:building_model", "plan", "artifact", "artifact", "phase:training"]
    end = ["phase:exporting", *["artifact"] * 4, "phase:finished", "done"]
    assert kinds == [*start, *epoch, *epoch, *end]
    names = ["labels.json", "preprocessing.json", "confusion.json", "per_class.csv", "mistakes.json", "MODEL_CARD.md"]
    assert [artifact.name for artifact in of(ArtifactWritten, messages)] == names
    plan = of(Plan, messages)[0]
    assert (plan.steps, plan.steps_per_epoch, plan.train_images, plan.val_images, plan.classes) == (8, 4, 18, 6, 3)
    assert (plan.determinism, plan.resumed_from, plan.device, plan.precision) == ("bitwise", None, "cpu", "fp32")
    assert plan.parameters == 11_170_371  # torchvision's 11,689,512 with a 3×3 stem and three classes


def test_every_message_survives_the_wire(tmp_path: Path) -> None:
    for message in heard(config(tmp_path)):
        assert decode_message(encode(message)) == message


def test_the_same_config_gives_the_same_bits_and_a_stopped_one_too(tmp_path: Path) -> None:
    whole = of(CheckpointWritten, heard(config(tmp_path / "whole")))[-1]
    stopped = heard(config(tmp_path / "stopped"), stop_after=3)
    assert stopped[-1] == Done(outcome="stopped")
    written = of(CheckpointWritten, stopped)[-1]
    point = ResumePoint(id=written.id, path=written.path, step=written.step, sha256=written.sha256)
    resumed = heard(config(tmp_path / "stopped", attempt=2, resume=[point]))
    plan = of(Plan, resumed)[0]
    assert (plan.resumed_from, plan.resumed_step) == ("step-00000003", 3)
    assert of(CheckpointWritten, resumed)[-1].sha256 == whole.sha256
    assert of(CheckpointWritten, resumed)[-1].path == "checkpoints/a2/step-00000008"


def test_a_broken_checkpoint_is_skipped_for_the_one_before(tmp_path: Path) -> None:
    older, newer = of(CheckpointWritten, heard(config(tmp_path)))
    weights = tmp_path / newer.path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    points = [ResumePoint(id=c.id, path=c.path, step=c.step, sha256=c.sha256) for c in (newer, older)]
    messages = heard(config(tmp_path, attempt=2, resume=points))
    assert [(m.id, "model.safetensors" in m.detail) for m in of(CheckpointSkipped, messages)] == [(newer.id, True)]
    assert of(Plan, messages)[0].resumed_step == older.step
    assert of(CheckpointWritten, messages)[-1].sha256 == newer.sha256


def test_a_run_that_is_complete_only_says_so(tmp_path: Path) -> None:
    last = of(CheckpointWritten, heard(config(tmp_path)))[-1]
    point = ResumePoint(id=last.id, path=last.path, step=last.step, sha256=last.sha256)
    messages = heard(config(tmp_path, attempt=2, resume=[point]))
    assert messages[-1] == Done(outcome="succeeded")
    assert of(Step, messages) == []


def test_a_batch_larger_than_the_data_is_clipped_and_noted(tmp_path: Path) -> None:
    data = {"dataset": "class_folder", "path": "pets", "image_size": 8, "batch_size": 500, "val_fraction": 0.25}
    messages = heard(config(tmp_path, spec={"data": data, "epochs": 1}))
    assert of(Plan, messages)[0].steps_per_epoch == 1
    assert ["batch_size=500" in note.detail for note in of(Note, messages)] == [True]


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"data": {"dataset": "cifar10"}}, "data_missing", "data/cifar-10-batches-py"),
        ({"data": {"dataset": "class_folder", "path": "cats"}}, "data_missing", "data/cats"),
        ({"precision": "fp16"}, "crashed", "use bf16, fp32 or auto"),
    ],
)
def test_what_cannot_start_fails_by_name(change: dict[str, Any], code: str, words: str, tmp_path: Path) -> None:
    failure = heard(config(tmp_path, spec=change))[-1]
    assert isinstance(failure, Failure)
    assert failure.code == code
    assert words in failure.detail
    assert failure.hint
    assert "Traceback" in failure.traceback


def raised(cause: Callable[[], object]) -> BaseException:
    try:
        cause()
    except BaseException as error:  # noqa: BLE001 # whatever torch makes of it
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (raised(lambda: torch.empty(2**50)), "out_of_memory_host"),
        (MemoryError(), "out_of_memory_host"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), "out_of_memory_gpu"),
        (Diverged("train_loss is nan at step 4"), "diverged"),
        (DataMissing("nowhere"), "data_missing"),
        (DataUnreadable("a.png"), "data_unreadable"),
        (StorageFull("disk"), "storage"),
        (CheckpointBroken("reads back differently"), "storage"),
        (OSError(errno.ENOSPC, "No space left on device"), "storage"),
        (FileNotFoundError(errno.ENOENT, "No such file"), "crashed"),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "device_lost"),
        (RuntimeError("CUDA error: device-side assert triggered"), "crashed"),
        (raised(lambda: torch.ones(2) @ torch.ones(3)), "crashed"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_errors_have_a_word_in_the_protocol(error: BaseException, code: str) -> None:
    failure = trainer.failure_of(error)
    assert failure.code == code
    assert failure.hint


@dataclass
class Child:
    """A trainer forked from this process, its pipes in our hands."""

    pid: int
    events: int
    control: int
    log: Path
    messages: list[Message] = field(default_factory=list)
    rest: bytes = b""

    def until(self, done: Callable[[Message], bool]) -> Message:
        """Reads on until a message answers the question."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            while b"\n" in self.rest:
                line, self.rest = self.rest.split(b"\n", 1)
                self.messages.append(decode_message(line))
                if done(self.messages[-1]):
                    return self.messages[-1]
            ready, _, _ = select.select([self.events], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(self.events, 65536) if ready else b""
            assert chunk, f"{'it ended' if ready else 'nothing more came'}:\n{self.log.read_text()}"
            self.rest += chunk

    def order(self, control: Control) -> None:
        os.write(self.control, encode(control))

    def exit_status(self) -> int:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            select.select([], [], [], 0.01)
        raise AssertionError(f"still alive:\n{self.log.read_text()}")


Start = Callable[[TrainerConfig], Child]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Forks trainers; none outlives the test."""
    children: list[Child] = []

    def fork(given: TrainerConfig) -> Child:
        log = tmp_path / f"log {len(children)}"
        (events, their_events), (their_control, control) = os.pipe(), os.pipe()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            _become_a_trainer(given, their_events, their_control, (events, control), log, parent)
        os.close(their_events)
        os.close(their_control)
        children.append(Child(pid, events, control, log))
        return children[-1]

    yield fork
    for child in children:
        try:
            os.kill(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def _become_a_trainer(given: TrainerConfig, events: int, control: int, ours: tuple[int, int], log: Path, parent: int) -> None:
    status = 99
    try:
        die_with_parent(parent)
        for descriptor in ours:
            os.close(descriptor)
        output = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        status = trainer.main(given.model_dump_json(), events_fd=events, control_fd=control)
    finally:
        os._exit(status)


def is_training(message: Message) -> bool:
    return isinstance(message, Step)


LONG = {"epochs": 10_000, "checkpoint": {"every_epochs": 10_000}}


def test_a_process_trains_to_the_end_and_leaves_with_zero(start: Start, tmp_path: Path) -> None:
    child = start(config(tmp_path))
    assert child.until(lambda m: isinstance(m, Done)) == Done(outcome="succeeded")
    os.close(child.control)  # a supervisor lets go once it has heard the last word
    assert child.exit_status() == 0
    log = child.log.read_text()
    assert "2 epochs of 4 steps: 18 training images" in log
    assert re.search(r"epoch 2: val_loss [\d.]+", log)
    assert all(" run attempt 1: " in line for line in log.splitlines())
    assert log.rstrip().endswith("succeeded")


def test_a_failing_process_says_why_and_leaves_with_one(start: Start, tmp_path: Path) -> None:
    child = start(config(tmp_path, spec={"data": {"dataset": "mnist"}}))
    failure = child.until(lambda m: isinstance(m, Failure))
    assert isinstance(failure, Failure)
    assert failure.code == "data_missing"
    assert child.exit_status() == 1


def test_told_to_checkpoint_it_writes_one_and_ends(start: Start, tmp_path: Path) -> None:
    child = start(config(tmp_path, spec=LONG))
    child.until(is_training)
    child.order(Control(stop="checkpoint"))
    written = child.until(lambda m: isinstance(m, CheckpointWritten))
    assert isinstance(written, CheckpointWritten)
    checkpoint.verify(tmp_path / written.path, sha256=written.sha256)
    assert child.until(lambda m: isinstance(m, Done)) == Done(outcome="stopped")
    assert child.exit_status() == 0


def test_told_to_stop_now_it_writes_nothing(start: Start, tmp_path: Path) -> None:
    child = start(config(tmp_path, spec=LONG))
    child.until(is_training)
    child.order(Control(stop="now"))
    child.until(lambda m: isinstance(m, Done))
    assert child.exit_status() == 0
    assert not (tmp_path / "checkpoints").exists()


def test_an_order_that_is_none_is_ignored(start: Start, tmp_path: Path) -> None:
    child = start(config(tmp_path, spec=LONG))
    os.write(child.control, b"nonsense\n{}\n")
    child.until(is_training)
    child.order(Control(stop="now"))
    assert child.until(lambda m: isinstance(m, Done)) == Done(outcome="stopped")


def test_it_ends_when_its_deadline_passes_unrenewed(start: Start, tmp_path: Path) -> None:
    deadline = boottime_s() + 4.0
    child = start(config(tmp_path, spec=LONG, deadline_s=deadline))
    assert child.exit_status() == DEADLINE_PASSED
    assert deadline <= boottime_s()


def test_a_renewed_deadline_lets_it_go_on(start: Start, tmp_path: Path) -> None:
    deadline = boottime_s() + 2.0
    child = start(config(tmp_path, spec=LONG, deadline_s=deadline))
    child.order(Control(deadline_s=deadline + 2 * PATIENCE_S))
    child.until(lambda m: isinstance(m, Step) and boottime_s() > deadline + 1.0)
    child.order(Control(stop="now"))
    child.until(lambda m: isinstance(m, Done))
    assert child.exit_status() == 0


def test_it_ends_when_its_supervisor_is_gone(start: Start, tmp_path: Path) -> None:
    child = start(config(tmp_path, spec=LONG))
    child.until(is_training)
    os.close(child.control)
    assert child.exit_status() == ORPHANED


def test_it_ends_when_nobody_listens(start: Start, tmp_path: Path) -> None:
    child = start(config(tmp_path, spec=LONG))
    child.until(is_training)
    os.close(child.events)
    assert child.exit_status() == ORPHANED


def test_it_shows_its_stacks_on_demand(start: Start, tmp_path: Path) -> None:
    child = start(config(tmp_path, spec=LONG))
    child.until(is_training)
    os.kill(child.pid, signal.SIGUSR1)
    child.until(is_training)
    child.until(is_training)
    assert "in train" in child.log.read_text()


def test_the_last_order_counts_unless_it_is_milder() -> None:
    orders = trainer.StandingOrders()
    assert orders.stop is None
    orders.give("checkpoint")
    assert orders.stop == "checkpoint"
    orders.give("now")
    orders.give("checkpoint")
    assert orders.stop == "now"


def test_the_template_imports_all_that_a_run_needs(start: Start, tmp_path: Path) -> None:
    """A fork that imports on its way to the first step would pay for it every time."""
    import importlib

    for name in trainer.PRELOAD:
        importlib.import_module(name)
    given = config(tmp_path, spec={"data": {"dataset": "digits", "image_size": 8}, "epochs": 1})
    before = set(sys.modules)
    messages = heard(given, stop_after=1)
    assert isinstance(messages[-1], Done)
    assert sorted(set(sys.modules) - before) == []
