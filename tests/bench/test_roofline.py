"""The floor model counts what an op cannot avoid: it follows from the op's own tensors, and grows with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import roofline
import torch
from roofline import Ceilings, Work

from minbert.model import Encoder, EncoderConfig

SLOW = Ceilings(bandwidth=1.0, rate=1.0)


def test_the_floor_is_the_larger_of_both_times_and_adds_up():
    work = Work(bytes=30, operations=50)
    assert work.floor(Ceilings(bandwidth=10, rate=10)) == 5
    assert work.floor(Ceilings(bandwidth=2, rate=10)) == 15
    assert roofline.floor([work, work], SLOW) == 100


def test_bytes_are_those_of_the_tensors():
    qkv, out = torch.empty(30, 3, 12, 64, dtype=torch.bfloat16), torch.empty(30, 12, 64, dtype=torch.bfloat16)
    assert roofline.attention([10, 20], 12, 64, backward=False).bytes == qkv.nbytes + out.nbytes
    assert roofline.attention([10, 20], 12, 64, backward=True).bytes == 2 * qkv.nbytes + out.nbytes
    x, params = torch.empty(100, 64, dtype=torch.float16), 2 * 64 * 4
    mean_rstd = 100 * 2 * 4
    assert roofline.layer_norm(100, 64, backward=False).bytes == 3 * x.nbytes + mean_rstd + params
    assert roofline.layer_norm(100, 64, backward=True, tasks=3).bytes == 5 * x.nbytes + mean_rstd + 4 * params
    assert roofline.layer_norm(100, 64, backward=True, dropout=False).bytes == 4 * x.nbytes + mean_rstd + 2 * params
    assert roofline.gelu(100, 64, backward=True).bytes == 3 * x.nbytes + 2 * 64 * 4
    assert roofline.smart_ascend(100, 64).bytes == 2 * roofline.smart_init(100, 64).bytes == 4 * x.nbytes


def test_operations_are_those_of_the_products():
    assert roofline.linear(10, 20, 30).operations == roofline.weight_gradients(10, 20, 30).operations == 12_000
    one = roofline.attention([16], 2, 8, backward=False).operations
    assert one == 2 * 2 * (2 * 16 * 16 * 8)  # scores and values, two heads
    assert roofline.attention([16, 16], 2, 8, backward=False).operations == 2 * one
    assert roofline.attention([32], 2, 8, backward=False).operations == 4 * one
    assert roofline.attention([16], 2, 8, backward=True).operations == 5 * one // 2


def test_the_encoders_parameters_are_counted():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    encoder = Encoder(EncoderConfig(vocab_size=100, **sizes))
    counted = roofline.Encoder(hidden=32, layers=2, heads=4, inner=64, vocabulary=100).parameters
    assert counted == sum(param.numel() for param in encoder.parameters())


def test_a_step_costs_more_with_surgery_and_most_with_smart():
    lengths, base = [28] * 96, roofline.Encoder()
    plain, surgery, smart = (
        roofline.step(base, lengths, rows=rows, smart=smart) for rows, smart in ((1, False), (3, False), (3, True))
    )
    seconds = [sum(roofline.floor(parts, roofline.H100) for parts in step.values()) for step in (plain, surgery, smart)]
    assert seconds == pytest.approx([3.66e-3, 4.07e-3, 8.53e-3], rel=0.02)
    assert set(smart) - set(plain) == {"SMART"}
    six_for_each = sum(part.operations for part in plain["matrix products"])
    assert six_for_each == 6 * sum(lengths) * 12 * 12 * 768**2  # twice the weights forwards, four times backwards


def test_floors_are_those_of_the_documentation():
    documented = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text()
    assert roofline.table() in documented
