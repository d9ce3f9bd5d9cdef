"""Task heads: from a sequence's pooled vector to a task's outputs. A new head is one class in `HEADS`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minbert import kernels

INITIALIZER_RANGE = 0.02  # standard deviation of new weights (Devlin et al. 2019)


class LinearHead(nn.Module):
    """Dropout and one linear layer, in the parameters' precision (float32) whatever the encoder's."""

    def __init__(self, hidden_size: int, outputs: int, dropout_p: float = 0.1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, hidden_size))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.dropout_p = dropout_p
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INITIALIZER_RANGE)
        nn.init.zeros_(self.bias)

    def forward(self, pooled: Tensor, *, seed: Tensor | None, site: int) -> Tensor:
        """Outputs for n sequences.

        Args:
            pooled: [n, D].
            seed: int64 scalar for dropout, which acts in training mode only.
            site: the dropout site, a number of this head's own.

        Returns:
            [n, outputs], or [n] when there is one output.
        """
        x = pooled.to(self.weight.dtype)
        if self.training and self.dropout_p > 0 and len(x) > 0:
            x = kernels.dropout(x, p=self.dropout_p, seed=seed, site=site)
        scores = F.linear(x, self.weight, self.bias)
        return scores.squeeze(1) if len(self.bias) == 1 else scores


HEADS: dict[str, type[LinearHead]] = {"linear": LinearHead}
