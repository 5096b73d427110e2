"""How answers look in a notebook: small tables of plain HTML, every value escaped, no script, no style sheet of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from typing import TYPE_CHECKING, Any

from powergrad.experiments.units import NOTHING, p_value, unit

if TYPE_CHECKING:
    from powergrad.client.models import Arm, ExperimentView, Job

COLOURS = {
    "queued": "#0e7490",
    "running": "#1d4ed8",
    "pausing": "#a16207",
    "paused": "#a16207",
    "cancelling": "#a21caf",
    "cancelled": "#a21caf",
    "succeeded": "#15803d",
    "failed": "#b91c1c",
}
"""Of states, as the command line has them; each reaches 4.5:1 on white and is a word beside it on any ground."""
SHOWN_ROWS = 20


def job(one: Job) -> str:
    """A job: what it is, how far, its scores, and why it failed if it did."""
    facts = [("job", _code(one.id)), ("state", _state(one.state)), ("progress", _progress(one))]
    if one.reason is not None:
        told = f"{one.reason.code}: {one.reason.detail}" if one.reason.detail else one.reason.code
        facts.append(("reason", escape(told) + (f"<br><i>{escape(one.reason.hint)}</i>" if one.reason.hint else "")))
    facts += [(escape(name), _score(name, one)) for name in sorted(one.metrics.latest.keys() | one.metrics.best.keys())]
    if one.labels:
        facts.append(("labels", escape(", ".join(f"{key}={value}" for key, value in one.labels.items()))))
    if one.notes:
        facts.append(("notes", escape(one.notes)))
    rows = "".join(f'<tr><th style="text-align:left">{name}</th><td style="text-align:left">{value}</td></tr>' for name, value in facts)
    return f"<div><b>{escape(one.name or one.id)}</b><table>{rows}</table></div>"


def jobs(found: Sequence[Job], *, has_more: bool) -> str:
    """A row per job."""
    cells = (
        (
            _code(one.id),
            escape(one.name or NOTHING),
            _state(one.state),
            _progress(one),
            _value("val_top1", one.metrics.best),
            _when(one.created_at),
        )
        for one in found
    )
    return _table(("job", "name", "state", "progress", "best val_top1", "created"), cells) + (
        _small("… and older ones") if has_more else ""
    )


def experiment(view: ExperimentView) -> str:
    """The verdict first, then what to know before it is believed, then a row per arm."""
    head = f"<b>{escape(view.name or view.id)}</b> {_code(view.id)} {_state(view.state)}"
    runs = f"{view.progress.runs_done} of {view.progress.runs} runs"
    verdict = f"<p><b>{escape(view.verdict)}</b></p>" if view.verdict else f"<p>no verdict yet ({runs})</p>"
    warnings = "".join(f"<li>{escape(warning)}</li>" for warning in view.warnings)
    metric = str(view.spec.get("metric") or "val_top1")
    rows = (_arm_cells(arm, view, metric) for arm in view.arms)
    table = _table(("arm", "runs", f"mean {metric}", "difference (95 %)", "p (Holm)"), rows)
    return f"<div>{head}{verdict}{f'<ul>{warnings}</ul>' if warnings else ''}{table}</div>"


def experiments(found: Sequence[ExperimentView], *, has_more: bool) -> str:
    """A row per experiment."""
    cells = (
        (
            _code(view.id),
            escape(view.name or NOTHING),
            _state(view.state),
            f"{view.progress.runs_done}/{view.progress.runs}",
            escape(view.verdict or NOTHING),
        )
        for view in found
    )
    return _table(("experiment", "name", "state", "runs", "verdict"), cells) + (_small("… and older ones") if has_more else "")


def columns(found: Mapping[str, Sequence[Any]]) -> str:
    """The first and last rows of columns of equal length."""
    length = max((len(values) for values in found.values()), default=0)
    shown = range(length) if length <= SHOWN_ROWS else [*range(SHOWN_ROWS // 2), *range(length - SHOWN_ROWS // 2, length)]
    rows = ([escape(_number(values[place])) for values in found.values()] for place in shown)
    return _table(tuple(found), rows) + _small(f"{length:,} rows × {len(found)} columns")


def _arm_cells(arm: Arm, view: ExperimentView, metric: str) -> list[str]:
    measured, found = unit(metric), arm.difference
    runs = f"{arm.counts.get('succeeded', 0)}/{sum(arm.counts.values())}"
    mean = NOTHING if arm.mean is None else measured.value(arm.mean)
    if arm.mean is not None and arm.low is not None and arm.high is not None:
        mean += f" ± {measured.value((arm.high - arm.low) / 2)}"
    if found is None or found.mean is None:
        difference = "baseline" if arm.index == view.baseline else NOTHING
    else:
        difference = measured.difference(found.mean)
        if found.low is not None and found.high is not None:
            difference += f" ({measured.difference(found.low)} to {measured.difference(found.high)})"
    return [escape(arm.label), runs, mean, difference, NOTHING if found is None else escape(p_value(found.p_t_holm))]


def _table(titles: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """Titles are plain text, cells HTML."""
    head = "".join(f'<th style="text-align:left">{escape(title)}</th>' for title in titles)
    body = "".join("<tr>" + "".join(f'<td style="text-align:left">{cell}</td>' for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _small(text: str) -> str:
    return f"<small>{escape(text)}</small>"


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _state(name: str) -> str:
    return f'<span style="color:{COLOURS.get(str(name), "inherit")}">{escape(str(name))}</span>'


def _progress(one: Job) -> str:
    fraction = 1.0 if one.state == "succeeded" else one.progress.fraction or 0.0
    epochs = f" {one.progress.epochs} epochs" if one.progress.epochs else ""
    return f'<progress max="1" value="{fraction:.3f}"></progress> {100 * fraction:.0f} %{epochs}'


def _score(name: str, one: Job) -> str:
    return f"{_value(name, one.metrics.latest)} <small>(best checkpoint: {_value(name, one.metrics.best)})</small>"


def _value(name: str, values: Mapping[str, float | None]) -> str:
    measured, found = unit(name), values.get(name)
    return NOTHING if found is None else f"{measured.value(found)} {measured.name}".rstrip()


def _when(moment: datetime | None) -> str:
    return NOTHING if moment is None else f"{moment:%Y-%m-%d %H:%M} UTC"


def _number(value: Any) -> str:
    return NOTHING if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
