"""Reading, generating, encoding and sampling the tasks' data."""

from minbert.data.augmentation import joined, read_augmented, swapped
from minbert.data.encoded import Encoded, encode, pack_batches
from minbert.data.examples import Examples
from minbert.data.formats import read_examples, read_file, read_glue, read_windows
from minbert.data.held_out import Folds, dev_rows, fold_numbers
from minbert.data.sampling import Plan, TaskSampler, plan, token_budget_batches
from minbert.data.skipped import (
    Skipped,
    SkippedRow,
    read_skipped,
    refuse_skipped,
    skipped_lines,
    skipped_rows,
    update_skipped,
    write_skipped,
)
from minbert.data.source import Source
from minbert.data.sources import WithReviews, names_hub, open_source
from minbert.data.text_column import TextColumn

__all__ = [
    "Encoded",
    "Examples",
    "Folds",
    "Plan",
    "Skipped",
    "SkippedRow",
    "Source",
    "TaskSampler",
    "TextColumn",
    "WithReviews",
    "dev_rows",
    "encode",
    "fold_numbers",
    "joined",
    "names_hub",
    "open_source",
    "pack_batches",
    "plan",
    "read_augmented",
    "read_examples",
    "read_file",
    "read_glue",
    "read_skipped",
    "read_windows",
    "refuse_skipped",
    "skipped_lines",
    "skipped_rows",
    "swapped",
    "token_budget_batches",
    "update_skipped",
    "write_skipped",
]
