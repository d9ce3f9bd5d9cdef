"""What people use today, stated again: transformers' padded BERT, Pytorch-PCGrad's and smart-pytorch's algorithms."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from batches import DECILES, drawn, sequences_as
from torch import Tensor, nn

from minbert.methods.divergences import DIVERGENCES
from minbert.methods.losses import LOSSES
from minbert.model import pair_encoding
from minbert.tasks import PAIR_ENCODINGS, Task, find_tasks

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

    A call of `plain`, `pcgrad`, `smart`, `smart_pcgrad`, `torchjd`, `gse` or `round_robin` is a whole step: the batch's
    copy to the device, losses, gradients, clipping, fused AdamW. It returns the loss, on the device. Batches are padded
    beforehand, as the workers of a DataLoader do, and lie in pinned memory where the device is a GPU.

    Args:
        tasks: with minbert's heads, which say as which sequences an example is read. Each of them is padded with those
            of its kind, and the head here is a linear one on the pooled vectors of an example, end to end.
        regularised: names of the tasks that have SMART in a step with it; all when left out.
        clip_norm: 0 for no clipping.
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
        tasks: Sequence[Task] = TASKS,
        regularised: Collection[str] | None = None,
        clip_norm: float = 1.0,
    ) -> None:
        import transformers

        torch.manual_seed(0)
        encoder = transformers.BertModel(transformers.BertConfig(**sizes, attn_implementation=attention))
        encoder.to(device).train()
        self.words = encoder.embeddings.word_embeddings
        self.encoder = torch.compile(encoder) if compiled else encoder
        self.tasks, self.clip_norm = tasks, clip_norm
        self.regularised = {task.name for task in tasks} if regularised is None else regularised
        widths = {task.name: PAIR_ENCODINGS[pair_encoding(task)] * sizes["hidden_size"] for task in tasks}
        self.heads = nn.ModuleDict({task.name: nn.Linear(widths[task.name], task.num_outputs) for task in tasks}).to(
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
        self.batches: list[dict[str, list[Tensor]]] = []
        for turn in range(batches):
            batch = {}
            for i, task in enumerate(tasks):
                rows = drawn(task.name, batch_size, sizes["vocab_size"], 100 * i + turn)
                kinds = zip(*(sequences_as(pair_encoding(task), row) for row in rows), strict=True)
                padded = [nn.utils.rnn.pad_sequence([*map(torch.tensor, kind)], batch_first=True) for kind in kinds]
                tensors = [*padded, labels(batch_size)[task.name]]
                batch[task.name] = [x.pin_memory() for x in tensors] if self.device.type == "cuda" else tensors
            self.batches.append(batch)
        self.steps = 0
        self.ids: dict[str, list[Tensor]] = {}  # by task the sequences of this step, whose padding is token 0
        self.targets: dict[str, Tensor] = {}

    def load(self) -> None:
        """Copy the next batch to the device."""
        batch = self.batches[self.steps % len(self.batches)]
        for name, tensors in batch.items():
            *self.ids[name], self.targets[name] = (x.to(self.device, non_blocking=True) for x in tensors)
        self.steps += 1

    def output(self, task: Task, words: Sequence[Tensor]) -> Tensor:
        """The task's outputs from the embeddings of its sequences' words."""
        with self.autocast():
            pooled = [
                self.encoder(inputs_embeds=x, attention_mask=(ids != 0).long()).last_hidden_state[:, 0]
                for x, ids in zip(words, self.ids[task.name], strict=True)
            ]
            return self.heads[task.name](F.dropout(torch.cat(pooled, -1), 0.1)).squeeze(-1).float()

    def loss(self, task: Task, smart: bool) -> Tensor:
        words = [self.words(ids) for ids in self.ids[task.name]]
        output = self.output(task, words)
        loss = LOSSES[task.loss](output, self.targets[task.name])
        return loss + self.regulariser(task, words, output) if smart and task.name in self.regularised else loss

    def regulariser(self, task: Task, words: Sequence[Tensor], output: Tensor) -> Tensor:
        """smart-pytorch's: one ascent step from normal noise, rescaled to infinity norm 1 for each token."""
        divergence = DIVERGENCES[task.loss]
        noise = [(SIGMA * torch.randn_like(x)).requires_grad_() for x in words]
        apart = divergence(self.output(task, [x + n for x, n in zip(words, noise, strict=True)]), output.detach())
        slopes = torch.autograd.grad(apart, noise)
        moved = [n + ETA * slope for n, slope in zip(noise, slopes, strict=True)]
        worst = [(x / (x.abs().amax(-1, keepdim=True) + 1e-6)).detach() for x in moved]
        return divergence(self.output(task, [x + w for x, w in zip(words, worst, strict=True)]), output)

    def summed(self, tasks: Sequence[Task], smart: bool) -> Tensor:
        """An update with the gradient of the tasks' summed loss."""
        loss = torch.stack([self.loss(task, smart) for task in tasks]).sum()
        loss.backward()
        self.update()
        return loss.detach()

    def projected(self, smart: bool, factor: float = 1.0) -> Tensor:
        """As Pytorch-PCGrad goes: a backward for each task, gradients of parameters it does not reach set to 0.

        Args:
            factor: of the sum of the projected gradients.
        """
        rows, losses = [], []
        for task in self.tasks:
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(self.loss(task, smart))
            losses[-1].backward()
            rows.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.params])
        for param, grad in zip(self.params, flattened_pcgrad(rows), strict=True):
            param.grad = grad if factor == 1 else grad.mul_(factor)
        self.update()
        return torch.stack(losses).sum().detach()

    def update(self) -> None:
        if self.clip_norm:
            nn.utils.clip_grad_norm_([p for p in self.params if p.grad is not None], self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def torchjd(self, smart: bool = False) -> Tensor:
        """PCGrad by TorchJD's autojac: the Jacobian of the losses, then its aggregation."""
        from torchjd.aggregation import PCGrad
        from torchjd.autojac import backward, jac_to_grad

        self.load()
        losses = [self.loss(task, smart) for task in self.tasks]
        backward(losses, inputs=self.params, parallel_chunk_size=1)
        jac_to_grad(self.params, PCGrad())
        self.update()
        return torch.stack(losses).sum().detach()

    def plain(self, smart: bool = False) -> Tensor:
        self.load()
        return self.summed(self.tasks, smart)

    def smart(self) -> Tensor:
        return self.plain(smart=True)

    def pcgrad(self, smart: bool = False) -> Tensor:
        self.load()
        return self.projected(smart)

    def smart_pcgrad(self) -> Tensor:
        return self.pcgrad(smart=True)

    def gse(self, smart: bool = False) -> Tensor:
        """004's (section 5.3.2): an update with the mean of PCGrad's gradients, then one with the plain sum."""
        self.load()
        self.projected(smart, factor=1 / len(self.tasks))
        return self.summed(self.tasks, smart)

    def round_robin(self, smart: bool = False) -> Tensor:
        """An update for each task, one after the other."""
        self.load()
        return torch.stack([self.summed([task], smart) for task in self.tasks]).sum()
