"""Changes of a question by dotted name, for a clone: `{"spec.epochs": 3, "grid.loss.alpha": [1.0, 0.3], "seeds": 7}`."""

from __future__ import annotations

import copy
from typing import Any

from powergrad.jobs import changes
from powergrad.jobs.changes import set_pointer
from powergrad.jobs.errors import InvalidSpec, Violation

MAPS = frozenset({"grid", "tune", "space", "baseline", "labels"})
"""Sections whose keys have dots of their own: all behind the section's name is one key, and null takes it out."""
SPEC = "spec"


def with_changes(question: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """A normalised question's JSON with values put in. Raises InvalidSpec where a name leads through a value that has no parts."""
    changed = copy.deepcopy(question)
    of_spec: dict[str, Any] = {}
    for dotted, value in wanted.items():
        section, dot, rest = dotted.partition(".")
        if section == SPEC and dot:
            of_spec[rest] = value
        elif section in MAPS and dot:
            changed[section] = _with_key(changed.get(section) or {}, rest, value)
        elif dot:
            inner = changed.get(section)
            if not isinstance(inner, dict) or "." in rest:
                raise InvalidSpec([Violation(set_pointer(dotted), "unknown_field", f"{section} has no such field", value)])
            inner[rest] = value
        else:
            changed[section] = value
    changed[SPEC] = _spec_with(changed[SPEC], of_spec)
    return changed


def _with_key(section: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    rest = {name: held for name, held in section.items() if name != key}
    return rest if value is None else rest | {key: value}


def _spec_with(spec: Any, of_spec: dict[str, Any]) -> Any:
    if not of_spec or not isinstance(spec, dict):
        return spec
    try:
        return changes.with_changes(spec, of_spec)
    except InvalidSpec as error:
        prefix = set_pointer("")
        raise InvalidSpec(
            [Violation(f"{prefix}{SPEC}." + one.pointer.removeprefix(prefix), one.code, one.detail, one.value) for one in error.violations]
        ) from None


def pointing_into_set(violation: Violation, wanted: dict[str, Any]) -> Violation:
    """The same rule broken, found where the caller wrote it: /spec/epochs is /set/spec.epochs."""
    for dotted in wanted:
        section, dot, rest = dotted.partition(".")
        parts = [section] if not dot else [section, rest] if section in MAPS else dotted.split(".")
        prefix = "/" + "/".join(part.replace("~", "~0").replace("/", "~1") for part in parts)
        if violation.pointer == prefix or violation.pointer.startswith(prefix + "/"):
            return Violation(set_pointer(dotted) + violation.pointer[len(prefix) :], violation.code, violation.detail, violation.value)
    return violation
