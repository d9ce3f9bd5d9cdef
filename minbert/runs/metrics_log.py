"""metrics.jsonl: a line of JSON for each logged step and for each epoch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from minbert.errors import UserError
from minbert.files.atomic import append_line, sync, write_atomically, writing
from minbert.files.json_yaml import read_json_lines
from minbert.files.schema_checks import checked
from minbert.runs.experiment_trackers import Trackers
from minbert.runs.scores import check_scores_and_overall, expect

RESUME = "free some space and run the same command with --resume"

Record = dict[str, Any]
Numbers = dict[str, float | None]  # None for what was not finite

FIELDS: dict[str, Any] = {  # of a line, without dev
    **dict.fromkeys(("step", "epoch"), int),
    **dict.fromkeys(("lr", "grad_norm", "smart_share", "perturbation", "projected_share"), float | None),
    **dict.fromkeys(("examples_per_second", "bytes_sent"), float | None),
    **dict.fromkeys(("loss", "smart", "rdrop", "bregman", "cosine", "magnitude_similarity"), Numbers),
    **dict.fromkeys(("train_loss", "conflict_rate", "weights"), Numbers),
    "seconds": dict[str, float],
}


class MetricsLog:
    """The records of a run, at `path`.

    Args:
        writes: False for the processes of a run but the first: only reading does something then.

    Attributes:
        trackers: get the numbers of each line, too.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self.trackers: Trackers | None = None

    def append(self, record: Record) -> None:
        """Write a line; numbers that are not finite become null.

        Raises:
            UserError: the disk refuses it.
        """
        if not self.writes:
            return
        with writing(self.path, RESUME):
            append_line(self.path, json.dumps(_finite(record)))
        if self.trackers is not None:
            self.trackers.log(_finite(record))

    def sync(self) -> None:
        """Have the disk know all lines, before a checkpoint that comes after them."""
        if self.writes and self.path.exists():
            with writing(self.path, RESUME):
                sync(self.path)

    def drop_after(self, step: int) -> list[str]:
        """Drop the lines of later steps, a half-written last one, and damaged ones.

        Returns:
            what is wrong with each damaged one.
        """
        if not self.writes:
            return []
        records, problems = self.read()
        with writing(self.path, RESUME):
            write_atomically(self.path, "".join(json.dumps(each) + "\n" for each in records if each["step"] <= step))
        return problems

    def records(self) -> list[Record]:
        """All lines, without a last one that a crash cut short.

        Raises:
            UserError: a line is damaged.
        """
        records, problems = self.read()
        if problems:
            raise UserError(f"{problems[0]}; {len(problems)} such; --resume of the run drops them")
        return records

    def read(self) -> tuple[list[Record], list[str]]:
        """The lines that can be used, and what is wrong with each other line.

        A last line without its end, which a crash cut short, counts as neither.

        Raises:
            UserError: the file cannot be read.
        """
        records, problems = [], []
        for number, line in read_json_lines(self.path) if self.path.exists() else ():
            try:
                if isinstance(line, ValueError):
                    raise line
                records.append(_checked(line))
            except (ValueError, UserError) as error:
                problems.append(f"{self.path}, line {number}: {error}")
                last = number
        if problems and last == len(records) + len(problems) and not self.path.read_bytes().endswith(b"\n"):
            problems.pop()
        return records, problems

    def close(self, finished: bool) -> None:
        """Close the trackers, which may show whether the run has finished."""
        if self.trackers is not None:
            self.trackers.close(finished)
            self.trackers = None


def _checked(record: Record) -> Record:
    for name in ("step", "epoch"):
        if name not in record:
            raise UserError(f"no {name}")
    for name in FIELDS.keys() & record.keys():
        checked(record[name], FIELDS[name], name)
    expect(record["step"] >= 0 and record["epoch"] >= 1, "step and epoch", "0 and 1 or more", record["step"])
    if "dev" in record:
        check_scores_and_overall(record["dev"], "dev")
        if "train_loss" not in record:
            raise UserError("no train_loss")
    return record


def _finite(value: Any) -> Any:
    """The value with None for every NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
