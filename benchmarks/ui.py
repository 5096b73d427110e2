"""The dashboard in a real Chromium: how soon a job's curves are there, and how quick a page with 200 runs answers a hand.

    python -m benchmarks.ui [--rounds 7] [--points 100000] [--runs 200] [--steps 10000] [--quick] [--json] [--save]

One embedded stack on a temporary directory. First curve: a job with five series of so many points; from the start of the navigation, and
from the moment the page's document is there (DOMContentLoaded), to the first drawn curve. The same series in TensorBoard, read from an event
file by its own server, is the peer, and MLflow's (its tracking server on SQLite) where the package is installed; a page of theirs counts as
drawn as soon as the first chart has a line, as ours. Compare: so many runs in one overlay; the time from an input to
the next picture: hovering, switching runs off and on, smoothing, zooming. Exit code 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from benchmarks import report
from benchmarks.report import Neighbours, Origin, Spread
from benchmarks.service import READY_S, BenchmarkError
from powergrad.cli.stack import Stack
from powergrad.client import Client
from powergrad.jobs import metrics
from powergrad.jobs.store import Store

PACKAGES = ("playwright", "tensorboard", "uvicorn", "sqlalchemy")
SERIES = ("train_loss", "train_top1", "val_loss", "val_top1", "lr")
BARS = {"first_curve_ms": 300.0, "interaction_p95_ms": 200.0}
PATIENCE_MS = 120_000
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
             "--disable-sync"]  # fmt: skip
DRAWN = "figure [data-drawn] canvas"
TENSORBOARD_DRAWN = "scalar-card-line-chart canvas, scalar-card line-chart canvas, .chart canvas"
MLFLOW_DRAWN = ".js-plotly-plot .trace path"
# from the event itself, its wait in the queue included, to the end of the frame that shows what it did
TIMING = """
window.inputs = [];
for (const type of ["pointermove", "pointerdown", "pointerup", "keydown", "input", "click", "dblclick"])
  addEventListener(type, event => requestAnimationFrame(() => setTimeout(() => window.inputs.push(performance.now() - event.timeStamp))), true);
"""


class Result(Origin):
    """One run of the benchmark."""

    peer: str
    points: int
    runs: int
    steps: int
    first_curve_ms: Spread
    """From the page's document to the first curve."""
    from_navigation_ms: Spread
    tensorboard_ms: Spread
    """From the navigation."""
    mlflow_ms: Spread | None
    ratio: float
    """TensorBoard's time from the navigation over ours."""
    compare_ms: float
    """From the navigation to the overlay of all runs."""
    interaction: Spread
    """Milliseconds from an input to the end of the frame that follows it."""
    others_share: float


def main() -> None:
    options = _options()
    neighbours = Neighbours()
    with tempfile.TemporaryDirectory(prefix="powergrad-bench-") as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=_chromium(), args=ARGUMENTS)
        result = _measured(browser, Path(folder), options, neighbours)
        browser.close()
    report.deliver(result, _table(result), options)
    missed = result["first_curve_ms"]["median"] > BARS["first_curve_ms"] or result["interaction"]["p95"] > BARS["interaction_p95_ms"]
    sys.exit(1 if missed and not options.quick else 0)


def _measured(browser: Browser, folder: Path, options: argparse.Namespace, neighbours: Neighbours) -> Result:
    curves = _curves(options.points)
    with Stack(folder / "data", port=0, slots=1) as stack, Client(stack.url) as client:
        stack.ready(READY_S)
        store = Store(f"sqlite:///{stack.data_dir / 'powergrad.db'}")
        job = _stored(client, store, ["one"], [curves])[0]
        ours = [_first_curve(browser, f"{stack.url}/jobs/{job}", DRAWN) for _ in range(options.rounds)]
        runs = [{"val_top1": _walk(index, options.steps)} for index in range(options.runs)]
        ids = _stored(client, store, [f"run-{index}" for index in range(options.runs)], runs)
        store.close()
        compare_ms, inputs = _compared(browser, stack.url, ids, rounds=options.rounds)
    with _tensorboard(folder / "events", curves) as url:
        theirs = [_first_curve(browser, f"{url}/?darkMode=false#timeseries", TENSORBOARD_DRAWN) for _ in range(options.rounds)]
    mlflow = None
    if importlib.util.find_spec("mlflow") is not None and not options.quick:
        with _mlflow(folder / "mlflow", curves) as url:
            mlflow = [_first_curve(browser, url, MLFLOW_DRAWN) for _ in range(options.rounds)]
    from_navigation = [first for first, _ in ours]
    return {
        **report.origin("ui", packages=PACKAGES),
        "peer": "TensorBoard, MLflow (tracking server)" if mlflow else "TensorBoard",
        "points": options.points,
        "runs": options.runs,
        "steps": options.steps,
        "first_curve_ms": report.spread([after for _, after in ours]),
        "from_navigation_ms": report.spread(from_navigation),
        "tensorboard_ms": report.spread([first for first, _ in theirs]),
        "mlflow_ms": report.spread([first for first, _ in mlflow]) if mlflow else None,
        "ratio": statistics.median(first for first, _ in theirs) / statistics.median(from_navigation),
        "compare_ms": compare_ms,
        "interaction": report.spread(inputs),
        "others_share": neighbours.share(),
    }


def _chromium() -> str:
    found = next((path for name in CHROMIUM if (path := shutil.which(name))), None)
    if found is None:
        raise SystemExit("no Chromium here: scripts/browser-check installs it")
    return found


def _walk(seed: int, steps: int) -> list[metrics.Point]:
    """A curve as training draws it: a rise that flattens, and noise."""
    draw = random.Random(seed)
    return [(step, 1 - math.exp(-4 * step / steps) * 0.9 + draw.gauss(0, 0.02)) for step in range(1, steps + 1)]


def _curves(points: int) -> dict[str, list[metrics.Point]]:
    return {name: _walk(index, points) for index, name in enumerate(SERIES)}


def _stored(client: Client, store: Store, names: list[str], runs: list[dict[str, list[metrics.Point]]]) -> list[str]:
    """Jobs that have ended, with these series in place of their own; their ids."""
    ids = []
    for name, points in zip(names, runs, strict=True):
        job = client.submit({"name": name, "data": {"dataset": "digits"}, "resources": {"gpus": 0}, "labels": {"bench": "ui"}})
        client.cancel(job.id)
        client.wait(job.id, 60)
        with store.write() as tx:
            metrics.truncate(tx, job.id, -1)
            metrics.append(tx, job.id, points)
        ids.append(job.id)
    return ids


def _first_curve(browser: Browser, url: str, drawn: str) -> tuple[float, float]:
    """Milliseconds from the navigation, and from the document's arrival, to the first chart with a line; in a browser that knows nothing."""
    context = browser.new_context(locale="en-US", viewport={"width": 1280, "height": 900})
    page = context.new_page()
    try:
        page.goto(url, wait_until="commit", timeout=PATIENCE_MS)
        page.wait_for_selector(drawn, state="attached", timeout=PATIENCE_MS)
        # performance.now() counts from the start of the navigation; two frames on, what was drawn is on the screen
        now: float = page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now()))))")
        document: float = page.evaluate("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd")
        return now, max(0.0, now - document)
    finally:
        context.close()


def _compared(browser: Browser, url: str, ids: list[str], *, rounds: int) -> tuple[float, list[float]]:
    """Milliseconds to the overlay of all runs, and of every input to the picture that follows it."""
    context = browser.new_context(locale="en-US", viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.add_init_script(TIMING)
    query = "&".join(f"job={one}" for one in ids)
    page.goto(f"{url}/compare?{query}", wait_until="commit", timeout=PATIENCE_MS)
    page.wait_for_selector(DRAWN, timeout=PATIENCE_MS)
    compare_ms: float = page.evaluate("performance.now()")
    page.evaluate("window.inputs.length = 0")
    for _ in range(rounds):
        _handle(page)
    inputs: list[float] = page.evaluate("new Promise(done => setTimeout(() => done(window.inputs), 500))")
    context.close()
    return compare_ms, inputs


def _handle(page: Page) -> None:
    """Hover, zoom, smooth, switch runs off and on."""
    box = page.locator("figure .u-over").first.bounding_box()
    if box is None:
        raise BenchmarkError("the overlay shows no plot")
    middle = box["y"] + box["height"] / 2
    for part in range(1, 10):
        page.mouse.move(box["x"] + box["width"] * part / 10, middle)
    page.mouse.move(box["x"] + box["width"] * 0.3, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.6, middle)
    page.mouse.up()
    page.mouse.dblclick(box["x"] + box["width"] * 0.5, middle)
    smoothing = page.get_by_role("slider").first
    if smoothing.count():
        smoothing.focus()
        for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "ArrowLeft"):
            page.keyboard.press(key)
    for switch in page.get_by_role("checkbox").all()[:6]:
        switch.click()
        switch.click()


@contextmanager
def _tensorboard(folder: Path, curves: dict[str, list[metrics.Point]]) -> Iterator[str]:
    """TensorBoard's server over one run with these curves, read whole. Yields its address."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "run"), max_queue=1_000_000)
    for name, points in curves.items():
        for step, value in points:
            writer.add_scalar(name, value, step)
    writer.close()
    port = _free_port()
    # its page shows a sample of 1,000 points a series by itself; ours reads all and shows extremes
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", str(port), "--load_fast=false"]
    url = f"http://127.0.0.1:{port}"
    with _server(command, lambda: _has_all(f"{url}/data/plugin/scalars/tags", curves)):
        yield url


def _has_all(url: str, curves: dict[str, list[metrics.Point]]) -> bool:
    import httpx2

    tags = httpx2.get(url, trust_env=False).json().get("run", {})
    return len(tags) == len(curves)


@contextmanager
def _mlflow(folder: Path, curves: dict[str, list[metrics.Point]]) -> Iterator[str]:
    """MLflow's tracking server over one run with these curves. Yields the address of the run's charts."""
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

    folder.mkdir()
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--port", str(port)]
    import httpx2

    with _server(command, lambda: httpx2.get(f"{url}/health", trust_env=False).status_code == 200):
        client = MlflowClient(url)
        run = client.create_run("0")
        for name, points in curves.items():
            for start in range(0, len(points), 1000):
                batch = [Metric(name, value, step, step) for step, value in points[start : start + 1000]]
                client.log_batch(run.info.run_id, batch)
        yield f"{url}/#/experiments/0/runs/{run.info.run_id}/model-metrics"


@contextmanager
def _server(command: list[str], is_ready: Callable[[], bool]) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + READY_S
        while not _answers(is_ready):
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchmarkError(f"{' '.join(command[1:3])} does not answer")
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        process.wait()


def _answers(is_ready: Callable[[], bool]) -> bool:
    import httpx2

    try:
        return is_ready()
    except (httpx2.HTTPError, json.JSONDecodeError):
        return False


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _table(result: Result) -> str:
    first, whole, board, mlflow = result["first_curve_ms"], result["from_navigation_ms"], result["tensorboard_ms"], result["mlflow_ms"]
    lines = [
        report.heading(result),
        f"5 series × {result['points']:,} points, median (p95) of {first['n']}, a browser that knows nothing",
        f"  first curve after the page's document   {first['median']:7.0f} ms ({first['p95']:.0f})   goal <= {BARS['first_curve_ms']:.0f}",
        f"  first curve after the navigation        {whole['median']:7.0f} ms ({whole['p95']:.0f})",
        f"  TensorBoard, after the navigation       {board['median']:7.0f} ms ({board['p95']:.0f})   {result['ratio']:.2f} x ours",
    ]
    if mlflow:
        ratio = mlflow["median"] / whole["median"]
        lines.append(f"  MLflow, after the navigation            {mlflow['median']:7.0f} ms ({mlflow['p95']:.0f})   {ratio:.2f} x ours")
    else:
        lines.append("  MLflow: not measured (not installed, or --quick)")
    hand = result["interaction"]
    lines.append(
        f"{result['runs']} runs × {result['steps']:,} steps in one overlay: drawn {result['compare_ms']:.0f} ms after the navigation"
    )
    lines.append(
        f"  input to the next picture, p95 of {hand['n']}: {hand['p95']:.0f} ms (median {hand['median']:.0f})   goal <= {BARS['interaction_p95_ms']:.0f}"
    )
    lines += report.crowding(result["others_share"])
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ui", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="pages opened of each kind (default 7)")
    parser.add_argument("--points", type=int, default=100_000, help="of each of the five series (default 100000)")
    parser.add_argument("--runs", type=int, default=200, help="in the overlay (default 200)")
    parser.add_argument("--steps", type=int, default=10_000, help="of each run in the overlay (default 10000)")
    parser.add_argument("--quick", action="store_true", help="just enough to show that it works")
    report.add_options(parser)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.points, options.runs, options.steps = 1, 2000, 5, 200
    return options


if __name__ == "__main__":
    main()
