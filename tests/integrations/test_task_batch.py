"""TaskBatch: the gradients of all tasks by one backward are those of a backward for each, or the batch is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from minbert.integrations import GradientSurgery, TaskBatch

transformers = pytest.importorskip("transformers", reason="needs transformers, of the extra [test]")

TASKS = [0, 0, 0, 1, 1, 3]  # the task 2 has no examples
SHAPE = {"vocab_size": 60, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SMALL = {"hidden_size": 32, **SHAPE}


def encoder(name: str = "Bert", attention: str = "sdpa", dtype: torch.dtype = torch.float64, **options) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **options})
    model = getattr(transformers, f"{name}Model")(config).to(dtype)
    if attention == "minbert":
        from minbert.integrations.transformers import register

        register()
    model.set_attn_implementation(attention)
    return model


class Network(nn.Module):
    """An encoder, and a head for each of four tasks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        dtype = next(model.parameters()).dtype
        self.encoder, self.heads = model, nn.ModuleList(nn.Linear(32, 2, dtype=dtype) for _ in range(4))
        self.mask = (torch.arange(9) < torch.tensor([5, 9, 3, 7, 9, 4])[:, None]).long()
        self.ids = torch.randint(5, 60, (6, 9)) * self.mask

    def losses(self, batch: TaskBatch, split: bool) -> list[Tensor | None]:
        if split:
            with batch:
                hidden = self.encoder(self.ids, attention_mask=self.mask).last_hidden_state
        else:
            hidden = self.encoder(self.ids, attention_mask=self.mask).last_hidden_state
        return [
            head(hidden[batch.rows(t), 0]).square().mean() if batch.sizes[t] else None
            for t, head in enumerate(self.heads)
        ]


def gradients(network: Network, split: bool) -> list[list[Tensor]]:
    """Each loss's gradients of all parameters, zeros where there is none."""
    parameters = list(network.parameters())
    batch = TaskBatch(network.encoder, TASKS)
    torch.manual_seed(1)  # of dropout
    losses = network.losses(batch, split)
    if split:
        rows = batch.gradients("test", losses, parameters)
    else:
        rows = [
            [None] * len(parameters)
            if loss is None
            else torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            for loss in losses
        ]
    return [
        [torch.zeros_like(p) if grad is None else grad for grad, p in zip(row, parameters, strict=True)] for row in rows
    ]


def check(network: Network, rtol: float = 1e-10, atol: float = 1e-13) -> None:
    expected, got = gradients(network, split=False), gradients(network, split=True)
    assert all(grad.any() for grad in expected[0][:5])
    for rows in zip(expected, got, strict=True):
        for one, other in zip(*rows, strict=True):
            torch.testing.assert_close(other, one, rtol=rtol, atol=atol)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "minbert"])
def test_they_are_those_of_a_backward_for_each_task(attention: str) -> None:
    """With padding, dropout, position embeddings that all examples share, and a task without examples."""
    dropout = {} if attention == "sdpa" else {"attention_probs_dropout_prob": 0.0}
    check(Network(encoder("Bert", attention, **dropout)).train())


@pytest.mark.parametrize("name", ["Roberta", "DistilBert", "Albert", "Electra", "ModernBert"])
def test_so_they_are_for_other_encoders(name: str) -> None:
    options = {
        "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
        "ModernBert": {token: 0 for token in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id")},
    }
    check(Network(encoder(name, **options.get(name, {}))).eval())


def test_in_bfloat16_they_differ_by_rounding() -> None:
    network = Network(encoder(dtype=torch.float32)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = gradients(network, split=False), gradients(network, split=True)
    for rows in zip(expected, got, strict=True):
        one, other = (torch.cat([grad.flatten() for grad in row]) for row in rows)
        assert (one - other).norm() <= 0.02 * one.norm()


def test_one_backward_runs_and_surgery_is_the_same() -> None:
    results, backwards = [], []
    for split in (False, True):
        network = Network(encoder()).eval()
        network.encoder.encoder.layer[0].register_full_backward_hook(lambda *_, split=split: backwards.append(split))
        optimizer = GradientSurgery(torch.optim.SGD(network.parameters()), "upgrad")
        for hold in (True, False):
            batch = TaskBatch(network.encoder, TASKS)
            optimizer.backward(network.losses(batch, split), hold=hold, batch=batch if split else None)
        results.append([torch.zeros_like(p) if p.grad is None else p.grad for p in network.parameters()])
    assert backwards == [False] * 6 + [True] * 2
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)


def test_its_matrix_products_are_those_of_the_plain_sum() -> None:
    """Where a backward for each of the three losses takes three times the products of a backward."""
    counts = {}
    for name in ("plain", "split", "each"):
        network = Network(encoder(attention="eager")).eval()
        optimizer = GradientSurgery(torch.optim.SGD(network.parameters()), "upgrad")
        batch = TaskBatch(network.encoder, TASKS)
        with FlopCounterMode(display=False) as counter:
            losses = network.losses(batch, split=name == "split")
            forward = counter.get_total_flops()
            if name == "plain":
                torch.stack([loss for loss in losses if loss is not None]).sum().backward()
            else:
                optimizer.backward(losses, batch=batch if name == "split" else None)
        counts[name] = counter.get_total_flops() - forward
    assert counts["split"] == counts["plain"] > 0
    assert counts["each"] > 2.9 * counts["plain"]


# What is refused ----------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """A module whose parameter is used in a way that cannot be split."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.scale, self.linear = how, nn.Parameter(torch.ones(4)), nn.Linear(4, 4)
        self.table = nn.Embedding(8, 4, max_norm=1.0 if how == "max_norm" else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "scale":
            return x * self.scale
        if self.how == "transposed":
            return self.linear(x.transpose(0, 1))
        if self.how == "max_norm":
            return self.table(torch.zeros(len(x), dtype=torch.int64))
        if self.how == "one tensor":
            return torch.cat([x, self.scale[None]])
        with torch.no_grad():
            x = self.linear(x).type_as(self.scale)
        return self.linear(x.view(-1, *self.scale.shape))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("scale", r"the parameter scale is used by mul; only linear, layer_norm, .* of tensors \[6, \.\.\.\]"),
        ("transposed", r"the parameter linear\.weight is used by linear on a tensor \[4, 6\]"),
        ("max_norm", r"the parameter table\.weight is an embedding with max_norm"),
        ("one tensor", r"the parameter scale is used by __getitem__"),
    ],
)
def test_a_parameter_that_is_used_otherwise_is_refused(how: str, message: str) -> None:
    module = Odd(how)
    with pytest.raises(ValueError, match=message), TaskBatch(module, TASKS):
        module(torch.ones(6, 4))


def test_its_shape_and_what_autograd_does_not_see_are_fine() -> None:
    module = Odd("fine")
    with TaskBatch(module, TASKS) as batch:
        y = module(torch.ones(6, 4))
    losses = [y[batch.rows(t)].sum() if batch.sizes[t] else None for t in range(4)]
    rows = batch.gradients("test", losses, [module.linear.bias])
    assert [None if row[0] is None else row[0][0].item() for row in rows] == [3.0, 2.0, None, 1.0]


def test_a_checkpoint_is_refused() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    batch = TaskBatch(module, [0, 1, 1])
    with batch:
        hidden = checkpoint(module, torch.ones(3, 4), use_reentrant=False)
    optimizer = GradientSurgery(torch.optim.SGD(module.parameters()))
    with pytest.raises(ValueError, match=r"runs a part of the batch's block again outside of it, .*; switch gradient"):
        optimizer.backward([hidden[:1].sum(), hidden[1:].sum()], batch=batch)
    assert module[0].weight.grad is None


def test_losses_that_cannot_be_told_apart_are_refused() -> None:
    module, between, head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)
    optimizer = GradientSurgery(torch.optim.SGD([*module.parameters(), *between.parameters(), *head.parameters()]))
    batch = TaskBatch(module, [0, 1, 1])
    with batch:
        hidden = module(torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"losses 0 and 1 reach parameter 2, of shape \[4, 4\], which is not of the b"):
        optimizer.backward([head(between(hidden))[:1].sum(), between(hidden)[1:].sum()], batch=batch)
    outside = [hidden[:1].sum() + module.weight.sum(), hidden[1:].sum()]
    with pytest.raises(ValueError, match=r"losses\[0\] uses the parameter weight of the batch's module outside of the"):
        optimizer.backward(outside, batch=batch)
    with pytest.raises(ValueError, match="losses must be one for each of the batch's 2 tasks, got 3"):
        optimizer.backward([hidden.sum()] * 3, batch=batch)
    assert module.weight.grad is None


def test_messages_of_construction() -> None:
    module = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"task_of_example must not decrease; sort the batch by task, for instance by"):
        TaskBatch(module, torch.tensor([0, 1, 0]))
    with pytest.raises(ValueError, match="task_of_example must be below tasks, 2, got 2"):
        TaskBatch(module, [0, 1, 2], tasks=2)
    for wrong in ([], [0.5, 1.0], [-1, 0]):
        with pytest.raises(ValueError, match="task_of_example must hold numbers from 0 on, got"):
            TaskBatch(module, wrong)
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, got list"):
        TaskBatch([module.weight], [0, 1])


def test_a_task_beyond_the_batch_is_named() -> None:
    batch = TaskBatch(nn.Linear(2, 2), [0, 1])
    with pytest.raises(ValueError, match="TaskBatch: no task 2 in a batch of 2; give tasks="):
        batch.rows(2)
    batch = TaskBatch(nn.Linear(2, 2), [0, 2], tasks=4)
    assert batch.sizes == [1, 0, 1, 0]
    assert [batch.rows(t) for t in (1, 3)] == [slice(1, 1), slice(2, 2)]
