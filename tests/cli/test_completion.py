"""What the Tab key offers, asked as bash asks for it; and what it does where the server cannot be asked."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from powergrad.cli import completion
from powergrad.cli.main import main
from powergrad.cli.stack import Stack
from powergrad.client import Job
from powergrad.jobs.spec import parse

DOTTED = (
    "data.dataset",
    "loss.alpha",
    "loss.alpha.start",
    "optimizer.lr",
    "clip",
    "clip.mode",
    "epochs",
    "resources.cpu_threads",
    "labels",
)


Offered = Callable[[str, str], list[str]]


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Offered:
    """The words for what stands before the cursor, at the end of a line, with this server."""

    def ask(line: str, url: str) -> list[str]:
        for name in [name for name in os.environ if name.startswith("POWERGRAD_")]:
            monkeypatch.delenv(name)
        asked = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" ")), "_POWERGRAD_COMPLETE": "complete_bash", "POWERGRAD_URL": url}
        for name, value in asked.items():
            monkeypatch.setenv(name, value)
        code = main([])
        told = capsys.readouterr()
        assert (code, told.err) == (0, ""), "the shell would show it in the middle of the line"
        return told.out.split()

    return ask


def test_jobs_experiments_metrics_and_artifacts_are_offered(offered: Offered, live: Stack, trained: Job) -> None:
    assert trained.id in offered("powergrad show job_", live.url)
    assert "last" in offered("powergrad watch ", live.url)
    assert offered("powergrad metrics last --name val_top", live.url) == ["val_top1", "val_top5"]
    assert "-metrics.val_top1" in offered("powergrad jobs --sort ", live.url)
    assert offered(f"powergrad pull {trained.id} --artifact lab", live.url) == ["labels.json"]
    assert offered("powergrad datasets show digi", live.url) == ["digits"]
    assert "last" in offered("powergrad experiment show ", live.url)


def test_commands_and_fields_need_no_server(offered: Offered) -> None:
    nowhere = "http://127.0.0.1:9"
    assert offered("powergrad comp", nowhere) == ["compare"]
    assert offered("powergrad submit job.yaml --set optimizer.l", nowhere) == ["optimizer.lr="]
    assert offered("powergrad jobs --state succ", nowhere) == ["succeeded"]
    assert offered("powergrad experiment submit q.yaml --set spec.loss.label", nowhere) == ["spec.loss.label_smoothing="]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "nonsense", "http://[bad"])
def test_without_a_server_nothing_goes_wrong(offered: Offered, url: str) -> None:
    assert offered("powergrad show ", url) == ["last"]
    assert offered("powergrad datasets show ", url) == []


def test_fields_are_those_of_a_spec() -> None:
    names = {word.removesuffix("=") for word, _ in completion.settings("")}
    assert set(DOTTED) <= names
    spec = parse({"data": {"dataset": "digits"}}).model_dump()
    sections = {name.partition(".")[0] for name in names}
    assert sections == set(spec), "every section is offered, and nothing else"
