"""Held-out analysis: torchmetrics and scikit-learn are the oracles, on the answers of a network that only hands its input on."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torch import Tensor, nn
from torchmetrics.classification import MulticlassCalibrationError

from powergrad import results
from powergrad.results import Results, analyse

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
    paths = results.write(found, tmp_path / "new")
    assert [path.name for path in paths] == ["confusion.json", "per_class.csv", "mistakes.json"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(path.name for path in paths), "nothing unfinished is left"
    written = json.loads(paths[0].read_text())
    assert written["matrix"] == found.confusion.to_dense().tolist()
    mistakes = json.loads(paths[2].read_text())["mistakes"]
    assert [mistake["index"] for mistake in mistakes] == [mistake.index for mistake in found.worst]


def test_many_classes_are_written_as_their_mistakes(tmp_path: Path) -> None:
    classes = results.DENSE_CLASSES + 1
    found = analysed(answers(1000, classes), classes)
    written = json.loads(results.write(found, tmp_path)[0].read_text())
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
    rows = list(csv.DictReader((results.write(found, tmp_path)[1]).read_text().splitlines()))
    assert [row["class"] for row in rows] == ["'=1+1", "'+x", "'-x", "'@x", 'a "b", c']
    assert [int(row["support"]) for row in rows] == found.support.tolist()
    assert float(rows[0]["recall"]) == pytest.approx(float(found.recall[0]), abs=1e-6)


def test_an_undefined_score_is_an_empty_cell(tmp_path: Path) -> None:
    found = analysed([(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))], 2)
    rows = list(csv.DictReader((results.write(found, tmp_path)[1]).read_text().splitlines()))
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
    results.write(analysed(batches, classes), tmp_path)
    assert peak_mib() - before < 200
