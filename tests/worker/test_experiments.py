"""Experiments in a real worker: trained in its slots, advanced by its sweeper, analysed in its children."""

from __future__ import annotations

import json
from typing import Any

from powergrad.jobs.experiments import lifecycle, plan, queries
from tests.worker.conftest import Place

SPEC = {"data": {"dataset": "digits", "image_size": 8}, "model": {"name": "resnet8"}, "epochs": 2, "resources": {"cpu_threads": 1}}


def submit(place: Place, **asked: Any) -> str:
    with place.store.write() as tx:
        return lifecycle.submit(tx, lifecycle.NewExperiment(plan.parse({"spec": SPEC, **asked}))).experiment_id


def ended(place: Place, experiment_id: str) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        with place.store.read() as tx:
            shown = queries.get(tx, experiment_id)
        return shown if shown["finished_at"] and shown["analysis"]["state"] in ("current", "failed") else None

    found: dict[str, Any] = place.until(look, within_s=180.0)
    return found


def test_a_tuned_question_is_answered_with_a_report(place: Place) -> None:
    grid, tune = {"loss.alpha": [1.0, 0.3]}, {"optimizer.lr": [0.02, 0.05]}
    shown = ended(place, submit(place, grid=grid, tune=tune, seeds=2))
    assert (shown["state"], shown["counts"], shown["analysis"]) == ("succeeded", {"succeeded": 8}, {"state": "current", "error": None})
    assert [arm["n"] for arm in shown["arms"]] == [2, 2]
    assert all(arm["tuned"]["optimizer.lr"] in (0.02, 0.05) for arm in shown["arms"])
    with place.store.read() as tx:
        file = queries.file(tx, shown["id"], "report.json")
    report = json.loads((place.service.settings.data_dir / file.path).read_bytes())
    assert report["findings"]["verdict"] == shown["verdict"]
    curves = [run["curve"] for run in report["evidence"]["runs"]]
    assert all([moment["epoch"] for moment in curve] == [1.0, 2.0] for curve in curves)
    assert all(0 < curve[0]["seconds"] < curve[1]["seconds"] for curve in curves)


def test_a_search_halves_and_its_losers_keep_their_checkpoints(place: Place) -> None:
    space = {"optimizer.lr": {"low": 0.001, "high": 0.2, "log": True}}
    shown = ended(place, submit(place, strategy="asha", space=space, search={"trials": 4, "reduction": 2}))
    assert shown["state"] == "succeeded"
    assert shown["counts"]["succeeded"] >= 1
    assert shown["counts"]["succeeded"] + shown["counts"]["paused"] == 4
    assert shown["counts"]["paused"] >= 1
