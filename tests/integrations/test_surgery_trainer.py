"""SurgeryTrainer: accumulation, clipping, schedules, bfloat16 and resuming are those of transformers' Trainer."""

from __future__ import annotations

import gc
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from spawned_ranks import run_two_ranks
from torch import Tensor, nn

pytest.importorskip("transformers", reason="needs transformers, of the extra [test]")
pytest.importorskip("accelerate", reason="needs accelerate, of the extra [test]")

from transformers import BertConfig, BertModel, TrainingArguments

from minbert.integrations import GradientSurgery, TaskBatch
from minbert.integrations.trainer import SurgeryTrainer


class Multitask(nn.Module):
    """A tiny BERT with two heads; the second task lacks examples in some batches."""

    def __init__(self, split: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        self.encoder = BertModel(BertConfig(vocab_size=20, **shape, **drop), add_pooling_layer=False)
        self.heads, self.split = nn.ModuleList(nn.Linear(16, 1) for _ in range(2)), split
        self.seen: list[torch.dtype] = []

    def forward(self, input_ids: Tensor, task: Tensor, labels: Tensor) -> dict:
        batch = TaskBatch(self.encoder, task, 2)
        if self.split:
            with batch:
                hidden = self.encoder(input_ids).last_hidden_state
        else:
            hidden = self.encoder(input_ids).last_hidden_state
        scores = [head(hidden[batch.rows(t)].mean(1))[:, 0] for t, head in enumerate(self.heads)]
        self.seen.append(scores[0].dtype)
        losses = [
            (its.float() - labels[batch.rows(t)]).square().mean() if len(its) else None for t, its in enumerate(scores)
        ]
        return {"losses": losses, "scores": torch.cat(scores), **({"batch": batch} if self.split else {})}


def examples(count: int) -> list[dict]:
    torch.manual_seed(1)
    return [
        {"input_ids": torch.randint(20, (6,)), "task": index % 2, "labels": torch.randn(())} for index in range(count)
    ]


def collate(rows: list[dict]) -> dict[str, Tensor]:
    rows = sorted(rows, key=lambda row: row["task"])
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


def trainer(folder: Path, model: nn.Module | None = None, rule: str = "upgrad", **options) -> SurgeryTrainer:
    defaults = {
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "logging_strategy": "no",
    }
    own = {name: options.pop(name) for name in ("surgery", "optimizers", "callbacks") if name in options}
    arguments = TrainingArguments(str(folder), **{**defaults, **options})
    data = {"train_dataset": examples(16), "eval_dataset": examples(8), "data_collator": collate}
    return SurgeryTrainer(model or Multitask(), arguments, **data, rule=rule, **own)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("rule", ["famo", "gradvac", "nash-mtl(every=3)"])
def test_a_resumed_run_goes_on_to_the_bit(tmp_path, rule: str) -> None:
    options = {"save_strategy": "steps", "save_steps": 3, "rule": rule}
    whole = trainer(tmp_path / "a", Multitask(dropout=0.1), **options)
    whole.train()
    assert whole.state.global_step == 8
    resumed = trainer(tmp_path / "b", Multitask(dropout=0.1), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert torch.equal(flat(whole.model), flat(resumed.model))
    assert torch.equal(whole.surgery.weights, resumed.surgery.weights)


def test_a_step_is_that_of_a_loop_with_surgery_clipping_and_schedule(tmp_path) -> None:
    run = trainer(tmp_path, num_train_epochs=1, gradient_accumulation_steps=2, max_grad_norm=0.1, weight_decay=0.0)
    rates, batches, norms = [], [], []
    step_of_run = run.training_step

    def training_step(model: nn.Module, inputs: dict[str, Tensor], *rest) -> Tensor:
        rates.append(run.lr_scheduler.get_last_lr()[0])
        batches.append(inputs)
        return step_of_run(model, inputs, *rest)

    run.training_step = training_step
    run.train()

    model = Multitask().train()
    optimizer = GradientSurgery(torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0), "upgrad")
    for step in range(2):
        for part in range(2):
            output = model(**batches[2 * step + part])
            optimizer.backward([loss / 2 for loss in output["losses"]], hold=part == 0)
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1).item())
        optimizer.param_groups[0]["lr"] = rates[2 * step]
        optimizer.step()
        optimizer.zero_grad()
    assert min(norms) > 0.1
    assert rates[0] > rates[2]
    torch.testing.assert_close(flat(run.model), flat(model), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("split", [False, True])
def test_bfloat16_trains(tmp_path, split: bool) -> None:
    model = Multitask(split)
    before = flat(model)
    run = trainer(tmp_path, model, bf16=True, rule="cagrad(c=0.4)")
    run.train()
    assert set(model.seen) == {torch.bfloat16}
    assert flat(model).dtype == torch.float32
    assert flat(model).isfinite().all()
    assert not torch.equal(flat(model), before)


def test_one_backward_gives_the_update_of_two(tmp_path) -> None:
    runs = [trainer(tmp_path / str(split), Multitask(split), optim="sgd") for split in (False, True)]
    for run in runs:
        run.train()
    torch.testing.assert_close(flat(runs[1].model), flat(runs[0].model), rtol=1e-4, atol=1e-6)


def test_evaluation_is_the_sum_of_the_losses_and_predictions_are_the_scores(tmp_path) -> None:
    run = trainer(tmp_path, Multitask(split=True))
    with torch.no_grad():
        batches = [run.model(**collate(examples(8)))]
    expected = sum(loss.item() for loss in batches[0]["losses"])
    assert run.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(run.predict(examples(8)).predictions, batches[0]["scores"].numpy(), rtol=1e-5)


def test_an_optimizer_of_ones_own_is_wrapped_and_options_are_passed(tmp_path) -> None:
    model = Multitask()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"surgery": {"generator": torch.Generator().manual_seed(1)}, "optimizers": (inner, None)}
    run = trainer(tmp_path, model, rule="pcgrad", **options)
    assert run.surgery is None
    run.train()
    assert run.surgery.optimizer is inner
    assert run.surgery.conflicts.cosine.shape == (2, 2)


class Both(nn.Module):
    """Two losses of each example, whose means over two halves of a batch average to those of the whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.heads = nn.Embedding(20, 8), nn.ModuleList(nn.Linear(8, 1) for _ in range(2))

    def forward(self, input_ids: Tensor, task: Tensor, labels: Tensor) -> dict:
        hidden = self.trunk(input_ids).mean(1)
        return {
            "losses": [
                (head(hidden)[:, 0] - sign * labels).square().mean()
                for head, sign in zip(self.heads, (1, -2), strict=True)
            ]
        }


def _rank(rank: int, folder: Path, port: int) -> None:
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in where.items()})
    torch.set_num_threads(1)
    run = trainer(folder / "run", Both(), ddp_backend="gloo", optim="sgd")
    run.train()
    assert isinstance(run.model_wrapped, nn.parallel.DistributedDataParallel)
    torch.save(flat(run.model), folder / f"{rank}.pt")
    # DistributedDataParallel as a group's last owner waits, with Python's lock held, for threads that may wait for it.
    del run
    gc.collect()
    torch.distributed.destroy_process_group()


def test_two_processes_make_the_steps_of_one(tmp_path) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    run_two_ranks(_rank, tmp_path, port)
    run = trainer(tmp_path, Both(), per_device_train_batch_size=8, optim="sgd")
    run.train()
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert torch.equal(*ranks)
    assert not torch.equal(ranks[0], flat(Both()))
    torch.testing.assert_close(ranks[0], flat(run.model), rtol=1e-5, atol=1e-7)
