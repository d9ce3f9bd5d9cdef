"""What a training step minimises: task losses, SMART's regularisers, and the divergences from the Bregman teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from minbert.gradients import substituted
from minbert.losses import LOSSES
from minbert.model import MultitaskModel
from minbert.packing import Packed
from minbert.seeds import derive_seed
from minbert.smart import BregmanConfig, SmartConfig, at, divergences, perturb
from minbert.tasks import TASKS


@dataclass(frozen=True)
class Batch:
    """Sequences of one or several tasks, task after task in one stream."""

    packed: Packed
    labels: Mapping[str, Tensor]  # by task, in the stream's order

    @property
    def counts(self) -> dict[str, int]:
        """Each task's number of sequences."""
        return {name: len(labels) for name, labels in self.labels.items()}


@dataclass(frozen=True)
class Losses:
    """By task, scalars that a backward can start from; only the task losses when nothing else is on."""

    task: dict[str, Tensor]
    smart: dict[str, Tensor]  # R_s, not weighted
    bregman: dict[str, Tensor]  # D, not weighted
    total: Tensor  # of all tasks, weighted
    smart_term: Tensor  # SMART's part of it
    perturbation: Tensor | None = None  # mean over the tokens of the perturbation's infinity norm


class Objective:
    """The losses of a batch under a model.

    Args:
        model: what is trained.
        smart, bregman: what is added to the task losses.
        teacher: the average of each parameter's earlier values; needed when `bregman` is on.
    """

    def __init__(
        self,
        model: MultitaskModel,
        smart: SmartConfig,
        bregman: BregmanConfig,
        teacher: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        self.model, self.smart, self.bregman, self.teacher = model, smart, bregman, teacher

    def __call__(
        self,
        batch: Batch,
        tracked: Callable[[], AbstractContextManager[None]],
        *,
        seed: int,
        done: float = 1.0,
        on_phase: Callable[[str], None] = lambda name: None,
    ) -> Losses:
        """Losses of one batch; the clean pass serves the task losses and the regularisers alike.

        Args:
            tracked: gives a context in which a forward's parameters are those to differentiate with respect to.
            seed: what dropout and noise follow.
            done: share of all steps that are done.
            on_phase: called at the end of each phase, "forward" and "smart", with its name.
        """
        model, counts, device = self.model, batch.counts, batch.packed.token_ids.device
        dropout_seed, other_seed, noise_seed = (
            torch.tensor(derive_seed(seed, name), device=device) for name in ("dropout", "smart dropout", "smart noise")
        )
        with tracked():
            embedded = model.embed(batch.packed, dropout_seed)
            outputs = model.from_embedded(embedded, batch.packed, counts, seed=dropout_seed)
        task = {name: LOSSES[TASKS[name].loss](output, batch.labels[name]) for name, output in outputs.items()}
        terms = list(task.values())
        smart, smart_terms, bregman, size = {}, [torch.zeros((), device=device)], {}, None
        on_phase("forward")
        if self.smart.on:
            adversary = dropout_seed if self.smart.masks == "shared" else other_seed
            perturbed = perturb(
                model, embedded, batch.packed, outputs, self.smart, dropout_seed=adversary, noise_seed=noise_seed
            )
            size = (perturbed - embedded.detach()).abs().amax(1).float().mean()
            with tracked():
                moved = model.from_embedded(at(embedded, perturbed), batch.packed, counts, seed=adversary)
            smart = divergences(moved, outputs)
            smart_terms = [self.smart.weight(name, done) * value for name, value in smart.items()]
            on_phase("smart")
        if self.bregman.mu:
            bregman = divergences(outputs, self._by_teacher(batch, dropout_seed))
            terms += [self.bregman.mu * value for value in bregman.values()]
            on_phase("bregman")
        added = torch.stack(smart_terms).sum()
        return Losses(task, smart, bregman, torch.stack(terms).sum() + added, added.detach(), size)

    @torch.no_grad()
    def _by_teacher(self, batch: Batch, seed: Tensor) -> dict[str, Tensor]:
        teacher = self.teacher or {}
        with substituted(self.model, lambda param: teacher.get(param, param)):
            return self.model(batch.packed, batch.counts, seed=seed)
