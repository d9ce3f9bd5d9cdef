#!/usr/bin/env bash
# Fetches what bench/gpu.sh installs where there is no network: wheels for Python 3.12 on x86-64 Linux, without what such
# a machine has anyway (torch, Triton, NumPy, transformers, pytest, hypothesis, rich, matplotlib, CMake, ninja, pybind11).
# They and the working tree must not exceed 64 MiB, which is what goes to such a machine.
set -euo pipefail
cd "$(dirname "$0")/../.."
wheels=build/gpu/wheels
needed=(
    'platformdirs>=3.0' # minbert cannot be imported without it
    'filelock>=3.30'    # an older one may be there
    'torchjd>=0.18'     # a peer: PCGrad by autojac
    'liger-kernel>=0.6' # a peer: LayerNorm
)
rm -rf "$wheels"
python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d "$wheels" \
    "${needed[@]}"
# that they can be installed there
python3 -m pip install -q --dry-run --no-index --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --target build/gpu/site "$wheels"/*.whl
ls -l "$wheels"
bytes() { du -bc --files0-from=- | tail -1 | cut -f1; }
tree=$(git ls-files -coz --exclude-standard | bytes)
fetched=$(find "$wheels" -name '*.whl' -print0 | bytes)
total=$(((tree + fetched) >> 20))
echo "$total MiB of 64 with the working tree"
[ "$total" -lt 64 ]
