"""One encoder with a head for each task."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minbert.data.packing import Packed
from minbert.errors import UserError, did_you_mean
from minbert.files.atomic import write_tensors
from minbert.model.encoder import Encoder, draw_seed
from minbert.model.heads import HEADS, sequences_of
from minbert.model.layers import SHARED_LAYERS, view_of
from minbert.model.pooling import FIRST_TOKEN_POOLINGS, check_pooling
from minbert.model.weights import fitting, open_safetensors
from minbert.tasks import Task

MOST_DROPOUTS = 3  # places of dropout in a head, and one more in a shared layer


class MultitaskModel(nn.Module):
    """Every task's sequences go through the encoder in one packed stream; each task's head then takes its own.

    An example has as many sequences, one after the other, as the task's head reads.

    Attributes:
        tasks: by name, what each head was made for.
        shared: the layer between pooling and all heads, or None.
        frozen: whether the encoder is left as it is and only what was added to it trains.
    """

    def __init__(
        self,
        encoder: Encoder,
        tasks: Sequence[Task],
        *,
        pooling: str | Mapping[str, str] = "cls",
        head_dropout: float = 0.1,
        shared_layer: str | None = None,
    ) -> None:
        """Add new heads, initialised from torch's default generator.

        Args:
            tasks: those with heads of their own get one.
            pooling: of all tasks, or by task, `cls` for those left out.
            shared_layer: of `SHARED_LAYERS`; none when left out.

        Raises:
            ValueError: unknown `pooling`, `pooler` for an encoder without one, or an unknown head or shared layer.
        """
        super().__init__()
        for how in {pooling} if isinstance(pooling, str) else set(pooling.values()):
            check_pooling(how)
            if how == "pooler" and encoder.pooler is None:
                raise ValueError(
                    "pooling 'pooler' needs an encoder with a pooler; use 'cls', or load it with pooler=True"
                )
        if shared_layer is not None and shared_layer not in SHARED_LAYERS:
            raise ValueError(
                f"unknown shared layer {shared_layer!r}{did_you_mean(shared_layer, list(SHARED_LAYERS))};"
                f" known: {', '.join(SHARED_LAYERS)}"
            )
        self.encoder = encoder
        self.pooling = pooling
        tasks = [task for task in tasks if not task.head_of]
        self.tasks = {task.name: task for task in tasks}
        self.frozen = False
        self.heads = nn.ModuleDict()
        for task in tasks:
            if task.head not in HEADS:
                raise ValueError(
                    f"task {task.name}: unknown head {task.head!r}{did_you_mean(task.head, list(HEADS))};"
                    f" known: {', '.join(HEADS)}"
                )
            self.heads[task.name] = HEADS[task.head](task, encoder.config.hidden_size, head_dropout)
        self.shared = SHARED_LAYERS[shared_layer](encoder.config.hidden_size, head_dropout) if shared_layer else None
        first, end = encoder.dropout_stream_ids, encoder.dropout_stream_ids + len(self.heads) * (MOST_DROPOUTS + 1)
        self._stream_ids = {name: range(first + i, end, len(self.heads)) for i, name in enumerate(self.heads)}

    @property
    def trunk(self) -> nn.ModuleList:
        """What all tasks share, which is what surgery is about: the encoder, and the shared layer if there is one."""
        return nn.ModuleList([self.encoder, *([self.shared] if self.shared is not None else [])])

    def forward(self, packed: Packed, counts: Mapping[str, int], *, seed: Tensor | None = None) -> dict[str, Tensor]:
        """Each task's outputs.

        Args:
            packed: the tasks' sequences, one task after the other.
            counts: each task's number of examples, in the order of the stream.
            seed: as for `kernels.dropout_mask`; drawn from torch's default generator if left out.

        Returns:
            by task: logits [n, outputs], or [n] for a task with one output (in training for multiple negatives
            ranking [n, n]; `Head.forward`).

        Raises:
            ValueError: `counts` names an unknown task or does not add up to the stream's sequences, or the encoder
                refuses the stream.
        """
        seed = self._seed(seed)
        return self.from_embedded(self.embed(packed, seed), packed, counts, seed=seed)

    def embed(self, packed: Packed, seed: Tensor | None = None) -> Tensor:
        """The embedding block's output, [N, D]: what SMART perturbs."""
        return self.encoder.embed(packed, seed)

    def from_embedded(
        self,
        embedded: Tensor,
        packed: Packed,
        counts: Mapping[str, int],
        *,
        seed: Tensor | None = None,
        all_gather: Callable[[Tensor], Tensor] | None = None,
        bounds: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """`forward` from the embedding block's output [N, D] on.

        Args:
            all_gather: turns the pooled vectors [S, D] of `packed`, a shard of a batch, into those of the whole batch,
                to which the heads are applied; `counts` are of the whole batch then.
            bounds: `Packed.sequence_bounds` of the whole batch, if it is larger than `packed`.
        """
        seed = self._seed(seed)
        hows = dict.fromkeys(map(self.pooling_of, counts))
        first_tokens = set(hows) <= set(FIRST_TOKEN_POOLINGS)
        hidden = self.encoder.encode(embedded, packed, seed, first_tokens=first_tokens)
        pool = self.encoder.pool_first_tokens if first_tokens else self.encoder.pool
        pooled = {how: pool(hidden, packed, how) for how in hows}
        if all_gather is not None:
            pooled = {how: all_gather(vectors) for how, vectors in pooled.items()}
        sizes = self._sizes(counts, packed.padding)
        self._check_sizes(sizes, counts, packed.padding, len(next(iter(pooled.values()))))
        vectors = {how: of_all.split(sizes)[::2] for how, of_all in pooled.items()}
        views = self.views(counts, bounds or packed.sequence_bounds, packed.padding) if self.shared is not None else {}
        seed = seed if seed is None or seed.ndim == 0 else seed[0]  # the heads' rows are those of the whole batch
        outputs = {}
        for i, name in enumerate(counts):
            rows, stream_ids = vectors[self.pooling_of(name)][i], self._stream_ids[name]
            head: Any = self.heads[name]
            if self.shared is not None:
                rows = self.shared(rows, views[name], seed=seed, stream_id=stream_ids[-1])
            outputs[name] = head(*head.split(rows), drop=head.dropouts(seed, stream_ids))
        return outputs

    def views(self, counts: Mapping[str, int], bounds: Sequence[int] | None, padding: int = 0) -> dict[str, int]:
        """Which view of a shared parameter each task reads, where there is one view for each group of tasks."""
        starts = list(accumulate(self._sizes(counts, padding), initial=0))[:-1:2]
        firsts = (bounds or (0, 0))[:-1]
        return {name: bisect_right(firsts, start) - 1 for name, start in zip(counts, starts, strict=True)}

    def pooling_of(self, task: str) -> str:
        return self.pooling if isinstance(self.pooling, str) else self.pooling.get(task, "cls")

    def parameters_of(self, task: str, view: int = 0) -> list[Tensor]:
        """What a task trains: the trunk's parameters, of which it reads the view of this number, and its head's."""
        owners = [*self.trunk.modules(), *self.heads[task].modules()]
        params = [view_of(param, view) for owner in owners for param in owner._parameters.values() if param is not None]
        return [param for param in params if param.requires_grad]

    def _sizes(self, counts: Mapping[str, int], padding: int) -> list[int]:
        """Numbers of sequences in the stream: each task's, and the padding sequences after them."""
        if unknown := [name for name in counts if name not in self.heads]:
            known = list(self.heads)
            raise ValueError(
                f"no head for task {unknown[0]!r}{did_you_mean(unknown[0], known)}; heads: {', '.join(known)}"
            )
        return [size for name, n in counts.items() for size in (n * sequences_of(self.tasks[name]), padding)]

    def _check_sizes(self, sizes: Sequence[int], counts: Mapping[str, int], padding: int, sequences: int) -> None:
        if sum(sizes) != sequences:
            added = f", with {padding} of padding for each task" if padding else ""
            widths = {name: sequences_of(self.tasks[name]) for name in counts}
            several = [f"; an example of {name} has {width}" for name, width in widths.items() if width > 1]
            raise ValueError(
                f"counts {dict(counts)} must add up to the {sequences} sequences of the packed stream{added}"
                f"{''.join(several)}"
            )

    def freeze_encoder(self) -> None:
        """Train what was added to the encoder: it then runs in evaluation mode and keeps no activations."""
        self.frozen = True
        self.encoder.requires_grad_(False).eval()

    def freeze_layers(self, layers: int) -> None:
        """Do not train the embeddings and the first layers of the encoder; 0 freezes nothing.

        Dropout acts there as in training: what is trained sees the encoder that it would see without freezing. No
        gradient goes through these layers, unless SMART asks for that of the embeddings' outputs.

        Raises:
            ValueError: more layers than the encoder has.
        """
        encoder = self.encoder
        if layers > len(encoder.layers):
            raise ValueError(f"cannot freeze {layers} layers of an encoder that has {len(encoder.layers)}")
        for module in (encoder.embeddings, *encoder.layers[:layers]) if layers else ():
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> MultitaskModel:
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def parameter_groups(self, weight_decay: float, *, by_layer: bool = False) -> list[dict[str, Any]]:
        """What is trained, in groups for an optimizer.

        Args:
            by_layer: whether each layer of the encoder has groups of its own.

        Returns:
            up to four groups, named `encoder.decay`, `encoder.no_decay`, `heads.decay` and `heads.no_decay`: matrices
            decay, biases and the parameters of normalisations do not (Devlin et al. 2019). A shared layer is with the
            heads: it starts anew as they do. By layer, two groups of each part of the encoder from the top down:
            `encoder.pooler.decay`, `encoder.1.decay`, `encoder.0.decay`, `encoder.embeddings.decay`, and so on; their
            `depth` is the number of layers above, 0 for the pooler too, and of the embeddings the number of all layers.
        """
        encoder, groups = self.encoder, []
        added = nn.ModuleList([self.heads, *([self.shared] if self.shared is not None else [])])
        parts: list[tuple[str, nn.Module, int]] = [("encoder", encoder, 0)]
        if by_layer:
            count = len(encoder.layers)
            parts = [("encoder.pooler", encoder.pooler, 0)] if encoder.pooler is not None else []
            parts += [(f"encoder.{i}", encoder.layers[i], count - 1 - i) for i in reversed(range(count))]
            parts += [("encoder.embeddings", encoder.embeddings, count)]
        for part, module, depth in (*parts, ("heads", added, 0)):
            trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
            matrices = [parameter for parameter in trained if parameter.ndim > 1]
            vectors = [parameter for parameter in trained if parameter.ndim <= 1]
            groups += [
                {"name": f"{part}.decay", "params": matrices, "weight_decay": weight_decay, "depth": depth},
                {"name": f"{part}.no_decay", "params": vectors, "weight_decay": 0.0, "depth": depth},
            ]
        return [group for group in groups if group["params"]]

    def _seed(self, seed: Tensor | None) -> Tensor | None:
        return draw_seed(self.encoder._word.device) if seed is None and self.training else seed


def save_heads(model: MultitaskModel, path: str | Path) -> None:
    """Write what was added to the encoder to a safetensors file: `task.name` of heads, `shared.name` of their layer."""
    write_tensors(Path(path), _added(model))


def load_heads(model: MultitaskModel, path: str | Path) -> None:
    """Fill every head of the model from a file of `save_heads`; heads of other tasks in it are left aside.

    Raises:
        UserError: no such file, a damaged one, or a head that is missing or of another shape.
    """
    path = Path(path)
    with open_safetensors(path) as tensors, torch.no_grad():
        saved = set(tensors.keys())
        for name, place in _added(model).items():
            if name not in saved:
                tasks = sorted({key.partition(".")[0] for key in saved})
                raise UserError(
                    f"{path} has no head for task {name.partition('.')[0]!r} (it has {', '.join(tasks)});"
                    " choose among these tasks"
                )
            place.copy_(fitting(tensors.get_tensor(name), place.shape, f"{path}: {name}"))


def _added(model: MultitaskModel) -> dict[str, Tensor]:
    """The state of what was added to the encoder, in the model's own memory."""
    parts = {"shared.": model.shared, "": model.heads}
    return {
        prefix + name: tensor
        for prefix, part in parts.items()
        if part is not None
        for name, tensor in part.state_dict().items()
    }
