"""attn_implementation="minbert": transformers' bidirectional encoders on minbert's packed attention.

    from minbert.integrations.transformers import register

    register()
    model = BertModel.from_pretrained("bert-base-uncased", attn_implementation="minbert")

The model's batches stay padded. Once per forward the padding mask is converted to the indices of the real tokens, and
attention in every layer runs on these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minbert.kernels import attention

NAME = "minbert"
_CHANGES_THE_SCORES = ("head_mask", "position_bias", "s_aux", "sliding_window", "softcap")


def register() -> None:
    """Register attn_implementation="minbert" with transformers. Further calls have no effect.

    Raises:
        ImportError: transformers is missing, or older than 5.0, whose BERT has other masks.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError("register: transformers is not installed; run: pip install 'transformers>=5.0'") from error
    if int(transformers.__version__.split(".")[0]) < 5:
        raise ImportError(
            f"register: transformers must be 5.0 or newer, got {transformers.__version__}; "
            "run: pip install -U 'transformers>=5.0'"
        )
    transformers.AttentionInterface.register(NAME, packed_attention)
    transformers.AttentionMaskInterface.register(NAME, real_tokens)


@dataclass(frozen=True)
class RealTokens:
    """The indices of the real tokens of a padded batch [batch, length], which the layers get as attention mask."""

    batch: int
    length: int
    rows: Tensor | None  # int64 [N], indices in the flattened batch; None without padding
    cu_seqlens: Tensor  # int32 [S + 1]; a sequence without real tokens is left out
    max_seqlen: int

    @classmethod
    def without_padding(cls, batch: int, length: int, device: torch.device) -> RealTokens:
        """A batch without padding."""
        cu_seqlens = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=device)
        return cls(batch, length, None, cu_seqlens, length)

    @classmethod
    def from_mask(cls, mask: Tensor) -> RealTokens:
        """The tokens where a padding mask, bool [batch, length], is true. Padding may be on either side or both.

        Raises:
            ValueError: padding between the real tokens of a sequence, or no real token at all.
        """
        runs = (mask & ~F.pad(mask, (1, 0))[:, :-1]).sum(1)  # of real tokens
        if runs.max() > 1:
            row = int(runs.argmax())
            raise _unsupported(
                f"needs adjacent real tokens, got {int(runs[row])} runs of ones in attention_mask[{row}]"
            )
        lengths = mask.sum(1)
        lengths = lengths[lengths > 0]
        if len(lengths) == 0:
            raise _unsupported("needs a real token, got an attention_mask of zeros")
        batch, length = mask.shape
        rows = mask.flatten().nonzero()[:, 0]
        if len(rows) == batch * length:
            return cls.without_padding(batch, length, mask.device)
        return cls(batch, length, rows, F.pad(lengths.cumsum(0), (1, 0)).int(), int(lengths.max()))

    def gather(self, padded: Tensor) -> Tensor:
        """[batch, length, ...] -> [N, ...]."""
        flat = padded.flatten(0, 1)
        return flat if self.rows is None else _Gather.apply(flat, self.rows)

    def scatter(self, packed: Tensor) -> Tensor:
        """[N, ...] -> [batch, length, ...], zeros at padding."""
        flat = packed if self.rows is None else _scatter(packed, self.rows, self.batch * self.length)
        return flat.unflatten(0, (self.batch, self.length))


class _Gather(torch.autograd.Function):
    """index_select of distinct rows, so that the backward copies rows instead of adding them."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.count = len(flat)
        return flat.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return _scatter(grad, rows, ctx.count), None


def _scatter(packed: Tensor, rows: Tensor, count: int) -> Tensor:
    """Zeros [count, ...] with the packed ones at `rows`."""
    return packed.new_zeros(count, *packed.shape[1:]).index_copy_(0, rows, packed)


def real_tokens(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    device: torch.device,
    **kwargs: Any,
) -> RealTokens:
    """The attention mask of transformers' models, computed once per forward.

    Args:
        batch_size, q_length, kv_length: the batch's shape.
        mask_function: which keys a query sees, padding aside; it must be transformers' bidirectional one.
        attention_mask: bool [batch_size, kv_length], true at real tokens; None without padding.
        device: where the model runs.

    Raises:
        ValueError: attention that is not bidirectional self-attention, or a mask that is no padding mask.
    """
    from transformers.masking_utils import bidirectional_mask_function

    if mask_function is not bidirectional_mask_function:
        raise _unsupported("is bidirectional, got causal, windowed or otherwise restricted attention")
    if q_length != kv_length:
        raise _unsupported(f"is self-attention, got {q_length} queries for {kv_length} keys")
    if attention_mask is None:
        return RealTokens.without_padding(batch_size, q_length, device)
    if attention_mask.shape != (batch_size, q_length):
        raise _unsupported(f"needs an attention_mask [{batch_size}, {q_length}], got {list(attention_mask.shape)}")
    return RealTokens.from_mask(attention_mask.bool())


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: RealTokens | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """A layer's attention among the real tokens of each sequence, in transformers' call shape.

    Args:
        module: the layer's attention module.
        query, key, value: float [batch, H, length, d].
        attention_mask: the result of `real_tokens`; None without padding.
        scaling: the factor of the scores; 1 / sqrt(d) when left out.
        dropout: the probability of dropping an attention probability; the seed is drawn from torch's generator.

    Returns:
        [batch, length, H, d], zeros at padding; and None for the attention probabilities, which are not computed.

    Raises:
        ValueError: attention that is not bidirectional self-attention, a mask of another kind, or an argument that
            changes the scores or asks for the attention probabilities.
    """
    batch, _, length, _ = query.shape
    if getattr(module, "is_causal", False) or getattr(module, "is_decoder", False) or kwargs.get("is_causal"):
        raise _unsupported("is bidirectional self-attention, got a decoder's")
    if key.shape != query.shape or value.shape != query.shape:
        raise _unsupported(
            f"needs queries, keys and values of one shape, got {list(query.shape)}, {list(key.shape)} and "
            f"{list(value.shape)}"
        )
    for name in _CHANGES_THE_SCORES:
        if kwargs.get(name) is not None:
            raise _unsupported(f"has no {name}")
    if kwargs.get("output_attentions"):
        raise _unsupported("computes no attention probabilities to return, got output_attentions=True", use="eager")
    tokens = RealTokens.without_padding(batch, length, query.device) if attention_mask is None else attention_mask
    if not isinstance(tokens, RealTokens):
        got = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise _unsupported(f"needs a padding mask [batch, length], got {got}")

    qkv_N3HD = torch.stack([tokens.gather(x.transpose(1, 2)) for x in (query, key, value)], dim=1)
    seed = torch.randint(2**63 - 1, (), device=query.device) if dropout > 0 else None
    out_NHD = attention(
        qkv_N3HD, tokens.cu_seqlens, tokens.max_seqlen, dropout_p=dropout, seed=seed, softmax_scale=scaling
    )
    return tokens.scatter(out_NHD), None


def _unsupported(what: str, use: str = "sdpa") -> ValueError:
    return ValueError(f'attn_implementation="{NAME}" {what}; use model.set_attn_implementation("{use}")')
