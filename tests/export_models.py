"""Small models with random weights that are large enough to matter, as they are exported."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from minbert.data import Examples, demo
from minbert.data.tokenizer import Tokenizer
from minbert.export.trained import Trained
from minbert.model import Encoder, EncoderConfig, MultitaskModel
from minbert.tasks import Task, find_tasks

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
MAX_LENGTH = 12  # some sentences are cut
SINGLES, PAIRS = (demo.examples(name, "dev").select(range(16)) for name in ("sst", "sts"))
TOKENIZER = Tokenizer.train([*SINGLES.texts, *PAIRS.texts, *(PAIRS.pairs or ())], 300)


def task_of(name: str, **changes: Any) -> Task:
    """A built-in task, changed."""
    return replace(find_tasks([name])[0], **changes)


def examples_of(task: Task) -> Examples:
    return PAIRS if task.is_pair else SINGLES


def trained(*tasks: Task, pooling: str = "cls", shared_layer: str | None = None) -> Trained:
    """A model of tasks, in which every weight, bias and running statistic is random."""
    torch.manual_seed(0)
    config = EncoderConfig(**SHAPE, vocab_size=TOKENIZER.vocab_size, initializer_range=0.2)
    model = MultitaskModel(Encoder(config, pooler=True), tasks, pooling=pooling, shared_layer=shared_layer).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "running_var" in name:
                tensor.uniform_(0.5, 2)
            elif not name.startswith("encoder"):
                tensor.normal_(std=0.3)
    return Trained(model, TOKENIZER, list(model.tasks.values()), MAX_LENGTH)
