"""FreeLB (Zhu et al. 2020): the mean of a task's loss over the passes of a search takes the place of its loss."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minbert.methods.smart import ascended, divergences, origin, perturbation_scale, placed
from minbert.model import statistics_kept
from minbert.training.batches import Batch
from minbert.training.objective import Forward, Losses, Objective, largest_elements, mean_over_tokens


class FreeLB(Objective):
    """The losses of a batch whose tasks, or some of them, have FreeLB.

    With L_t the loss of a task when its embeddings are moved by r_t (algorithm 1 of the paper, X + delta_t):

        (1 - lambda_s) L_0 + lambda_s / K (L_0 + ... + L_(K-1)),    r_0 = 0,
        r_t the projection of r_(t-1) + eta g_(t-1) / |g_(t-1)| to the ball of radius epsilon, g_t the gradient of L_t.

    lambda_s = 1 is the paper's. Each pass has a forward and a backward, which adds to the gradients of the parameters
    and gives g_t: K passes cost K plain ones, and the graph of one is in memory at a time. A task without FreeLB goes
    through the first pass alone. The paper starts from uniform noise; here the first pass is the clean one, as in the
    released code without it, so that Bregman's divergence and running statistics are of clean inputs. `Losses.smart`
    has what the search adds to each task's loss: the mean of L_t - L_0. The first gradient is that of all that the
    clean pass is trained by, Bregman's divergence included.
    """

    def __call__(
        self,
        batch: Batch,
        tracked: Callable[[], AbstractContextManager[None]] = nullcontext,
        *,
        on_phase: Callable[[str], None] = lambda name: None,
    ) -> Losses:
        """As `Objective.__call__`. The backwards of all passes but the last have run when it returns."""
        if not batch.smart_parts:  # in low memory, a stream of other tasks
            return super().__call__(batch, tracked, on_phase=on_phase)
        model, packed, smart, seed = self.model, batch.packed, self.smart, batch.seeds[0]
        forward: Forward = partial(model.from_embedded, packed=packed, counts=batch.counts, **batch.of_all_ranks)
        passes, scale = smart.steps + 1, perturbation_scale(model, smart)
        with tracked():
            embedded = model.embed(packed, seed)
            first = embedded.detach().requires_grad_()
            outputs = forward(first, seed=seed)
            norms = self._norms(batch)
        task = self._task_losses(batch, outputs)
        on_phase("forward")
        bregman = dict[str, Tensor]()
        if self.bregman.mu:
            bregman = divergences(model.tasks, outputs, self._teacher_outputs(forward, packed, seed))
            on_phase("bregman")
        lambdas = dict(zip(task, batch.smart_weights, strict=True))
        weighted = {name: self.weights.get(name, 1.0) * loss for name, loss in task.items()}
        kept = [loss - lambdas[name] * loss * (1 - 1 / passes) for name, loss in weighted.items()]
        total = torch.stack([*kept, *norms, *(self.bregman.mu * value for value in bregman.values())]).sum()
        (total * self.share).backward()
        total, carried, sizes = total.detach(), _gradient(first), list[Tensor]()
        rises: dict[str, Tensor] = {}

        runs = [(part, step) for part in batch.smart_parts for step in range(1, passes)]
        for number, (part, step) in enumerate(runs):
            seeds = [part.seed_of(each) for each in batch.seeds]
            pass_seed, affine = seeds[0] if smart.masks == "shared" else seeds[1], self._affine(part, seeds[0])
            counts = {name: batch.counts[name] for name in part.tasks}
            clean, is_last = part.rows_of(embedded), number == len(runs) - 1
            if step == 1:
                x = point = origin(clean, affine)
                gradient = part.rows_of(carried).clone()
            with torch.no_grad():
                gradient = gradient if affine is None else affine(gradient)
            point = ascended(point, x, gradient, part.packed.cu_seqlens, smart, scale, smart.epsilon)
            leaf = clean if is_last else clean.detach().requires_grad_()
            with statistics_kept(model), tracked():
                perturbed = placed(leaf, point, affine)
                losses = self._task_losses(batch, forward(perturbed, packed=part.packed, counts=counts, seed=pass_seed))
            weighted = {name: self.weights.get(name, 1.0) * loss for name, loss in losses.items()}
            term = torch.stack([lambdas[name] * loss / passes for name, loss in weighted.items()]).sum()
            for name, loss in losses.items():
                rises[name] = rises.get(name, 0.0) + (loss - task[name]).detach() / passes
            if not is_last:
                (term * self.share).backward()
                gradient = _gradient(leaf)
                part.rows_of(carried).add_(gradient)
                total = total + term.detach()
            if step == passes - 1:
                sizes.append(largest_elements(perturbed, clean))
        if embedded.requires_grad:
            embedded.register_hook(lambda gradient: gradient + carried)
        on_phase("smart")
        added = torch.stack([lambdas[name] * self.weights.get(name, 1.0) * rise for name, rise in rises.items()]).sum()
        losses_of = {name: loss.detach() for name, loss in task.items()}
        return Losses(losses_of, rises, {}, bregman, total + term, added, mean_over_tokens(sizes, batch))


def _gradient(leaf: Tensor) -> Any:
    """What a backward has left in `.grad`: zeros where no loss reached it."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
