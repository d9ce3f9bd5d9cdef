"""Users' Parquet files, directories that `datasets` saved, and data sets on the hub, read batch by batch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from minbert.data.examples import Row
from minbert.data.own_columns import Found, OwnFile, find_columns
from minbert.errors import UserError, first_line, one_line
from minbert.files.hub import import_datasets
from minbert.tasks.labels import class_key
from minbert.tasks.tasks_file import HUB

BATCH = 1024  # rows that are Python values at once
SPLITS_OF = {"train": ("train",), "dev": ("validation", "dev", "val"), "test": ("test",)}
EXTRA = "install the extra that reads it: pip install 'minbert[data]'"


def parquet_rows(file: OwnFile) -> Iterator[Row]:
    """The rows of a Parquet file.

    Raises:
        UserError: pyarrow is not installed, the file is damaged, or a column is missing.
    """
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{file.named}: a Parquet file; {EXTRA}") from None
    with _one_line(f"{file.named}: cannot be read as Parquet"), parquet.ParquetFile(file.path) as table:
        names = table.schema_arrow.names
        columns = find_columns(file.named, names, file.task, file.labels)
        wanted = list(dict.fromkeys(names[number] for number in columns.all))
        yield from _rows(names, columns, (batch.to_pydict() for batch in table.iter_batches(BATCH, columns=wanted)))


def directory_rows(file: OwnFile, split: str) -> Iterator[Row]:
    """The rows of a directory that `save_to_disk` of a Dataset or a DatasetDict wrote.

    Raises:
        UserError: `datasets` is not installed, it is no such directory, lacks the split, or a column is missing.
    """
    path = file.path
    if (path / "dataset_dict.json").exists():
        names = sorted(each.name for each in path.iterdir() if each.is_dir())
        found = next((name for name in SPLITS_OF.get(split, ()) if name in names), None)
        if found is None:
            example = path / (names[0] if names else "train")
            raise UserError(f"{file.named}: holds the splits {', '.join(names)}; name one of them, such as {example}")
        path = path / found
    if not (path / "state.json").exists():
        raise UserError(f"{file.named}: a directory without a data set; expected one that save_to_disk wrote")
    datasets = _datasets(file)
    with _one_line(f"{file.named}: cannot be read by datasets"):
        yield from _dataset_rows(file, datasets.load_from_disk(os.fspath(path)))


def hub_rows(name: str, file: OwnFile) -> Iterator[Row]:
    """The rows of `hub:NAME/CONFIG/SPLIT`, as they arrive; NAME may be OWNER/NAME, and CONFIG may be left out.

    Raises:
        UserError: the name is none, `datasets` is not installed, the hub has no such split, or a column is missing.
    """
    *parts, split = name.removeprefix(HUB).split("/")
    if not 1 <= len(parts) <= 3 or not all((*parts, split)):
        raise UserError(f"{file.named}: expected hub:NAME/CONFIG/SPLIT, such as hub:nyu-mll/glue/sst2/train")
    candidates: Sequence[Sequence[str]] = {
        1: [parts],
        2: [["/".join(parts)], parts],  # OWNER/NAME, or NAME and CONFIG
        3: [["/".join(parts[:2]), parts[-1]]],
    }[len(parts)]
    datasets, errors = _datasets(file), []
    for candidate in candidates:
        try:
            table = datasets.load_dataset(*candidate, split=split, streaming=True)
        except Exception as error:  # no such data set, split, permission or network: the libraries' errors vary
            errors.append(_reason(error))
            continue
        with _one_line(f"{file.named}: cannot be read from the hub"):
            yield from _dataset_rows(file, table)
        return
    raise UserError(f"{file.named}: cannot be read from the hub: {errors[0]}")


def _datasets(file: OwnFile) -> Any:
    return import_datasets(f"{file.named}: a data set of the package datasets; {EXTRA}")


def _dataset_rows(file: OwnFile, table: Any) -> Iterator[Row]:
    """The rows of a Dataset or an IterableDataset; the names of classes stand for their numbers.

    The numbers stay where the task's own classes are numbers, but not those that the names are.
    """
    names = table.column_names or list(next(iter(table), {}))  # a stream may know its columns from its rows alone
    columns = find_columns(file.named, names, file.task, file.labels)
    wanted = list(dict.fromkeys(names[number] for number in columns.all))
    batches: Iterable[Mapping[str, list[Any]]] = table.select_columns(wanted).iter(BATCH)
    if columns.label is not None:
        label = names[columns.label]
        feature = (table.features or {}).get(label)
        classes = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)
        own = file.task.classes
        by_number = own is not None and all(isinstance(each, int) for each in own)
        are_names = {*map(class_key, own or ())} <= {*map(class_key, classes or ())}
        if classes and (are_names or not by_number) and not file.task.is_regression:
            batches = ({**batch, label: [_named(value, classes) for value in batch[label]]} for batch in batches)
    yield from _rows(names, columns, batches)


def _named(value: Any, classes: Sequence[str]) -> Any:
    """The name of a class, or of each in a list; None for -1, as data sets without labels have it."""
    if isinstance(value, list):
        return [_named(each, classes) for each in value]
    return classes[value] if isinstance(value, int) and 0 <= value < len(classes) else None


def _rows(names: Sequence[str], columns: Found, batches: Iterable[Mapping[str, Sequence[Any]]]) -> Iterator[Row]:
    texts, label, identity = columns
    number = -1
    for batch in batches:
        size = len(batch[names[texts[0]]])
        of_texts = zip(*(batch[names[text]] for text in texts), strict=True)
        labels = [None] * size if label is None else batch[names[label]]
        ids = [None] * size if identity is None else batch[names[identity]]
        for row_texts, row_label, row_id in zip(of_texts, labels, ids, strict=True):
            number += 1
            yield Row(number + 1, str(number), "" if row_id is None else str(row_id), row_texts, row_label)


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turn an error of pyarrow or datasets, of whatever type, into one line that begins with `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    return one_line(first_line(error))
