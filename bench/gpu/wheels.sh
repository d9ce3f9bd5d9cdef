#!/usr/bin/env bash
# Fetches what bench/gpu.sh installs where there is no network: wheels for Python 3.12 on x86-64 Linux, without what such
# a machine has anyway (torch, Triton, NumPy, transformers, pytest, hypothesis, rich, matplotlib, CMake, ninja, pybind11).
set -euo pipefail
cd "$(dirname "$0")/../.."
wheels=build/gpu/wheels
rm -rf "$wheels"
# the peer TorchJD
python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d "$wheels" \
    'torchjd>=0.18'
ls -l "$wheels"
