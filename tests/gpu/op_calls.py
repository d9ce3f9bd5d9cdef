"""python tests/gpu/op_calls.py: a call of every op on a GPU, with inputs that were made on the host."""

from __future__ import annotations

import torch

from minbert.kernels.example_calls import calls

if __name__ == "__main__":
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device here: torch.cuda.is_available() is false")
    for name, call in calls("cuda").items():
        if name.startswith("linear"):  # not a kernel of ours
            continue
        sums = [result.double().sum() for result in call()]
        print(f"{name}: {sum(value.item() for value in sums):.6g}", flush=True)
