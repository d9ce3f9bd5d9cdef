"""A tiny random BERT of transformers, and the real pretrained one where there is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import transformers

from minbert.data.packing import Packed, pack
from minbert.model import EncoderConfig

TINY = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny_config() -> EncoderConfig:
    return EncoderConfig(**TINY)


@pytest.fixture
def theirs() -> transformers.BertModel:
    """transformers' model in evaluation mode, with weights large enough for every part to matter."""
    config = transformers.BertConfig(**TINY, initializer_range=0.3, attn_implementation="eager")
    model = transformers.BertModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases and LayerNorm, which start as zeros and ones
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture
def checkpoint(theirs: transformers.BertModel, tmp_path: Path) -> Path:
    theirs.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def packed() -> Packed:
    """Five sequences of 1 to 40 tokens, two of them pairs."""
    generator = torch.Generator().manual_seed(0)
    lengths = [7, 1, 40, 2, 13]
    ids = [torch.randint(1, TINY["vocab_size"], (n,), generator=generator).tolist() for n in lengths]
    types = [[int(at > 4) for at in range(n)] if n in (40, 13) else [0] * n for n in lengths]
    return pack(ids, types)


@pytest.fixture(scope="session")
def pretrained() -> Path:
    directory = os.environ.get("MINBERT_TEST_MODEL")
    if directory is None:
        pytest.skip("MINBERT_TEST_MODEL names no pretrained model")
    return Path(directory)
