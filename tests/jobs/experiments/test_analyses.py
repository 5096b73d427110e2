"""When an experiment is analysed: one at a time, not too often, always at the end; and what becomes of the answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sqlalchemy import select

from powergrad.jobs import debts, tasks
from powergrad.jobs import lifecycle as job_moves
from powergrad.jobs.artifacts import Artifacts
from powergrad.jobs.errors import ArtifactNotFound, ReportNotReady
from powergrad.jobs.experiments import analyses, lifecycle, queries
from powergrad.jobs.store import Store
from powergrad.jobs.sweeper import advance_experiments, free
from powergrad.jobs.tables import deletions
from powergrad.jobs.tables import tasks as task_rows
from tests.jobs import builders as b
from tests.jobs.experiments import builders as e
from tests.stores import FakeClock


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    return Artifacts(str(tmp_path / "artifacts"))


def look(store: Store, artifacts: Artifacts) -> int:
    """One round: news, and what was asked for; how many analyses were handed over."""
    return e.hand_over(store, artifacts, e.advance(store))


def owed(store: Store) -> set[str]:
    with store.read() as tx:
        return {row.path for row in tx.all(select(deletions.c.path).where(debts.due(tx)))}


def test_an_experiment_ends_with_findings_and_a_report(store: Store, artifacts: Artifacts) -> None:
    experiment_id = e.submit(store, seeds=3)
    with store.read() as tx, pytest.raises(ReportNotReady):
        queries.file(tx, experiment_id, "report.html")
    e.train_all(store)
    rings: list[str] = []
    advance_experiments(store, artifacts, lambda: rings.append("ring"))
    assert rings == ["ring"]
    assert e.get(store, experiment_id)["analysis"] == {"state": "running", "error": None}
    assert e.do_tasks(store, artifacts.root()) == ["experiment"]
    e.advance(store)
    shown = e.get(store, experiment_id)
    assert shown["analysis"] == {"state": "current", "error": None}
    assert [arm["mean"] for arm in shown["arms"]] == pytest.approx([0.8, 0.9])
    assert shown["arms"][1]["difference"]["mean"] == pytest.approx(0.1)
    assert (shown["best"], shown["baseline"]) == (1, 0)
    assert shown["verdict"]
    assert shown["files"] == ["plot.png", "plot.svg", "report.html", "report.json", "report.md", "runs.csv"]
    with store.read() as tx:
        found = queries.file(tx, experiment_id, "report.json")
        with pytest.raises(ArtifactNotFound):
            queries.file(tx, experiment_id, "report.pdf")
    assert artifacts.size(found.path) == found.bytes
    assert found.path.startswith(f"experiments/{experiment_id}/")
    report = json.loads(artifacts.local_path(found.path).read_bytes())
    assert report["evidence"]["provenance"]["analysed_with"].keys() == {"powergrad", "scipy", "numpy", "matplotlib"}
    assert report["evidence"]["provenance"]["ran_on"]["cpu_threads"] == 2


def _task(store: Store, experiment_id: str) -> str:
    from powergrad.jobs.experiments import records

    with store.read() as tx:
        return str(records.find(tx, experiment_id).row.task_id)


def test_while_one_is_under_way_there_is_no_second(store: Store, artifacts: Artifacts, clock: FakeClock) -> None:
    e.submit(store)
    e.train(store, b.claimed(store))
    assert look(store, artifacts) == 1
    clock.advance(60)
    e.train(store, b.claimed(store))
    assert look(store, artifacts) == 0
    e.do_tasks(store, artifacts.root())
    assert look(store, artifacts) == 1  # the evidence has changed since


def test_quick_runs_are_not_analysed_each(store: Store, artifacts: Artifacts, clock: FakeClock) -> None:
    experiment_id = e.submit(store, seeds=10)
    handed_over = 0
    for _ in range(19):
        e.train(store, b.claimed(store))
        handed_over += look(store, artifacts)
        e.do_tasks_quickly(store)
        clock.advance(0.5)
    assert 1 <= handed_over <= 3  # in ten seconds
    e.train(store, b.claimed(store))
    assert look(store, artifacts) == 1  # the last one does not wait
    assert e.get(store, experiment_id)["analysis"]["state"] == "running"


def test_an_idle_experiment_is_analysed_once(store: Store, artifacts: Artifacts, clock: FakeClock) -> None:
    e.submit(store)
    e.train(store, b.claimed(store))
    handed_over = 0
    for _ in range(10):
        handed_over += look(store, artifacts)
        e.do_tasks_quickly(store)
        clock.advance(30)
    assert handed_over == 1


def test_a_failed_analysis_is_tried_again_a_few_times_and_its_error_is_shown(store: Store, artifacts: Artifacts, clock: FakeClock) -> None:
    experiment_id = e.submit(store)
    e.train(store, b.claimed(store))
    tries = 0
    for _ in range(40):
        handed_over = look(store, artifacts)
        tries += handed_over
        if handed_over:
            b.do(store, tasks.fail, b.do(store, tasks.claim, lease_s=60.0), "crashed", "no font")
        clock.advance(analyses.RETRY_MS / 1000)
    assert tries == analyses.MOST_TRIES
    assert e.get(store, experiment_id)["analysis"] == {"state": "failed", "error": {"code": "crashed", "detail": "no font"}}
    e.train(store, b.claimed(store))
    assert look(store, artifacts) == 1  # other evidence, another chance


def test_an_analysis_that_was_never_handed_over_is_asked_for_again(store: Store, artifacts: Artifacts, clock: FakeClock) -> None:
    experiment_id = e.submit(store)
    e.train(store, b.claimed(store))
    (asked,) = [one.asked for one in e.advance(store) if one.asked is not None]
    clock.advance(analyses.LOST_MS / 1000 - 1)
    assert look(store, artifacts) == 0
    clock.advance(1)
    assert look(store, artifacts) == 1
    assert not analyses.hand_over(store, artifacts, asked)  # who was asked first comes too late
    assert _task(store, experiment_id) != asked.task_id
    assert f"tasks/{asked.task_id}" in owed(store)


def test_evidence_that_was_given_up_before_it_was_handed_over_is_asked_for_again(
    store: Store, artifacts: Artifacts, clock: FakeClock
) -> None:
    experiment_id = e.submit(store)
    e.train(store, b.claimed(store))
    (asked,) = [one.asked for one in e.advance(store) if one.asked is not None]
    clock.advance(analyses.LOST_MS / 1000 + 1)  # so long that its directory may have been freed
    assert not analyses.hand_over(store, artifacts, asked)
    assert e.get(store, experiment_id)["analysis"]["state"] == "none"


def test_the_report_before_is_freed_and_the_newest_stays(store: Store, artifacts: Artifacts, clock: FakeClock) -> None:
    experiment_id = e.submit(store)
    e.train(store, b.claimed(store))
    look(store, artifacts)
    e.do_tasks(store, artifacts.root())
    with store.read() as tx:
        first = queries.file(tx, experiment_id, "report.md").path
    e.train_all(store)
    look(store, artifacts)
    e.do_tasks(store, artifacts.root())
    with store.read() as tx:
        second = queries.file(tx, experiment_id, "report.md").path
    free(store, artifacts, sorted(owed(store)))
    assert artifacts.size(first) is None
    assert artifacts.size(second)
    with store.read() as tx:
        assert tx.one(select(task_rows.c.id)) is not None
    assert not list((artifacts.root() / "tasks").iterdir())


def test_an_answer_for_a_deleted_experiment_leaves_nothing(store: Store, artifacts: Artifacts) -> None:
    experiment_id = e.submit(store)
    e.train_all(store)
    assert look(store, artifacts) == 1
    b.do(store, lifecycle.remove, experiment_id)
    free(store, artifacts, sorted(owed(store)))
    e.do_tasks(store, artifacts.root())
    free(store, artifacts, sorted(owed(store)))
    assert not (artifacts.root() / "experiments" / experiment_id).exists()


def test_a_new_name_is_in_a_new_report(store: Store, artifacts: Artifacts, clock: FakeClock) -> None:
    experiment_id = e.submit(store)
    e.train(store, b.claimed(store))
    look(store, artifacts)
    e.do_tasks(store, artifacts.root())
    b.do(store, lifecycle.amend, experiment_id, name="renamed")
    clock.advance(analyses.INTERVAL_MS / 1000)
    look(store, artifacts)
    e.do_tasks(store, artifacts.root())
    with store.read() as tx:
        path = queries.file(tx, experiment_id, "report.md").path
    assert "renamed" in artifacts.local_path(path).read_text()


def test_deleting_jobs_does_not_change_what_was_found(store: Store, artifacts: Artifacts, clock: FakeClock) -> None:
    experiment_id = e.submit(store)
    while e.train_all(store, most=1):
        pass
    look(store, artifacts)
    e.do_tasks(store, artifacts.root())
    e.advance(store)
    before = e.get(store, experiment_id)
    for run in e.runs(store, experiment_id):
        b.do(store, job_moves.remove, run.job_id)
    clock.advance(60)
    assert look(store, artifacts) == 0
    assert e.get(store, experiment_id)["arms"] == before["arms"]


def test_evidence_has_final_values_curves_seconds_and_what_it_ran_on(store: Store) -> None:
    experiment_id = e.submit(store)
    e.settle(store)
    with store.read() as tx:
        run = queries.evidence(tx, experiment_id)["runs"][0]
    assert run["final"]["val_top1"] == 0.8
    assert [moment["value"] for moment in run["curve"]] == [0.4, 0.8]
    assert [moment["epoch"] for moment in run["curve"]] == [1.0, 2.0]
    # 10 steps of 128 images at the 100 images a second that the builder's trainer tells
    assert [moment["seconds"] for moment in run["curve"]] == [12.8, 25.6]


def test_live_runs_show_how_far_they_are(store: Store) -> None:
    experiment_id = e.submit(store)
    run = b.claimed(store).run
    b.record(store, run, b.plan(epochs=2), b.step(10), b.evaluation(10, 0.3))
    with store.read() as tx:
        found = queries.evidence(tx, experiment_id)["runs"]
    assert [(one["state"], len(one["curve"])) for one in found] == [("running", 1), ("queued", 0), ("queued", 0), ("queued", 0)]
    shown = e.get(store, experiment_id)["progress"]
    assert (shown["fraction"], shown["runs_done"], shown["runs"]) == (0.125, 0, 4)
