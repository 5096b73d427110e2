"""Held-out analysis: torchmetrics and scikit-learn are the oracles, on the answers of a network that only hands its input on."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torch import Tensor, nn
from torchmetrics.classification import MulticlassCalibrationError

from powergrad import results
from powergrad.data.decode import decode
from powergrad.data.folders import class_folders
from powergrad.data.images import Pixels, ResidentImages, Split
from powergrad.results import Gallery, Mistake, Results, analyse, gallery
from tests.data.folders import class_folder

CPU = torch.device("cpu")
NO_AUTOCAST = torch.autocast("cpu", dtype=torch.bfloat16, enabled=False)
ATOL = 1e-6  # float32 probabilities


def answers(images: int, classes: int, *, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Logits as images, right more often than not, in batches of 64."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=generator)
    logits = torch.randn(images, classes, generator=generator)
    logits[torch.arange(images), labels] += 2.0
    return list(zip(torch.split(logits, 64), torch.split(labels, 64), strict=True))


def analysed(batches: list[tuple[Tensor, Tensor]], classes: int, *, worst: int = results.WORST) -> Results:
    names = [f"class {i}" for i in range(classes)]
    return analyse(nn.Identity(), batches, class_names=names, device=CPU, autocast=NO_AUTOCAST, worst=worst)


def joined(batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([logits for logits, _ in batches]), torch.cat([labels for _, labels in batches])


def test_counts_and_scores_are_those_of_scikit_learn() -> None:
    batches = answers(500, 7)
    logits, labels = joined(batches)
    predictions = logits.argmax(dim=1)
    found = analysed(batches, 7)

    assert found.confusion.to_dense().tolist() == confusion_matrix(labels, predictions).tolist()
    precision, recall, f1, support = precision_recall_fscore_support(labels, predictions)
    for ours, theirs in ((found.precision, precision), (found.recall, recall), (found.f1, f1), (found.support, support)):
        torch.testing.assert_close(ours.double(), torch.as_tensor(theirs).double(), atol=1e-12, rtol=0)


def test_calibration_is_that_of_torchmetrics() -> None:
    batches = answers(500, 7)
    logits, labels = joined(batches)
    oracle = MulticlassCalibrationError(7, n_bins=15, norm="l1")
    assert analysed(batches, 7).ece == pytest.approx(float(oracle(logits.softmax(dim=1), labels)), abs=ATOL)


def test_the_worst_mistakes_are_the_most_confident_ones() -> None:
    batches = answers(300, 5)
    logits, labels = joined(batches)
    confidence, prediction = logits.softmax(dim=1).max(dim=1)
    wrong = [i for i in range(300) if prediction[i] != labels[i]]
    expected = sorted(wrong, key=lambda i: (-float(confidence[i]), i))[:10]

    worst = analysed(batches, 5, worst=10).worst
    assert [mistake.index for mistake in worst] == expected
    assert [(mistake.truth, mistake.prediction) for mistake in worst] == [(int(labels[i]), int(prediction[i])) for i in expected]
    assert [mistake.probability for mistake in worst] == pytest.approx([float(confidence[i]) for i in expected], abs=ATOL)


def test_a_class_that_is_never_seen_or_never_predicted_has_no_score() -> None:
    logits = torch.tensor([[4.0, 0.0, 0.0], [4.0, 0.0, 0.0]])
    found = analysed([(logits, torch.tensor([0, 1]))], 3)
    assert found.recall.tolist()[:2] == [1.0, 0.0]
    assert found.recall.isnan().tolist() == [False, False, True]
    assert found.precision.isnan().tolist() == [False, True, True]
    assert found.f1.isnan().tolist() == [False, False, True]


def test_the_network_computes_in_its_evaluation_mode_and_gets_its_own_back() -> None:
    modes: list[bool] = []

    class Watched(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            modes.append(self.training)
            return images

    model = Watched().train()
    analyse(model, answers(64, 3), class_names=["a", "b", "c"], device=CPU, autocast=NO_AUTOCAST)
    assert modes == [False]
    assert model.training


def test_a_split_without_images_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to analyse"):
        analysed([], 3)


def test_a_diverged_network_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        analysed([(torch.full((2, 3), torch.nan), torch.tensor([0, 1]))], 3)


def test_few_classes_are_written_as_the_whole_matrix(tmp_path: Path) -> None:
    found = analysed(answers(200, 4), 4)
    paths = results.write(found, tmp_path / "new", Gallery({}))
    assert [path.name for path in paths] == ["confusion.json", "per_class.csv", "mistakes.json"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(path.name for path in paths), "nothing unfinished is left"
    written = json.loads(paths[0].read_text())
    assert written["matrix"] == found.confusion.to_dense().tolist()
    mistakes = json.loads(paths[2].read_text())
    assert [mistake["index"] for mistake in mistakes["mistakes"]] == [mistake.index for mistake in found.worst]
    assert mistakes["sprite"] is None


def test_many_classes_are_written_as_their_mistakes(tmp_path: Path) -> None:
    classes = results.DENSE_CLASSES + 1
    found = analysed(answers(1000, classes), classes)
    written = json.loads(results.write(found, tmp_path, Gallery({}))[0].read_text())
    dense = torch.diag(torch.tensor(written["correct"]))
    for truth, prediction, count in written["mistakes"]:
        assert truth != prediction
        dense[truth, prediction] = count
    assert torch.equal(dense, found.confusion.to_dense())
    counts = [count for *_, count in written["mistakes"]]
    assert counts == sorted(counts, reverse=True)


def test_class_names_are_no_formulas_in_a_spreadsheet(tmp_path: Path) -> None:
    names = ("=1+1", "+x", "-x", "@x", 'a "b", c')
    found = analyse(nn.Identity(), answers(100, 5), class_names=names, device=CPU, autocast=NO_AUTOCAST)
    rows = list(csv.DictReader(results.write(found, tmp_path, Gallery({}))[1].read_text().splitlines()))
    assert [row["class"] for row in rows] == ["'=1+1", "'+x", "'-x", "'@x", 'a "b", c']
    assert [int(row["support"]) for row in rows] == found.support.tolist()
    assert float(rows[0]["recall"]) == pytest.approx(float(found.recall[0]), abs=1e-6)


def test_an_undefined_score_is_an_empty_cell(tmp_path: Path) -> None:
    found = analysed([(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))], 2)
    rows = list(csv.DictReader(results.write(found, tmp_path, Gallery({}))[1].read_text().splitlines()))
    assert (rows[1]["precision"], rows[1]["recall"], rows[1]["support"]) == ("", "", "0")


def peak_mib() -> float:
    """Most memory this process has had."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak cannot be reset here")
def test_ten_thousand_classes_fit_in_little_memory(tmp_path: Path) -> None:
    """A dense matrix of them would be 800 MB."""
    classes = 10_000
    batches = answers(128, classes)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: proc(5)
    before = peak_mib()
    results.write(analysed(batches, classes), tmp_path, Gallery({}))
    assert peak_mib() - before < 200


def tiles_of(sprite: Path, count: int) -> list[NDArray[np.uint8]]:
    """(64, 64, 3) each, read by another hand than wrote them."""
    picture = plt.imread(sprite)[..., :3]
    cells = [
        picture[64 * row : 64 * row + 64, 64 * column : 64 * column + 64] for row in range(picture.shape[0] // 64) for column in range(6)
    ]
    return [(255 * cell).round().astype(np.uint8) for cell in cells[:count]]


def test_the_worst_mistakes_are_shown_as_tiles_in_their_order(tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (500, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    batches = answers(500, 7)
    found = analysed(batches, 7)
    split = Split(ResidentImages(pixels), joined(batches)[1])
    paths = {path.name: path for path in results.write(found, tmp_path, gallery(found.worst, split))}
    assert list(paths) == ["confusion.json", "per_class.csv", "mistakes.png", "mistakes.json"]
    written = json.loads(paths["mistakes.json"].read_text())
    assert written["sprite"] == {"file": "mistakes.png", "tile": 64, "columns": 6, "count": 24}
    assert len(written["mistakes"]) > 24
    for mistake, shown in zip(written["mistakes"], tiles_of(paths["mistakes.png"], 24), strict=False):
        assert mistake["path"] is None
        expected = pixels[mistake["index"]].permute(1, 2, 0).numpy().repeat(4, axis=0).repeat(4, axis=1)
        assert np.array_equal(shown, expected)


def test_fewer_mistakes_make_a_smaller_sheet(tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = analysed(answers(20, 7), 7, worst=3)
    results.write(found, tmp_path, gallery(found.worst, Split(ResidentImages(pixels), joined(answers(20, 7))[1])))
    assert json.loads((tmp_path / "mistakes.json").read_text())["sprite"]["count"] == 3
    assert plt.imread(tmp_path / "mistakes.png").shape[:2] == (64, 6 * 64)


def test_images_that_lie_in_files_are_named_and_shown_as_they_are_there(tmp_path: Path) -> None:
    parts = class_folders(".", data_root=class_folder(tmp_path / "set"))
    assert not isinstance(parts.train, Pixels)
    small = ResidentImages(torch.zeros(len(parts.train), 3, 8, 8, dtype=torch.uint8))
    split = Split(small, parts.train.labels, files=parts.train)
    worst = [Mistake(index, truth=0, prediction=1, probability=0.9) for index in (9, 2)]
    made = gallery(worst, split)
    assert made.names == {2: "ant/002.png", 9: "bee/001.png"}
    assert made.sprite is not None
    (tmp_path / "mistakes.png").write_bytes(made.sprite)
    for tile, name in zip(tiles_of(tmp_path / "mistakes.png", 2), ("bee/001.png", "ant/002.png"), strict=True):
        assert np.array_equal(tile, decode(tmp_path / "set" / name, 64).transpose(1, 2, 0))


def test_without_mistakes_there_is_nothing_to_show() -> None:
    split = Split(ResidentImages(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)), torch.zeros(2, dtype=torch.int64))
    assert gallery([], split) == Gallery({})
