"""A checkpoint is whole or it does not exist, wherever its writing ends."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from powergrad import checkpoint
from powergrad.checkpoint import CheckpointBroken, CheckpointExists, Published, StorageFull

CRASHED = 86


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    conv = torch.randn(4, 3, 3, 3, generator=generator)
    return {"conv.weight": conv, "bn.running_mean": torch.randn(4, generator=generator), "bn.num_batches_tracked": torch.tensor(17)}


def publish(run_dir: Path, *, step: int = 800, attempt: int = 1, seed: int = 0) -> Published:
    state = {"step": step, "momentum": [torch.ones(5)], "best": None}
    return checkpoint.publish(run_dir, attempt=attempt, step=step, epoch=2, weights=weights(seed), state=state)


def files(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def in_a_fork(work: Callable[[], object]) -> int:
    """Exit status of a real process that does `work`; -N for signal N."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_what_is_published_loads_again(tmp_path: Path) -> None:
    published = publish(tmp_path)
    loaded = checkpoint.load(tmp_path / published.path)
    assert published.path == "checkpoints/a1/step-00000800"
    assert loaded.weights.keys() == weights().keys()
    assert all(torch.equal(loaded.weights[name], tensor) for name, tensor in weights().items())
    assert loaded.state["step"] == 800
    assert torch.equal(loaded.state["momentum"][0], torch.ones(5))


def test_the_manifest_tells_sizes_and_sums(tmp_path: Path) -> None:
    path = tmp_path / publish(tmp_path).path
    manifest = json.loads((path / "manifest.json").read_bytes())
    assert files(path) == {"model.safetensors", "state.pt", "manifest.json"}
    assert {name: manifest[name] for name in ("format", "step", "epoch", "attempt", "torch")} == {
        "format": 1,
        "step": 800,
        "epoch": 2,
        "attempt": 1,
        "torch": torch.__version__,
    }
    for name, entry in manifest["files"].items():
        content = (path / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_equal_weights_are_equal_bytes(tmp_path: Path) -> None:
    """Whatever the attempt, the step and the layout in memory."""
    one = publish(tmp_path, attempt=1, step=5)
    last = {name: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t for name, t in reversed(weights().items())}
    other = checkpoint.publish(tmp_path, attempt=2, step=9, epoch=1, weights=last, state={})
    assert one.manifest.model.sha256 == other.manifest.model.sha256


def test_publishing_the_same_again_changes_nothing(tmp_path: Path) -> None:
    first = publish(tmp_path)
    assert publish(tmp_path).manifest.model == first.manifest.model
    assert files(tmp_path / "checkpoints" / "a1") == {"step-00000800"}


def test_another_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    first = publish(tmp_path, seed=0)
    with pytest.raises(CheckpointExists, match="step-00000800"):
        publish(tmp_path, seed=1)
    checkpoint.verify(tmp_path / first.path, sha256=first.manifest.model.sha256)


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_found_and_the_file_named(name: str, damage: str, tmp_path: Path) -> None:
    path = tmp_path / publish(tmp_path).path / name
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-7])
    else:
        content[0] ^= 64
        path.write_bytes(content)
    with pytest.raises(CheckpointBroken, match=name):
        checkpoint.verify(path.parent)


def test_a_whole_checkpoint_of_other_weights_is_not_the_one_meant(tmp_path: Path) -> None:
    path = tmp_path / publish(tmp_path).path
    with pytest.raises(CheckpointBroken, match="not the"):
        checkpoint.verify(path, sha256="0" * 64)


def test_a_pickle_bomb_is_refused_and_not_executed(tmp_path: Path) -> None:
    path = tmp_path / publish(tmp_path).path
    flag = tmp_path / "executed"
    (path / "state.pt").write_bytes(f"cos\nsystem\n(S'touch {flag}'\ntR.".encode())
    with pytest.raises(CheckpointBroken):
        checkpoint.load(path)
    assert not flag.exists()


def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / publish(tmp_path).path / "manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest["files"]["../../../secret"] = {"sha256": "0" * 64, "bytes": 1}
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointBroken, match="names the files"):
        checkpoint.verify(path.parent)


def test_a_format_of_a_later_release_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / publish(tmp_path).path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"format": 2}))
    with pytest.raises(CheckpointBroken, match="format 2"):
        checkpoint.verify(path.parent)


SYSTEM_CALLS = ("fsync", "rename", "mkdir", "open", "close")


def crashing_at(nth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, this process ends at the nth call that reaches the file system."""
    calls = 0
    for name in SYSTEM_CALLS:
        real = getattr(os, name)

        def counted(*args: Any, real: Callable[..., Any] = real, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == nth:
                os._exit(CRASHED)
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, counted)


def test_a_crash_at_any_point_leaves_the_older_checkpoint_and_no_half_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crashes, completed = 0, False
    while not completed:
        run_dir = tmp_path / str(crashes)
        older = publish(run_dir, step=100)

        def work(run_dir: Path = run_dir, nth: int = crashes + 1) -> None:
            crashing_at(nth, monkeypatch)
            publish(run_dir, step=200, seed=1)

        completed = in_a_fork(work) == 0
        checkpoint.verify(run_dir / older.path, sha256=older.manifest.model.sha256)
        newer = run_dir / "checkpoints" / "a1" / "step-00000200"
        if newer.exists():
            checkpoint.verify(newer)
        checkpoint.discard_unfinished(run_dir, attempt=1)
        assert files(run_dir / "checkpoints" / "a1") <= {"step-00000100", "step-00000200"}
        published = publish(run_dir, step=200, seed=1)  # the next try is not in the way of the last one
        checkpoint.verify(run_dir / published.path)
        shutil.rmtree(run_dir)
        crashes += not completed
    assert crashes >= 8  # mkdir, three files, their directory twice, rename, parent


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "manifest.json"])
def test_what_the_disk_does_not_give_back_is_not_published(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file in turn is changed on the disk the moment it has been flushed."""
    older, real = publish(tmp_path, step=100), os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.name == name:
            content = path.read_bytes()
            path.write_bytes(content.replace(b"2", b"3") if name == "manifest.json" else content[:-1] + bytes([content[-1] ^ 1]))

    with monkeypatch.context() as lying:
        lying.setattr(os, "fsync", fsync)
        with pytest.raises(CheckpointBroken, match=name):
            publish(tmp_path, step=200, seed=1)
    assert files(tmp_path / "checkpoints" / "a1") == {"step-00000100"}
    checkpoint.verify(tmp_path / older.path)
    checkpoint.verify(tmp_path / publish(tmp_path, step=200, seed=1).path)


def test_the_manifest_is_of_what_was_handed_over_not_of_what_was_found(tmp_path: Path) -> None:
    published = publish(tmp_path)
    for name, entry in published.manifest.files.items():
        content = (tmp_path / published.path / name).read_bytes()
        assert (entry.bytes, entry.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_a_broken_one_of_the_same_step_makes_room_for_the_next(tmp_path: Path) -> None:
    path = tmp_path / publish(tmp_path).path / "state.pt"
    path.write_bytes(path.read_bytes()[:-1])
    checkpoint.verify(tmp_path / publish(tmp_path, seed=1).path)


def test_starting_cleans_up_after_its_own_attempt_only(tmp_path: Path) -> None:
    leftovers = [checkpoint.attempt_dir(tmp_path, attempt) / ".unfinished-step-00000009" for attempt in (1, 2)]
    for path in leftovers:
        path.mkdir(parents=True)
    checkpoint.discard_unfinished(tmp_path, attempt=2)
    assert [path.exists() for path in leftovers] == [True, False]


@pytest.mark.parametrize("room", [0, 300, 600, 1500])
def test_no_room_is_said_and_leaves_nothing(room: int, tmp_path: Path) -> None:
    """A real limit on file sizes, in a process of its own: writes fail at different files, as on a full disk."""

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        with pytest.raises(StorageFull, match="delete old runs"):
            publish(tmp_path)

    assert in_a_fork(work) == 0
    assert files(tmp_path / "checkpoints" / "a1") == set()


def test_a_checkpoint_larger_than_the_disk_is_not_begun(tmp_path: Path) -> None:
    vast = torch.zeros(1).expand(2**60)  # one number, seen as an exabyte
    with pytest.raises(StorageFull, match="bytes free"):
        checkpoint.publish(tmp_path, attempt=1, step=1, epoch=0, weights={"vast": vast}, state={})
