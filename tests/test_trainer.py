"""The trainer as its supervisor sees it: what it says, what it obeys, and how its process ends."""

from __future__ import annotations

import errno
import os
import re
import select
import signal
import sys
import time
import urllib.request
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
    InitialWeights,
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


PETS: dict[str, Any] = {"dataset": "class_folder", "path": "pets", "image_size": 8, "batch_size": 4, "val_fraction": 0.25}


def config(run_dir: Path, *, spec: dict[str, Any] | None = None, **fields: Any) -> TrainerConfig:
    """An attempt of a resnet18 on 18 small images, in two epochs of four steps."""
    if not (run_dir / "data" / "pets").exists():
        class_folder(run_dir / "data" / "pets")
    parts: dict[str, Any] = {
        "data": PETS,
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


def point_of(written: CheckpointWritten) -> ResumePoint:
    return ResumePoint(id=written.id, path=written.path, step=written.step, sha256=written.sha256)


def of(kind: type[M], messages: list[Message]) -> list[M]:
    return [message for message in messages if isinstance(message, kind)]


def test_a_run_tells_its_story_in_order(tmp_path: Path) -> None:
    messages = heard(config(tmp_path))
    kinds = [f"{m.type}:{m.name}" if isinstance(m, Phase) else m.type for m in messages]
    epoch = ["step"] * 4 + ["phase:evaluating", "evaluation", "phase:checkpointing", "checkpoint"]
    start = ["phase:starting", "phase:loading_data", "phase:building_model", "plan", "artifact", "artifact", "phase:training"]
    end = ["phase:exporting", *["artifact"] * 5, "phase:finished", "done"]
    assert kinds == [*start, *epoch, *epoch, *end]
    names = ["labels.json", "preprocessing.json", "confusion.json", "per_class.csv", "mistakes.png", "mistakes.json", "MODEL_CARD.md"]
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
    resumed = heard(config(tmp_path / "stopped", attempt=2, resume=[point_of(written)]))
    plan = of(Plan, resumed)[0]
    assert (plan.resumed_from, plan.resumed_step) == ("step-00000003", 3)
    assert of(CheckpointWritten, resumed)[-1].sha256 == whole.sha256
    assert of(CheckpointWritten, resumed)[-1].path == "checkpoints/a2/step-00000008"


def test_a_held_run_says_so_and_goes_on_another_time(tmp_path: Path) -> None:
    whole = of(CheckpointWritten, heard(config(tmp_path / "whole")))[-1]
    held = heard(config(tmp_path / "held", hold_epoch=1))
    assert held[-1] == Done(outcome="held")
    written = of(CheckpointWritten, held)[-1]
    assert (written.step, written.epoch) == (4, 1)
    again = heard(config(tmp_path / "held", attempt=2, resume=[point_of(written)], hold_epoch=1))
    assert again[-1] == Done(outcome="held")
    assert not of(Step, again)
    resumed = heard(config(tmp_path / "held", attempt=3, resume=[point_of(written)]))
    assert of(CheckpointWritten, resumed)[-1].sha256 == whole.sha256


def test_a_broken_checkpoint_is_skipped_for_the_one_before(tmp_path: Path) -> None:
    older, newer = of(CheckpointWritten, heard(config(tmp_path)))
    weights = tmp_path / newer.path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    messages = heard(config(tmp_path, attempt=2, resume=[point_of(newer), point_of(older)]))
    assert [(m.id, "model.safetensors" in m.detail) for m in of(CheckpointSkipped, messages)] == [(newer.id, True)]
    assert of(Plan, messages)[0].resumed_step == older.step
    assert of(CheckpointWritten, messages)[-1].sha256 == newer.sha256


def test_a_run_that_is_complete_only_says_so(tmp_path: Path) -> None:
    last = of(CheckpointWritten, heard(config(tmp_path)))[-1]
    messages = heard(config(tmp_path, attempt=2, resume=[point_of(last)]))
    assert messages[-1] == Done(outcome="succeeded")
    assert of(Step, messages) == []


def test_a_batch_larger_than_the_data_is_clipped_and_noted(tmp_path: Path) -> None:
    messages = heard(config(tmp_path, spec={"data": PETS | {"batch_size": 500}, "epochs": 1}))
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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss": {"class_weights": [1.0, 2.0]}}, "loss.class_weights has 2 entries: the data set has 3 classes"),
        ({"data": PETS | {"batch_size": 32}, "accumulate": 32}, "data.batch_size=32: 18 images cannot be shared out to 32 parts"),
        ({"model": {"name": "no_such_network"}}, "no_such_network"),
        ({"model": {"name": "vit_b_16"}}, "vit_b_16"),
    ],
    ids=["class weights", "batch", "unknown network", "size"],
)
def test_a_spec_that_does_not_fit_its_data_fails_before_the_first_step(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    messages = heard(config(tmp_path, spec=change))
    failure = messages[-1]
    assert isinstance(failure, Failure)
    assert failure.code == "crashed"
    assert failure.hint == "correct the field that the message names"
    assert words in failure.detail
    assert not of(Plan, messages)


def test_a_batch_is_rounded_down_to_what_can_be_shared_out(tmp_path: Path) -> None:
    messages = heard(config(tmp_path, spec={"data": PETS | {"batch_size": 20}, "accumulate": 5, "epochs": 1}), stop_after=0)
    assert of(Plan, messages)[0].steps_per_epoch == 1
    assert [note.detail for note in of(Note, messages)] == ["batch_size=20: 15 is used; there are 18 training images and 5 part(s)"]


def test_balanced_classes_are_those_of_their_inverse_frequency(tmp_path: Path) -> None:
    """Of 12 ants, 6 bees and 3 cats, n / (C n_c): the same bits as with these weights given."""
    for name, each in (("ant", 12), ("bee", 6), ("cat", 3)):
        class_folder(tmp_path / "data" / "pets" / "train", classes=(name,), each=each)
        class_folder(tmp_path / "data" / "pets" / "val", classes=(name,), each=2)
    weights = {"balanced": "balanced", "given": [21 / 36, 21 / 18, 21 / 9], "none": None}
    ends = {}
    for name, value in weights.items():
        spec = {"loss": {"class_weights": value}, "model": {"name": "resnet20"}}
        given = config(tmp_path / name, spec=spec, data_root=str(tmp_path / "data"))
        ends[name] = of(CheckpointWritten, heard(given))[-1].sha256
    assert ends["balanced"] == ends["given"] != ends["none"]


def test_a_run_that_no_longer_improves_says_why_it_is_done(tmp_path: Path) -> None:
    """Resumed, it says so again and takes no further step."""
    stopping = {"epochs": 9, "early_stopping": {"patience_epochs": 1, "min_delta": 2.0}}
    messages = heard(config(tmp_path, spec=stopping))
    why = Done(outcome="succeeded", detail="val_top1 has not improved for 1 epoch(s): ended after epoch 2")
    assert messages[-1] == why
    last = of(CheckpointWritten, messages)[-1]
    assert last.epoch == 2
    again = heard(config(tmp_path, spec=stopping, attempt=2, resume=[point_of(last)]))
    assert again[-1] == why
    assert of(Step, again) == []


def test_a_run_that_diverges_names_the_step_and_what_to_try(tmp_path: Path) -> None:
    wild = {"optimizer": {"lr": 1000.0, "weight_decay": 10.0}, "schedule": {"name": "constant"}, "epochs": 9, "model": {"name": "resnet20"}}
    failure = heard(config(tmp_path, spec=wild))[-1]
    assert isinstance(failure, Failure)
    assert failure.code == "diverged"
    assert re.search(r"train_loss is \S+ at step \d+ \(lr 1000\)", failure.detail)
    assert "lower optimizer.lr" in failure.hint


STILL: dict[str, Any] = {"optimizer": {"lr": 1e-30, "weight_decay": 0.0}, "schedule": {"name": "constant"}, "epochs": 1}
"""A rate at which no weight moves."""


def small(name: str = "resnet20") -> dict[str, Any]:
    return {"model": {"name": name, "init_from": f"job_{'0' * 26}"}}


@pytest.fixture
def earlier(tmp_path: Path) -> CheckpointWritten:
    """The last checkpoint of a resnet20 that has been trained in `tmp_path`."""
    return of(CheckpointWritten, heard(config(tmp_path, spec={"model": {"name": "resnet20"}, "seed": 9})))[-1]


def initial(run_dir: Path, written: CheckpointWritten) -> InitialWeights:
    return InitialWeights(path=str(run_dir / written.path / "model.safetensors"), sha256=written.sha256)


def parameters(run_dir: Path, written: CheckpointWritten) -> dict[str, torch.Tensor]:
    """Of a checkpoint, without the batch statistics."""
    weights = checkpoint.load(run_dir / written.path).weights
    return {name: tensor for name, tensor in weights.items() if "running" not in name and "tracked" not in name}


def test_a_run_begins_with_the_weights_it_is_given(earlier: CheckpointWritten, tmp_path: Path) -> None:
    messages = heard(config(tmp_path / "next", spec=STILL | small(), init_from=initial(tmp_path, earlier)))
    begun = parameters(tmp_path / "next", of(CheckpointWritten, messages)[-1])
    taken = parameters(tmp_path, earlier)
    assert begun.keys() == taken.keys()
    assert all(torch.equal(tensor, taken[name]) for name, tensor in begun.items())
    assert of(Note, messages) == []


def test_a_classifier_of_another_size_starts_fresh_and_is_noted(earlier: CheckpointWritten, tmp_path: Path) -> None:
    class_folder(tmp_path / "next" / "data" / "pets", classes=("ant", "bee", "cat", "dog", "eel"))
    messages = heard(config(tmp_path / "next", spec=STILL | small(), init_from=initial(tmp_path, earlier)))
    begun = parameters(tmp_path / "next", of(CheckpointWritten, messages)[-1])
    taken = parameters(tmp_path, earlier)
    different = {name for name, tensor in begun.items() if tensor.shape != taken[name].shape}
    assert different == {"fc.weight", "fc.bias"}
    assert all(torch.equal(tensor, taken[name]) for name, tensor in begun.items() if name not in different)
    note = "model.init_from: the classifier has another size and starts fresh (fc.weight, fc.bias)"
    assert [note_.detail for note_ in of(Note, messages)] == [note]


@pytest.mark.parametrize("harm", ["gone", "changed", "another"])
def test_weights_that_are_gone_or_changed_are_missing_data(harm: str, earlier: CheckpointWritten, tmp_path: Path) -> None:
    given = initial(tmp_path, earlier)
    path = Path(given.path)
    if harm == "gone":
        path.unlink()
    elif harm == "changed":
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    else:
        given = given.model_copy(update={"sha256": "0" * 64})
    failure = heard(config(tmp_path / "next", spec=STILL | small(), init_from=given))[-1]
    assert isinstance(failure, Failure)
    assert failure.code == "data_missing"
    assert "model.init_from: the checkpoint is gone or changed" in failure.detail
    assert "model.safetensors" in failure.detail


def test_weights_of_another_network_are_refused_by_name(earlier: CheckpointWritten, tmp_path: Path) -> None:
    failure = heard(config(tmp_path / "next", spec=STILL | small("resnet32"), init_from=initial(tmp_path, earlier)))[-1]
    assert isinstance(failure, Failure)
    assert failure.code == "crashed"
    assert "is of another network" in failure.detail
    assert failure.hint == "correct the field that the message names"


def test_a_run_begun_with_given_weights_resumes_from_its_own(earlier: CheckpointWritten, tmp_path: Path) -> None:
    whole = heard(config(tmp_path / "whole", spec=small(), init_from=initial(tmp_path, earlier)))
    stopped = heard(config(tmp_path / "stopped", spec=small(), init_from=initial(tmp_path, earlier)), stop_after=3)
    point = point_of(of(CheckpointWritten, stopped)[-1])
    Path(initial(tmp_path, earlier).path).unlink()  # they have done their part
    resumed = heard(config(tmp_path / "stopped", spec=small(), init_from=initial(tmp_path, earlier), attempt=2, resume=[point]))
    assert of(CheckpointWritten, resumed)[-1].sha256 == of(CheckpointWritten, whole)[-1].sha256

    (tmp_path / "stopped" / point.path / "model.safetensors").write_bytes(b"")
    for given in (initial(tmp_path, earlier), None):
        failure = heard(config(tmp_path / "stopped", spec=small(), init_from=given, attempt=3, resume=[point]))[-1]
        assert isinstance(failure, Failure)
        assert failure.code == "data_missing", "it does not begin afresh"


def test_published_weights_that_cannot_be_fetched_are_missing_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no network, promptly and with the place to put them."""
    for variable in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:1")  # nobody listens there
        monkeypatch.setenv(variable.upper(), "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setattr(urllib.request, "_opener", None)  # it reads the proxy when it is made
    begun = time.monotonic()
    failure = heard(config(tmp_path, spec={"data": PETS | {"image_size": 224}, "model": {"pretrained": True}}))[-1]
    assert isinstance(failure, Failure)
    assert failure.code == "data_missing"
    assert str(tmp_path / "data" / "weights") in failure.detail
    assert "model.pretrained" in failure.hint
    assert time.monotonic() - begun < PATIENCE_S


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


@pytest.mark.parametrize(
    ("share", "first"), [(1.0, "lower data.batch_size"), (0.25, "ask for a larger part of a GPU than resources.gpus = 0.25, or lower")]
)
def test_a_run_on_a_part_of_a_gpu_that_lacks_memory_may_ask_for_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, first: str
) -> None:
    def full(*_: object, **__: object) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(trainer, "build_model", full)
    end = heard(config(tmp_path, gpu_share=share))[-1]
    assert isinstance(end, Failure)
    assert end.code == "out_of_memory_gpu"
    assert end.hint.startswith(first)


@pytest.mark.parametrize(("share", "gib", "allocated"), [(0.25, 80, 19.5), (0.75, 40, 29.5), (0.25, 2, 0.25), (0.5, 16, 7.5)])
def test_parts_of_a_gpu_leave_room_for_what_the_allocator_does_not_count(share: float, gib: int, allocated: float) -> None:
    assert trainer.allocator_fraction(share, gib << 30) * gib == pytest.approx(allocated)


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
