"""Fails where an op of training has no code for GPUs, so that what follows would time the reference."""

from __future__ import annotations

import sys

from minbert import kernels, train

WITHOUT = {"attention_dropout_mask", "encoder_layers", "linear"}  # two ops of CPUs, and what cuBLAS multiplies


def main() -> int:
    found = kernels.backends("cuda")
    print(f"{train.__name__} is imported; ops on GPUs:", ", ".join(f"{op} {backend}" for op, backend in found.items()))
    missing = sorted({op for op, backend in found.items() if backend == "reference"} - WITHOUT)
    if missing:
        print(f"without code for GPUs: {', '.join(missing)}; minbert doctor says why", file=sys.stderr)
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
