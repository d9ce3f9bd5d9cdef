"""minbert: multitask fine-tuning of BERT with SMART regularisation and gradient surgery."""

__version__ = "0.1.0"
