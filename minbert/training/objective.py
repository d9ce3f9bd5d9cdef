"""What a training step minimises: task losses, SMART's regularisers, and the divergences from the Bregman teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from minbert.data.packing import Packed
from minbert.methods.losses import LOSSES
from minbert.methods.smart import BregmanConfig, SmartConfig, at, divergences, perturb
from minbert.methods.task_gradients import detached, substituted
from minbert.model import MultitaskModel, statistics_kept
from minbert.seeds import derive_seed


@dataclass(frozen=True)
class Batch:
    """Sequences of one or several tasks, task after task in one stream, and what else differs from step to step."""

    packed: Packed
    labels: Mapping[str, Tensor]  # by task, in the stream's order
    # Of dropout, of dropout in perturbed passes with masks of their own, of the noise; each with the number of the
    # stream's first row here. int64 [3, 2].
    seeds: Tensor
    smart_weights: Tensor  # float32 [tasks]: lambda_s of each

    @property
    def counts(self) -> dict[str, int]:
        """Each task's number of examples."""
        return {name: len(labels) for name, labels in self.labels.items()}

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, in an order that `with_tensors` knows."""
        return [*self.packed.tensors, *self.labels.values(), self.seeds, self.smart_weights]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Batch:
        """The same batch in other memory, on another device for one."""
        *rest, seeds, smart_weights = tensors
        cut = len(rest) - len(self.labels)
        labels = dict(zip(self.labels, rest[cut:], strict=True))
        return Batch(self.packed.with_tensors(rest[:cut]), labels, seeds, smart_weights)


@dataclass(frozen=True)
class Losses:
    """By task, scalars that a backward can start from; only the task losses when nothing else is on."""

    task: dict[str, Tensor]
    smart: dict[str, Tensor]  # R_s, not weighted
    bregman: dict[str, Tensor]  # D, not weighted
    total: Tensor  # of all tasks, weighted, with L2 norms
    smart_term: Tensor  # SMART's part of it
    perturbation: Tensor | None = None  # mean over tokens of the perturbation's infinity norm: this rank's part of it

    def map(self, function: Callable[[Tensor], Tensor]) -> Losses:
        """The same with every tensor replaced."""
        task, smart, bregman = (
            {name: function(loss) for name, loss in of.items()} for of in (self.task, self.smart, self.bregman)
        )
        size = None if self.perturbation is None else function(self.perturbation)
        return Losses(task, smart, bregman, function(self.total), function(self.smart_term), size)


class Objective:
    """The losses of a batch under a model.

    Args:
        model: what is trained.
        smart, bregman: what is added to the task losses.
        teacher: the average of each parameter's earlier values; needed when `bregman` is on.
        copies: of some parameters, in a half precision, for passes that differentiate nothing with respect to them.
        weights: what each task's loss is multiplied by (its regularisers are not); 1 where left out.
        l2: by task, the weight of its parameters' L2 norm in its loss; none for those left out.
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
    ) -> None:
        self.model, self.smart, self.bregman, self.teacher = model, smart, bregman, teacher
        self.copies, self.weights, self.l2 = copies or {}, weights or {}, l2 or {}

    def batch(self, packed: Packed, labels: Mapping[str, Tensor], *, seed: int, done: float = 1.0) -> Batch:
        """A batch of the CPU's tensors.

        Args:
            seed: what dropout and noise follow.
            done: share of all steps that are done.
        """
        first = packed.share.first_token if packed.share else 0
        seeds = [(derive_seed(seed, name), first) for name in ("dropout", "smart dropout", "smart noise")]
        weights = [self.smart.weight(name, done) for name in labels]
        return Batch(packed, labels, torch.tensor(seeds), torch.tensor(weights, dtype=torch.float32))

    def __call__(
        self,
        batch: Batch,
        tracked: Callable[[], AbstractContextManager[None]],
        *,
        on_phase: Callable[[str], None] = lambda name: None,
    ) -> Losses:
        """Losses of one batch; the clean pass serves the task losses and the regularisers alike.

        It is also the only one whose batches enter running statistics: perturbed inputs are none that evaluation meets,
        and a teacher's activations are not the model's.

        Args:
            tracked: gives a context in which a forward's parameters are those to differentiate with respect to.
            on_phase: called at the end of each phase, "forward" and "smart", with its name.
        """
        model, counts = self.model, batch.counts
        dropout_seed, other_seed, noise_seed = batch.seeds
        with tracked():
            embedded = model.embed(batch.packed, dropout_seed)
            outputs = model.from_embedded(embedded, batch.packed, counts, seed=dropout_seed)
            norms = self._norms(batch)
        tasks = {name: model.tasks[name] for name in outputs}
        task = {name: LOSSES[of.loss](outputs[name], batch.labels[name], of.max_label) for name, of in tasks.items()}
        terms = [*(self.weights.get(name, 1.0) * loss for name, loss in task.items()), *norms]
        smart, smart_terms, bregman, size = {}, [batch.smart_weights.new_zeros(())], {}, None
        on_phase("forward")
        if self.smart.on:
            adversary = dropout_seed if self.smart.masks == "shared" else other_seed
            with statistics_kept(model):
                perturbed = perturb(
                    model,
                    embedded,
                    batch.packed,
                    outputs,
                    self.smart,
                    dropout_seed=adversary,
                    noise_seed=noise_seed,
                    read=lambda param: detached(self.copies.get(param, param)),
                )
                with tracked():
                    moved = model.from_embedded(at(embedded, perturbed), batch.packed, counts, seed=adversary)
            sizes = (perturbed - embedded.detach()).abs().amax(1).float()
            size = sizes.sum() / (batch.packed.share.tokens if batch.packed.share else len(sizes))
            smart = divergences(tasks, moved, outputs)
            smart_terms = [weight * smart[name] for name, weight in zip(counts, batch.smart_weights, strict=True)]
            on_phase("smart")
        if self.bregman.mu:
            bregman = divergences(tasks, outputs, self._by_teacher(batch, dropout_seed))
            terms += [self.bregman.mu * value for value in bregman.values()]
            on_phase("bregman")
        added = torch.stack(smart_terms).sum()
        return Losses(task, smart, bregman, torch.stack(terms).sum() + added, added.detach(), size)

    def _norms(self, batch: Batch) -> list[Tensor]:
        """lambda |theta|_2 of the tasks that have one (003, section 3: the norm itself, not its square).

        Theta are the parameters that a task trains, biases among them: the encoder's, a shared layer's, its head's.
        """
        views = self.model.views(batch.packed, batch.counts) if any(self.l2.values()) else {}
        norms = []
        for name, view in views.items():
            if weight := self.l2.get(name, 0.0):
                params = self.model.parameters_of(name, view)
                sizes = [torch.linalg.vector_norm(param, dtype=_at_least_float32(param)) for param in params]
                norms.append(weight * torch.linalg.vector_norm(torch.stack(sizes)))
        return norms

    @torch.no_grad()
    def _by_teacher(self, batch: Batch, seed: Tensor) -> dict[str, Tensor]:
        teacher = self.teacher or {}
        with substituted(self.model, lambda param: teacher.get(param, param)), statistics_kept(self.model):
            return self.model(batch.packed, batch.counts, seed=seed)


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
