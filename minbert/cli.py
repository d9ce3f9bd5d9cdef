"""What the commands share: options from dataclasses, one-line errors, exit codes."""

from __future__ import annotations

import argparse
import dataclasses
import re
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse

from minbert import kernels
from minbert.errors import UserError, did_you_mean, one_line
from minbert.files.json_yaml import read_yaml, short
from minbert.files.validation import checked, types_of_fields, without_format
from minbert.methods.surgery import names_code
from minbert.recipes import recipe

Config = TypeVar("Config")


class Parser(jsonargparse.ArgumentParser):
    """Options from a dataclass, written with dashes; an error becomes a `UserError` of one line."""

    def __init__(self, command: str, config: type, **kwargs: Any) -> None:
        super().__init__(prog=f"python -m minbert.{command}", exit_on_error=False, allow_abbrev=False, **kwargs)
        self.kinds = dict(_kinds(config))  # type of each option, as text
        self.types = dict(_types(config))  # and as it is
        self.add_class_arguments(config, None)

    def parse(self, arguments: Sequence[str]) -> jsonargparse.Namespace:
        """Values of the options, nested records instantiated.

        Raises:
            UserError: an unknown option, or a value of the wrong type.
        """
        try:
            values = self.parse_args(self.normalise(arguments))
            for name, kind in self.types.items():
                if not dataclasses.is_dataclass(kind):
                    checked(values[name], kind, f"--{name.replace('_', '-')}")
            return self.instantiate(values)
        except argparse.ArgumentError as error:
            raise UserError(self._one_line(str(error))) from None

    def normalise(self, arguments: Sequence[str]) -> list[str]:
        """`--batch-size 8` as `--batch_size=8`, `--resume` as `--resume=true`, `--tasks a b` as `--tasks=[a,b]`."""
        normal: list[str] = []
        pending = list(arguments)
        while pending:
            word = pending.pop(0)
            option, *values = word.split("=", 1)
            option = "--" + option[2:].replace("-", "_")
            kind = self.kinds.get(option)
            if not word.startswith("--") or kind is None:
                normal.append(word if not word.startswith("--") else "=".join([option, *values]))
                continue
            takes = 0 if values else len(pending) if "list[" in kind else 1
            while len(values) < takes and pending and not pending[0].startswith("--"):
                if kind == "bool" and pending[0] not in ("true", "false"):
                    break
                values.append(pending.pop(0))
            if kind == "bool" and not values:
                values = ["true"]
            value = ",".join(values)
            if "list[" in kind:
                value = f"[{value.strip('[]')}]"
            normal.append(f"{option}={value}" if values else option)
        return normal

    def format_help(self, *arguments: Any) -> str:
        return re.sub(r"--[a-z][\w.]+", lambda option: option[0].replace("_", "-"), super().format_help(*arguments))

    def _one_line(self, message: str) -> str:
        unknown = re.search(r"unrecognized arguments: (\S+)|Option '(\S+?)' is not accepted", message, re.IGNORECASE)
        if unknown:
            word = unknown[1] or f"--{unknown[2]}"
            if not word.startswith("-"):
                return f"unexpected argument {word!r}; options start with --, and --help lists them"
            name = word.split("=")[0].replace("_", "-")
            known = [s.replace("_", "-") for action in self._actions for s in action.option_strings]
            return f"unknown option {name}{did_you_mean(name, known)}; --help lists the options"
        wrong = re.search(r'Parser key "([\w.]+)":.*(?:Got|Given) value: (.*)', message, re.DOTALL)
        if wrong:
            kind = self.kinds.get(f"--{wrong[1]}", "another type")
            expected = re.sub(r"Literal\[(.*?)\]", r"one of \1", kind.replace(" | None", "")).replace("|", "or")
            entry = re.fullmatch(r"NestedArg\(key='(.*)', val='(.*)'\)", wrong[2].strip())  # of a dictionary
            key, value = (f".{entry[1]}", entry[2]) if entry else ("", wrong[2].strip())
            return f"--{wrong[1].replace('_', '-')}{key}: expected {expected}, got {value!r}"
        record = re.search(r'Parser key "([\w.]+)":\s+Unable to load config "(.*)"', message, re.DOTALL)
        if record and dataclasses.is_dataclass(of := self.types.get(record[1])):
            names = ", ".join(field.name for field in dataclasses.fields(of))
            return f"--{record[1].replace('_', '-')}: expected a record of {names}, got {short(record[2])}"
        return " ".join(message.split())


def _kinds(config: type, prefix: str = "--") -> Iterator[tuple[str, str]]:
    """The options of a record and of the records in it, and their types as text."""
    for option in dataclasses.fields(config):
        yield prefix + option.name, str(option.type)
        if dataclasses.is_dataclass(option.default_factory):
            yield from _kinds(option.default_factory, f"{prefix}{option.name}.")  # type: ignore[arg-type]


def _types(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted names of the options of a record and of the records in it, and their types."""
    for name, kind in types_of_fields(config).items():
        yield prefix + name, kind
        if dataclasses.is_dataclass(kind):
            yield from _types(kind, f"{prefix}{name}.")


def parse_layers(command: str, config: type[Config], arguments: Sequence[str]) -> Config:
    """The config of a command with `--recipe NAME` and `--config FILE`: command line over file over recipe.

    Raises:
        UserError: an unknown option or recipe, an unreadable file, a value that `config` refuses, or code that a file
            names without --allow-code.
    """
    parser = Parser(command, config, description=(config.__doc__ or "").split("\n")[0])
    parser.add_argument("--config", action="config", help="YAML file of options")
    parser.add_argument(
        "--allow_code",
        action="store_true",
        default=argparse.SUPPRESS,  # so that no file of options holds it
        help="import the code that --config FILE names, such as surgery: MODULE:NAME",
    )
    parser.kinds["--config"] = "str"
    words = parser.normalise(arguments)
    files = [word.split("=", 1)[1] for word in words if word.startswith("--config=")]
    chosen = [word.split("=", 1)[1] for word in words if word.startswith("--recipe=")]
    layers = [_options_in(Path(file), parser) for file in files]
    for options in layers:
        chosen = chosen or ([options["recipe"]] if options.get("recipe") else [])
    if chosen:
        layers.insert(0, dict(_flat(recipe(chosen[-1]), parser.kinds)))
    for options in layers:
        parser.set_defaults(options)
    values = parser.parse([word for word in words if not word.startswith("--config=")])
    surgery = str(values.get("surgery"))
    if names_code(surgery) and not any(word.startswith("--surgery=") for word in words) and "allow_code" not in values:
        raise UserError(
            f"surgery {surgery} names code to import, and does not stand on the command line; give --surgery"
            " MODULE:NAME there, or --allow-code if you trust the file and the module"
        )
    return config(**{field.name: values[field.name] for field in dataclasses.fields(config)})  # type: ignore[arg-type]


def _flat(options: Mapping[str, Any], known: Collection[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Options by their dotted names: those of records one by one, a dictionary that is itself a value whole."""
    for name, value in options.items():
        if isinstance(value, Mapping) and any(option.startswith(f"--{prefix}{name}.") for option in known):
            yield from _flat(value, known, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _options_in(path: Path, parser: Parser) -> dict[str, Any]:
    """The options in a file of --config by their dotted names."""
    try:
        values = read_yaml(path, "give a file of options", regular=False)
        options = dict(_flat(without_format(values, str(path)), parser.kinds))
        for name, value in options.items():
            if name not in parser.types:
                raise UserError(f"{path}: unknown option {name}{did_you_mean(str(name), list(parser.types))}")
            checked(value, parser.types[name], f"{path}: --{name.replace('_', '-')}")
    except UserError as error:
        raise UserError(f"--config {error}") from None
    return options


def run(main: Callable[[Sequence[str]], int]) -> None:
    """Run a command's `main` and exit: 0 done, 2 bad input (one line on stderr), 130 on Ctrl-C."""
    try:
        if (refusal := kernels.native.refusal()) is not None:
            raise UserError(refusal)
        code = main(sys.argv[1:])
    except UserError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of our output left, as `head` does
        sys.stderr.close()
        code = 128 + signal.SIGPIPE
    sys.exit(code)
