"""What answers look like in a notebook: their values, and nothing that a browser would run."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import pytest

from powergrad.client import ExperimentPage, ExperimentView, Job, JobPage

EVIL = "<script>alert(1)</script>\"'&<img src=x onerror=alert(1)>"
PLAIN_TAGS = {"div", "b", "i", "p", "br", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "code", "span", "small", "progress"}


class Page(HTMLParser):
    """The tags, attributes and text of a piece of HTML, as a browser would read them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def job(**fields: Any) -> Job:
    known = {
        "id": "job_01M85C3KHN8TE8VJTRSY5QREWY",
        "state": "running",
        "name": "mine",
        "progress": {"fraction": 0.25, "epochs": 8},
        "metrics": {"latest": {"val_top1": 0.5, "val_loss": None}, "best": {"val_top1": 0.625}},
    }
    return Job.model_validate(known | fields)


def experiment(**fields: Any) -> ExperimentView:
    arms = [
        {"index": 0, "label": "α = 1", "n": 2, "mean": 0.9, "counts": {"succeeded": 2}},
        {"index": 1, "label": "α = 0.5", "n": 2, "mean": 0.91, "low": 0.9, "high": 0.92, "counts": {"succeeded": 2}}
        | {"difference": {"mean": 0.01, "low": -0.01, "high": 0.03, "p_t_holm": 0.0004}},
    ]
    known = {"id": "exp_1", "state": "succeeded", "name": "alpha", "arms": arms, "baseline": 0, "verdict": "No clear difference."}
    return ExperimentView.model_validate(known | fields)


def test_a_job_shows_state_progress_and_scores_in_their_units() -> None:
    text = Page(job()._repr_html_()).text
    for word in ("job_01M85C3KHN8TE8VJTRSY5QREWY", "running", "25 %", "50.00 %", "62.50 %"):
        assert word in text


def test_a_job_that_failed_says_why_and_what_to_try() -> None:
    page = Page(job(state="failed", reason={"code": "out_of_memory", "detail": "4 GiB", "hint": "a smaller batch"})._repr_html_())
    assert "out_of_memory: 4 GiB" in page.text
    assert "a smaller batch" in page.text


def test_a_page_says_that_there_is_more() -> None:
    assert "older" in Page(JobPage(data=[job()], has_more=True)._repr_html_()).text
    assert "older" not in Page(JobPage(data=[job()])._repr_html_()).text


def test_an_experiment_shows_its_verdict_before_its_arms() -> None:
    text = Page(experiment()._repr_html_()).text
    assert text.index("No clear difference.") < text.index("α = 0.5")
    for word in ("baseline", "+1.00 (−1.00 to +3.00)", "91.00 ± 1.00", "< 0.001"):
        assert word in text


EVERYWHERE = [
    job(id=EVIL, name=EVIL, notes=EVIL, labels={EVIL: EVIL}, metrics={"latest": {EVIL: 1.0}, "best": {EVIL: 2.0}}).model_copy(
        update={"state": EVIL}
    ),
    job(state="failed", reason={"code": EVIL, "detail": EVIL, "hint": EVIL}),
    JobPage(data=[job(id=EVIL, name=EVIL)]),
    experiment(id=EVIL, name=EVIL, state=EVIL, verdict=EVIL, warnings=[EVIL], spec={"metric": EVIL}, arms=[{"index": 0, "label": EVIL}]),
    ExperimentPage(data=[experiment(id=EVIL, name=EVIL, state=EVIL, verdict=EVIL)]),
]


@pytest.mark.parametrize("shown", EVERYWHERE, ids=lambda shown: type(shown).__name__)
def test_what_a_user_wrote_is_text_and_no_markup(shown: Any) -> None:
    page = Page(shown._repr_html_())
    assert EVIL in page.text, "as it was written"
    assert page.tags <= PLAIN_TAGS
    assert page.attributes <= {"style", "max", "value"}
