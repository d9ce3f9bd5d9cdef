"""Multitask fine-tuning of BERT with SMART regularisation and gradient surgery, on compiled kernels."""

import os
import sys

if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    # torch's OpenMP threads (libgomp's) spin while they wait, for as long as this says when torch is loaded. By default
    # that is so long that a step takes ten times as long where something else keeps the cores busy.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

__version__ = "0.1.0"
