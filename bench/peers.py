"""What people use today, stated again: transformers' padded BERT, Pytorch-PCGrad's and smart-pytorch's algorithms."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from batches import DECILES, drawn
from torch import Tensor, nn

from minbert.methods.divergences import DIVERGENCES
from minbert.methods.losses import LOSSES
from minbert.tasks import Task, find_tasks

TASKS = find_tasks(list(DECILES))
SIGMA, ETA = 1e-5, 1e-3  # smart-pytorch's defaults


def shape(smoke: bool) -> dict[str, int]:
    """The 22.7M-parameter encoder of the design's measurements; a very small one for a smoke run."""
    if smoke:
        return {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64,
                "vocab_size": 200}  # fmt: skip
    return {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536,
            "vocab_size": 30522}  # fmt: skip


def labels(batch_size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {task.name: torch.randint(task.max_label + 1, (batch_size,), generator=generator).float() for task in TASKS}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def flattened_pcgrad(grads: list[list[Tensor]], generator: torch.Generator | None = None) -> list[Tensor]:
    """The way of Pytorch-PCGrad: flatten, project vector by vector in O(T^2) passes, merge by a mask, unflatten."""
    flat = [torch.cat([tensor.flatten() for tensor in row]) for row in grads]
    has_grad = [torch.cat([torch.ones_like(tensor).flatten() for tensor in row]) for row in grads]
    projected = [row.clone() for row in flat]
    for i, row in enumerate(projected):
        for j in torch.randperm(len(flat), generator=generator).tolist():
            product = torch.dot(row, flat[j])
            if j != i and product < 0:
                row -= product * flat[j] / flat[j].norm() ** 2
    shared = torch.stack(has_grad).prod(0).bool()
    merged = torch.zeros_like(flat[0])
    merged[shared] = torch.stack([row[shared] for row in projected]).sum(0)
    merged[~shared] = torch.stack([row[~shared] for row in projected]).sum(0)
    result, start = [], 0
    for tensor in grads[0]:
        result.append(merged[start : start + tensor.numel()].view_as(tensor).clone())
        start += tensor.numel()
    return result


class Padded:
    """transformers' BERT with a linear head for each task, on a batch of each task padded to its longest sequence.

    A call of `plain`, `pcgrad`, `smart`, `smart_pcgrad` or `torchjd` is a whole step: the batch's copy to the device,
    losses, gradients, clipping, fused AdamW. It returns the loss, on the device. Batches are padded beforehand, as the
    workers of a DataLoader do, and lie in pinned memory where the device is a GPU.
    """

    def __init__(
        self,
        sizes: dict[str, int],
        batch_size: int,
        dtype: torch.dtype = torch.float32,
        attention: str = "sdpa",
        compiled: bool = False,
        device: torch.device | str = "cpu",
        batches: int = 1,
    ) -> None:
        import transformers

        torch.manual_seed(0)
        encoder = transformers.BertModel(transformers.BertConfig(**sizes, attn_implementation=attention))
        encoder.to(device).train()
        self.words = encoder.embeddings.word_embeddings
        self.encoder = torch.compile(encoder) if compiled else encoder
        self.heads = nn.ModuleDict({task.name: nn.Linear(sizes["hidden_size"], task.num_outputs) for task in TASKS}).to(
            device
        )
        self.params = [*encoder.parameters(), *self.heads.parameters()]
        self.optimizer = torch.optim.AdamW(self.params, lr=1e-5, weight_decay=0.01, fused=True)
        self.autocast = (
            contextlib.nullcontext
            if dtype == torch.float32
            else lambda: torch.autocast(self.words.weight.device.type, dtype)
        )
        self.device = torch.device(device)
        self.batches: list[dict[str, tuple[Tensor, Tensor]]] = []
        for turn in range(batches):
            batch = {}
            for i, name in enumerate(DECILES):
                rows = map(torch.tensor, drawn(name, batch_size, sizes["vocab_size"], 100 * i + turn))
                pair = nn.utils.rnn.pad_sequence([*rows], batch_first=True), labels(batch_size)[name]
                batch[name] = tuple(x.pin_memory() for x in pair) if self.device.type == "cuda" else pair
            self.batches.append(batch)
        self.steps = 0
        self.ids: dict[str, Tensor] = {}  # by task the batch of this step, whose padding is token 0
        self.targets: dict[str, Tensor] = {}

    def load(self) -> None:
        """Copy the next batch to the device."""
        batch = self.batches[self.steps % len(self.batches)]
        self.ids, self.targets = (
            {name: pair[i].to(self.device, non_blocking=True) for name, pair in batch.items()} for i in range(2)
        )

    def output(self, task: Task, words: Tensor) -> Tensor:
        """The task's outputs from its words' embeddings."""
        mask = (self.ids[task.name] != 0).long()
        with self.autocast():
            hidden = self.encoder(inputs_embeds=words, attention_mask=mask).last_hidden_state
            return self.heads[task.name](F.dropout(hidden[:, 0], 0.1)).squeeze(-1).float()

    def loss(self, task: Task, smart: bool) -> Tensor:
        words = self.words(self.ids[task.name])
        output = self.output(task, words)
        loss = LOSSES[task.loss](output, self.targets[task.name])
        return loss + self.regulariser(task, words, output) if smart else loss

    def regulariser(self, task: Task, words: Tensor, output: Tensor) -> Tensor:
        """smart-pytorch's: one ascent step from normal noise, rescaled to infinity norm 1 for each token."""
        noise = (SIGMA * torch.randn_like(words)).requires_grad_()
        apart = DIVERGENCES[task.loss](self.output(task, words + noise), output.detach())
        (slope,) = torch.autograd.grad(apart, noise)
        moved = noise + ETA * slope
        worst = (moved / (moved.abs().amax(-1, keepdim=True) + 1e-6)).detach()
        return DIVERGENCES[task.loss](self.output(task, words + worst), output)

    def summed(self, smart: bool) -> Tensor:
        self.load()
        loss = torch.stack([self.loss(task, smart) for task in TASKS]).sum()
        loss.backward()
        self.update()
        return loss.detach()

    def projected(self, smart: bool) -> Tensor:
        """As Pytorch-PCGrad goes: a backward for each task, gradients of parameters it does not reach set to 0."""
        self.load()
        rows, losses = [], []
        for task in TASKS:
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(self.loss(task, smart))
            losses[-1].backward()
            rows.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.params])
        for param, grad in zip(self.params, flattened_pcgrad(rows), strict=True):
            param.grad = grad
        self.update()
        return torch.stack(losses).sum().detach()

    def update(self) -> None:
        nn.utils.clip_grad_norm_([p for p in self.params if p.grad is not None], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1

    def torchjd(self, smart: bool = False) -> Tensor:
        """PCGrad by TorchJD's autojac: the Jacobian of the losses, then its aggregation."""
        from torchjd.aggregation import PCGrad
        from torchjd.autojac import backward, jac_to_grad

        self.load()
        losses = [self.loss(task, smart) for task in TASKS]
        backward(losses, inputs=self.params, parallel_chunk_size=1)
        jac_to_grad(self.params, PCGrad())
        self.update()
        return torch.stack(losses).sum().detach()

    def plain(self) -> Tensor:
        return self.summed(smart=False)

    def smart(self) -> Tensor:
        return self.summed(smart=True)

    def pcgrad(self) -> Tensor:
        return self.projected(smart=False)

    def smart_pcgrad(self) -> Tensor:
        return self.projected(smart=True)
