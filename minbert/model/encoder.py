"""BERT's encoder (Devlin et al. 2019) over a packed token stream, on minbert's kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minbert import kernels
from minbert.data.packing import IdRanges, Packed
from minbert.files.hub import WEIGHTS, checkpoint_directory
from minbert.model.config import EncoderConfig
from minbert.model.encoder_blocks import STREAM_IDS_PER_LAYER, Embeddings, Layer, Projection
from minbert.model.pooling import at_least_float32, pool
from minbert.model.weights import check_shapes, has_pooler, load_weights, save_weights


def draw_seed(device: torch.device) -> Tensor:
    """A dropout seed from torch's default generator for `device`: int64, scalar."""
    return torch.randint(2**63 - 1, (), device=device)


class Encoder(nn.Module):
    """BERT over a packed stream of N tokens in S sequences: [N] token ids in, [N, D] hidden states out.

    Dropout acts in training mode. It follows `seed`, as for `kernels.dropout_mask`: the same seed drops the same
    elements. Without a seed, one is drawn from torch's default generator.

    Attributes:
        packed_layers: in place of the layers' own parameters, what evaluation reads (`pack_layers`); or None.
    """

    def __init__(self, config: EncoderConfig, *, pooler: bool = False) -> None:
        """Initialise as BERT does, from torch's default generator.

        Args:
            pooler: whether to have BERT's pooler, a dense layer with tanh over the first token's hidden state.
        """
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(
            Layer(config, first_stream_id=1 + STREAM_IDS_PER_LAYER * i) for i in range(config.num_hidden_layers)
        )
        self.pooler = Projection(config.hidden_size, config.hidden_size) if pooler else None
        self.dropout_stream_ids = (
            1 + STREAM_IDS_PER_LAYER * config.num_hidden_layers
        )  # the encoder's are 0 to this, exclusive
        self._compute_dtype: torch.dtype | None = None
        self.packed_layers: kernels.PackedLayers | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """BERT's initialisation: normal weights, zero biases, LayerNorm as the identity, a zero row for [PAD]."""
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
                continue
            for name, parameter in module.named_parameters(recurse=False):
                if name == "bias":
                    nn.init.zeros_(parameter)
                else:
                    nn.init.normal_(parameter, std=self.config.initializer_range)
        with torch.no_grad():
            self.embeddings.word[self.config.pad_token_id] = 0

    @classmethod
    def from_pretrained(
        cls, path_or_name: str | Path, *, pooler: bool | None = None, dropout: float | None = None
    ) -> Encoder:
        """Read config.json and safetensors weights of a Hugging Face BERT, in float32 and evaluation mode.

        Args:
            path_or_name: a directory, or a model's name on the Hugging Face hub.
            pooler: True for a pooler whatever the checkpoint has (initialised if it has none), False for none,
                None for what the checkpoint has.
            dropout: the encoder's dropout, in place of the checkpoint's.

        Raises:
            UserError: nothing there, a damaged file, missing or misshapen tensors, or a model that is not BERT.
        """
        directory = checkpoint_directory(path_or_name, WEIGHTS)
        config = EncoderConfig.from_json(directory / "config.json").with_dropout(dropout)
        check_shapes(config, directory)
        saved_pooler = has_pooler(directory)
        wanted = saved_pooler if pooler is None else pooler
        with torch.device("meta"):  # nothing to initialise, so torch's generator stays where it is
            encoder = cls(config, pooler=wanted)
        encoder.to_empty(device="cpu")
        if wanted and not saved_pooler:
            encoder.reset_parameters()
        load_weights(encoder.huggingface_tensors(pooler=wanted and saved_pooler), directory)
        return encoder.eval()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors, which transformers' BertModel reads too."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.config.to_json(directory / "config.json")
        save_weights(self.huggingface_tensors(pooler=self.pooler is not None), directory)

    def huggingface_tensors(self, *, pooler: bool) -> dict[str, Tensor]:
        """The parameters, or parts of them, by the names of a Hugging Face checkpoint, with or without the pooler."""
        table = self.embeddings
        modules: dict[str, Any] = {
            "embeddings.LayerNorm": table.norm,
            **({"pooler.dense": self.pooler} if pooler else {}),
        }
        tensors: dict[str, Tensor] = {
            "embeddings.word_embeddings.weight": table.word,
            "embeddings.position_embeddings.weight": table.position,
            "embeddings.token_type_embeddings.weight": table.token_type,
        }
        layer: Any
        for i, layer in enumerate(self.layers):
            prefix = f"encoder.layer.{i}"
            for kind in ("weight", "bias"):
                parts = getattr(layer.qkv, kind).chunk(3)
                names = (f"{prefix}.attention.self.{name}.{kind}" for name in ("query", "key", "value"))
                tensors |= zip(names, parts, strict=True)
            modules |= {
                f"{prefix}.attention.output.dense": layer.attention_output,
                f"{prefix}.attention.output.LayerNorm": layer.attention_norm,
                f"{prefix}.intermediate.dense": layer.intermediate,
                f"{prefix}.output.dense": layer.output,
                f"{prefix}.output.LayerNorm": layer.output_norm,
            }
        for name, module in modules.items():
            tensors |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
        return tensors

    @property
    def compute_dtype(self) -> torch.dtype:
        """Precision of hidden states and matrix products: the parameters' own, or bfloat16 once set.

        Parameters keep their precision and are cast at use; LayerNorm's and GELU's are not cast.
        """
        return self._compute_dtype or self._word.dtype

    @compute_dtype.setter
    def compute_dtype(self, dtype: torch.dtype) -> None:
        own = self._word.dtype
        if dtype not in (own, torch.bfloat16):
            raise ValueError(f"compute_dtype must be {own}, as the parameters are, or torch.bfloat16; got {dtype}")
        self._compute_dtype = None if dtype == own else dtype

    def cast_weights(self) -> list[Tensor]:
        """The trainable matrices that products cast to `compute_dtype`."""
        weights = [module.weight for module in self.layers.modules() if isinstance(module, Projection)]
        return [weight for weight in weights if weight.requires_grad and weight.dtype != self.compute_dtype]

    def pack_layers(self) -> kernels.PackedLayers:
        """The layers for forwards without gradients, in `compute_dtype`."""
        layers: Any = self.layers
        return kernels.PackedLayers(
            [layer.kernel_parameters for layer in layers],
            heads=self.config.num_attention_heads,
            eps=self.config.layer_norm_eps,
            dtype=self.compute_dtype,
        )

    def copies(self) -> dict[Tensor, Tensor]:
        """By trainable matrix that a product casts to `compute_dtype`, a copy that is cast already; else empty."""
        return {weight: weight.detach().to(self.compute_dtype) for weight in self.cast_weights()}

    def forward(self, packed: Packed, *, seed: Tensor | None = None) -> Tensor:
        """Hidden states of the last layer, [N, D] in `compute_dtype`.

        Raises:
            ValueError: a sequence longer than max_position_embeddings, or an id outside its embedding table.
        """
        seed = self._seed(seed)
        return self.encode(self.embed(packed, seed), packed, seed)

    def embed(self, packed: Packed, seed: Tensor | None = None) -> Tensor:
        """The embedding block's output, [N, D] in `compute_dtype`; raises as `forward` does."""
        self.check(packed)
        seed = self._seed(seed)
        return self.embeddings(packed, seed, self.compute_dtype)

    def encode(
        self, embedded: Tensor, packed: Packed, seed: Tensor | None = None, *, first_tokens: bool = False
    ) -> Tensor:
        """The layers over an embedding block's output, [N, D] to [N, D].

        Args:
            first_tokens: return the rows of each sequence's first token alone, [S, D], equal to rounding and under the
                same dropout: the last layer computes no more than they depend on.
        """
        seed = self._seed(seed)
        hidden = embedded.to(self.compute_dtype)
        if self.packed_layers is not None and not self.training:
            stream = packed.cu_seqlens, packed.max_seqlen
            return kernels.encoder_layers(hidden, self.packed_layers, *stream, first_tokens=first_tokens)
        *layers, last = self.layers
        for layer in layers:
            hidden = layer(hidden, packed, seed)
        return last(hidden, packed, seed, first_tokens=first_tokens)  # type: ignore[no-any-return]

    def pool(self, hidden: Tensor, packed: Packed, how: str = "cls") -> Tensor:
        """One vector per sequence, [S, D] in float32 at least: `cls`, `mean`, `max` (`minbert.model.pool`) or `pooler`.

        Raises:
            ValueError: unknown `how`, or `pooler` in an encoder without one.
        """
        if how == "pooler":
            return self.pool_first_tokens(hidden.index_select(0, packed.cu_seqlens[:-1]), packed, how)
        return pool(hidden, packed, how)

    def pool_first_tokens(self, first: Tensor, packed: Packed, how: str = "cls") -> Tensor:
        """`pool` of the hidden states of the first tokens [S, D], by one of `FIRST_TOKEN_POOLINGS`.

        Raises:
            ValueError: `pooler` in an encoder without one.
        """
        first = at_least_float32(first)
        if how == "cls":
            return first
        if self.pooler is None:
            raise ValueError("this encoder has no pooler; pool with 'cls', or load it with pooler=True")
        pooled = kernels.linear(first, self.pooler.weight, self.pooler.bias, bounds=packed.sequence_bounds)
        return torch.tanh(pooled)

    @property
    def _word(self) -> Tensor:
        """The word table, or its first view where each task has one (`minbert.methods.task_gradients`)."""
        word = self.embeddings.word
        return word if isinstance(word, Tensor) else word[0]

    def _seed(self, seed: Tensor | None) -> Tensor | None:
        return draw_seed(self._word.device) if seed is None and self.training else seed

    def check(self, packed: Packed) -> None:
        """Check that positions and ids lie in the embedding tables.

        Ids on a GPU are not read, which would wait for it: they are checked by what `pack` found. Without that, a token
        with an id outside its table gets NaN (`kernels.embedding`).

        Raises:
            ValueError: one does not.
        """
        if packed.max_seqlen > self.config.max_position_embeddings:
            raise ValueError(
                f"a sequence of {packed.max_seqlen} tokens is longer than the encoder's max_position_embeddings,"
                f" {self.config.max_position_embeddings}; truncate it (max_length of Tokenizer.encode_batch)"
            )
        if torch.compiler.is_compiling():
            return
        ranges = packed.id_ranges
        if packed.token_ids.device.type == "cpu":
            ranges = IdRanges(*(_range(ids) for ids in (packed.token_ids, packed.token_type_ids)))
        if ranges is not None:
            self.check_ids(ranges)

    def check_ids(self, ranges: IdRanges) -> None:
        """Check that ids of tokens and their types lie in the embedding tables.

        Raises:
            ValueError: one does not.
        """
        for name, (low, high), size, remedy in (
            ("token", ranges.token_ids, self.config.vocab_size, "use the tokenizer of the same checkpoint"),
            ("token type", ranges.token_type_ids, self.config.type_vocab_size, "encode single texts, not pairs"),
        ):
            if low < 0 or high >= size:
                wrong = low if low < 0 else high
                raise ValueError(f"{name} id {wrong} is outside the encoder's table of {size}; {remedy}")


def _range(ids: Tensor) -> tuple[int, int]:
    low, high = torch.aminmax(ids)
    return int(low), int(high)
