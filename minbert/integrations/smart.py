"""SMART's regulariser for any network, in the call shape of archinetai/smart-pytorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minbert.integrations.running_statistics import frozen_running_statistics
from minbert.kernels import checks, smart_ascend, smart_init

Loss = Callable[[Tensor, Tensor], Tensor]  # the perturbed state and the clean one -> a scalar


def inf_norm(x: Tensor) -> Tensor:
    """The largest magnitude of each token: [..., D] -> [..., 1]."""
    return x.abs().amax(-1, keepdim=True)


def l2_norm(x: Tensor) -> Tensor:
    """The Euclidean norm of each token: [..., D] -> [..., 1]."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


class SMARTLoss(nn.Module):
    """The loss between outputs with and without an adversarial perturbation (Jiang et al. 2019, algorithm 1).

        smart = SMARTLoss(lambda embed: head(encoder(embed)), sym_kl_loss, epsilon=0.05, noise_var=1e-4, step_size=0.05)
        loss = task_loss + weight * smart(embed, logits)  # logits = head(encoder(embed))

    The perturbation starts from normal noise and ascends `loss_fn` for `num_steps` steps. The result is the loss
    between the perturbed and the clean output; its gradient flows through both and through `embed`. The ascent
    accumulates no gradient in any parameter, unless an autograd function inside runs another backward. Dropout inside
    `eval_fn` adds to the loss, unless its masks are those of the clean pass; the passes draw from torch's generator.

    Batch normalisation in training normalises a perturbed batch by its own statistics, but does not update the running
    ones: this holds for torch's BatchNorm, SyncBatchNorm and InstanceNorm modules, minbert's BatchNorm, and the vectors
    of spectral_norm. Running statistics are updated by other modules, by direct calls of
    torch.nn.functional.batch_norm, inside a function compiled by torch.compile or torch.jit (a compiled module is
    fine), and when torch.utils.checkpoint runs a pass again.

    The arguments and defaults are smart-pytorch's. Unlike there, with projection="ball" a gradient is scaled to norm 1
    before `step_size` multiplies it, as in the paper; the perturbation is projected onto the ball of radius `epsilon`,
    where smart-pytorch rescales it to norm 1 whatever its length and only adds `epsilon` to a denominator; `noise_var`
    is a variance, not a standard deviation; and it works under torch.no_grad(), for measuring. A ball of the default
    radius, 1e-6, is too small to move any output of BERT, whose embeddings have a root mean square of about 0.5: choose
    1e-2 to 1e-1 there, and a `step_size` of the same order. With projection="unit" it behaves like smart-pytorch: the
    gradient is not scaled, the perturbation has norm 1 after every step, and `epsilon` has no effect.

    Args:
        eval_fn: embeddings, shaped like `embed` -> the state (logits or scores), a float tensor.
        loss_fn: (perturbed state, clean state) -> a scalar, which the ascent increases.
        loss_last_fn: the loss that is returned; `loss_fn` when left out.
        norm_fn: `inf_norm` or `l2_norm`, or another function that computes the same.
        num_steps: 0 or more; with 0 the perturbation is the noise.
        step_size, epsilon, noise_var: as above, 0 or more.
        projection: "ball" or "unit".
        per: "token" or "sequence", whose elements a norm is taken over.
        generator: for the noise, on the embeddings' device; torch's default generator when left out.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """

    def __init__(
        self,
        eval_fn: Callable[[Tensor], Tensor],
        loss_fn: Loss,
        loss_last_fn: Loss | None = None,
        norm_fn: Callable[[Tensor], Tensor] = inf_norm,
        num_steps: int = 1,
        step_size: float = 1e-3,
        epsilon: float = 1e-6,
        noise_var: float = 1e-5,
        *,
        projection: str = "ball",
        per: str = "token",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, function in (("eval_fn", eval_fn), ("loss_fn", loss_fn), ("norm_fn", norm_fn)):
            if not callable(function):
                raise TypeError(f"SMARTLoss: {name} must be a function, got {type(function).__name__}")
        if not isinstance(num_steps, int) or num_steps < 0:
            raise ValueError(f"SMARTLoss: num_steps must be a whole number, 0 or more, got {num_steps}")
        for name, value in (("step_size", step_size), ("epsilon", epsilon), ("noise_var", noise_var)):
            checks.number("SMARTLoss", name, value)
        if not isinstance(generator, torch.Generator | None):
            raise TypeError(f"SMARTLoss: generator must be a torch.Generator or None, got {type(generator).__name__}")
        checks.choice("SMARTLoss", "projection", projection, ("ball", "unit"))
        checks.choice("SMARTLoss", "per", per, ("token", "sequence"))
        self.eval_fn, self.loss_fn = eval_fn, loss_fn
        self.loss_last_fn = loss_fn if loss_last_fn is None else loss_last_fn
        self.num_steps, self.step_size, self.epsilon, self.noise_var = num_steps, step_size, epsilon, noise_var
        self.norm, self.projection, self.per, self.generator = _norm_of(norm_fn), projection, per, generator

    def forward(
        self, embed: Tensor, state: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """The regulariser at `embed`.

        Args:
            embed: float [batch, tokens, D] padded, or [N, D] packed.
            state: `eval_fn(embed)`, with its graph.
            mask: [batch, tokens], true or 1 at real tokens and false or 0 at padding, which is not perturbed, as
                transformers' tokenizers return it. Without it, every token is. The inverse, torch.nn.Transformer's
                key_padding_mask, looks the same and would perturb the padding alone: give its `~`.
            cu_seqlens: int32 [S + 1], the packed sequences' bounds; needed for [N, D] with per="sequence" only.

        Returns:
            what `loss_last_fn` returns.

        Raises:
            ValueError, TypeError: an argument is not as described, or `eval_fn`'s output does not depend on its input.
        """
        if not isinstance(state, Tensor):
            raise TypeError(f"SMARTLoss: state must be a tensor, eval_fn(embed), got {type(state).__name__}")
        real = _real_tokens(embed, mask)
        bounds = self._bounds(real, cu_seqlens)
        clean = embed.detach()
        x = clean[real]  # [N, D]
        seed = torch.randint(2**63 - 1, (), device=embed.device, generator=self.generator)
        perturbed = smart_init(x, sigma=self.noise_var**0.5, seed=seed, stream_id=0)
        with frozen_running_statistics(self.eval_fn):
            for _ in range(self.num_steps):
                gradient = self._gradient(clean + _padded(perturbed - x, real), state.detach())[real]
                perturbed = self._ascend(perturbed, x, gradient, bounds)
            perturbed_state = self.eval_fn(embed + _padded(perturbed - x, real))
        return self.loss_last_fn(perturbed_state, state)

    def _gradient(self, perturbed: Tensor, state: Tensor) -> Tensor:
        """The gradient of `loss_fn` with respect to the perturbed embeddings alone."""
        with torch.enable_grad():
            loss = self.loss_fn(self.eval_fn(perturbed.requires_grad_()), state)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"SMARTLoss: loss_fn must return a scalar tensor, got {got}; take the loss's mean or sum")
        gradient = torch.autograd.grad(loss, perturbed, allow_unused=True)[0] if loss.requires_grad else None
        if gradient is None:
            raise ValueError(
                "SMARTLoss: eval_fn's output must depend on the embeddings that it is given; got one that does not; "
                "compute it from eval_fn's argument, and outside torch.no_grad()"
            )
        return gradient

    def _ascend(self, perturbed: Tensor, x: Tensor, gradient: Tensor, bounds: Tensor) -> Tensor:
        """One step of projected gradient ascent, on the ball or, like smart-pytorch, on the unit sphere."""
        if self.projection == "ball":
            eta, epsilon = self.step_size, self.epsilon
        else:
            perturbed, eta, epsilon = perturbed + self.step_size * gradient, 0.0, 1.0
        geometry: dict[str, Any] = {"norm": self.norm, "per": self.per, "projection": self.projection}
        return smart_ascend(perturbed, x, gradient, bounds, eta=eta, epsilon=epsilon, **geometry)

    def _bounds(self, real: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """The sequences' bounds among the real tokens, int32; with per="token", those of one sequence."""
        if cu_seqlens is not None:
            if real.ndim != 1:
                raise ValueError("SMARTLoss: cu_seqlens is for packed embeddings [N, D]; give padded ones a mask")
            return cu_seqlens
        if self.per == "token":
            lengths = real.sum().view(1)
        elif real.ndim == 1:
            raise ValueError(
                "SMARTLoss: per='sequence' needs cu_seqlens, int32 [S + 1], for packed embeddings [N, D]; got None"
            )
        else:
            lengths = real.sum(1)
        return F.pad(lengths[lengths > 0].cumsum(0), (1, 0)).int()


def _norm_of(norm_fn: Callable[[Tensor], Tensor]) -> str:
    """The kernels' name of the norm that a function computes, found by calling it."""
    got = norm_fn(torch.tensor([[3.0, -4.0], [1.0, 0.0]]))
    for name, lengths in (("inf", [[4.0], [1.0]]), ("2", [[5.0], [1.0]])):
        if isinstance(got, Tensor) and got.shape == (2, 1) and torch.allclose(got.float(), torch.tensor(lengths)):
            return name
    raise ValueError(
        "SMARTLoss: norm_fn must compute the infinity or the Euclidean norm over the last dimension and keep it, of "
        f"[[3, -4], [1, 0]] either [[4], [1]] or [[5], [1]]; got {got.tolist() if isinstance(got, Tensor) else got}; "
        "use inf_norm or l2_norm"
    )


def _real_tokens(embed: Tensor, mask: Tensor | None) -> Tensor:
    """Which tokens may be perturbed: bool, shaped like the embeddings without their last dimension."""
    if not isinstance(embed, Tensor) or not embed.is_floating_point() or embed.ndim not in (2, 3):
        got = f"{embed.dtype} {list(embed.shape)}" if isinstance(embed, Tensor) else type(embed).__name__
        raise ValueError(
            f"SMARTLoss: embed must be a float tensor [batch, tokens, D] or [N, D], got {got}; give the embeddings of "
            "the tokens, not their ids"
        )
    if mask is None:
        return torch.ones(embed.shape[:-1], dtype=torch.bool, device=embed.device)
    if not isinstance(mask, Tensor):
        raise TypeError(f"SMARTLoss: mask must be a tensor [batch, tokens], got {type(mask).__name__}")
    if embed.ndim == 2 or mask.shape != embed.shape[:-1]:
        raise ValueError(
            f"SMARTLoss: mask must be [batch, tokens] like embeddings [batch, tokens, D], got {list(mask.shape)} for "
            f"{list(embed.shape)}; packed embeddings need none"
        )
    if not ((mask == 0) | (mask == 1)).all():
        low, high = (value.item() + 0 for value in mask.aminmax())  # + 0 makes 0 of -0
        raise ValueError(
            f"SMARTLoss: mask must be 1 at real tokens and 0 at padding, got values from {low:g} to {high:g}; give the"
            " attention_mask that the tokenizer returns, not one to add to scores"
        )
    if not mask.any():
        raise ValueError("SMARTLoss: mask must hold a real token, got none; leave such a batch out")
    return mask.bool()


def _padded(packed: Tensor, real: Tensor) -> Tensor:
    """Packed vectors [N, D] as [..., D], zeros at padding."""
    return packed.new_zeros(*real.shape, packed.shape[-1]).index_put_((real,), packed)
