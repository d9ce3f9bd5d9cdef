"""The blocks of BERT's encoder (Devlin et al. 2019) over a packed token stream: embeddings, and a transformer layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minbert import kernels
from minbert.data.packing import Packed
from minbert.kernels import task_views
from minbert.model.config import EncoderConfig

STREAM_IDS_PER_LAYER = 3  # places of dropout: attention probabilities, attention output, feed-forward output


class Projection(nn.Module):
    """The parameters of x @ weight.T + bias, which `kernels.linear` casts to the precision of x."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))


class Embeddings(nn.Module):
    """dropout(LayerNorm(word + token type + position)), at dropout stream 0.

    Attributes:
        sparse_gradient: whether the word table gets a sparse gradient (`kernels.embedding`).
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.word = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.position = nn.Parameter(torch.empty(config.max_position_embeddings, config.hidden_size))
        self.token_type = nn.Parameter(torch.empty(config.type_vocab_size, config.hidden_size))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout_p = config.hidden_dropout_prob
        self.sparse_gradient = False

    def forward(self, packed: Packed, seed: Tensor | None, dtype: torch.dtype) -> Tensor:
        return kernels.embedding(
            packed.token_ids,
            packed.token_type_ids,
            packed.position_ids,
            self.word,
            self.token_type,
            self.position,
            self.norm.weight,
            self.norm.bias,
            eps=self.norm.eps,
            dropout_p=self.dropout_p if self.training else 0.0,
            seed=seed,
            stream_id=0,
            dtype=dtype,
            bounds=packed.token_bounds,
            sparse=self.sparse_gradient,
        )

    def affine(self, offset: Tensor, packed: Packed, seed: Tensor | None) -> Tensor:
        """What the output gains where `offset` [N, D] is added to the normalised rows: dropout(weight * offset).

        It is linear and its own transpose: it takes the gradient of the output to that of the normalised rows.
        """
        (weights,), bounds = task_views.views("embeddings", len(offset), packed.token_bounds, weight=self.norm.weight)
        scaled = task_views.by_segment(bounds, lambda task, rows: offset[rows] * weights[task])
        dropout_p = self.dropout_p if self.training else 0.0
        return kernels.dropout(scaled.to(offset.dtype), p=dropout_p, seed=seed, stream_id=0)


class Layer(nn.Module):
    """Self-attention and feed-forward network, each with dropout, residual and LayerNorm after it."""

    def __init__(self, config: EncoderConfig, first_stream_id: int) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.heads = config.num_attention_heads
        self.qkv = Projection(hidden, 3 * hidden)  # queries, keys and values in one product
        self.attention_output = Projection(hidden, hidden)
        self.attention_norm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.intermediate = Projection(hidden, config.intermediate_size)
        self.output = Projection(config.intermediate_size, hidden)
        self.output_norm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.attention_dropout_p = config.attention_probs_dropout_prob
        self.hidden_dropout_p = config.hidden_dropout_prob
        self.first_stream_id = first_stream_id

    @property
    def kernel_parameters(self) -> kernels.LayerParameters:
        """The parameters as `kernels.PackedLayers` takes them."""
        modules = self.qkv, self.attention_output, self.attention_norm, self.intermediate, self.output, self.output_norm
        return kernels.LayerParameters(*(param for module in modules for param in (module.weight, module.bias)))

    def forward(self, hidden: Tensor, packed: Packed, seed: Tensor | None, *, first_tokens: bool = False) -> Tensor:
        """[N, D] to [N, D]; with `first_tokens` the rows of each sequence's first token alone, [S, D].

        For these, keys and values are computed of all tokens and everything else of the first ones.
        """
        bounds, dropout_rows, weights, biases = packed.token_bounds, None, self.qkv.weight, self.qkv.bias
        attention_dropout: dict[str, Any] = {
            "dropout_p": self.attention_dropout_p if self.training else 0.0,
            "seed": seed,
            "stream_id": self.first_stream_id,
        }
        if first_tokens:
            (of_queries, weights), (query_bias, biases) = (
                _split(param, (hidden.shape[1], 2 * hidden.shape[1])) for param in (weights, biases)
            )
            keys_values = kernels.linear(hidden, weights, biases, bounds=bounds)
            bounds, dropout_rows = packed.sequence_bounds, packed.cu_seqlens[:-1]
            hidden = hidden.index_select(0, dropout_rows)
            context = kernels.first_token_attention(
                kernels.linear(hidden, of_queries, query_bias, bounds=bounds).unflatten(1, (self.heads, -1)),
                keys_values.unflatten(1, (2, self.heads, -1)),
                packed.cu_seqlens,
                packed.max_seqlen,
                **attention_dropout,
            )
        else:
            context = kernels.attention(
                kernels.linear(hidden, weights, biases, bounds=bounds).unflatten(1, (3, self.heads, -1)),
                packed.cu_seqlens,
                packed.max_seqlen,
                **attention_dropout,
                plan=packed.attention_plan,
            )
        linear = partial(kernels.linear, bounds=bounds)
        add_norm = partial(
            kernels.dropout_add_layer_norm,
            eps=self.attention_norm.eps,
            dropout_p=self.hidden_dropout_p if self.training else 0.0,
            seed=seed,
            bounds=bounds,
            dropout_rows=dropout_rows,
        )
        mixed = linear(context.flatten(1), self.attention_output.weight, self.attention_output.bias)
        norm, stream_id = self.attention_norm, self.first_stream_id + 1
        attended = add_norm(mixed, hidden, norm.weight, norm.bias, stream_id=stream_id)
        inner = kernels.bias_gelu(linear(attended, self.intermediate.weight), self.intermediate.bias, bounds=bounds)
        mixed = linear(inner, self.output.weight, self.output.bias)
        norm, stream_id = self.output_norm, self.first_stream_id + 2
        return add_norm(mixed, attended, norm.weight, norm.bias, stream_id=stream_id)


def _split(param: Any, sizes: Sequence[int]) -> list[Any]:
    """Parts of a parameter, or of each of its views, along the first dimension."""
    if isinstance(param, (list, tuple)):
        return [list(part) for part in zip(*(view.split(sizes) for view in param), strict=True)]
    return list(param.split(sizes))
