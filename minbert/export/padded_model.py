"""The encoder and heads over padded batches, in plain PyTorch: what torch writes as an ONNX graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minbert.model import Encoder, MultitaskModel
from minbert.model.multitask import MOST_DROPOUTS
from minbert.model.pooling import FIRST_TOKEN_POOLINGS


class PaddedModel(nn.Module):
    """The outputs of some tasks' heads in evaluation mode, from padded sequences.

    The tasks read examples alike: an example has the same sequences for each of them (`minbert.model.pair_encoding`).
    The parameters are those of the model, not copies.
    """

    def __init__(self, model: MultitaskModel, tasks: Sequence[str]) -> None:
        super().__init__()
        self.encoder, self.shared = model.encoder, model.shared
        self.heads = nn.ModuleDict({name: model.heads[name] for name in tasks})
        self.poolings = {name: model.pooling_of(name) for name in tasks}
        self.first_tokens = set(self.poolings.values()) <= set(FIRST_TOKEN_POOLINGS)
        self.eval()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Each task's outputs, [B, outputs], or [B] of a task with one.

        Args:
            inputs: of each sequence of an example in turn, int64 [B, S]: token ids, token types, and a mask that is 1
                for tokens and 0 for padding.
        """
        sequences = []
        for ids, types, mask in zip(*(inputs[i::3] for i in range(3)), strict=True):
            sequences.append((hidden_states(self.encoder, ids, types, mask, first_tokens=self.first_tokens), mask))
        outputs = []
        head: Any
        for name, head in self.heads.items():
            vectors = [pooled(self.encoder, *sequence, self.poolings[name]) for sequence in sequences]
            if self.shared is not None:
                vectors = [self.shared(vector, seed=None, stream_id=0) for vector in vectors]
            outputs.append(head(*vectors, drop=head.dropouts(None, range(MOST_DROPOUTS))))
        return tuple(outputs)


def hidden_states(encoder: Encoder, ids: Tensor, types: Tensor, mask: Tensor, *, first_tokens: bool) -> Tensor:
    """The last layer's hidden states, [B, S, D].

    Args:
        first_tokens: return those of the first tokens alone, [B, 1, D], and compute no more than these depend on.
    """
    embeddings: Any = encoder.embeddings
    words, token_types = F.embedding(ids, embeddings.word), F.embedding(types, embeddings.token_type)
    hidden = embeddings.norm(words + token_types + embeddings.position[: ids.shape[1]])
    bias = (1.0 - mask[:, None, None].to(hidden.dtype)) * torch.finfo(hidden.dtype).min
    for layer in encoder.layers:
        hidden = _layer(layer, hidden, bias, first_tokens and layer is encoder.layers[-1])
    return hidden


def _layer(layer: Any, hidden: Tensor, bias: Tensor, first_tokens: bool) -> Tensor:
    """`minbert.model.encoder_blocks.Layer` of [B, S, D], with what is added to the scores, [B, 1, 1, S]."""
    rows = hidden[:, :1] if first_tokens else hidden
    weights, biases = layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3)
    query, key, value = (
        F.linear(x, weight, bias).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        for x, weight, bias in zip((rows, hidden, hidden), weights, biases, strict=True)
    )
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1]) + bias
    context = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    attended = layer.attention_norm(_linear(layer.attention_output, context) + rows)
    inner = F.gelu(_linear(layer.intermediate, attended))
    return layer.output_norm(_linear(layer.output, inner) + attended)  # type: ignore[no-any-return]


def _linear(projection: Any, x: Tensor) -> Tensor:
    return F.linear(x, projection.weight, projection.bias)


def pooled(encoder: Encoder, hidden: Tensor, mask: Tensor, how: str) -> Tensor:
    """One vector per sequence, [B, D], of hidden states [B, S, D] (`Encoder.pool`)."""
    if how == "cls":
        return hidden[:, 0]
    if how == "pooler":
        return _linear(encoder.pooler, hidden[:, 0]).tanh()
    weights = mask[:, :, None].to(hidden.dtype)
    if how == "mean":
        return (hidden * weights).sum(1) / weights.sum(1)
    return hidden.masked_fill(weights == 0, torch.finfo(hidden.dtype).min).amax(1)
