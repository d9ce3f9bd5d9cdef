"""Reading, generating, encoding and sampling the tasks' data."""

from minbert.data.encoded import Encoded, encode, pack_batches
from minbert.data.formats import Examples, Skipped, read_examples, read_glue
from minbert.data.sampling import TaskSampler, steps_per_epoch, task_at, token_budget_batches
from minbert.data.sources import Source, open_source

__all__ = [
    "Encoded",
    "Examples",
    "Skipped",
    "Source",
    "TaskSampler",
    "encode",
    "open_source",
    "pack_batches",
    "read_examples",
    "read_glue",
    "steps_per_epoch",
    "task_at",
    "token_budget_batches",
]
