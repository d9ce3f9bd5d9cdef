"""The objective of a training step: task losses, SMART's regularisers and the divergences from the EMA teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minbert.data.packing import Packed
from minbert.methods.losses import LOSSES
from minbert.methods.rdrop import RDropConfig
from minbert.methods.smart import (
    MEASURES,
    BregmanConfig,
    SmartConfig,
    divergences,
    perturb,
    perturbation_scale,
    placed,
)
from minbert.methods.task_gradients import substituted
from minbert.model import MultitaskModel, statistics_kept
from minbert.training.batches import Batch, SmartPart

Forward = Callable[..., dict[str, Tensor]]  # from the embedding block's output and a seed to outputs by task


@dataclass(frozen=True)
class Losses:
    """By task, scalars that a backward can start from; only the task losses when nothing else is on."""

    task: dict[str, Tensor]
    smart: dict[str, Tensor]  # R_s, not weighted
    rdrop: dict[str, Tensor]  # the divergence of two passes, not weighted
    bregman: dict[str, Tensor]  # D, not weighted
    total: Tensor  # of all tasks, weighted, with L2 norms
    smart_term: Tensor  # SMART's part of it
    perturbation: Tensor | None = None  # mean over tokens of the perturbation's infinity norm: this rank's part of it

    def map(self, function: Callable[[Tensor], Tensor]) -> Losses:
        """The same with every tensor replaced."""
        task, smart, rdrop, bregman = (
            {name: function(loss) for name, loss in of.items()}
            for of in (self.task, self.smart, self.rdrop, self.bregman)
        )
        size = None if self.perturbation is None else function(self.perturbation)
        return Losses(task, smart, rdrop, bregman, function(self.total), function(self.smart_term), size)


class Objective:
    """The losses of a batch under a model.

    Args:
        model: what is trained.
        smart, bregman, rdrop: what is added to the task losses. FreeLB is `minbert.training.freelb`'s.
        teacher: by parameter, its exponential moving average; needed when `bregman` is on.
        copies: of some parameters, in a half precision, for passes that differentiate nothing with respect to them.
        weights: what each task's loss is multiplied by (its regularisers are not); 1 where left out.
        l2: by task, the weight of its parameters' L2 norm in its loss; none for those left out.
        loss_options: by task, further arguments of its loss (`minbert.training.loss_options`).

    Attributes:
        share: what the caller multiplies `Losses.total` by before its backward: 1 unless set.
    """

    def __init__(
        self,
        model: MultitaskModel,
        smart: SmartConfig,
        bregman: BregmanConfig,
        teacher: Mapping[Tensor, Tensor] | None = None,
        copies: Mapping[Tensor, Tensor] | None = None,
        weights: Mapping[str, float] | None = None,
        l2: Mapping[str, float] | None = None,
        loss_options: Mapping[str, Mapping[str, Any]] | None = None,
        rdrop: RDropConfig | None = None,
    ) -> None:
        self.model, self.smart, self.bregman, self.teacher = model, smart, bregman, teacher
        self.copies, self.weights, self.l2 = copies or {}, weights or {}, l2 or {}
        self.loss_options, self.rdrop = loss_options or {}, rdrop or RDropConfig()
        self.share = 1.0

    def __call__(
        self,
        batch: Batch,
        tracked: Callable[[], AbstractContextManager[None]] = nullcontext,
        *,
        on_phase: Callable[[str], None] = lambda name: None,
    ) -> Losses:
        """The losses of a batch. The clean pass serves the task losses and the regularisers alike.

        Running statistics take the clean pass alone: evaluation meets no perturbed inputs, and a teacher's activations
        are not the model's.

        Args:
            tracked: gives a context in which a forward reads the parameters that the losses are differentiated by.
            on_phase: called at the end of each phase, "forward", "smart" and so on, with its name.
        """
        model, packed, tasks = self.model, batch.packed, {name: self.model.tasks[name] for name in batch.counts}
        dropout_seed = batch.seeds[0]
        forward: Forward = partial(model.from_embedded, packed=packed, counts=batch.counts, **batch.of_all_ranks)
        with tracked():
            embedded = model.embed(packed, dropout_seed)
            outputs = forward(embedded, seed=dropout_seed)
            norms = self._norms(batch)
        task = self._task_losses(batch, outputs)
        smart, rdrop, bregman, sizes = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor](), list[Tensor]()
        smart_terms, size = [batch.smart_weights.new_zeros(())], None
        on_phase("forward")
        for part in batch.rdrop_parts:
            second_seed, counts = part.seed_of(batch.seeds[1]), {name: batch.counts[name] for name in part.tasks}
            with statistics_kept(model), tracked():
                again = model.embed(part.packed, second_seed)
                second = forward(again, packed=part.packed, counts=counts, seed=second_seed)
            second = {name: output for name, output in second.items() if self.rdrop.applies_to(name)}
            rdrop |= divergences(tasks, second, outputs)
            task |= {name: (task[name] + loss) / 2 for name, loss in self._task_losses(batch, second).items()}
        if batch.rdrop_parts:
            on_phase("rdrop")
        terms = [*(self.weights.get(name, 1.0) * loss for name, loss in task.items()), *norms]
        terms += [self.rdrop.weight(name) / 4 * value for name, value in rdrop.items()]
        for part in batch.smart_parts:  # of the tasks that have the regulariser
            seeds = [part.seed_of(seed) for seed in batch.seeds]
            seed = seeds[0] if self.smart.masks == "shared" else seeds[1]
            counts = {name: batch.counts[name] for name in part.tasks}
            forward_part: Forward = partial(forward, packed=part.packed, counts=counts, seed=seed)
            clean, clean_outputs = part.rows_of(embedded), {name: outputs[name] for name in part.tasks}
            of_part = {name: tasks[name] for name in part.tasks}
            scale, affine = perturbation_scale(model, self.smart), self._affine(part, seeds[0])
            with statistics_kept(model), substituted(model, lambda param: self.copies.get(param, param).detach()):
                given = clean, clean_outputs, of_part, part.packed.cu_seqlens, self.smart
                point = perturb(forward_part, *given, noise_seed=seeds[2], scale=scale, affine=affine)
            with statistics_kept(model), tracked():
                perturbed = placed(clean, point, affine)
                perturbed_outputs = forward_part(perturbed)
            smart |= divergences(of_part, perturbed_outputs, clean_outputs, MEASURES[self.smart.objective])
            sizes.append(largest_elements(perturbed, clean))
        if batch.smart_parts:
            weights = dict(zip(tasks, batch.smart_weights, strict=True))
            smart_terms = [weights[name] * value for name, value in smart.items()]
            size = mean_over_tokens(sizes, batch)
            on_phase("smart")
        if self.bregman.mu:
            bregman = divergences(tasks, outputs, self._teacher_outputs(forward, packed, dropout_seed))
            terms += [self.bregman.mu * value for value in bregman.values()]
            on_phase("bregman")
        added = torch.stack(smart_terms).sum()
        return Losses(task, smart, rdrop, bregman, torch.stack(terms).sum() + added, added.detach(), size)

    def _task_losses(self, batch: Batch, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The loss of each task that has outputs."""
        options, tasks = self.loss_options, {name: self.model.tasks[name] for name in outputs}
        return {
            name: LOSSES[of.loss](outputs[name], batch.labels[name], of.max_label, **options.get(name, {}))
            for name, of in tasks.items()
        }

    def _affine(self, part: SmartPart, seed: Tensor) -> Callable[[Tensor], Tensor] | None:
        """`Embeddings.affine` of a part's rows, whose dropout has this seed; None where embeddings move after it."""
        embeddings = self.model.encoder.embeddings
        return partial(embeddings.affine, packed=part.packed, seed=seed) if self.smart.normalized else None

    @torch.no_grad()
    def _teacher_outputs(self, forward: Forward, packed: Packed, seed: Tensor) -> dict[str, Tensor]:
        teacher = self.teacher or {}
        with substituted(self.model, lambda param: teacher.get(param, param)), statistics_kept(self.model):
            return forward(self.model.embed(packed, seed), seed=seed)

    def _norms(self, batch: Batch) -> list[Tensor]:
        """lambda |theta|_2 of the tasks that have one (003, section 3: the norm itself, not its square).

        Theta are the parameters that a task trains, biases among them: the encoder's, a shared layer's, its head's.
        """
        views = {}
        if any(self.l2.values()):
            views = self.model.views(batch.counts, batch.sequence_bounds, batch.packed.padding)
        norms = []
        for name, view in views.items():
            if weight := self.l2.get(name, 0.0):
                params = self.model.parameters_of(name, view)
                sizes = [torch.linalg.vector_norm(param, dtype=_at_least_float32(param)) for param in params]
                norms.append(weight * torch.linalg.vector_norm(torch.stack(sizes)))
        return norms


def largest_elements(perturbed: Tensor, clean: Tensor) -> Tensor:
    """The infinity norms of a perturbation's tokens, added up."""
    return (perturbed.detach() - clean.detach()).abs().amax(1).float().sum()


def mean_over_tokens(sums: Sequence[Tensor], batch: Batch) -> Tensor:
    """Sums over the tokens of SMART's parts as this rank's part of the mean."""
    tokens = sum(len(part.packed.token_ids) for part in batch.smart_parts)
    return torch.stack(list(sums)).sum() / (batch.shard.tokens if batch.shard else tokens)


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
