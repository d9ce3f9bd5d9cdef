"""R-Drop (Wu et al. 2021): two passes of the same inputs with other dropout masks have the same outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from minbert.errors import require


@dataclass(frozen=True)
class RDropConfig:
    """The regulariser of two dropout masks; a step costs two plain passes.

    With P1, P2 the outputs of the two passes, the paper's loss of an example (section 2) is

        -log P1(y) - log P2(y) + alpha/2 (KL(P1 || P2) + KL(P2 || P1)),

    the sum of two losses. Here it is half of that, so that a task's loss keeps its scale whatever alpha: the mean of
    the two losses, and alpha/4 of the symmetrised divergence. The divergence is the one that SMART has for the task's
    loss, of regressions the squared distance. The embedding block, the encoder and the heads all draw anew.

    Args:
        alpha: weight of the divergence, or one for each task, such as {sst: 5}; 0 is without R-Drop.
    """

    alpha: float | dict[str, float] = 0.0

    def __post_init__(self) -> None:
        for value in self.alpha.values() if isinstance(self.alpha, dict) else (self.alpha,):
            require(0 <= value < math.inf, "rdrop.alpha", "0 or more", value)

    @property
    def on(self) -> bool:
        return any(self.alpha.values()) if isinstance(self.alpha, dict) else self.alpha > 0

    def weight(self, task: str) -> float:
        """alpha of a task."""
        return self.alpha.get(task, 0.0) if isinstance(self.alpha, dict) else self.alpha

    def applies_to(self, task: str) -> bool:
        return self.weight(task) > 0
