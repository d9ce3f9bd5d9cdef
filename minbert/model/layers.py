"""Small layers around the heads: projections, batch normalisation, and the layer that all heads share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minbert import kernels
from minbert.kernels.task_views import Parameter

INITIALIZER_RANGE = 0.02  # standard deviation of new weights (Devlin et al. 2019)
MOMENTUM = 0.1  # a batch's share of the running statistics, as in PyTorch


def new_linear(inputs: int, outputs: int, *, bias: bool = True) -> nn.Linear:
    """A linear layer with BERT's initialisation; one that is batch-normalised next needs no bias: that takes it off."""
    linear = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias)
    nn.init.normal_(linear.weight, std=INITIALIZER_RANGE)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


def dropout(x: Tensor, p: float, seed: Tensor | None, stream_id: int) -> Tensor:
    """`kernels.dropout` of an activation [..., D], which may be empty."""
    if p == 0 or x.numel() == 0:
        return x
    return kernels.dropout(x.reshape(-1, x.shape[-1]), p=p, seed=seed, stream_id=stream_id).view_as(x)


def view_of(parameter: Parameter, view: int) -> Tensor:
    """The parameter, or one of its views where each task has one (`minbert.methods.task_gradients`)."""
    return parameter if isinstance(parameter, Tensor) else parameter[view]


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe and Szegedy 2015) over the sequences of one task, which has a batch of its own.

    In training the batch's own statistics normalise it: in SMART's perturbed passes too, so that both outputs that are
    compared come from the same function of a batch. The running statistics, which evaluation uses, are those of clean
    inputs under the parameters that train: passes in `statistics_kept` leave them alone, and so does a batch that is
    not finite.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))
        self.eps = eps
        self.counts = True  # whether batches enter the running statistics

    def forward(self, x: Tensor, view: int = 0) -> Tensor:
        """x [n, D] normalised; in training n is 0, or at least 2.

        Raises:
            ValueError: a training batch of one.
        """
        weight, bias = view_of(self.weight, view), view_of(self.bias, view)
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, weight, bias, False, MOMENTUM, self.eps)
        if len(x) == 0:
            return x
        y = F.batch_norm(x, None, None, weight, bias, True, MOMENTUM, self.eps)
        if self.counts:
            self._count(x.detach())
        return y

    @torch.no_grad()
    def _count(self, x: Tensor) -> None:
        variance, mean = torch.var_mean(x, 0)
        finite = (mean + variance).isfinite().all()
        for running, value in ((self.running_mean, mean), (self.running_var, variance)):
            running.copy_(torch.where(finite, running.lerp(value, MOMENTUM), running))


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Leave the running statistics of every `BatchNorm` in the module as they are."""
    norms = [part for part in module.modules() if isinstance(part, BatchNorm)]
    try:
        for norm in norms:
            norm.counts = False
        yield
    finally:
        for norm in norms:
            norm.counts = True


class SharedLinear(nn.Module):
    """relu(W x + b) between pooling and every head (003, section 3, "Weight Sharing"; table 4, row 6)."""

    normalises = False  # whether it needs batches of at least 2

    def __init__(self, hidden_size: int, dropout_p: float) -> None:
        super().__init__()
        self.linear = new_linear(hidden_size, hidden_size, bias=not self.normalises)
        self.dropout_p = dropout_p

    def forward(self, x: Tensor, view: int = 0, *, seed: Tensor | None, stream_id: int) -> Tensor:
        """x [n, D] of one task, which reads the parameters' view of that number; likewise out."""
        return self._product(x, view).relu()

    def _product(self, x: Tensor, view: int) -> Tensor:
        bias = None if self.linear.bias is None else view_of(self.linear.bias, view)
        return F.linear(x, view_of(self.linear.weight, view), bias)


class SharedTransform(SharedLinear):
    """dropout(GELU(BatchNorm(W x))) between pooling and every head (002, row F).

    The paper changes "the Forward function in the MultitaskBERT class" (section 5.4), which all tasks go through, by
    "integrating more layers, such as Batch Normalization, GELU activation functions, and Dropout, to each task"
    (section 4.5); "extra feedforward layers" (section 6). It gives no order and no sizes. Here it is one layer of the
    encoder's width. Each task's batch is normalised by itself, as it is where one task takes a step; the running
    statistics are those of all tasks together.
    """

    normalises = True

    def __init__(self, hidden_size: int, dropout_p: float) -> None:
        super().__init__(hidden_size, dropout_p)
        self.norm = BatchNorm(hidden_size)

    def forward(self, x: Tensor, view: int = 0, *, seed: Tensor | None, stream_id: int) -> Tensor:
        y = F.gelu(self.norm(self._product(x, view), view))
        return dropout(y, self.dropout_p if self.training else 0.0, seed, stream_id)


SHARED_LAYERS: dict[str, type[SharedLinear]] = {"linear": SharedLinear, "transform": SharedTransform}
