"""Changes of a spec by dotted name: `{"loss.alpha": 0.3}`, and the way back from a rule that is broken to the change that broke it."""

from __future__ import annotations

import copy
from typing import Any

from powergrad.jobs.errors import InvalidSpec, Violation


def with_changes(spec: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A spec's JSON with values put in by dotted name. Raises InvalidSpec where a name leads through a value that has no parts."""
    changed = copy.deepcopy(spec)
    for section in ("optimizer", "schedule"):
        name = changes.get(f"{section}.name")
        if name is not None and name != spec[section]["name"]:
            changed[section] = {}  # the fields of the old kind mean nothing to the new one
    for dotted, value in changes.items():
        *path, last = _parts_of(dotted)
        place = changed
        for part in path:
            if place.get(part) is None:
                place[part] = {}
            place = place[part]
            if not isinstance(place, dict):
                raise InvalidSpec([Violation(set_pointer(dotted), "unknown_field", f"{part} has no fields", value)])
        place[last] = value
    return changed


def _parts_of(dotted: str) -> list[str]:
    return dotted.split(".", 1) if dotted.startswith("labels.") else dotted.split(".")


def pointing_into_set(violation: Violation, changes: dict[str, Any]) -> Violation:
    """The same rule broken, found where the caller wrote it: /loss/alpha is /set/loss.alpha."""
    for dotted in changes:
        prefix = "/" + "/".join(_escaped(part) for part in _parts_of(dotted))
        if violation.pointer == prefix or violation.pointer.startswith(prefix + "/"):
            return Violation(set_pointer(dotted) + violation.pointer[len(prefix) :], violation.code, violation.detail, violation.value)
    return violation


def set_pointer(dotted: str) -> str:
    return f"/set/{_escaped(dotted)}"


def _escaped(part: str) -> str:
    return part.replace("~", "~0").replace("/", "~1")
