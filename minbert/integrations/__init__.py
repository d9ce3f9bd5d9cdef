"""Surgery and SMART for any training loop; `minbert.integrations.transformers` has to be imported by that name."""

from minbert.methods.divergences import js_loss, kl_loss, sym_kl_loss

from .pcgrad import PCGrad
from .smart import SMARTLoss, inf_norm, l2_norm

__all__ = ["PCGrad", "SMARTLoss", "inf_norm", "js_loss", "kl_loss", "l2_norm", "sym_kl_loss"]
