"""Job specs as people write them: YAML or JSON, changed from the command line by dotted names."""

from __future__ import annotations

import copy
import itertools
import math
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from powergrad.cli.console import Code, Problem

Spec = dict[str, Any]
DEEPEST = 32  # levels; a spec has four
MOST_VALUES = 100_000  # an alias of an alias of an alias grows without end
NUMBER = re.compile(r"^[-+]?(\d[\d_]*(\.[\d_]*)?([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\.(inf|nan))$", re.IGNORECASE)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as people expect it to be: `5e-4` is a number, `2026-01-01` a text, and a key given twice an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a single word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag not in {"tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:float"}]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+0123456789."))


def read(source: str, *, kind: str = "a job spec") -> Spec:
    """The spec in a file, or on standard input where `source` is "-". kind: what it is to hold, for messages. Raises Problem."""
    name = "standard input" if source == "-" else source
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise Problem(f"{name}: cannot be read ({why})", advice="An example to start from: powergrad init", code=Code.USAGE) from error
    found = parse(text, name)
    if not isinstance(found, dict):
        wrong = f"{name}: must hold one mapping ({kind}), not {type(found).__name__}"
        raise Problem(wrong, advice="An example: powergrad init -", code=Code.USAGE)
    return found


def parse(text: str, name: str) -> Any:
    """The value in a YAML or JSON text (JSON is YAML), as JSON knows it. Raises Problem with the line."""
    try:
        found = yaml.load(text, _Loader)  # noqa: S506 - _Loader is a SafeLoader
        _check_json(found, itertools.count(1), path=(), inside=())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise Problem(f"{name}{where}: {error.problem or 'not YAML'}", code=Code.USAGE) from error
    except yaml.YAMLError as error:
        raise Problem(f"{name}: not YAML or JSON ({error})", code=Code.USAGE) from error
    except _NotJsonError as error:
        raise Problem(f"{name}: {error}", code=Code.USAGE) from error
    except RecursionError as error:
        raise Problem(f"{name}: nested deeper than {DEEPEST} levels", code=Code.USAGE) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # what PyYAML lets through: `!!int x`, `!!timestamp x`
        raise Problem(f"{name}: holds a value that is not of its type ({error})", code=Code.USAGE) from error
    return found


class _NotJsonError(Exception):
    """A value that YAML knows and JSON does not; the message has its place."""


def _check_json(value: Any, count: Iterator[int], *, path: tuple[str, ...], inside: tuple[int, ...]) -> None:
    """Raises _NotJsonError for what cannot be sent: nan, dates, bytes, what holds itself. inside: ids of the containers around `value`."""
    where = ".".join(path) or "the whole"
    if next(count) > MOST_VALUES:
        raise _NotJsonError(f"more than {MOST_VALUES:,} values")
    if id(value) in inside:
        raise _NotJsonError(f"{where}: refers to itself")
    if len(path) > DEEPEST:
        raise _NotJsonError(f"nested deeper than {DEEPEST} levels")
    if isinstance(value, float) and not math.isfinite(value):
        raise _NotJsonError(f"{where}: must be a finite number, not {value}")
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in pairs:
            if not isinstance(key, str | int | float | None):
                raise _NotJsonError(f"{where}: {key!r} cannot be a key")
            _check_json(inner, count, path=(*path, str(key)), inside=(*inside, id(value)))
    elif not isinstance(value, str | int | float | None):
        raise _NotJsonError(f"{where}: must be text, a number, true, false or null, not {type(value).__name__}")


def changed(spec: Spec, settings: Iterable[str]) -> Spec:
    """`spec` with settings such as "loss.alpha=0.3" (values are YAML) put in; sections that are missing are made. Raises Problem."""
    result: Spec = copy.deepcopy(spec)
    for setting in settings:
        dotted, sign, value = setting.partition("=")
        keys = dotted.strip().split(".")
        if not sign or not all(keys):
            wrong = f"--set {setting}: must be NAME=VALUE with dots in the name, such as loss.alpha=0.3"
            raise Problem(wrong, code=Code.USAGE)
        place = result
        for key in keys[:-1]:
            inner = place.setdefault(key, {})
            if inner is None:
                inner = place[key] = {}
            if not isinstance(inner, dict):
                raise Problem(f"--set {setting}: {key} is {inner!r}, which has nothing inside it", code=Code.USAGE)
            place = inner
        place[keys[-1]] = parse(value, f"--set {setting}")
    return result
