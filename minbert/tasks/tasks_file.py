"""Files of task records: those of `--tasks-file`, a run's tasks.yaml, and the built-in tasks."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from minbert.errors import UserError, one_line, require_known
from minbert.files import MANIFEST
from minbert.files.json_yaml import dump_yaml, parse_yaml, read_text, short, yaml_lines
from minbert.files.schema_checks import FORMAT, build, without_format
from minbert.tasks.labels import class_key
from minbert.tasks.task import METRICS_OF, Course, Glue, Label, Task

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
LONGEST_NAME = 64
MOST_CLASSES = 10_000
LIMIT = 2**22  # bytes of a tasks file, which may list classes
HUB = "hub:"
REMEDY = "give a file of task records (docs/own-tasks.md)"
OF_TYPE: dict[str, tuple[str, ...]] = {  # keys that only some types have
    **dict.fromkeys(("classes", "class_names", "class_weights"), ("classification", "multilabel")),
    "scale": ("regression",),
    "separator": ("multilabel",),
}


@dataclass(frozen=True)
class Record:
    """A task as a file has it: the fields of `Task` in YAML's types."""

    text: str | list[str]
    label: str
    type: Literal["classification", "regression", "multilabel"]
    classes: list[bool | int | float | str] | None = None
    class_names: list[str] = field(default_factory=list)
    scale: list[float] | None = None
    separator: str | None = None
    train: str | None = None
    dev: float | str | None = None
    test: str | None = None
    delimiter: str = ","
    id: str = ""
    metrics: list[str] = field(default_factory=list)
    class_weights: Literal["balanced"] | dict[str, float] | None = None
    head: str = "linear"
    loss: str = ""
    title: str = ""
    thresholds: list[float] | None = None
    # of the built-in tasks alone
    in_overall: bool = True
    evaluated: bool = True
    course: Course | None = None
    glue: Glue | None = None
    head_of: str = ""


INTERNAL = ("in_overall", "evaluated", "course", "glue", "head_of")


def read_tasks(path: str | Path) -> dict[str, Task]:
    """The tasks of a tasks file by name, in its order; in a checkpoint's directory their records need no files.

    Raises:
        UserError: the file cannot be read, or a record is wrong: one line with file and line.
    """
    path = Path(os.path.expanduser(path))
    try:
        status = os.stat(path)
        return _cached(path.resolve(), str(path), (status.st_mtime_ns, status.st_size))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--tasks-file {path}: cannot be read ({reason}); {REMEDY}") from None


@lru_cache(maxsize=32)  # a TrainConfig reads its file each time one is made
def _cached(path: Path, shown: str, version: tuple[int, int]) -> dict[str, Task]:
    of_checkpoint = (Path(shown).parent / MANIFEST).exists()  # `path` may lie among the blobs of the hub's cache
    return parse_tasks(read_text(path, LIMIT, REMEDY), shown, path.parent, built_in=of_checkpoint)


def parse_tasks(text: str, where: str, directory: Path, *, built_in: bool = False) -> dict[str, Task]:
    """The tasks in the text of a tasks file.

    Args:
        where: the file's name for messages.
        directory: what relative paths in it are relative to.
        built_in: whether it is minbert's own file, of built-in tasks or of a checkpoint: the fields of built-in tasks
            are allowed, and a record needs no files.

    Raises:
        UserError: the text is not YAML, or a record is wrong.
    """
    try:
        values, lines = parse_yaml(text, core=True), yaml_lines(text)
    except ValueError as error:
        raise UserError(f"{where}: not valid YAML ({error}); {REMEDY}") from None
    values = without_format(values, where) if isinstance(values, dict) else values
    if not isinstance(values, dict) or not isinstance(values.get("tasks"), dict) or not values["tasks"]:
        raise UserError(f"{where}: expected `tasks:` with a record for each task, got {short(values)}; {REMEDY}")
    for key in values:
        with _located(where, lines, key):
            require_known("unknown key", str(key), ("tasks",))
    tasks = {}
    for name, record in values["tasks"].items():
        with _located(where, lines, "tasks", name):
            _check_name(name)
            if not isinstance(record, dict):
                raise UserError(f"task {name}: expected a record, got {short(record)}")
        record = _with_text_keys(record)
        for key in record:
            with _located(where, lines, "tasks", name, key):
                known = [each.name for each in fields(Record) if built_in or each.name not in INTERNAL]
                require_known(f"task {name}: unknown key", str(key), known)
                build(Record, {**_least(record), key: record[key]}, f"task {name}")
        with _located(where, lines, "tasks", name):
            built = build(Record, record, f"task {name}")
        tasks[name] = _task(name, built, where, lines, directory, built_in)
    return tasks


def _with_text_keys(record: dict[Any, Any]) -> dict[Any, Any]:
    """The record with the classes of class_weights as texts: for YAML, 1 is a number and true a boolean."""
    weights = record.get("class_weights")
    if not isinstance(weights, dict):
        return record
    return {**record, "class_weights": {class_key(label): weight for label, weight in weights.items()}}


def _least(record: Mapping[str, Any]) -> dict[str, Any]:
    """The needed fields of a record with values that are right, so that one field is checked at a time."""
    return {"text": "", "label": "", "type": "classification"}


@contextmanager
def _located(where: str, lines: Mapping[tuple[object, ...], int], *keys: object) -> Iterator[None]:
    """Add file and line of a key to a UserError of the block."""
    try:
        yield
    except UserError as error:
        line = next((lines[keys[:end]] for end in range(len(keys), 0, -1) if keys[:end] in lines), 1)
        raise UserError(f"{where}, line {line}: {error}") from None


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not NAME.fullmatch(name) or len(name) > LONGEST_NAME or name == "overall":
        raise UserError(
            f"task {short(name)}: a name has letters, digits, - and _, starts with a letter or a digit, is at most"
            f" {LONGEST_NAME} characters long, and is not 'overall'; it becomes file names"
        )


def _task(
    name: str, record: Record, where: str, lines: Mapping[tuple[object, ...], int], directory: Path, built_in: bool
) -> Task:
    """The checked task of a record."""

    def check(key: str, ok: bool, expected: str, got: object) -> None:
        with _located(where, lines, "tasks", name, key):
            if not ok:
                raise UserError(f"task {name}: {key}: expected {expected}, got {got}")

    text = (record.text,) if isinstance(record.text, str) else tuple(record.text)
    check("text", len(text) in (1, 2) and all(text), "one column, or two for pairs", short(record.text))
    check("text", len({*text}) == len(text), "two different columns", short(text[0]))
    check("label", bool(record.label) and record.label not in text, "a column that is not a text", short(record.label))
    for key, types in OF_TYPE.items():
        given = getattr(record, key)
        fits = given in (None, []) or record.type in types
        check(key, fits, f"it with type {' or '.join(types)} alone", f"it with type {record.type}")
    classes = record.classes
    if classes is not None:
        check("classes", len(classes) >= 2, "two classes or more", str(len(classes)))
        check("classes", len(classes) <= MOST_CLASSES, f"at most {MOST_CLASSES} classes", str(len(classes)))
        counts = Counter(map(class_key, classes))
        doubled = next((each for each in classes if counts[class_key(each)] > 1), None)
        check("classes", doubled is None, "different classes", f"{short(doubled)} twice")
        check("classes", all(str(each).strip() for each in classes), "no empty class", "one")
    names = len(record.class_names)
    check(
        "class_names",
        not names or (classes is not None and names == len(classes)),
        "a name for each of classes",
        str(names),
    )
    scale = record.scale or [0.0, 1.0]
    check("scale", len(scale) == 2 and scale[0] < scale[1], "the smallest and the largest score", short(record.scale))
    if record.type == "regression":
        check("scale", record.scale is not None, "the smallest and the largest score, such as [1, 5]", "nothing")
    check("separator", record.separator is None or bool(record.separator), "a text, such as ;", "an empty one")
    one = len(record.delimiter) == 1 and record.delimiter not in '"\r\n'
    check("delimiter", one, "one character, such as ;", short(record.delimiter))
    for number, metric in enumerate(record.metrics):
        with _located(where, lines, "tasks", name, "metrics"):
            require_known(f"task {name}: unknown metric of a {record.type}", metric, METRICS_OF[record.type])
        check("metrics", metric not in record.metrics[:number], "different metrics", f"{metric} twice")
    if isinstance(record.class_weights, dict):
        for key, weight in record.class_weights.items():
            known = classes is None or key in map(class_key, classes)
            check("class_weights", known, f"a weight for any of {_listed(classes)}", short(key))
            check("class_weights", 0 < weight < float("inf"), "weights above 0", f"{weight:g} for {short(key)}")
    if not built_in:
        check("train", bool(record.train), "a file, or hub:NAME/CONFIG/SPLIT", "nothing")
        check("dev", record.dev not in (None, ""), "a file, or a share of train such as 0.1", "nothing")
    if isinstance(record.dev, float):
        check("dev", 0 < record.dev < 1, "a share of train between 0 and 1, or a file", f"{record.dev:g}")
    values = asdict(record) | {
        "text": text,
        "scale": (scale[0], scale[1]),
        "separator": record.separator or ";",
        "course": record.course,
        "glue": record.glue,
    }
    values |= {key: tuple(values[key]) for key in ("class_names", "metrics")}
    values |= {key: None if values[key] is None else tuple(values[key]) for key in ("classes", "thresholds")}
    values |= {split: located(getattr(record, split), directory) for split in ("train", "dev", "test")}
    return Task(name, **values)


def located(file: Any, directory: Path) -> Any:
    """A file of a record by its path, relative to the record's file; a share and a name on the hub as they are."""
    if not isinstance(file, str) or file.startswith(HUB):
        return file
    return str(directory / os.path.expanduser(file))


def _listed(classes: list[Label] | None) -> str:
    shown = [short(each) for each in (classes or ())[:8]]
    return ", ".join([*shown, *(["..."] if classes and len(classes) > 8 else [])])


def tasks_to_yaml(tasks: Mapping[str, Task]) -> str:
    """The tasks as a tasks file has them, without the fields that are as if left out; `parse_tasks` reads it."""
    records = {}
    for name, task in tasks.items():
        record: dict[str, Any] = {"text": list(task.text), "label": task.label, "type": task.type}
        for each in fields(Task):
            value = getattr(task, each.name)
            default = None if each.default is MISSING else each.default
            if each.name in ("name", "course", "glue", *record) or value == default:
                continue
            if each.name in OF_TYPE and task.type not in OF_TYPE[each.name]:
                continue
            record[each.name] = list(value) if isinstance(value, tuple) else value
        if task.is_regression:
            record["scale"] = list(task.scale)
        records[name] = record
    return dump_yaml({"format": FORMAT, "tasks": records})


def shown(text: object) -> str:
    """A class or a column, which may be any text, for a message or a table."""
    return one_line(short(text))
