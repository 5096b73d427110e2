"""The tutorial notebook runs from top to bottom, in a kernel of its own, against a real server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from powergrad.cli.stack import Stack
from powergrad.client import Client

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples" / "notebooks").glob("*.ipynb"))
FIRST_STEPS = next(path for path in NOTEBOOKS if path.stem == "first_steps")
CELL_S = 150


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]


@pytest.fixture
def executed(here: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a notebook in an empty folder, its kernel's files kept out of the home; the notebook with its outputs."""
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR", "MPLCONFIGDIR"):
        (here / name.lower()).mkdir()
        monkeypatch.setenv(name, str(here / name.lower()))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(path: Path) -> Any:
        notebook = read(path)
        NotebookClient(notebook, timeout=CELL_S, kernel_name="python3", resources={"metadata": {"path": str(here)}}).execute()
        return notebook

    return run


def shown(notebook: Any, kind: str) -> str:
    """Everything of one media type that the cells put out, or printed (`text/plain` of a stream)."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "\n".join(
        output["data"][kind] if "data" in output else output["text"]
        for output in outputs
        if kind in output.get("data", {}) or kind == "stream" == output["output_type"]
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_output_is_kept_in_the_repository(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    assert [cell.id for cell in notebook.cells if cell.cell_type == "code" and (cell.outputs or cell.execution_count)] == []


@pytest.mark.timeout(2 * CELL_S)
def test_first_steps_train_watch_plot_and_ask(executed: Any, live: Stack, client: Client) -> None:
    notebook = executed(FIRST_STEPS)
    assert shown(notebook, "stream").count("validation top-1") == 4, "an evaluation an epoch"
    html = shown(notebook, "text/html")
    assert "succeeded" in html
    assert "rows × 4 columns" in html
    assert shown(notebook, "image/png").count("iVBOR") == 1
    (asked,) = [one for one in client.experiments() if one.name == "alpha-on-digits"]
    assert asked.state == "succeeded"
    assert asked.verdict
    assert asked.verdict in shown(notebook, "text/plain")
    assert live.url in shown(notebook, "text/plain"), "it connected, and started no server of its own"


@pytest.mark.long
@pytest.mark.timeout(4 * CELL_S)
def test_first_steps_start_a_server_where_there_is_none(executed: Any, monkeypatch: pytest.MonkeyPatch, live: Stack) -> None:
    monkeypatch.delenv("POWERGRAD_URL")
    notebook = executed(FIRST_STEPS)
    assert live.url not in shown(notebook, "text/plain")
    assert "succeeded" in shown(notebook, "text/html")
