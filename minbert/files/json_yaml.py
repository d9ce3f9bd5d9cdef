"""Reads JSON and YAML files from any source, within limits.

A file is refused with one line if it is no regular file, longer than its limit, not UTF-8, nested too deeply, or holds
a key twice; JSON also if it holds NaN, a number that is not finite, or half a surrogate pair.
"""

from __future__ import annotations

import json
import math
import re
import types
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import yaml

from minbert.errors import UserError, one_line

OPTIONS_LIMIT = 2**18  # bytes of a YAML file
OBJECT_LIMIT = 2**24  # of a JSON file
VOCABULARY_LIMIT = 2**26  # of vocab.txt, tokenizer.json and report.html
LINES_LIMIT = 2**28  # of a file with a JSON object on each line
LINE_LIMIT = 2**20  # of such a line

REMEDY = "copy or download it again"


def read_bytes(path: Path, limit: int, remedy: str = REMEDY, *, regular: bool = True) -> bytes:
    """A file's bytes.

    Args:
        regular: whether to refuse anything but a regular file: reading a pipe may never end.

    Raises:
        UserError: it is missing, cannot be read, or is longer than `limit` bytes.
    """
    try:
        if regular and path.exists() and not path.is_file():
            raise UserError(f"cannot read {path} (it is no regular file); {remedy}")
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except (OSError, ValueError) as error:  # a ValueError for a NUL in the name
        raise UserError(f"cannot read {path} ({getattr(error, 'strerror', error)}); {remedy}") from None
    if len(content) > limit:
        raise UserError(f"cannot read {path} (it is longer than {limit} bytes, the limit for such a file); {remedy}")
    return content


def read_text(path: Path, limit: int, remedy: str = REMEDY, *, regular: bool = True) -> str:
    """A file's UTF-8 text; arguments and errors as for `read_bytes`, and an error for other bytes."""
    try:
        return read_bytes(path, limit, remedy, regular=regular).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path} (byte {error.start + 1} is not UTF-8); {remedy}") from None


def parse_json(text: str, *, strict: bool = True) -> Any:
    """The value of a JSON text.

    Args:
        strict: whether to refuse numbers that are not finite and half surrogate pairs, which users' data may hold.

    Raises:
        ValueError: it is not JSON, or is refused; the message is one line.
    """
    numbers: dict[str, Any] = {"parse_constant": _no_constant, "parse_float": _finite, "parse_int": _integer}
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, **numbers if strict else {})
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if strict and "\\u" in text:
        _check_surrogates(value)
    return value


def parse_object(text: str, expected: str = "a JSON object", *, strict: bool = True) -> dict[str, Any]:
    """The JSON object of a text; arguments as for `parse_json`.

    Args:
        expected: the kind of object, for messages.

    Raises:
        ValueError: it is not JSON, is refused, or is no object; the message is one line.
    """
    try:
        value = parse_json(text, strict=strict)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected {expected}, got {name_of_type(value)}")
    return value


def read_json(path: Path, remedy: str = REMEDY) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: the file cannot be read; the message names it and ends with `remedy`.
    """
    text = read_text(path, OBJECT_LIMIT, remedy)
    try:
        return parse_object(text)
    except ValueError as error:
        raise UserError(f"cannot read {path} ({error}); {remedy}") from None


def read_json_lines(path: Path, remedy: str = REMEDY) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    """Each line's number and its JSON object, or the error of a line that is none, such as a blank one.

    Raises:
        UserError: the file is missing, no regular file, cannot be read, or is longer than `LINES_LIMIT`.
    """
    content = read_bytes(path, LINES_LIMIT, remedy)
    for number, line in enumerate(content.removesuffix(b"\n").split(b"\n") if content else (), 1):
        try:
            if len(line) > LINE_LIMIT:
                raise ValueError(f"longer than {LINE_LIMIT} bytes")
            yield number, parse_object(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield number, ValueError(f"byte {error.start + 1} is not UTF-8")
        except ValueError as error:
            yield number, error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object with these keys and values, for `json.loads`; a ValueError for a key that it has twice."""
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


def is_unicode(text: str) -> bool:
    """Whether a text can be written in UTF-8: JSON may escape half a surrogate pair, which cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_surrogates(value: Any) -> None:
    """Refuse strings with half a surrogate pair."""
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending += [*value, *value.values()]
        elif isinstance(value, list):
            pending += value
        elif isinstance(value, str) and not is_unicode(value):
            raise ValueError(f"{short(value)} holds half a surrogate pair")


class _Loader(yaml.SafeLoader):
    """YAML without aliases, tags and repeated keys; 1e-3 is a number."""

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
            raise yaml.constructor.ConstructorError(None, None, "a key is repeated", mark)
        return values


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":merge", ":value"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _CoreLoader(_Loader):
    """Booleans are true and false alone, as in YAML 1.2: yes, no, on and off are texts."""


_CoreLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":bool")]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_CoreLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that `_Loader` would read as numbers."""


_FLOAT = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
for _class in (_Loader, _CoreLoader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def dump_yaml(value: Any) -> str:
    """A value as a YAML text, which `parse_yaml` reads as an equal value."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=False)
    return text


def read_yaml(path: Path, remedy: str = REMEDY, *, regular: bool = True) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file holds an empty one.

    Raises:
        UserError: the file cannot be read; the message names it and ends with `remedy`.
    """
    text = read_text(path, OPTIONS_LIMIT, remedy, regular=regular)
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML ({error}); {remedy}") from None
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{path}: expected `option: value` lines, got {name_of_type(value)}; {remedy}")
    return value or {}


def parse_yaml(text: str, *, core: bool = False) -> Any:
    """The value of a YAML text.

    Args:
        core: read yes, no, on and off as texts (YAML 1.2), which may be labels; else they are booleans.

    Raises:
        ValueError: it is not YAML, or is refused; the message is one line.
    """
    try:
        return yaml.load(text, _CoreLoader if core else _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        position = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{position}{one_line(str(error.problem))}") from None
    except yaml.YAMLError as error:
        raise ValueError(one_line(str(error).split("\n")[0])) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def yaml_lines(text: str) -> dict[tuple[object, ...], int]:
    """The line, from 1, of every key of the mappings of a YAML text, by the path to the key, as `core` has it."""
    lines: dict[tuple[object, ...], int] = {}
    pending: list[tuple[tuple[object, ...], Any]] = [((), yaml.compose(text, _CoreLoader))]
    while pending:
        path, node = pending.pop()
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                name = (*path, parse_yaml(key.value, core=True) if key.style is None else key.value)
                lines[name] = key.start_mark.line + 1
                pending.append((name, value))
    return lines


def short(value: object) -> str:
    """A value from a file as a message shows it, in at most 60 characters."""
    if isinstance(value, dict | list):
        return name_of_type(value)
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return one_line(text if len(text) <= 60 else text[:59] + "…")


def name_of_type(value: object) -> str:
    """JSON's name for the type of a value."""
    names = {dict: "an object", list: "a list", str: "a string", types.NoneType: "null", bool: "a boolean"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
