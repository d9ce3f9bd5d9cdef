"""Outputs of a trained model for SST's dev sentences against transformers and ONNX Runtime: one at a time, and by 32.

Tokens are ready; packing and padding are timed. ONNX Runtime runs the graph that torch exports from transformers'
model, with its own fusions of BERT (`onnxruntime.transformers`). On CPUs it has no bf16 products, so it is float32 in
all cases.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import drawn
from peers import shape
from torch import Tensor, nn

from minbert.data import Encoded
from minbert.data.packing import pack
from minbert.device import resolve_precision
from minbert.inference import head_outputs, prepared
from minbert.model import Encoder, EncoderConfig, MultitaskModel
from minbert.tasks import TASKS

SST = TASKS["sst"]
CPU = torch.device("cpu")
Run = Callable[[Sequence[Sequence[int]]], object]  # the logits of a batch of sentences


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return ids, (ids != 0).long()


class Peer(nn.Module):
    """transformers' BERT with a linear head."""

    def __init__(self, sizes: dict[str, int], attention: str) -> None:
        import transformers

        super().__init__()
        torch.manual_seed(0)
        config = transformers.BertConfig(**sizes, attn_implementation=attention)
        self.encoder = transformers.BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(sizes["hidden_size"], SST.num_outputs)
        self.eval()

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0])

    @torch.inference_mode()
    def run(self, rows: Sequence[Sequence[int]]) -> object:
        return self(*padded(rows)).float().numpy()


def onnx_runtime(sizes: dict[str, int], directory: Path) -> Run:
    import onnxruntime
    from onnxruntime.transformers import optimizer

    path, model = str(directory / "model.onnx"), Peer(sizes, "eager")
    names = {"ids": {0: "sentences", 1: "tokens"}, "mask": {0: "sentences", 1: "tokens"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            padded([[1, 2], [1]]),
            path,
            input_names=[*names],
            output_names=["logits"],
            dynamic_axes=names,
            opset_version=17,
            dynamo=False,
        )
        fused = optimizer.optimize_model(
            path, model_type="bert", num_heads=sizes["num_attention_heads"], hidden_size=sizes["hidden_size"]
        )
        fused.save_model_to_file(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(rows: Sequence[Sequence[int]]) -> object:
        ids, mask = padded(rows)
        return session.run(None, {"ids": ids.numpy(), "mask": mask.numpy()})

    expected = model(*padded([[5, 6, 7], [8]])).detach().numpy()
    np.testing.assert_allclose(np.asarray(run([[5, 6, 7], [8]]))[0], expected, atol=1e-4)
    return run


def contenders(sizes: dict[str, int], dtype: torch.dtype, directory: Path) -> dict[str, Run]:
    found: dict[str, Run] = {}
    name = str(dtype).removeprefix("torch.")
    if importlib.util.find_spec("transformers") is not None:
        for attention in ("eager", "sdpa"):
            found[f"transformers {attention} {name}"] = Peer(sizes, attention).to(dtype).run
        if importlib.util.find_spec("onnx") is not None and importlib.util.find_spec("onnxruntime") is not None:
            found["ONNX Runtime float32"] = onnx_runtime(sizes, directory)
        else:
            warnings.warn(
                "ONNX Runtime is left out: onnx and onnxruntime, of the extra [bench], are missing", stacklevel=1
            )
    else:
        warnings.warn("the peers are left out: transformers, of the extra [bench], is missing", stacklevel=1)
    return found


def one_by_one(run: Run, rows: list[list[int]], size: int) -> Callable[[], object]:
    def sentences() -> None:
        for start in range(0, len(rows), size):
            run(rows[start : start + size])

    return sentences


def by_token_budget(model: MultitaskModel, rows: list[list[int]]) -> Callable[[], object]:
    """As evaluate and predict do it: all sentences at hand, sorted by length."""
    offsets = np.cumsum([0, *map(len, rows)])
    ids = np.concatenate(rows).astype(np.int32)
    encoded = Encoded(ids, np.zeros(len(ids), np.uint8), offsets, None, [""] * len(rows), 0)
    return lambda: head_outputs(model, SST, encoded, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", [1, 32])
def test_inference(race, smoke: bool, quick: bool, size: int, dtype: torch.dtype, tmp_path: Path) -> None:
    if not smoke and dtype == torch.bfloat16 and resolve_precision("auto", CPU) != "bf16":
        pytest.skip("this processor multiplies no bf16 matrices: torch would take seconds for a sentence")
    sizes = shape(smoke)
    count = 2 * size if smoke else (3 if quick else 10) * size if size > 1 else 20 if quick else 100
    rows = drawn("sst", count, sizes["vocab_size"], split="dev")
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(**sizes))
    encoder.compute_dtype = dtype
    model = MultitaskModel(encoder, [SST]).eval()

    @torch.inference_mode()
    def ours(batch: Sequence[Sequence[int]]) -> object:
        return model(pack(batch), {"sst": len(batch)})["sst"].float().numpy()

    functions: dict[str, Any] = {"minbert": one_by_one(ours, rows, size)}
    if size > 1:
        functions["minbert, by token budget"] = by_token_budget(model, rows)
    for name, run in contenders(sizes, dtype, tmp_path).items():
        functions[name] = one_by_one(run, rows, size)
    case = f"{count} sentences by {size}, {str(dtype).removeprefix('torch.')}"
    with prepared(model):
        race(case, functions, items=count, pause=0.0 if smoke else 0.3)  # ONNX Runtime's threads spin for a while
