"""Rows that the papers gave up, in time and memory, beside a plain step: `python bench/paper_walls.py --size small`.

Seconds and peak memory of a step: by minbert as the row has it, and plain, without surgery and SMART; by transformers
plain, on the same batch padded, and as the row has it, by the peers' algorithms with the attention that needs less
memory. A step is a batch of every task, of the paper's size and of real lengths: one update, two of GSE, or one for
each task where a row takes turns.

- 002, row H finetuned: with a frozen encoder an epoch took 2.4 hours, and 0.7 in row E, which lacks SMART (table 2);
  with a trained one the memory of the GPU did not suffice.
- 003, row 6, the best, with PCGrad: its author had neither the memory nor the time for surgery. SMART stays on Quora,
  and a step takes all tasks, as surgery needs them.
- 004, SMART with GSE: the memory of the GPU did not suffice (section 5.3.4).

minbert has the heads of the row; those of transformers are linear, on the pooled vectors of the same sequences.
"""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from batches import BATCHES, DECILES
from peers import Padded, shape
from records import machine
from session import SMOKE, Race
from steps import peak_memory, step_of, trainer_of
from training_runs import OneLineErrors, add_results, listed, write

from minbert import cli, kernels
from minbert.config import TrainConfig
from minbert.device import freed_memory_kept, keep_freed_memory
from minbert.errors import UserError, require, require_known
from minbert.files.schema_checks import build
from minbert.methods.smart import SmartConfig
from minbert.recipes import recipe
from minbert.training.trainer import Trainer

Step = Callable[[], object]

SIZES = {
    "small": shape(SMOKE),
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
             "vocab_size": 30522},
}  # fmt: skip
ROWS: dict[str, tuple[str, dict[str, Any]]] = {  # by recipe the peers' step (of `Padded`), and further options
    "002/h-finetune": ("round_robin", {}),
    "003/6": ("pcgrad", {"surgery": "pcgrad", "sampling": "joint", "epoch_length": "smallest"}),
    "004/smart-gse": ("gse", {}),
}
MEMORY_STEPS = 2
PLAIN = "transformers eager, plain"  # what the others are compared with
CONTENDERS = {  # by name who takes the step, and whether it is plain
    "minbert": ("minbert", False),
    "minbert, plain": ("minbert", True),
    PLAIN: ("eager", True),
    "transformers sdpa, plain": ("sdpa", True),
    "transformers sdpa": ("sdpa", False),
}


@dataclass(frozen=True)
class Case:
    """A row, for an encoder of a size in `SIZES`, in fp32 or bf16."""

    row: str
    size: str
    precision: str

    @property
    def config(self) -> TrainConfig:
        """The row's options, with the dropout that a pretrained BERT has where the row names none."""
        options = {"dropout": 0.1, **recipe(self.row), **ROWS[self.row][1], "scratch": SIZES[self.size]}
        own = {"precision": self.precision, "batch_size": 2} if SMOKE else {"precision": self.precision}
        return build(TrainConfig, options | own, self.row)

    def __str__(self) -> str:
        return f"{self.row}, 3 x {self.config.batch_size}, {self.size}, {self.precision}"


def minbert_trainer(case: Case, is_plain: bool) -> Trainer:
    config = case.config
    return trainer_of(config.replace(surgery="sum", smart=SmartConfig()) if is_plain else config, BATCHES)


def transformers_model(case: Case, attention: str) -> Padded:
    """With the tasks of the row, its batches, and SMART where the row has it."""
    config = case.config
    tasks = config.chosen_tasks(list(DECILES))
    return Padded(
        asdict(config.scratch),
        config.batch_size_of(tasks[0].name),
        torch.bfloat16 if case.precision == "bf16" else torch.float32,
        attention,
        batches=BATCHES,
        tasks=tasks,
        regularised=[task.name for task in tasks if config.smart.applies_to(task.name)],
        clip_norm=config.clip_norm,
    )


def maker(who: str, case: Case) -> Callable[[bool], Step]:
    """What makes a contender's steps, plain ones or those of the row; transformers' share a model.

    Args:
        who: minbert, or the attention of transformers.
    """
    in_turns = case.config.sampling != "joint"
    if who == "minbert":
        updates = len(DECILES) if in_turns else 1
        return lambda is_plain: step_of(minbert_trainer(case, is_plain), updates)
    peer, (name, _) = transformers_model(case, who), ROWS[case.row]
    plain = peer.round_robin if in_turns else peer.plain
    return lambda is_plain: plain if is_plain else partial(getattr(peer, name), smart=True)


def alone(who: str, is_plain: bool, case: Case) -> Step:
    """A contender's step for a process of its own."""
    if who == "minbert":
        keep_freed_memory()  # as minbert.train does
    return maker(who, case)(is_plain)


def seconds(case: Case, rounds: int) -> dict[str, float]:
    """Each contender's median seconds for a step, all of them in turns in this process."""
    made = {who: maker(who, case) for who in dict.fromkeys(who for who, _ in CONTENDERS.values())}
    race = Race({name: made[who](is_plain) for name, (who, is_plain) in CONTENDERS.items()})
    race.warm_up()
    for _ in range(rounds):
        race.time(*CONTENDERS)
    return race.medians


def rows_of(case: Case, rounds: int) -> list[dict[str, Any]]:
    """The rows of a record, one for each contender."""
    print(f"{case}: seconds", flush=True)
    with freed_memory_kept(torch.device("cpu")):  # afterwards the processes below have it
        medians = seconds(case, rounds)
        gc.collect()  # models whose hooks refer to themselves
    print(f"{case}: memory", flush=True)
    peaks = {name: peak_memory(alone, *contender, case, steps=MEMORY_STEPS) for name, contender in CONTENDERS.items()}
    return [
        {
            "benchmark": "paper_walls",
            "case": str(case),
            "name": name,
            "seconds": medians[name],
            "ratio": medians[name] / medians[PLAIN],
            "peak_bytes": peaks[name],
            "peak_ratio": peaks[name] / peaks[PLAIN],
            "rounds": rounds,
        }
        for name in CONTENDERS
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table, in which x is a multiple of what transformers' plain step with eager attention takes."""
    lines = ["| row | step | seconds | x | peak, MiB | x |", "|---|---|--:|--:|--:|--:|"]
    for row in rows:
        time, memory = f"{row['seconds']:.3f} | {row['ratio']:.2f}", f"{row['peak_bytes'] / 2**20:.0f}"
        lines.append(f"| {row['case']} | {row['name']} | {time} | {memory} | {row['peak_ratio']:.2f} |")
    return "\n".join([*lines, "", f"x: of {PLAIN}."]) + "\n"


def main(arguments: Sequence[str]) -> int:
    parser = OneLineErrors("python bench/paper_walls.py", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--size", type=listed(str), default="small", help=f"{', '.join(SIZES)}, or both (%(default)s)")
    parser.add_argument("--rows", type=listed(str), default=",".join(ROWS), help="of the papers (%(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="rounds that are timed (%(default)s)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="(%(default)s)")
    add_results(parser)
    options = parser.parse_args(arguments)
    for name in options.size:
        require_known("--size: unknown size", name, SIZES)
    for name in options.rows:
        require_known("--rows: unknown row", name, ROWS)
    require(options.steps >= 1, "steps", "at least 1", options.steps)
    if importlib.util.find_spec("transformers") is None:
        raise UserError("paper_walls.py needs transformers: pip install -e '.[bench]'")
    cases = [Case(row, size, options.precision) for size in options.size for row in options.rows]
    with kernels.use_matmul("auto"):
        rows = []
        for case in cases:
            rows += rows_of(case, options.steps)
            print(table(rows[-len(CONTENDERS) :]), flush=True)  # a later case may not fit in memory
        made_on = machine() | {"precision": options.precision}
    text = table(rows)
    given = {"size": ",".join(options.size), "rows": ",".join(options.rows), "steps": options.steps}
    words = [f"--{name} {value}" for name, value in {**given, "precision": options.precision}.items()]
    write(
        "The papers' walls",
        " ".join(["python bench/paper_walls.py", *words]),
        rows,
        text,
        made_on,
        options.results,
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
