"""Surgery and SMART for any training loop.

`minbert.integrations.transformers` and `minbert.integrations.trainer` have to be imported by these names.
"""

from minbert.methods.divergences import js_loss, kl_loss, sym_kl_loss

from .gradient_surgery import GradientSurgery
from .pcgrad import PCGrad
from .smart import SMARTLoss, inf_norm, l2_norm
from .task_batch import TaskBatch

__all__ = [
    "GradientSurgery",
    "PCGrad",
    "SMARTLoss",
    "TaskBatch",
    "inf_norm",
    "js_loss",
    "kl_loss",
    "l2_norm",
    "sym_kl_loss",
]
