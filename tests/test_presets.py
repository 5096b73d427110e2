"""The paper's rows as specs: its figures, the files that hold them, and a step of each."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from powergrad import presets, trainer
from powergrad.jobs.spec import parse
from powergrad.presets import Preset, all_presets, preset
from powergrad.protocol import Done, Message, Step, TrainerConfig
from powergrad.spec import IMAGENET, NORMED_MODELS
from tests.data.folders import class_folder
from tests.training import StopAfter

ROOT = Path(__file__).parents[1]
# rows of the paper's tables that are baselines, and the rows compared with each
BASELINES = {1: [2], 3: [4, 5, 6, 7, 8], 9: [10], 11: [12], 13: [14], 15: [16], 17: [18], 19: [20], 21: [22], 23: [24, 25, 26, 27, 28]}
by_name = pytest.mark.parametrize("one", all_presets(), ids=lambda one: one.name)


def test_there_is_one_for_each_row_of_the_paper() -> None:
    assert [one.row for one in all_presets()] == list(range(1, 29))
    assert len({one.name for one in all_presets()}) == 28


def test_gains_are_differences_to_the_row_of_the_baseline() -> None:
    rows = {one.row: one for one in all_presets()}
    assert {row for row, one in rows.items() if one.gain is None} == BASELINES.keys()
    for baseline, others in BASELINES.items():
        for row in others:
            assert rows[row].gain == pytest.approx(rows[row].val_top1 - rows[baseline].val_top1, abs=1e-9)


def test_a_row_differs_from_its_baseline_in_its_method_alone() -> None:
    rows = {one.row: one.spec for one in all_presets()}
    for baseline, others in BASELINES.items():
        for row in others:
            same = {key: value for key, value in rows[row].items() if key not in {"name", "labels", "loss", "clip"}}
            assert same == {key: value for key, value in rows[baseline].items() if key not in {"name", "labels", "loss", "clip"}}


@by_name
def test_a_dry_run_accepts_it(one: Preset) -> None:
    spec = parse(one.spec, models=NORMED_MODELS, datasets=[IMAGENET])
    assert spec.name == one.name
    assert (spec.epochs, spec.warmup_epochs) == (100, 5)
    assert spec.optimizer.lr == pytest.approx(0.1 * spec.data.batch_size / 256)


@by_name
def test_it_takes_a_real_step_at_reduced_size(one: Preset, tmp_path: Path) -> None:
    """All of it but the number of images, their size, and the processes that share them."""
    for part in ("train", "val"):
        class_folder(tmp_path / "data" / "imagenet" / part, classes=("n01440764", "n01443537", "n01484850"), each=2)
    spec = parse({**one.spec, "precision": "fp32", "data": {**one.spec["data"], "image_size": 16, "batch_size": 4, "workers": 0}})
    config = TrainerConfig(
        run_id="run", attempt=1, spec=spec.training(), run_dir=str(tmp_path), data_root=str(tmp_path / "data"), cpu_threads=1
    )
    messages: list[Message] = []
    end = trainer.run(config, emit=messages.append, orders=StopAfter(1, "now"))
    assert end == Done(outcome="stopped"), end
    (step,) = [message for message in messages if isinstance(message, Step)]
    assert step.metrics["lr"] == pytest.approx(one.spec["schedule"]["warmup_lr"])
    assert step.metrics["train_loss"] is not None


def test_the_files_are_the_presets(tmp_path: Path) -> None:
    written = {path.name: path.read_text() for path in presets.write(tmp_path)}
    assert {path.name: path.read_text() for path in (ROOT / "examples" / "paper").iterdir()} == written, (
        "write them anew: python -m powergrad.presets examples/paper"
    )
    assert [yaml.safe_load(text) for _, text in sorted(written.items())] == [one.spec for one in all_presets()]


def test_an_unknown_name_is_told() -> None:
    assert preset("paper-28-resnet18-nobn-b256-agc-pgt0.25").row == 28
    with pytest.raises(KeyError, match=r"'paper-29': must be one of paper-01-seresnet50-baseline"):
        preset("paper-29")
