"""What an arm is called: what tells it from the others, in a reader's words. Pure."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from powergrad.experiments.findings import ArmEvidence, Settings

WORDS = {"loss.alpha": "α", "optimizer.lr": "learning rate", "optimizer.adamw_lr": "AdamW learning rate", "data.dataset": "data set"}
OFF_WHEN_NULL = {"clip", "ema", "early_stopping", "telemetry", "loss.class_weights", "data.augment.policy", "model.init_from"}
"""Elsewhere null is not "none": it leaves the choice to the network or the data set."""
NEEDS_ITS_SECTION = {"value", "mode", "decay"}
LONGEST_LIST = 4


def labels(arms: Sequence[ArmEvidence], spec: Settings) -> list[str]:
    """One label an arm, no two alike: `α = 0.5, clip agc`. What an arm does not set is the base spec's; tuned values are left out."""
    told = differing(arms, spec) or _values(arms, spec)
    names = _distinct_words(list(told))
    found = [_label({path: values[row] for path, values in told.items()}, names, told) for row in range(len(arms))]
    repeated = {label for label, count in Counter(found).items() if count > 1}
    return [f"{label} (arm {arm['index']})" if label in repeated else label for label, arm in zip(found, arms, strict=True)]


def differing(arms: Sequence[ArmEvidence], spec: Settings) -> dict[str, list[Any]]:
    """The settings in which arms differ: each path with its value in every arm."""
    return {path: found for path, found in _values(arms, spec).items() if any(value != found[0] for value in found)}


def words(path: str) -> str:
    """A spec field's name in a reader's words: `optimizer.lr` is the learning rate, `model.name` the model."""
    parts = path.split(".")
    if len(parts) > 1 and parts[-1] == "name":
        parts = parts[:-1]
    last = " ".join(parts[-2:]) if parts[-1] in NEEDS_ITS_SECTION else parts[-1]
    return WORDS.get(path, last.replace("_", " "))


def short(value: Any) -> str:
    """A setting's value in few characters: on and off, numbers without trailing zeros."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int | float):
        return f"{value:.6g}" if abs(value) < 1e6 else f"{value:g}"
    if isinstance(value, list) and len(value) > LONGEST_LIST:
        return f"of {len(value)} values"
    return value if isinstance(value, str) else "none" if value is None else json.dumps(value, ensure_ascii=False)


def _values(arms: Sequence[ArmEvidence], spec: Settings) -> dict[str, list[Any]]:
    """Every path that some arm sets, in the order of their first mention, with its value in each."""
    paths = dict.fromkeys(path for arm in arms for path in arm["settings"])
    return {path: [_value(arm["settings"], spec, path) for arm in arms] for path in paths}


def _value(settings: Settings, spec: Settings, path: str) -> Any:
    """What holds at `path`: as set there, inside a section that is set, or in the base spec; None where it is nowhere."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        if (section := ".".join(parts[:length])) in settings:
            return _below(settings[section], parts[length:])
    return _below(spec, parts)


def _below(value: Any, parts: list[str]) -> Any:
    for part in parts:
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _distinct_words(paths: list[str]) -> dict[str, str]:
    """Each path in words; the whole path where the short form would name two."""
    count = Counter(words(path) for path in paths)
    return {path: words(path) if count[words(path)] == 1 else path.replace(".", " ").replace("_", " ") for path in paths}


def _label(values: Settings, names: Mapping[str, str], peers: Mapping[str, list[Any]]) -> str:
    """What is switched off goes without saying, where anything else is said."""
    on = {path: value for path, value in values.items() if value is not None or path not in OFF_WHEN_NULL} or values
    return ", ".join(_said(path, names[path], value, peers[path]) for path, value in on.items()) or "the spec as it is"


def _said(path: str, name: str, value: Any, peers: list[Any]) -> str:
    if value is None:
        return f"no {name}" if path in OFF_WHEN_NULL else f"{name} by default"
    if isinstance(value, dict):
        return f"{name} = {_schedule(value)}" if {"start", "end"} <= value.keys() else f"{name} {_section(value, peers)}"
    return f"{name} = {short(value)}" if isinstance(value, int | float) and not isinstance(value, bool) else f"{name} {short(value)}"


def _schedule(value: dict[str, Any]) -> str:
    epochs = f" over {short(value['epochs'])} epochs" if value.get("epochs") is not None else ""
    shape = f", {value['shape']}" if value.get("shape", "linear") != "linear" else ""
    return f"{short(value['start'])} → {short(value['end'])}{epochs}{shape}"


def _section(value: dict[str, Any], peers: list[Any]) -> str:
    """`agc`, or `agc 0.01` where another arm has the same kind with another bound; `on` where nothing more needs saying."""
    kind = _kind(value)
    alike = [peer for peer in peers if isinstance(peer, dict) and _kind(peer) == kind]
    keys = [key for key in value if key not in {"name", "mode"} and any(peer.get(key) != value[key] for peer in alike)]
    told = [short(value[key]) if key == "value" else f"{key.replace('_', ' ')} {short(value[key])}" for key in keys]
    return " ".join([kind, *told] if kind else told) or "on"


def _kind(section: dict[str, Any]) -> str:
    return str(section.get("name") or section.get("mode") or "")
