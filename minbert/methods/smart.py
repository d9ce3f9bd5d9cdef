"""SMART (Jiang et al. 2019): smoothness-inducing regularisation, and the Bregman proximal point method."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from minbert import kernels
from minbert.errors import require
from minbert.methods.divergences import DIVERGENCES
from minbert.model import MultitaskModel
from minbert.tasks import Task

NOISE_STREAM_ID = 0  # of the initial noise, whose seed is used for nothing else


@dataclass(frozen=True)
class SmartConfig:
    """The smoothness-inducing regulariser, R_s of Jiang et al. 2019; the letters are the paper's.

    Args:
        lambda_s: weight of the regulariser, or one for each task, such as {sst: 5, sts: 1}; 0 is without it.
        epsilon: radius of the ball around the embeddings in which the worst perturbation is sought.
        sigma: standard deviation of the noise that the search starts from.
        eta: length of a step of the search.
        steps: steps of the search, T_x in the paper.
        norm: whose ball and step lengths: inf or 2.
        per: whether a norm is taken over each token or over each whole sequence.
        projection: ball is the paper's; unit rescales every perturbation to epsilon, as released implementations do.
        relative: whether epsilon, sigma and eta are in units of the embeddings' root mean square, which differs from
            model to model (0.5 in a small pretrained BERT, 1 from scratch).
        masks: whether clean and perturbed passes drop the same elements (shared) or each its own (independent).
        warmup: share of all steps in which lambda_s rises from 0.
        precision: auto computes the step in float32 where bf16 would round the perturbation away; same never does.
    """

    lambda_s: float | dict[str, float] = 0.0
    epsilon: float = 0.02
    sigma: float = 0.01
    eta: float = 0.02
    steps: int = 1
    norm: Literal["inf", "2"] = "inf"
    per: Literal["token", "sequence"] = "token"
    projection: Literal["ball", "unit"] = "ball"
    relative: bool = True
    masks: Literal["shared", "independent"] = "shared"
    warmup: float = 0.0
    precision: Literal["auto", "same"] = "auto"

    def __post_init__(self) -> None:
        for name in ("epsilon", "sigma", "eta"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"smart.{name}", "0 or more", value)
        weights = self.lambda_s if isinstance(self.lambda_s, dict) else {"": self.lambda_s}
        for value in weights.values():
            require(0 <= value < math.inf, "smart.lambda_s", "0 or more", value)
        require(self.steps >= 1, "smart.steps", "at least 1", self.steps)
        require(0 <= self.warmup < 1, "smart.warmup", "at least 0 and below 1", self.warmup)

    @property
    def on(self) -> bool:
        return any(self.lambda_s.values()) if isinstance(self.lambda_s, dict) else self.lambda_s > 0

    def applies_to(self, task: str) -> bool:
        """Whether a task has the regulariser at some time."""
        return self.lambda_s.get(task, 0.0) > 0 if isinstance(self.lambda_s, dict) else self.lambda_s > 0

    def weight(self, task: str, done: float) -> float:
        """lambda_s of a task when `done` of all steps, from 0 to 1, are."""
        weight = self.lambda_s.get(task, 0.0) if isinstance(self.lambda_s, dict) else self.lambda_s
        return weight * min(1.0, done / self.warmup) if self.warmup else weight


@dataclass(frozen=True)
class BregmanConfig:
    """The momentum Bregman proximal point method: the outputs stay near those of an average of earlier parameters.

    Args:
        mu: weight of the divergence from the average's outputs; 0 turns it off.
        beta: the average keeps this share of itself in each step.
    """

    mu: float = 0.0
    beta: float = 0.99

    def __post_init__(self) -> None:
        require(0 <= self.mu < math.inf, "bregman.mu", "0 or more", self.mu)
        require(0 <= self.beta <= 1, "bregman.beta", "between 0 and 1", self.beta)


def embedding_scale(model: MultitaskModel) -> Tensor:
    """The root mean square of the embedding block's output before dropout: known from its LayerNorm's parameters.

    Returns:
        a float32 scalar on the model's device.
    """
    norm = model.encoder.embeddings.norm
    both = torch.cat((norm.weight.detach(), norm.bias.detach()))
    return (torch.linalg.vector_norm(both, dtype=torch.float64) / math.sqrt(len(norm.weight))).float()


def rounds_away(model: MultitaskModel, config: SmartConfig, dtype: torch.dtype) -> bool:
    """Whether arithmetic in `dtype` rounds embeddings by more than the radius within which they are perturbed."""
    scale = embedding_scale(model).item()
    return config.epsilon * (scale if config.relative else 1.0) < scale * torch.finfo(dtype).eps / 2


def perturb(
    forward: Callable[[Tensor], Mapping[str, Tensor]],
    embedded: Tensor,
    outputs: Mapping[str, Tensor],
    tasks: Mapping[str, Task],
    cu_seqlens: Tensor,
    config: SmartConfig,
    *,
    noise_seed: Tensor,
    scale: Tensor | None = None,
) -> Tensor:
    """The worst perturbation of the embeddings that T_x steps of projected gradient ascent find (algorithm 1).

    Only the gradient of the embeddings is computed: `forward` reads parameters that need none.

    Args:
        forward: computes the model's outputs by task from perturbed embeddings.
        embedded: the embedding block's output [N, D].
        outputs: the model's outputs by task for it.
        tasks: by name; a task's loss decides which divergence its outputs have.
        cu_seqlens: cumulative sequence lengths, int32 [S + 1].
        noise_seed: the seed of the noise that the search starts from.
        scale: the embeddings' root mean square (`embedding_scale`), if `config.relative`.

    Returns:
        the perturbed embeddings [N, D].
    """
    x = embedded.detach()
    clean = {name: output.detach() for name, output in outputs.items()}
    perturbed = kernels.smart_init(x, sigma=config.sigma, seed=noise_seed, stream_id=NOISE_STREAM_ID, scale=scale)
    for _ in range(config.steps):
        perturbed.requires_grad_()
        with torch.enable_grad():
            divergence = torch.stack(list(divergences(tasks, forward(perturbed), clean).values())).sum()
            (gradient,) = torch.autograd.grad(divergence, perturbed)
        perturbed = kernels.smart_ascend(
            perturbed.detach(),
            x,
            gradient,
            cu_seqlens,
            eta=config.eta,
            epsilon=config.epsilon,
            norm=config.norm,
            per=config.per,
            projection=config.projection,
            scale=scale,
        )
    return perturbed


def divergences(
    tasks: Mapping[str, Task], outputs: Mapping[str, Tensor], others: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The divergence l_s of the paper between two outputs of each task, averaged over the task's examples."""
    return {name: DIVERGENCES[tasks[name].loss](output, others[name]) for name, output in outputs.items()}


def straight_through(embedded: Tensor, perturbed: Tensor) -> Tensor:
    """The value of `perturbed`, with the gradient of `embedded`: the perturbation itself counts as constant."""
    return perturbed + (embedded - embedded.detach())
