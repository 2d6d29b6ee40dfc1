"""Plain YAML values -> frozen dataclasses, checked against the field types. One plain line for every mistake."""

import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TypeVar

import yaml

from inplace_ttt.errors import UserError

T = TypeVar("T")
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


class RecipeError(UserError):
    """A recipe that cannot be run: says which setting is wrong and what to write instead."""


def build(cls: type[T], values: object, where: str = "") -> T:
    """Build the dataclass ``cls`` from a mapping. ``where`` names the place in messages ("data.train").

    A class attribute ``shorthand`` names the field that a bare value is for.
    """
    if (shorthand := getattr(cls, "shorthand", None)) and isinstance(values, str | list):
        values = {shorthand: values}
    if not isinstance(values, Mapping):
        raise RecipeError(f"{where or 'the recipe'}: expected settings (key: value), got {_shown(values)}")
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls)) if field.init}
    for key in values:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, 1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(fields)}"
            raise RecipeError(f"{_join(where, key)}: no such setting, {hint}")
    for name, field in fields.items():
        if name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise RecipeError(f"{_join(where, name)}: missing")
    hints = typing.get_type_hints(cls, include_extras=True)
    return cls(**{key: convert(hints[key], value, _join(where, key)) for key, value in values.items()})


def convert(kind: Any, value: object, where: str) -> Any:
    """Return ``value`` as the annotated type ``kind``; ``Annotated[int, 1]``: at least 1. Raises RecipeError."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is typing.Annotated:
        number = convert(inside[0], value, where)
        if not number >= inside[1]:
            raise RecipeError(f"{where}: {number} is too small, it must be at least {inside[1]}")
        return number
    if origin in (types.UnionType, typing.Union):
        if value is None and types.NoneType in inside:
            return None
        *arms, last = (arm for arm in inside if arm is not types.NoneType)
        for arm in arms:
            with suppress(RecipeError):
                return convert(arm, value, where)
        return convert(last, value, where)
    if origin is typing.Literal:
        if value not in inside:
            raise RecipeError(f"{where}: {_shown(value)} is not one of {', '.join(map(str, inside))}")
        return value
    if dataclasses.is_dataclass(kind):
        return build(typing.cast(type, kind), value, where)
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise RecipeError(f"{where}: expected a list, got {_shown(value)}")
        return tuple(convert(inside[0], item, f"{where}[{i}]") for i, item in enumerate(items))
    if kind is dict or origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise RecipeError(f"{where}: expected settings (key: value), got {_shown(value)}")
        item_kind = inside[1] if inside else Any
        return {str(key): convert(item_kind, item, _join(where, key)) for key, item in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
        return value
    raise RecipeError(f"{where}: expected {_WORDS.get(kind, kind.__name__)}, got {_shown(value)}")


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, with 2e-3 and 1e6 as numbers (YAML 1.1 wants a dot and a sign there)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load_yaml(text: str) -> Any:
    """Return the plain values of a YAML text. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


def expand_variables(value: Any, where: str = "", optional: str | None = None) -> Any:
    """Replace ``${NAME}`` in every text by the environment variable. Raises RecipeError for one that is not set.

    ``optional``: a setting in which an unset variable stays as it is.
    """
    if isinstance(value, Mapping):
        return {key: expand_variables(item, _join(where, key), optional) for key, item in value.items()}
    if isinstance(value, list):
        return [expand_variables(item, where, optional) for item in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        found = os.environ.get(match[1]) or (match[0] if where.split(".")[0] == optional else "")
        if not found:
            raise RecipeError(f"{where}: the environment variable {match[1]} is not set: export {match[1]}=...")
        return found

    return re.sub(r"\$\{(\w+)\}", replace, value)


def _join(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)


def _shown(value: object) -> str:
    return "nothing" if value is None else repr(value)[:80]
