"""JSON and YAML files from anywhere: read within limits, and checked against a record's fields before they are used.

Every file is refused with one line if it is no regular file, longer than its limit, not UTF-8, nested too deeply, or
holds a key twice, NaN, an infinity, half a surrogate pair, or a value that its field's type does not admit.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from minbert.errors import UserError, did_you_mean, one_line

OPTIONS_LIMIT = 2**18  # bytes of a YAML file
OBJECT_LIMIT = 2**24  # of a JSON file
VOCABULARY_LIMIT = 2**26  # of vocab.txt and tokenizer.json
LINES_LIMIT = 2**28  # of a file with a JSON object on each line
LINE_LIMIT = 2**20  # of such a line
LARGEST_NUMBER = 1e100  # whose square is finite
LARGEST_INTEGER = 2**63 - 1

FORMAT = 2  # of what a run writes; 0.1.0 wrote 1, without saying so

Record = TypeVar("Record")
REMEDY = "copy or download it again"


# Reading -----------------------------------------------------------------------------------------------------------


def read_bytes(path: Path, limit: int, remedy: str = REMEDY, *, regular: bool = True) -> bytes:
    """A file's bytes.

    Args:
        regular: whether to refuse what is no regular file, such as a pipe, which may never end or never begin.

    Raises:
        UserError: it is missing, cannot be read, or is longer than `limit` bytes.
    """
    try:
        if regular and path.exists() and not path.is_file():
            raise UserError(f"cannot read {path} (it is no regular file); {remedy}")
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); {remedy}") from None
    except ValueError as error:  # a NUL in the name
        raise UserError(f"cannot read {path} ({error}); {remedy}") from None
    if len(content) > limit:
        raise UserError(f"cannot read {path} (it is longer than {limit} bytes, the limit for such a file); {remedy}")
    return content


def read_text(path: Path, limit: int, remedy: str = REMEDY, *, regular: bool = True) -> str:
    """A file's UTF-8 text; arguments and errors as for `read_bytes`, and an error for other bytes."""
    try:
        return read_bytes(path, limit, remedy, regular=regular).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path} (byte {error.start + 1} is not UTF-8); {remedy}") from None


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it has none, or is refused as the module says; the message is one line.
    """
    try:
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite, parse_int=_integer
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if "\\u" in text:
        _check_surrogates(value)
    return value


def read_json(path: Path, limit: int = OBJECT_LIMIT, remedy: str = REMEDY) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: there is none; the line names the file and ends with `remedy`.
    """
    text = read_text(path, limit, remedy)
    try:
        value = parse_json(text)
    except ValueError as error:
        raise UserError(f"cannot read {path} ({error}); {remedy}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not {_name(value)}; {remedy}")
    return value


def read_lines(path: Path, remedy: str = REMEDY) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    """Each line's number and JSON object, or why it is none. A blank line is none.

    Raises:
        UserError: the file is missing, no regular file, cannot be read, or is longer than `LINES_LIMIT`.
    """
    content = read_bytes(path, LINES_LIMIT, remedy)
    for number, line in enumerate(content.removesuffix(b"\n").split(b"\n") if content else (), 1):
        try:
            if len(line) > LINE_LIMIT:
                raise ValueError(f"longer than {LINE_LIMIT} bytes")
            value = parse_json(line.decode("utf-8"))
            if not isinstance(value, dict):
                raise ValueError(f"expected a JSON object, got {_name(value)}")
            yield number, value
        except UnicodeDecodeError as error:
            yield number, ValueError(f"byte {error.start + 1} is not UTF-8")
        except ValueError as error:
            yield number, error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {short(next(name for name in names if names.count(name) > 1))} twice in an object")
    return values


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {text:.40} is too large")
    return value


def _integer(text: str) -> int:
    if len(text) > 100:
        raise ValueError(f"number {text:.40} is too large")
    return int(text)


def _check_surrogates(value: Any) -> None:
    """Refuse strings with half a surrogate pair, which no UTF-8 file can hold."""
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending += [*value, *value.values()]
        elif isinstance(value, list):
            pending += value
        elif isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"{short(value)} holds half a surrogate pair")


class _Loader(yaml.SafeLoader):
    """YAML without aliases, tags and keys that stand twice; 1e-3 is a number."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            mark: Any = event.start_mark
            raise yaml.constructor.ConstructorError(None, None, "aliases are not read", mark)
        if getattr(event, "tag", None) is not None:
            raise yaml.constructor.ConstructorError(None, None, f"tag {event.tag} is not read", event.start_mark)
        return super().compose_node(parent, index)  # type: ignore[no-untyped-call]

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        values = super().construct_mapping(node, deep)
        if len(values) < len(node.value):
            mark: Any = node.start_mark
            raise yaml.constructor.ConstructorError(None, None, "a key stands twice", mark)
        return values


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":merge", ":value"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: Path, remedy: str = REMEDY, *, regular: bool = True) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file holds an empty one.

    Raises:
        UserError: there is none; the line names the file and ends with `remedy`.
    """
    text = read_text(path, OPTIONS_LIMIT, remedy, regular=regular)
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML ({error}); {remedy}") from None
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{path}: expected `option: value` lines, got {_name(value)}; {remedy}")
    return value or {}


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: it has none, or is refused as the module says; the message is one line.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}{one_line(str(error.problem))}") from None
    except yaml.YAMLError as error:
        raise ValueError(one_line(str(error).split("\n")[0])) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


# Checking ----------------------------------------------------------------------------------------------------------


def build(kind: type[Record], values: Mapping[Any, Any], where: str, *, ignore_unknown: bool = False) -> Record:
    """The record of dataclass `kind` with these values; fields that are left out have their defaults.

    Args:
        where: what the error's line starts with, such as the file's name.

    Raises:
        UserError: an unknown key, a missing one, or a value of another type than its field's, each named; or a value
            that the record itself refuses.
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
    """The value, if a field of type `kind` may have it; a mapping becomes the record that `kind` is.

    Raises:
        UserError: it may not; the line starts with `where` and names what in the value is wrong.
    """
    check = _checker(kind)
    try:
        return check(value)
    except _Unfit as unfit:
        raise UserError(f"{where}{unfit.place}: expected {unfit.expected}, got {short(unfit.got)}") from None


class _Unfit(Exception):
    def __init__(self, expected: str, got: Any, place: str = "") -> None:
        self.expected, self.got, self.place = expected, got, place


@cache
def types_of_fields(kind: type) -> dict[str, Any]:
    """The types of a dataclass's fields by their names."""
    return typing.get_type_hints(kind)


@cache
def _checker(kind: Any) -> Callable[[Any], Any]:
    """A function that returns a value that is of this kind, and raises `_Unfit` for any other."""
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
            raise _Unfit(described(kind) + limit, value)
        return value

    return check


def _union(kind: Any, options: list[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        inner = None
        for option in options:
            try:
                return option(value)
            except _Unfit as unfit:
                inner = unfit if unfit.place else inner
        raise inner or _Unfit(described(kind), value)

    return check


def _items(item: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if not isinstance(value, list):
            raise _Unfit("a list", value)
        return [_inside(f"[{number}]", item, each) for number, each in enumerate(value)]

    return check


def _entries(item: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if not isinstance(value, dict):
            raise _Unfit("a mapping", value)
        for name in value:
            if not isinstance(name, str):
                raise _Unfit("names as keys", name)
        return {name: _inside(f".{name:.40}", item, each) for name, each in value.items()}

    return check


def _nested(kind: Any) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if not isinstance(value, dict):
            raise _Unfit(f"a record of {', '.join(types_of_fields(kind))}", value)
        needed = [field.name for field in dataclasses.fields(kind) if field.default is field.default_factory]
        wrong = [name for name in value if name not in types_of_fields(kind)] + [n for n in needed if n not in value]
        if wrong:
            raise _Unfit(f"a record of {', '.join(types_of_fields(kind))}", wrong[0] if wrong[0] in value else value)
        return kind(**{name: _inside(f".{name}", _checker(types_of_fields(kind)[name]), value[name]) for name in value})

    return check


def _inside(place: str, check: Callable[[Any], Any], value: Any) -> Any:
    try:
        return check(value)
    except _Unfit as unfit:
        raise _Unfit(unfit.expected, unfit.got, place + unfit.place) from None


def described(kind: Any) -> str:
    """A field's type in words: int, one of 'a', 'b', float or dict[str, float]."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(described(argument) for argument in arguments if argument is not types.NoneType)
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    return str(kind) if origin else kind.__name__


def short(value: object) -> str:
    """A value from a file as a message shows it, in at most 60 characters."""
    if isinstance(value, dict | list):
        return _name(value)
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return one_line(text if len(text) <= 60 else text[:59] + "…")


def _name(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", types.NoneType: "null", bool: "a boolean"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


# Versions ----------------------------------------------------------------------------------------------------------


def without_format(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a file of a run holds, less its format's number.

    Raises:
        UserError: a later format than this minbert reads.
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
