"""The pictures: each figure where there is data for it, the values that were given, the same bytes twice, nothing left in matplotlib."""

from __future__ import annotations

import math
import struct
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from powergrad import pictures
from powergrad.drawing import DPI, VERMILLION, WIDTH_IN
from powergrad.pictures import MOST_COLUMNS, Metrics, draw
from powergrad.telemetry import ZERO_NORM, Filters, Gradients, History

STEPS_PER_EPOCH = 20


def history(*, epochs: int = 4, looks: int = 8, layers: int = 3, filters: int = 6, zeroed: int = 0) -> History:
    """A run whose first layer loses `zeroed` filters in its last epoch."""

    def norms(layer: int, epoch: int) -> list[float]:
        dead = zeroed if layer == 0 and epoch == epochs else 0
        return [0.0 if unit < dead else 0.1 * (unit + 1) * (layer + 1) + 0.01 * epoch for unit in range(filters)]

    return History(
        gradients=tuple(
            Gradients(look * 10, {f"conv{layer}.{part}": (layer + 1) / look for layer in range(layers) for part in ("weight", "bias")})
            for look in range(1, looks + 1)
        ),
        filters=tuple(
            Filters(epoch * STEPS_PER_EPOCH, epoch, {f"conv{layer}": norms(layer, epoch) for layer in range(layers)})
            for epoch in range(1, epochs + 1)
        ),
    )


def points(*values: float, every: int = STEPS_PER_EPOCH) -> list[tuple[int, float]]:
    return [(every * (number + 1), value) for number, value in enumerate(values)]


METRICS: Metrics = {
    "train_loss": points(2.0, 1.5, 1.2, 1.0),
    "val_loss": points(2.1, 1.6, 1.4, 1.3),
    "train_top1": points(0.3, 0.5, 0.6, 0.7),
    "val_top1": points(0.25, 0.45, 0.5, 0.55),
    "val_logit_norm": points(3.0, 4.0, 5.0, 6.0),
    "val_logit_mean_abs": points(0.1, 0.2, 0.2, 0.3),
    "val_logit_max_abs": points(2.0, 3.0, 4.0, 5.0),
    "val_logit_var": points(1.0, 2.0, 3.0, 4.0),
    "grad_norm": points(5.0, 4.0, 3.0, 2.0),
    "grad_true_share": points(0.9, 0.8, 0.7, 0.7),
    "grad_cosine": points(1.0, 0.9, 0.9, 0.8),
    "grad_gain": points(1.0, 1.1, 1.2, 1.3),
}
ALL = ["filters", "gradients", "logit-norm", "logits", "training"]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """The figures that are drawn, by name, beside their files."""
    drawn: dict[str, Figure] = {}
    save = Figure.savefig

    def keep(figure: Figure, path: Path, **how: object) -> None:
        drawn[path.stem] = figure
        save(figure, path, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(Figure, "savefig", keep)
    return drawn


def names(paths: list[Path], suffix: str = ".png") -> list[str]:
    return sorted(path.stem for path in paths if path.suffix == suffix)


def test_each_figure_is_an_svg_and_a_png_of_800_pixels(tmp_path: Path) -> None:
    paths = draw(history(zeroed=2), METRICS, tmp_path / "pictures", title="run <7> & more")
    assert names(paths, ".svg") == names(paths, ".png") == ALL
    assert sorted(paths) == sorted((tmp_path / "pictures").iterdir())
    for path in paths:
        if path.suffix == ".png":
            signature, width = struct.unpack(">8s8xI", path.read_bytes()[:20])
            assert (signature, width) == (b"\x89PNG\r\n\x1a\n", 800)
        else:
            text = "".join(ET.parse(path).getroot().itertext())
            assert "run <7> & more: " in text


def test_equal_runs_have_equal_pictures(tmp_path: Path) -> None:
    first, second = (draw(history(layers=1), METRICS, tmp_path / side, title="run") for side in ("first", "second"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


@pytest.mark.parametrize(
    ("metrics", "drawn"),
    [
        ([], []),
        (["val_loss"], ["training"]),
        (["lr", "train_loss"], ["training"]),
        (["val_logit_norm"], ["logits"]),
        (["val_logit_norm", "val_loss"], ["logit-norm", "logits", "training"]),
        (["grad_cosine"], ["gradients"]),
    ],
)
def test_what_there_is_no_data_for_is_left_out(tmp_path: Path, metrics: list[str], drawn: list[str]) -> None:
    some = {name: METRICS.get(name, points(1.0)) for name in metrics}
    assert names(draw(History(), some, tmp_path, title="")) == drawn


def test_a_history_alone_gives_the_pictures_of_layers(tmp_path: Path) -> None:
    assert names(draw(history(), {}, tmp_path, title="")) == ["filters", "gradients"]


def test_a_run_of_one_look_and_one_epoch_can_be_drawn(tmp_path: Path) -> None:
    single = {name: values[:1] for name, values in METRICS.items()}
    assert names(draw(history(epochs=1, looks=1, layers=1, filters=1), single, tmp_path, title="")) == ALL


def test_values_that_are_not_finite_are_passed_over(tmp_path: Path, figures: dict[str, Figure]) -> None:
    broken = {"train_loss": points(2.0, math.nan, math.inf, 1.0), "val_loss": points(math.nan)}
    assert names(draw(History(), broken, tmp_path, title="")) == ["training"]
    (axes,) = figures["training"].axes
    (line,) = axes.get_lines()
    assert np.asarray(line.get_ydata()).tolist() == [2.0, 1.0]


def test_curves_lie_over_epochs_where_the_history_tells_them_else_over_steps(tmp_path: Path, figures: dict[str, Figure]) -> None:
    accuracies = {name: METRICS[name] for name in ("train_top1", "val_top1")}
    for given, label, places in ((history(layers=1), "epoch", [1.0, 2.0, 3.0, 4.0]), (History(), "step", [20.0, 40.0, 60.0, 80.0])):
        draw(given, accuracies, tmp_path, title="")
        accuracy = figures["training"].axes[0]
        train, held_out = accuracy.get_lines()
        assert accuracy.get_xlabel() == label
        assert np.asarray(train.get_xdata()).tolist() == places
        assert np.asarray(train.get_ydata()).tolist() == [0.3, 0.5, 0.6, 0.7]
        assert np.asarray(held_out.get_ydata()).tolist() == [0.25, 0.45, 0.5, 0.55]


def test_a_value_far_above_the_rest_makes_the_axis_logarithmic(tmp_path: Path, figures: dict[str, Figure]) -> None:
    draw(History(), {"val_loss": points(1000.0, 2.0, 1.5, 1.2)}, tmp_path, title="")
    assert figures["training"].axes[0].get_yscale() == "log"
    draw(History(), {"val_loss": points(3.0, 2.0, 1.5, 0.0)}, tmp_path, title="")
    assert figures["training"].axes[0].get_yscale() == "linear"


def mesh_of(figure: Figure, title: str) -> QuadMesh:
    (axes,) = (axes for axes in figure.axes if axes.get_title().startswith(title))
    (mesh,) = (artist for artist in axes.get_children() if isinstance(artist, QuadMesh))
    return mesh


def test_a_layers_gradient_is_that_of_all_its_parameters(tmp_path: Path, figures: dict[str, Figure]) -> None:
    draw(history(looks=4, layers=2), {}, tmp_path, title="")
    drawn = np.asarray(mesh_of(figures["gradients"], "gradient norm").get_array())
    expected = [[math.hypot((layer + 1) / look, (layer + 1) / look) for look in range(1, 5)] for layer in range(2)]
    assert drawn == pytest.approx(np.asarray(expected))


def test_many_looks_are_thinned_out(tmp_path: Path, figures: dict[str, Figure]) -> None:
    draw(history(looks=MOST_COLUMNS * 3 + 1, layers=1), {}, tmp_path, title="")
    layers, columns = np.asarray(mesh_of(figures["gradients"], "gradient norm").get_array()).shape
    assert layers == 1
    assert MOST_COLUMNS / 2 < columns <= MOST_COLUMNS


def test_zeroed_filters_are_marked_and_counted(tmp_path: Path, figures: dict[str, Figure]) -> None:
    draw(history(zeroed=2), {}, tmp_path, title="")
    figure = figures["filters"]
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == [
        "conv0\n2 of 6 zeroed",
        "conv1\n6 filters",
        "conv2\n6 filters",
    ]
    mesh = mesh_of(figure, "conv0")
    colours = mesh.to_rgba(np.asarray(mesh.get_array()))  # (filters, epochs, RGBA), the largest at the end on top
    marked = np.all(np.isclose(colours, mpl.colors.to_rgba(VERMILLION)), axis=2)
    assert marked.tolist() == [[False] * 4] * 4 + [[False, False, False, True]] * 2


def test_a_filter_just_above_the_threshold_is_not_marked(tmp_path: Path, figures: dict[str, Figure]) -> None:
    kept = History(filters=(Filters(10, 1, {"conv": [1.0, ZERO_NORM, ZERO_NORM * 0.99]}),))
    draw(kept, {}, tmp_path, title="")
    mesh = mesh_of(figures["filters"], "conv\n1 of 3 zeroed")
    colours = mesh.to_rgba(np.asarray(mesh.get_array()))
    assert np.all(np.isclose(colours, mpl.colors.to_rgba(VERMILLION)), axis=2).tolist() == [[False], [False], [True]]


def test_a_network_all_of_whose_filters_are_zeroed_can_be_drawn(tmp_path: Path, figures: dict[str, Figure]) -> None:
    draw(History(filters=(Filters(10, 1, {"conv": [0.0, 0.0]}),)), {}, tmp_path, title="")
    assert mesh_of(figures["filters"], "conv\n2 of 2 zeroed")


def test_of_many_layers_those_with_zeroed_filters_are_shown(
    tmp_path: Path, figures: dict[str, Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "MOST_LAYERS", 8)
    layers = {f"conv{number}": [1.0, 0.0 if number % 30 == 17 else 1.0] for number in range(120)}
    draw(History(filters=(Filters(10, 1, layers),)), {}, tmp_path, title="")
    shown = [axes.get_title() for axes in figures["filters"].axes if axes.get_title()]
    assert len(shown) == 8
    assert [title for title in shown if "zeroed" in title] == [f"conv{number}\n1 of 2 zeroed" for number in (17, 47, 77, 107)]
    numbers = [int(title.split("\n")[0].removeprefix("conv")) for title in shown]
    assert numbers == sorted(numbers)
    assert "8 of 120 layers" in figures["filters"].get_suptitle()


def test_drawing_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    draw(History(), {"val_loss": METRICS["val_loss"]}, tmp_path, title="")
    assert dict(mpl.rcParams) == before
    assert WIDTH_IN * DPI == 800
