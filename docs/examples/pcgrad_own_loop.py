"""PCGrad in a loop of your own: three regression tasks, one much louder than the others, share a narrow trunk.

Prints how often their gradients conflict, and every task's error under the plain sum and under PCGrad.
"""

import torch
from torch import Tensor, nn

from minbert.integrations import PCGrad

STEPS, LOUDNESS = 200, (1.0, 1.0, 8.0)


def train(surgery: bool) -> tuple[list[float], int]:
    """Each task's share of unexplained variance at the end, and the steps in which two gradients conflicted."""
    torch.manual_seed(0)
    x = torch.randn(256, 16)
    targets = [loud * torch.tanh(x @ torch.randn(16, 1) / 4) for loud in LOUDNESS]
    trunk = nn.Sequential(nn.Linear(16, 2), nn.Tanh())
    heads = nn.ModuleList(nn.Linear(2, 1) for _ in targets)
    inner = torch.optim.Adam([*trunk.parameters(), *heads.parameters()], lr=1e-2)
    optimizer = PCGrad(inner, generator=torch.Generator().manual_seed(0))

    conflicts = 0
    losses: list[Tensor] = []
    for _ in range(STEPS):
        hidden = trunk(x)
        losses = [nn.functional.mse_loss(head(hidden), y) for head, y in zip(heads, targets, strict=True)]
        optimizer.zero_grad()
        if surgery:
            optimizer.pc_backward(losses)  # in place of sum(losses).backward()
            conflicts += int((optimizer.conflicts.cosine < 0).any())
        else:
            sum(losses).backward()
        optimizer.step()
    return [(loss / y.var()).item() for loss, y in zip(losses, targets, strict=True)], conflicts


if __name__ == "__main__":
    plain, _ = train(surgery=False)
    projected, conflicts = train(surgery=True)
    print(f"gradients conflicted in {conflicts} of {STEPS} steps; unexplained variance of the tasks:")
    for name, errors in (("plain sum", plain), ("PCGrad", projected)):
        print(f"{name:10}" + "".join(f"{error:8.3f}" for error in errors))
