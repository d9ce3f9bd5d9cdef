"""Describe a tasks file and its data: `minbert tasks FILE`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich import box
from rich.table import Table

from minbert import cli
from minbert.console import Terminal
from minbert.data import Examples, open_source, skipped_lines
from minbert.data.held_out import text_hashes
from minbert.data.line_reader import shorten
from minbert.data.tokenizer import SHORTEST, Tokenizer
from minbert.errors import one_line, require
from minbert.model import pair_encoding
from minbert.options_by_task import with_head_and_loss
from minbert.tasks import Task, find_tasks, read_tasks
from minbert.tasks.labels import decode_labels
from minbert.tasks.tasks_file import shown

ROWS = 5  # of train that are shown as the model reads them
CLASSES = 40  # that are counted one by one
SAMPLE = 20_000  # examples of a split whose tokens are counted without --model
VOCABULARY = 8_000  # tokens of the tokenizer that is trained without --model
START, END = 240, 80  # characters of a longer text that are shown
QUANTILES = {"median": 0.5, "90 %": 0.9, "99 %": 0.99, "longest": 1.0}
KINDS = {"classification": "classes", "regression": "scores", "multilabel": "any number of labels"}
IMBALANCE = 10  # times as many examples as another class has
FEW = 5  # examples of a class
SMALL_DEV = 100  # examples


@dataclass(frozen=True)
class TasksConfig:
    """Print what minbert understands of a tasks file, and what the files that it names hold.

    Args:
        file: YAML file of task records, as for --tasks-file of training.
        tasks: tasks to describe; all of the file when left out.
        model: directory or hub name of a BERT whose tokenizer counts the tokens; left out, a tokenizer is trained on a
            sample of the texts, and the lengths are an estimate.
        max_length: tokens that a run would keep of each sequence.
    """

    file: str
    tasks: list[str] | None = None
    model: str | None = None
    max_length: int = 512


def main(arguments: Sequence[str]) -> int:
    options = cli.parse("tasks", TasksConfig, arguments, positional="file")
    require(options.max_length >= SHORTEST, "max_length", f"at least {SHORTEST}", options.max_length)
    own = read_tasks(options.file)
    chosen = find_tasks(options.tasks or list(own), own)
    tokenizer = Tokenizer.from_pretrained(options.model) if options.model else None
    source, console = open_source(None, own), Terminal()
    for record in chosen:
        task = with_head_and_loss(source.complete(record), {}, {})
        splits = {split: source.load(task, split) for split in source.splits(task)}
        for part in record_lines(task, own[task.name], splits):
            console.print(part)
        console.print(scores_table(task, splits) if task.is_regression else classes_table(task, splits))
        tokens = count_tokens(task, splits, tokenizer)
        console.print(tokens_table(tokens, options.max_length))
        console.print(f"  {tokens.how}")
        console.print(f"  {_counted(min(ROWS, len(splits['train'])), 'row')} of train as the model reads them:")
        for line in row_lines(task, splits["train"], tokens.tokenizer, options.max_length):
            console.print(f"    {line}")
        for examples in splits.values():
            for line in skipped_lines(examples.skipped, "a run lists all of them in RUN/skipped.jsonl"):
                console.print(f"  {line}")
        for line in source.warnings(task):
            console.print(f"  warning: {line}")
        for line in hints(task, splits, tokens, options.max_length):
            console.print(f"  hint: {line}")
        console.print()
    return 0


# The record ---------------------------------------------------------------------------------------------------------


def record_lines(task: Task, record: Task, splits: Mapping[str, Examples]) -> list[str]:
    """What the record says, with the numbers of examples.

    Args:
        task: the record with its classes, its head and its loss.
        record: as the file has it.
    """
    texts = "a pair of texts" if task.is_pair else "a text"
    lines = {"text": ", ".join(map(shown, task.text)), "label": shown(task.label)}
    for split, examples in splits.items():
        file = getattr(record, split)
        where = f"{file:g} of train, held out" if isinstance(file, float) else one_line(str(file))
        notes = [_counted(len(examples), "example")]
        notes += [f"{_counted(len(examples.skipped), 'row')} left out"] if examples.skipped else []
        notes += ["without labels"] if examples.labels is None else []
        lines[split] = f"{where}: {', '.join(notes)}"
    if task.is_regression:
        lines["scale"] = f"{task.scale[0]:g} to {task.scale[1]:g}; inside minbert it is 0 to 5"
    else:
        lines["classes"] = (
            f"{task.num_classes}, {'of the training file' if record.classes is None else 'of the record'}"
        )
    if task.is_multilabel:
        lines["separator"] = shown(task.separator)
    binary = task.type == "classification" and task.num_classes == 2
    metrics = [f"f1 of {shown((task.classes or ())[1])}" if binary and name == "f1" else name for name in task.metrics]
    first, *others = metrics
    lines["metrics"] = ", ".join([f"{first} (decides which epoch is best)", *others])
    lines |= {"head": task.head, "loss": task.loss}
    if task.class_weights is not None:
        weights = task.class_weights
        parts = weights if isinstance(weights, str) else [f"{shown(name)}: {weights[name]:g}" for name in weights]
        lines["class weights"] = parts if isinstance(parts, str) else ", ".join(parts)
    title = f" ({one_line(task.title)})" if task.title != task.name else ""
    return [
        f"{task.name}{title}: {task.type}, from {texts} to {KINDS[task.type]}",
        *(f"  {name:<15}{text}" for name, text in lines.items()),
    ]


# Labels -------------------------------------------------------------------------------------------------------------


def class_counts(task: Task, labels: np.ndarray) -> np.ndarray:
    """Examples of each class, int64 [C]."""
    counts = labels.sum(0) if task.is_multilabel else np.bincount(labels.astype(np.int64), minlength=task.num_classes)
    return counts.astype(np.int64)


def classes_table(task: Task, splits: Mapping[str, Examples]) -> Table:
    """Examples of each class by split; of many classes, those with most in train."""
    labels = {split: examples.labels for split, examples in splits.items() if examples.labels is not None}
    counts = {split: class_counts(task, of_split) for split, of_split in labels.items()}
    table = _table(["", "class", *labels, "share of train"])
    order = np.arange(task.num_classes)
    if len(order) > CLASSES:
        order = np.argsort(-counts["train"], kind="stable")
    for number in order[:CLASSES]:
        name = shown((task.classes or ())[number])
        if task.class_names:
            name += f" ({one_line(task.class_names[number])})"
        share = counts["train"][number] / len(splits["train"])
        table.add_row(str(number), name, *(str(of_split[number]) for of_split in counts.values()), f"{share:.1%}")
    if rest := order[CLASSES:].tolist():
        sums = [str(of_split[rest].sum()) for of_split in counts.values()]
        most = counts["train"][rest].max()
        table.add_row("", f"{len(rest)} more, of at most {most} in train", *sums, "")
    if task.is_multilabel:
        none = [int((~of_split.any(1)).sum()) for of_split in labels.values()]
        table.add_row("", "no label", *map(str, none), f"{none[0] / len(splits['train']):.1%}")
    return table


def scores_table(task: Task, splits: Mapping[str, Examples]) -> Table:
    """Quantiles of the scores by split, on the user's scale."""
    table = _table(["scores", "smallest", "25 %", "median", "75 %", "largest", "mean"])
    for split, examples in splits.items():
        if examples.labels is not None:
            scores = np.array(decode_labels(task, examples.labels))
            values = [*np.quantile(scores, [0, 0.25, 0.5, 0.75, 1]), scores.mean()]
            table.add_row(split, *(f"{value:.4g}" for value in values))
    return table


# Tokens -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenCounts:
    """The lengths of the sequences of a task's examples, before any is cut."""

    tokenizer: Tokenizer
    how: str  # which tokenizer it is, and what was counted
    lengths: dict[str, np.ndarray]  # by split, int64 [sequences]


def count_tokens(task: Task, splits: Mapping[str, Examples], tokenizer: Tokenizer | None) -> TokenCounts:
    """Count the tokens of all examples, or without a tokenizer of a sample, with one that is trained on its texts."""
    how = "tokens by the tokenizer of --model"
    if tokenizer is None:
        splits = {split: examples.select(_spread(len(examples), SAMPLE)) for split, examples in splits.items()}
        train = splits["train"]
        tokenizer = Tokenizer.train([*train.texts, *(train.pairs or ())], VOCABULARY)
        how = (
            f"an estimate: tokens by a tokenizer that was trained on {_counted(len(train), 'example')} of train, as"
            " a run from scratch trains one; --model NAME counts with a model's"
        )
    lengths = {}
    for split, examples in splits.items():
        of_parts = [tokenizer.encode_batch(*part, max_length=None)[2] for part in sequences(task, examples)]
        lengths[split] = np.concatenate(of_parts)
    return TokenCounts(tokenizer, how, lengths)


def sequences(task: Task, examples: Examples) -> list[tuple[Sequence[str], Sequence[str] | None]]:
    """The texts, and the second texts, of the sequences that the task's head reads of each example."""
    encoding = pair_encoding(task)
    joined = [] if encoding == "bi-encoder" else [(examples.texts, examples.pairs)]
    alone = [] if encoding == "cross-encoder" else [(examples.texts, None), (examples.pairs or [], None)]
    return [*joined, *alone]


def tokens_table(tokens: TokenCounts, max_length: int) -> Table:
    """Quantiles of the lengths by split, and how many sequences are longer than `max_length`."""
    table = _table(["tokens", "sequences", *QUANTILES, f"cut to {max_length}"])
    for split, lengths in tokens.lengths.items():
        values = np.quantile(lengths, list(QUANTILES.values()), method="higher")
        cut = int((lengths > max_length).sum())
        table.add_row(split, str(len(lengths)), *(f"{value:.0f}" for value in values), str(cut))
    return table


def row_lines(task: Task, examples: Examples, tokenizer: Tokenizer, max_length: int) -> Iterator[str]:
    """Some examples from all over the file: the user's label and what it is inside minbert, and the tokens."""
    chosen = examples.select(_spread(len(examples), ROWS))
    assert chosen.labels is not None
    for number, identity in enumerate(chosen.ids):
        of_row = chosen.labels[number : number + 1]
        (label,) = decode_labels(task, of_row)
        if task.is_multilabel:
            user = ", ".join(map(shown, label)) or "none"
            inside = f"1 at {', '.join(map(str, np.flatnonzero(of_row[0])))}" if label else "0 everywhere"
        elif task.is_regression:
            user, inside = f"{label:.6g}", f"{of_row[0]:.6g}"
        else:
            user, inside = shown(label), f"{of_row[0]:.0f}"
        yield f"id {one_line(shorten(identity))}, label {user}, inside minbert {inside}"
        for texts, pairs in sequences(task, chosen):
            ids = tokenizer.encode(texts[number], None if pairs is None else pairs[number], max_length)
            text = tokenizer.decode(ids)
            yield f"  {text if len(text) <= START + END else f'{text[:START]} … {text[-END:]}'}"


# Hints --------------------------------------------------------------------------------------------------------------


def hints(task: Task, splits: Mapping[str, Examples], tokens: TokenCounts, max_length: int) -> list[str]:
    """What may be worth a change, a line each."""
    train, found = splits["train"], []
    assert train.labels is not None
    if not task.is_regression:
        counts, classes = class_counts(task, train.labels), task.classes or ()
        few = int((counts < FEW).sum())
        if few:
            found.append(f"{few} of {len(classes)} classes have fewer than {FEW} training examples")
        most, least = int(counts.argmax()), int(np.where(counts > 0, counts, counts.max()).argmin())
        if counts[most] >= IMBALANCE * counts[least] and task.class_weights is None:
            times = f"{counts[most] / counts[least]:.0f} times as many training examples as {shown(classes[least])}"
            remedy = "`class_weights: balanced` weighs them alike, and the metric f1_macro scores them alike"
            found.append(f"class {shown(classes[most])} has {times}: {remedy}")
    if "dev" in splits and len(splits["dev"]) < SMALL_DEV:
        found.append(f"dev has {_counted(len(splits['dev']), 'example')}: a score of so few is a rough one")
    for split, lengths in tokens.lengths.items():
        if share := float((lengths > max_length).mean()):
            found.append(f"{split}: {max(share, 0.001):.1%} of the sequences are cut to {max_length} tokens")
    if test := splits.get("test"):  # the source warns of such a dev split
        known = np.isin(text_hashes(test.texts, test.pairs), text_hashes(train.texts, train.pairs))
        same = int(known.sum())
        if same:
            found.append(f"test: {_counted(same, 'example')} with texts that are in train too: its score is too high")
    return found


# Helpers ------------------------------------------------------------------------------------------------------------


def _spread(size: int, most: int) -> np.ndarray:
    """At most so many of the numbers below `size`, evenly spread from the first to the last."""
    return np.unique(np.linspace(0, size - 1, min(size, most)).round().astype(np.int64))


def _counted(number: int, unit: str) -> str:
    return f"{number} {unit}{'' if number == 1 else 's'}"


def _table(columns: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        left = number == 0 or column == "class"
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    return table
