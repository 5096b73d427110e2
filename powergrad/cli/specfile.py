"""Job specs as people write them: YAML or JSON, changed from the command line by dotted names."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from powergrad.cli.console import Problem

Spec = dict[str, Any]
NUMBER = re.compile(r"^[-+]?(\d[\d_]*(\.[\d_]*)?([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\.(inf|nan))$", re.IGNORECASE)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as people expect it to be: `5e-4` is a number, `2026-01-01` a text, and a key given twice an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag not in {"tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:float"}]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+0123456789."))


def read(source: str) -> Spec:
    """The spec in a file, or on standard input where `source` is "-". Raises Problem."""
    name = "standard input" if source == "-" else source
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise Problem(f"{name}: cannot be read ({why})", advice="An example to start from: powergrad init") from error
    found = parse(text, name)
    if not isinstance(found, dict):
        raise Problem(f"{name}: must hold one mapping (a job spec), not {type(found).__name__}", advice="An example: powergrad init -")
    return found


def parse(text: str, name: str) -> Any:
    """The value in a YAML or JSON text (JSON is YAML). Raises Problem with the line."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - _Loader is a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise Problem(f"{name}{where}: {error.problem or 'not YAML'}") from error
    except yaml.YAMLError as error:
        raise Problem(f"{name}: not YAML or JSON ({error})") from error


def changed(spec: Spec, settings: Iterable[str]) -> Spec:
    """`spec` with settings such as "loss.alpha=0.3" (values are YAML) put in; sections that are missing are made. Raises Problem."""
    result: Spec = copy.deepcopy(spec)
    for setting in settings:
        dotted, sign, value = setting.partition("=")
        keys = dotted.strip().split(".")
        if not sign or not all(keys):
            raise Problem(f"--set {setting}: must be NAME=VALUE with dots in the name, such as loss.alpha=0.3")
        place = result
        for key in keys[:-1]:
            inner = place.setdefault(key, {})
            if inner is None:
                inner = place[key] = {}
            if not isinstance(inner, dict):
                raise Problem(f"--set {setting}: {key} is {inner!r}, which has nothing inside it")
            place = inner
        place[keys[-1]] = parse(value, f"--set {setting}")
    return result
