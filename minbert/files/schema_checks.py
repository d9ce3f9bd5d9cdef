"""Validation of values from files against the types of a dataclass."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal, TypeVar

from minbert.errors import UserError, did_you_mean
from minbert.files.json_yaml import short

LARGEST_NUMBER = 1e100  # whose square is finite
LARGEST_INTEGER = 2**63 - 1

FORMAT = 2  # of a run's files; 0.1.0 wrote 1, without a number

Record = TypeVar("Record")


def build(kind: type[Record], values: Mapping[Any, Any], where: str, *, ignore_unknown: bool = False) -> Record:
    """An instance of dataclass `kind` with these values; missing fields have their defaults.

    Args:
        where: the start of an error message, such as the file's name.

    Raises:
        UserError: an unknown key, a missing one, or a value of another type than its field's, each named; or a value
            that the dataclass refuses.
    """
    types_of = types_of_fields(kind)  # type: ignore[arg-type]
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in values:
        if name not in fields and not ignore_unknown:
            raise UserError(f"{where}: unknown {short(name)}{did_you_mean(str(name), list(fields))}")
    given = {}
    for name, field in fields.items():
        if name in values:
            given[name] = checked(values[name], types_of[name], f"{where}: {name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}: no {name}")
    try:
        return kind(**given)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def checked(value: Any, kind: Any, where: str) -> Any:
    """The value, if it is of type `kind`; a mapping becomes the dataclass `kind`.

    Raises:
        UserError: it is not; the message starts with `where` and names the wrong part.
    """
    check = _checker(kind)
    try:
        return check(value)
    except _Mismatch as mismatch:
        raise UserError(f"{where}{mismatch.path}: expected {mismatch.expected}, got {short(mismatch.got)}") from None


class _Mismatch(Exception):
    def __init__(self, expected: str, got: Any, path: str = "") -> None:
        self.expected, self.got, self.path = expected, got, path


@cache
def types_of_fields(kind: type) -> dict[str, Any]:
    """The types of a dataclass's fields by their names."""
    return typing.get_type_hints(kind)


@cache
def _checker(kind: Any) -> Callable[[Any], Any]:
    """A function that returns a value of type `kind`, and raises `_Mismatch` for any other."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return _union(kind, [_checker(argument) for argument in arguments])
    if origin is Literal:
        return _when(kind, lambda value: isinstance(value, str) and value in arguments)
    if origin is list:
        return _items(_checker(arguments[0]))
    if origin is dict:
        return _entries(_checker(arguments[1]))
    if dataclasses.is_dataclass(kind):
        return _nested(kind)
    return _when(kind, _SIMPLE[kind])


_SIMPLE: dict[Any, Callable[[Any], bool]] = {
    bool: lambda value: isinstance(value, bool),
    int: lambda value: type(value) is int and abs(value) <= LARGEST_INTEGER,  # False for True
    float: lambda value: type(value) in (int, float) and abs(value) <= LARGEST_NUMBER,  # False for NaN
    str: lambda value: isinstance(value, str),
    types.NoneType: lambda value: value is None,
}


_LIMITS: dict[Any, float] = {int: LARGEST_INTEGER, float: LARGEST_NUMBER}


def _when(kind: Any, holds: Callable[[Any], bool]) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if not holds(value):
            limit = f" of at most {_LIMITS[kind]:g}" if kind in _LIMITS and type(value) in (int, kind) else ""
            raise _Mismatch(described(kind) + limit, value)
        return float(value) if kind is float else value

    return check


def _union(kind: Any, options: list[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        inner = None
        for option in options:
            try:
                return option(value)
            except _Mismatch as mismatch:
                inner = mismatch if mismatch.path else inner
        raise inner or _Mismatch(described(kind), value)

    return check


def _items(item: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if not isinstance(value, list):
            raise _Mismatch("a list", value)
        return [_inside(f"[{number}]", item, each) for number, each in enumerate(value)]

    return check


def _entries(item: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if not isinstance(value, dict):
            raise _Mismatch("a mapping", value)
        for name in value:
            if not isinstance(name, str):
                raise _Mismatch("names as keys", name)
        return {name: _inside(f".{name:.40}", item, each) for name, each in value.items()}

    return check


def _nested(kind: Any) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if not isinstance(value, dict):
            raise _Mismatch(f"a record of {', '.join(types_of_fields(kind))}", value)
        needed = [field.name for field in dataclasses.fields(kind) if field.default is field.default_factory]
        wrong = [name for name in value if name not in types_of_fields(kind)] + [n for n in needed if n not in value]
        if wrong:
            raise _Mismatch(f"a record of {', '.join(types_of_fields(kind))}", wrong[0] if wrong[0] in value else value)
        return kind(**{name: _inside(f".{name}", _checker(types_of_fields(kind)[name]), value[name]) for name in value})

    return check


def _inside(path: str, check: Callable[[Any], Any], value: Any) -> Any:
    try:
        return check(value)
    except _Mismatch as mismatch:
        raise _Mismatch(mismatch.expected, mismatch.got, path + mismatch.path) from None


def described(kind: Any) -> str:
    """A field's type for messages: int, one of 'a', 'b', float or dict[str, float]."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(described(argument) for argument in arguments if argument is not types.NoneType)
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    return str(kind) if origin else kind.__name__


# Versions ----------------------------------------------------------------------------------------------------------


def without_format(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of a run's file without its format number.

    Raises:
        UserError: a later format than minbert reads.
    """
    values = dict(values)
    number = values.pop("format", 1)
    if type(number) is not int or number < 1:
        raise UserError(f"{where}: format: expected a whole number from 1 on, got {short(number)}")
    if number > FORMAT:
        raise UserError(
            f"{where} has format {short(number)}, and this minbert reads formats up to {FORMAT}; use a later minbert"
        )
    return values
