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


def build(kind: type[Record], values: Mapping[Any, Any], where: str) -> Record:
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
        if name not in fields:
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
    try:
        return _check(value, kind)
    except _Mismatch as mismatch:
        raise UserError(f"{where}{mismatch.path}: expected {mismatch.expected}, got {short(mismatch.got)}") from None


class _Mismatch(Exception):
    def __init__(self, expected: str, got: Any, path: str) -> None:
        self.expected, self.got, self.path = expected, got, path


@cache
def types_of_fields(kind: type) -> dict[str, Any]:
    """The types of a dataclass's fields by their names."""
    return typing.get_type_hints(kind)


_SIMPLE: dict[Any, Callable[[Any], bool]] = {
    bool: lambda value: isinstance(value, bool),
    int: lambda value: type(value) is int and abs(value) <= LARGEST_INTEGER,  # False for True
    float: lambda value: type(value) in (int, float) and abs(value) <= LARGEST_NUMBER,  # False for NaN
    str: lambda value: isinstance(value, str),
    types.NoneType: lambda value: value is None,
}
_LIMITS: dict[Any, float] = {int: LARGEST_INTEGER, float: LARGEST_NUMBER}
_UNIONS = (types.UnionType, typing.Union)


def _check(value: Any, kind: Any, path: str = "") -> Any:
    """`checked` for the part of a value at `path`; raises `_Mismatch`."""
    if kind is Any:
        return value
    if kind in _SIMPLE:
        if not _SIMPLE[kind](value):
            limit = f" of at most {_LIMITS[kind]:g}" if kind in _LIMITS and type(value) in (int, kind) else ""
            raise _Mismatch(described(kind) + limit, value, path)
        return float(value) if kind is float else value
    if dataclasses.is_dataclass(kind):
        return _check_record(value, kind, path)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in _UNIONS:
        inner = None
        for argument in arguments:
            try:
                return _check(value, argument, path)
            except _Mismatch as mismatch:
                inner = mismatch if mismatch.path != path else inner
        raise inner or _Mismatch(described(kind), value, path)
    if origin is Literal:
        if not (isinstance(value, str) and value in arguments):
            raise _Mismatch(described(kind), value, path)
        return value
    if not isinstance(value, origin):
        raise _Mismatch("a list" if origin is list else "a mapping", value, path)
    if origin is list:
        return [_check(each, arguments[0], f"{path}[{number}]") for number, each in enumerate(value)]
    for name in value:
        if not isinstance(name, str):
            raise _Mismatch("names as keys", name, path)
    return {name: _check(each, arguments[1], f"{path}.{name:.40}") for name, each in value.items()}


def _check_record(value: Any, kind: Any, path: str) -> Any:
    types_of = types_of_fields(kind)
    expected = f"a record of {', '.join(types_of)}"
    if not isinstance(value, dict):
        raise _Mismatch(expected, value, path)
    needed = [field.name for field in dataclasses.fields(kind) if field.default is field.default_factory]
    wrong = [name for name in value if name not in types_of] + [name for name in needed if name not in value]
    if wrong:
        raise _Mismatch(expected, wrong[0] if wrong[0] in value else value, path)
    return kind(**{name: _check(each, types_of[name], f"{path}.{name}") for name, each in value.items()})


def described(kind: Any) -> str:
    """A field's type for messages: int, one of 'a', 'b', float or dict[str, float]."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in _UNIONS:
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
