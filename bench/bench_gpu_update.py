"""Gradient surgery, the optimizer and SMART's perturbations on a GPU, against what people use today and the floor."""

from __future__ import annotations

import importlib.util

import pytest
import roofline
import torch
from batches import DECILES, lengths
from bench_smart import EPSILON, ETA, SIGMA, eager_ascent, eager_start
from bench_surgery import TASKS, bert_shapes
from bench_update import MAX_NORM, OPTIONS
from peers import flattened_pcgrad, seeded
from session import FOUND
from timing import input_sets
from torch import Tensor

from minbert.kernels import adamw_, combine_adamw_, gram, smart_ascend, smart_init, surgery_weights


class Update:
    """Parameters of a BERT encoder, their moments, and T gradients of each."""

    def __init__(self, smoke: bool, device: torch.device) -> None:
        shapes = bert_shapes(64, 2, 1000) if smoke else bert_shapes(768, 12, 30522)
        self.params, self.first = ([torch.randn(shape, device=device) for shape in shapes] for _ in range(2))
        self.second = [torch.rand(shape, device=device) for shape in shapes]
        self.grads = [[torch.randn(shape, device=device) for shape in shapes] for _ in range(TASKS)]
        for later, earlier in zip(self.grads[1:], self.grads, strict=False):  # conflicts, for PCGrad to project away
            for new, old in zip(later, earlier, strict=True):
                new.sub_(old, alpha=0.5)
        self.elements = sum(param.numel() for param in self.params)
        self.weights = torch.full((TASKS,), 0.5, dtype=torch.float64, device=device)
        self.orders = torch.stack([torch.randperm(TASKS) for _ in range(TASKS)]).to(device)
        theirs = [param.clone().requires_grad_() for param in self.params]
        for param, grad in zip(theirs, self.grads[0], strict=True):
            param.grad = grad.clone()
        self.theirs = theirs
        self.fused = torch.optim.AdamW(theirs, fused=True, capturable=device.type == "cuda", **OPTIONS)

    def combine(self, _: int = 0) -> None:
        combine_adamw_(self.params, self.grads, self.weights, self.first, self.second, step=1, **OPTIONS)

    def whole(self, _: int = 0) -> None:
        weights, stats = surgery_weights(gram(self.grads), orders=self.orders, max_norm=MAX_NORM)
        combine_adamw_(
            self.params, self.grads, weights, self.first, self.second, skip_unless=stats[2], step=1, **OPTIONS
        )

    def eager_combine(self, _: int = 0) -> None:
        """Weighted sums by torch, clipping, and torch's fused AdamW."""
        for param, row in zip(self.theirs, zip(*self.grads, strict=True), strict=True):
            param.grad = torch.stack([0.5 * grad for grad in row]).sum(0)
        torch.nn.utils.clip_grad_norm_(self.theirs, MAX_NORM)
        self.fused.step()

    def pytorch_pcgrad(self, _: int = 0) -> None:
        for param, grad in zip(self.theirs, flattened_pcgrad(self.grads, seeded()), strict=True):
            param.grad = grad
        torch.nn.utils.clip_grad_norm_(self.theirs, MAX_NORM)
        self.fused.step()

    def flat(self) -> Tensor:
        return torch.stack([torch.cat([grad.flatten() for grad in row]) for row in self.grads])


@pytest.fixture
def update(smoke: bool, device: torch.device) -> Update:
    return Update(smoke, device)


def test_gram(gpu_race, update: Update) -> None:
    jacobian = update.flat()
    contenders = {
        "minbert": lambda i: gram(update.grads),
        "torch, flat matrix times its transpose": lambda i: jacobian @ jacobian.T,
    }
    work = roofline.gram(TASKS, update.elements)
    gpu_race(f"Gram, {TASKS} x {update.elements / 1e6:.0f}M", contenders, work, goal=490e-6)


def test_combine(gpu_race, update: Update) -> None:
    contenders = {"minbert": update.combine, "torch sum + clip + fused AdamW": update.eager_combine}
    work = roofline.combine_adamw(TASKS, update.elements)
    gpu_race(f"combine + clip + AdamW, {TASKS} x {update.elements / 1e6:.0f}M", contenders, work, goal=1500e-6)


def test_adamw(gpu_race, update: Update) -> None:
    grads = update.grads[0]
    contenders = {
        "minbert": lambda i: adamw_(update.params, grads, update.first, update.second, step=1, **OPTIONS),
        "torch fused AdamW": lambda i: update.fused.step(),
    }
    work = roofline.combine_adamw(1, update.elements)
    gpu_race(f"AdamW, {update.elements / 1e6:.0f}M", contenders, work)


def test_pcgrad_update(gpu_race, request: pytest.FixtureRequest, update: Update) -> None:
    """Gram matrix, weights, clipping and AdamW, against all of Pytorch-PCGrad and fused AdamW, and TorchJD's PCGrad."""
    published = "Pytorch-PCGrad + clip + fused AdamW"
    contenders = {"minbert": update.whole, published: update.pytorch_pcgrad}
    case = f"PCGrad + clip + AdamW, {TASKS} x {update.elements / 1e6:.0f}M"
    theirs = "TorchJD PCGrad alone, flat gradients"
    if importlib.util.find_spec("torchjd"):
        from torchjd.aggregation import PCGrad

        jacobian, aggregate = update.flat(), PCGrad()
        contenders[theirs] = lambda i: aggregate(jacobian)
    else:
        request.config.stash[FOUND].leave_out(case, theirs, "torchjd is not installed")
    work = roofline.Work(
        roofline.gram(TASKS, update.elements).bytes + roofline.combine_adamw(TASKS, update.elements).bytes
    )
    gpu_race(case, contenders, work, waiting=(published, theirs))


@pytest.mark.parametrize("where", ["memory", "L2 cache"])
@pytest.mark.parametrize("op", ["smart_init", "smart_ascend"])
def test_smart(gpu_race, device: torch.device, smoke: bool, op: str, where: str) -> None:
    """In a step its inputs come from the backward just before, and lie in the L2 cache."""
    sizes = [n for i, task in enumerate(DECILES) for n in lengths(task, 2 if smoke else 32, i).tolist()]
    tokens, columns = sum(sizes), 64 if smoke else 768
    work = getattr(roofline, op)(tokens, columns)
    sets = input_sets(work.bytes, device) if where == "memory" else 2
    cu_seqlens, seed = torch.tensor([0, *sizes]).cumsum(0).int().to(device), torch.tensor(1, device=device)
    x, grad = ([torch.randn(tokens, columns, device=device).bfloat16() for _ in range(sets)] for _ in range(2))
    perturbed = [smart_init(each, sigma=SIGMA, seed=seed, stream_id=0) for each in x]

    def ascend(i: int) -> Tensor:
        return smart_ascend(perturbed[i], x[i], grad[i], cu_seqlens, eta=ETA, epsilon=EPSILON)

    contenders = {
        "smart_init": {
            "minbert": lambda i: smart_init(x[i], sigma=SIGMA, seed=seed, stream_id=0),
            "torch eager": lambda i: eager_start(x[i]),
        },
        "smart_ascend": {
            "minbert": ascend,
            "torch eager": lambda i: eager_ascent(perturbed[i], x[i], grad[i]),
        },
    }[op]
    if device.type == "cuda":
        compiled = torch.compile(eager_start if op == "smart_init" else eager_ascent)
        sources = [x] if op == "smart_init" else [perturbed, x, grad]
        contenders["torch.compile"] = lambda i: compiled(*(source[i] for source in sources))
    goal = 4e-6 if op == "smart_ascend" and where == "L2 cache" else None
    gpu_race(f"{op}, {tokens} x {columns}, from {where}", contenders, work, sets=sets, goal=goal)
