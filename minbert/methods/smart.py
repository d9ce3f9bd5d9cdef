"""Regularisers of perturbed embeddings: SMART (Jiang et al. 2019) and its relatives; and Bregman proximal points.

All add to the loss of a task what its outputs do when the embeddings x are moved to x + r. With l_s the symmetrised
divergence of two outputs (`minbert.methods.divergences`), f the model, L the task's loss and y the labels:

- SMART: lambda_s max l_s(f(x + r), f(x)) over |r| <= epsilon, by `steps` steps of projected gradient ascent.
- R3F (Aghajanyan et al. 2020, "Better Fine-Tuning by Reducing Representational Collapse"):
  lambda_s l_s(f(x + z), f(x)), z ~ N(0, sigma^2 I) or U(-sigma, sigma): `steps` 0. No pass of ascent.
- SiFT (He et al. 2021, "DeBERTa", section 4): SMART's search before the affine part of the embeddings' LayerNorm, whose
  rows all have the same length: `normalized`. The embedding block is y = dropout(g n + b), n the rows normalised
  without parameters; what is moved is n, and g gets the gradient of g r too. The released code normalises n + r anew.
- Virtual adversarial training (Miyato et al. 2018, section 3.3): lambda_s KL(f(x) || f(x + r)), where f(x) is constant
  and r = epsilon g / |g|, g the gradient of this KL at xi d; d begins as noise of norm 1 and is g / |g| from step to
  step (power iteration). `search` power, `objective` kl, `norm` 2; xi is `sigma`.
- FreeLB (Zhu et al. 2020, algorithm 1): 1/K sum_t L(f(x + r_t), y) takes the place of L(f(x), y), where r_0 = 0 and
  r_t is one step of projected ascent from r_t-1: `objective` task-loss. K is steps + 1 (`minbert.training.freelb`).

In plain passes (a forward and a backward, which counts twice) a step costs 2.7 with SMART, SiFT and virtual adversarial
training, 0.7 more with each further step; 2 with R3F; K with FreeLB.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from minbert import kernels
from minbert.errors import UserError, require
from minbert.methods.divergences import DIVERGENCES, KL_DIVERGENCES
from minbert.model import MultitaskModel
from minbert.tasks import Task

NOISE_STREAM_ID = 0  # of the initial noise, whose seed is used for nothing else
MEASURES = {"divergence": DIVERGENCES, "kl": KL_DIVERGENCES}  # by objective, of perturbed and clean outputs


@dataclass(frozen=True)
class SmartConfig:
    """The regulariser of perturbed embeddings: SMART's R_s (Jiang et al. 2019), whose letters these are, or a relative.

    Args:
        lambda_s: weight of the regulariser, or one for each task, such as {sst: 5, sts: 1}; 0 is without it. With
            objective task-loss, at most 1: the share of the mean over the passes in the task's loss.
        epsilon: radius of the ball around the embeddings in which the worst perturbation is sought; with search power,
            the length of the perturbation. Unused with 0 steps.
        sigma: standard deviation of the noise that the search starts from; uniform noise lies between -sigma and sigma.
            With search power, the noise is scaled to this length (xi of virtual adversarial training). Unused with
            objective task-loss.
        eta: length of a step of the search. Unused with search power, and with 0 steps.
        steps: steps of the search, T_x in the paper; 0 is R3F, noise alone. FreeLB's K is one more.
        norm: whose ball and step lengths: inf or 2.
        per: whether a norm is taken over each token or over each whole sequence.
        projection: ball is the paper's; unit rescales every perturbation to epsilon. smart-pytorch does so with 1,
            whatever its epsilon. Unused with search power, and with 0 steps.
        relative: whether epsilon, sigma and eta are in units of the embeddings' root mean square, which differs from
            model to model (0.5 in a small pretrained BERT, 1 from scratch). Of normalized embeddings it is 1.
        masks: whether clean and perturbed passes drop the same elements (shared) or each its own (independent).
        warmup: share of all steps in which lambda_s rises from 0.
        precision: auto computes the step in float32 where bf16 would round the perturbation away; same never does.
        noise: the distribution that the search starts from, or of R3F: normal or uniform.
        normalized: whether the perturbation is of embeddings that are normalised and have not gone through the affine
            part of their LayerNorm: SiFT.
        search: ascent is SMART's; power takes each gradient's direction for the perturbation, as virtual adversarial
            training does.
        objective: what the perturbation raises and training lowers: divergence is the symmetrised one from the clean
            outputs; kl is that of virtual adversarial training, from clean outputs that count as constant; task-loss is
            FreeLB, the mean of the task's loss over the search's passes in place of its loss.
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
    noise: Literal["normal", "uniform"] = "normal"
    normalized: bool = False
    search: Literal["ascent", "power"] = "ascent"
    objective: Literal["divergence", "kl", "task-loss"] = "divergence"

    def __post_init__(self) -> None:
        for name in ("epsilon", "sigma", "eta"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"smart.{name}", "0 or more", value)
        weights = self.lambda_s if isinstance(self.lambda_s, dict) else {"": self.lambda_s}
        for value in weights.values():
            require(0 <= value < math.inf, "smart.lambda_s", "0 or more", value)
            if self.is_freelb:
                require(value <= 1, "smart.lambda_s", "at most 1 with --smart.objective task-loss", value)
        require(self.steps >= 0, "smart.steps", "0 or more", self.steps)
        require(0 <= self.warmup < 1, "smart.warmup", "at least 0 and below 1", self.warmup)
        for option, value, chosen in (("search", "power", self.search), ("objective", "task-loss", self.objective)):
            if chosen == value and self.steps == 0:
                raise UserError(f"--smart.{option} {value} with --smart.steps 0 searches nothing; give at least 1 step")
        if self.search == "power" and self.sigma == 0 and not self.is_freelb:
            raise UserError("--smart.search power starts from noise of length --smart.sigma; give one above 0")

    @property
    def on(self) -> bool:
        return any(self.lambda_s.values()) if isinstance(self.lambda_s, dict) else self.lambda_s > 0

    @property
    def is_freelb(self) -> bool:
        return self.objective == "task-loss"

    @property
    def repeats_backward(self) -> bool:
        """Whether a batch has more than one backward."""
        return self.on and self.is_freelb

    @property
    def title(self) -> str:
        """What the method is called."""
        if self.is_freelb:
            return "FreeLB"
        if self.steps == 0:
            return "R3F"
        if self.search == "power":
            return "virtual adversarial training"
        return "SiFT" if self.normalized else "SMART"

    @property
    def reach(self) -> tuple[str, ...]:
        """The options that say how far the embeddings move."""
        if self.steps == 0:
            return ("sigma",)
        return ("epsilon",) if self.search == "power" else ("epsilon", "eta")

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
    return _root_mean_square(norm.weight, norm.bias)


def perturbation_scale(model: MultitaskModel, config: SmartConfig) -> Tensor | None:
    """What epsilon, sigma and eta are in units of, a float32 scalar; None: 1."""
    return embedding_scale(model) if config.relative and not config.normalized else None


def rounds_away(model: MultitaskModel, config: SmartConfig, dtype: torch.dtype) -> str | None:
    """The option by whose length, if at all, embeddings are moved less far than arithmetic in `dtype` rounds them.

    A length of norm 2 in a power search is taken as that of a token whose elements move alike.
    """
    scale, norm = embedding_scale(model).item(), model.encoder.embeddings.norm
    unit = scale if config.relative else 1.0
    if config.normalized:
        unit = _root_mean_square(norm.weight).item()
    lengths = {config.reach[0]: getattr(config, config.reach[0])}
    if config.search == "power":
        lengths |= {} if config.is_freelb else {"sigma": config.sigma}
        unit /= math.sqrt(len(norm.weight)) if config.norm == "2" else 1.0
    elif config.projection == "unit" and config.steps and not config.is_freelb:  # the offset before it is rescaled
        longer = "eta" if config.eta > config.sigma else "sigma"
        lengths[longer] = getattr(config, longer)
    for name, length in lengths.items():
        if length * unit < scale * torch.finfo(dtype).eps / 2:
            return name
    return None


def _root_mean_square(*vectors: Tensor) -> Tensor:
    """The root of the vectors' mean squares, added up; float32."""
    all_of_them = torch.cat([vector.detach() for vector in vectors])
    return (torch.linalg.vector_norm(all_of_them, dtype=torch.float64) / math.sqrt(len(vectors[0]))).float()


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
    affine: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The worst perturbation of the embeddings that the search finds: T_x steps of algorithm 1, or of power iteration.

    Only the gradient of the embeddings is computed: `forward` reads parameters that need none.

    Args:
        forward: computes the model's outputs by task from perturbed embeddings.
        embedded: the embedding block's output [N, D].
        outputs: the model's outputs by task for it.
        tasks: by name; a task's loss decides which divergence its outputs have.
        cu_seqlens: cumulative sequence lengths, int32 [S + 1].
        noise_seed: the seed of the noise that the search starts from.
        scale: `perturbation_scale`.
        affine: `Embeddings.affine` of these rows, if `config.normalized`.

    Returns:
        the point that was found, [N, D]: perturbed embeddings; with `affine` what is added to the normalised ones.
    """
    base = embedded.detach()
    x = origin(base, affine)
    clean = {name: output.detach() for name, output in outputs.items()}
    point = start(x, cu_seqlens, config, noise_seed, scale)
    for step in range(config.steps):
        point.requires_grad_()
        with torch.enable_grad():
            moved = point if affine is None else base + affine(point)
            values = divergences(tasks, forward(moved), clean, MEASURES[config.objective])
            (gradient,) = torch.autograd.grad(torch.stack(list(values.values())).sum(), point)
        length = config.epsilon if step == config.steps - 1 else config.sigma  # of a power search
        point = ascended(point.detach(), x, gradient, cu_seqlens, config, scale, length)
    return point


def origin(embedded: Tensor, affine: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Where a search has the clean embeddings."""
    return embedded.detach() if affine is None else torch.zeros_like(embedded)


def start(x: Tensor, cu_seqlens: Tensor, config: SmartConfig, seed: Tensor, scale: Tensor | None) -> Tensor:
    """Where a search from x starts: x with noise, for a power search of length sigma."""
    if config.noise == "normal":
        point = kernels.smart_init(x, sigma=config.sigma, seed=seed, stream_id=NOISE_STREAM_ID, scale=scale)
    else:  # erf(z / sqrt 2) of a standard normal z is uniform between -1 and 1
        zeros = torch.zeros_like(x, dtype=torch.float32)
        normal = kernels.smart_init(zeros, sigma=1.0, seed=seed, stream_id=NOISE_STREAM_ID)
        length = config.sigma if scale is None else config.sigma * scale
        point = (x + length * torch.erf(normal / math.sqrt(2))).to(x.dtype)
    if config.search == "ascent":
        return point
    return kernels.smart_ascend(  # a step of length 0, whose offset is rescaled
        point,
        x,
        torch.zeros_like(x),
        cu_seqlens,
        eta=0.0,
        epsilon=config.sigma,
        norm=config.norm,
        per=config.per,
        projection="unit",
        scale=scale,
    )


def ascended(
    point: Tensor,
    x: Tensor,
    gradient: Tensor,
    cu_seqlens: Tensor,
    config: SmartConfig,
    scale: Tensor | None,
    length: float,
) -> Tensor:
    """One step of a search around x, from `point`; of a power search the point at this length from x along `gradient`.

    A gradient of 0 leaves an ascent where it is, and a power search at x.
    """
    power = config.search == "power"
    return kernels.smart_ascend(
        x if power else point,
        x,
        gradient,
        cu_seqlens,
        eta=length if power else config.eta,
        epsilon=length if power else config.epsilon,
        norm=config.norm,
        per=config.per,
        projection="unit" if power else config.projection,
        scale=scale,
    )


def divergences(
    tasks: Mapping[str, Task],
    outputs: Mapping[str, Tensor],
    others: Mapping[str, Tensor],
    measures: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = DIVERGENCES,
) -> dict[str, Tensor]:
    """The divergence l_s of the paper between two outputs of each task, averaged over the task's examples.

    Args:
        measures: of two outputs, by the task's loss.
    """
    return {name: measures[tasks[name].loss](output, others[name]) for name, output in outputs.items()}


def placed(embedded: Tensor, point: Tensor, affine: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The perturbed embeddings at a point that a search found, with the gradient of the clean ones.

    The perturbation itself counts as constant (Danskin 1966); with `affine`, its factor, LayerNorm's weight, does not.
    """
    return point + (embedded - embedded.detach()) if affine is None else embedded + affine(point)
