"""Task heads: from the pooled vectors of a task's sequences to its outputs. A new head is one class in `HEADS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minbert.model.layers import INITIALIZER_RANGE, BatchNorm, dropout, new_linear
from minbert.tasks import PAIR_ENCODINGS, Task

LOGIT_SCALE = 20.0  # of a cosine in a sigmoid or softmax (004, experiment 2bi)
OF_A_SCORE = ("binary_cross_entropy", "mean_squared_error")
OF_LOGITS = ("cross_entropy", *OF_A_SCORE)
OF_ANY_PAIR = (*OF_LOGITS, "multiple_negatives_ranking")

Dropout = Callable[[Tensor], Tensor]  # of an activation [..., D]


class Head(nn.Module):
    """What a task's outputs are made of.

    Attributes:
        pair_encoding: how a pair becomes sequences, a key of `PAIR_ENCODINGS`; a single sentence is one sequence.
        losses: those that fit the outputs.
        one_output: whether there is one output for an example: no multi-label task can have it.
        normalises: whether it has a `BatchNorm`, and so needs batches of at least 2.
    """

    pair_encoding: ClassVar[str] = "cross-encoder"
    losses: ClassVar[Sequence[str]] = OF_LOGITS
    one_output: ClassVar[bool] = False
    normalises: ClassVar[bool] = False

    def __init__(self, task: Task, hidden_size: int, dropout_p: float = 0.1) -> None:
        super().__init__()
        self.task, self.dropout_p = task, dropout_p
        self.width: int = PAIR_ENCODINGS[self.pair_encoding] if task.is_pair else 1

    def split(self, pooled: Tensor) -> Sequence[Tensor]:
        """The vectors of each of an example's `width` sequences, from pooled [n * width, D].

        Each is [n, D]. In training for multiple negatives ranking they are [n, 1, D] and [1, n, D]: every first
        sentence meets every second one.
        """
        sequences = pooled.reshape(len(pooled) // self.width, self.width, pooled.shape[1]).unbind(1)
        if self.training and self.task.loss == "multiple_negatives_ranking":
            u, v = sequences
            return u[:, None], v[None]
        return sequences

    def dropouts(self, seed: Tensor | None, stream_ids: Sequence[int]) -> list[Dropout]:
        """The head's dropouts of an activation [..., D], each with random numbers of its own.

        Args:
            seed: as for `kernels.dropout_mask`, whose rows are examples here; dropout acts in training mode only.
            stream_ids: one for each dropout of the head.
        """
        p = self.dropout_p if self.training else 0.0
        return [partial(dropout, p=p, seed=seed, stream_id=stream_id) for stream_id in stream_ids]

    def forward(self, *sequences: Tensor, drop: Sequence[Dropout]) -> Tensor:
        """Outputs [..., outputs], or [...] when there is one, from the `width` vectors of `split`, which broadcast."""
        raise NotImplementedError

    @classmethod
    def losses_for(cls, task: Task) -> Sequence[str]:
        """The losses that fit the outputs which the head has for a task: none where the task needs several."""
        return () if cls.one_output and task.is_multilabel else cls.losses


# One linear layer on features of the sequences ---------------------------------------------------------------------


class LinearHead(Head):
    """W dropout(x) + b on one sequence: a sentence, or a pair read as one (001 and 003, cross-encoding; 002, row D)."""

    def __init__(self, task: Task, hidden_size: int, dropout_p: float = 0.1) -> None:
        super().__init__(task, hidden_size, dropout_p)
        self.weight = nn.Parameter(torch.empty(task.num_outputs, self.features_size(hidden_size)))
        self.bias = nn.Parameter(torch.empty(task.num_outputs))
        nn.init.normal_(self.weight, std=INITIALIZER_RANGE)
        nn.init.zeros_(self.bias)

    def features_size(self, hidden_size: int) -> int:
        return self.width * hidden_size

    def features(self, *sequences: Tensor) -> Tensor:
        """What the layer reads, [..., features]."""
        return joined(*sequences)

    def forward(self, *sequences: Tensor, drop: Sequence[Dropout]) -> Tensor:
        x = self.features(*(sequence.to(self.weight.dtype) for sequence in sequences))
        return squeezed(F.linear(drop[0](x), self.weight, self.bias))


class ConcatenatedHead(LinearHead):
    """W dropout([u; v]) + b (000, section 3.1; 002, section 4.1; 004, section 5.3)."""

    pair_encoding = "bi-encoder"
    losses = OF_ANY_PAIR


class DifferenceHead(LinearHead):
    """W dropout([Pu; Pv; |Pu - Pv|]) + b, "Siamese with concatenated difference" (003, section 3).

    The paper gives neither P's size nor the difference's sign; here P is square, and the difference is absolute, as in
    the work it follows (Reimers and Gurevych 2019).
    """

    pair_encoding = "bi-encoder"
    losses = OF_ANY_PAIR

    def __init__(self, task: Task, hidden_size: int, dropout_p: float = 0.1) -> None:
        super().__init__(task, hidden_size, dropout_p)
        self.projection = new_linear(hidden_size, hidden_size)

    def features_size(self, hidden_size: int) -> int:
        return 3 * hidden_size

    def features(self, *sequences: Tensor) -> Tensor:
        u, v = map(self.projection, sequences)
        return joined(u, v, (u - v).abs())


class CosineFeatureHead(LinearHead):
    """W dropout([u; v; cos(u, v)]) + b: the 2d + 1 features of 004, experiments 2bii and 2c."""

    pair_encoding = "bi-encoder"
    losses = OF_ANY_PAIR

    def features_size(self, hidden_size: int) -> int:
        return 2 * hidden_size + 1

    def features(self, *sequences: Tensor) -> Tensor:
        u, v = sequences
        return joined(u, v, F.cosine_similarity(u, v, dim=-1).unsqueeze(-1))


# A cosine ----------------------------------------------------------------------------------------------------------


class CosineHead(Head):
    """cos(u, v), without parameters (001, section 4.2; 004, experiment 2a).

    As a score it is multiplied by the largest label, which 002 (section 4.3) found necessary; 003 is silent. As a logit
    it stays what it is: no paper scales one. For multiple negatives ranking, of which no paper has this form, it is
    multiplied by 20, or the softmax could prefer no pair by more than a factor of e^2.
    """

    pair_encoding = "bi-encoder"
    losses: ClassVar[Sequence[str]] = (
        *OF_A_SCORE,
        "cosine_embedding",
        "multiple_negatives_ranking",
    )
    one_output = True

    def forward(self, *sequences: Tensor, drop: Sequence[Dropout]) -> Tensor:
        scales = {"mean_squared_error": self.task.max_label, "multiple_negatives_ranking": LOGIT_SCALE}
        return scales.get(self.task.loss, 1.0) * self.cosine(*sequences)

    def cosine(self, u: Tensor, v: Tensor) -> Tensor:
        return F.cosine_similarity(u, v, dim=-1)


class ProjectedCosineHead(CosineHead):
    """The same of Pu and Pv: "Siamese with cosine similarity" (003, section 3).

    There the embeddings pass "through their respective linear layers"; a Siamese network shares its weights, so both
    pass through one. It is square and has no dropout, of which the paper says nothing.
    """

    def __init__(self, task: Task, hidden_size: int, dropout_p: float = 0.1) -> None:
        super().__init__(task, hidden_size, dropout_p)
        self.projection = new_linear(hidden_size, hidden_size)

    def cosine(self, u: Tensor, v: Tensor) -> Tensor:
        return super().cosine(self.projection(u), self.projection(v))


class ScaledCosineHead(ProjectedCosineHead):
    """20 cos(Pu, Pv) as a logit; as a score 5 sigmoid(20 cos(Pu, Pv)), 5 the largest label (004, experiment 2bi)."""

    losses = (*OF_A_SCORE, "multiple_negatives_ranking")

    def forward(self, *sequences: Tensor, drop: Sequence[Dropout]) -> Tensor:
        logits = LOGIT_SCALE * self.cosine(*sequences)
        return self.task.max_label * logits.sigmoid() if self.task.loss == "mean_squared_error" else logits


# Three layers, and networks mixed with a cosine --------------------------------------------------------------------


class LayersHead(Head):
    """Three linear layers with dropout(GELU(BatchNorm(.))) after the first two (002, section 4.3, rows E and F).

    The paper has BatchNorm and GELU after each of the three; but a logit after GELU could hardly be negative, and the
    conclusion speaks of "3 linear layer prediction heads": so the third gives the outputs. The inner size is the
    encoder's. Row B's legend lists no BatchNorm, but the text on that row does (section 5.4).
    """

    normalises = True

    def __init__(self, task: Task, hidden_size: int, dropout_p: float = 0.1) -> None:
        super().__init__(task, hidden_size, dropout_p)
        sizes = (self.width * hidden_size, hidden_size)
        self.inner = nn.ModuleList([new_linear(size, hidden_size, bias=False) for size in sizes])
        self.norms = nn.ModuleList([BatchNorm(hidden_size), BatchNorm(hidden_size)])
        self.outer = new_linear(hidden_size, task.num_outputs)

    def forward(self, *sequences: Tensor, drop: Sequence[Dropout]) -> Tensor:
        x = joined(*sequences)
        for number, (linear, norm) in enumerate(zip(self.inner, self.norms, strict=True)):
            x = drop[number](F.gelu(norm(linear(x))))
        return squeezed(self.outer(x))


class ConcatenatedLayersHead(LayersHead):
    """The three layers on [u; v] (002, rows B and C)."""

    pair_encoding = "bi-encoder"


class MixedHead(Head):
    """share * network + (1 - share) * 5 cos(u, v), 5 the largest label (002, section 4.3).

    The paper gives two ways from a cosine to a score: times 5 (section 4.3), and from [-1, 1] to [0, 5] (section 4.1).
    Here it is times 5, which the section on this head says one must.
    """

    network_type: ClassVar[type[Head]]
    losses = OF_A_SCORE
    one_output = True

    def __init__(self, task: Task, hidden_size: int, dropout_p: float = 0.1) -> None:
        super().__init__(task, hidden_size, dropout_p)
        self.network = self.network_type(task, hidden_size, dropout_p)

    @property
    def share(self) -> Tensor | float:
        """The network's share of the output."""
        return 0.5

    def forward(self, *sequences: Tensor, drop: Sequence[Dropout]) -> Tensor:
        *_, u, v = sequences
        network = self.network(*sequences[: self.network.width], drop=drop)
        return self.share * network + (1 - self.share) * self.task.max_label * F.cosine_similarity(u, v, dim=-1)


class HalfCosineHead(MixedHead):
    """Half a linear layer on [u; v], half a cosine (002, row A)."""

    pair_encoding = "bi-encoder"
    network_type = ConcatenatedHead


class ConcatenatedLayersCosineHead(MixedHead):
    """Three layers on [u; v] and a cosine, in shares that are learned from a half on (002, rows B and C).

    "Learnable weights" of a "split" (section 5.4) are one share and what it leaves.
    """

    pair_encoding = "bi-encoder"
    network_type: ClassVar[type[Head]] = ConcatenatedLayersHead
    normalises = True

    def __init__(self, task: Task, hidden_size: int, dropout_p: float = 0.1) -> None:
        super().__init__(task, hidden_size, dropout_p)
        self.balance = nn.Parameter(torch.zeros(1))

    @property
    def share(self) -> Tensor | float:
        return self.balance.sigmoid()


class LayersCosineHead(ConcatenatedLayersCosineHead):
    """Three layers on the pair read as one sequence, and the cosine of its sentences read apart (002, rows E and F).

    The paper does not say of which two embeddings it takes the cosine once a pair is one sequence.
    """

    pair_encoding = "both"
    network_type = LayersHead


HEADS: dict[str, type[Head]] = {
    "linear": LinearHead,
    "concatenated": ConcatenatedHead,
    "difference": DifferenceHead,
    "cosine": CosineHead,
    "projected-cosine": ProjectedCosineHead,
    "scaled-cosine": ScaledCosineHead,
    "cosine-feature": CosineFeatureHead,
    "half-cosine": HalfCosineHead,
    "layers": LayersHead,
    "concatenated-layers": ConcatenatedLayersHead,
    "layers-cosine": LayersCosineHead,
    "concatenated-layers-cosine": ConcatenatedLayersCosineHead,
}


def pair_encoding(task: Task) -> str:
    """How the examples of a task become sequences, as its head needs them: a key of `PAIR_ENCODINGS`."""
    return HEADS[task.head].pair_encoding if task.is_pair else "cross-encoder"


def sequences_of(task: Task) -> int:
    """The sequences of one example of a task."""
    return PAIR_ENCODINGS[pair_encoding(task)]


def joined(*vectors: Tensor) -> Tensor:
    """Vectors [..., D] that broadcast, end to end: [..., sum of all D]."""
    shape = torch.broadcast_shapes(*(vector.shape[:-1] for vector in vectors))
    return torch.cat([vector.expand(*shape, -1) for vector in vectors], -1)


def squeezed(scores: Tensor) -> Tensor:
    """[..., 1] as [...]."""
    return scores.squeeze(-1) if scores.shape[-1] == 1 else scores
