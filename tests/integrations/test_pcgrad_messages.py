"""What PCGrad says of wrong input: one line that names the argument, and no gradient is touched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from minbert.integrations import PCGrad


def one_of(dtype: torch.dtype) -> tuple[nn.Parameter, list[Tensor]]:
    """A parameter of this dtype, and two losses of it."""
    parameter = nn.Parameter(torch.zeros(1, dtype=dtype))
    return parameter, [parameter.sum() for _ in range(2)]


def test_a_refused_call_leaves_grad_as_it_was() -> None:
    table, bias = nn.Embedding(10, 4, sparse=True), nn.Parameter(torch.zeros(4))
    bias.grad = torch.ones(4)
    optimizer = PCGrad(torch.optim.SGD([bias, table.weight]))
    losses = [(table(torch.tensor([1, 2])) + bias).sum() for _ in range(2)]
    message = (
        r"losses\[0\]'s gradient of parameter 1, of shape \[10, 4\], must be dense, got .*sparse_coo; .*sparse=False"
    )
    with pytest.raises(ValueError, match=message):
        optimizer.pc_backward(losses)
    assert bias.grad.tolist() == [1.0] * 4
    assert table.weight.grad is None


def test_messages_of_construction() -> None:
    parameter, stranger = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    inner = torch.optim.SGD([parameter])
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, got list"):
        PCGrad([parameter])
    with pytest.raises(ValueError, match="reduction must be one of 'sum', 'mean', got 'max'"):
        PCGrad(inner, reduction="max")
    with pytest.raises(ValueError, match=r"shared\[1\], of shape \[3\], is no parameter of the optimizer; give"):
        PCGrad(inner, shared=[parameter, stranger])
    with pytest.raises(TypeError, match=r"shared must be a list of parameters, got one tensor; write \[parameter\]"):
        PCGrad(inner, shared=parameter)
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator or None, got int"):
        PCGrad(inner, generator=1)
    with pytest.raises(TypeError, match=r"shared\[0\] must be a parameter, got str"):
        PCGrad(inner, shared=["trunk.weight"])
    with pytest.raises(ValueError, match="leave it out when giving a weighting"):
        PCGrad(inner, generator=torch.Generator(), weighting=torch.ones_like)


def test_messages_of_losses() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = PCGrad(torch.optim.SGD([parameter]))
    loss = parameter.sum()
    for wrong, error, message in [
        (loss, TypeError, r"losses must be a list of scalar tensors, got one Tensor; write \[loss\]"),
        (None, TypeError, r"losses must be a list of scalar tensors, got one NoneType; write \[loss\]"),
        ([], ValueError, "losses must hold one scalar tensor per task, got none"),
        ([loss, 1.0], TypeError, r"losses\[1\] must be a scalar tensor, got float"),
        ([parameter * 2], ValueError, r"losses\[0\] must be a scalar, got shape \[2\]; take its mean"),
        (
            [loss, loss.detach()],
            ValueError,
            r"losses\[1\] depends on nothing that requires gradients; compute it outside",
        ),
    ]:
        with pytest.raises(error, match=message):
            optimizer.pc_backward(wrong)
        assert parameter.grad is None
    parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="the optimizer needs a parameter that requires gradients, got none"):
        optimizer.pc_backward([torch.ones((), requires_grad=True)])


def test_messages_of_gradients_and_weights() -> None:
    parameter, losses = one_of(torch.float16)
    with pytest.raises(
        TypeError, match=r"must be float32, bfloat16 or float64, got torch\.float16; keep parameters in"
    ):
        PCGrad(torch.optim.SGD([parameter])).pc_backward(losses)
    for answer, got in ((torch.ones(3), r"\[3\]"), (2.0, "float")):
        parameter, losses = one_of(torch.float32)
        with pytest.raises(ValueError, match=f"must return one weight for each of 2 losses, got {got}"):
            PCGrad(torch.optim.SGD([parameter]), weighting=lambda gram, answer=answer: answer).pc_backward(losses)
        assert parameter.grad is None
