#!/usr/bin/env bash
# All GPU work in one command, on a machine with an NVIDIA GPU, its driver and the CUDA toolkit, Python >= 3.10 with torch
# and Triton, and no network:
#   bench/gpu.sh                        report, build, test, bench, race, graph and sanitize, in this order
#   bench/gpu.sh build test             these phases alone
#   bench/gpu.sh --dry-run              what would run
# A phase that fails or exceeds its time limit does not stop the later ones, but the exit status is 1 then. Each leaves
# $OUT/PHASE.json (build/gpu/out without $OUT) as soon as it ends. Python packages that the machine lacks are installed
# from wheels in build/gpu/wheels, which bench/gpu/wheels.sh fetches beforehand, where there is a network. No setting of the
# device is changed.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/local/cuda/bin"

for argument in "$@"; do
    case $argument in
        --dry-run | -h | --help) exec python3 -u bench/gpu/phases.py "$@" ;;
    esac
done
if ! command -v nvidia-smi >/dev/null || ! nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
    echo "bench/gpu.sh: no NVIDIA GPU here (nvidia-smi lists none). What needs none: pytest, and" >&2
    echo "python bench/gpu/ahead_of_time.py, which compiles every Triton kernel for sm_80, sm_90 and sm_100." >&2
    exit 2
fi
exec python3 -u bench/gpu/phases.py "$@"
