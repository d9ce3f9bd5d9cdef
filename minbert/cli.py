"""What the commands share: options from the fields of dataclasses, one-line errors, exit codes."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import signal
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from minbert import kernels
from minbert.errors import UserError, dashed, did_you_mean, one_line
from minbert.files.json_yaml import dump_yaml, parse_yaml, read_yaml
from minbert.files.schema_checks import checked, described, types_of_fields, without_format
from minbert.kernels.matmul_library import keep_few_products
from minbert.methods.surgery import names_code, with_options
from minbert.recipes import recipe

Config = TypeVar("Config")

SURGERY = "surgery"  # the option whose value may have options: --surgery cagrad --surgery.c 0.4


class Option(NamedTuple):
    """An option: a field of a dataclass, or of a record in it."""

    type: Any
    required: bool
    default: Any  # None for a record, whose fields have their own
    text: str  # what the docstring of the dataclass says of it
    group: str  # the section of that docstring


def options_of(record: Any, prefix: str = "", group: str = "") -> Iterator[tuple[str, Option]]:
    """The options that the fields of a dataclass are, by their dotted names, such as smart.steps."""
    texts, section = {}, ""
    for title, field_name, text in re.findall(
        r"^(\w+):$|^    (\w+): (.*(?:\n {8}.*)*)", inspect.getdoc(record) or "", re.MULTILINE
    ):
        section = title or section
        texts[field_name] = " ".join(text.split()), group or section
    for field in dataclasses.fields(record):
        name, kind = prefix + field.name, types_of_fields(record)[field.name]
        required = field.default is field.default_factory  # neither is there
        factory = None if dataclasses.is_dataclass(kind) else field.default_factory
        default = factory() if callable(factory) else None if field.default is dataclasses.MISSING else field.default
        yield name, Option(kind, required, default, *texts[field.name])
        if dataclasses.is_dataclass(kind):
            yield from options_of(kind, f"{name}.", texts[field.name][1])


class Parser:
    """Reads command lines and files of the options that the fields of dataclasses are.

    Args:
        command: the command of minbert that is run.
        records: the dataclasses. Where the first one has COMMON, --help shows those options, and --help-all shows all.
        positional: the options whose values are given without their names, in order, such as `run name`.
    """

    def __init__(self, command: str, *records: type, positional: str = "") -> None:
        self.command, self.positional = command, positional.split()
        self.summary = (records[0].__doc__ or "").split("\n")[0]
        self.options = {name: option for record in records for name, option in options_of(record)}
        self.common: Sequence[str] = getattr(records[0], "COMMON", ())
        self.all_listed = "--help-all lists the options" if self.common else "--help lists the options"

    def parse(self, arguments: Sequence[str]) -> list[tuple[str, Any]]:
        """Dotted names and values in the order of the arguments; --help and --help-all print options and exit.

        `--batch-size 8` or `=8`, `--resume` or `=true`, `--tasks a b` or `=a,b`, `--heads.sts cosine` of a dictionary,
        `--surgery.c 0.4` for an option of the surgery.

        Raises:
            UserError: an unknown option, or a value of the wrong type.
        """
        given: list[tuple[str, Any]] = []
        pending = list(arguments)
        while pending:
            argument = pending.pop(0)
            if argument in ("-h", "--help", "--help-all"):
                print(self.help(of_all=argument == "--help-all"), end="")
                raise SystemExit(0)
            if not argument.startswith("-"):
                free = [name for name in self.positional if name not in dict(given)]
                if not free:
                    lists = self.all_listed.replace("the options", "them")
                    raise UserError(f"unexpected argument {argument!r}; options start with --, and {lists}")
                given.append((free[0], argument))
                continue
            option, *values = argument.split("=", 1)
            name, kind = self._find(option)
            takes = 0 if values else len(pending) if _members(kind, list) else 1
            while len(values) < takes and pending and not pending[0].startswith("--"):
                if kind is bool and pending[0] not in ("true", "false"):
                    break
                values.append(pending.pop(0))
            if not values and kind is not bool:
                raise UserError(f"{option}: expected {described(kind)}, got nothing")
            value = _from_text(",".join(values), kind) if values else True
            given += self.checked({name: value}) if name in self.options else [(name, checked(value, kind, option))]
        return given

    def _find(self, option: str) -> tuple[str, Any]:
        """The dotted name and the type of an option, of an entry of one that is a dictionary, or of a surgery's."""
        name = option[2:].replace("-", "_")
        if option.startswith("--") and name in self.options:
            return name, self.options[name].type
        parent = name.rpartition(".")[0]
        if parent == SURGERY and parent in self.options:
            return name, str  # the surgery itself checks it
        if parent in self.options and (dictionaries := _members(self.options[parent].type, dict)):
            return f"{parent}.{option.rpartition('.')[2]}", typing.get_args(dictionaries[0])[1]
        raise UserError(
            f"unknown option {option}{did_you_mean(option, list(map(dashed, self.options)))}; {self.all_listed}"
        )

    def checked(self, values: Mapping[Any, Any], where: str = "", prefix: str = "") -> Iterator[tuple[str, Any]]:
        """Dotted names and values from a mapping, in which a record is a mapping.

        Raises:
            UserError: an unknown name, or a value of the wrong type; the line starts with `where`.
        """
        for key, value in values.items():
            name = f"{prefix}{key}"
            if name not in self.options:
                raise UserError(f"{where}unknown option {name}{did_you_mean(name, list(self.options))}")
            kind = self.options[name].type
            if dataclasses.is_dataclass(kind) and isinstance(value, dict):
                yield from self.checked(value, where, f"{name}.")
            else:
                yield name, checked(value, kind, where + dashed(name))

    def merged(self, values: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        """The last value of each option; an entry of a dictionary joins those before it."""
        merged: dict[str, Any] = {}
        of_surgery: dict[str, str] = {}
        for name, value in values:
            if name not in self.options:
                name, _, key = name.rpartition(".")
                if name == SURGERY:  # wherever its name stands
                    of_surgery[key] = value
                    continue
                before = merged.get(name) or {}
                if not isinstance(before, dict):
                    option = dashed(name)
                    raise UserError(
                        f"{option}.{key} {value}: {option} is {before} for all tasks; in place of both give {option}"
                        f" '{{{key}: {value}, ...}}' with each task that shall have a value"
                    )
                value = {**before, key: value}
            merged[name] = value
        if of_surgery:
            merged[SURGERY] = with_options(merged.get(SURGERY, self.options[SURGERY].default), of_surgery)
        return merged

    def build(self, record: type[Config], values: Mapping[str, Any], prefix: str = "") -> Config:
        """The record of these values, and of the defaults of all other options.

        Raises:
            UserError: an option without a default is missing, or the record refuses a value.
        """
        fields: dict[str, Any] = {}
        for field in dataclasses.fields(record):  # type: ignore[arg-type]
            name = prefix + field.name
            option = self.options[name]
            if dataclasses.is_dataclass(option.type):
                fields[field.name] = self.build(option.type, values, f"{name}.")  # type: ignore[arg-type]
            elif name in values:
                fields[field.name] = values[name]
            elif option.required:
                shown = name.upper() if name in self.positional else dashed(name)
                raise UserError(f"{shown} is missing: {option.text.split('.')[0]}; {self.all_listed}")
        return record(**fields)

    def help(self, of_all: bool = False) -> str:
        """What the options are, by groups: the common ones, or all of them with the common ones first."""
        usage = " ".join(["minbert", self.command, *map(str.upper, self.positional), "[--OPTION VALUE ...]"])
        shorter = self.common and not of_all
        rest = f"--help-all lists all {len(self.options)} options." if shorter else None
        parser = argparse.ArgumentParser(usage=usage, description=self.summary, epilog=rest, add_help=False)
        groups: dict[str, Any] = {}
        for name in self.common if shorter else dict.fromkeys([*self.common, *self.options]):
            option = self.options[name]
            if option.group not in groups:
                title = "options" if option.group == "Args" else option.group.lower()
                groups[option.group] = parser.add_argument_group(title)
            default = "" if option.default in (None, {}) else f"; default: {option.default}"
            text = f"{option.text.rstrip('.')} ({described(option.type)}{default})".replace("%", "%%")
            if name in self.positional:
                groups[option.group].add_argument(name.upper(), help=text)
            else:
                groups[option.group].add_argument(dashed(name), metavar="", help=text)
        return parser.format_help()


def _members(kind: Any, origin: Any) -> list[Any]:
    """The members of a union with this origin, such as list[str] of list[str] | None; another type is its only one."""
    union = typing.get_origin(kind) in (types.UnionType, typing.Union)
    return [each for each in (typing.get_args(kind) if union else [kind]) if typing.get_origin(each) is origin]


def _from_text(text: str, kind: Any) -> Any:
    """The value of an argument: the text itself for an option that is a text, else what it means in YAML."""
    if lists := _members(kind, list):
        (item,) = typing.get_args(lists[0])
        return [_from_text(part.strip(" '\""), item) for part in text.strip("[]").split(",") if part.strip()]
    plain, literals = _members(kind, None), _members(kind, Literal)
    textual = str in plain or (literals and int not in plain)
    missing = text == "null" and types.NoneType in plain
    mapping = text.startswith("{") and _members(kind, dict)
    if any(text in typing.get_args(each) for each in literals) or (textual and not missing and not mapping):
        return text
    try:
        return parse_yaml(text)
    except ValueError:
        return text  # the check of the type refuses it


def parse(command: str, config: type[Config], arguments: Sequence[str], positional: str = "") -> Config:
    """The config of a command.

    Raises:
        UserError: an unknown option, one that is missing, or a value that `config` refuses.
    """
    parser = Parser(command, config, positional=positional)
    return parser.build(config, parser.merged(parser.parse(arguments)))


@dataclass(frozen=True)
class FileOptions:
    """Files of options.

    Run:
        config: YAML file of options, over those of the recipe; of several files, the last one's count.
        allow_code: import the code that a file of options names, such as surgery: MODULE:NAME.
        print_config: print all options as a file for --config has them, and exit.
    """

    config: str | None = None
    allow_code: bool = False
    print_config: bool = False


def parse_layers(command: str, config: type[Config], arguments: Sequence[str] | Mapping[str, Any]) -> Config:
    """The config of a command with `--recipe NAME` and `--config FILE`: command line over file over recipe.

    Args:
        arguments: the command line, or a mapping of options, in which a record is a mapping.

    Raises:
        UserError: an unknown option or recipe, an unreadable file, a value that `config` refuses, or code that a file
            names without --allow-code.
    """
    parser, of_files = Parser(command, config, FileOptions), Parser(command, config)
    given = list(parser.checked(arguments)) if isinstance(arguments, Mapping) else parser.parse(arguments)
    files = [dict(_options_in(Path(value), of_files)) for name, value in given if name == "config" and value]
    chosen = [value for name, value in given if name == "recipe" and value][-1:]
    chosen += [options["recipe"] for options in files if options.get("recipe")]
    recipes = [dict(of_files.checked(recipe(name))) for name in chosen[:1]]
    values = parser.merged([*(option for layer in (*recipes, *files) for option in layer.items()), *given])
    surgery = str(values.get(SURGERY))
    if names_code(surgery) and SURGERY not in dict(given) and not values.get("allow_code"):
        raise UserError(
            f"surgery {surgery} names code to import, and does not stand on the command line; give --surgery"
            " MODULE:NAME there, or --allow-code if you trust the file and the module"
        )
    built = parser.build(config, values)
    if values.get("print_config"):
        print(dump_yaml(dataclasses.asdict(built)), end="")  # type: ignore[call-overload]
        raise SystemExit(0)
    return built


def _options_in(path: Path, parser: Parser) -> Iterator[tuple[str, Any]]:
    """The options in a file of --config by their dotted names."""
    try:
        values = read_yaml(path, "give a file of options", regular=False)
        yield from parser.checked(without_format(values, str(path)), f"{path}: ")
    except UserError as error:
        raise UserError(f"--config {error}") from None


def run(
    main: Callable[[Sequence[str]], int], arguments: Sequence[str] | None = None, *, needs_kernels: bool = True
) -> None:
    """Run a command's `main` and exit: 0 done, 2 bad input (one line on stderr), 130 on Ctrl-C.

    Bad input is also a file that the system refuses, such as one in a directory that may not be read.

    Args:
        arguments: for `main`; those of the process when left out.
        needs_kernels: refuse environment variables that the kernels refuse.
    """
    try:
        if needs_kernels and (refusal := kernels.native.refusal() or kernels.flight_recorder.refusal()) is not None:
            raise UserError(refusal)
        keep_few_products()
        code = main(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        sys.stderr.write(f"error: {one_line(str(error))}\n")  # in one write: other processes may write too
        code = 2
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal and `minbert reproduce` may send the same stop twice
        code = 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of our output left, as `head` does
        sys.stderr.close()
        code = 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename is None:
            raise
        sys.stderr.write(f"error: {one_line(f'{error.filename}: {error.strerror}')}\n")
        code = 2
    sys.exit(code)
