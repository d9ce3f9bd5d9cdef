"""minbert's parts for a training loop of one's own."""

from .pcgrad import PCGrad

__all__ = ["PCGrad"]
