"""The report: what the findings say stands in it, number by number; what a user named stays text; the files are whole and repeatable."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import xml.etree.ElementTree as ET
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from powergrad.experiments import report
from powergrad.experiments.findings import Evidence, Findings
from tests.experiments import samples

VOID = {"meta", "br", "hr", "img", "link", "input"}
ACTIVE = {"script", "iframe", "object", "embed", "link", "img", "form", "input", "base", "audio", "video", "a", "foreignobject"}


class Page(HTMLParser):
    """A page read back: balanced or it raises; tables by caption, elements, ids, attributes, and the words of code blocks."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.headings: list[str] = []
        self.code: list[str] = []
        self.words = ""
        self._caption = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag in VOID:
            return
        self.open.append(tag)
        if tag == "caption":
            self._caption = ""
        elif tag == "thead":
            self.tables[self._caption] = []
        elif tag == "tr":
            self.tables[self._caption].append([])
        elif tag in ("td", "th"):
            self.tables[self._caption][-1].append("")
        elif tag == "h2":
            self.headings.append("")
        elif tag == "pre":
            self.code.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.words += data
        if "caption" in self.open:
            self._caption += data
        elif {"td", "th"} & set(self.open):
            self.tables[self._caption][-1][-1] += data
        elif "h2" in self.open:
            self.headings[-1] += data
        elif "pre" in self.open:
            self.code[-1] += data


def sample(shape: str) -> tuple[Findings, Evidence]:
    evidence = samples.SHAPES[shape]()
    return samples.findings(evidence, warnings=samples.WARNINGS), evidence


@cache
def page_of(shape: str) -> str:
    """Drawn once for all who only read it."""
    return report.html(*sample(shape))


def number(cell: str) -> float:
    return float(cell.replace("−", "-").replace(",", ""))


def ends(cell: str) -> tuple[float, float]:
    low, high = cell.strip("[]").split(", ")
    return number(low), number(high)


@pytest.mark.parametrize("shape", samples.SHAPES)
def test_every_shape_gives_a_balanced_page_that_runs_and_fetches_nothing(shape: str) -> None:
    text = page_of(shape)
    page = Page(text)
    assert set(page.elements) & ACTIVE == set()
    assert [name for name, _ in page.attributes if name.startswith("on")] == []
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "action")]
    assert [link for link in links if not link.startswith("#")] == []
    assert "url(http" not in text
    assert "@import" not in text
    policy = next(value for name, value in page.attributes if name == "content" and "default-src" in value)
    assert "default-src 'none'" in policy
    assert "script" not in policy


@pytest.mark.parametrize("shape", samples.SHAPES)
def test_ids_are_unique_and_every_reference_within_the_page_has_its_target(shape: str) -> None:
    page = Page(page_of(shape))
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = {value[1:] for name, value in page.attributes if name.endswith("href")}
    targets |= {target for name, value in page.attributes for target in re.findall(r"url\(#([^)]+)\)", value)}
    assert targets <= set(ids)


def test_every_number_of_the_differences_is_the_findings_at_the_precision_shown() -> None:
    findings, _ = sample("six_tuned")
    head, *rows = Page(page_of("six_tuned")).tables["Differences to the baseline, over the seeds that both finished"]
    assert len(rows) == 5
    for row, arm in zip(rows, findings["arms"][1:], strict=True):
        found, cells = arm["difference"], dict(zip(head, row, strict=True))
        assert found is not None
        assert found["mean"] is not None
        assert cells["arm"] == arm["label"]
        assert int(cells["pairs"]) == found["n"]
        assert number(cells["difference (points)"]) == pytest.approx(100 * found["mean"], abs=0.00501)
        assert ends(cells["95 % t interval"]) == pytest.approx((100 * (found["low"] or 0), 100 * (found["high"] or 0)), abs=0.00501)
        assert ends(cells["95 % bootstrap"]) == pytest.approx(
            (100 * (found["boot_low"] or 0), 100 * (found["boot_high"] or 0)), abs=0.00501
        )
        assert number(cells["p (t)"]) == pytest.approx(found["p_t"], abs=0.000501)
        assert number(cells["Holm p (t)"]) == pytest.approx(found["p_t_holm"], abs=0.000501)
        assert number(cells["p (Wilcoxon)"]) == pytest.approx(found["p_wilcoxon"], abs=0.000501)
        assert number(cells["Holm p (W.)"]) == pytest.approx(found["p_wilcoxon_holm"], abs=0.000501)
        assert number(cells["Hedges’ g"]) == pytest.approx(found["effect_size"], abs=0.00501)
        assert number(cells["detectable (points)"]) == pytest.approx(100 * (found["detectable"] or 0), abs=0.00501)
        assert int(cells["further seeds"]) == found["more_seeds"]
        assert cells["conclusion"] == found["conclusion"]


def test_every_number_of_the_arms_and_their_convergence_is_the_findings() -> None:
    findings, evidence = sample("lower_is_better")
    tables = Page(report.html(findings, evidence)).tables
    for row, arm in zip(tables["Mean over seeds"][1:], findings["arms"], strict=True):
        found = arm["metrics"]["val_loss"]
        assert row[0].startswith(arm["label"])
        assert (number(row[3]), number(row[4])) == pytest.approx((found["mean"], found["sd"]), abs=0.0000501)
        assert ends(row[5]) == pytest.approx((found["low"], found["high"]), abs=0.0000501)
    for row, arm in zip(tables["To the baseline's final score"][1:], findings["arms"], strict=True):
        way = arm["convergence"]
        assert way is not None
        assert row[1] == f"{way['reached']} of {way['of']}"
        assert [number(cell) for cell in row[2::2]] == pytest.approx(
            [way["epochs"]["mean"], way["seconds"]["mean"], way["joules"]["mean"]], abs=0.501
        )


def test_every_run_and_every_other_metric_is_in_a_table() -> None:
    findings, evidence = sample("two_arms")
    tables = Page(report.html(findings, evidence)).tables
    runs = tables["Runs, with their last evaluation"][1:]
    assert [(row[0], int(row[2])) for row in runs] == [(run["job"], run["seed"]) for run in evidence["runs"]]
    assert [number(row[4]) for row in runs] == pytest.approx(
        [100 * (run["final"]["val_top1"] or 0) for run in evidence["runs"]], abs=0.00501
    )
    head, first, _ = tables["After the last epoch"]
    gap = first[head.index("generalisation gap (points)")]
    assert gap == "3.00 ± 0.00"


def test_a_search_lists_the_best_first_and_what_has_no_value_last() -> None:
    findings, evidence = sample("search")
    values = [row[3] for row in Page(report.html(findings, evidence)).tables["The best first"][1:]]
    known = [number(value) for value in values if value != "–"]
    assert known == sorted(known, reverse=True)
    assert len(known) == findings["finished"]
    assert values[len(known) :] == ["–"] * (len(values) - len(known))


def test_tuning_shows_its_rounds_its_choice_and_an_edge() -> None:
    page = Page(page_of("six_tuned"))
    caption = "α = 1.0: chosen: learning rate = 0.4 (seeds 1000, 1001)"
    assert [row[6] for row in page.tables[caption][1:]] == ["", "", "kept", "kept", "", "kept"]
    assert "lies at the edge of what was tried" in page.words


def test_failed_runs_are_listed_with_their_reason() -> None:
    page = Page(page_of("with_failures"))
    rows = page.tables["Failed or cancelled"][1:]
    assert len(rows) == 5
    assert {row[4] for row in rows} == {"out_of_memory", "–"}


def test_the_verdict_comes_first_then_the_warnings() -> None:
    findings, evidence = sample("two_arms")
    findings["verdict"] = "α = 0.5 is better by 0.95 points."
    for text in (Page(report.html(findings, evidence)).words, report.markdown(findings, evidence)):
        places = [
            text.index(part) for part in (findings["verdict"], "wants another one", "Against the baseline", "The arms", "How to read this")
        ]
        assert places == sorted(places)


def test_names_stay_text_on_the_page() -> None:
    findings, evidence = sample("hostile")
    text = report.html(findings, evidence)
    assert "<script" not in text
    page = Page(text)
    assert samples.PAYLOAD in page.words
    assert any("</pre><script>" in code for code in page.code)


def test_names_stay_text_in_markdown() -> None:
    """Read by a parser of GitHub's tables with HTML on: what it makes has no link, no emphasis, no heading and no HTML from a name."""
    text = report.markdown(*sample("hostile"))
    tokens = MarkdownIt("gfm-like", {"html": True, "linkify": False}).parse(text)
    kinds = {token.type for token in tokens} | {child.type for token in tokens for child in token.children or []}
    assert kinds & {"html_block", "html_inline", "link_open", "image", "em_open", "s_open", "code_inline"} == set()
    assert [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"][1:3] == [
        "Against the baseline",
        "The arms",
    ]
    assert sum(token.type == "fence" for token in tokens) == 4
    assert re.search(r"(?<!\\)\$", re.sub(r"(`{3,})yaml\n.*?\n\1\n", "", text, flags=re.DOTALL)) is None


@pytest.mark.parametrize("shape", samples.SHAPES)
def test_markdown_and_page_have_the_same_tables(shape: str) -> None:
    page = Page(page_of(shape))
    parser = MarkdownIt("gfm-like", {"linkify": False})
    tokens = parser.parse(report.markdown(*sample(shape)))
    rows: list[list[str]] = []
    for i, token in enumerate(tokens):
        if token.type == "tr_open":
            rows.append([])
        if token.type in ("th_open", "td_open"):
            rows[-1].append("".join(child.content for child in tokens[i + 1].children or []))
    of_page = [[" ".join(cell.split()) for cell in row] for table in page.tables.values() for row in table]
    assert rows == of_page
    assert [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"][1:] == [
        heading for heading in page.headings if heading not in ("Over training", "What was tried")
    ]


def test_a_run_has_a_line_with_its_settings_as_columns() -> None:
    evidence = samples.search()
    rows = list(csv.DictReader(io.StringIO(report.runs_csv(evidence))))
    assert [row["job"] for row in rows] == [run["job"] for run in evidence["runs"]]
    for row, run in zip(rows, evidence["runs"], strict=True):
        settings = evidence["arms"][run["arm"]]["settings"]
        assert float(row["optimizer.lr"]) == settings["optimizer.lr"]
        assert (json.loads(row["clip"]) if row["clip"] else None) == settings["clip"]
        assert row["val_top1"] == ("" if not run["final"] else repr(run["final"]["val_top1"]))


def test_tuned_settings_are_columns_and_win_over_the_arms_own() -> None:
    rows = list(csv.DictReader(io.StringIO(report.runs_csv(samples.six_tuned()))))
    assert {row["optimizer.lr"] for row in rows} == {"0.4"}


def test_a_spreadsheet_finds_no_formula() -> None:
    evidence = samples.hostile()
    evidence["runs"][0]["reason"] = "@SUM(1)"
    evidence["arms"][2]["settings"] = {"data.dataset": "-2+3", "=cmd": 1}
    rows = list(csv.reader(io.StringIO(report.runs_csv(evidence))))
    assert [cell for row in rows for cell in row if cell.startswith(("=", "+", "-", "@"))] == []
    assert "'=1+1" in rows[1]


def test_all_files_are_written_whole_and_told_by_their_hash(tmp_path: Path) -> None:
    findings, evidence = sample("six_tuned")
    told = report.write_all(findings, evidence, tmp_path / "report")
    assert sorted(told) == sorted(path.name for path in (tmp_path / "report").iterdir()) == sorted(report.MEDIA_TYPES)
    for name, facts in told.items():
        content = (tmp_path / "report" / name).read_bytes()
        assert facts == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "media_type": report.MEDIA_TYPES[name]}
    assert json.loads((tmp_path / "report" / "report.json").read_bytes()) == {"findings": findings, "evidence": evidence}
    assert (tmp_path / "report" / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert ET.parse(tmp_path / "report" / "plot.svg").getroot().tag.endswith("svg")
    assert report.write_all(findings, evidence, tmp_path / "again") == told


def test_a_name_that_utf_8_cannot_say_does_not_lose_the_report(tmp_path: Path) -> None:
    findings, evidence = sample("two_arms")
    evidence["name"] = evidence["arms"][1]["settings"]["data.dataset"] = "digits \ud800"
    assert set(report.write_all(findings, evidence, tmp_path)) == set(report.MEDIA_TYPES)
