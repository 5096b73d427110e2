"""docker/monitoring against a real server: every query asks for series, labels and values that /metrics has."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from powergrad.jobs.states import JobState
from tests.api.conftest import DIGITS, Api, serving, settings_for, until

FOLDER = Path(__file__).parents[2] / "docker" / "monitoring"
OF_PROMETHEUS = {"job", "instance"}
"""Labels that a scrape adds."""
METRIC = r"\b(?:powergrad|process)_\w+|\bup\b"
SELECTOR = re.compile(rf"({METRIC})\s*(?:{{([^}}]*)}})?")
MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
GROUPING = re.compile(r"\bby \(([\w, ]+)\)")

Series = dict[str, list[dict[str, str]]]
"""The labels of each series, by the name it is asked for by."""


def queries() -> list[tuple[str, str]]:
    """Where each query stands, and the query."""
    found = [
        (f"{panel['title']} {target['refId']}", target["expr"])
        for path in sorted((FOLDER / "dashboards").glob("*.json"))
        for panel in json.loads(path.read_text())["panels"]
        for target in panel["targets"]
    ]
    groups = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    return found + [(rule["alert"], rule["expr"]) for group in groups for rule in group["rules"]]


@pytest.fixture(scope="module")
def server(sqlite_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("monitored")
    database = folder / "jobs.db"
    database.write_bytes(sqlite_file.read_bytes())
    with serving(settings_for(f"sqlite:///{database}", folder)) as running:
        yield running


@pytest.fixture(scope="module")
def told(server: Api) -> Series:
    """What a scrape says once a job was submitted, whose ring no broker took."""
    assert server.http.post("/v1/jobs", json=DIGITS).status_code == 202
    until(lambda: "powergrad_doorbell_rings_total{" in server.http.get("/metrics").text)
    series: Series = {"up": [{}]}
    for family in text_string_to_metric_families(server.http.get("/metrics").text):
        for sample in family.samples:
            series.setdefault(sample.name, []).append(sample.labels)
    return series


def test_there_are_queries_of_every_measure_of_our_own(told: Series) -> None:
    asked = {name for _, expression in queries() for name, _ in SELECTOR.findall(expression)}
    own = {name for name in told if name.startswith("powergrad_") and not name.endswith(("_created", "_sum", "_count"))}
    assert own <= asked


@pytest.mark.parametrize(("where", "expression"), queries())
def test_a_query_names_what_a_server_tells(told: Series, where: str, expression: str) -> None:
    selectors = SELECTOR.findall(expression)
    assert selectors, where
    for name, matchers in selectors:
        assert name in told, f"{where}: /metrics has no {name}"
        for label, operator, value in MATCHER.findall(matchers):
            if label in OF_PROMETHEUS:
                continue
            values = {labels.get(label) for labels in told[name]}
            assert None not in values, f"{where}: {name} has no label {label}"
            if label == "state":  # the only closed set whose members are all there at once
                assert all(one in values for one in value.split("|")), (where, operator, value)
    for group in GROUPING.findall(expression):
        for label in group.split(", "):
            known = [name for name, _ in selectors if all(label in labels for labels in told[name])]
            assert known or label in OF_PROMETHEUS, f"{where}: nothing has a label {label}"


def test_every_state_of_a_job_is_a_series_from_the_start(told: Series) -> None:
    assert {labels["state"] for labels in told["powergrad_jobs"]} == set(JobState)


def test_a_panel_has_its_place_and_its_source() -> None:
    dashboard: dict[str, Any] = json.loads((FOLDER / "dashboards" / "powergrad.json").read_text())
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert variables == {"source", "job"}
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        assert panel["datasource"]["uid"] == "${source}"
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, f"{panel['title']} lies on another panel"
        assert all(x < 24 for x, _ in cells)
        taken |= cells


def test_the_scrape_configuration_names_the_rules_that_are_there() -> None:
    configuration = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    assert all((FOLDER / name).is_file() for name in configuration["rule_files"])
    assert configuration["scrape_configs"][0]["metrics_path"] == "/metrics"
