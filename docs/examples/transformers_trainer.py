"""transformers' Trainer with gradient surgery: a small BERT from scratch, two tasks in each batch, one backward.

Prints the loss as the Trainer logs it, the weights of the last update, and the accuracy of both tasks on new examples.
"""

import tempfile

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertModel, TrainingArguments

from minbert.integrations import TaskBatch
from minbert.integrations.trainer import SurgeryTrainer

TASKS, WORDS, LENGTH = 2, 40, 12


class Multitask(nn.Module):
    """A BERT, and a head for each task on its mean hidden state."""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=WORDS, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
        )
        self.encoder = BertModel(config, add_pooling_layer=False)
        self.heads = nn.ModuleList(nn.Linear(config.hidden_size, 2) for _ in range(TASKS))

    def forward(self, input_ids: torch.Tensor, task: torch.Tensor, labels: torch.Tensor) -> dict:
        batch = TaskBatch(self.encoder, task, TASKS)
        with batch:  # the encoder runs on the rows of both tasks, and one backward keeps their gradients apart
            hidden = self.encoder(input_ids, attention_mask=(input_ids > 0).long()).last_hidden_state
        logits = [head(hidden[batch.rows(t)].mean(1)) for t, head in enumerate(self.heads)]
        losses = [cross_entropy(its, labels[batch.rows(t)]) if len(its) else None for t, its in enumerate(logits)]
        return {"losses": losses, "batch": batch, "logits": torch.cat(logits)}


def make_examples(count: int, seed: int) -> list[dict]:
    """Task 0: are most words below 20? Task 1: are most words even?"""
    draw = torch.Generator().manual_seed(seed)
    examples = []
    for index in range(count):
        words = torch.randint(1, WORDS, (LENGTH,), generator=draw)
        property_of = words < WORDS // 2 if index % 2 == 0 else words % 2 == 0
        examples.append({"input_ids": words, "task": index % 2, "labels": int(property_of.sum() > LENGTH // 2)})
    return examples


def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    """A batch, sorted by task as TaskBatch asks."""
    examples = sorted(examples, key=lambda example: example["task"])
    columns = {name: [torch.as_tensor(example[name]) for example in examples] for name in examples[0]}
    return {name: torch.stack(values) for name, values in columns.items()}


if __name__ == "__main__":
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            use_cpu=True,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=2,
            num_train_epochs=4,
            learning_rate=5e-3,
            max_grad_norm=1.0,
            save_strategy="no",
            logging_steps=16,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = SurgeryTrainer(
            Multitask(), arguments, train_dataset=make_examples(512, 1), data_collator=collate, rule="cagrad(c=0.4)"
        )
        trainer.train()
        print("weights of the last update:", trainer.surgery.weights)
    test, model = collate(make_examples(256, 2)), trainer.model.eval()
    with torch.no_grad():
        right = model(**test)["logits"].argmax(1) == test["labels"]
    print("accuracy:", [round(right[test["task"] == t].float().mean().item(), 3) for t in range(TASKS)])
