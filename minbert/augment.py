"""Back-translate training sentences for `--augmented`: `minbert augment`."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from minbert import cli
from minbert.console import SECONDS_BETWEEN_LINES, Terminal
from minbert.data import Examples, open_source, refuse_skipped, skipped_lines
from minbert.device import resolve_device
from minbert.errors import UserError, first_line, require
from minbert.files.atomic import writing
from minbert.files.json_yaml import parse_object
from minbert.seeds import derive_seed
from minbert.tasks import TASKS, Task, find_tasks, read_tasks
from minbert.tasks.labels import decode_labels

NEEDS = "minbert augment needs transformers and sentencepiece: pip install 'minbert[augment]'"


@dataclass(frozen=True)
class AugmentConfig:
    """Back-translate each training sentence of a task (paper 002, section 4.6).

    Args:
        model: directory or hub name of a translation model (sequence to sequence), such as Helsinki-NLP/opus-mt-en-de.
        out: file to write, a JSON object on each line, for --augmented of minbert.train. The same command continues an
            unfinished file.
        back_model: model that translates back, such as Helsinki-NLP/opus-mt-de-en; without one, --model is a
            paraphraser.
        data: directory of CS224N files or GLUE folders, or a hub name; by default the built-in demo corpus.
        tasks_file: YAML file of records of your own tasks, as for minbert.train.
        task: the task of the training sentences; of pairs both are translated.
        batch_size: sentences in a batch.
        beams: width of the beam search.
        temperature: sample at this temperature instead of beam search.
        max_length: of a translation in tokens.
        seed: of the sampling.
        device: auto, cpu, cuda or cuda:N.
        strict: refuse data with a row that cannot be used; else such rows are named and left out.
    """

    model: str
    out: str
    back_model: str | None = None
    data: str | None = None
    tasks_file: str | None = None
    task: str = "sst"
    batch_size: int = 32
    beams: int = 4
    temperature: float | None = None
    max_length: int = 256
    seed: int = 0
    device: str = "auto"
    strict: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "beams", "max_length"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        positive = self.temperature is None or 0 < self.temperature < float("inf")
        require(positive, "temperature", "more than 0", self.temperature)

    @property
    def models(self) -> list[str]:
        return [self.model, self.back_model] if self.back_model else [self.model]

    @property
    def origin(self) -> str:
        """The models and options of a file, which each of its rows records."""
        search = f"{self.beams} beams" if self.temperature is None else f"temperature {self.temperature:g}"
        return f"{' and '.join(self.models)}, {search}, at most {self.max_length} tokens, seed {self.seed}"


class Translator:
    """A sequence-to-sequence model of transformers and its tokenizer.

    Raises:
        UserError: transformers or sentencepiece is not installed, or the model does not exist.
    """

    def __init__(self, name: str, config: AugmentConfig, device: torch.device) -> None:
        try:
            import transformers

            self.tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            self.model = transformers.AutoModelForSeq2SeqLM.from_pretrained(name).to(device).eval()
        except ImportError:
            raise UserError(NEEDS) from None
        except Exception as error:  # a missing file, another kind of model, a lost connection: each raises its own
            raise UserError(f"{name}: not a translation model that transformers loads ({first_line(error)})") from None
        self.options: dict[str, Any] = {"max_new_tokens": config.max_length, "num_beams": config.beams}
        if config.temperature is not None:
            sampling = {"num_beams": 1, "do_sample": True, "temperature": config.temperature, "top_k": 0}
            self.options = {**self.options, **sampling}

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str], seed: int) -> list[str]:
        """The translation of each text; the seed is that of the sampling."""
        torch.manual_seed(seed)
        inputs = self.tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True).to(self.model.device)
        inputs.pop("token_type_ids", None)
        return self.tokenizer.batch_decode(self.model.generate(**inputs, **self.options), skip_special_tokens=True)


def main(arguments: Sequence[str]) -> int:
    """Write the file, or the rows that it lacks.

    Batches hold sentences of similar length. Each is written at once, so a stopped command loses at most one batch.
    """
    config, console = cli.parse("augment", AugmentConfig, arguments), Terminal()
    own = {} if config.tasks_file is None else read_tasks(config.tasks_file)
    task, *_ = find_tasks([config.task], {**TASKS, **own})
    source = open_source(config.data, own)
    task = source.complete(task)
    examples = source.load(task, "train")
    if config.strict:
        refuse_skipped(examples.skipped)
    for line in skipped_lines(examples.skipped, "minbert train lists all of them in its run"):
        console.print(line)
    order = sorted(range(len(examples)), key=lambda i: len(examples.texts[i]))
    rows = [_row(task, examples, i, config.origin) for i in order]
    out = Path(config.out)
    done, size = finished(out, rows, config.batch_size)
    starts = range(done, len(rows), config.batch_size)
    if starts:
        device = resolve_device(config.device)
        translators = [Translator(name, config, device) for name in config.models]
    started = printed = time.monotonic()
    try:
        with (
            writing(out, "free some space and run the same command again"),
            open(out, "ab") as file,
        ):
            file.truncate(size)
            for start in track(starts, "translating", console=console, transient=True, disable=not console.is_terminal):
                batch = rows[start : start + config.batch_size]
                for column in task.text:
                    texts = [row[column] for row in batch]
                    for number, translate in enumerate(translators):
                        texts = translate(texts, derive_seed(config.seed, "augment", start, column, number))
                    batch = [{**row, column: text.strip()} for row, text in zip(batch, texts, strict=True)]
                file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in batch).encode())
                file.flush()
                done = start + len(batch)
                if not console.is_terminal and time.monotonic() - printed > SECONDS_BETWEEN_LINES:
                    printed = time.monotonic()
                    seconds = (printed - started) / (done - starts.start) * (len(rows) - done)
                    console.print(f"{done} of {len(rows)} translated, {seconds:.0f} s left")
    except KeyboardInterrupt:
        console.print(f"{done} of {len(rows)} are in {out}; the same command continues")
        raise
    console.print(f"{len(rows)} in {out}; train with --augmented.{task.name} {out}")
    return 0


def finished(out: Path, rows: Sequence[Mapping[str, Any]], batch_size: int) -> tuple[int, int]:
    """The number of rows, in whole batches, that the file has, and their size in bytes.

    Raises:
        UserError: it has other content, or cannot be read or written.
    """
    try:
        if not out.exists() and out.parent.is_dir():
            return 0, 0
        if out.exists() and not out.is_file() and not out.is_dir():  # opening a pipe would block
            raise OSError(0, "not a regular file")
        with open(out, "r+b") as file:
            lines = file.read().splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
    for number, line in enumerate(lines, 1):
        row = rows[number - 1] if number <= len(rows) else {}
        prefix = json.dumps({"id": row.get("id")}, ensure_ascii=False)[:-1].encode()
        if number == len(lines) and not line.endswith(b"\n") and prefix[: len(line)] == line[: len(prefix)]:
            lines.pop()  # the command was stopped in this line
            break
        try:
            found = parse_object(line.decode(), strict=False)
            origin, identity = found["by"], found["id"]
        except (ValueError, KeyError):
            raise UserError(
                f"--out {out}, line {number}: not a row that minbert augment wrote; choose another"
            ) from None
        if (origin, identity) != (row.get("by"), row.get("id")):
            raise UserError(f"--out {out}, line {number}: made from other data or by {origin}; choose another file")
    done = len(lines) if len(lines) == len(rows) else len(lines) // batch_size * batch_size
    return done, sum(map(len, lines[:done]))


def _row(task: Task, examples: Examples, index: int, origin: str) -> dict[str, Any]:
    """An example as a row of the file, by its columns' names."""
    assert examples.labels is not None, "training examples have labels"
    (label,) = decode_labels(task, examples.labels[index : index + 1])
    texts = (examples.texts[index], *([examples.pairs[index]] if examples.pairs else []))
    columns = {task.id or "id": examples.ids[index], **dict(zip(task.text, texts, strict=True))}
    label = int(label) if isinstance(label, float) and label.is_integer() else label
    return {"id": examples.ids[index], **columns, task.label: label, "by": origin}


if __name__ == "__main__":
    cli.run(main)
