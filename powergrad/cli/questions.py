"""Questions for `powergrad experiment`: read from a file and changed by dotted names, or built from a job spec and what is to be varied."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from powergrad.cli import specfile
from powergrad.cli.console import Code, Problem
from powergrad.jobs.experiments.changes import MAPS, SPEC

Question = dict[str, Any]


def changed(question: Question, settings: Iterable[str]) -> Question:
    """The question with settings such as "spec.epochs=3" or "grid.loss.alpha=[1, 0.5]" put in; a null takes a key out. Raises Problem."""
    result: Question = dict(question)
    rest: list[str] = []
    for setting in settings:
        section, dot, key = name_of(setting, option="--set").partition(".")
        if section in MAPS and dot:
            result[section] = _with_key(result.get(section), key, setting)
        elif section == SPEC and dot:
            result[SPEC] = specfile.changed(_mapping(result.get(SPEC), setting), [setting.removeprefix(f"{SPEC}.")])
        else:
            rest.append(setting)
    return specfile.changed(result, rest)


def parsed(settings: Iterable[str]) -> dict[str, Any]:
    """The same as a clone's changes: {"spec.epochs": 3}. Raises Problem."""
    return {name_of(setting, option="--set"): specfile.parse(setting.partition("=")[2], f"--set {setting}") for setting in settings}


def lists(settings: Iterable[str], *, option: str) -> dict[str, list[Any]]:
    """{"loss.alpha": [1, 0.5]} of "loss.alpha=1,0.5"; each value is YAML, so that `clip={mode: agc, value: 0.01},null` is one too."""
    found: dict[str, list[Any]] = {}
    for setting in settings:
        name = name_of(setting, option=option)
        if name in found:
            raise Problem(f"{option} {setting}: {name} is given twice; its values go into one, with commas", code=Code.USAGE)
        found[name] = specfile.parse(f"[{setting.partition('=')[2]}]", f"{option} {setting}")
    return found


def values(settings: Iterable[str], *, option: str) -> dict[str, Any]:
    """{"loss.alpha": 1} of "loss.alpha=1"."""
    return {name_of(setting, option=option): specfile.parse(setting.partition("=")[2], f"{option} {setting}") for setting in settings}


def name_of(setting: str, *, option: str) -> str:
    name, sign, value = setting.partition("=")
    if not sign or not value or not all(name.strip().split(".")):
        raise Problem(f"{option} {setting}: must be NAME=VALUE with dots in the name, such as loss.alpha=1,0.5", code=Code.USAGE)
    return name.strip()


def _with_key(section: Any, key: str, setting: str) -> dict[str, Any]:
    value = specfile.parse(setting.partition("=")[2], f"--set {setting}")
    rest = {name: held for name, held in _mapping(section, setting).items() if name != key}
    return rest if value is None else rest | {key: value}


def _mapping(value: Any, setting: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Problem(f"--set {setting}: {value!r} has nothing inside it", code=Code.USAGE)
    return value
