"""Gradient surgery around any torch optimizer, by every rule of minbert, in a training loop of one's own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from minbert.errors import UserError
from minbert.integrations.averaged_gradients import averaged, processes, reached_anywhere
from minbert.integrations.gradients_per_loss import (
    accumulate_grad,
    check_losses,
    check_parameters,
    contiguous_as,
    loss_gradients,
    preserved_grad,
    python_functions,
)
from minbert.integrations.surgery_memory import SurgeryMemory
from minbert.integrations.task_batch import TaskBatch
from minbert.integrations.wrapped_optimizer import WrappedOptimizer
from minbert.kernels import checks, combine, gram, surgery_weights
from minbert.methods.surgery import Conflicts, mean_weights, pcgrad_weights, sum_weights
from minbert.methods.user_weighting import has_parameter
from minbert.methods.weighting_state import UnsupportedAttribute, restore_state, state_of
from minbert.methods.weightings import Weighting, weighting_from

_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {"sum": sum_weights, "mean": mean_weights}


class GradientSurgery(WrappedOptimizer):
    """An optimizer whose gradient is a weighted sum of the tasks' gradients, by a rule on their Gram matrix.

        optimizer = GradientSurgery(torch.optim.AdamW(model.parameters(), lr=1e-5), "cagrad(c=0.4)")
        optimizer.zero_grad()
        optimizer.backward([first_loss, second_loss])  # in place of (first_loss + second_loss).backward()
        optimizer.step()

    It is a torch.optim.Optimizer with the parameter groups, state and hooks of the inner optimizer, `.optimizer`:
    learning-rate schedules, GradScaler, accelerate, transformers' and Lightning's trainers take either. `state_dict`
    holds the rule's state and the generator's beside the inner optimizer's, so that a run resumes to the bit.

    Surgery is about the shared parameters: their gradients alone are weighted, and alone enter inner products. Every
    other parameter gets the sum of its gradients: a head gets its task's. `.grad` is added to, as with `backward`;
    parameters that no loss reaches keep theirs. The backward of the last loss frees the graph.

    Accumulation over several batches is of one of two kinds. `backward(losses)` for each batch applies surgery to each
    batch's gradients and adds up the results, with T + 1 gradients in memory during the call. `backward(losses,
    hold=True)` for all batches but the last keeps the gradients of each task, and the last call applies surgery to
    their sums: the update is that of one large batch, with T gradients in memory between calls. Divide the losses by
    the number of batches in either case.

    Where a torch process group is initialised, each call that is not held averages the gradients over its processes:
    the T gradients of shared parameters and one of each other, in flat buckets, once. All processes use the weights of
    the first. The model may be wrapped in DistributedDataParallel or not. The wrapper broadcasts parameters at
    construction and buffers in each forward; without it, broadcast the parameters at the start. Its own reduction does
    not start, since torch.autograd.grad accumulates nothing, and its no_sync() has no effect: `hold=True` has that one.
    Losses of some processes may be None or leave parameters unused, which counts as zeros. SyncBatchNorm communicates
    in the backward too, so that its losses must be there on all processes. Sharded parameters (FSDP) are not supported.

    Gradients are torch.autograd.grad's. A graph with a checkpoint of torch.utils.checkpoint(..., use_reentrant=True),
    whose parameters it does not show, is refused.

    Args:
        optimizer: its parameters are float32, bfloat16 or float64, on one device.
        rule: "sum", "mean", "pcgrad" or a name of `minbert.methods.weightings`, with options like "cagrad(c=0.4)"; an
            object of these; or a callable, gram float64 [T, T] -> weights [T], like TorchJD's weightings, which gets
            `losses`, float64 [T], too if it has a parameter of that name.
        reduction: "sum" or "mean", the unweighted combination: of PCGrad's projected gradients; of gradients that are
            not finite; and what `conflicts.projected_share` compares with.
        shared: the parameters that surgery applies to; when left out, those that at least two of an update's losses
            reach.
        generator: a CPU generator for the rules that draw; torch's default generator when left out.
        process_group: whose processes average; torch's default group when left out.

    Attributes:
        conflicts: the `minbert.methods.surgery.Conflicts` between the gradients of the last update, NaN without shared
            parameters; None before the first.
        weights: the weights of the last update, float64 [T]; None before the first.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """

    _name: ClassVar[str] = "GradientSurgery"
    _method: ClassVar[str] = "GradientSurgery.backward"

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rule: str | Weighting | Callable[..., Tensor] = "upgrad",
        *,
        reduction: str = "sum",
        shared: Iterable[Tensor] | None = None,
        generator: torch.Generator | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        name = self._name
        super().__init__(optimizer)
        checks.choice(name, "reduction", reduction, tuple(_PLAIN))
        if not isinstance(generator, torch.Generator | None):
            raise TypeError(f"{name}: generator must be a torch.Generator or None, got {type(generator).__name__}")
        if generator is not None and generator.device.type != "cpu":
            raise ValueError(f"{name}: generator must be a CPU generator, got one of {generator.device}")
        if rule == "pcgrad":
            rule = partial(pcgrad_weights, generator=generator, reduction=reduction)
        elif isinstance(rule, str):
            rule = _PLAIN.get(rule) or self._named(rule)
        elif not callable(rule) and not isinstance(rule, Weighting):
            raise TypeError(f"{name}: rule must be a name, a Weighting or a callable, got {type(rule).__name__}")
        self._rule: Weighting | Callable[..., Tensor] = rule
        self._needs_losses = rule.needs_losses if isinstance(rule, Weighting) else has_parameter(rule, "losses")
        self._plain, self._reduction = _PLAIN[reduction], reduction
        self._generator, self._group = generator, process_group
        self._shared = None if shared is None else self._known(shared)
        self._memory = SurgeryMemory()

    @property
    def conflicts(self) -> Conflicts | None:
        return self._memory.conflicts

    @property
    def weights(self) -> Tensor | None:
        return self._memory.weights

    def backward(
        self,
        losses: Iterable[Tensor | None],
        *,
        hold: bool = False,
        batch: TaskBatch | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """Add the losses' gradients after surgery to the parameters' `.grad`.

        The losses may share a graph, which the backward of the last one frees. If a shared parameter's gradient is not
        finite, the rule is not asked, and `.grad` gets the plain sum or mean, which is not finite either.

        Args:
            losses: T scalars, one per task; each of them reaches a parameter of the optimizer. None stands for a task
                without examples in this batch.
            hold: keep the gradients of each task for the next call, and leave `.grad` as it is. `zero_grad` drops them.
            batch: in which the losses were computed, for one backward instead of T.
            scaler: scales the losses, which are given unscaled: rules that compare losses or the lengths of gradients
                from one update to the next need both unscaled. For other rules the losses may be scaled ones.

        Raises:
            ValueError, TypeError: `losses`, a gradient, or what the rule returned is not as described, or the graph
                hides parameters; `.grad` is as before.
        """
        where = self._method
        parameters = self._trainable()
        check_parameters(where, parameters)
        losses = check_losses(where, losses)
        present = [loss for loss in losses if loss is not None]
        if not present and processes(self._group) == 1:
            raise ValueError(f"{where}: losses must hold one scalar tensor per task, got {len(losses)} times None")
        functions = python_functions(where, present)
        scaled = losses if scaler is None else [None if loss is None else scaler.scale(loss) for loss in losses]
        with preserved_grad(where, parameters):
            found = loss_gradients(scaled, parameters) if batch is None else batch.gradients(where, scaled, parameters)
        grads = [
            [contiguous_as(where, grad, parameters[k], task, k) for k, grad in enumerate(row)]
            for task, row in enumerate(found)
        ]
        for task, row in enumerate(grads):
            if losses[task] is not None and not any(grad is not None for grad in row):
                raise ValueError(
                    f"{where}: losses[{task}] reaches no parameter of the optimizer; leave it out, or give"
                    " the optimizer the parameters that it depends on"
                )
        self._warn_once(
            functions, [not any(grad is not None for grad in column) for column in zip(*grads, strict=True)]
        )
        rows, values = self._memory.plus(where, parameters, grads, losses)
        if hold:
            self._memory.rows, self._memory.losses = rows, values
        else:
            self._update(parameters, rows, values, 1.0 if scaler is None else scaler.get_scale())
            self._memory.drop()

    @torch.no_grad()
    def _update(
        self, parameters: list[Tensor], rows: list[dict[Tensor, Tensor]], losses: list[list[Tensor]], scale: float
    ) -> None:
        """Average the gradients over the processes, weight them, and add them to `.grad`."""
        device = parameters[0].device
        reached = torch.tensor([[parameter in row for parameter in parameters] for row in rows], device=device)
        given = torch.tensor([bool(values) for values in losses], device=device)
        total = torch.stack([sum(values, torch.zeros((), dtype=torch.float64, device=device)) for values in losses])
        distributed = processes(self._group) > 1
        if distributed:
            reached, total, given = reached_anywhere(self._method, reached, total, given, self._group)
        columns = dict(zip(parameters, reached.T.tolist(), strict=True))
        if self._shared is None:
            shared = [parameter for parameter in parameters if sum(columns[parameter]) > 1]
        else:
            shared = [parameter for parameter in parameters if parameter in self._shared]
        chosen = set(shared)
        others = [parameter for parameter in parameters if parameter not in chosen]
        grads = [[row.get(parameter) for parameter in shared] for row in rows]
        own = [[row.get(parameter) for parameter in others] for row in rows]
        if distributed:
            own = [combine(own, torch.ones(len(own), dtype=torch.float64))]
            places = [(row, k, p) for t, row in enumerate(grads) for k, p in enumerate(shared) if columns[p][t]]
            places += [(own[0], k, p) for k, p in enumerate(others) if any(columns[p])]
            present = [torch.zeros_like(p) if (grad := row[k]) is None else grad for row, k, p in places]
            for (row, k, _), grad in zip(places, averaged(present, self._group), strict=True):
                row[k] = grad

        products = gram(grads)
        finite = bool(products.isfinite().all())
        weights = self._weights(products / scale**2, total, given) if finite else self._plain(products)
        if distributed:
            dist.broadcast(weights, group_src=0, group=self._group)
        _, stats = surgery_weights(products, weights=weights, reduction=self._reduction)
        self._memory.conflicts, self._memory.weights = Conflicts.of(products, stats[3].item()), weights
        accumulate_grad(shared, combine(grads, weights))
        accumulate_grad(others, combine(own, torch.ones(len(own), dtype=torch.float64)))

    def _weights(self, products: Tensor, losses: Tensor, given: Tensor) -> Tensor:
        """The rule's weights for a Gram matrix of finite numbers."""
        rule, memory, tasks = self._rule, self._memory, len(products)
        if self._needs_losses and not given.all():
            missing = given.tolist().index(False)
            raise ValueError(
                f"{self._method}: the rule needs a loss of every task in each update, got none of losses[{missing}]"
            )
        if isinstance(rule, Weighting):
            if memory.state is None:
                memory.state = rule.state(tasks, device=products.device)
            elif memory.state.device != products.device:
                memory.state = memory.state.to(products.device)
            weights = rule.weights(products, losses, memory.state, generator=self._generator)
        else:
            weights = rule(products, **({"losses": losses} if self._needs_losses else {}))
        if not isinstance(weights, Tensor) or weights.shape != products.shape[:1]:
            got = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise ValueError(f"{self._name}: weighting must return one weight for each of {tasks} losses, got {got}")
        return weights.detach().to(products)

    def _warn_once(self, functions: list[str], unreached: list[bool]) -> None:
        """Warn of gradients that may be missing."""
        if functions and any(unreached) and not self._memory.warned:
            self._memory.warned = True
            warnings.warn(
                f"{self._name}: no loss reaches {sum(unreached)} of {len(unreached)} parameters, and the losses' graph"
                f" has {', '.join(functions)}, written in Python: parameters that such a function uses without taking"
                " them as arguments get no gradient",
                stacklevel=3,
            )

    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        """The inner optimizer's `step`. A closure calls `zero_grad` and `backward`, and returns a loss.

        Raises:
            ValueError: gradients are held.
        """
        if closure is None and self._memory.rows:
            raise ValueError(
                f"{self._name}.step: the gradients of a call with hold=True wait for one without; call"
                " backward(losses) for the last batch, or zero_grad() to drop them"
            )
        return self.optimizer.step() if closure is None else self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The inner optimizer's `zero_grad`; held gradients are dropped too."""
        self._memory.drop()
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's, with the states of the rule and of the generator as "surgery" if there are any.

        The state of a callable is that of its attributes, or of `state_dict` and `load_state_dict` if its class has
        both. Held gradients are no part of it, like those in `.grad`.
        """
        saved: dict[str, Any] = {}
        if self._generator is not None:
            saved["generator"] = self._generator.get_state()
        if isinstance(self._rule, Weighting):
            if self._rule.state(1) is not None:
                state = self._memory.state
                saved |= {"rule": self._rule.rule, "state": None if state is None else state.clone()}
        else:
            try:
                if described := state_of(self._rule):
                    saved["callable"], saved["tensors"] = described
            except UnsupportedAttribute as attribute:
                warnings.warn(
                    f"{self._name}: the rule's attribute {attribute} cannot be saved, so that state_dict() lacks the"
                    " rule's state; give its class state_dict() and load_state_dict(state)",
                    stacklevel=2,
                )
        state_dict = self.optimizer.state_dict()
        return {**state_dict, "surgery": saved} if saved else state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned.

        Raises:
            ValueError: it lacks the state of this rule, or has another rule's. `.optimizer.load_state_dict` loads the
                inner optimizer's alone.
        """
        saved, rule = state_dict.get("surgery", {}), self._rule
        wanted = rule.rule if isinstance(rule, Weighting) and rule.state(1) is not None else None
        if saved.get("rule") != wanted:
            raise ValueError(
                f"{self._name}.load_state_dict: expected the state of the rule {wanted}, got that of"
                f" {saved.get('rule')}; to start the rule anew, call .optimizer.load_state_dict"
            )
        self.optimizer.load_state_dict({name: value for name, value in state_dict.items() if name != "surgery"})
        if wanted is not None:
            state = saved["state"]
            self._memory.state = None if state is None else state.clone()  # None: before the first update
        if "generator" in saved and self._generator is not None:
            self._generator.set_state(saved["generator"].cpu())
        if "callable" in saved:
            restore_state(self._rule, saved["callable"], saved["tensors"], self._trainable()[0].device)

    def _named(self, rule: str) -> Weighting:
        try:
            return weighting_from(rule)
        except UserError as error:
            known = "sum, mean, pcgrad and those of minbert.methods.weightings.WEIGHTINGS"
            problem = str(error).replace("--surgery", "rule")
            raise ValueError(f"{self._name}: {problem} (rules: {known})") from None

    def _known(self, shared: Iterable[Tensor]) -> set[Tensor]:
        """`shared` as a set, all of it parameters of the optimizer."""
        name = self._name
        if isinstance(shared, Tensor):
            raise TypeError(f"{name}: shared must be a list of parameters, got one tensor; write [parameter]")
        chosen, known = list(shared), set(self._parameters())
        for index, parameter in enumerate(chosen):
            if not isinstance(parameter, Tensor):
                raise TypeError(f"{name}: shared[{index}] must be a parameter, got {type(parameter).__name__}")
            if parameter not in known:
                raise ValueError(
                    f"{name}: shared[{index}], of shape {list(parameter.shape)}, is no parameter of the optimizer; "
                    "give the optimizer every parameter of shared"
                )
        return set(chosen)
