"""Every op on a GPU is as near to float64 as its reference; a test for each, as Triton compiles in parallel."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import pytest

from minbert.kernels import dispatch
from minbert.kernels.example_calls import calls
from minbert.kernels.op_checks import captured_calls, compare

DTYPES = ("bfloat16", "float32", "float16")
# In the order of what a training step spends its time on.
OF_ACTIVATIONS = (
    "attention",
    "dropout_add_layer_norm",
    "bias_gelu",
    "embedding",
    "first_token_attention",
    "dropout",
    "smart_init",
    "smart_ascend",
    "linear",
)
OF_GRADIENTS = ("gram", "combine_adamw_", "combine", "adamw_")
OTHERS = ("surgery_weights", "task_weights", "dropout_mask")
CASES = [
    *((op, dtype) for dtype in DTYPES for op in OF_ACTIVATIONS),
    *((op, dtype) for dtype in DTYPES[:2] for op in OF_GRADIENTS),
    *((op, "") for op in OTHERS),
]
ON_CPUS = {"attention_dropout_mask", "encoder_layers"}


def chosen(found: Mapping[str, Callable], op: str, dtype: str) -> list[str]:
    """The names of the calls of an op with activations, or gradients, of this type."""
    return [
        name for name in found if name.split(",")[0].split(" ")[0] == op and (not dtype or name.endswith(f", {dtype}"))
    ]


@functools.cache
def calls_of_a_gpu() -> dict[str, Callable]:
    return calls("cuda")


def test_every_op_of_a_gpu_is_among_the_cases():
    assert {op for op, _ in CASES} == set(dispatch.OPS) - ON_CPUS


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "dtype"), CASES)
def test_ops_are_as_near_to_float64_as_the_reference(cuda, op, dtype):
    found = calls_of_a_gpu()
    names = chosen(found, op, dtype)
    assert names
    wrong = []
    for name in names:
        with captured_calls() as recorded:
            found[name]()
        assert recorded
        wrong += [f"{name}: {result}" for result in map(compare, recorded) if not result.ok]
    assert not wrong, "\n".join(wrong)


@pytest.mark.gpu
def test_no_op_falls_back_to_the_reference(cuda):
    runs = dispatch.backends(cuda)
    assert {op for op, backend in runs.items() if backend == "reference"} == ON_CPUS | {"linear"}
