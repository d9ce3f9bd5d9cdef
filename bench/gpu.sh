#!/usr/bin/env bash
# All GPU work in one command, on a machine with an NVIDIA GPU, its driver and the CUDA toolkit, Python >= 3.10 with torch
# and Triton, a C++17 compiler, CMake, ninja and pybind11, and no network:
#   bench/gpu.sh                        report, build, smoke, steps, ops; then graph, race, rest, sanitize if time is left
#   bench/gpu.sh --budget 480           so many seconds for the whole call (480): phases are cut short or skipped by name
#   bench/gpu.sh build race sanitize    these phases alone
#   bench/gpu.sh --dry-run              what would run, with the seconds that it should take
# report    the device, its versions, and what it reaches in a copy and in a product of matrices
# build     the native extension for this GPU alone, with a job for each core
# smoke     every op against its reference, then training against that of the CPU
# steps     training steps as training takes them, against transformers' and the peers'
# ops       every op against its peers and its floor
# graph     ops and training steps as CUDA graphs, against the same without, to the bit
# race      every op 250 times while other streams are busy
# rest      all other tests of GPUs
# sanitize  compute-sanitizer's four tools over every kernel
# A phase that fails or exceeds its time limit does not stop the later ones, but the exit status is 1 then. $OUT
# (build/gpu/out without $OUT) has phases.json and log.txt, and the records of the benchmarks, steps.json, ops.json and
# attention_without_dropout.json: each is written again after every command, or every benchmark, so that what is cut off
# keeps what was measured. Packages that the machine lacks are installed from wheels in build/gpu/wheels, which
# bench/gpu/wheels.sh fetches beforehand, where there is a network. Records name the commit; in a copy without .git, the
# environment variable MINBERT_COMMIT says which it is. No setting of the device is changed.
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
