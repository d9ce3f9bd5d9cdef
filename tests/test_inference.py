"""Outputs of a trained model: weights are cast once, batches keep to a budget, and the order is the input's."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minbert import inference, kernels
from minbert.data import Encoded
from minbert.device import resolve_precision
from minbert.inference import head_outputs, prepared
from minbert.model import Encoder, EncoderConfig, MultitaskModel
from minbert.tasks import find_tasks

SHAPE = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
CPU = torch.device("cpu")

OPS_OF_A_LAYER = ("attention", "first_token_attention", "bias_gelu", "dropout_add_layer_norm")


@pytest.fixture
def model() -> MultitaskModel:
    torch.manual_seed(0)
    return MultitaskModel(Encoder(EncoderConfig(**SHAPE, initializer_range=0.2)), find_tasks(["sst", "sts"])).eval()


def examples(lengths: list[int], seed: int = 0) -> Encoded:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.random.default_rng(seed).integers(1, 50, offsets[-1]).astype(np.int32)
    return Encoded(ids, np.zeros(len(ids), np.uint8), offsets, None, [str(i) for i in range(len(lengths))], 0)


@pytest.mark.parametrize("array", ["token_ids", "token_type_ids"])
def test_ids_outside_the_encoders_tables_are_refused_before_a_batch_goes_to_the_device(model, array):
    encoded = examples([3, 9])
    getattr(encoded, array)[7] = 50
    with pytest.raises(ValueError, match="id 50 is outside the encoder's table of"):
        inference.in_batches(model, encoded, torch.device("meta"), lambda packed, n: pytest.fail("it was computed"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("library", ["blas", "onednn"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_outputs_are_those_of_weights_that_are_cast_at_use(dtype, library, pooling):
    if dtype == torch.bfloat16 and resolve_precision("auto", CPU) != "bf16":
        pytest.skip("this processor multiplies no bf16 matrices")
    if library == "onednn" and not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(**SHAPE, initializer_range=0.2))
    encoder.compute_dtype = dtype
    model = MultitaskModel(encoder, find_tasks(["sst"]), pooling=pooling).eval()
    packed = examples([3, 9, 4]).pack(np.arange(3))
    with kernels.use_matmul(library), torch.inference_mode():
        expected = model(packed, {"sst": 3})["sst"]
        with prepared(model):
            found = model(packed, {"sst": 3})["sst"]
        with kernels.use_backend("reference"):
            encoder.compute_dtype = torch.float32
            exact = model.double()(packed, {"sst": 3})["sst"]
    unit = torch.finfo(dtype).eps * exact.abs().max()
    assert (found - exact).abs().max() <= 2 * (expected - exact).abs().max() + unit


def test_no_product_of_the_encoder_casts_a_weight_in_the_block(model):
    model.encoder.compute_dtype = torch.bfloat16
    parameters = dict(model.named_parameters())
    with kernels.use_backend("reference"), prepared(model):
        assert model.encoder.packed_layers is None
        for layer in model.encoder.layers:
            for projection in (layer.qkv, layer.attention_output, layer.intermediate, layer.output):
                assert projection.weight.dtype == torch.bfloat16
            assert (
                layer.qkv.bias.dtype == layer.attention_output.bias.dtype == layer.output.bias.dtype == torch.bfloat16
            )
            assert layer.intermediate.bias.dtype == layer.output_norm.weight.dtype == torch.float32
    after = dict(model.named_parameters())
    assert after.keys() == parameters.keys()
    assert all(after[name] is parameter for name, parameter in parameters.items())


def test_the_parameters_come_back_after_an_error(model):
    parameters = list(model.parameters())
    model.encoder.compute_dtype = torch.bfloat16
    for backend in ("auto", "reference"):
        with kernels.use_backend(backend), pytest.raises(RuntimeError, match="stop"), prepared(model):
            raise RuntimeError("stop")
        assert model.encoder.packed_layers is None
        assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))


def test_the_layers_run_in_one_call_in_the_block_and_each_op_by_itself_in_training(model):
    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ops.append(func.name().removeprefix("minbert::"))
            return func(*args, **(kwargs or {}))

    packed = examples([3, 5]).pack(np.arange(2))
    ops: list[str] = []

    def forward() -> set[str]:
        ops.clear()
        with torch.no_grad(), Record():
            model(packed, {"sst": 2})
        return set(ops) & set(OPS_OF_A_LAYER)

    if not kernels.native.available():
        pytest.skip(kernels.native.missing_reason())
    with prepared(model):
        assert forward() == set()
        assert ops.count("encoder_layers") == 1
        model.train()
        assert forward() == set(OPS_OF_A_LAYER)
        model.eval()
    assert forward() == set(OPS_OF_A_LAYER)
    assert "encoder_layers" not in ops


@pytest.mark.parametrize("amx", [False, True])
def test_compiled_layers_are_read_where_they_are_the_fastest(model, amx, monkeypatch):
    if not kernels.native.available():
        pytest.skip(kernels.native.missing_reason())
    monkeypatch.setattr(inference, "multiplies_in_tiles", lambda: amx)
    for dtype, compiled in (
        (torch.float32, True),
        (torch.bfloat16, kernels.native.cpu_features()["avx512_bf16"] and not amx),
    ):
        model.encoder.compute_dtype = dtype
        with prepared(model):
            assert (model.encoder.packed_layers is not None) == compiled
    model.double().encoder.compute_dtype = torch.float64
    with prepared(model):
        assert model.encoder.packed_layers is None


def test_outputs_follow_the_inputs_order_whatever_the_budget(model):
    encoded = examples([9, 2, 31, 4, 4, 17, 2, 8], seed=1)
    (task,) = find_tasks(["sts"])
    alone = [head_outputs(model, task, examples_of(encoded, index), CPU)[0] for index in range(len(encoded))]
    for budget in (1, 12, 8192):
        with patch.object(inference, "TOKENS_PER_BATCH", budget):
            torch.testing.assert_close(head_outputs(model, task, encoded, CPU), np.array(alone), rtol=1e-4, atol=1e-5)


def examples_of(encoded: Encoded, index: int) -> Encoded:
    """One of the examples."""
    ids = encoded.token_ids[encoded.offsets[index] : encoded.offsets[index + 1]]
    return Encoded(ids, np.zeros(len(ids), np.uint8), np.array([0, len(ids)]), None, ["0"], 0)
