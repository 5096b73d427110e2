"""Experiments through both clients and the command line, against the real service: ask, train, analyse, read, add seeds, delete."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from powergrad.cli import arms, main, questions, specfile
from powergrad.cli.console import Code, Problem
from powergrad.cli.stack import Stack
from powergrad.client import ApiError, AsyncClient, Client, Experiment, ExperimentView
from powergrad.jobs.experiments import plan
from tests.cli.conftest import tiny

Captured = pytest.CaptureFixture[str]
EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "experiments").glob("*.yaml"))
ANSWERED_S = 180.0
ENDLESS = {"epochs": 10_000, "checkpoint": {"every_epochs": 10_000}}


def small(**fields: Any) -> dict[str, Any]:
    """Two arms, two seeds, a few seconds."""
    return {"spec": tiny(model={"name": "resnet8"}), "grid": {"loss.alpha": [1.0, 0.5]}, "seeds": 2, **fields}


def endless(**fields: Any) -> dict[str, Any]:
    return small(spec=tiny(model={"name": "resnet8"}) | ENDLESS, **fields)


@pytest.fixture(scope="session")
def answered(live: Stack) -> ExperimentView:
    """An experiment with its verdict; tests only read it."""
    with Client(live.url) as client:
        return client.ask(small(name="answered")).wait(ANSWERED_S).view


def run(capsys: Captured, *arguments: str) -> tuple[int, str, str]:
    code = main.main(["experiment", *arguments])
    told = capsys.readouterr()
    return code, told.out, told.err


# --- the clients


def test_a_question_is_answered_in_numbers_and_a_sentence(answered: ExperimentView) -> None:
    assert (answered.state, answered.analysis.state) == ("succeeded", "current")
    assert answered.verdict
    assert answered.progress.fraction == 1.0
    baseline, other = answered.arms
    assert (baseline.index, baseline.difference, baseline.n) == (answered.baseline, None, 2)
    assert other.difference is not None
    assert other.difference.n == 2
    assert other.mean is not None
    assert baseline.mean is not None
    assert other.difference.mean == pytest.approx(other.mean - baseline.mean)


def test_the_report_comes_in_every_form_and_verified(client: Client, answered: ExperimentView, tmp_path: Path) -> None:
    experiment = client.experiment(answered.id)
    page = experiment.report("html", tmp_path / "page.html").read_text()
    assert answered.verdict
    assert answered.verdict.partition(" ")[0] in page
    assert "<script" not in page
    assert experiment.report("md", tmp_path).name == f"{answered.id}-report.md"
    assert json.loads(experiment.report("json", tmp_path).read_text())
    assert experiment.report("svg", tmp_path).read_text().lstrip().startswith(("<svg", "<?xml"))
    assert experiment.report("png", tmp_path).read_bytes().startswith(b"\x89PNG")
    assert len(list(csv.reader(io.StringIO(experiment.report("csv", tmp_path).read_text())))) == 5


def test_the_async_client_asks_and_lists_alike(live: Stack, answered: ExperimentView) -> None:
    async def ask() -> tuple[ExperimentView, list[str]]:
        async with AsyncClient(live.url) as client:
            experiment = await client.ask(endless())
            assert [one.view.state async for one in experiment.changes() if await one.cancel()][-1] == "cancelled"
            listed = [one.id async for one in client.experiments(page_size=1)]
            await experiment.delete()
            with pytest.raises(ApiError, match="experiment_not_found"):
                await client.experiment(experiment.id)
            return experiment.view, listed

    view, listed = asyncio.run(ask())
    assert view.id in listed
    assert answered.id in listed
    assert listed == sorted(listed, reverse=True)


def test_seeds_are_added_to_what_has_been_answered(client: Client) -> None:
    experiment = client.ask(small()).wait(ANSWERED_S)
    before = experiment.arms[1].n
    assert experiment.add_seeds(1).wait(ANSWERED_S).arms[1].n == before + 1
    experiment.delete()


def test_the_same_key_asks_once(client: Client) -> None:
    first = client.ask(endless(), idempotency_key="experiments-once")
    assert client.ask(endless(), idempotency_key="experiments-once").id == first.id
    twin = first.pause().clone({"grid.loss.alpha": [1.0, 0.3]}, name="twin")
    assert twin.view.cloned_from == first.id
    assert [arm.settings for arm in twin.arms] == [{"loss.alpha": 1.0}, {"loss.alpha": 0.3}]
    for one in (first, twin):
        one.cancel()


def test_a_plan_costs_nothing(client: Client) -> None:
    before = next(iter(client.experiments()), None)
    assert client.plan(small())["runs"] == 4
    after = next(iter(client.experiments()), None)
    assert (before and before.id) == (after and after.id)


# --- the command line


def test_asking_from_a_job_spec_ends_with_the_verdict(here: Path, capsys: Captured) -> None:
    Path("job.json").write_text(json.dumps(tiny(model={"name": "resnet8"})))
    options = ("--vary", "loss.alpha=1,0.5", "--seeds", "2", "--set", "epochs=2")
    code, out, err = run(capsys, "ask", "job.json", *options, "--dry-run")
    assert code == Code.OK
    assert yaml.safe_load(out)["grid"] == {"loss.alpha": [1, 0.5]}
    assert "2 arms × 2 seeds = 4 runs; in all 8 epochs" in err
    code, out, err = run(capsys, "ask", "job.json", *options, "--wait")
    assert code == Code.OK, err
    assert "α = 0.5" in out
    assert "difference" in out
    assert "\x1b" not in out + err
    assert "4 of 4 runs" in err


def test_a_misspelt_field_or_metric_is_refused_with_the_one_that_was_meant(here: Path, capsys: Captured) -> None:
    Path("job.json").write_text(json.dumps(tiny(model={"name": "resnet8"})))
    for wrong, meant in (
        (("--vary", "loss.alhpa=1,0.5"), "'alpha'"),
        (("--vary", "lr=0.1,0.2"), "'optimizer.lr'"),
        (("--vary", "loss.alpha=1,0.5", "--set", "epoch=2"), "'epochs'"),
        (("--vary", "loss.alpha=1,0.5", "--metric", "val_tpo1"), "'val_top1'"),
    ):
        code, _, err = run(capsys, "ask", "job.json", *wrong, "--dry-run")
        assert (code, f"did you mean {meant}" in " ".join(err.split())) == (Code.REFUSED, True), err


def test_a_question_from_a_file_is_changed_and_stored(here: Path, capsys: Captured) -> None:
    Path("question.yaml").write_text(yaml.safe_dump(endless()))
    changes = ("--set", "spec.seed=7", "--set", "grid.loss.alpha=[1, 0.25]", "--seeds", "1")
    code, out, err = run(capsys, "submit", "question.yaml", *changes)
    assert code == Code.OK, err
    experiment_id = out.strip()
    code, out, _ = run(capsys, "show", experiment_id, "--json")
    asked = json.loads(out)["spec"]
    assert (asked["spec"]["seed"], asked["grid"], asked["seeds"]) == (7, {"loss.alpha": [1, 0.25]}, 1)
    assert run(capsys, "pause", experiment_id)[1].startswith(experiment_id)
    assert run(capsys, "resume", "last")[0] == Code.OK
    assert run(capsys, "delete", experiment_id)[0] == Code.REFUSED
    assert run(capsys, "cancel", experiment_id[-8:])[0] == Code.OK
    assert run(capsys, "watch", experiment_id)[0] == Code.CANCELLED
    assert run(capsys, "delete", experiment_id)[1].split() == [experiment_id, "deleted"]
    assert run(capsys, "show", experiment_id)[0] == Code.REFUSED


def test_the_verdict_is_shown_first(here: Path, answered: ExperimentView, capsys: Captured) -> None:
    code, out, _ = run(capsys, "show", answered.id)
    assert code == Code.OK
    assert answered.verdict
    told = " ".join(out.split())
    places = [told.index(" ".join(text.split())) for text in (answered.verdict, *answered.warnings, "mean ± 95 %", "α = 0.5 2/2")]
    assert places == sorted(places)


def test_experiments_are_listed(here: Path, answered: ExperimentView, capsys: Captured) -> None:
    assert answered.id in run(capsys, "list", "--state", "succeeded")[1]
    assert answered.id in run(capsys, "list", "-q", "-n", "100")[1].split()
    assert answered.id in {one["id"] for one in json.loads(run(capsys, "list", "--json", "-n", "100")[1])}


def test_a_report_goes_where_it_is_wanted(here: Path, answered: ExperimentView, capsys: Captured) -> None:
    code, out, err = run(capsys, "report", answered.id, "-o", "alpha.md")
    assert (code, out.strip()) == (Code.OK, "alpha.md"), err
    assert "# answered" in Path("alpha.md").read_text()
    assert run(capsys, "report", answered.id, "--format", "csv", "-o", "-")[1].count("\n") == 5
    assert run(capsys, "report", answered.id, "--format", "pdf")[0] == Code.USAGE


def test_what_breaks_a_rule_is_told_with_its_place(here: Path, capsys: Captured) -> None:
    Path("question.yaml").write_text(yaml.safe_dump(small()))
    code, out, err = run(capsys, "submit", "question.yaml", "--set", "grid.loss.alpha=[1, 1.4]")
    assert (code, out) == (Code.REFUSED, "")
    assert "/grid/loss.alpha/1" in err
    for arguments in (("ask", "question.yaml", "--vary", "loss.alpha"), ("submit", "question.yaml", "--set", "grid")):
        assert run(capsys, *arguments)[0] == Code.USAGE
    code, _, err = run(capsys, "show", "ILOU")
    assert (code, "none of the newest 1,000 experiments" in err) == (Code.REFUSED, True)


# --- questions


def test_values_are_yaml_with_commas() -> None:
    assert questions.lists(["loss.alpha=1,0.5", "clip={mode: agc, value: 0.01},null"], option="--vary") == {
        "loss.alpha": [1, 0.5],
        "clip": [{"mode": "agc", "value": 0.01}, None],
    }
    with pytest.raises(Problem, match="given twice"):
        questions.lists(["loss.alpha=1", "loss.alpha=0.5"], option="--vary")


def test_settings_reach_into_a_question() -> None:
    given = {"spec": {"epochs": 2}, "grid": {"loss.alpha": [1], "clip": [None]}}
    settings = ["spec.loss.alpha=0.3", "grid.loss.alpha=[1, 0.5]", "grid.clip=null", "tuning.seeds=2", "seeds=3"]
    assert questions.changed(given, settings) == {
        "spec": {"epochs": 2, "loss": {"alpha": 0.3}},
        "grid": {"loss.alpha": [1, 0.5]},
        "tuning": {"seeds": 2},
        "seeds": 3,
    }
    assert given == {"spec": {"epochs": 2}, "grid": {"loss.alpha": [1], "clip": [None]}}, "it is left as it was"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_a_question_that_says_what_it_asks_and_costs(path: Path) -> None:
    asked = plan.parse(specfile.read(str(path)))
    assert asked.name == path.stem
    comment = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert len(comment) >= 3
    assert any("?" in line for line in comment)
    assert any(f"examples/experiments/{path.name}" in line for line in comment)
    if asked.spec.strategy == "grid":
        assert any(f"{len(asked.arms)} arms x {len(asked.seeds)} seeds" in line for line in comment)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 6


def test_an_experiment_without_results_can_be_shown() -> None:
    view = ExperimentView.model_validate({"id": "exp_1", "state": "queued", "arms": [{"index": 0, "label": "α = 1"}], "baseline": 0})
    assert arms.verdict(view).startswith("No verdict yet")
    assert arms.arms_table(view).row_count == 1
    assert not view.is_settled
    failed = view.model_copy(update={"state": "failed"})
    assert failed.is_settled
    assert arms.verdict(failed) == "No verdict: no run succeeded"


def test_an_experiment_says_what_it_is(client: Client, answered: ExperimentView) -> None:
    assert repr(Experiment(client, answered)) == f"<Experiment {answered.id} succeeded: {answered.verdict}>"
