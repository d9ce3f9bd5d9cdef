"""`minbert doctor --check` on a GPU."""

from __future__ import annotations

import json

import pytest

from minbert import doctor

pytestmark = pytest.mark.gpu


def test_every_op_agrees_with_the_reference(cuda, capsys):
    assert doctor.main(["--check", "--device=cuda", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["GPUs"]["cuda:0"]["supported"]
    compiled = {op for op, row in found["ops"]["cuda"].items() if row["runs"] in ("native", "triton")}
    called = {check["op"].removesuffix("_backward") for check in found["checks"]}
    assert compiled - {"adamw_", "combine"} <= called  # these two are other custom ops
    assert {check["dtype"] for check in found["checks"] if check["op"] == "attention_backward"} == {
        "float32",
        "float16",
        "bfloat16",
    }
