"""Multitask fine-tuning of BERT with SMART regularisation and gradient surgery, on compiled kernels."""

import os
import sys

if "torch" not in sys.modules:
    # torch's OpenMP threads spin while they wait, unless they are told not to before torch is loaded. Where something
    # else keeps the cores busy, spinning makes a step ten times slower; where nothing does, it gains nothing.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__version__ = "0.1.0"
