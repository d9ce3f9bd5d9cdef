"""What the host does for an update: BERT-base's 199 parameters and three heads, with a gradient of each of 3 tasks.

The native calls of `gram` and `combine_adamw_` are left out. What remains is the work of the host, which on a GPU comes
before the next launch. Replayed gradients are those of a CUDA graph, whose addresses are known from the replay before.
The peer does the same with the public ops, which check and look up every tensor in every call, and counts the steps of
each parameter, as torch does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from bench_surgery import TASKS, bert_shapes
from torch import Tensor, nn

from minbert import kernels
from minbert.distributed.process_group import ProcessGroup
from minbert.distributed.unsharded_parameters import UnshardedParameters
from minbert.kernels import checks, native_calls
from minbert.methods.surgery import find_surgery
from minbert.methods.task_gradients import TaskGradients
from minbert.seeds import derive_seed
from minbert.training.objective import Losses
from minbert.training.optimizer import AdamW
from minbert.training.step_result import PendingUpdate
from minbert.training.trainer import gradient_products, step_numbers

CALLS = 200
NAMES = ("sst", "qqp", "sts")
OPTIONS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8}


class Update:
    """The update of `training_step`, part by part."""

    def __init__(self) -> None:
        trunk = nn.ParameterList([torch.ones([1] * len(shape)) for shape in bert_shapes(768, 12, 30522)])
        heads = nn.ModuleDict({name: nn.Linear(1, 1) for name in NAMES})
        self.params, self.heads = list(trunk.parameters()), list(heads.parameters())
        self.groups = [
            {"params": [param for param in params if (param.ndim > 1) == decays], "weight_decay": 0.01 * decays}
            for params in (self.params, self.heads)
            for decays in (True, False)
        ]
        self.parameters = UnshardedParameters(heads)
        self.optimizer = AdamW(self.parameters.param_groups(self.groups), **OPTIONS)
        self.gradients = TaskGradients(trunk, TASKS)
        self.parameters.register_hooks(self.gradients)
        self.group, (self.surgery,) = ProcessGroup(device=torch.device("cpu")), find_surgery("pcgrad")
        leaves = [*self.gradients.leaves, *self.heads]
        self.replayed: list[Tensor | None] = [torch.ones_like(leaf) for leaf in leaves]
        for leaf, grad in zip(leaves, self.replayed, strict=True):
            leaf.grad = grad
        of_tasks = {name: torch.ones(()) for name in NAMES}
        self.losses = [
            Losses(of_tasks, of_tasks, {}, {}, torch.ones(()), torch.ones(()), torch.ones((), dtype=torch.float64))
        ]

    def parts(self, replayed: bool) -> list[tuple[str, Callable[[], object]]]:
        """Each part by its name; to be called in this order, since each reads the results of those before."""
        found: dict[str, Any] = {}

        def gradients() -> None:
            parameters = self.parameters
            found["tables"] = (
                parameters.replayed_gradients(self.replayed) if replayed else parameters.wait_for_gradients()
            )

        def products() -> None:
            found["products"] = gradient_products(*found["tables"], self.losses, self.group)

        def weights() -> None:
            generator, of = torch.Generator().manual_seed(derive_seed(0, "surgery", 1, 0)), found["products"]
            found["weights"], found["stats"] = self.surgery.weights(of.gram, generator, of.own_square, 1.0)

        def adamw() -> None:
            stats = found["stats"]
            found["counted"] = self.optimizer.combined_step(
                *found["tables"], found["weights"], stats[1:2], skip_unless=stats[2]
            )

        def numbers() -> None:
            read = step_numbers(self.losses, found["products"], found["weights"], found["stats"], found["stats"][2])
            PendingUpdate(read, self.optimizer, found["counted"])

        return [(part.__name__, part) for part in (gradients, products, weights, adamw, numbers)]


class PublicOps(Update):
    """The same update by the public ops alone."""

    def __init__(self) -> None:
        super().__init__()
        state = [*self.params, *self.heads]
        self.moments = {param: (torch.zeros_like(param), torch.zeros_like(param)) for param in state}
        self.steps = {param: torch.zeros(()) for param in state}

    def parts(self, replayed: bool) -> list[tuple[str, Callable[[], object]]]:
        own = [param.grad for param in self.heads]
        found: dict[str, Any] = {}

        def gradients() -> None:
            found["rows"] = self.gradients.rows

        def products() -> None:
            found["gram"], found["own"] = kernels.gram(found["rows"]), kernels.gram([own])

        def weights() -> None:
            generator = torch.Generator().manual_seed(derive_seed(0, "surgery", 1, 0))
            found["weights"], found["stats"] = self.surgery.weights(found["gram"], generator, found["own"][0, 0], 1.0)

        def adamw() -> None:
            columns = dict(zip(self.params, zip(*found["rows"], strict=True), strict=True))
            for group in self.groups:
                shared = group["params"][0] in columns
                grads = [columns[param] if shared else [param.grad] for param in group["params"]]
                for param in group["params"]:
                    self.steps[param] += 1
                first, second = zip(*(self.moments[param] for param in group["params"]), strict=True)
                kernels.combine_adamw_(
                    group["params"],
                    list(zip(*grads, strict=True)),
                    found["weights"] if shared else found["stats"][1:2],
                    first,
                    second,
                    step=int(self.steps[group["params"][0]]),
                    weight_decay=group["weight_decay"],
                    skip_unless=found["stats"][2],
                    **OPTIONS,
                )

        return [(part.__name__, part) for part in (gradients, products, weights, adamw)]


def seconds_of(parts: Sequence[tuple[str, Callable[[], object]]], calls: int) -> dict[str, float]:
    """The median time of each part, and of all."""
    times: dict[str, list[float]] = {name: [] for name, _ in parts}
    for _ in range(calls):
        for name, part in parts:
            start = time.perf_counter()
            part()
            times[name].append(time.perf_counter() - start)
    of_update = [sum(of) for of in zip(*times.values(), strict=True)]
    return {name: statistics.median(of) for name, of in [*times.items(), ("update", of_update)]}


def test_host_time_of_an_update(benchmark, record, smoke: bool, monkeypatch) -> None:
    calls = 3 if smoke else CALLS
    monkeypatch.setattr(native_calls, "run", lambda *_: None)
    monkeypatch.setattr(checks, "permutations", lambda *_: None)  # looks at numbers, on CPUs only
    with torch.no_grad():
        cases = {
            "minbert": Update().parts(replayed=False),
            "minbert, replayed gradients": Update().parts(replayed=True),
            "public ops": PublicOps().parts(replayed=False),
        }
        ours, *others = cases
        measured = {ours: benchmark.pedantic(seconds_of, args=(cases[ours], calls), rounds=1)}
        measured |= {name: seconds_of(cases[name], calls) for name in others}
    for name, parts in measured.items():
        for part, seconds in parts.items():
            record(f"host time of an update, {part}", name, seconds, seconds / measured[ours][part])
