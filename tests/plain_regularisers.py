"""What the tests of regularisers share: a small model in float64, and their papers' equations in plain PyTorch.

The model computes f; everything around it (noise, search, divergences, gradients) is stated here anew.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minbert import kernels
from minbert.data.packing import Packed, pack
from minbert.methods.rdrop import RDropConfig
from minbert.methods.smart import BregmanConfig, SmartConfig
from minbert.model import Encoder, EncoderConfig, MultitaskModel
from minbert.tasks import find_tasks
from minbert.training.batches import make_batch
from minbert.training.freelb import FreeLB
from minbert.training.objective import Objective

TASKS = find_tasks(["sst", "qqp", "sts"])
LABELS = {"sst": torch.tensor([0.0, 4, 2]), "qqp": torch.ones(1), "sts": torch.tensor([1.0, 4.5])}
COUNTS = {name: len(labels) for name, labels in LABELS.items()}
LAMBDAS = {"sst": 0.75, "qqp": 0.5, "sts": 1.0}
R3F = SmartConfig(lambda_s=LAMBDAS, steps=0, sigma=0.3)
SIFT = SmartConfig(lambda_s=LAMBDAS, epsilon=0.1, sigma=0.05, eta=0.2, steps=2, normalized=True)
VAT = SmartConfig(
    lambda_s=LAMBDAS, search="power", objective="kl", norm="2", per="sequence", steps=2, sigma=0.1, epsilon=1.5
)
FREELB = SmartConfig(
    lambda_s=LAMBDAS, objective="task-loss", norm="2", per="sequence", steps=2, epsilon=1.0, eta=0.7, relative=False
)

Outputs = dict[str, Tensor]


def small_model() -> MultitaskModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = EncoderConfig(vocab_size=50, **sizes).with_dropout(0.2)
    model = MultitaskModel(Encoder(config), TASKS).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for head in model.heads.values():
        torch.nn.init.normal_(head.weight, std=0.5)
    return model.double()


def small_batch() -> Packed:
    generator = torch.Generator().manual_seed(0)
    return pack([torch.randint(1, 50, (n,), generator=generator).tolist() for n in (7, 1, 40, 33, 2, 13)])


def objective(model: MultitaskModel, smart: SmartConfig, rdrop: RDropConfig | None = None, **options) -> Objective:
    kind = FreeLB if smart.objective == "task-loss" else Objective
    return kind(model, smart, BregmanConfig(), rdrop=rdrop, **options)


def trained(model, packed, smart=SmartConfig(), rdrop=None, seed=0, **options):  # noqa: B008
    """The losses, and the gradient of each parameter."""
    model.zero_grad()
    losses = objective(model, smart, rdrop, **options)(make_batch(packed, LABELS, smart, rdrop, seed=seed))
    losses.total.backward()
    return losses, {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


def seeds(packed, seed: int = 0) -> Tensor:
    return make_batch(packed, LABELS, SmartConfig(), seed=seed).seeds


def gradients(model: MultitaskModel, total: Tensor) -> dict[str, Tensor]:
    names = [name for name, param in model.named_parameters() if param.requires_grad]
    params = [param for param in model.parameters() if param.requires_grad]
    found = torch.autograd.grad(total, params, allow_unused=True)
    return {name: grad for name, grad in zip(names, found, strict=True) if grad is not None}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


# In plain PyTorch ----------------------------------------------------------------------------------------------------


def task_losses(outputs: Outputs) -> Outputs:
    return {
        "sst": F.cross_entropy(outputs["sst"], LABELS["sst"].long()),
        "qqp": F.binary_cross_entropy_with_logits(outputs["qqp"], LABELS["qqp"].double()),
        "sts": F.mse_loss(outputs["sts"], LABELS["sts"].double()),
    }


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of logits [n, C], the mean over the examples."""
    log_p, log_q = p.log_softmax(1), q.log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1).mean()


def both(logits: Tensor) -> Tensor:
    return torch.stack([torch.zeros_like(logits), logits], 1)


def divergence(p: Outputs, q: Outputs, symmetric: bool = True) -> Outputs:
    """KL(p || q), with KL(q || p) added, of classes; the squared distance of scores."""

    def of_classes(one: Tensor, other: Tensor) -> Tensor:
        return kl(one, other) + kl(other, one) if symmetric else kl(one, other)

    return {
        "sst": of_classes(p["sst"], q["sst"]),
        "qqp": of_classes(both(p["qqp"]), both(q["qqp"])),
        "sts": F.mse_loss(p["sts"], q["sts"]),
    }


def weighted(values: Outputs, weights: dict[str, float]) -> Tensor:
    return sum(weights[name] * value for name, value in values.items())


def lengths_of(x: Tensor, packed) -> Tensor:
    """The L2 norm of each sequence, for each of its tokens [N, 1]."""
    norms = [part.norm().repeat(len(part)) for part in x.split(packed.lengths.tolist())]
    return torch.cat(norms)[:, None]


def into_ball(offset: Tensor, packed, radius: float) -> Tensor:
    return offset * (radius / lengths_of(offset, packed).clamp(min=1e-300)).clamp(max=1)


def function(model, packed) -> Callable[[Tensor], Outputs]:
    """f: from embeddings to outputs, under the dropout masks of a batch's clean pass."""
    return lambda x: model.from_embedded(x, packed, COUNTS, seed=seeds(packed)[0])


def normalised(model, packed) -> Tensor:
    """The rows of the embedding block before LayerNorm's affine part."""
    table = model.encoder.embeddings
    ids = packed.token_ids, packed.token_type_ids, packed.position_ids
    total = sum(of[i] for of, i in zip((table.word, table.token_type, table.position), ids, strict=True))
    return F.layer_norm(total, (total.shape[1],), eps=table.norm.eps)


def embedding_block(model, packed, n: Tensor) -> Tensor:
    """dropout(g n + b) with the mask of a batch's clean pass."""
    table, p = model.encoder.embeddings, model.encoder.embeddings.dropout_p
    keep = kernels.dropout_mask(*n.shape, p, seeds(packed)[0], 0)
    return (table.norm.weight * n + table.norm.bias) * keep / (1 - p)
