"""What was probably meant by a name that there is none of: a name that is known, or a field of a spec."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from types import UnionType
from typing import Annotated, Any, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel, Tag
from typing_extensions import TypeAliasType

SHOWN = 64  # characters of a name that an error repeats
MOST_LISTED = 20
DEEPEST = 8  # levels below a spec: none of them holds itself


def name(unknown: str, known: Collection[str]) -> str:
    """`unknown name 'digit'; did you mean 'digits'?`, or what is known."""
    near = difflib.get_close_matches(unknown[:SHOWN], known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known)[:MOST_LISTED])}"
    return f"unknown name {unknown[:SHOWN]!r}; {hint}"


def field(root: type[BaseModel], location: Sequence[str | int]) -> str | None:
    """The field meant by one that is none, at pydantic's location: of the same part by its bare name, of another one by its dotted path."""
    *path, unknown = location
    return _of(str(unknown), sorted(_fields(root, path)), paths(root))


def path(root: type[BaseModel], unknown: str) -> str | None:
    """The dotted path meant by one that begins with no field of `root`."""
    section, dot, rest = unknown.partition(".")
    near = _of(section, sorted(root.model_fields), () if dot else paths(root))
    return None if near is None else near + dot + rest


def _of(unknown: str, beside: Sequence[str], everywhere: Sequence[str]) -> str | None:
    near = difflib.get_close_matches(unknown[:SHOWN], beside, n=1)
    elsewhere = [one for one in everywhere if one.rpartition(".")[2] == unknown]
    return next(iter([*near, *elsewhere]), None)


@cache
def paths(root: type[BaseModel]) -> tuple[str, ...]:
    """The dotted paths of all fields, in the order of the spec: of a union, those of each of its members."""
    return tuple(dict.fromkeys(_paths(root, DEEPEST)))


def _paths(model: type[BaseModel], depth: int) -> Iterator[str]:
    for field_name, info in model.model_fields.items():
        yield field_name
        for _, kind in _members(info.annotation):
            if depth and _is_model(kind):
                yield from (f"{field_name}.{inner}" for inner in _paths(kind, depth - 1))


def _fields(root: type[BaseModel], location: Sequence[str | int]) -> set[str]:
    kinds: list[tuple[str, Any]] = [("", root)]
    for part in location:
        named = [(tag, kind) for tag, kind in kinds if tag == part]
        if named:  # pydantic's own remark which member of a union it speaks of
            kinds = named
            continue
        kinds = [inner for _, kind in kinds for inner in _inside(kind, part)]
    return {one for _, kind in kinds if _is_model(kind) for one in kind.model_fields}


def _inside(kind: Any, part: str | int) -> Iterator[tuple[str, Any]]:
    if _is_model(kind):
        info = kind.model_fields.get(str(part))
        yield from _members(None if info is None else info.annotation)
    elif get_args(kind):  # of a list or a map the last one says what is in it
        yield from _members(get_args(kind)[-1])


def _is_model(kind: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _members(annotation: Any, tag: str | None = None) -> Iterator[tuple[str, Any]]:
    """The kinds that a value may be of, each with the name that pydantic's locations give it."""
    if isinstance(annotation, TypeAliasType):
        yield from _members(annotation.__value__, tag)
    elif get_origin(annotation) is Annotated:
        inner, *remarks = get_args(annotation)
        tags = [str(one.tag) for one in remarks if isinstance(one, Tag)]
        yield from _members(inner, tags[0] if tags else tag)
    elif get_origin(annotation) in (Union, UnionType):
        for one in get_args(annotation):
            yield from _members(one, tag)
    else:
        yield tag or str(getattr(annotation, "__name__", "")), annotation
