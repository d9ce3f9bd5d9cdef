"""One encoder with a head for each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minbert.errors import UserError, did_you_mean
from minbert.model.encoder import Encoder, draw_seed
from minbert.model.heads import HEADS
from minbert.model.pooling import check_pooling
from minbert.model.weights import fitting, open_safetensors
from minbert.packing import Packed
from minbert.tasks import Task


class MultitaskModel(nn.Module):
    """Every task's sequences go through the encoder in one packed stream; each task's head then takes its own.

    Attributes:
        frozen: whether the encoder is left as it is and only the heads train.
    """

    def __init__(
        self, encoder: Encoder, tasks: Sequence[Task], *, pooling: str = "cls", head_dropout: float = 0.1
    ) -> None:
        """Add new heads, initialised from torch's default generator.

        Raises:
            ValueError: unknown `pooling`, `pooler` for an encoder without one, or an unknown head.
        """
        super().__init__()
        check_pooling(pooling)
        if pooling == "pooler" and encoder.pooler is None:
            raise ValueError("pooling 'pooler' needs an encoder with a pooler; use 'cls', or load it with pooler=True")
        self.encoder = encoder
        self.pooling = pooling
        self.frozen = False
        self.heads = nn.ModuleDict()
        for task in tasks:
            if task.head not in HEADS:
                raise ValueError(
                    f"task {task.name}: unknown head {task.head!r}{did_you_mean(task.head, list(HEADS))};"
                    f" known: {', '.join(HEADS)}"
                )
            self.heads[task.name] = HEADS[task.head](encoder.config.hidden_size, task.outputs, head_dropout)
        self._sites = {name: encoder.dropout_sites + i for i, name in enumerate(self.heads)}

    def forward(self, packed: Packed, counts: Mapping[str, int], *, seed: Tensor | None = None) -> dict[str, Tensor]:
        """Each task's outputs.

        Args:
            packed: the tasks' sequences, one task after the other.
            counts: each task's number of sequences, in the order of the stream.
            seed: int64 scalar that dropout follows; drawn from torch's default generator if left out.

        Returns:
            by task: logits [n, outputs], or [n] for a task with one output.

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
        self, embedded: Tensor, packed: Packed, counts: Mapping[str, int], *, seed: Tensor | None = None
    ) -> dict[str, Tensor]:
        """`forward` from the embedding block's output [N, D] on."""
        seed = self._seed(seed)
        hidden = self.encoder.encode(embedded, packed, seed)
        return self.predict(hidden, packed, counts, seed=seed)

    def predict(
        self, hidden: Tensor, packed: Packed, counts: Mapping[str, int], *, seed: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Pool hidden states [N, D] and apply the heads: what `forward` does after the encoder."""
        if unknown := [name for name in counts if name not in self.heads]:
            known = list(self.heads)
            raise ValueError(
                f"no head for task {unknown[0]!r}{did_you_mean(unknown[0], known)}; heads: {', '.join(known)}"
            )
        sequences = len(packed.cu_seqlens) - 1
        sizes = [size for count in counts.values() for size in (count, packed.padding)]
        if sum(sizes) != sequences:
            padding = f", with {packed.padding} of padding for each task" if packed.padding else ""
            raise ValueError(
                f"counts {dict(counts)} must add up to the {sequences} sequences of the packed stream{padding}"
            )
        seed = self._seed(seed)
        pooled = self.encoder.pool(hidden, packed, self.pooling).split(sizes)[::2]
        return {
            name: self.heads[name](rows, seed=seed, site=self._sites[name])
            for name, rows in zip(counts, pooled, strict=True)
        }

    def freeze_encoder(self) -> None:
        """Train the heads alone: the encoder then runs in evaluation mode and keeps no activations."""
        self.frozen = True
        self.encoder.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> MultitaskModel:
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """What is trained, in groups for an optimizer.

        Returns:
            up to four groups, named `encoder.decay`, `encoder.no_decay`, `heads.decay` and `heads.no_decay`: matrices
            decay, biases and LayerNorm's parameters do not (Devlin et al. 2019).
        """
        groups = []
        for part, module in (("encoder", self.encoder), ("heads", self.heads)):
            trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
            matrices = [parameter for parameter in trained if parameter.ndim > 1]
            vectors = [parameter for parameter in trained if parameter.ndim <= 1]
            groups += [
                {"name": f"{part}.decay", "params": matrices, "weight_decay": weight_decay},
                {"name": f"{part}.no_decay", "params": vectors, "weight_decay": 0.0},
            ]
        return [group for group in groups if group["params"]]

    def _seed(self, seed: Tensor | None) -> Tensor | None:
        return draw_seed(self.encoder._word.device) if seed is None and self.training else seed


def save_heads(model: MultitaskModel, path: str | Path) -> None:
    """Write the heads' weights as one safetensors file, each named `task.parameter`."""
    save_file({name: tensor.to("cpu", copy=True) for name, tensor in model.heads.state_dict().items()}, path)


def load_heads(model: MultitaskModel, path: str | Path) -> None:
    """Fill every head of the model from a file of `save_heads`; heads of other tasks in it are left aside.

    Raises:
        UserError: no such file, a damaged one, or a head that is missing or of another shape.
    """
    path = Path(path)
    with open_safetensors(path) as tensors, torch.no_grad():
        saved = set(tensors.keys())
        for name, place in model.heads.state_dict().items():
            if name not in saved:
                tasks = sorted({key.partition(".")[0] for key in saved})
                raise UserError(
                    f"{path} has no head for task {name.partition('.')[0]!r} (it has {', '.join(tasks)});"
                    " choose among these tasks"
                )
            place.copy_(fitting(tensors.get_tensor(name), place.shape, f"{path}: {name}"))
