"""Gradient surgery: from the Gram matrix of the task gradients to one weight for each of them.

A surgery is a function `weights(gram, generator)`, of the tasks' losses too for some; whatever it is, the update is the
weighted sum of the gradients. So no surgery reads a gradient: the T x T numbers that `minbert.kernels.gram` gives are
all it needs. `minbert.methods.weightings` has the rules that have options or a state.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from minbert import kernels
from minbert.errors import UserError, did_you_mean
from minbert.methods.built_in_weighting import BuiltInWeighting
from minbert.methods.user_weighting import UserWeighting, check_reference
from minbert.methods.weightings import WEIGHTINGS, random_orders, weighting_from


def sum_weights(gram: Tensor) -> Tensor:
    """The plain sum of the gradients: a weight of 1 each, float64 [T]."""
    return gram.new_ones(len(gram))


def mean_weights(gram: Tensor) -> Tensor:
    """The mean of the gradients: a weight of 1 / T each, float64 [T]."""
    return gram.new_full((len(gram),), 1 / len(gram))


def pcgrad_weights(gram: Tensor, generator: torch.Generator | None = None, reduction: str = "sum") -> Tensor:
    """PCGrad's weights (Yu et al. 2020, algorithm 1), by projecting coefficients of gradients instead of gradients.

    For each task the other tasks are taken in a random order. Where the inner product of its gradient and the original
    gradient of another task is negative, the component along that gradient is removed.

    Args:
        gram: float64 [T, T], the inner products of the task gradients. If one of them is not finite, no gradient is
            projected. The weighted sum is not finite either then; check it before the update.
        generator: for the T orders, each a `torch.randperm(T)`; torch's default generator when left out.
        reduction: "sum" of the projected gradients, as in the paper, or their "mean".

    Returns:
        float64 [T], on gram's device.

    Raises:
        ValueError, TypeError: gram is no square matrix, or an unknown reduction.
    """
    if not isinstance(gram, Tensor):
        raise TypeError(f"pcgrad_weights: gram must be a tensor, got {type(gram).__name__}")
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"pcgrad_weights: gram must be [T, T], got {list(gram.shape)}")
    if reduction not in ("sum", "mean"):
        raise ValueError(f"pcgrad_weights: reduction must be 'sum' or 'mean', got {reduction!r}")
    orders = random_orders(gram, generator)
    return kernels.surgery_weights(gram.double(), orders=orders, reduction=reduction)[0]


@dataclass(frozen=True)
class Surgery:
    """How the tasks' gradients become one update."""

    name: str
    projects: bool = False  # whether the weights are PCGrad's
    weighting: BuiltInWeighting | UserWeighting | None = None
    reduction: str = "sum"  # of the (projected) gradients: "sum" or "mean"; with a weighting, its plain weights'
    per_task: bool = True  # whether it needs the tasks' gradients apart; if not, T is 1 whatever the tasks

    @property
    def needs_losses(self) -> bool:
        """Whether `weights` has to be given the losses of the tasks."""
        return self.weighting is not None and self.weighting.needs_losses

    @property
    def is_plain(self) -> bool:
        """Whether the weights are constant: those of the sum or the mean."""
        return not self.projects and self.weighting is None

    def prepare(self, tasks: int, device: torch.device, parts: int | None = None) -> None:
        """Make the state for a run with so many task gradients; needed once before `weights`.

        Args:
            parts: of the model, where each has weights of its own.

        Raises:
            UserError: they are too many for the surgery.
        """
        if self.weighting is not None:
            self.weighting.prepare(tasks, device, parts)

    def remark(self, steps: int) -> str | None:
        """Why it does nothing in a run of so many steps; None where it does."""
        return self.weighting.rule.remark(steps) if isinstance(self.weighting, BuiltInWeighting) else None

    def weights(
        self,
        gram: Tensor,
        generator: torch.Generator,
        own_square: Tensor,
        max_norm: float,
        agree: Callable[[Tensor], Tensor] = lambda weights: weights,
        losses: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Clipped weights [T] or [G, T], and what else `kernels.surgery_weights` says of them.

        Waits for no device, except to call a weighting of the user's. The state of a weighting goes on only where the
        update is not skipped.

        Args:
            gram: float64 [T, T], or [G, T, T] of G parts of the model, each of which has random numbers of its own.
            generator: what random numbers follow.
            own_square, max_norm: as for `kernels.surgery_weights`.
            agree: gives all processes one's weights; only a user's weighting could give each process others.
            losses: float64 [T], where `needs_losses`.
        """
        orders = random_orders(gram, generator) if self.projects else None
        weights = None
        if self.weighting is not None:
            seen = gram + (own_square - own_square)  # not finite where the update is skipped for the other gradients
            weights = self.weighting(seen, generator, losses)
            weights = agree(weights) if isinstance(self.weighting, UserWeighting) else weights
        return kernels.surgery_weights(
            gram, orders=orders, weights=weights, reduction=self.reduction, own_square=own_square, max_norm=max_norm
        )


_SUM, _MEAN = Surgery("sum", per_task=False), Surgery("mean", reduction="mean")
_PCGRAD = {reduction: Surgery("pcgrad", projects=True, reduction=reduction) for reduction in ("sum", "mean")}
NAMES = ("sum", "mean", "pcgrad", "gse")


def names_code(name: str) -> bool:
    """Whether a surgery is a MODULE:NAME, which is imported and called."""
    return ":" in name


def with_options(name: str, options: Mapping[str, str]) -> str:
    """The name of a surgery with further options: cagrad and {"c": "0.5"} are cagrad(c=0.5).

    Args:
        options: by their names, Python's literals or texts; they replace those in `name`. A name that cannot be parsed
            is left as it is: `check_surgery` refuses it.
    """
    function, _, rest = name.partition("(")
    try:
        call = ast.parse(f"f({rest or ')'}", mode="eval").body
        assert isinstance(call, ast.Call)
        keywords = {str(keyword.arg): ast.unparse(keyword.value) for keyword in call.keywords}
    except (AssertionError, SyntaxError, ValueError, MemoryError, RecursionError):
        return name
    keywords |= {key.replace("-", "_"): repr(_literal(value)) for key, value in options.items()}
    arguments = [*map(ast.unparse, call.args), *(f"{key}={value}" for key, value in keywords.items())]
    return f"{function}({', '.join(arguments)})"


def _literal(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return text


def check_surgery(name: str) -> str:
    """Check the name of a surgery, or the form of a MODULE:NAME. Imports nothing.

    Returns:
        the name in the form that config.yaml has: a rule with all of its options, such as cagrad(c=0.4); any other name
        as it is.

    Raises:
        UserError: an unknown name or option, or another form.
    """
    rule, bracket, _ = name.partition("(")
    if rule in WEIGHTINGS:
        return str(weighting_from(name))
    if names_code(name):
        check_reference(name)
    elif name not in NAMES:
        if rule in NAMES and bracket:
            raise UserError(f"--surgery {name}: {rule} has no options; give --surgery {rule}")
        known = [*NAMES, *WEIGHTINGS]
        raise UserError(
            f"--surgery {name}: unknown{did_you_mean(rule, known)}; expected {', '.join(known)}, or MODULE:NAME of a"
            " callable from Gram matrix to weights"
        )
    return name


def needs_task_gradients(name: str) -> bool:
    """Whether a surgery needs the tasks' gradients apart, and so a batch of every task in each step."""
    return name not in ("sum", "mean")


def find_surgery(name: str, reduction: str = "sum") -> list[Surgery]:
    """The updates of one step: one for most surgeries, two for "gse". Imports the module of a MODULE:NAME.

    GSE (paper 004) updates with the mean of PCGrad's gradients, and at once again with the gradient of the tasks'
    summed loss at the new parameters.

    Args:
        name: "sum", "mean", "pcgrad", "gse", a rule of `WEIGHTINGS` with its options, or "MODULE:NAME": a callable from
            Gram matrix to weights, or a class of such, as TorchJD's weightings are; "MODULE:NAME(0.4, norm_eps=1e-4)"
            calls it first, with Python's literals. Such a name is code: pass none on from a file that is not trusted.
        reduction: of "pcgrad".

    Raises:
        UserError: an unknown name, nothing callable there, or one whose state cannot be saved.
    """
    name = check_surgery(name)
    known = {"sum": [_SUM], "mean": [_MEAN], "pcgrad": [_PCGRAD[reduction]], "gse": [_PCGRAD["mean"], _SUM]}
    if name in known:
        return known[name]
    if names_code(name):
        return [Surgery(name, weighting=UserWeighting(name))]
    rule = weighting_from(name)
    return [Surgery(name, weighting=BuiltInWeighting(rule), reduction=rule.reduction)]


@dataclass(frozen=True)
class Conflicts:
    """How task gradients disagree (two of Yu et al.'s tragic triad), and what a surgery did about it."""

    cosine: Tensor  # float64 [T, T]; NaN where a gradient is 0 or not finite
    magnitude_similarity: Tensor  # float64 [T, T]: 2 |a| |b| / (|a|^2 + |b|^2), 1 for equal norms
    projected_share: float  # |weighted sum - the surgery's own plain sum or mean| / |that plain sum or mean|

    @classmethod
    def of(cls, gram: Tensor, projected_share: float) -> Conflicts:
        """From a Gram matrix [T, T], and what `kernels.surgery_weights` says that surgery projected."""
        gram = gram.double().cpu()
        squares = gram.diagonal()
        norms = squares.sqrt()
        return cls(
            gram / torch.outer(norms, norms),
            2 * torch.outer(norms, norms) / (squares[:, None] + squares[None, :]),
            projected_share,
        )
