"""An experiment to be disturbed: asked on a stack, struck at while its runs train, and held against one that nothing happened to."""

from __future__ import annotations

import json
import random
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from powergrad.client import Experiment
from powergrad.client.models import Job
from tests.faults import history
from tests.faults.conftest import Site, small_spec
from tests.faults.moments import trainers_of
from tests.worker.conftest import until

ARMS, SEEDS = 2, 2
STEPS = 44
"""Of each run; what comes after half of them could find it ended."""
SETTLES_WITHIN_S = 180.0
NEVER_THE_SAME = frozenset({"seconds", "joules", "images_per_s", "job", "experiment", "provenance"})
"""Of a report: names, times, and where and when it was made."""

Place = tuple[str, int]
"""Arm and seed: where a run stands in its experiment."""


@dataclass(frozen=True)
class Answered:
    """What an experiment has found, and how each of its runs went, whatever they were called and however long they took."""

    state: str
    report: Any
    runs: dict[Place, history.Undisturbed]


def question(**changes: Any) -> dict[str, Any]:
    """Two arms of two seeds; changes are the spec's."""
    return {"spec": small_spec(**{"epochs": 4} | changes), "grid": {"loss.alpha": [1.0, 0.5]}, "seeds": SEEDS}


def ask(site: Site, **changes: Any) -> Experiment:
    return site.client.ask(question(**changes))


def jobs_of(site: Site, experiment: Experiment) -> list[Job]:
    return list(site.client.list(experiment=experiment.id))


def at_work(site: Site, experiment: Experiment, dice: random.Random) -> tuple[str, psutil.Process]:
    """One of the runs at a random moment of its first half, and its trainer."""
    step = dice.randint(1, STEPS // 2)

    def look() -> tuple[str, psutil.Process] | None:
        running = site.ask(lambda: list(site.client.list(experiment=experiment.id, state=["running"]))) or []
        for job in dice.sample(running, len(running)):
            found = trainers_of(site, job.id) if job.progress.step >= step else []
            if found:
                return job.id, found[0]
        assert not settled(site, experiment), "all of it had ended before the fault came"
        return None

    found: tuple[str, psutil.Process] = until(look, within_s=120.0)
    print(f"struck {found[0]} at step {step} or later")
    return found


def settled(site: Site, experiment: Experiment) -> bool:
    return bool(site.ask(lambda: site.client.experiment(experiment.id).is_settled))


def answered(site: Site, experiment: Experiment) -> Answered:
    """What came of it, as soon as nothing will change any more."""
    until(lambda: settled(site, experiment), within_s=SETTLES_WITHIN_S)
    view = site.client.experiment(experiment.id)
    with tempfile.TemporaryDirectory() as folder:
        report = json.loads(view.report("json", Path(folder)).read_bytes())
    runs = {place_of(job): site.undisturbed(job.id) for job in jobs_of(site, experiment)}
    return Answered(view.state, comparable(report), runs)


def comparable(value: Any) -> Any:
    """A report without what is no function of its question."""
    match value:
        case Mapping():
            return {name: comparable(one) for name, one in value.items() if name not in NEVER_THE_SAME}
        case list():
            return [comparable(one) for one in value]
    return value


def place_of(job: Job) -> Place:
    return job.labels["arm"], int(job.labels["seed"])


def check(
    site: Site,
    experiment: Experiment,
    expected: Answered,
    *,
    attempts: int | None = None,
    spared: Collection[Place] = (),
    damaged: frozenset[str] = frozenset(),
) -> None:
    """It ends with every run made once, each as it goes when nothing happens to it, and finds what it would have found.

    attempts: of each run, where none may be started again.  spared: runs that were hurt beyond mending, and with them the findings.
    damaged: checkpoints whose files were.
    """
    found = answered(site, experiment)
    records = [site.record(job.id) for job in jobs_of(site, experiment)]
    view = site.client.experiment(experiment.id).view.model_dump(mode="json")
    broken = history.judge_experiment(view, [record.job for record in records], cancelled=False)
    for record in records:
        place = record.job["labels"]["arm"], int(record.job["labels"]["seed"])
        broken += history.judge(record, history.Asked(damaged=damaged), None if place in spared else expected.runs[place])
        if attempts is not None:
            assert record.job["attempt"] == attempts, history.history(record)
    assert not broken, "\n".join(f"{one.rule}: {one.evidence}" for one in broken)
    assert Counter(found.runs.keys()) == Counter(expected.runs.keys())
    if not spared:
        assert found.state == expected.state == "succeeded"
        assert found.report == expected.report
