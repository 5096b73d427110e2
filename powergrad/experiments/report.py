"""An experiment's report: one page to read and print, the same in Markdown, the numbers as JSON and CSV.

Page and Markdown are two templates over the same sections, so that they cannot say different things. Whatever a user has named is escaped
by the templates' environments, not by hand.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from powergrad import durable
from powergrad.experiments import pictures, units
from powergrad.experiments.findings import ArmFindings, Estimate, Evidence, Findings, TuningEvidence
from powergrad.experiments.labels import labels, short, words
from powergrad.experiments.units import NOTHING, Unit, p_value, printable, shortened
from powergrad.markdown import plain
from powergrad.spreadsheets import spreadsheet_safe

MEDIA_TYPES = {
    "report.html": "text/html; charset=utf-8",
    "report.md": "text/markdown; charset=utf-8",
    "report.json": "application/json",
    "plot.svg": "image/svg+xml",
    "plot.png": "image/png",
    "runs.csv": "text/csv; charset=utf-8",
}
NAME_LETTERS = 90
ENDED_BADLY = ("failed", "cancelled")
OTHER_METRICS = (
    "val_top1",
    "train_top1",
    "gap",
    "val_loss",
    "train_loss",
    "val_ece",
    "val_top5",
    "test_top1",
    "test_top5",
    "test_loss",
    "test_ece",
)
"""In this order, as far as they were measured; others follow."""
CONCLUSIONS = {
    "better": "better",
    "worse": "worse",
    "open": "open",
    "identical": "identical",
    "too_few": "too few seeds",
}
_TEMPLATES = Path(__file__).with_name("templates")
_SVG_ID = re.compile(r'(\bid="|\bhref="#|url\(#)')


@dataclass(frozen=True)
class Table:
    """Cells as they are shown; the first column names its row."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: frozenset[int] = frozenset({0})
    """Columns of words; the others are numbers, and lie to the right."""


@dataclass(frozen=True)
class Code:
    """Text as it stands, to be copied."""

    caption: str
    text: str


@dataclass(frozen=True)
class Picture:
    """Shown on the page alone."""

    name: str
    alternative: str
    svg: Markup


@dataclass(frozen=True)
class Section:
    """A heading and what is under it."""

    anchor: str
    title: str
    blocks: Sequence[str | Table | Code | Picture] = field(default_factory=tuple)
    """In their order; text is a paragraph."""

    def __bool__(self) -> bool:
        return bool(self.blocks)


def html(findings: Findings, evidence: Evidence) -> str:
    """The page: everything is in it, it asks nobody for anything and runs no script."""
    return _environment("html").get_template("report.html.jinja").render(**_content(findings, evidence, drawn=True))


def markdown(findings: Findings, evidence: Evidence) -> str:
    """The same without pictures, as GitHub shows it."""
    return _environment("markdown").get_template("report.md.jinja").render(**_content(findings, evidence, drawn=False))


def runs_csv(evidence: Evidence) -> str:
    """A line a run: who, with which settings, how it ended. An empty cell is not known, or not set."""
    names = labels(evidence["arms"], evidence["spec"])
    settings = list(dict.fromkeys(path for arm in evidence["arms"] for path in [*arm["settings"], *arm["tuned"]]))
    metrics = _in_order(name for run in evidence["runs"] for name in run["final"])
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(
        [spreadsheet_safe(head) for head in ["job", "arm", "label", "seed", *settings, "state", "reason", *metrics, "seconds", "joules"]]
    )
    for run in evidence["runs"]:
        arm = evidence["arms"][run["arm"]]
        chosen = {**arm["settings"], **arm["tuned"]}
        cells = [
            run["job"],
            run["arm"],
            names[run["arm"]],
            run["seed"],
            *(chosen.get(path) for path in settings),
            run["state"],
            run["reason"],
        ]
        cells += [*(run["final"].get(name) for name in metrics), run["seconds"], run["joules"]]
        table.writerow([_csv_cell(cell) for cell in cells])
    return text.getvalue()


def write_all(findings: Findings, evidence: Evidence, folder: Path) -> dict[str, dict[str, Any]]:
    """Writes every file of the report, each whole or not at all, and tells each one's bytes, sha256 and media_type. Raises OSError."""
    plot = pictures.summary(findings, evidence)
    contents = {
        "report.html": html(findings, evidence).encode(errors="replace"),
        "report.md": markdown(findings, evidence).encode(errors="replace"),
        "report.json": json.dumps({"findings": findings, "evidence": evidence}, allow_nan=False).encode() + b"\n",
        "plot.svg": pictures.render(plot, "svg"),
        "plot.png": pictures.render(plot, "png"),
        "runs.csv": runs_csv(evidence).encode(errors="replace"),
    }
    for name, content in contents.items():
        durable.write(folder / name, content)
    return {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "media_type": MEDIA_TYPES[name]}
        for name, content in contents.items()
    }


def _csv_cell(value: Any) -> Any:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    return spreadsheet_safe(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _environment(kind: Literal["html", "markdown"]) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=kind == "html",  # noqa: S701  # Markdown has another syntax: `finalize` escapes it, HTML included
        finalize=None if kind == "html" else _plain,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.tests["table"] = lambda block: isinstance(block, Table)
    environment.tests["code"] = lambda block: isinstance(block, Code)
    environment.tests["picture"] = lambda block: isinstance(block, Picture)
    environment.filters["fenced"] = _fenced
    return environment


def _plain(value: Any) -> Any:
    return value if isinstance(value, Markup) else plain(str(value)).replace("$", r"\$")  # GitHub sets $x$ as a formula


def _fenced(text: str) -> Markup:
    """A code block whose fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return Markup(f"{fence}yaml\n{text.rstrip()}\n{fence}")  # noqa: S704  # nothing in a fenced block is acted upon


def _content(findings: Findings, evidence: Evidence, *, drawn: bool) -> dict[str, Any]:
    sections = [
        _comparison(findings, evidence, drawn=drawn),
        _arms(findings, evidence, drawn=drawn),
        _convergence(findings),
        _other_metrics(findings),
        _tuning(findings),
        _curves(findings, drawn=drawn),
        _runs(findings, evidence),
        _failures(findings, evidence),
        Section("reading", "How to read this", _reading(findings)),
        _specs(findings, evidence),
        _provenance(evidence),
    ]
    return {
        "name": printable(evidence["name"]),
        "summary": _summary(findings, evidence),
        "verdict": findings["verdict"],
        "warnings": findings["warnings"],
        "sections": [section for section in sections if section],
    }


def _summary(findings: Findings, evidence: Evidence) -> str:
    better = "higher is better" if findings["direction"] == "max" else "lower is better"
    arms, seeds = len(findings["arms"]), len(findings["seeds"])
    baseline = "" if findings["baseline"] is None else f" Baseline: {findings['arms'][findings['baseline']]['label']}."
    return (
        f"{findings['finished']} of {findings['planned']} runs finished: {arms} {'arm' if arms == 1 else 'arms'}, "
        f"{seeds} {'seed' if seeds == 1 else 'seeds'} each. Compared by {units.titled(findings['metric'])} after the last epoch, {better}.{baseline} "
        f"Experiment {evidence['experiment']}."
    )


def _comparison(findings: Findings, evidence: Evidence, *, drawn: bool) -> Section:
    unit = units.unit(findings["metric"])
    if findings["baseline"] is None:
        blocks: list[str | Table | Code | Picture] = []
        if drawn:
            parallel, progress = pictures.parallel(findings, evidence), pictures.progress(findings, evidence)
            blocks = [
                _picture("parallel", "Parallel coordinates of the settings that were tried and the metric they led to", parallel),
                _picture("progress", "The metric of each trial and the best so far", progress),
            ]
        return Section("search", "What was tried", blocks)
    rows = [row for arm in findings["arms"] if (row := _difference_row(arm, unit))]
    if not rows:
        return Section("differences", "Against the baseline")
    in_units = f" ({unit.of_difference})" if unit.of_difference else ""
    columns = [
        "arm", "pairs", f"difference{in_units}", "95 % t interval", "95 % bootstrap", "p (t)", "Holm p (t)", "p (Wilcoxon)", "Holm p (W.)",
        "Hedges’ g", f"detectable{in_units}", "further seeds", "conclusion",
    ]  # fmt: skip
    table = Table("Differences to the baseline, over the seeds that both finished", columns, rows, frozenset({0, 12}))
    forest = [_picture("forest", "Each arm's difference to the baseline with its interval", pictures.forest(findings))] if drawn else []
    return Section("differences", "Against the baseline", [*forest, table])


def _difference_row(arm: ArmFindings, unit: Unit) -> list[str] | None:
    difference = arm["difference"]
    if difference is None:
        return None
    effect = difference["effect_size"]
    more = difference["more_seeds"]
    return [
        _name(arm),
        str(difference["n"]),
        unit.difference(difference["mean"]),
        _signed_interval(difference, "", unit),
        _signed_interval(difference, "boot_", unit),
        *(p_value(difference[name]) for name in ("p_t", "p_t_holm", "p_wilcoxon", "p_wilcoxon_holm")),
        NOTHING if effect is None else f"{effect:+.2f}".replace("-", "−"),
        unit.value(difference["detectable"]),
        NOTHING if more is None else str(more),
        CONCLUSIONS[difference["conclusion"]],
    ]


def _signed_interval(estimate: Mapping[str, Any], prefix: str, unit: Unit) -> str:
    low, high = estimate[f"{prefix}low"], estimate[f"{prefix}high"]
    return NOTHING if low is None or high is None else f"[{unit.difference(low)}, {unit.difference(high)}]"


def _interval(estimate: Mapping[str, Any], prefix: str, unit: Unit) -> str:
    low, high = estimate[f"{prefix}low"], estimate[f"{prefix}high"]
    return NOTHING if low is None or high is None else f"[{unit.value(low)}, {unit.value(high)}]"


def _arms(findings: Findings, evidence: Evidence, *, drawn: bool) -> Section:
    title = units.titled(findings["metric"])
    if findings["strategy"] != "grid" and len(findings["seeds"]) == 1:
        arms = sorted(findings["arms"], key=lambda arm: _order(arm, findings))
        rows = [_arm_row(arm, findings)[:4] for arm in arms]
        return Section("arms", "The arms", [Table("The best first", ["arm", "jobs", "n", title], rows, frozenset({0, 1}))])
    columns = ["arm", "jobs", "n", title, "sd", "95 % t interval", "95 % bootstrap"]
    table = Table("Mean over seeds", columns, [_arm_row(arm, findings) for arm in findings["arms"]], frozenset({0, 1}))
    strip = [_picture("strip", "The final value of every run, by arm", pictures.strip(findings, evidence))] if drawn else []
    return Section("arms", "The arms", [table, *strip])


def _order(arm: ArmFindings, findings: Findings) -> tuple[bool, float]:
    """The best first, those without a value last."""
    mean = arm["metrics"].get(findings["metric"], _NONE)["mean"]
    return mean is None, (mean or 0.0) * (-1 if findings["direction"] == "max" else 1)


def _arm_row(arm: ArmFindings, findings: Findings) -> list[str]:
    unit, found = units.unit(findings["metric"]), arm["metrics"].get(findings["metric"], _NONE)
    counts = ", ".join(f"{count} {state}" for state, count in arm["counts"].items()) or NOTHING
    intervals = [_interval(found, prefix, unit) for prefix in ("", "boot_")]
    return [_marked(arm, findings), counts, str(found["n"]), unit.value(found["mean"]), unit.value(found["sd"]), *intervals]


_NONE = Estimate(n=0, mean=None, sd=None, low=None, high=None, boot_low=None, boot_high=None)


def _name(arm: ArmFindings) -> str:
    """As tables have it; the specs have the whole label."""
    return shortened(arm["label"], NAME_LETTERS)


def _marked(arm: ArmFindings, findings: Findings) -> str:
    roles = [role for role, of in (("baseline", findings["baseline"]), ("best mean", findings["best"])) if of == arm["index"]]
    return f"{_name(arm)} ({', '.join(roles)})" if roles else _name(arm)


def _convergence(findings: Findings) -> Section:
    rows = [
        [
            _marked(arm, findings),
            f"{found['reached']} of {found['of']}",
            *_spread(found["epochs"], units.EPOCHS),
            *_spread(found["seconds"], units.SECONDS),
            *_spread(found["joules"], units.JOULES),
        ]
        for arm in findings["arms"]
        if (found := arm["convergence"]) is not None and found["of"]
    ]
    if not rows:
        return Section("convergence", "Speed of convergence")
    columns = ["arm", "reached", "epochs", "95 % interval", "seconds", "95 % interval", "joules", "95 % interval"]
    text = (
        "What it takes to the first evaluation that is at least as good as the baseline's last one with the same seed: mean over the seeds that "
        "got there. Where some did not, the mean is too favourable. Seconds are those the device was busy with training."
    )
    return Section("convergence", "Speed of convergence", [text, Table("To the baseline's final score", columns, rows)])


def _spread(estimate: Estimate, unit: Unit) -> list[str]:
    return [unit.value(estimate["mean"]), _interval(estimate, "", unit)]


def _in_order(names: Iterator[str]) -> list[str]:
    found = dict.fromkeys(names)
    return [*(name for name in OTHER_METRICS if name in found), *sorted(set(found) - set(OTHER_METRICS))]


def _other_metrics(findings: Findings) -> Section:
    measured = _in_order(name for arm in findings["arms"] for name, found in arm["metrics"].items() if found["n"])
    others = [name for name in measured if name != findings["metric"]]
    if not others:
        return Section("metrics", "Other metrics")
    rows = [
        [_marked(arm, findings), *(_with_sd(arm["metrics"].get(name, _NONE), units.unit(name)) for name in others)]
        for arm in findings["arms"]
    ]
    text = (
        "Mean ± standard deviation over seeds, after the last epoch. The gap is training minus validation accuracy. A lower α raises the "
        "cross-entropy at the end even where accuracy rises, so losses of different α must not be compared as if lower were better."
    )
    return Section("metrics", "Other metrics", [text, Table("After the last epoch", ["arm", *map(units.titled, others)], rows)])


def _with_sd(estimate: Estimate, unit: Unit) -> str:
    mean, sd = unit.value(estimate["mean"]), unit.value(estimate["sd"])
    return mean if sd == NOTHING else f"{mean} ± {sd}"


def _tuning(findings: Findings) -> Section:
    if not findings["tuning"]:
        return Section("tuning", "How settings were tuned")
    text = "Each arm was tuned by itself, with seeds that the comparison does not use: what is kept of a round goes on to the next, the last is the choice."
    return Section("tuning", "How settings were tuned", [text, *(block for one in findings["tuning"] for block in _tuned(findings, one))])


def _tuned(findings: Findings, tuning: TuningEvidence) -> Iterator[str | Table]:
    unit = units.unit(findings["metric"])
    rows = [
        [
            str(number), str(rung["epochs"]), _settings(score["settings"]), str(score["n"]), unit.value(score["mean"]), unit.value(score["sd"]),
            "kept" if score["kept"] else "",
        ]
        for number, rung in enumerate(tuning["rungs"], 1)
        for score in rung["scores"]
    ]  # fmt: skip
    label = _name(findings["arms"][tuning["arm"]])
    chosen = "not chosen yet" if tuning["chosen"] is None else f"chosen: {_settings(tuning['chosen'])}"
    columns = ["round", "epochs", "settings", "n", units.titled(findings["metric"]), "sd", "outcome"]
    yield Table(f"{label}: {chosen} (seeds {', '.join(map(str, tuning['seeds']))})", columns, rows, frozenset({2, 6}))
    if tuning["at_edge"]:
        edges = ", ".join(words(path) for path in tuning["at_edge"])
        yield f"{label}: the chosen {edges} lies at the edge of what was tried; a better value may lie beyond."


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{words(path)} = {short(value)}" for path, value in settings.items()) or "the spec as it is"


def _curves(findings: Findings, *, drawn: bool) -> Section:
    if not drawn:
        return Section("curves", "Over training")
    return Section("curves", "Over training", [_picture("curves", "The metric over epochs by arm", pictures.curves(findings))])


def _runs(findings: Findings, evidence: Evidence) -> Section:
    metric, unit = findings["metric"], units.unit(findings["metric"])
    rows = [
        [
            run["job"], _name(findings["arms"][run["arm"]]), str(run["seed"]), run["state"], unit.value(run["final"].get(metric)),
            units.SECONDS.value(run["seconds"]), units.JOULES.value(run["joules"]),
        ]
        for run in evidence["runs"]
    ]  # fmt: skip
    columns = ["job", "arm", "seed", "state", units.titled(metric), "seconds", "joules"]
    return Section("runs", "Every run", [Table("Runs, with their last evaluation", columns, rows, frozenset({0, 1, 3}))])


def _failures(findings: Findings, evidence: Evidence) -> Section:
    rows = [
        [run["job"], _name(findings["arms"][run["arm"]]), str(run["seed"]), run["state"], run["reason"] or NOTHING]
        for run in evidence["runs"]
        if run["state"] in ENDED_BADLY
    ]
    if not rows:
        return Section("failures", "Runs that failed", ["None."])
    text = (
        "They are in no mean. If an arm fails more often than the others, that is a result too, and its mean is of the seeds that survived."
    )
    return Section(
        "failures",
        "Runs that failed",
        [text, Table("Failed or cancelled", ["job", "arm", "seed", "state", "reason"], rows, frozenset(range(5)))],
    )


def _reading(findings: Findings) -> list[str]:
    general = [
        (
            "The value compared is that of the last epoch. The best checkpoint's would be optimistic: it was chosen by the very images it is scored on, "
            "and an arm whose curve is more restless would gain more by the choice."
        ),
    ]
    if findings["baseline"] is None:
        return [
            *general,
            "A search compares many settings by one run each. The best of many is partly luck: run it again with fresh seeds before you believe its score.",
        ]
    return [
        *general,
        ("A difference is taken seed by seed: both arms start from the same weights and see the same images in the same order. A 95 % interval is made by a "
        "procedure that covers the true mean difference in 95 of 100 experiments like this one, if differences are about normal; with few seeds "
        "it is wide, and the bootstrap's is too narrow."),
        ("A p-value is the probability of a difference at least this large if there were none. It is not the probability that the arms are "
        "equal, and a large one does not show that they are: see which difference could have been detected."),
        ("Holm's correction pays for looking at several arms: were none of them different, the chance that any one is called so stays below 5 %. "
        "An arm is called better or worse by its Holm p of the t test, below 0.05. With n seeds a two-sided Wilcoxon test cannot fall below 2 / 2ⁿ: "
        "five seeds never reach 0.05."),
        ("Detectable is the smallest true difference that so many seeds find four times in five, given the spread seen. Further seeds are those that "
        "would settle it with that power if the true difference were the one seen. Adding seeds until p falls below 0.05 makes its value untrue: decide "
        "the number first."),
        "Seeds are the only thing that varies: the spread says nothing of other data sets, networks or recipes.",
    ]  # fmt: skip


def _specs(findings: Findings, evidence: Evidence) -> Section:
    arms = [{"arm": arm["label"], "settings": arm["settings"], "tuned": arm["tuned"]} for arm in findings["arms"]]
    blocks = [
        Code("What was asked", _yaml(evidence["question"])),
        Code("The base spec", _yaml(evidence["spec"])),
        Code("The arms", _yaml(arms)),
    ]
    return Section("specs", "Specs", blocks)


def _provenance(evidence: Evidence) -> Section:
    return Section("provenance", "Provenance", [Code("Where and with what it was run", _yaml(evidence["provenance"]))])


def _yaml(value: Any) -> str:
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
    return text


def _picture(name: str, alternative: str, figure: Figure) -> Picture:
    """The figure as a part of the page: its ids are its own, for a page has several figures."""
    text = pictures.render(figure, "svg").decode()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return Picture(name, alternative, Markup(_SVG_ID.sub(rf"\g<1>{name}-", text)))  # noqa: S704  # matplotlib has escaped all text in it
