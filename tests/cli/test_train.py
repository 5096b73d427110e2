"""`powergrad train`: a run without a server that can be stopped, gone on with, and ends with the same bits."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from powergrad.cli.main import main
from tests.cli.test_stack import until

SPEC = {
    "data": {"dataset": "digits", "image_size": 8, "batch_size": 256, "val_fraction": 0.5},
    "epochs": 2,
    "precision": "fp32",
    "resources": {"gpus": 0, "cpu_threads": 1},
    "checkpoint": {"keep_last": 1, "keep_best": 1},
}


@pytest.fixture
def spec(tmp_path: Path) -> str:
    path = tmp_path / "job.json"
    path.write_text(json.dumps(SPEC))
    return str(path)


def interrupt_when_trained(run_dir: Path, ended: threading.Event) -> threading.Thread:
    """Send this process Ctrl-C as soon as the run has written its first metrics."""

    def watch() -> None:
        while not ended.wait(0.005):
            if (run_dir / "metrics.jsonl").exists() and (run_dir / "metrics.jsonl").stat().st_size > 0:
                os.kill(os.getpid(), signal.SIGINT)
                return

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def points(run_dir: Path) -> list[dict[str, float]]:
    """All points but their speeds, which no two runs share."""
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in point.items() if name != "images_per_s"} for point in found]


def newest_weights(run_dir: Path) -> str:
    newest = max(run_dir.glob("checkpoints/a*/step-*"), key=lambda path: path.name)
    return hashlib.sha256((newest / "model.safetensors").read_bytes()).hexdigest()


def test_a_run_that_was_interrupted_ends_as_one_that_was_not(spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(["train", spec, "--run-dir", str(whole)]) == 0
    printed = Path(capsys.readouterr().out.strip())
    assert printed.name == "model.safetensors"
    assert printed.is_file()

    ended = threading.Event()
    watcher = interrupt_when_trained(broken, ended)
    assert main(["train", spec, "--run-dir", str(broken)]) == 130
    ended.set()
    watcher.join()
    assert "The same command goes on from here" in capsys.readouterr().err
    assert main(["train", spec, "--run-dir", str(broken)]) == 0
    assert "Going on from step-" in capsys.readouterr().err

    assert newest_weights(broken) == newest_weights(whole)
    assert points(broken) == points(whole)
    assert len(list(whole.glob("checkpoints/a1/step-*"))) <= 2, "the newest and the best are kept, as the spec says"


def test_a_run_starts_from_another_runs_weights(spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", spec, "--run-dir", str(tmp_path / "first"), "--set", "epochs=1"]) == 0
    start = Path(capsys.readouterr().out.strip()).parent
    glyphs = ["--set", "data={dataset: glyphs, classes: 12, train_per_class: 20, val_per_class: 2, image_size: 8, batch_size: 64}"]
    arguments = ["train", spec, "--run-dir", str(tmp_path / "second"), "--set", "epochs=1", *glyphs]
    assert main([*arguments, "--init-from", str(start)]) == 0
    assert "the classifier has another size and starts fresh (fc.weight, fc.bias)" in " ".join(capsys.readouterr().err.split())

    assert main([*arguments, "--init-from", str(tmp_path)]) == 1
    assert "manifest.json: missing or not a manifest" in " ".join(capsys.readouterr().err.split())
    assert main(["train", spec, "--run-dir", str(tmp_path / "third"), "--set", f"model.init_from=job_{'0' * 26}"]) == 3
    assert "--init-from" in capsys.readouterr().err


def test_a_directory_of_another_spec_is_refused_with_the_difference(spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run" / "checkpoints" / "a1" / "step-00000004").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text(json.dumps({"spec": {**SPEC, "epochs": 5}, "cpu_threads": 1, "ranks": 1}))
    assert main(["train", spec, "--run-dir", str(tmp_path / "run")]) == 1
    assert "epochs" in capsys.readouterr().err


def test_a_directory_in_use_is_refused(spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["train", spec, "--run-dir", str(tmp_path)]) == 1
    assert "another run is using it" in capsys.readouterr().err


def test_a_bad_spec_is_refused_with_every_violation(spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", spec, "--run-dir", str(tmp_path / "run"), "--set", "loss.alpha=1.4", "--set", "epoch=3"]) == 3
    told = capsys.readouterr().err
    assert "/loss/alpha  must be at most 1" in told
    assert "/epoch  no such field" in told
    assert not (tmp_path / "run").exists()


def test_a_run_that_fails_says_why_and_what_to_try(spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--set", "data={dataset: class_folder, path: nowhere}", "--data-root", str(tmp_path)]
    assert main(["train", spec, "--run-dir", str(tmp_path / "run"), *arguments]) == 1
    told = capsys.readouterr().err
    assert "Failed (data_missing)" in told
    assert "Try: " in told


def test_a_run_that_failed_before_its_first_checkpoint_does_not_bind_its_directory(
    spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    arguments = ["--set", "data={dataset: class_folder, path: nowhere}", "--data-root", str(tmp_path)]
    assert main(["train", spec, "--run-dir", str(run_dir), *arguments]) == 1
    assert main(["train", spec, "--run-dir", str(run_dir), "--set", "epochs=1"]) == 0
    assert json.loads((run_dir / "run.json").read_text())["spec"]["epochs"] == 1


def test_a_device_that_is_none_is_wrong_usage(spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", spec, "--run-dir", str(tmp_path / "run"), "--device", "foo"]) == 64
    assert "--device foo: must be cpu or cuda:0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told(spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", spec, "--run-dir", str(tmp_path / "run"), "--device", "cuda:0"]) == 1
    assert "torch finds no GPU here" in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.json").exists()


def test_an_interrupt_while_torch_is_loading_is_told_in_one_word(spec: str, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "powergrad.cli.main", "train", spec, "--run-dir", str(tmp_path / "run")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "Loading torch …\n"
        maps = Path(f"/proc/{process.pid}/maps")
        until(lambda: "_multiarray_umath" in maps.read_text())  # numpy's, which torch loads early
        process.send_signal(signal.SIGINT)
        told = process.stderr.read()
    assert (process.returncode, told) == (130, "Interrupted.\n")
    assert not (tmp_path / "run" / "run.json").exists()
