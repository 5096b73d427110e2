"""Rows 10 and 11: whatever happens to a checkpoint or its disk, a run goes on from one at most an interval old, with the same bits.

The engine and the checkpoints are the real ones, in processes that are really killed; the network is tiny, so that every single call
that reaches the file system can have its own crash.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powergrad import checkpoint, determinism
from powergrad.checkpoint import MANIFEST, MODEL, STATE, StorageFull
from powergrad.engine import Emit, resume, train
from powergrad.jobs import lifecycle, migrate
from powergrad.jobs.store import Store
from powergrad.protocol import (
    CheckpointFailed,
    CheckpointSkipped,
    CheckpointWritten,
    Evaluation,
    Message,
    Phase,
    decode_message,
    encode,
)
from powergrad.spec import TrainSpec
from tests.api.conftest import DIGITS, serving, settings_for
from tests.data.folders import class_folder
from tests.test_checkpoint import publish
from tests.training import NEVER, History, StopAfter, make_run, spec
from tests.worker.conftest import Place, until
from worker.service import WorkerService
from worker.settings import WorkerSettings

pytestmark = [pytest.mark.faults]

STEPS_PER_EPOCH = 3
FOUR_EPOCHS = spec(epochs=4, data={"dataset": "digits", "image_size": 8, "batch_size": 400})
MIB = 2**20
PAGE = 4096


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with determinism.settings(deterministic=True, threads=1):
        yield


def history(run_dir: Path, train_spec: TrainSpec = FOUR_EPOCHS, **how: Any) -> History:
    return History(run_dir, lambda attempt: make_run(run_dir, train_spec, attempt=attempt, **how))


def undisturbed(run_dir: Path, train_spec: TrainSpec = FOUR_EPOCHS, **how: Any) -> History:
    made = history(run_dir, train_spec, **how)
    with determinism.settings(deterministic=True, threads=1):
        assert made.attempt() == "succeeded"
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> History:
    """A run that nothing happens to."""
    return undisturbed(tmp_path_factory.mktemp("whole"))


def assert_ends_as(whole: History, broken: History) -> None:
    assert broken.attempt() == "succeeded"
    assert broken.metrics() == whole.metrics()
    assert broken.final_sha256 == whole.final_sha256


# --- row 10: crashes during publication ------------------------------------------------------------------------------------------


def said_by_a_process(work: Callable[[Emit], object]) -> tuple[int, list[Message]]:
    """Exit status (-N for signal N) of a real process that does `work`, and what it said until its end."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with os.fdopen(writer, "wb", buffering=0) as pipe:
                work(lambda message: _say(pipe, message))
            status = 0
        except BaseException:  # noqa: BLE001 - a child's end must not run the test's own
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as lines:
        said = [decode_message(line) for line in lines]
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


def _say(pipe: IO[bytes], message: Message) -> None:
    pipe.write(encode(message))


class Fuse:
    """Kills this process, which is a test's child, before the nth call that reaches the file system while it burns."""

    AUDITED = frozenset({"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.listdir", "os.scandir", "shutil.rmtree"})
    UNAUDITED = ("fsync", "close", "posix_fadvise")

    def __init__(self, nth: int) -> None:
        self._left, self._burns = nth, False
        sys.addaudithook(lambda event, _: self._tick() if event in self.AUDITED else None)
        for name in self.UNAUDITED:
            setattr(os, name, self._counted(getattr(os, name)))

    def light(self) -> None:
        self._burns = True

    def put_out(self) -> None:
        self._burns = False

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self._tick()
            return real(*args)

        return call

    def _tick(self) -> None:
        if self._burns:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def train_with(run_dir: Path, emit: Emit, *, begin: Callable[[], None], end: Callable[[], None]) -> None:
    """A whole attempt; `begin` is called as its second checkpoint is about to be written, `end` when it has been said."""
    run = make_run(run_dir, FOUR_EPOCHS)
    progress, _ = resume(run, [], emit=emit)
    checkpoints = 0

    def say(message: Message) -> None:
        nonlocal checkpoints
        if isinstance(message, CheckpointWritten) and checkpoints == 2:
            end()
        emit(message)
        if message == Phase(name="checkpointing"):
            checkpoints += 1
            if checkpoints == 2:
                begin()

    train(run, progress, emit=say, orders=StopAfter(NEVER))


def assert_goes_on(run_dir: Path, said: list[Message], whole: History) -> None:
    """From a checkpoint at most one interval older than the crash, to the same end."""
    broken = history(run_dir)
    broken.attempts = 1
    for message in said:
        broken.take(message)
    assert broken.checkpoints[-1].step >= STEPS_PER_EPOCH, "the crash was at the end of the second epoch"
    for found in broken.checkpoints:
        checkpoint.verify(run_dir / found.path, sha256=found.sha256)
    assert_ends_as(whole, broken)
    assert not [message for message in broken.messages if isinstance(message, CheckpointSkipped)]


@pytest.mark.row(10)
def test_a_crash_at_every_call_of_the_publication(whole: History, tmp_path: Path) -> None:
    crashes = 0
    while True:
        run_dir = tmp_path / str(crashes)

        def work(emit: Emit, run_dir: Path = run_dir, nth: int = crashes + 1) -> None:
            fuse = Fuse(nth)
            train_with(run_dir, emit, begin=fuse.light, end=fuse.put_out)

        status, said = said_by_a_process(work)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        assert_goes_on(run_dir, said, whole)
        shutil.rmtree(run_dir)
        crashes += 1
    assert crashes >= 20, "three files made, flushed, closed, read back; two directories flushed; one rename"


@pytest.mark.row(10)
@settings(max_examples=12)
@given(share=st.floats(0.0, 1.0, exclude_max=True))
def test_a_crash_at_any_byte_of_the_publication(whole: History, share: float) -> None:
    """The system itself kills the process in the middle of a write: at the byte where its limit of a file's size lies."""
    newest = whole.run_dir / whole.checkpoints[1].path
    limit = int(share * max(path.stat().st_size for path in newest.iterdir()))

    def begin() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    with tempfile.TemporaryDirectory() as folder:
        status, said = said_by_a_process(lambda emit: train_with(Path(folder), emit, begin=begin, end=lambda: None))
        assert status == -signal.SIGXFSZ
        assert_goes_on(Path(folder), said, whole)


# --- row 10: what lies on the disk is not what was written -----------------------------------------------------------------------


@dataclass(frozen=True)
class Damage:
    """Done to one file of a checkpoint. place: of the first byte touched, as a share of the file."""

    name: str
    how: Literal["flip", "cut", "remove"]
    place: float
    bit: int

    def do(self, folder: Path) -> None:
        path = folder / self.name
        content = bytearray(path.read_bytes())
        at = int(self.place * len(content))
        match self.how:
            case "flip":
                content[at] ^= 1 << self.bit
                path.write_bytes(content)
            case "cut":
                path.write_bytes(content[:at])
            case "remove":
                path.unlink()

    @property
    def may_be_harmless(self) -> bool:
        """The manifest's last line end, a space in it or a number that is only for people changes nothing that is loaded."""
        return self.name == MANIFEST and self.how != "remove"


DAMAGE = st.builds(
    Damage,
    st.sampled_from([MODEL, STATE, MANIFEST]),
    st.sampled_from(["flip", "flip", "cut", "cut", "remove"]),
    st.floats(0.0, 1.0, exclude_max=True),
    st.integers(0, 7),
)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> History:
    """A run that was ended between its third checkpoint and the fourth."""
    made = history(tmp_path_factory.mktemp("stopped"))
    with determinism.settings(deterministic=True, threads=1):
        assert made.attempt(StopAfter(3 * STEPS_PER_EPOCH + 2, "now")) == "stopped"
    assert [found.step for found in made.checkpoints] == [3, 6, 9]
    return made


def copied(origin: History, folder: Path) -> History:
    shutil.copytree(origin.run_dir, folder / "run")
    made = history(folder / "run")
    made.attempts, made.points, made.checkpoints = origin.attempts, list(origin.points), list(origin.checkpoints)
    return made


@pytest.mark.row(10)
@settings(max_examples=25)
@given(damage=st.lists(DAMAGE, min_size=1, max_size=3))
def test_the_newest_that_is_whole_is_gone_on_from_and_the_others_are_named(whole: History, stopped: History, damage: list[Damage]) -> None:
    """The newest is damaged, both newest are, or all three: then the run starts anew."""
    with tempfile.TemporaryDirectory() as folder:
        broken = copied(stopped, Path(folder))
        newest_first = broken.checkpoints[::-1]
        for found, harm in zip(newest_first, damage, strict=False):
            harm.do(broken.run_dir / found.path)
        assert_ends_as(whole, broken)
        skipped = [message for message in broken.messages if isinstance(message, CheckpointSkipped)]
        expected = [found.id for found in newest_first[: len(damage)]]
        if not any(harm.may_be_harmless for harm in damage):
            assert [message.id for message in skipped] == expected
            assert all(found.path.rpartition("/")[0] in message.detail for found, message in zip(newest_first, skipped, strict=False))
        else:
            assert {message.id for message in skipped} <= set(expected)


class Watched(History):
    """Tells of each message before it goes on."""

    def __init__(self, run_dir: Path, seen: Callable[[Message], object]) -> None:
        super().__init__(run_dir, lambda attempt: make_run(run_dir, FOUR_EPOCHS, attempt=attempt))
        self.seen = seen

    def take(self, message: Message) -> None:
        super().take(message)
        self.seen(message)


@pytest.mark.row(10)
def test_a_disk_that_keeps_something_else_costs_the_newer_checkpoint_only(
    whole: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does so once, at the second checkpoint: what was flushed is changed behind the writer's back."""
    lies = 0
    real = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal lies
        real(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.name == STATE and "step-00000006" in path.parent.name:
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
            lies += 1

    monkeypatch.setattr(os, "fsync", fsync)
    lied_to = Watched(tmp_path, lambda _: None)
    assert lied_to.attempt() == "succeeded"
    failed = [message for message in lied_to.messages if isinstance(message, CheckpointFailed)]
    assert (lies, [message.step for message in failed]) == (1, [6])
    assert "state.pt" in failed[0].detail
    assert [found.step for found in lied_to.checkpoints] == [3, 9, 12]
    assert not (tmp_path / "checkpoints" / "a1" / "step-00000006").exists()
    assert lied_to.final_sha256 == whole.final_sha256


# --- row 10: a disk that is full -------------------------------------------------------------------------------------------------


@dataclass
class Disk:
    """A small file system of the test's own."""

    path: Path
    _ballast: list[Path] = field(default_factory=list)

    @property
    def free_bytes(self) -> int:
        return shutil.disk_usage(self.path).free

    def fill(self, *, leaving: int = 0) -> None:
        """Until no more than `leaving` bytes, in whole pages, are free."""
        path = self.path / f"ballast-{len(self._ballast)}"
        self._ballast.append(path)
        with path.open("wb") as file:
            while (room := self.free_bytes - leaving) >= PAGE:
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), room // PAGE * PAGE)

    def empty(self) -> None:
        while self._ballast:
            self._ballast.pop().unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(path)], capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.mark.row(10)
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(disk: Disk, whole: History) -> None:
    def seen(message: Message) -> None:
        if isinstance(message, Evaluation) and message.epoch == 2:
            disk.fill(leaving=MIB)
        if isinstance(message, CheckpointFailed):
            checkpoint.verify(disk.path / "checkpoints" / "a1" / "step-00000003")
            disk.empty()

    run = Watched(disk.path, seen)
    assert run.attempt() == "succeeded"
    failed = [message for message in run.messages if isinstance(message, CheckpointFailed)]
    assert [message.step for message in failed] == [6]
    assert "bytes free" in failed[0].detail
    assert [found.step for found in run.checkpoints] == [3, 9, 12]
    assert run.final_sha256 == whole.final_sha256


@pytest.mark.row(10)
def test_a_disk_that_fills_up_in_the_middle_of_a_file_leaves_no_half_checkpoint(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SPARE_BYTES", 0)  # so that what is estimated is less than what is written
    run_dir = disk.path / "run"
    older = publish(run_dir, step=100)
    outcomes = []
    for pages in range(16):
        disk.fill(leaving=pages * PAGE)
        try:
            newer = publish(run_dir, step=200, seed=1)
        except StorageFull as error:
            outcomes.append("foreseen" if "bytes free" in str(error) else "full")
            assert {path.name for path in (run_dir / "checkpoints" / "a1").iterdir()} == {"step-00000100"}
        else:
            outcomes.append("written")
            checkpoint.verify(run_dir / newer.path)
            shutil.rmtree(run_dir / newer.path)
        checkpoint.verify(run_dir / older.path, sha256=older.manifest.model.sha256)
        disk.empty()
    assert outcomes[0] == "foreseen"
    assert outcomes.count("full") >= 2, "each cut at its own place"
    assert outcomes[-1] == "written"


@pytest.mark.row(10)
def test_a_database_without_room_refuses_for_the_time_being(disk: Disk, sqlite_file: Path) -> None:
    shutil.copy(sqlite_file, disk.path / "jobs.db")
    with serving(settings_for(f"sqlite:///{disk.path}/jobs.db", disk.path)) as api:
        accepted = [api.submit()["id"]]
        disk.fill()
        for _ in range(500):  # the log of the database has some room of its own
            refused = api.http.post("/v1/jobs", json=DIGITS)
            if refused.status_code != 202:
                break
            accepted.append(refused.json()["id"])
        assert refused.status_code == 503, refused.text
        assert int(refused.headers["Retry-After"]) > 0
        assert "disk is full" in refused.json()["detail"]
        assert api.http.post(f"/v1/jobs/{accepted[0]}/cancel").status_code in {202, 503}
        assert api.job(accepted[0])["id"] == accepted[0], "looking goes on"
        disk.empty()
        accepted.append(until(lambda: _accepted(api.http.post("/v1/jobs", json=DIGITS))))
        listed = {job["id"] for page in _pages(api) for job in page["data"]}
        assert listed == set(accepted)


def _accepted(answer: Any) -> str | None:
    return answer.json()["id"] if answer.status_code == 202 else None


def _pages(api: Any) -> Iterator[dict[str, Any]]:
    page = {"has_more": True, "last_id": None}
    while page["has_more"]:
        page = api.http.get("/v1/jobs", params={"limit": 100} | ({"after": page["last_id"]} if page["last_id"] else {})).json()
        yield page


@pytest.mark.row(10)
def test_a_server_with_too_little_room_says_so_before_it_stores_a_job(disk: Disk, sqlite_file: Path) -> None:
    shutil.copy(sqlite_file, disk.path / "jobs.db")
    with serving(settings_for(f"sqlite:///{disk.path}/jobs.db", disk.path, min_free_bytes=4 * MIB)) as api:
        disk.fill(leaving=3 * MIB)
        refused = api.http.post("/v1/jobs", json=DIGITS)
        assert (refused.status_code, refused.json()["code"]) == (507, "storage_full")
        disk.empty()
        assert until(lambda: _accepted(api.http.post("/v1/jobs", json=DIGITS)))


@pytest.fixture
def place(disk: Disk) -> Iterator[Place]:
    """A worker all of whose files, the database with them, are on the small disk."""
    times: dict[str, Any] = {"lease_ttl_s": 8.0, "lease_margin_s": 1.0, "heartbeat_s": 1.0, "look_s": 0.1, "poll_s": 0.1, "sweep_s": 0.2}
    made = WorkerSettings(data_dir=disk.path, slots=1, **times)
    store = Store(made.database_url)
    migrate.migrate(store)
    service = WorkerService(made)
    service.start()
    try:
        assert service.template.ready.wait(120)
        yield Place(service, store)
    finally:
        disk.empty()  # a worker keeps the end of a run until it can be stored
        service.stop()
        store.close()


SMALL: dict[str, Any] = {"model": {"name": "resnet20"}, "epochs": 8}


def files_bytes(folder: Path) -> int:
    """Of checkpoints and artifacts; manifests describe what is counted, and are not."""
    parts = (folder / "checkpoints", folder / "artifacts")
    return sum(path.stat().st_size for part in parts for path in part.rglob("*") if path.is_file() and path.name != MANIFEST)


@pytest.mark.row(10)
@pytest.mark.timeout(400)
def test_a_worker_on_a_full_disk_goes_on_when_there_is_room(place: Place, disk: Disk) -> None:
    free = place.submit(**SMALL)
    assert place.until_state(free, "succeeded", "failed", within_s=200)["state"] == "succeeded"
    assert place.job(free)["bytes"] == files_bytes(disk.path / "jobs" / free) > 0

    job_id = place.submit(**SMALL, limits={"max_attempts": 1})
    place.until(lambda: place.events(job_id, "checkpoint"))
    disk.fill(leaving=4 * MIB)  # of which a checkpoint leaves the log and the database their part
    ended = place.until_state(job_id, "succeeded", "failed", within_s=200)
    assert (ended["state"], ended["reason"]["code"]) == ("failed", "storage")
    failed = place.events(job_id, "checkpoint_failed")
    assert failed, "training went on without"
    assert all("bytes free" in event["data"]["detail"] for event in failed)
    assert place.job(job_id)["bytes"] == files_bytes(disk.path / "jobs" / job_id) > 0

    disk.empty()
    with place.store.write() as tx:
        lifecycle.retry(tx, job_id)
    ended = place.until_state(job_id, "succeeded", "failed", within_s=200)
    assert ended["state"] == "succeeded", ended["reason"]
    assert ended["attempts"][1]["resumed_from"] is not None
    assert place.weights_sha256(job_id) == place.weights_sha256(free)
    assert ended["bytes"] == files_bytes(disk.path / "jobs" / job_id)


@pytest.mark.row(10)
@pytest.mark.long
@pytest.mark.timeout(600)
def test_not_a_byte_left_for_longer_than_a_lease(place: Place, disk: Disk) -> None:
    """The log loses lines, no checkpoint and no row can be written: the trainer ends, and the job goes on when there is room."""
    free = place.submit(**SMALL)
    assert place.until_state(free, "succeeded", "failed", within_s=200)["state"] == "succeeded"
    job_id = place.submit(**SMALL)
    place.until(lambda: place.events(job_id, "checkpoint"))
    disk.fill()
    place.until(lambda: not _is_running(f"powergrad: trainer {job_id}"), within_s=200)
    disk.empty()
    ended = place.until_state(job_id, "succeeded", "failed", within_s=200)
    assert ended["state"] == "succeeded", ended["reason"]
    assert ended["attempt"] > 1
    assert place.weights_sha256(job_id) == place.weights_sha256(free)
    assert ended["bytes"] == files_bytes(disk.path / "jobs" / job_id)


def _is_running(title: str) -> bool:
    return any(title in " ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"]))


# --- row 11 ----------------------------------------------------------------------------------------------------------------------


def of_files(workers: int) -> TrainSpec:
    data = {"dataset": "class_folder", "path": "pets", "image_size": 8, "batch_size": 4, "workers": workers, "val_fraction": 0.25}
    return spec(data=data, epochs=3)


def stopped_at_random(folder: Path, workers: int, dice: random.Random, stops: int) -> None:
    """Stops of both kinds, at random steps and at borders of epochs, until the run has been through."""
    class_folder(folder / "pets")
    chosen = of_files(workers)
    how = {"data_root": folder, "resident": False}
    whole = undisturbed(folder / "whole", chosen, **how)
    steps = whole.points[-1].step
    borders = range(0, steps + 1, steps // chosen.epochs)
    broken = history(folder / "broken", chosen, **how)
    for _ in range(stops):
        here = broken.checkpoints[-1].step if broken.checkpoints else 0
        to = dice.choice([dice.randint(here, steps - 1), *(border for border in borders if here <= border < steps)])
        broken.attempt(StopAfter(to - here, dice.choice(["checkpoint", "now"])))
    assert_ends_as(whole, broken)


@pytest.mark.row(11)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_stopped_at_random_steps_ends_with_the_same_bits(workers: int, tmp_path: Path, dice: random.Random) -> None:
    stopped_at_random(tmp_path, workers, dice, stops=3)


@pytest.mark.row(11)
@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("workers", [0, 2])
def test_runs_stopped_again_and_again_end_with_the_same_bits(workers: int, tmp_path: Path, dice: random.Random) -> None:
    for number in range(10):
        stopped_at_random(tmp_path / str(number), workers, dice, stops=dice.randint(1, 6))
